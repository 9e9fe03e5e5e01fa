"""The end of an archive in zstd: which member is where, so that one can be read without the others. docs/format.md has every byte.

    data frames ... | skippable frame: the members, as JSON | skippable frame: zstd's seekable format, sizes of all frames before it

Both are skippable frames, which every zstd decoder passes over; the last one is read by every tool that knows the seekable format
(contrib/seekable_format/zstd_seekable_compression_format.md of zstd 1.5). What is read here is a claim of the archive: every value is checked,
and whoever uses it compares the members' own headers with it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from ckpt.archive.layout import is_allowed
from ckpt.errors import ArchiveInvalid

FRAME_BYTES: Final = 4 << 20
"""Uncompressed bytes of a frame of a large member: a whole number of them is decompressed at once, on as many cores as there are."""
LARGE_BYTES: Final = 256 << 10
"""A member of so many bytes has frames of its own; smaller ones share frames of about that size."""
FRAME_CAP_BYTES: Final = 64 << 20
"""A reader takes no frame that unpacks to more."""

TAIL_CAP_BYTES: Final = 8 << 20
"""The most that the two frames at the end may have; an archive that would need more is written without them (1 TiB, or 50 000 members)."""

MEMBERS_MAGIC: Final = 0x184D2A5C
TABLE_MAGIC: Final = 0x184D2A5E
SEEKABLE_MAGIC: Final = 0x8F92EAB1
MEMBERS_SCHEMA: Final = 1
_HEAD: Final = struct.Struct("<II")
_ENTRY: Final = struct.Struct("<II")
_FOOTER: Final = struct.Struct("<IBI")
_FRAMES_CAP: Final = 4 << 20
_MEMBERS_CAP_BYTES: Final = TAIL_CAP_BYTES
_MEMBERS_CAP: Final = 100_000
_BLOCK: Final = 512
_SIZE_CAP: Final = 1 << 50

ReadAt = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Entry:
    """A member: where its tar header begins and where its data begins in the uncompressed tar, its size, seconds since the epoch."""

    name: str
    header_offset: int
    data_offset: int
    size_bytes: int
    mtime_s: int


@dataclass(frozen=True, slots=True)
class Frame:
    """A zstd frame: where it is in the archive, which bytes of the tar it holds, and the CRC-32 of its compressed bytes."""

    offset: int
    compressed_bytes: int
    start: int
    size_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Index:
    """What the end of an archive says of it. `tar_bytes`: the size of the whole tar."""

    entries: tuple[Entry, ...]
    frames: tuple[Frame, ...]
    tar_bytes: int


Sizes = tuple[int, int, int]
"""Compressed size, uncompressed size and CRC-32 (of the compressed bytes) of a frame."""


def tail(entries: Sequence[Entry], frames: Sequence[Sizes]) -> bytes:
    """The two skippable frames behind the data; b"" when there is too much to say."""
    rows = [[e.name, e.header_offset, e.data_offset, e.size_bytes, e.mtime_s] for e in entries]
    plain = {"schema": MEMBERS_SCHEMA, "crc32": [crc for _, _, crc in frames], "members": rows}
    members = json.dumps(plain, separators=(",", ":")).encode()
    listed = [*((compressed, size) for compressed, size, _ in frames), (_HEAD.size + len(members), 0)]
    table = b"".join(_ENTRY.pack(*frame) for frame in listed) + _FOOTER.pack(len(listed), 0, SEEKABLE_MAGIC)
    data = _HEAD.pack(MEMBERS_MAGIC, len(members)) + members + _HEAD.pack(TABLE_MAGIC, len(table)) + table
    return data if len(data) <= TAIL_CAP_BYTES else b""


def load(read_at: ReadAt, archive_bytes: int) -> Index | None:
    """The index at the end of an archive; None when there is none (another program wrote it).

    Args:
        read_at: bytes of the archive: (offset, count); fewer only at the end.

    Raises:
        ArchiveInvalid: there is one, and it makes no sense.
    """
    if archive_bytes < _FOOTER.size + 2 * _HEAD.size:
        return None
    footer = read_at(archive_bytes - _FOOTER.size, _FOOTER.size)
    if len(footer) < _FOOTER.size:
        return None
    count, descriptor, magic = _FOOTER.unpack(footer)
    if magic != SEEKABLE_MAGIC or descriptor != 0:
        return None
    table_bytes = count * _ENTRY.size + _FOOTER.size
    start = archive_bytes - table_bytes - _HEAD.size
    if not 2 <= count <= _FRAMES_CAP or start <= 0:
        raise _bad("frames")
    table = read_at(start, table_bytes + _HEAD.size)
    if len(table) != table_bytes + _HEAD.size or _HEAD.unpack_from(table) != (TABLE_MAGIC, table_bytes):
        raise _bad("table")
    sizes = list(_ENTRY.iter_unpack(table[_HEAD.size : -_FOOTER.size]))
    if sum(compressed for compressed, _ in sizes) != start:
        raise _bad("sizes of frames")
    members_bytes, none = sizes.pop()
    if none or not _HEAD.size < members_bytes <= _MEMBERS_CAP_BYTES:
        return None  # a seekable archive of another program
    frame = read_at(start - members_bytes, members_bytes)
    if len(frame) != members_bytes or _HEAD.unpack_from(frame)[0] != MEMBERS_MAGIC:
        return None
    if _HEAD.unpack_from(frame)[1] != members_bytes - _HEAD.size:
        raise _bad("length")
    if any(not 0 < size <= FRAME_CAP_BYTES or not compressed for compressed, size in sizes):
        raise _bad("a frame's size")
    offsets = accumulate((compressed for compressed, _ in sizes), initial=0)
    starts = accumulate((size for _, size in sizes), initial=0)
    plain = _plain(frame[_HEAD.size :])
    sums = plain.get("crc32")
    if not isinstance(sums, list) or len(sums) != len(sizes) or not all(type(one) is int and 0 <= one < 1 << 32 for one in sums):
        raise _bad("checksums")
    frames = tuple(Frame(at, packed, first, size, crc) for (packed, size), at, first, crc in zip(sizes, offsets, starts, sums, strict=False))
    tar_bytes = sum(size for _, size in sizes)
    return Index(_entries(plain.get("members"), tar_bytes), frames, tar_bytes)


def _plain(data: bytes) -> dict[str, Any]:
    try:
        plain: Any = json.loads(data)
    except (ValueError, RecursionError):
        raise _bad("members") from None
    if not isinstance(plain, dict) or plain.get("schema") != MEMBERS_SCHEMA:
        raise _bad("members")
    return plain


def _entries(rows: Any, tar_bytes: int) -> tuple[Entry, ...]:
    if not isinstance(rows, list) or not 0 < len(rows) <= _MEMBERS_CAP:
        raise _bad("members")
    found: list[Entry] = []
    seen: set[str] = set()
    at = 0
    for row in rows:
        if not isinstance(row, list) or len(row) != 5 or not isinstance(row[0], str):
            raise _bad("members")
        if any(not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _SIZE_CAP for value in row[1:]):
            raise _bad("numbers")
        entry = Entry(*row)
        if not is_allowed(entry.name) or entry.name in seen or (entry.name.endswith("/") and entry.size_bytes):
            raise _bad("names")
        # One behind the other, without a gap: nothing can hide in another member's data.
        if entry.header_offset != at or entry.data_offset < at + _BLOCK or entry.data_offset % _BLOCK:
            raise _bad("offsets")
        at = entry.data_offset + entry.size_bytes + -entry.size_bytes % _BLOCK
        seen.add(entry.name)
        found.append(entry)
    if at + 2 * _BLOCK != tar_bytes:
        raise _bad("end")
    return tuple(found)


def _bad(what: str) -> ArchiveInvalid:
    return ArchiveInvalid(f"the archive's index is damaged ({what})")
