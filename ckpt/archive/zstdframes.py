"""A zstd stream frame by frame (RFC 8878): frames that say their size are decompressed beside each other, others block by block.

Every byte of the compressed stream is accounted for: a stream that ends early, or goes on after its end, is found out.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final

from ckpt.archive.frames import WINDOW_BYTES, unpack
from ckpt.archive.index import FRAME_CAP_BYTES, TAIL_CAP_BYTES, Frame, Sizes
from ckpt.archive.layout import CHUNK_BYTES
from ckpt.errors import ArchiveInvalid

_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_SKIPPABLE: Final = 0x184D2A50
_RLE, _RESERVED = 1, 3
_THREADS_CAP: Final = 16
_TRUNCATED: Final = "the archive is truncated: its compressed data ends early"


class ZstdFrames:
    """Decompressed bytes of a stream of frames. `read` gives at most as many as asked; b"" is the end.

    `frames`: what an index would say of the data frames, while all of them say their size; `tail`: the skippable frames
    behind the last data frame, as far as they are no larger than an index may be.
    """

    def __init__(self, source: Callable[[int], bytes]) -> None:
        self._source = source
        self._buffer = bytearray()
        self._at = 0
        self._ended = False
        self._threads = min(os.cpu_count() or 1, _THREADS_CAP)
        self._pool: ThreadPoolExecutor | None = None
        self._pending: deque[Future[bytes] | bytes] = deque()
        self._blocks: _Blocks | None = None
        self._now = memoryview(b"")
        self.frames: list[Sizes] = []
        self.sized = True
        self.tail = bytearray()
        self.tail_bytes = 0

    def read(self, size: int) -> bytes:
        """Up to `size` bytes. Raises ArchiveInvalid for what is damaged or ends early."""
        while not self._now:
            if self._blocks is not None and not self._pending:
                self._now = memoryview(self._blocks.more())
                if not self._now:
                    self._blocks = None
                continue
            while not self._ended and self._blocks is None and len(self._pending) <= self._threads:
                self._next_frame()
            if self._pending:
                found = self._pending.popleft()
                self._now = memoryview(found if isinstance(found, bytes) else found.result())
            elif self._ended and self._blocks is None:
                return b""
        piece = bytes(self._now[:size])
        self._now = self._now[size:]
        return piece

    # -- inside ----------------------------------------------------------------------------------------------------

    def peel(self, count: int) -> bytes:
        """The next `count` bytes of the compressed stream. Raises ArchiveInvalid when they are not there."""
        if not self._have(count):
            raise ArchiveInvalid(_TRUNCATED)
        piece = bytes(self._buffer[self._at : self._at + count])
        self._at += count
        return piece

    def _have(self, count: int) -> bool:
        if self._at and len(self._buffer) - self._at < count:
            del self._buffer[: self._at]
            self._at = 0
        while len(self._buffer) - self._at < count:
            data = self._source(CHUNK_BYTES)
            if not data:
                return False
            self._buffer += data
        return True

    def _next_frame(self) -> None:
        if not self._have(1):
            self._ended = True
            return
        magic = self.peel(4)
        if struct.unpack("<I", magic)[0] & ~0xF == _SKIPPABLE:
            self._skip(magic)
            return
        if magic != _MAGIC:
            raise ArchiveInvalid("the archive is damaged: what follows in it is no zstd")
        self.tail.clear()
        self.tail_bytes = 0
        head, content_bytes, checksum = self._head(magic)
        if content_bytes is None or content_bytes > FRAME_CAP_BYTES:
            self.sized = False
            self._blocks = _Blocks(self, head, checksum)
            return
        data = bytearray(head)
        last = False
        # A block gives at least one byte, but for the last one; and none is larger than 128 KiB.
        limit = content_bytes + (content_bytes // 8) + (1 << 20)
        while not last:
            block, last = self.block()
            data += block
            if len(data) > limit:
                raise ArchiveInvalid("the archive is damaged: a zstd frame is larger than what is in it")
        data += self.peel(4 if checksum else 0)
        whole = bytes(data)
        frame = Frame(0, len(whole), 0, content_bytes, zlib.crc32(whole))
        self.frames.append((frame.compressed_bytes, frame.size_bytes, frame.crc32))
        if not content_bytes:
            unpack(whole, frame)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="ckpt-unzstd")
        self._pending.append(self._pool.submit(unpack, whole, frame))

    def _skip(self, magic: bytes) -> None:
        length = self.peel(4)
        left = int.from_bytes(length, "little")
        self.tail_bytes += left + 8
        keep = self.tail_bytes <= TAIL_CAP_BYTES
        if keep:
            self.tail += magic + length
        while left:
            piece = self.peel(min(left, CHUNK_BYTES))
            if keep:
                self.tail += piece
            left -= len(piece)

    def _head(self, magic: bytes) -> tuple[bytes, int | None, bool]:
        """The whole frame header, the content's size, whether there is a checksum (RFC 8878, 3.1.1.1)."""
        descriptor = self.peel(1)
        flags = descriptor[0]
        single = bool(flags & 0x20)
        window = b"" if single else self.peel(1)
        if window:
            base = 1 << (10 + (window[0] >> 3))
            if base + (base >> 3) * (window[0] & 7) > WINDOW_BYTES:
                raise ArchiveInvalid("the archive needs a larger zstd window than 128 MiB")
        if flags & 0x18:  # one bit is reserved, one has no meaning; nobody sets them
            raise ArchiveInvalid("the archive is damaged: a zstd frame of an unknown kind")
        dictionary = self.peel((0, 1, 2, 4)[flags & 3])
        sizes = self.peel((1 if single else 0, 2, 4, 8)[flags >> 6])
        content = int.from_bytes(sizes, "little") + (256 if len(sizes) == 2 else 0) if sizes else None
        return magic + descriptor + window + dictionary + sizes, content, bool(flags & 0x04)

    def block(self) -> tuple[bytes, bool]:
        """A block with its header, and whether it is the last one of its frame (RFC 8878, 3.1.1.2)."""
        head = self.peel(3)
        word = int.from_bytes(head, "little")
        kind, size = word >> 1 & 3, word >> 3
        if kind == _RESERVED or size > 128 << 10:
            raise ArchiveInvalid("the archive is damaged: a zstd block of an unknown kind")
        return head + self.peel(1 if kind == _RLE else size), bool(word & 1)


class _Blocks:
    """A frame that does not say its size (podman's archives are one), decompressed block by block."""

    def __init__(self, frames: ZstdFrames, head: bytes, checksum: bool) -> None:
        import zstandard

        self._frames = frames
        self._checksum = checksum
        self._engine = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES).decompressobj(write_size=CHUNK_BYTES)
        self._last = False
        self._feed(head)

    def more(self) -> bytes:
        """The content of the next blocks; b"" at the end of the frame."""
        while not self._last:
            block, self._last = self._frames.block()
            if self._last and self._checksum:
                block += self._frames.peel(4)
            if found := self._feed(block):
                return found
        return b""

    def _feed(self, data: bytes) -> bytes:
        import zstandard

        try:
            found: bytes = self._engine.decompress(data)
        except zstandard.ZstdError as error:
            raise ArchiveInvalid(f"the archive is damaged: {error}") from None
        return found
