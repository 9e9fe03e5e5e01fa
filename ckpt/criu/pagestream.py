"""Memory pages as a stream of records that does not depend on CRIU's version, and the writer that makes CRIU's images of it.

A record is a header of 32 bytes, little-endian: u32 kind, u32 flags, u64 image_id, u64 vaddr, u64 nr_pages (`HEADER`).

    OPEN    image_id                           the image begins; no other one is open
    PAGES   image_id flags vaddr nr_pages      nr_pages * 4096 bytes follow
    PARENT  image_id vaddr nr_pages            these pages are those of the parent images; nothing follows
    CLOSE   image_id                           the image is whole
    END                                        the stream is whole; nothing may come after it

`image_id` is CRIU's dst_id as its page-server protocol has it (criu/page-xfer.c, encode_pm): the number (pid, or shmid) << 8 | type
(1 a process's memory, 2 shared memory). `flags` are CRIU's PE_* (criu/include/pagemap.h). Addresses go up within an image.

The images (criu/image.c, criu/pagemap.c, images/pagemap.proto): pagemap-PID.img and pagemap-shmem-ID.img have two magics, a
pagemap_head that names pages-N.img, and pagemap_entry's; pages-N.img has nothing but the pages, in the order of the entries.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, Protocol

from ckpt.criu.bindings import load
from ckpt.errors import FeatureMissing, TransferFailed

HEADER: Final = struct.Struct("<IIQQQ")
PAGE_BYTES: Final = 4096
PE_PARENT, PE_LAZY, PE_PRESENT = 1, 2, 4
TYPE_PID, TYPE_SHMEM = 1, 2
_TYPE_BITS: Final = 8

ENTRY_PAGES: Final = 16384
"""Neighbouring pages are joined to entries of at most so many. CRIU's own are not larger (they end with a pipe), and its lazy-pages daemon counts
the bytes of an entry in an int: it fails with 2 GiB in one (collect_iovs in criu/uffd.c, 4.2.1)."""
IMAGES_CAP: Final = 100_000
"""Images in one stream: each makes two files."""
FIRST_PAGES_ID: Final = 0x10001
"""CRIU's page server counts from here, so that its files don't meet those that a dump writes itself (up_page_ids_base)."""
_PID_CAP: Final = 1 << 22
_ADDRESS_CAP: Final = 1 << 64
_ENTRIES_BUFFER_BYTES: Final = 64 << 10

Buffer = bytes | bytearray | memoryview


class Kind(IntEnum):
    """What a record is; values are part of the stream's format."""

    OPEN = 1
    PAGES = 2
    PARENT = 3
    CLOSE = 4
    END = 5


def record(kind: Kind, image_id: int = 0, vaddr: int = 0, nr_pages: int = 0, *, flags: int = 0) -> bytes:
    """The header of a record."""
    return HEADER.pack(kind, flags, image_id, vaddr, nr_pages)


def pagemap_name(image_id: int) -> str | None:
    """The file name of the pagemap of an image ("pagemap-12.img", "pagemap-shmem-3.img"); None when there is no such image."""
    number, kind = image_id >> _TYPE_BITS, image_id & ((1 << _TYPE_BITS) - 1)
    if kind == TYPE_PID and 0 < number <= _PID_CAP:
        return f"pagemap-{number}.img"
    if kind == TYPE_SHMEM and number:
        return f"pagemap-shmem-{number}.img"
    return None


def check_page_size() -> None:
    """Raises FeatureMissing when this kernel's pages have another size than the stream's."""
    if (size := os.sysconf("SC_PAGE_SIZE")) != PAGE_BYTES:
        raise FeatureMissing(f"this kernel has pages of {size} bytes: memory can be streamed with pages of {PAGE_BYTES} bytes only")


class PageSink(Protocol):
    """Where the pages of one image go, in the order of its pages file."""

    def write(self, data: Buffer, /) -> object:
        """Take all of it; the buffer is good only until this returns."""

    def close(self) -> object:
        """That was all."""


class PageWriter:
    """A file-like sink that makes pagemap and pages images of a stream, beneath one directory. The stream is untrusted.

    It takes any pieces: a record's header or its pages may be cut anywhere. Pages go to their file from the caller's buffer.

    Args:
        directory: where the images go; it exists.
        sink: makes the place for a pages file ("pages-65537.img"), instead of a file in `directory`. It belongs to the caller: what was begun
            is closed only when its image is whole.
        parent: directory of the parent images; the images get CRIU's symlink `parent` (relative) to it. Without it PARENT records are
            refused, as are those of an image that the parent does not have.
        max_bytes: how many bytes of files may be written in all.

    Raises:
        TransferFailed: something else is in the place of the symlink.
        FeatureMissing: no pycriu, or pages of another size.
        OSError: from writing (a full disk), here and in every method.
    """

    def __init__(
        self, directory: Path, *, parent: Path | None = None, max_bytes: int | None = None, sink: Callable[[str], PageSink] | None = None
    ) -> None:
        check_page_size()
        self._sink_for = sink
        self._sink: PageSink | None = None
        self._pb: Any = load("images.pagemap_pb2")
        magics = load("images.magic").by_name
        self._magic = struct.pack("<II", magics["IMG_COMMON"], magics["PAGEMAP"])
        # CRIU 4.2 made the count u64 in a new field and left the old one, required, for older images.
        self._wide = "compat_nr_pages" in self._pb.pagemap_entry.DESCRIPTOR.fields_by_name
        self._max_bytes = max_bytes
        self._used_bytes = 0
        self._head = bytearray(HEADER.size)
        self._have = 0
        self._left = 0
        self._image = 0
        self._run = (0, 0, 0)
        """The entry that may still grow: vaddr, pages, flags. No pages: none."""
        self._entries = bytearray()
        self._next_vaddr = 0
        self._image_in_parent = False
        self._made: list[str] = []
        self._seen: set[int] = set()
        self._pagemap_fd = self._pages_fd = -1
        self._ended = False
        self._failure = ""
        self._pages = self._parents = 0
        self._parent: int = -1
        self._dir = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if parent is not None:
                self._parent = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                os.symlink(os.path.relpath(parent.resolve(), directory.resolve()), "parent", dir_fd=self._dir)
                self._made.append("parent")
        except BaseException as error:
            self.close()
            if isinstance(error, FileExistsError):
                raise TransferFailed(f"cannot write the memory images: {directory / 'parent'} exists already") from error
            raise

    @property
    def pages(self) -> int:
        """Pages announced with data so far."""
        return self._pages

    @property
    def pages_bytes(self) -> int:
        """Bytes of page data written so far."""
        return self._pages * PAGE_BYTES - self._left

    @property
    def parents(self) -> int:
        """Pages that are in the parent images."""
        return self._parents

    @property
    def images(self) -> int:
        """Images begun so far."""
        return len(self._seen)

    @property
    def complete(self) -> bool:
        """The END of the stream has come."""
        return self._ended

    def writable(self) -> bool:
        return True

    def write(self, data: Buffer, /) -> int:
        """Take the next piece of the stream, all of it. Raises TransferFailed; nothing can be written after that."""
        if self._failure:
            raise TransferFailed(self._failure)
        if self._dir < 0:
            raise TransferFailed("the writer of the memory images is closed")
        view = memoryview(data).cast("B")
        size, at = len(view), 0
        try:
            while at < size:
                if self._left:
                    part = view[at : at + self._left]
                    if self._sink is not None:
                        self._sink.write(part)
                        count = len(part)
                    else:
                        count = os.write(self._pages_fd, part)
                    self._left -= count
                    at += count
                elif self._have or size - at < HEADER.size:
                    count = min(HEADER.size - self._have, size - at)
                    self._head[self._have : self._have + count] = view[at : at + count]
                    self._have += count
                    at += count
                    if self._have == HEADER.size:
                        self._have = 0
                        self._take(*HEADER.unpack(self._head))
                else:
                    self._take(*HEADER.unpack_from(view, at))
                    at += HEADER.size
        except TransferFailed as error:
            self._failure = error.message
            raise
        except OSError as error:
            self._failure = f"the memory images could not be written: {error.strerror}"
            raise
        return size

    def flush(self) -> None:
        """Nothing: what is held back belongs to the image that is open. `finish` says whether the stream was whole."""

    def finish(self) -> None:
        """Close the files, which are whole. Raises TransferFailed when the stream has not come to its END; then they are removed."""
        ended, failure = self._ended, self._failure
        self.close()
        if failure or not ended:
            raise TransferFailed(failure or "the memory pages broke off before their end")

    def close(self) -> None:
        """Close everything; when the stream was not whole, what was made of it is removed."""
        for fd in (self._pagemap_fd, self._pages_fd, self._parent):
            if fd >= 0:
                os.close(fd)
        self._pagemap_fd = self._pages_fd = self._parent = -1
        if self._dir < 0:
            return
        try:
            if not self._ended or self._failure:
                for name in self._made:
                    os.unlink(name, dir_fd=self._dir)
        except FileNotFoundError:
            pass  # somebody removes the directory already
        finally:
            os.close(self._dir)
            self._dir = -1

    def __enter__(self) -> PageWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # ---------------------------------------------------------------- records

    def _take(self, kind: int, flags: int, image_id: int, vaddr: int, nr_pages: int) -> None:
        if self._ended:
            raise _bad("something after their end")
        if kind in (Kind.PAGES, Kind.PARENT):
            self._add(kind, flags, image_id, vaddr, nr_pages)
            return
        if flags or vaddr or nr_pages:
            raise _bad(f"a malformed record of kind {kind}")
        if kind == Kind.OPEN:
            self._open(image_id)
        elif kind == Kind.CLOSE:
            if not self._image or image_id != self._image:
                raise _bad(f"the end of image {image_id:#x}, which is not open")
            self._close_image()
        elif kind == Kind.END:
            if self._image or image_id:
                raise _bad("their end within an image")
            self._ended = True
        else:
            raise _bad(f"a record of unknown kind {kind}")

    def _open(self, image_id: int) -> None:
        if self._image:
            raise _bad(f"image {image_id:#x} within image {self._image:#x}")
        name = pagemap_name(image_id)
        if name is None:
            raise _bad(f"an image with the unknown id {image_id:#x}")
        if image_id in self._seen:
            raise _bad(f"{name} twice")
        if len(self._seen) >= IMAGES_CAP:
            raise _bad(f"more than {IMAGES_CAP} images")
        pages_id = FIRST_PAGES_ID + len(self._seen)
        self._seen.add(image_id)
        self._pagemap_fd = self._create(name)
        if self._sink_for is None:
            self._pages_fd = self._create(f"pages-{pages_id}.img")
        else:
            self._sink = self._sink_for(f"pages-{pages_id}.img")
        self._entries += self._magic + _framed(self._pb.pagemap_head(pages_id=pages_id))
        self._image = image_id
        self._image_in_parent = self._parent >= 0 and _is_file(name, self._parent)
        self._next_vaddr = 0
        self._run = (0, 0, 0)

    def _create(self, name: str) -> int:
        try:
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._dir)
        except FileExistsError as error:
            raise TransferFailed(f"cannot write the memory images: {name} exists already") from error
        self._made.append(name)
        return fd

    def _add(self, kind: int, flags: int, image_id: int, vaddr: int, nr_pages: int) -> None:
        end = vaddr + nr_pages * PAGE_BYTES
        if not self._image or image_id != self._image:
            raise _bad(f"pages of image {image_id:#x}, which is not open")
        if vaddr % PAGE_BYTES or not nr_pages or end > _ADDRESS_CAP:
            raise _bad(f"{nr_pages} pages at the impossible address {vaddr:#x}")
        if vaddr < self._next_vaddr:
            raise _bad(f"pages at {vaddr:#x} out of order")
        self._next_vaddr = end
        if kind == Kind.PAGES:
            if flags & ~(PE_PRESENT | PE_LAZY):
                raise _bad(f"pages with the unknown flags {flags:#x}")
            self._spend(end - vaddr)
            flags |= PE_PRESENT
            self._pages += nr_pages
            self._left = end - vaddr
        else:
            if flags & ~PE_PARENT:
                raise _bad(f"pages with the unknown flags {flags:#x}")
            if not self._image_in_parent:
                raise _bad(f"a reference to parent images that are not there ({pagemap_name(image_id)})")
            flags = PE_PARENT
            self._parents += nr_pages
        start, count, run_flags = self._run
        if count and run_flags == flags and start + count * PAGE_BYTES == vaddr and count + nr_pages <= ENTRY_PAGES:
            self._run = (start, count + nr_pages, flags)
        else:
            self._end_run()
            self._run = (vaddr, nr_pages, flags)

    def _end_run(self) -> None:
        vaddr, count, flags = self._run
        if not count:
            return
        if self._wide:
            # Both counts: whichever CRIU reads this finds the one it knows.
            entry = self._pb.pagemap_entry(vaddr=vaddr, compat_nr_pages=count if count < 1 << 32 else 0, nr_pages=count, flags=flags)
        elif count < 1 << 32:
            entry = self._pb.pagemap_entry(vaddr=vaddr, nr_pages=count, flags=flags)
        else:
            raise TransferFailed(f"CRIU on this host cannot restore {count} pages in a row (4.2 can)")
        self._entries += _framed(entry)
        if len(self._entries) >= _ENTRIES_BUFFER_BYTES:
            self._write_entries()

    def _write_entries(self) -> None:
        self._spend(len(self._entries))
        rest = memoryview(bytes(self._entries))
        self._entries.clear()
        while rest:
            rest = rest[os.write(self._pagemap_fd, rest) :]

    def _close_image(self) -> None:
        self._end_run()
        self._write_entries()
        pagemap, pages = self._pagemap_fd, self._pages_fd
        self._pagemap_fd = self._pages_fd = -1
        self._image = 0
        os.close(pagemap)
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.close()
        else:
            os.close(pages)

    def _spend(self, count: int) -> None:
        self._used_bytes += count
        if self._max_bytes is not None and self._used_bytes > self._max_bytes:
            raise TransferFailed(f"the memory pages are larger than the {self._max_bytes} bytes allowed")


def _bad(what: str) -> TransferFailed:
    return TransferFailed(f"the memory pages arrived damaged: the other side sent {what}")


def _framed(entry: Any) -> bytes:
    body: bytes = entry.SerializeToString()
    return struct.pack("<I", len(body)) + body


def _is_file(name: str, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
