"""A link: one reader thread, one writer thread, heartbeats each way, and one end that everybody hears of."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, Generic, TypeVar

from ckpt.errors import CannotConnect, CkptError, TransferFailed
from ckpt.peer import messages
from ckpt.peer.frames import ZSTD, Buffer, BufferPool, Frame, FrameReader, FrameWriter, Kind, have_zstd, message, prepare

T = TypeVar("T")

QUEUE_BYTES: Final = 8 << 20
BEAT_S: Final = 1.0
LINK_TIMEOUT_S: Final = 15.0
_SMALL_BYTES: Final = 64 << 10
_SAMPLE_BYTES: Final = 16 << 10
_WORTH: Final = 0.9


class Closed(Exception):
    """The queue was closed and is empty."""


class ByteQueue(Generic[T]):
    """A queue bounded by the bytes that its items hold; one item always fits."""

    def __init__(self, limit_bytes: int = QUEUE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T, size_bytes: int = 0) -> bool:
        """Wait for room and append; False (and dropped) when the queue is closed."""
        with self._changed:
            while self._bytes and self._bytes + size_bytes > self._limit_bytes and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            self._items.append((item, size_bytes))
            self._bytes += size_bytes
            self._changed.notify_all()
            return True

    def get(self, timeout_s: float | None = None) -> T | None:
        """The next item, None when none came in time. Raises Closed."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._closed, timeout_s):
                return None
            if not self._items:
                raise Closed
            item, size_bytes = self._items.popleft()
            self._bytes -= size_bytes
            self._changed.notify_all()
            return item

    def close(self, *, drop: bool = False) -> None:
        """Take nothing more; what is queued can still be got unless `drop`."""
        with self._changed:
            self._closed = True
            if drop:
                self._items.clear()
                self._bytes = 0
            self._changed.notify_all()


_compressors = threading.local()


def _compressed(frame: Frame) -> Frame:
    """The frame with its payload compressed, or as it is when that does not pay."""
    import zstandard

    compressor = getattr(_compressors, "level1", None)
    if compressor is None:
        compressor = _compressors.level1 = zstandard.ZstdCompressor(level=1, write_content_size=True)
    view = memoryview(frame.payload)
    middle = len(view) // 2
    sample = view[middle : middle + _SAMPLE_BYTES]
    if len(view) > _SMALL_BYTES and len(compressor.compress(sample)) > _WORTH * len(sample):
        return frame
    packed: bytes = compressor.compress(view)
    if len(packed) > _WORTH * len(view):
        return frame
    return Frame(frame.kind, frame.channel, packed, frame.offset, frame.flags | ZSTD, len(view), frame.lease)


class Link:
    """Frames over a pair of descriptors.

    Args:
        inp, out: descriptors, taken over (and closed by `close`).
        on_frame: called in the reader thread for every frame but heartbeats; may block to slow the other side down.
        on_end: called once when the link ended: with None after the other side's goodbye, else with the cause.
        explain: makes the error for a cause; the client asks ssh what happened there.
    """

    def __init__(
        self,
        inp: int,
        out: int,
        *,
        on_frame: Callable[[Frame], None],
        on_end: Callable[[CkptError | None], None],
        explain: Callable[[CkptError], CkptError] = lambda cause: cause,
        link_timeout_s: float = LINK_TIMEOUT_S,
        beat_s: float = BEAT_S,
    ) -> None:
        for fd in {inp, out}:
            prepare(fd)
        self._fds = {inp, out}
        self._on_frame = on_frame
        self._on_end = on_end
        self._explain = explain
        self._beat_s = beat_s
        self._stop = threading.Event()
        self._ended = threading.Lock()
        self._shaken = False
        self._write_error: CkptError | None = None
        self.pool = BufferPool()
        self._reader = FrameReader(inp, silence_s=link_timeout_s, stopped=self._stop.is_set, pool=self.pool)
        self._writer = FrameWriter(out, stopped=self._stop.is_set)
        self._outbox: ByteQueue[Frame | Future[Frame]] = ByteQueue()
        self._pool: ThreadPoolExecutor | None = None
        self._threads: list[threading.Thread] = []
        self.error: CkptError | None = None
        self.remote: dict[str, Any] = {}
        """The other side's hello."""

    @property
    def preamble(self) -> str:
        """Text that came before the other side's hello."""
        return self._reader.preamble.decode(errors="replace").strip()

    @property
    def sent_bytes(self) -> int:
        """Bytes written so far, headers and all."""
        return self._writer.sent_bytes

    def handshake(self, timeout_s: float) -> bool:
        """Say hello, hear hello, start the threads; False when the other side ended without a word.

        Raises:
            CannotConnect: no hello in time.
            PeerVersion: the other side speaks another protocol.
            TransferFailed: what came was damaged.
        """
        self._outbox.put(message(Kind.HELLO, 0, messages.hello()))
        self._start(self._write_loop, "ckpt-link-writer")
        try:
            frame = self._reader.hello(timeout_s)
        except TimeoutError:
            raise CannotConnect(f"the other side did not answer within {timeout_s:g} s") from None
        if frame is None:
            return False
        self.remote = frame.json()
        messages.check_hello(self.remote)
        self._shaken = True
        if self._write_error is not None:
            self._broken(self._write_error)
        self._start(self._read_loop, "ckpt-link-reader")
        return True

    def _start(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def send(self, frame: Frame) -> None:
        """Queue a frame; waits while the queue is full. Raises the link's error when it has ended."""
        self._put(frame, len(frame.payload))

    def send_json(self, kind: Kind, channel: int, value: dict[str, Any] | None = None) -> None:
        """Queue a control message."""
        self.send(message(kind, channel, value or {}))

    def send_data(self, channel: int, offset: int, data: Buffer, *, compress: bool, lease: bytearray | None = None) -> None:
        """Queue a piece of a file; compression runs on all cores and keeps the order.

        Args:
            lease: the buffer of `pool` that `data` lies in; it goes back there once sent.
        """
        frame = Frame(Kind.DATA, channel, data, offset, lease=lease)
        if not (compress and self.remote.get("zstd") and have_zstd()):
            self._put(frame, len(data))
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "ckpt-zstd")
        self._put(self._pool.submit(_compressed, frame), len(data))

    def _put(self, item: Frame | Future[Frame], size_bytes: int) -> None:
        if not self._outbox.put(item, size_bytes):
            raise self.failure()

    def failure(self) -> CkptError:
        """The error to raise for a link that has ended."""
        return messages.again(self.error) if self.error else TransferFailed("the link was closed")

    def _write_loop(self) -> None:
        try:
            while True:
                try:
                    item = self._outbox.get(self._beat_s)
                except Closed:
                    return
                if item is None:
                    item = Frame(Kind.BEAT)
                frame = item.result() if isinstance(item, Future) else item
                self._writer.write(frame)
                self.pool.give(frame.lease)
        except CkptError as error:
            self._unsent(error)
        except Exception as error:
            self._unsent(TransferFailed(f"cannot send: {type(error).__name__}: {error}"))

    def _unsent(self, cause: CkptError) -> None:
        # Before the hello the reader finds the end by itself, and ssh's exit status tells more than a broken pipe does.
        self._write_error = cause
        if self._shaken:
            self._broken(cause)

    def _read_loop(self) -> None:
        try:
            while (frame := self._reader.read()) is not None:
                if frame.kind is Kind.BYE:
                    self._end(None)
                    return
                if frame.kind is not Kind.BEAT:
                    self._on_frame(frame)
            raise TransferFailed("the link was cut")
        except CkptError as error:
            self._broken(error)
        except Exception as error:
            self._broken(TransferFailed(f"cannot receive: {type(error).__name__}: {error}"))

    def _broken(self, cause: CkptError) -> None:
        if not self._stop.is_set():
            self._end(cause)

    def _end(self, cause: CkptError | None) -> None:
        if not self._ended.acquire(blocking=False):
            return
        if cause is not None:
            self.error = self._explain(cause)
            self._stop.set()
            self._outbox.close(drop=True)
        self._on_end(self.error)

    def interrupt(self) -> None:
        """End the link from this side, as if it had been cut."""
        self._broken(TransferFailed("ended by a signal"))

    def close(self, *, goodbye: bool, timeout_s: float = 5.0) -> None:
        """End the link. With `goodbye` everything queued is sent first, then a BYE, and the other side's BYE is waited for."""
        deadline_s = time.monotonic() + timeout_s
        goodbye = goodbye and self.error is None
        if goodbye:
            self._outbox.put(Frame(Kind.BYE))
        self._outbox.close(drop=not goodbye)
        if goodbye:
            for thread in self._threads:  # the writer comes first
                thread.join(max(0.0, deadline_s - time.monotonic()))
        self._stop.set()
        for thread in self._threads:
            thread.join(2.0)
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        if not any(thread.is_alive() for thread in self._threads):
            for fd in self._fds:
                os.close(fd)
        self._fds = set()
