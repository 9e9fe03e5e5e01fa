"""The members of an archive file, read where they lie: through its index, or by seeking in a plain tar, else from its beginning.

What the index says is believed for none of the members: the tar header of each must say the same, and each frame must have the size claimed. That
does not make the archive whole: only the digests do (`reader.extract`, `ckpt verify`).
"""

from __future__ import annotations

import io
import os
import stat
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final, cast

from ckpt.archive import armor, frames, index, seal
from ckpt.archive.age import Identity
from ckpt.archive.codec import Stream, open_stream
from ckpt.archive.layout import CHUNK_BYTES, is_bulk
from ckpt.archive.tarstream import DEFAULT_LIMITS, Limits, TarStream
from ckpt.errors import ArchiveInvalid

_BLOCK: Final = 512
_FRAME_HEAD_BYTES: Final = 18
_KEPT_BYTES: Final = 128 << 20
"""Small members of an archive without an index that are kept in memory; the others are found again by reading from the beginning."""
_ZSTD: Final = b"\x28\xb5\x2f\xfd"


class ArchiveMembers:
    """`Members` of an archive file. Closes with `close`, or as a context manager; safe for use by several threads.

    Args:
        identities: what opens it when it is encrypted. Nothing is written in clear.

    Raises:
        ArchiveInvalid: no archive of a checkpoint. KeyProblem, DigestMismatch: as `seal.decrypting`.
    """

    def __init__(self, path: Path, *, limits: Limits = DEFAULT_LIMITS, identities: Sequence[Identity] = ()) -> None:
        self._path = path
        self._identities = identities
        self._limits = limits
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._kept: dict[str, bytes] = {}
        self._recent: tuple[int, bytes] | None = None
        self._index: index.Index | None = None
        self._members: dict[str, index.Entry] = {}
        try:
            status = os.fstat(self._fd)
            if not stat.S_ISREG(status.st_mode):
                raise ArchiveInvalid(f"{path} is not a regular file")
            self.archive_bytes = self._content_bytes = status.st_size
            self.compression = "zstd"
            self._pread: Callable[[int, int], bytes] = partial(os.pread, self._fd)
            head = self._pread(seal.HEAD_BYTES, 0)
            self.sealed = seal.is_sealed(head)
            if self.sealed and head.startswith(armor.BEGIN):
                self._scan_stream()
                return
            if self.sealed:
                inside = seal.random_access(self._fd, identities)
                self._pread, self._content_bytes = inside.pread, inside.size_bytes
            head = self._pread(_BLOCK, 0)
            self._index = index.load(self._read_at, self._content_bytes) if head.startswith(_ZSTD) else None
            if self._index is not None:
                self._take_index(self._index)
            elif len(head) == _BLOCK and head[257:262] == b"ustar":
                self.compression = "none"
                self._scan_plain()
            else:
                self._scan_stream()
        except BaseException:
            os.close(self._fd)
            raise

    def __enter__(self) -> ArchiveMembers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    @property
    def indexed(self) -> bool:
        """Whether members can be read without what is before them."""
        return self._index is not None or self.compression == "none"

    def names(self) -> list[str]:
        """Every member, in the archive's order."""
        return list(self._members)

    def size_bytes(self, name: str) -> int:
        """The size of a member; 0 for a directory."""
        return self._members[name].size_bytes

    def mtime_s(self, name: str) -> float:
        """When it was written, as its header says."""
        return float(self._members[name].mtime_s)

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """A member; it can seek where the archive is indexed. Raises ArchiveInvalid while it is read."""
        entry = self._members[name]
        if name in self._kept:
            yield io.BytesIO(self._kept[name])
        elif self.indexed:
            yield cast(BinaryIO, _Part(self, entry.data_offset, entry.size_bytes))
        else:
            with os.fdopen(os.open(self._path, os.O_RDONLY | os.O_CLOEXEC), "rb") as file:
                stream = open_stream(seal.reading(file, self._identities))
                tar = TarStream(stream, self._limits)
                for member in tar:
                    if member.name == name:
                        yield cast(BinaryIO, io.BufferedReader(_Pieces(tar.data()), CHUNK_BYTES))
                        return
                raise ArchiveInvalid(f"the archive has no {name} any more")

    # -- inside ----------------------------------------------------------------------------------------------------

    def _read_at(self, offset: int, count: int) -> bytes:
        return self._pread(count, offset)

    def tar_at(self, offset: int, count: int) -> bytes:
        """Bytes of the uncompressed tar; fewer at the end of a frame, none at the end of the tar."""
        if self._index is None:
            return self._pread(min(count, CHUNK_BYTES), offset)
        known = self._index.frames
        number = bisect_right(known, offset, key=lambda frame: frame.start) - 1
        if not 0 <= number < len(known) or offset >= known[number].start + known[number].size_bytes:
            return b""
        recent = self._recent
        if recent is None or recent[0] != number:
            frame = known[number]
            data = self._pread(frame.compressed_bytes, frame.offset)
            if zlib.crc32(data) != frame.crc32:
                raise ArchiveInvalid("the archive is damaged: the checksum of a frame is wrong")
            recent = self._recent = (number, frames.unpack(data, frame))
        at = offset - known[number].start
        return recent[1][at : at + count]

    def _take_index(self, found: index.Index) -> None:
        for frame in found.frames:
            frames.check(self._pread(min(_FRAME_HEAD_BYTES, frame.compressed_bytes), frame.offset), frame)
        for entry in found.entries:
            member, length = self._header(found, entry.header_offset, entry.data_offset - entry.header_offset)
            claimed = (entry.name, entry.size_bytes, entry.data_offset - entry.header_offset, entry.mtime_s)
            if (member.name, member.size_bytes, length, member.mtime_s) != claimed:
                raise ArchiveInvalid(f"the archive's index does not agree with the header of {member.name[:100]!r}")
            self._members[entry.name] = entry

    def _header(self, found: index.Index | None, offset: int, length: int) -> tuple[index.Entry, int]:
        stream = _At(self._start_of(found, offset) if found else None, self, offset, min(length, 4 << 20))
        tar = TarStream(cast(Stream, stream), self._limits)
        if next(iter(tar), None) is None:
            raise ArchiveInvalid("the archive's index is damaged (a header)")
        return tar.entries[-1], stream.count

    def _start_of(self, found: index.Index, offset: int) -> bytes | None:
        """The first bytes of a large frame, when `offset` is its beginning: its header is read without unpacking all of it."""
        number = bisect_right(found.frames, offset, key=lambda frame: frame.start) - 1
        frame = found.frames[number]
        if frame.start != offset or frame.size_bytes <= index.LARGE_BYTES:
            return None
        import zstandard

        engine = zstandard.ZstdDecompressor(max_window_size=frames.WINDOW_BYTES).stream_reader(
            _RawPart(self._pread, frame.offset, frame.compressed_bytes),  # type: ignore[arg-type]
            read_size=16384,
        )
        try:
            return engine.read(_BLOCK * 8)
        except zstandard.ZstdError as error:
            raise ArchiveInvalid(f"the archive is damaged: {error}") from None

    def _scan_plain(self) -> None:
        """An uncompressed tar: from header to header."""
        at = 0
        while any(block := self._read_at(at, _BLOCK)) or len(block) < _BLOCK:
            if len(block) < _BLOCK:
                raise ArchiveInvalid("the archive is truncated: its end is missing")
            member, length = self._header(None, at, 4 << 20)
            entry = index.Entry(member.name, at, at + length, member.size_bytes, member.mtime_s)
            at = entry.data_offset + entry.size_bytes + -entry.size_bytes % _BLOCK
            if at > self._content_bytes:
                raise ArchiveInvalid("the archive is truncated in the middle of a member")
            self._add(entry)

    def _scan_stream(self) -> None:
        """Any other compression: once through all of it, small members are kept."""
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            stream = open_stream(seal.reading(file, self._identities))
            self.compression = stream.compression
            tar = TarStream(stream, self._limits)
            kept = 0
            for member in tar:
                self._add(tar.entries[-1])
                if not is_bulk(member.name) and not member.name.endswith("/") and kept + member.size_bytes <= _KEPT_BYTES:
                    self._kept[member.name] = b"".join(tar.data())
                    kept += member.size_bytes

    def _add(self, entry: index.Entry) -> None:
        if entry.name in self._members:
            raise ArchiveInvalid(f"the archive holds {entry.name} twice")
        if len(self._members) >= self._limits.max_members:
            raise ArchiveInvalid(f"the archive has more than {self._limits.max_members} members")
        self._members[entry.name] = entry


class _At:
    """What TarStream reads a header from: bytes of the tar from an offset on, no more than `limit` of them."""

    def __init__(self, start: bytes | None, members: ArchiveMembers, offset: int, limit: int) -> None:
        self._start = start
        self._members = members
        self._offset = offset
        self._limit = limit
        self.count = 0
        self.raw = self

    def read(self, size: int) -> bytes:
        size = min(size, self._limit - self.count)
        if self._start is not None and self.count + size <= len(self._start):
            data = self._start[self.count : self.count + size]
        else:
            parts: list[bytes] = []
            left = size
            while left and (piece := self._members.tar_at(self._offset + self.count + size - left, left)):
                parts.append(piece)
                left -= len(piece)
            data = b"".join(parts)
        self.count += len(data)
        return data


class _RawPart(io.RawIOBase):
    """Some bytes of the archive file."""

    def __init__(self, pread: Callable[[int, int], bytes], offset: int, count: int) -> None:
        self._pread, self._offset, self._end = pread, offset, offset + count

    def read(self, size: int = -1) -> bytes:
        count = self._end - self._offset if size < 0 else min(size, self._end - self._offset)
        data = self._pread(count, self._offset)
        self._offset += len(data)
        return data


class _Part(io.RawIOBase):
    """A member, by offsets of the tar. Frames are unpacked as they are needed, one at a time."""

    def __init__(self, members: ArchiveMembers, offset: int, size_bytes: int) -> None:
        self._members, self._offset, self._size, self._at = members, offset, size_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0 if whence == os.SEEK_SET else self._at if whence == os.SEEK_CUR else self._size))
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        want = min(len(view), self._size - self._at)
        if want <= 0:
            return 0
        piece = self._members.tar_at(self._offset + self._at, want)
        if not piece:
            raise ArchiveInvalid("the archive is truncated in the middle of a member")
        view[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


class _Pieces(io.RawIOBase):
    """An iterator of pieces as a stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")  # type: ignore[arg-type]
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        count = min(len(view), len(self._rest))
        view[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count
