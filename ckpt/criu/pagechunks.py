"""Memory pages that are not in files but in something that reads by offset and length: a store's chunks.

CRIU restores lazily from such memory with two helpers. What CRIU itself reads (pages without PE_LAZY: shared memory, private copies of file
pages and the like) is written to pages files that are empty everywhere else (`write_eager`): a lazy restore skips the other entries without
looking (restore_priv_vma_content in criu/mem.c). All the rest the lazy-pages daemon asks of a page server over `PageChunks`.
"""

from __future__ import annotations

import os
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Protocol

from ckpt.criu.pagefeed import PageFiles, entries_of, pages_of
from ckpt.criu.pagestream import PAGE_BYTES, PE_LAZY, PE_PARENT, PE_PRESENT
from ckpt.errors import RestoreFailed

BLOCK_BYTES: Final = 1 << 20
"""What is read at once: a page fault waits for one, the daemon's own copying for up to five."""
AHEAD_BLOCKS: Final = 4
KEPT_BLOCKS: Final = 16
_READERS: Final = 2


class Reader(Protocol):
    """Random access to one pages file. Thread-safe."""

    size_bytes: int

    def read(self, offset: int, length: int) -> bytes | memoryview:
        """All of these bytes, verified. Raises CkptError (DigestMismatch), OSError."""


class _Maps(PageFiles):
    """The pagemaps of one set of images, with a reader in the place of each pages file."""

    def __init__(self, images_dir: Path, reader_of: Callable[[str], Reader]) -> None:
        self._reader_of = reader_of
        self.readers: list[Reader] = []
        super().__init__(images_dir)

    def _open(self, pages: Path) -> int:
        self.readers.append(self._reader_of(pages.name))
        return len(self.readers) - 1


class PageChunks:
    """The memory pages of one set of CRIU images, for `pagefeed.serve`. What follows a page is read ahead in threads.

    Args:
        images_dir: where the pagemaps are.
        reader_of: called with the name of a pages file ("pages-65537.img").

    Raises:
        RestoreFailed: an image cannot be read.
    """

    def __init__(self, images_dir: Path, reader_of: Callable[[str], Reader]) -> None:
        self._maps = _Maps(images_dir, reader_of)
        self._blocks: OrderedDict[tuple[int, int], Future[memoryview]] = OrderedDict()
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="ckpt-chunks")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def pieces(self, pid: int, vaddr: int, nr_pages: int) -> list[memoryview]:
        """The pages from `vaddr` on, as many as there are without a gap. Raises what a reader raises."""
        found: list[memoryview] = []
        for number, offset, length in self._maps.pieces(pid, vaddr, nr_pages):
            blocks = range(offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES + 1)
            for block in blocks:
                self._want(number, block)
            for block in range(blocks.stop, blocks.stop + AHEAD_BLOCKS):
                self._want(number, block)
            for block in blocks:
                begin, end = max(offset - block * BLOCK_BYTES, 0), min(offset + length - block * BLOCK_BYTES, BLOCK_BYTES)
                found.append(self._blocks[number, block].result()[begin:end])
        while len(self._blocks) > KEPT_BLOCKS:
            self._blocks.popitem(last=False)
        return found

    def _want(self, number: int, block: int) -> None:
        """See to it that a block comes; those wanted last are kept."""
        key, at = (number, block), block * BLOCK_BYTES
        if key in self._blocks:
            self._blocks.move_to_end(key)
            return
        reader = self._maps.readers[number]
        if at < reader.size_bytes:
            length = min(BLOCK_BYTES, reader.size_bytes - at)
            self._blocks[key] = self._pool.submit(lambda: memoryview(reader.read(at, length)))


def write_eager(images_dir: Path, reader_of: Callable[[str], Reader]) -> int:
    """Write the pages files of a lazy restore beside their pagemaps: what CRIU reads itself, and holes for the rest. Returns bytes written.

    Raises:
        RestoreFailed: an image is damaged.
        OSError, CkptError: it cannot be written, or a reader's.
    """
    written = 0
    for pagemap in sorted(images_dir.glob("pagemap-*.img")):
        try:
            found = iter(entries_of(pagemap))
            name = f"pages-{next(found).pages_id}.img"
            runs = list(_eager(found))
        except (ValueError, struct.error, StopIteration) as error:
            raise RestoreFailed(f"{pagemap.name} cannot be read: {error}") from error
        reader = reader_of(name)
        fd = os.open(images_dir / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)  # never a file of the store
        try:
            os.ftruncate(fd, reader.size_bytes)
            for offset, length in runs:
                for at in range(offset, offset + length, BLOCK_BYTES):
                    data = memoryview(reader.read(at, min(BLOCK_BYTES, offset + length - at)))
                    while data:
                        count = os.pwrite(fd, data, at)
                        data, at, written = data[count:], at + count, written + count
        finally:
            os.close(fd)
    return written


def _eager(entries: Iterator[Any]) -> Iterator[tuple[int, int]]:
    """Offsets and lengths of what CRIU reads itself, neighbours joined."""
    begin = end = at = 0
    for entry in entries:
        # Images of CRIU before 3.0 have no flags, but `in_parent`.
        flags = entry.flags if entry.HasField("flags") else PE_PARENT if entry.in_parent else PE_PRESENT
        if not flags & PE_PRESENT:
            continue
        length = pages_of(entry) * PAGE_BYTES
        if not flags & PE_LAZY:
            if at != end:
                if end > begin:
                    yield begin, end - begin
                begin = at
            end = at + length
        at += length
    if end > begin:
        yield begin, end - begin
