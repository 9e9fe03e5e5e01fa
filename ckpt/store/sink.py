"""A bulk member on its way into the store: known pages become references, zero pages nothing, new ones chunks of a pack.

A sink's caller (CRIU's pages, while a container is frozen) only copies into blocks. One thread tags pages and looks them up, one makes the flat
digest (if it is wanted) and the seal, the packer's pool compresses. Blocks are few and used again: memory does not grow with the member.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Final

import numpy as np

from ckpt.archive.chunks import extents
from ckpt.archive.layout import DIGEST_PREFIX
from ckpt.store.pack import PackWriter
from ckpt.store.pages import CHUNK_PAGES, PAGE_BYTES, UNKNOWN, Index, Pages, Places, Seal, Tagger, is_zero
from ckpt.store.recipe import ZERO, Bulk, join, runs

BLOCK_BYTES: Final = 1 << 20
BLOCKS: Final = 8
_BLOCK_PAGES: Final = BLOCK_BYTES // PAGE_BYTES
_NOTHING: Final = memoryview(bytes(BLOCK_BYTES))


class Packer:
    """What the sinks of one draft share: the index of known pages, and the pack of the new ones (number 0 of the draft's packs)."""

    def __init__(self, writer: PackWriter, tagger: Tagger, index: Index) -> None:
        self.writer = writer
        self._tagger = tagger
        self._index = index
        self._lock = threading.Lock()
        self._buffer: Pages | None = None
        self._filled = 0
        self._tags: list[bytes] = []

    def place(self, pages: Pages) -> Places:
        """Where each of these pages is; those that are nowhere yet are put into the pack."""
        found = np.full(len(pages), ZERO, np.int64)
        solid = np.flatnonzero(~is_zero(pages))
        if not len(solid):
            return found
        tags = self._tagger.tags(pages if len(solid) == len(pages) else pages[solid])
        with self._lock:
            places = self._index.find(tags)
            unknown = np.flatnonzero(places == UNKNOWN)
            if len(unknown):
                _, first, inverse = np.unique(tags[unknown, 0], return_index=True, return_inverse=True)
                twin = first[inverse]  # the first unknown page with the same half of its tag
                twin = np.where(tags[unknown[twin], 1] == tags[unknown, 1], twin, np.arange(len(unknown)))
                new = twin == np.arange(len(unknown))
                made = np.zeros(len(unknown), np.int64)
                made[new] = self._append(pages, solid[unknown[new]], tags[unknown[new]].tobytes())
                places[unknown] = made[twin]
                self._index.add(tags[unknown[new]], made[new])
        found[solid] = places
        return found

    def seal(self) -> Seal:
        """A checksum for a member."""
        return self._tagger.seal()

    def flush(self) -> None:
        """Give the chunk that is being filled to the pack, full or not."""
        with self._lock:
            if self._buffer is not None:
                self._put()

    def _append(self, pages: Pages, which: Places, tags: bytes) -> Places:
        made: list[Places] = []
        at = 0
        while at < len(which):
            if self._buffer is None:
                self._buffer = self.writer.buffer()
            count = min(len(which) - at, CHUNK_PAGES - self._filled)
            first, last = int(which[at]), int(which[at + count - 1])
            taken = slice(first, last + 1) if last - first + 1 == count else which[at : at + count]  # a slice is not copied twice
            self._buffer[self._filled : self._filled + count] = pages[taken]
            begin = self.writer.count * CHUNK_PAGES + self._filled
            made.append(np.arange(begin, begin + count, dtype=np.int64))
            self._tags.append(tags[at * 16 : (at + count) * 16])
            self._filled += count
            at += count
            if self._filled == CHUNK_PAGES:
                self._put()
        return np.concatenate(made)

    def _put(self) -> None:
        assert self._buffer is not None
        buffer, count, tags = self._buffer, self._filled, b"".join(self._tags)
        self._buffer, self._filled, self._tags = None, 0, []
        self.writer.put(buffer, count, tags)


class _Block:
    __slots__ = ("data", "filled", "zeros")

    def __init__(self) -> None:
        self.data = np.empty(BLOCK_BYTES, np.uint8)
        self.filled = 0
        self.zeros = 0
        """Zero pages that come before the block's own content."""


class Sink:
    """Write the content of one bulk member, from its beginning to its end; only `close` makes it count.

    `write` and `close` raise NoSpace and what else may be wrong with the store. Not for several threads at once.
    """

    def __init__(
        self,
        name: str,
        packer: Packer,
        storage: Callable[[], AbstractContextManager[None]],
        done: Callable[[Sink, Bulk], None],
        *,
        digest: bool = True,
    ) -> None:
        self.name = name
        self.size_bytes = 0
        self.digest = ""
        """ "sha256:HEX" of the content, after `close`, if it was asked for."""
        self._packer = packer
        self._storage = storage
        self._report = done
        self._hash = hashlib.sha256() if digest else None
        self._seal = packer.seal()
        self._free: queue.SimpleQueue[_Block] = queue.SimpleQueue()
        self._made = 0
        self._block: _Block | None = None
        self._to_pack: queue.SimpleQueue[_Block | None] = queue.SimpleQueue()
        self._to_hash: queue.SimpleQueue[_Block | None] = queue.SimpleQueue()
        self._hashed: queue.SimpleQueue[_Block | None] = queue.SimpleQueue()
        self._places: list[Places] = []
        self._counts: list[Places] = []
        self._error: BaseException | None = None
        self._closed = False
        self._threads = [threading.Thread(target=self._pack, name="ckpt-sink", daemon=True)]
        if digest:
            self._threads.append(threading.Thread(target=self._digest, name="ckpt-sink-digest", daemon=True))
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @property
    def closed(self) -> bool:
        """Whether `close` or `abort` was called."""
        return self._closed

    def writable(self) -> bool:
        """For those who take it for a file."""
        return not self._closed

    def flush(self) -> None:
        """For those who take it for a file; nothing counts before `close`."""

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Append bytes; returns how many."""
        view = memoryview(data).cast("B")
        total = len(view)
        while view:
            block = self._room()
            count = min(len(view), BLOCK_BYTES - block.filled)
            block.data.data[block.filled : block.filled + count] = view[:count]
            self._add(block, count)
            view = view[count:]
        return total

    def zeros(self, count: int) -> None:
        """Append `count` zero bytes without anybody making them."""
        while count:
            block = self._room()
            if block.filled % PAGE_BYTES == 0 and count >= PAGE_BYTES:
                if block.filled:
                    self._send(block)
                    continue
                pages = min(count // PAGE_BYTES, 1 << 18)
                block.zeros += pages
                if block.zeros >= 1 << 18:
                    self._send(block)
                self.size_bytes += pages * PAGE_BYTES
                count -= pages * PAGE_BYTES
                continue
            part = min(count, PAGE_BYTES - block.filled % PAGE_BYTES)
            block.data[block.filled : block.filled + part] = 0
            self._add(block, part)
            count -= part

    def read_from(self, fd: int, size: int) -> None:
        """Append the content of an open file, its holes told apart."""
        at = 0
        for start, stop in extents(fd, size):
            self.zeros(start - at)
            at = start
            while at < stop:
                block = self._room()
                view = block.data.data[block.filled : block.filled + min(stop - at, BLOCK_BYTES - block.filled)]
                count = os.preadv(fd, [view], at)
                if not count:
                    raise OSError(5, f"{self.name} became shorter while it was read")
                self._add(block, count)
                at += count
        self.zeros(size - at)

    def close(self) -> None:
        """The member is complete."""
        if self._closed:
            return
        block = self._block
        if block is not None and self._error is None:
            rest = -block.filled % PAGE_BYTES
            block.data[block.filled : block.filled + rest] = 0
            self._send(block)
        self._stop()
        self._check()
        places, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        if self._places:
            places, counts = join(np.concatenate(self._places), np.concatenate(self._counts))
        if self._hash is not None:
            self.digest = DIGEST_PREFIX + self._hash.hexdigest()
        self._report(self, Bulk(self.size_bytes, places, counts, time.time(), self.digest, self._seal.text()))

    def abort(self) -> None:
        """Forget the member."""
        if not self._closed:
            self._error = self._error or OSError(125, f"{self.name} was broken off")
            self._stop()

    def _stop(self) -> None:
        self._closed = True
        self._to_pack.put(None)
        self._to_hash.put(None)
        for thread in self._threads:
            thread.join()

    def _room(self) -> _Block:
        if self._closed:
            raise ValueError(f"the sink of {self.name} is closed")
        if self._block is None:
            self._check()
            if self._made < BLOCKS and self._free.empty():
                self._made += 1
                self._block = _Block()
            else:
                self._block = self._free.get()
        return self._block

    def _add(self, block: _Block, count: int) -> None:
        block.filled += count
        self.size_bytes += count
        if block.filled == BLOCK_BYTES:
            self._send(block)

    def _send(self, block: _Block) -> None:
        self._block = None
        if self._hash is not None:
            self._to_hash.put(block)
        self._to_pack.put(block)

    def _check(self) -> None:
        if self._error is not None:
            with self._storage():
                raise self._error

    def _pack(self) -> None:
        while (block := self._to_pack.get()) is not None:
            try:
                if self._error is None:
                    if self._hash is None:
                        self._update(block)
                    places, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
                    if block.filled:
                        size = -(-block.filled // PAGE_BYTES) * PAGE_BYTES
                        places, counts = runs(self._packer.place(block.data[:size].reshape(-1, PAGE_BYTES)))
                    if block.zeros:
                        places, counts = np.concatenate(([ZERO], places)), np.concatenate(([block.zeros], counts))
                    self._places.append(places)
                    self._counts.append(counts)
            except BaseException as error:
                self._error = self._error or error
            if self._hash is not None:
                self._hashed.get()
            block.filled = block.zeros = 0
            self._free.put(block)

    def _digest(self) -> None:
        while (block := self._to_hash.get()) is not None:
            if self._error is None:
                self._update(block)
            self._hashed.put(block)

    def _update(self, block: _Block) -> None:
        """The seal, and the digest if it is wanted."""
        parts = [_NOTHING[: min(left, _BLOCK_PAGES) * PAGE_BYTES] for left in range(block.zeros, 0, -_BLOCK_PAGES)]
        for part in (*parts, block.data.data[: block.filled]):  # the padding of the last page is no content
            self._seal.update(part)
            if self._hash is not None:
                self._hash.update(part)
