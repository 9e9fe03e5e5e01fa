"""zstd frames of an archive: written on all cores, each by itself, so that each can be read by itself."""

from __future__ import annotations

import os
import threading
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

from ckpt.archive.index import FRAME_BYTES, LARGE_BYTES, Frame, Sizes
from ckpt.errors import ArchiveInvalid

WINDOW_BYTES: Final = 1 << 27
"""The largest window that `zstd -d` takes without being asked; the frames of an archive have at most 2^22."""
_THREADS_CAP: Final = 16


class FrameSink:
    """Cuts a stream into frames, compresses them in threads and writes them in order. In memory: about two frames a thread.

    `cut` ends a frame; a frame is also ended when it is full. Small pieces share one until they are `LARGE_BYTES`.
    """

    def __init__(self, write: Callable[[bytes], object], level: int, threads: int) -> None:
        self._write = write
        self._level = level
        self._threads = min(threads if threads > 0 else os.cpu_count() or 1, _THREADS_CAP)
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="ckpt-zstd")
        self._local = threading.local()
        self._buffer = bytearray()
        self._fill = LARGE_BYTES
        self._pending: deque[tuple[Future[tuple[bytes, int]], int]] = deque()
        self.frames: list[Sizes] = []
        """What the index says of each frame written."""

    def write(self, data: memoryview | bytes, /) -> None:
        """Take more of the stream; it is copied."""
        view = memoryview(data)
        while view:
            if len(self._buffer) >= self._fill:
                self._end()
            room = self._fill - len(self._buffer)
            self._buffer += view[:room]
            view = view[room:]

    def cut(self) -> None:
        """A large member begins, or ends: its frames are its own, and as large as frames may be."""
        self._end()
        self._fill = FRAME_BYTES if self._fill == LARGE_BYTES else LARGE_BYTES

    def close(self) -> None:
        """Write what is left. After it the sink is done."""
        self._end()
        while self._pending:
            self._take()
        self._pool.shutdown()

    def abort(self) -> None:
        """End the threads without writing."""
        self._pending.clear()
        self._pool.shutdown(cancel_futures=True)

    def _end(self) -> None:
        if not self._buffer:
            return
        full, self._buffer = self._buffer, bytearray()
        while len(self._pending) > self._threads:
            self._take()
        self._pending.append((self._pool.submit(self._compress, full), len(full)))

    def _take(self) -> None:
        future, size_bytes = self._pending.popleft()
        data, crc32 = future.result()
        self._write(data)
        self.frames.append((len(data), size_bytes, crc32))

    def _compress(self, data: bytearray) -> tuple[bytes, int]:
        import zstandard

        engine = getattr(self._local, "engine", None)
        if engine is None:
            engine = self._local.engine = zstandard.ZstdCompressor(level=self._level, write_checksum=True, write_content_size=True)
        found: bytes = engine.compress(data)
        return found, zlib.crc32(found)


def unpack(data: bytes, frame: Frame) -> bytes:
    """The content of one frame. Its CRC-32 is not looked at.

    Raises:
        ArchiveInvalid: it is damaged, or not of the size that the index says.
    """
    import zstandard

    check(data, frame)
    try:
        found: bytes = _decompressor().decompress(data, max_output_size=frame.size_bytes)
    except zstandard.ZstdError as error:
        raise ArchiveInvalid(f"the archive is damaged: {error}") from None
    if len(found) != frame.size_bytes:
        raise ArchiveInvalid("the archive's index is wrong about a frame")
    return found


def check(head: bytes, frame: Frame) -> None:
    """Compare the header of a frame (its first 18 bytes, or more) with the index. Raises ArchiveInvalid."""
    import zstandard

    try:
        found = zstandard.get_frame_parameters(head)
    except (zstandard.ZstdError, ValueError):
        raise ArchiveInvalid("the archive's index is wrong about a frame") from None
    if found.content_size != frame.size_bytes or found.window_size > WINDOW_BYTES:
        raise ArchiveInvalid("the archive's index is wrong about a frame")


_each = threading.local()


def _decompressor() -> Any:
    import zstandard

    found = getattr(_each, "engine", None)
    if found is None:
        found = _each.engine = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES)
    return found
