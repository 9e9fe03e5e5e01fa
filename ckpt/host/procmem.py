"""The memory of a running process from outside: which pages are its own, and what is in them, without stopping or tracing it.

Own ("private") pages are those that CRIU writes to a process's pagemap image: pages of private mappings that are in memory or in swap,
but not the kernel's zero page, not pages that a private file mapping still shares with its file, no guard regions. Left out whole:
shared mappings (CRIU dumps those once, as shmem images), the kernel's own ([vdso], [vvar], [vsyscall], [uprobes]), devices (VmFlags io, pf),
hugetlb (ht) and droppable (dp) memory, AIO rings.

Sources: proc_pid_smaps(5), proc_pid_pagemap(5), process_vm_readv(2), Documentation/admin-guide/mm/pagemap.rst (PAGEMAP_SCAN, Linux 6.7;
its guard category, 6.15); what CRIU takes: should_dump_page and vma_entry_is_private in its sources.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from ckpt.errors import PermissionDenied

PAGE: Final = mmap.PAGESIZE
"""Bytes a page."""

_IOV_MAX: Final = 1024
_KERNEL_NAMES: Final = frozenset({b"[vsyscall]", b"[vectors]", b"[sigpage]", b"[vdso]", b"[vvar]", b"[vvar_vclock]", b"[uprobes]"})
_SKIPPED_FLAGS: Final = frozenset({b"io", b"pf", b"ht", b"dp"})
_GONE: Final = (errno.ESRCH, errno.ENOENT)

# include/uapi/linux/fs.h: struct pm_scan_arg is 12 words, struct page_region is start, end, categories.
_PAGEMAP_SCAN: Final = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_SCAN_ARG: Final = struct.Struct("=12Q")
_WALK_END: Final = 4
_IS_FILE, _IS_PRESENT, _IS_SWAPPED, _IS_PFNZERO, _IS_SOFT_DIRTY, _IS_GUARD = 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 7, 1 << 8
SCANNED_END: Final = (1 << 47) - PAGE
"""Where `soft_dirty` stops looking: the end of what a process gets on x86-64 unless it asks for more."""
_SCANNED_RANGES: Final = 1 << 14

# A word of /proc/PID/pagemap.
PM_PFN: Final = (1 << 55) - 1
PM_SOFT_DIRTY, _PM_GUARD, _PM_FILE, _PM_SWAP, PM_PRESENT = 1 << 55, 1 << 58, 1 << 61, 1 << 62, 1 << 63
_WINDOW_PAGES: Final = 4096


class Region(NamedTuple):
    """Neighbouring private mappings, [start, end) in bytes. `readable`: the process may read them itself (PROT_READ)."""

    start: int
    end: int
    readable: bool


class Span(NamedTuple):
    """`page_count` pages from `vaddr` on."""

    vaddr: int
    page_count: int


def private_regions(pid: int) -> list[Region]:
    """The private mappings, ascending, neighbours of one kind joined; empty for a kernel thread or when it ended.

    Raises:
        PermissionDenied: the process may not be looked into.
    """
    found: list[Region] = []
    try:
        with _looking_into(pid), open(f"/proc/{pid}/smaps", "rb") as lines:
            header = b""
            for line in lines:
                if line[0] in b"0123456789abcdef":
                    header = line
                elif line.startswith(b"VmFlags:"):
                    _add(found, header, line)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return []
    return found


def _add(found: list[Region], header: bytes, flags: bytes) -> None:
    """Take in a mapping by its smaps lines `START-END rwxp OFFSET DEV INODE PATH` and `VmFlags: rd wr ...`."""
    words = header.split(None, 5)
    name = words[5].strip() if len(words) > 5 else b""
    if words[1][3:4] != b"p" or name in _KERNEL_NAMES or name.startswith(b"/[aio]") or not _SKIPPED_FLAGS.isdisjoint(flags.split()[1:]):
        return
    low, _, high = words[0].partition(b"-")
    start, end, readable = int(low, 16), int(high, 16), words[1][:1] == b"r"
    if found and found[-1].end == start and found[-1].readable == readable:
        start = found.pop().start
    found.append(Region(start, end, readable))


class PageMap:
    """Finds the own pages of one process, by PAGEMAP_SCAN where the kernel has it, else by reading /proc/PID/pagemap.

    Args:
        ioctl: False keeps it from using PAGEMAP_SCAN.

    Raises:
        ProcessLookupError, FileNotFoundError: the process ended.
        PermissionDenied: the process may not be looked into.
    """

    def __init__(self, pid: int, *, ioctl: bool = True) -> None:
        with _looking_into(pid):
            self._fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._excluded = scan_excludes() if ioctl else 0
        self._out = (ctypes.c_uint64 * (3 * _IOV_MAX))() if self._excluded else None

    def close(self) -> None:
        os.close(self._fd)

    def own_pages(self, start: int, end: int, limit: int) -> tuple[list[Span], int]:
        """At most `limit` own pages of [start, end), ascending, and the address at which to look further.

        They may be gone, or others there, by the time they are read.
        """
        if self._out is None:
            return self._read(start, end, limit)
        argument = bytearray(_scan_argument(start, end, ctypes.addressof(self._out), limit, self._excluded))
        count = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, argument)
        spans = [Span(low, (high - low) // PAGE) for low, high in zip(self._out[0 : 3 * count : 3], self._out[1 : 3 * count : 3], strict=True)]
        walked: int = _SCAN_ARG.unpack(argument)[_WALK_END]
        return spans, walked if walked > start else end

    def _read(self, start: int, end: int, limit: int) -> tuple[list[Span], int]:
        zero = zero_page_frame()
        while start < end:
            pages = min((end - start) // PAGE, _WINDOW_PAGES)
            data = os.pread(self._fd, pages * 8, start // PAGE * 8)
            if not data:
                return [], end  # the process has no memory any more
            pages = len(data) // 8
            if data.count(0) != len(data):
                spans, taken = _own(memoryview(data).cast("Q"), start, limit, zero)
                if spans:
                    return spans, start + taken * PAGE
            start += pages * PAGE
        return [], end


def _own(words: memoryview, start: int, limit: int, zero: int) -> tuple[list[Span], int]:
    """The own pages among pagemap words (that of `start` first), and how many words were looked at until the limit was met."""
    spans: list[Span] = []
    first, total = -1, 0
    for at, word in enumerate(words):
        own = word & (PM_PRESENT | _PM_SWAP) and not word & (_PM_FILE | _PM_GUARD) and not (word & PM_PRESENT and word & PM_PFN == zero)
        if own and total < limit:
            total += 1
            first = at if first < 0 else first
        else:
            if first >= 0:
                spans.append(Span(start + first * PAGE, at - first))
                first = -1
            if total >= limit:
                return spans, at
    if first >= 0:
        spans.append(Span(start + first * PAGE, len(words) - first))
    return spans, len(words)


def _scan_argument(start: int, end: int, out: int, limit: int, excluded: int) -> bytes:
    """`excluded`: categories that a page must not be in. Asking for no categories back lets the kernel join neighbours."""
    return _SCAN_ARG.pack(_SCAN_ARG.size, 0, start, end, 0, out, _IOV_MAX, limit, excluded, excluded, _IS_PRESENT | _IS_SWAPPED, 0)


def soft_dirty(pid: int | str) -> list[memoryview]:
    """The pages with a soft-dirty mark below SCANNED_END, as PAGEMAP_SCAN answers: pieces of 64-bit words start, end, 0, ascending.

    Nothing is made of the answer here: the processes may be standing still.

    Raises:
        OSError: the kernel has no PAGEMAP_SCAN or none for these marks; the process ended, or may not be looked into.
    """
    answers: list[memoryview] = []
    fd = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        at = 0
        while at < SCANNED_END:
            out = (ctypes.c_uint64 * (3 * _SCANNED_RANGES))()
            argument = bytearray(
                _SCAN_ARG.pack(
                    *(_SCAN_ARG.size, 0, at, SCANNED_END, 0, ctypes.addressof(out), _SCANNED_RANGES, 0),
                    *(0, _IS_SOFT_DIRTY, _IS_PRESENT | _IS_SWAPPED, 0),
                )
            )
            count = fcntl.ioctl(fd, _PAGEMAP_SCAN, argument)
            answers.append(memoryview(out).cast("B").cast("Q")[: 3 * count])
            walked: int = _SCAN_ARG.unpack(argument)[_WALK_END]
            at = walked if walked > at else SCANNED_END
    finally:
        os.close(fd)
    return answers


@functools.cache
def scan_excludes() -> int:
    """The categories that PAGEMAP_SCAN can be told to leave out on this kernel; 0 when it has no PAGEMAP_SCAN."""
    out = (ctypes.c_uint64 * (3 * _IOV_MAX))()
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for excluded in (_IS_FILE | _IS_PFNZERO | _IS_GUARD, _IS_FILE | _IS_PFNZERO):
            try:
                fcntl.ioctl(fd, _PAGEMAP_SCAN, bytearray(_scan_argument(PAGE, 2 * PAGE, ctypes.addressof(out), 1, excluded)))
                return excluded
            except OSError:
                continue
        return 0
    finally:
        os.close(fd)


@functools.cache
def zero_page_frame() -> int:
    """The frame number of the kernel's zero page, -1 when it cannot be learnt (frame numbers need CAP_SYS_ADMIN)."""
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area[0]  # noqa: B018  (a read of memory never written gets the zero page)
        inside = ctypes.c_char.from_buffer(area)
        address = ctypes.addressof(inside)
        del inside
        word = struct.unpack("=Q", _slurp("/proc/self/pagemap", 8, address // PAGE * 8))[0]
    return (word & PM_PFN) or -1


def _slurp(path: str, size: int, offset: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(fd, size, offset)
    finally:
        os.close(fd)


class Buffer:
    """Memory for `pages` pages that is filled again and again from other processes."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._area = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._area)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._area))
        self._local = (ctypes.c_size_t * 2)()
        self._remote = (ctypes.c_size_t * (2 * _IOV_MAX))()

    def fill(self, pid: int, spans: Iterable[Span], *, forced: int = -1) -> list[Span]:
        """Read the spans (together no more than fit), one behind the other; what is returned lies in `view` in that order without gaps.

        Pages that are not there (any more) are left out.

        Args:
            forced: what `open_memory` gave, through which mappings without PROT_READ are read; process_vm_readv(2) refuses them.

        Raises:
            ProcessLookupError: the process ended.
            PermissionDenied: its memory may not be read.
        """
        todo = [span for span in reversed(list(spans)) if span.page_count]  # its last is the next
        filled: list[Span] = []
        at = 0
        while todo:
            asked = todo[: -2 if forced >= 0 else -_IOV_MAX - 1 : -1]
            got = self._pull(pid, asked, at) if forced < 0 else self._pull_forced(forced, asked[0], at)
            at += got * PAGE
            del todo[-len(asked) :]
            for number, span in enumerate(asked):
                taken = min(got, span.page_count)
                got -= taken
                if taken:
                    filled.append(Span(span.vaddr, taken))
                if taken < span.page_count:  # the page at which it stopped cannot be read
                    todo += reversed(asked[number + 1 :])
                    if taken + 1 < span.page_count:
                        todo.append(Span(span.vaddr + (taken + 1) * PAGE, span.page_count - taken - 1))
                    break
        return filled

    def _pull(self, pid: int, asked: list[Span], at: int) -> int:
        """One process_vm_readv to `at` in the buffer: how many pages came before one that could not be read, all spans counted together."""
        flat: list[ctypes.c_size_t | int] = []
        for vaddr, count in asked:
            flat += (vaddr, count * PAGE)
        self._remote[: len(flat)] = flat
        self._local[:] = [self._address + at, len(self.view) - at]
        got: int = _readv()(pid, self._local, 1, self._remote, len(asked), 0)
        if got >= 0:
            return got // PAGE
        with _looking_into(pid):
            return _refused(ctypes.get_errno())

    def _pull_forced(self, fd: int, span: Span, at: int) -> int:
        try:
            return os.preadv(fd, [self.view[at : at + span.page_count * PAGE]], span.vaddr) // PAGE
        except OSError as error:
            return _refused(error.errno or 0)


def _refused(number: int) -> int:
    """Zero pages were read, or it is an error."""
    if number in (errno.EFAULT, errno.EIO):
        return 0
    raise OSError(number, os.strerror(number))


def open_memory(pid: int) -> int:
    """A descriptor of /proc/PID/mem.

    Raises:
        ProcessLookupError, FileNotFoundError: the process ended.
        PermissionDenied: its memory may not be read.
    """
    with _looking_into(pid):
        return os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)


@contextlib.contextmanager
def _looking_into(pid: int) -> Iterator[None]:
    try:
        yield
    except PermissionError as error:
        message = f"the memory of process {pid} cannot be read: {error.strerror}"
        raise PermissionDenied(message, hint="run as root (it takes CAP_SYS_PTRACE)") from error


@functools.cache
def _readv() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(None, use_errno=True).process_vm_readv
    words = ctypes.POINTER(ctypes.c_size_t)  # struct iovec: an address and a length
    function.argtypes = [ctypes.c_int, words, ctypes.c_ulong, words, ctypes.c_ulong, ctypes.c_ulong]
    function.restype = ctypes.c_ssize_t
    return function


def resident_bytes(pids: Iterable[int]) -> int:
    """Private memory of the processes that is in RAM, roughly (proc_pid_statm(5): resident less shared)."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            words = Path(f"/proc/{pid}/statm").read_bytes().split()
            total += max(0, int(words[1]) - int(words[2])) * PAGE
    return total


def innermost_pid(pid: int) -> int:
    """The pid in the process's own pid namespace, by which CRIU names its images; `pid` itself when the process is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_bytes().splitlines():
            if line.startswith(b"NSpid:"):
                return int(line.split()[-1])
    except OSError:
        pass
    return pid
