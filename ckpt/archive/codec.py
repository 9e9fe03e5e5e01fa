"""Decompression of a stream, found out by its first bytes as podman does it (containers/storage archive.go, DetectCompression)."""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, BinaryIO, Final, Protocol

from ckpt.archive import index
from ckpt.archive.layout import CHUNK_BYTES
from ckpt.errors import ArchiveInvalid

if TYPE_CHECKING:
    from ckpt.archive.zstdframes import ZstdFrames

_MAGIC: Final = ((b"BZh", "bzip2"), (b"\x1f\x8b\x08", "gzip"), (b"\xfd7zXZ\x00", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))
_GZIP_HEAD: Final = b"\x1f\x8b\x08\0\0\0\0\0\x04\x03"
"""Of zlib and of pigz -n at level 1 (RFC 1952): no flags, no time, fastest, Unix."""
_AHEAD_BYTES: Final = 256 << 10
_XZ_MEMORY: Final = 256 << 20


class _Engine(Protocol):
    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def feed(self, data: bytes, limit: int) -> bytes: ...

    @property
    def hungry(self) -> bool: ...


class _Gzip:
    def __init__(self) -> None:
        self._engine = zlib.decompressobj(31)

    @property
    def eof(self) -> bool:
        return self._engine.eof

    @property
    def unused_data(self) -> bytes:
        return self._engine.unused_data

    @property
    def hungry(self) -> bool:
        return not self._engine.unconsumed_tail

    def feed(self, data: bytes, limit: int) -> bytes:
        return self._engine.decompress(self._engine.unconsumed_tail + data, limit)


class _Other:
    def __init__(self, engine: bz2.BZ2Decompressor | lzma.LZMADecompressor) -> None:
        self._engine = engine

    @property
    def eof(self) -> bool:
        return self._engine.eof

    @property
    def unused_data(self) -> bytes:
        return self._engine.unused_data

    @property
    def hungry(self) -> bool:
        return self._engine.needs_input

    def feed(self, data: bytes, limit: int) -> bytes:
        return self._engine.decompress(data, limit)


def _bzip2() -> _Other:
    return _Other(bz2.BZ2Decompressor())


def _xz() -> _Other:
    return _Other(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY))


class Counted:
    """The compressed side of a stream, counted, with the bytes put back that were read to detect the format."""

    def __init__(self, source: BinaryIO, head: bytes) -> None:
        self._source = source
        self._head = head
        self.count = 0

    def read(self, size: int = CHUNK_BYTES) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
        else:
            data = self._source.read(size) or b""
        self.count += len(data)
        return data


class Stream:
    """Decompressed bytes of an archive: `read` gives exactly as many as asked unless the stream ends."""

    def __init__(self, source: BinaryIO) -> None:
        head = b""
        while len(head) < 10 and (data := source.read(10 - len(head))):
            head += data
        if not head:
            raise ArchiveInvalid("the archive is empty")
        self.compression = next((name for magic, name in _MAGIC if head.startswith(magic)), "none")
        self.head = head
        self.raw = Counted(source, head)
        self.count = 0
        self.zstd: ZstdFrames | None = None
        self._read = self._reader()

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end of the stream. Raises ArchiveInvalid for damaged compressed data."""
        data = self._read(size)
        if len(data) < size and data:
            parts = [data]
            left = size - len(data)
            while left and (data := self._read(left)):
                parts.append(data)
                left -= len(data)
            data = b"".join(parts)
        self.count += len(data)
        return data

    def require_as_written(self, entries: Sequence[index.Entry]) -> None:
        """For an archive that ckpt wrote, after its end: what no check sum of the compression covers is as ckpt writes it.

        One that was decompressed and compressed again by another program has no index, and nothing is asked of it.

        Args:
            entries: the members as they were found.

        Raises:
            ArchiveInvalid: a bit was changed in a header of the compression, or in the index.
        """
        if self.compression == "gzip":
            changed = int.from_bytes(self.head, "big") ^ int.from_bytes(_GZIP_HEAD, "big")
            good = changed.bit_count() != 1
        elif self.zstd is not None and self.zstd.tail_bytes:
            good = self.zstd.sized and bytes(self.zstd.tail) == index.tail(entries, self.zstd.frames)
        else:
            return
        if not good:
            message = f"the archive's {self.compression} headers are not those that ckpt writes: it is damaged, or was compressed again"
            raise ArchiveInvalid(message, hint="if it was compressed again, decompress it and take the plain tar")

    def _reader(self) -> Callable[[int], bytes]:
        if self.compression == "none":
            return self.raw.read
        if self.compression == "zstd":
            return self._zstd()
        makers: dict[str, Callable[[], _Engine]] = {"gzip": _Gzip, "bzip2": _bzip2, "xz": _xz}
        return self._members(makers[self.compression])

    def _zstd(self) -> Callable[[int], bytes]:
        from ckpt.archive.zstdframes import ZstdFrames

        self.zstd = ZstdFrames(self.raw.read)
        return self.zstd.read

    def _members(self, make: Callable[[], _Engine]) -> Callable[[int], bytes]:
        engine: _Engine | None = make()
        pending = b""

        held, at = b"", 0

        def read(size: int) -> bytes:
            # Each call of an engine copies what it has not taken yet: a hundred thousand calls for a header would take minutes.
            nonlocal held, at
            if at == len(held):
                held, at = more(max(size, _AHEAD_BYTES)), 0
            found = held[at : at + size]
            at += len(found)
            return found

        def more(size: int) -> bytes:
            nonlocal engine, pending
            try:
                while engine is not None:
                    if engine.eof:
                        pending = engine.unused_data or self.raw.read(CHUNK_BYTES)
                        # More members may follow; zero padding, as some writers leave it, ends the stream.
                        pending = pending.lstrip(b"\0")
                        engine = make() if pending else None
                        continue
                    data = pending
                    pending = b""
                    if not data and engine.hungry and not (data := self.raw.read(CHUNK_BYTES)):
                        raise ArchiveInvalid("the archive is truncated: its compressed data ends early")
                    if found := engine.feed(data, size):
                        return found
            except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise ArchiveInvalid(f"the archive is damaged: {error}") from None
            return b""

        return read


def open_stream(source: BinaryIO) -> Stream:
    """Detect the compression of `source` and decompress it while it is read (pipes will do).

    Raises:
        ArchiveInvalid: the source is empty.
    """
    return Stream(source if not isinstance(source, io.RawIOBase) else io.BufferedReader(source, CHUNK_BYTES))
