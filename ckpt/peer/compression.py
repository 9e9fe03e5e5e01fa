"""Compression of file content on its way: which level, and whether at all.

`auto` watches the link. It compresses where the link is what everybody waits for and a processor is free, tries whether that carries
more, and stays with what carried more; when the link is no longer the bottleneck it tries without again. zstd at level 1 packs some
hundred MB/s a core, so a link of a few Gbit/s is faster without, one of 200 Mbit/s with.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from ckpt.host.cpu import IdleShare
from ckpt.model import Compression
from ckpt.peer.frames import ZSTD, Buffer, Frame

AUTO_LEVEL: Final = 1
WINDOW_S: Final = 0.25
_LONG_WINDOW_S: Final = 2.0
_WINDOW_BYTES: Final = 2 << 20
_STUCK: Final = 0.5
"""The link is the bottleneck when its writers wait for it for this part of the time ..."""
_FREE: Final = 0.2
"""... and is not when they wait less than this."""
_STUCK_WINDOWS: Final = 2
"""So long it must be the bottleneck before compression is tried. The first window also filled all buffers on the way: its rate says nothing."""
_STUCK_WINDOWS_BUSY: Final = 6
_IDLE: Final = 0.2
"""With less than this part of the processors' time idle it is likely to be in vain, and tried later."""
_GAIN: Final = 1.1
_FIRST_PAUSE_S: Final = 2.0
_LONGEST_PAUSE_S: Final = 30.0
_SMALL_BYTES: Final = 64 << 10
_SAMPLES: Final = 8
_SAMPLE_BYTES: Final = 4 << 10
_SAMPLE_STEP: Final = 37 << 10
_WORTH: Final = 0.9
_log = logging.getLogger("ckpt.peer")
_compressors = threading.local()


def _compress(data: Buffer, level: int) -> bytes:
    import zstandard

    mine: dict[int, zstandard.ZstdCompressor] | None = getattr(_compressors, "by_level", None)
    if mine is None:
        mine = _compressors.by_level = {}
    if level not in mine:
        mine[level] = zstandard.ZstdCompressor(level=level, write_content_size=True)
    packed: bytes = mine[level].compress(data)
    return packed


def sample_ratio(data: Buffer) -> float:
    """Roughly what compression leaves of the data: of eight pieces, taken at places that no usual pattern of pages or blocks repeats with."""
    view = memoryview(data)
    stride = len(view) // _SAMPLES
    places = (i * stride + i * _SAMPLE_STEP % max(1, stride - _SAMPLE_BYTES) for i in range(_SAMPLES))
    sample = view if stride < 2 * _SAMPLE_BYTES else b"".join(view[at : at + _SAMPLE_BYTES] for at in places)
    return len(_compress(sample, AUTO_LEVEL)) / len(sample) if sample else 1.0


def packed(frame: Frame, level: int) -> Frame:
    """The frame with its payload compressed, or as it is when that does not pay."""
    size_bytes = len(frame.payload)
    if size_bytes > _SMALL_BYTES and sample_ratio(frame.payload) > _WORTH:
        return frame
    small = _compress(frame.payload, level)
    if len(small) > _WORTH * size_bytes:
        return frame
    return Frame(frame.kind, frame.channel, small, frame.offset, frame.flags | ZSTD, size_bytes, frame.lease, frame.order)


class Packer:
    """Compresses the frames of a link, on all processors; Auto's decision counts when it is set."""

    def __init__(self, wanted: Compression) -> None:
        self._level = wanted.level if wanted.mode == "zstd" else None
        self.auto = Auto() if wanted.mode == "auto" else None
        self._pool: ThreadPoolExecutor | None = None

    def pack(self, frame: Frame) -> tuple[Frame | Future[Frame], int]:
        """The frame, or the one that it becomes, and the decision's epoch."""
        level, epoch = self._level, 0
        if self.auto is not None:
            level, epoch = self.auto.choose(frame.payload)
        if level is None:
            return frame, epoch
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "ckpt-zstd")
        return self._pool.submit(packed, frame, level), epoch

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


class Auto:
    """Decides, window by window, whether to compress. `choose` and `note` are called from different threads.

    Args:
        idle: the idle part of the processors' time since the last call.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, idle: Callable[[], float] | None = None) -> None:
        self._clock = clock
        self._idle = idle or IdleShare()
        self._lock = threading.Lock()
        self._level: int | None = None
        self._epoch = 0
        self._trial = False
        self._baseline = 0.0
        self._stuck_windows = 0
        self._samples: list[float] = []
        self._next_try_s = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self._all_bytes = self._packed_bytes = 0
        self._began_s: float | None = None
        self._raw_bytes = 0
        self._stuck_s = self._packing_s = 0.0

    @property
    def on(self) -> bool:
        return self._level is not None

    def said(self) -> str:
        """What was done with the bytes noted so far: `none`, `zstd:1`, `zstd:1 for 83 %`."""
        with self._lock:
            share = round(100 * self._packed_bytes / self._all_bytes) if self._all_bytes else 0
        return "none" if not share else f"zstd:{AUTO_LEVEL}" if share == 100 else f"zstd:{AUTO_LEVEL} for {share} %"

    def choose(self, data: Buffer) -> tuple[int | None, int]:
        """The level for this piece (None: as it is), and the epoch to give to `note` once it is written."""
        with self._lock:
            level, epoch, curious = self._level, self._epoch, self._stuck_windows > 0
        if curious and level is None:
            ratio = sample_ratio(data)
            with self._lock:
                self._samples.append(ratio)
                del self._samples[:-64]
        return level, epoch

    def note(self, epoch: int, raw_bytes: int, stuck_s: float, packing_s: float, *, packed: bool) -> None:
        """A piece was written.

        Args:
            raw_bytes: its size before compression.
            stuck_s: how long its writer waited for the link, or for the limit of the rate, since the last call.
            packing_s: how long it waited for a compressor.
            packed: whether it was compressed.
        """
        with self._lock:
            self._all_bytes += raw_bytes
            self._packed_bytes += raw_bytes if packed else 0
            if epoch != self._epoch:
                return  # queued before the last decision
            now_s = self._clock()
            if self._began_s is None:
                self._began_s = now_s
                self._idle()
                return
            self._raw_bytes += raw_bytes
            self._stuck_s += stuck_s
            self._packing_s += packing_s
            took_s = now_s - self._began_s
            if took_s < WINDOW_S or (self._raw_bytes < _WINDOW_BYTES and took_s < _LONG_WINDOW_S):
                return
            self._judge(now_s, self._raw_bytes / took_s, self._stuck_s / took_s, self._packing_s / took_s, self._idle())

    def _start(self) -> None:
        self._began_s = None
        self._raw_bytes = 0
        self._stuck_s = self._packing_s = 0.0

    def _switch(self, level: int | None, *, trial: bool) -> None:
        self._level = level
        self._trial = trial
        self._epoch += 1
        self._stuck_windows = 0
        self._samples.clear()

    def _judge(self, now_s: float, rate: float, stuck: float, packing: float, idle: float) -> None:
        _log.debug(
            "%.1f MiB/s, level %s, waits for the link %.2f, for compressors %.2f, idle %.2f", rate / (1 << 20), self._level, stuck, packing, idle
        )
        if self._trial:
            self._end_trial(now_s, rate)
        elif self._level is None:
            self._stuck_windows = self._stuck_windows + 1 if stuck >= _STUCK else 0
            worth = bool(self._samples) and sum(self._samples) / len(self._samples) <= _WORTH
            needed = _STUCK_WINDOWS if idle >= _IDLE else _STUCK_WINDOWS_BUSY
            if self._stuck_windows >= needed and worth and now_s >= self._next_try_s:
                self._baseline = rate
                self._switch(AUTO_LEVEL, trial=True)
        elif stuck < _FREE and (packing > _STUCK or now_s >= self._next_try_s):
            self._baseline = rate
            self._switch(None, trial=True)
        self._start()

    def _end_trial(self, now_s: float, rate: float) -> None:
        """Stay with what carries more; without compression when it is much the same."""
        with_it = self._level is not None
        better = rate > self._baseline * _GAIN if with_it else rate * _GAIN >= self._baseline
        words = "with" if with_it else "without"
        _log.info(
            "%s compression %.1f MiB/s, before %.1f MiB/s: %s", words, rate / (1 << 20), self._baseline / (1 << 20), "kept" if better else "back"
        )
        if better:
            self._pause_s = _FIRST_PAUSE_S
            self._switch(self._level, trial=False)
        else:
            self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
            self._switch(None if with_it else AUTO_LEVEL, trial=False)
        self._next_try_s = now_s + self._pause_s
