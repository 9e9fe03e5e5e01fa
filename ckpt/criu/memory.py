"""Memory pages of a dump, streamed in the order of their addresses: found again, compared, searched. Nothing whole is in memory."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from ckpt.criu.contents import PAGE, Mapping, Pagemap, Source
from ckpt.errors import ArchiveInvalid

CHUNK_BYTES: Final = 4 << 20
_KEEP_BYTES: Final = 8192
"""The longest match, and what follows it, that is found across the border of two chunks."""


@dataclass(frozen=True, slots=True)
class Match:
    """Where a pattern was found. `context` begins at address `context_address`."""

    address: int
    length: int
    context_address: int
    context: bytes


@dataclass(slots=True)
class PageCounts:
    """Pages of two dumps of one process: the same in both, changed, only in the second, only in the first."""

    same: int = 0
    changed: int = 0
    new: int = 0
    gone: int = 0


def stream(source: Source, pagemap: Pagemap, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, bytes]]:
    """(address, bytes) of all pages that are in the image, at most `chunk_bytes` at once, neighbours joined.

    Raises:
        ArchiveInvalid: the pages image is missing or shorter than the pagemap says.
    """
    runs = _joined(pagemap)
    if not runs:
        return
    if pagemap.name not in source.names():
        raise ArchiveInvalid(f"{pagemap.name} is missing")
    with source.open(pagemap.name) as file:
        for start, size in runs:
            done = 0
            while done < size:
                parts: list[bytes] = []
                want = left = min(chunk_bytes, size - done)
                while left and (piece := file.read(left)):
                    parts.append(piece)
                    left -= len(piece)
                if left:
                    raise ArchiveInvalid(f"{pagemap.name} is shorter than its pagemap says")
                yield start + done, parts[0] if len(parts) == 1 else b"".join(parts)
                done += want


def _joined(pagemap: Pagemap) -> list[tuple[int, int]]:
    """[(address, bytes)] of the pages in the image, runs that follow each other as one."""
    found: list[tuple[int, int]] = []
    for run in pagemap.runs:
        if run.offset is None:
            continue
        if found and found[-1][0] + found[-1][1] == run.vaddr:
            found[-1] = (found[-1][0], found[-1][1] + run.pages * PAGE)
        else:
            found.append((run.vaddr, run.pages * PAGE))
    return found


def read(source: Source, pagemap: Pagemap, start: int, end: int) -> bytes:
    """The bytes of [start, end): pages that are not in the image are zeros. For small ranges.

    Raises:
        ArchiveInvalid: as `stream`.
    """
    if end <= start:
        return b""
    out = bytearray(end - start)
    for run in pagemap.runs:
        low, high = max(start, run.vaddr), min(end, run.vaddr + run.pages * PAGE)
        if run.offset is None or low >= high:
            continue
        with source.open(pagemap.name) as file:
            _skip(file, run.offset + low - run.vaddr, pagemap.name)
            at, left = low - start, high - low
            while left:
                piece = file.read(left)
                if not piece:
                    raise ArchiveInvalid(f"{pagemap.name} is shorter than its pagemap says")
                out[at : at + len(piece)] = piece
                at, left = at + len(piece), left - len(piece)
    return bytes(out)


def _skip(file: object, count: int, name: str) -> None:
    if file.seekable():  # type: ignore[attr-defined]
        file.seek(count)  # type: ignore[attr-defined]
        return
    while count:
        piece = file.read(min(count, CHUNK_BYTES))  # type: ignore[attr-defined]
        if not piece:
            raise ArchiveInvalid(f"{name} is shorter than its pagemap says")
        count -= len(piece)


def search(source: Source, pagemap: Pagemap, pattern: bytes | re.Pattern[bytes], *, context_bytes: int = 16) -> Iterator[Match]:
    """Every place where `pattern` is, in the order of the addresses; a match may go over the borders of pages that follow each other.

    Args:
        pattern: bytes as they are, or a compiled expression (matches of up to about 8 KiB).

    Raises:
        ArchiveInvalid: as `stream`.
    """
    held, base, begin = b"", 0, 0
    for address, data in stream(source, pagemap):
        if held and base + len(held) != address:
            yield from _matches(held, base, begin, len(held), pattern, context_bytes)[0]
            held = b""
        if not held:
            base, begin = address, 0
        held += data
        found, begin = _matches(held, base, begin, max(begin, len(held) - _KEEP_BYTES), pattern, context_bytes)
        yield from found
        cut = max(0, begin - context_bytes)
        held, base, begin = held[cut:], base + cut, begin - cut
    yield from _matches(held, base, begin, len(held), pattern, context_bytes)[0]


def _matches(
    held: bytes, base: int, begin: int, limit: int, pattern: bytes | re.Pattern[bytes], context_bytes: int
) -> tuple[list[Match], int]:
    """Matches that start in [begin, limit), and where to go on."""
    found: list[Match] = []
    at = begin
    while at < limit:
        if isinstance(pattern, bytes):
            start = held.find(pattern, at)
            length = len(pattern)
        else:
            one = pattern.search(held, at)
            start, length = (one.start(), one.end() - one.start()) if one else (-1, 0)
        if start < 0 or start >= limit:
            break
        low, high = max(0, start - context_bytes), min(len(held), start + length + context_bytes)
        found.append(Match(base + start, length, base + low, held[low:high]))
        at = start + max(1, length)
    return found, max(at, limit)


def kind_at(mappings: tuple[Mapping, ...], address: int) -> str:
    """What kind of mapping an address is in ("" for none)."""
    number = bisect_right(mappings, address, key=lambda mapping: mapping.start) - 1
    return mappings[number].kind if number >= 0 and address < mappings[number].end else ""


def compare(one: tuple[Source, Pagemap] | None, two: tuple[Source, Pagemap] | None) -> PageCounts:
    """Compare the pages of two dumps by their content, both read once from beginning to end.

    Raises:
        ArchiveInvalid: as `stream`.
    """
    import numpy

    counts = PageCounts()
    left, right = (stream(*side) if side else iter(()) for side in (one, two))
    a, b = next(left, None), next(right, None)
    while a is not None or b is not None:
        if b is None or (a is not None and a[0] < b[0]):
            assert a is not None
            size = len(a[1]) if b is None else min(len(a[1]), b[0] - a[0])
            counts.gone += size // PAGE
            a = _rest(a, size) or next(left, None)
        elif a is None or b[0] < a[0]:
            size = len(b[1]) if a is None else min(len(b[1]), a[0] - b[0])
            counts.new += size // PAGE
            b = _rest(b, size) or next(right, None)
        else:
            size = min(len(a[1]), len(b[1]))
            words = (numpy.frombuffer(side[1], dtype=numpy.uint64, count=size // 8).reshape(-1, PAGE // 8) for side in (a, b))
            changed = int(numpy.count_nonzero(numpy.any(numpy.not_equal(*words), axis=1)))
            counts.changed += changed
            counts.same += size // PAGE - changed
            a, b = _rest(a, size) or next(left, None), _rest(b, size) or next(right, None)
    return counts


def _rest(piece: tuple[int, bytes], size: int) -> tuple[int, bytes] | None:
    return (piece[0] + size, piece[1][size:]) if size < len(piece[1]) else None
