"""Reading members from the store: every chunk verified, the last ones kept, the next ones fetched ahead."""

from __future__ import annotations

import io
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np

from ckpt.archive.layout import ORDER, is_bulk
from ckpt.archive.members import StageMembers
from ckpt.errors import DigestMismatch
from ckpt.store.pack import SUFFIX, PackReader
from ckpt.store.pages import CHUNK_PAGES, LINEAR, PACK_SHIFT, PAGE_BYTES
from ckpt.store.recipe import ZERO, Bulk, Recipe

CACHED_CHUNKS: Final = 64
_AHEAD: Final = 4


class PageReader:
    """Random access to the bulk members of one checkpoint. May be used by many threads; `close` it (or use `with`).

    Members that are plain files (a store of the old layout) are read from these.
    """

    def __init__(self, directory: Path, recipe: Recipe, packs: Path, key: bytes | None, *, own: PackReader | None = None) -> None:
        self._directory = directory
        self._recipe = recipe
        self._packs = packs
        self._key = key
        self._readers: dict[int, PackReader] = {} if own is None else {0: own}
        self._chunks: OrderedDict[tuple[int, int], Future[memoryview]] = OrderedDict()
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._ends: dict[str, int] = {}

    def __enter__(self) -> PageReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the packs."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()
        self._chunks.clear()

    def size_bytes(self, member: str) -> int:
        """The size of a member. Raises FileNotFoundError."""
        bulk = self._recipe.members.get(member)
        return bulk.size_bytes if bulk is not None else os.lstat(self._directory / member).st_size

    def pread(self, member: str, count: int, offset: int) -> bytes:
        """Up to `count` bytes from `offset`; fewer only at the end. Raises as `read_into`."""
        buffer = bytearray(max(0, min(count, self.size_bytes(member) - offset)))
        done = self.read_into(member, offset, buffer)
        return bytes(buffer if done == len(buffer) else buffer[:done])

    def read_into(self, member: str, offset: int, buffer: bytearray | memoryview) -> int:
        """Fill `buffer` from `offset` on; returns how many bytes there were.

        Raises:
            DigestMismatch: what is there is not what was written; the message names the member.
            FileNotFoundError: there is no such member.
        """
        view = memoryview(buffer).cast("B")
        bulk = self._recipe.members.get(member)
        if bulk is None:
            return _read_plain(self._directory / member, offset, view)
        view = view[: max(0, bulk.size_bytes - offset)]
        ahead = self._ends.get(member) == offset
        at = offset
        try:
            while view:
                count = self._piece(bulk, at, view)
                at, view = at + count, view[count:]
        except DigestMismatch as error:
            raise DigestMismatch(f"{member} was changed or damaged: {error.message}") from error
        self._ends[member] = at
        if ahead and at < bulk.size_bytes:
            self._look_ahead(bulk, at // PAGE_BYTES)
        return at - offset

    def _piece(self, bulk: Bulk, at: int, view: memoryview) -> int:
        """As much as lies in one chunk or one run of zeros."""
        page, inside = divmod(at, PAGE_BYTES)
        run = int(np.searchsorted(bulk.firsts, page, "right")) - 1
        skipped = page - int(bulk.firsts[run])
        left = (int(bulk.counts[run]) - skipped) * PAGE_BYTES - inside
        place = int(bulk.places[run])
        if place == ZERO:
            count = min(left, len(view))
            view[:count] = bytes(count)
            return count
        number, slot = divmod((place & LINEAR) + skipped, CHUNK_PAGES)
        chunk = self.chunk(place >> PACK_SHIFT, number)
        begin = slot * PAGE_BYTES + inside
        count = min(left, len(view), CHUNK_PAGES * PAGE_BYTES - begin)
        if begin + count > len(chunk):
            raise DigestMismatch(f"chunk {number} is shorter than it should be")
        view[:count] = chunk[begin : begin + count]
        return count

    def chunk(self, pack: int, number: int) -> memoryview:
        """A chunk, from memory if it is there."""
        key = (pack, number)
        with self._lock:
            future = self._chunks.get(key)
            if future is not None:
                self._chunks.move_to_end(key)
            else:
                mine = future = self._chunks[key] = Future()
                while len(self._chunks) > CACHED_CHUNKS:
                    self._chunks.popitem(last=False)
                future = None
        if future is not None:
            return future.result()
        try:
            mine.set_result(self.load(pack, number))
        except BaseException as error:
            with self._lock:
                self._chunks.pop(key, None)  # the next one tries again
            mine.set_exception(error)
        return mine.result()

    def load(self, pack: int, number: int) -> memoryview:
        """A chunk from its pack."""
        reader = self._readers.get(pack)
        if reader is None:
            with self._opening:
                reader = self._readers.get(pack)
                if reader is None:
                    name = self._recipe.packs[pack]
                    try:
                        reader = PackReader.open(self._packs / (name + SUFFIX), self._key)
                    except FileNotFoundError:
                        raise DigestMismatch(f"pack {name} is missing from the store") from None
                    self._readers[pack] = reader
        return reader.chunk(number)

    def _look_ahead(self, bulk: Bulk, page: int) -> None:
        run = int(np.searchsorted(bulk.firsts, page, "right")) - 1
        wanted: list[tuple[int, int]] = []
        skipped = page - int(bulk.firsts[run])
        while run < len(bulk.places) and len(wanted) < _AHEAD:
            place, count = int(bulk.places[run]), int(bulk.counts[run])
            if place != ZERO:
                first, last = ((place & LINEAR) + skipped) // CHUNK_PAGES, ((place & LINEAR) + count - 1) // CHUNK_PAGES
                wanted += [(place >> PACK_SHIFT, n) for n in range(first, min(last, first + _AHEAD) + 1)]
            run, skipped = run + 1, 0
        for key in wanted[:_AHEAD]:
            if key not in self._chunks:
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(2, "ckpt-ahead")
                self._pool.submit(self._fetch, *key)

    def _fetch(self, pack: int, number: int) -> None:
        try:
            self.chunk(pack, number)
        except (OSError, DigestMismatch):
            pass  # whoever reads it is told


class StoreMembers:
    """The members of a checkpoint in the store: small ones are files, bulk ones come from chunks. `close` it (or use `with`)."""

    def __init__(self, directory: Path, recipe: Recipe, pages: PageReader) -> None:
        self._files = StageMembers(directory)
        self.recipe = recipe
        self.pages = pages

    def __enter__(self) -> StoreMembers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the packs."""
        self.pages.close()

    def names(self) -> list[str]:
        """Every member, in the archive's order."""
        names = set(self._files.names()) | self.recipe.members.keys()
        names |= {name.partition("/")[0] + "/" for name in names if "/" in name}
        return sorted(names, key=_order)

    def size_bytes(self, name: str) -> int:
        """The size of a member; 0 for a directory."""
        return 0 if name.endswith("/") else self.pages.size_bytes(name)

    def path(self, name: str) -> Path:
        """Where a member is that is a plain file."""
        return self._files.stage / name

    def mtime_s(self, name: str) -> float:
        """When it was written; 0 for a directory that is not there."""
        bulk = self.recipe.members.get(name)
        return bulk.mtime_s if bulk is not None else self._files.mtime_s(name)

    def open(self, name: str) -> BinaryIO:
        """A member from its beginning on; it can seek."""
        if name not in self.recipe.members:
            return self._files.open(name)
        return cast(BinaryIO, _MemberFile(self.pages, name))


class _MemberFile(io.RawIOBase):
    def __init__(self, pages: PageReader, name: str) -> None:
        self._pages = pages
        self._member = name
        self._size = pages.size_bytes(name)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._pages.read_into(self._member, self._at, buffer)
        self._at += count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at


def is_kept_in_chunks(name: str) -> bool:
    """Whether the store keeps a member of this name in chunks."""
    return is_bulk(name)


def _order(name: str) -> tuple[int, str]:
    head, slash, _ = name.partition("/")
    key = head + slash
    return (ORDER.index(key) if key in ORDER else len(ORDER), name)


def _read_plain(path: Path, offset: int, view: memoryview) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    done = 0
    try:
        while done < len(view):
            count = os.preadv(fd, [view[done:]], offset + done)
            if not count:
                break
            done += count
    finally:
        os.close(fd)
    return done
