"""The outer tar of an archive, read strictly from a stream: what is not a plain file or directory of the layout is refused.

Python's own reader ends silently at a damaged header and reads unlimited extended headers into memory; neither will do here.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ckpt.archive import index
from ckpt.archive.codec import Stream
from ckpt.archive.layout import CHUNK_BYTES, is_allowed
from ckpt.errors import ArchiveInvalid

_BLOCK: Final = 512
_MAX_EXTENDED: Final = 1 << 20
_SUM: Final = re.compile(rb"[0-7]{6}\0 |[0-7]{7}\0| [0-7]{6}\0|[0-7]{6} \0", re.DOTALL)
"""As the tars that there are write it; the field itself is what no sum covers."""
_KINDS: Final = {
    tarfile.SYMTYPE: "a symbolic link", tarfile.LNKTYPE: "a hard link", tarfile.CHRTYPE: "a device", tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a FIFO", tarfile.GNUTYPE_SPARSE: "a sparse member",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Limits:
    """What an archive may be. The ratio counts from `ratio_floor_bytes` on: memory of one repeated byte shrinks ten thousandfold."""

    max_members: int = 100_000
    max_total_bytes: int = 4 << 40
    max_small_bytes: int = 16 << 20
    max_ratio: int = 1000
    ratio_floor_bytes: int = 32 << 30


DEFAULT_LIMITS: Final = Limits()


@dataclass(frozen=True, slots=True)
class Member:
    """A member of the archive: `name` as in the layout (directories end in "/")."""

    name: str
    size_bytes: int


class TarStream:
    """Iterate over the members; the data of a member is taken with `data()` before the next one is asked for, or skipped."""

    def __init__(self, stream: Stream, limits: Limits) -> None:
        self._stream = stream
        self._limits = limits
        self._left = 0
        self._padding = 0
        self.entries: list[index.Entry] = []
        """The members so far, where they are."""

    def check_caps(self) -> None:
        """Raise ArchiveInvalid when more came out of the stream than the limits allow."""
        out, limits = self._stream.count, self._limits
        if out > limits.max_total_bytes:
            raise ArchiveInvalid(f"the archive unpacks to more than {limits.max_total_bytes} bytes", hint="raise the limit if that is right")
        if out > limits.ratio_floor_bytes and out > limits.max_ratio * self._stream.raw.count:
            raise ArchiveInvalid(f"the archive unpacks to more than {limits.max_ratio} times its size", hint="it looks like a zip bomb")

    def data(self) -> Iterator[bytes]:
        """The data of the current member in pieces of at most 1 MiB."""
        while self._left:
            piece = self._stream.read(min(self._left, CHUNK_BYTES))
            self.check_caps()
            if not piece:
                raise ArchiveInvalid("the archive is truncated in the middle of a member")
            self._left -= len(piece)
            yield piece
        if self._padding:
            padding, self._padding = self._padding, 0
            filler = self._stream.read(padding)
            if len(filler) != padding:
                raise ArchiveInvalid("the archive is truncated after a member")
            if any(filler):
                raise ArchiveInvalid("the archive is damaged: there is something between two members")

    def __iter__(self) -> Iterator[Member]:
        seen: set[str] = set()
        while (member := self._next(first=not seen)) is not None:
            if member.name in seen:
                raise ArchiveInvalid(f"the archive holds {member.name} twice")
            seen.add(member.name)
            if len(seen) > self._limits.max_members:
                raise ArchiveInvalid(f"the archive has more than {self._limits.max_members} members")
            if member.name != "./":
                yield member
            for _ in self.data():
                pass
        self._drain()

    def _next(self, *, first: bool) -> Member | None:
        pax: dict[str, str] = {}
        long_name: str | None = None
        extended = 0
        begin = self._stream.count
        while True:
            block = self._stream.read(_BLOCK)
            self.check_caps()
            if len(block) < _BLOCK:
                raise ArchiveInvalid("this is no archive: it is too short for a tar" if first else "the archive is truncated: its end is missing")
            if not any(block):
                if first:
                    raise ArchiveInvalid("the archive is empty")
                return None
            if not _SUM.match(block[148:156]):
                raise ArchiveInvalid("this is no archive: not a tar" if first else "the archive is damaged: a header without a valid sum")
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                raise ArchiveInvalid("this is no archive: not a tar" if first else f"the archive is damaged: {error}") from None
            if info.type not in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
                break
            extended += 1
            self._set(info.size)
            if info.size < 0 or info.size > _MAX_EXTENDED or extended > 8:
                raise ArchiveInvalid("the archive has an extended header that is too large")
            data = b"".join(self.data())
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = _name(data.removesuffix(b"\0"))
            else:
                pax |= pax_records(data)
        member = self._member(info, pax, long_name)
        self.entries.append(index.Entry(member.name, begin, self._stream.count, member.size_bytes, max(0, int(info.mtime))))
        return member

    def _member(self, info: tarfile.TarInfo, pax: dict[str, str], long_name: str | None) -> Member:
        if long_name is not None and "path" in pax:
            raise ArchiveInvalid("the archive has a member with two long names")
        name = pax.get("path", long_name if long_name is not None else info.name)
        size = info.size
        if "size" in pax:
            if not pax["size"].isascii() or not pax["size"].isdigit() or len(pax["size"]) > 18:
                raise ArchiveInvalid("the archive has a member without a valid size")
            size = int(pax["size"])
        clean = name
        while clean.startswith("./"):
            clean = clean[2:].lstrip("/") if clean != "./" else ""
        shown = repr(name[:100])
        if info.type == tarfile.SYMTYPE and clean.rstrip("/") == "checkpoint/parent":
            raise ArchiveInvalid("the archive is the second half of a pre-checkpoint (checkpoint/parent), it holds only part of the memory",
                                 hint="export a complete checkpoint, without --with-previous")  # fmt: skip
        if info.type in _KINDS:
            raise ArchiveInvalid(f"the archive holds {shown} as {_KINDS[info.type]}, only files and directories are allowed")
        if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.DIRTYPE) or any(k.startswith("GNU.sparse.") for k in pax):
            raise ArchiveInvalid(f"the archive holds {shown} as a kind of member that is not allowed")
        directory = info.type == tarfile.DIRTYPE or (info.type == tarfile.AREGTYPE and name.endswith("/"))
        if directory:
            clean = clean.rstrip("/") + "/"
            if clean in ("/", "./") and name in (".", "./"):
                clean = "./"
            if size:
                raise ArchiveInvalid(f"the archive holds {shown}, a directory, with data")
        if size < 0:
            raise ArchiveInvalid(f"the archive holds {shown} with a negative size")
        if clean.startswith("pre-checkpoint"):
            raise ArchiveInvalid("the archive is a pre-checkpoint, it cannot be restored by itself", hint="export a complete checkpoint")
        if clean != "./" and (clean.endswith("/") != directory or not is_allowed(clean)):
            raise ArchiveInvalid(f"the archive holds {shown}, which is no member of a checkpoint")
        self._set(size)
        return Member(clean, size)

    def _set(self, size: int) -> None:
        self._left = max(size, 0)
        self._padding = -self._left % _BLOCK

    def _drain(self) -> None:
        """Read to the end, so that checksums of the compressor are verified; only zeros may follow."""
        while data := self._stream.read(CHUNK_BYTES):
            self.check_caps()
            if data.count(0) != len(data):
                raise ArchiveInvalid("the archive goes on after its end")


def pax_records(data: bytes) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE\\n` of an extended header (POSIX pax)."""
    found: dict[str, str] = {}
    position = 0
    while position < len(data) and data[position]:
        space = data.find(b" ", position, position + 12)
        digits = data[position:space] if space > 0 else b""
        length = int(digits) if digits.isdigit() else 0
        record = data[space + 1 : position + length - 1]
        key, equals, value = record.partition(b"=")
        if length < 5 or position + length > len(data) or data[position + length - 1] != 0x0A or not equals:
            raise ArchiveInvalid("the archive has a damaged extended header")
        named = key.decode("utf-8", "surrogateescape")
        if named in found:
            raise ArchiveInvalid("the archive has an extended header with the same key twice")
        found[named] = _name(value) if named == "path" else value.decode("utf-8", "surrogateescape")
        position += length
    if any(data[position:]):
        raise ArchiveInvalid("the archive has a damaged extended header")
    return found


def _name(data: bytes) -> str:
    """The name of a member. A NUL would end it for a reader in C, and for no other."""
    if b"\0" in data:
        raise ArchiveInvalid("the archive has a member with a NUL in its name")
    return data.decode("utf-8", "surrogateescape")
