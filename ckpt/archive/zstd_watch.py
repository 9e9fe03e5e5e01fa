"""What zstd's own check sums do not cover: the headers of its frames, and skippable frames. RFC 8878, section 3.1.

A decoder ignores one bit of a header, takes a larger window than the frame needs, and passes over skippable frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ckpt.archive import index
from ckpt.errors import ArchiveInvalid

MAGIC: Final = b"\x28\xb5\x2f\xfd"
_SKIPPABLE: Final = range(0x184D2A50, 0x184D2A60)
_SKIPPED_CAP_BYTES: Final = 256 << 20
"""For all skippable frames together: an index has some bytes for a member and for a frame."""
_WINDOW: Final = 19 - 10 << 3
"""The descriptor of 2^19 bytes, which zstd takes at level 1; a frame that is known to be smaller has none (ZSTD_defaultCParameters)."""


class ZstdWatch:
    """Follows the frames of a stream while it is read; no data is decompressed."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._skip = 0
        self._state = "frame"
        self._checksum = False
        self._keep = False
        self._usual = True
        self._at = 0
        self._started = 0
        self._skipped_bytes = 0
        self.tail = bytearray()
        """The skippable frames, as they are, after the last frame with data."""
        self.frames: list[tuple[int, int]] = []
        """Of each frame with data: its compressed size, and the size of its content, -1 when its header does not tell."""
        self._content = -1

    def feed(self, data: bytes) -> None:
        """The next bytes of the stream.

        Raises:
            ArchiveInvalid: a header that makes no sense.
        """
        view = memoryview(data)
        while view:
            if self._skip:
                step = min(self._skip, len(view))
                if self._keep:
                    self.tail += view[:step]
                view = view[step:]
                self._skip -= step
                self._at += step
                continue
            needed = self._needed() - len(self._buffer)
            self._buffer += view[:needed]
            self._at += min(needed, len(view))
            view = view[needed:]
            if len(self._buffer) >= self._needed():
                self._step()

    def as_written(self, entries: Sequence[index.Entry], archive_bytes: int, tar_bytes: int) -> bool:
        """Whether all frames are as ckpt's writer makes them, and the index behind them says what was found.

        Args:
            entries: the members as they were found.
            archive_bytes, tar_bytes: the size of the stream, and of what came out of it.
        """
        if not self._usual or not self.frames or self._state != "frame" or self._buffer or self._skip:
            return False
        start = archive_bytes - len(self.tail)

        def read_at(offset: int, count: int) -> bytes:
            return bytes(self.tail[offset - start : offset - start + count]) if offset >= start else b""

        try:
            found = index.load(read_at, archive_bytes)
        except ArchiveInvalid:
            return False
        if found is None or found.tar_bytes != tar_bytes or list(found.entries) != list(entries):
            return False
        return [(frame.compressed_bytes, frame.size_bytes) for frame in found.frames] == self.frames

    def _needed(self) -> int:
        if self._state == "frame":
            if len(self._buffer) < 5:
                return 5
            if bytes(self._buffer[:4]) != MAGIC:
                return 8
            return 5 + self._header_bytes(self._buffer[4])
        return {"block": 3, "sum": 4}[self._state]

    @staticmethod
    def _header_bytes(descriptor: int) -> int:
        single = descriptor >> 5 & 1
        size = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
        return (0 if single else 1) + (0, 1, 2, 4)[descriptor & 3] + size

    def _step(self) -> None:
        head, self._buffer = self._buffer, bytearray()
        if self._state == "frame":
            self._frame(head)
        elif self._state == "block":
            block = int.from_bytes(head, "little")
            kind, size = block >> 1 & 3, block >> 3
            if kind == 3:
                raise ArchiveInvalid("the archive is damaged: a block of an unknown kind")
            self._skip, self._keep = 1 if kind == 1 else size, False
            if block & 1:
                self._state = "sum" if self._checksum else "frame"
                if not self._checksum:
                    self._ended(self._skip)
        else:
            self._state = "frame"
            self._ended(0)

    def _ended(self, left: int) -> None:
        self.frames.append((self._at + left - self._started, self._content))

    def _frame(self, head: bytearray) -> None:
        if bytes(head[:4]) != MAGIC:
            magic, size = int.from_bytes(head[:4], "little"), int.from_bytes(head[4:8], "little")
            if magic not in _SKIPPABLE:
                raise ArchiveInvalid("the archive is damaged: there is something else after its compressed data")
            self._skipped_bytes += size + 8
            if self._skipped_bytes > _SKIPPED_CAP_BYTES:
                raise ArchiveInvalid("the archive has too much beside its data")
            self._skip, self._keep = size, True
            self.tail += head
            return
        self._started = self._at - len(head)
        if self.tail:
            self._usual = False
            self.tail.clear()
        descriptor = head[4]
        if descriptor & 0x18:
            raise ArchiveInvalid("the archive is damaged: a bit of a frame's header that has no meaning is set")
        self._checksum = bool(descriptor & 4)
        single = bool(descriptor & 0x20)
        width = self._header_bytes(descriptor) - (0 if single else 1) - (0, 1, 2, 4)[descriptor & 3]
        content = -1
        if width:
            content = int.from_bytes(head[len(head) - width :], "little") + (256 if width == 2 else 0)
        if not self._checksum or descriptor & 3 or (not single and head[5] != _WINDOW):
            self._usual = False
        self._content = content
        self._state = "block"
