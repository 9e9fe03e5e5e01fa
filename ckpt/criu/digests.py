"""A digest of every memory page that the other end holds, to tell which pages changed since.

Digests are xxh3_128 under a seed drawn per table. Sixteen bytes make a chance collision less likely than an unnoticed memory error; the seed
keeps a workload from preparing two pages of one digest. A second level (one digest for 64 KiB or 1 MiB, pages only when it differs) was
measured and left out: hashing page by page runs at about 5 GB/s from Python, as fast as the memory can be copied out of the process, and the
second level would double the work for every block that did change.
"""

from __future__ import annotations

import operator
import secrets
import struct
from typing import Final, NamedTuple

import xxhash

from ckpt.host.procmem import PAGE

DIGEST_BYTES: Final = 16
BLOCK_PAGES: Final = 64
"""Pages whose digests lie in one piece: few enough that scattered pages waste little, enough that the dictionary stays small."""

_UNKNOWN: Final = bytes(DIGEST_BYTES)  # no page has it: the seed is secret, so nobody can aim at it
_BLOCK_BYTES: Final = BLOCK_PAGES * DIGEST_BYTES
_SPAN_BYTES: Final = BLOCK_PAGES * PAGE  # of memory
_each = struct.Struct(f"{DIGEST_BYTES}s").iter_unpack


class Part(NamedTuple):
    """`page_count` pages from page `first` of the compared ones on that all changed (or were not known), or all did not."""

    first: int
    page_count: int
    changed: bool


def image_of_pid(pid: int) -> int:
    """The image id of a process's private memory; `pid` in its own pid namespace. It is what CRIU's page-server protocol calls `dst_id`."""
    return pid << 8 | 1


def image_of_shmem(shmid: int) -> int:
    """The image id of shared memory, likewise."""
    return shmid << 8 | 2


class DigestTable:
    """Image id and page address -> digest of the bytes that the other end holds. Not for use by several threads at once.

    The rule that makes it sound: a digest is taken from the very bytes that are sent, in the buffer from which they are sent. To hash one
    read of live memory and to send another would let a page that changed in between pass as known at the end, and the restored process would
    have old bytes in it, silently. So only bytes in hand go in here; nothing in here can read memory.
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = secrets.randbits(64) if seed is None else seed
        self._images: dict[int, dict[int, bytearray]] = {}

    def digests(self, pages: memoryview) -> bytes:
        """The digests of whole pages, 16 bytes each, one behind the other.

        Raises:
            ValueError: not whole pages.
        """
        if len(pages) % PAGE:
            raise ValueError(f"{len(pages)} bytes are not whole pages")
        digest, seed = xxhash.xxh3_128_digest, self._seed
        return b"".join([digest(pages[at : at + PAGE], seed) for at in range(0, len(pages), PAGE)])

    def compare(self, image_id: int, vaddr: int, pages: memoryview) -> list[Part]:
        """Which of the pages, the first one being that at `vaddr`, differ from what the other end holds.

        Raises:
            ValueError: not whole pages, or `vaddr` is not a page's address.
        """
        return self.differences(image_id, vaddr, self.digests(pages))

    def compare_and_update(self, image_id: int, vaddr: int, pages: memoryview) -> list[Part]:
        """`compare`, and from now on the other end counts as holding these bytes: the caller sends the changed parts *of this buffer*,
        and when it cannot, it must `forget` them."""
        digests = self.digests(pages)
        parts = self.differences(image_id, vaddr, digests)
        if any(part.changed for part in parts):
            self.remember(image_id, vaddr, digests)
        return parts

    def differences(self, image_id: int, vaddr: int, digests: bytes) -> list[Part]:
        """`compare` for digests made before."""
        pages = len(digests) // DIGEST_BYTES
        blocks = self._images.get(image_id)
        if not blocks:
            _page_number(vaddr)
            return [Part(0, pages, True)] if pages else []
        known = b"".join([blocks[block][low:high] if block in blocks else bytes(high - low) for block, low, high in _pieces(vaddr, pages)])
        if known == digests:
            return [Part(0, pages, False)] if pages else []
        return _parts(bytes(map(operator.ne, _each(known), _each(digests))))

    def knows(self, image_id: int, vaddr: int, page_count: int) -> list[bool] | bool:
        """For each page whether there is a digest of it; one bool when that goes for all of them."""
        blocks = self._images.get(image_id)
        if not blocks:
            return False
        known = b"".join([blocks[block][low:high] if block in blocks else bytes(high - low) for block, low, high in _pieces(vaddr, page_count)])
        if _UNKNOWN not in known:
            return True
        return [digest != _UNKNOWN for (digest,) in _each(known)]

    def remember(self, image_id: int, vaddr: int, digests: bytes) -> None:
        """The other end now holds pages with these digests from `vaddr` on."""
        blocks = self._images.setdefault(image_id, {})
        at = 0
        for block, low, high in _pieces(vaddr, len(digests) // DIGEST_BYTES):
            held = blocks.get(block)
            if held is None:
                held = blocks[block] = bytearray(_BLOCK_BYTES)
            held[low:high] = digests[at : at + high - low]
            at += high - low

    def forget(self, image_id: int, start: int, end: int) -> None:
        """The pages of [start, end) are not known any more."""
        blocks = self._images.get(image_id)
        if not blocks or start >= end:
            return
        first, last = _page_number(start), _page_number(end)  # last: the first page behind
        if (last - first) // BLOCK_PAGES > len(blocks):
            inside = [block for block in blocks if first < (block + 1) * BLOCK_PAGES and block * BLOCK_PAGES < last]
        else:
            inside = [block for block in range(first // BLOCK_PAGES, -(-last // BLOCK_PAGES)) if block in blocks]
        for block in inside:
            low, high = max(first - block * BLOCK_PAGES, 0), min(last - block * BLOCK_PAGES, BLOCK_PAGES)
            held = blocks[block]
            held[low * DIGEST_BYTES : high * DIGEST_BYTES] = bytes((high - low) * DIGEST_BYTES)
            if held.count(0) == _BLOCK_BYTES:
                del blocks[block]

    def keep_only(self, image_id: int, blocks: set[int]) -> None:
        """Forget all pages of the image but those in these blocks (numbered from address 0 on)."""
        held = self._images.get(image_id, {})
        for block in held.keys() - blocks:
            del held[block]

    def drop(self, image_id: int) -> None:
        """Forget the image."""
        self._images.pop(image_id, None)

    @property
    def known_pages(self) -> int:
        """How many pages the other end holds (counts them all: not for inner loops)."""
        return sum(digest != _UNKNOWN for blocks in self._images.values() for held in blocks.values() for (digest,) in _each(held))


class Sweep:
    """One ascending pass over an image, in which every page that is not met is forgotten. A pass without its `end` leaves what is behind it."""

    def __init__(self, table: DigestTable, image_id: int) -> None:
        self._table = table
        self._image_id = image_id
        self._done = 0  # below this address only pages that were met are known, or they are in a block without any
        self._met: set[int] = set()

    def met(self, vaddr: int, count: int) -> None:
        """`page_count` pages from `vaddr` on are there."""
        self._forget_around(vaddr)
        self._done = vaddr + count * PAGE
        self._met.update(range(vaddr // _SPAN_BYTES, -(-self._done // _SPAN_BYTES)))

    def end(self) -> None:
        """There are no more."""
        self._forget_around((self._done // _SPAN_BYTES + 1) * _SPAN_BYTES)
        self._table.keep_only(self._image_id, self._met)

    def _forget_around(self, vaddr: int) -> None:
        """Forget what is between, but leave whole blocks to the end: gaps can be terabytes wide."""
        behind = -(-self._done // _SPAN_BYTES) * _SPAN_BYTES
        before = vaddr // _SPAN_BYTES * _SPAN_BYTES
        self._table.forget(self._image_id, self._done, min(behind, vaddr))
        self._table.forget(self._image_id, max(before, self._done), vaddr)


def _page_number(vaddr: int) -> int:
    if vaddr % PAGE:
        raise ValueError(f"{vaddr:#x} is not the address of a page")
    return vaddr // PAGE


def _pieces(vaddr: int, pages: int) -> list[tuple[int, int, int]]:
    """Where the digests of the pages lie: block number, and byte range in the block."""
    first = _page_number(vaddr)
    end = first + pages
    return [
        (block, max(first - block * BLOCK_PAGES, 0) * DIGEST_BYTES, min(end - block * BLOCK_PAGES, BLOCK_PAGES) * DIGEST_BYTES)
        for block in range(first // BLOCK_PAGES, -(-end // BLOCK_PAGES))
    ]


def _parts(changed: bytes) -> list[Part]:
    """Runs of equal bytes (0 or 1) as parts."""
    parts = []
    at = 0
    while at < len(changed):
        value = changed[at]
        end = changed.find(1 - value, at)
        end = len(changed) if end < 0 else end
        parts.append(Part(at, end - at, bool(value)))
        at = end
    return parts
