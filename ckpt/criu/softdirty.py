"""Which pages were written since the last look, as the kernel's soft-dirty tracking tells it: what was not written need not be read again.

Writing 4 to /proc/PID/clear_refs takes the soft-dirty mark from every page; a write to a page sets it again, and bit 55 of the page's word in
/proc/PID/pagemap shows it (Documentation/admin-guide/mm/soft-dirty.rst). Between reading the marks and taking them the processes must not run,
or a write in between is lost: they are stopped by the freezer of their cgroup, for milliseconds, or this tracker is not used. PAGEMAP_SCAN
(Linux 6.7) lists the marked pages faster than their words can be read.

What a page's word proves. A page is *settled* when its word is, bit for bit, what it was at the last look with the mark taken off: present,
not written since, **and in the same page frame**. The mark alone would not do: mremap(2) moves whole page tables without marking what is in
them (move_normal_pmd in mm/mremap.c), so another clean page may lie at the address now; it lies in another frame. A frame that was freed and
came back for this very address was filled since, and that marks it. Hence also:

- new mappings, the memory after exec, and what a fork copies are marked or in other frames, or of a process that was never looked at;
- swapped pages have no frame: they are read, always; so is a page whose frame changed by compaction (it costs a read, no more);
- pages that the kernel holds for input (pinned) keep their marks;
- two processes of one memory (vfork): the words of all are read before any mark is taken.

A process that uses these marks itself (the Boehm collector keeps /proc/self/clear_refs open) would be broken by our taking them, and we
misled by its: it is read in full. So is all, always, where the kernel has no marks. arm64 and many x86 kernels have none; some accept the 4
and do nothing. So the marks are believed after a try on a page of our own (`works`), never because of a version or a configuration.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import operator
import os
import struct
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Final, Protocol

from ckpt.criu import tree
from ckpt.errors import PermissionDenied
from ckpt.host.cgroup import Freezer, Knob, NotOwn
from ckpt.host.procmem import PAGE, PM_PFN, PM_PRESENT, PM_SOFT_DIRTY, SCANNED_END, PageMap, Span, private_regions, soft_dirty

WINDOW_PAGES: Final = 512
"""Pages whose words are kept in one piece: what one page of the page table maps."""
_WINDOW_BYTES: Final = WINDOW_PAGES * PAGE
_WORD: Final = 8
_READ_WINDOWS: Final = 128
_LANES: Final = int.from_bytes((1).to_bytes(_WORD, "little") * WINDOW_PAGES, "little")  # a 1 in each word
_NEVER: Final = (1 << 64) - 1  # no page has this word
_each = struct.Struct(f"{_WORD}s").iter_unpack


class Kernel(Protocol):
    """What the tracker asks of the system."""

    def words(self, pid: int, windows: Collection[int]) -> dict[int, bytes]:
        """The pagemap words of whole windows (numbered from address 0 on); those of a window that is cut short are left out.

        Raises:
            OSError: the process ended.
            PermissionDenied: it may not be looked into.
        """

    def marked(self, pid: int) -> list[memoryview] | None:
        """Its pages with a mark, as ckpt.host.procmem.soft_dirty has them; None: they can be had from the words only.

        Raises:
            OSError: the process ended.
        """

    def clear(self, pid: int) -> None:
        """Take the marks from all its pages. Raises OSError when the process ended."""

    def stopped(self, pids: Collection[int]) -> contextlib.AbstractContextManager[None]:
        """None of them runs in the block. Raises NotOwn on entry."""

    def held(self, pids: Collection[int]) -> bool:
        """Whether somebody else keeps all of them from running (CRIU, while it dumps): nothing need be stopped then, nor marks be taken."""


class Linux:
    """The system we run on.

    Args:
        before_stop: called before the processes are stopped, with what sets them free again.
        ioctl: False keeps it from using PAGEMAP_SCAN.
    """

    def __init__(self, before_stop: Callable[[Knob], None] | None = None, *, ioctl: bool = True) -> None:
        self._before_stop = before_stop
        self._scans = ioctl and scan_works()

    def marked(self, pid: int) -> list[memoryview] | None:
        return soft_dirty(pid) if self._scans else None

    def words(self, pid: int, windows: Collection[int]) -> dict[int, bytes]:
        found: dict[int, bytes] = {}
        with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
            for first, count in _runs(sorted(windows)):
                data = os.pread(pagemap.fileno(), count * WINDOW_PAGES * _WORD, first * WINDOW_PAGES * _WORD)
                for number in range(len(data) // (WINDOW_PAGES * _WORD)):
                    found[first + number] = data[number * WINDOW_PAGES * _WORD : (number + 1) * WINDOW_PAGES * _WORD]
        return found

    def clear(self, pid: int) -> None:
        Path(f"/proc/{pid}/clear_refs").write_bytes(b"4")

    def stopped(self, pids: Collection[int]) -> contextlib.AbstractContextManager[None]:
        freezer = Freezer.of(pids)
        if self._before_stop is not None:
            self._before_stop(freezer.knob)
        return freezer.frozen()

    def held(self, pids: Collection[int]) -> bool:
        return all(_traced(pid) for pid in pids)


class Memory:
    """What is known of one process's pages. `start_ticks` tells it from a later one with its pid."""

    def __init__(self, start_ticks: int) -> None:
        self.start_ticks = start_ticks
        self._settled: dict[int, bytes] = {}
        self._now: dict[int, bytes] = {}
        self._taken = False  # the marks behind `_now` are gone: what is not read in this look cannot be known in the next

    @property
    def windows(self) -> Collection[int]:
        """Those in which a page may be settled."""
        return self._settled.keys()

    def look(self, now: dict[int, bytes], *, taken: bool) -> None:
        """A look begins, at these words; `taken`: their marks were taken off."""
        if self._taken:
            self._settled = {}
        self._now, self._taken = now, taken

    def end(self) -> None:
        """The look is over: every page that was not settled has been read."""
        if self._taken:
            self._settled = {number: words if words == self._settled.get(number) else _unmarked(words) for number, words in self._now.items()}
        self._now, self._taken = {}, False

    def settled(self, span: Span) -> list[bool] | bool:
        """For each page of the span whether it is settled; one bool when all or none are."""
        first = span.vaddr // PAGE
        end = first + span.page_count
        flags = bytearray()
        for number in range(first // WINDOW_PAGES, -(-end // WINDOW_PAGES)):
            low, high = max(first - number * WINDOW_PAGES, 0) * _WORD, min(end - number * WINDOW_PAGES, WINDOW_PAGES) * _WORD
            now, was = self._now.get(number, b"")[low:high], self._settled.get(number, b"")[low:high]
            if not now or not was:
                flags += bytes((high - low) // _WORD)
            elif now == was:
                flags += b"\1" * ((high - low) // _WORD)
            else:
                flags += bytes(map(operator.eq, _each(now), _each(was)))
        whole = len(flags)
        count = flags.count(1)
        return bool(count) if count in (0, whole) else [bool(flag) for flag in flags]


class SoftDirty:
    """The tracker of one tree, over the scans of one table (ckpt.criu.livemem)."""

    def __init__(self, kernel: Kernel | None = None, *, ioctl: bool = True) -> None:
        self._kernel = kernel or Linux()
        self._ioctl = ioctl
        self._memories: dict[int, Memory] = {}
        self.stopped_s = 0.0
        """How long the processes were stopped by the last look."""
        self.reason = ""
        """Why the last look could not be taken; "" when it was."""

    def begin(self, pids: Collection[int]) -> None:
        """Look at the processes. Where that fails nothing is settled that was not before, and everything is read.

        Raises:
            PermissionDenied: a process may not be looked into.
        """
        before, self._memories = self._memories, {}  # should this be interrupted, nothing is known any more
        self.reason, self.stopped_s = "", 0.0
        memories: dict[int, Memory] = {}
        alive = []
        for pid in pids:
            found = tree.stat(pid)
            if found is None or not found.alive:
                continue
            alive.append(pid)
            if _takes_marks(pid):
                continue
            known = before.get(pid)
            memories[pid] = known if known is not None and known.start_ticks == found.start_ticks else Memory(found.start_ticks)
        if self._kernel.held(alive):
            words = self._words(memories, {pid: memory.windows for pid, memory in memories.items()})
            taken: set[int] = set()
        else:
            words, taken = self._stop_and_look(alive, memories)
        for pid, memory in memories.items():
            memory.look(words.get(pid, {}), taken=pid in taken)
        self._memories = memories

    def _stop_and_look(self, pids: Collection[int], memories: dict[int, Memory]) -> tuple[dict[int, dict[int, bytes]], set[int]]:
        """Only the marks must be read while they stand still; the frames behind them can be looked up later (a page that got another one
        meanwhile is read, as one that got it before)."""
        wanted: dict[int, Collection[int]] = {pid: self._present(pid) for pid in memories}
        words: dict[int, dict[int, bytes]] = {}
        marked: dict[int, list[memoryview]] = {}
        taken: set[int] = set()
        try:
            with self._kernel.stopped(pids):
                began = time.perf_counter()
                for pid, memory in memories.items():
                    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                        found = self._kernel.marked(pid)
                        if found is None:
                            words |= self._words({pid: memory}, wanted)
                        elif tree.same(pid, memory.start_ticks):
                            marked[pid] = found
                for pid in (*words, *marked):
                    with contextlib.suppress(OSError):
                        taken.add(pid)
                        self._kernel.clear(pid)
            self.stopped_s = time.perf_counter() - began
        except NotOwn as error:
            self.reason = str(error)
            return {}, taken
        words |= self._words({pid: memories[pid] for pid in marked}, wanted)
        for pid, ranges in marked.items():
            if pid in words:
                _mark(words[pid], memories[pid].windows, ranges)
        return words, taken

    def _words(self, memories: dict[int, Memory], windows: dict[int, Collection[int]]) -> dict[int, dict[int, bytes]]:
        """The words of every process that is still the one that we knew."""
        found: dict[int, dict[int, bytes]] = {}
        for pid, memory in memories.items():
            try:
                words = self._kernel.words(pid, windows[pid])
            except PermissionError as error:
                raise PermissionDenied(f"the memory of process {pid} cannot be read: {error.strerror}", hint="run as root") from error
            except OSError:
                continue
            if tree.same(pid, memory.start_ticks):
                found[pid] = words
        return found

    def _present(self, pid: int) -> set[int]:
        """The windows with pages of the process. It runs: what comes later is read in this look, and known in the next."""
        found: set[int] = set()
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            pagemap = PageMap(pid, ioctl=self._ioctl)
            try:
                for region in private_regions(pid):
                    at = region.start
                    while at < region.end:
                        spans, at = pagemap.own_pages(at, region.end, 1 << 16)
                        for vaddr, count in spans:
                            found.update(range(vaddr // _WINDOW_BYTES, -(-(vaddr + count * PAGE) // _WINDOW_BYTES)))
            finally:
                pagemap.close()
        return found

    def of(self, pid: int) -> Memory | None:
        """What is known of a process; None: read all of it."""
        found = self._memories.get(pid)
        return found if found is not None and tree.same(pid, found.start_ticks) else None

    def forget(self) -> None:
        """What was read is not known any more."""
        self._memories = {}


def choose(before_stop: Callable[[Knob], None] | None = None) -> SoftDirty | None:
    """The tracker for this system; None: there is none, pages are told by their content alone.

    Args:
        before_stop: as `Linux` has it.
    """
    return SoftDirty(Linux(before_stop)) if works() else None


@functools.cache
def works() -> bool:
    """Whether this kernel has the marks and shows page frames to us: tried on two pages of our own."""
    with mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        with contextlib.suppress(AttributeError, OSError):
            area.madvise(mmap.MADV_NOHUGEPAGE)
        inside = ctypes.c_char.from_buffer(area)
        address = ctypes.addressof(inside)
        del inside

        def look() -> tuple[int, int]:
            with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
                first, second = struct.unpack("=2Q", os.pread(pagemap.fileno(), 2 * _WORD, address // PAGE * _WORD))
            return first, second

        try:
            area[0] = area[PAGE] = 1
            written = look()
            Path("/proc/self/clear_refs").write_bytes(b"4")
            cleared = look()
            area[0] = 2
            again = look()
        except (OSError, struct.error):
            return False
    frames = all(word & PM_PRESENT and word & PM_PFN for word in (*written, *cleared, *again))
    marks = [bool(word & PM_SOFT_DIRTY) for word in (*written, *cleared, *again)]
    return frames and marks == [True, True, False, False, True, False]


@functools.cache
def scan_works() -> bool:
    """Whether PAGEMAP_SCAN tells the marks (Linux 6.7): tried on a page of our own; only on x86-64, whose addresses and words it is written for."""
    if os.uname().machine != "x86_64":
        return False
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as area:
        area[0] = 1
        inside = ctypes.c_char.from_buffer(area)
        address = ctypes.addressof(inside)
        del inside
        try:
            found = soft_dirty("self")
        except OSError:
            return False
        return any(start <= address < end for answer in found for start, end in zip(answer[0::3], answer[1::3], strict=True))


def _unmarked(words: bytes) -> bytes:
    """The words without their marks; that of a page that is not in memory is replaced by one that no page ever has."""
    value = int.from_bytes(words, sys.byteorder)
    absent = (value >> 63 & _LANES) ^ _LANES
    return (value & ~(_LANES * PM_SOFT_DIRTY) | absent * _NEVER).to_bytes(len(words), sys.byteorder)


def _mark(words: dict[int, bytes], windows: Collection[int], marked: list[memoryview]) -> None:
    """Put marks that were taken back into the words of these windows; what is beyond the marks' reach counts as marked."""
    lanes: dict[int, int] = {number: _LANES for number in windows if (number + 1) * _WINDOW_BYTES > SCANNED_END}
    for answer in marked:
        for start, end in zip(answer[0::3], answer[1::3], strict=True):
            first, last = start // PAGE, end // PAGE
            for number in range(first // WINDOW_PAGES, -(-last // WINDOW_PAGES)):
                if number in windows:
                    low, high = max(first - number * WINDOW_PAGES, 0), min(last - number * WINDOW_PAGES, WINDOW_PAGES)
                    lanes[number] = lanes.get(number, 0) | (_LANES >> 64 * (WINDOW_PAGES - high + low)) << 64 * low
    for number, some in lanes.items():
        if number in words:
            value = int.from_bytes(words[number], "little") | some * PM_SOFT_DIRTY
            words[number] = value.to_bytes(len(words[number]), "little")


def _runs(windows: list[int]) -> Iterator[tuple[int, int]]:
    """Neighbours, at most _READ_WINDOWS together: (first, count)."""
    at = 0
    while at < len(windows):
        count = 1
        while count < _READ_WINDOWS and at + count < len(windows) and windows[at + count] == windows[at] + count:
            count += 1
        yield windows[at], count
        at += count


def _takes_marks(pid: int) -> bool:
    """Whether the process itself takes marks off: it has its clear_refs open."""
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    if os.readlink(entry.path).endswith("/clear_refs"):
                        return True
    except OSError:
        pass
    return False


def _traced(pid: int) -> bool:
    """Whether a tracer holds all threads of the process (or it has ended)."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")
        states = [Path(f"/proc/{pid}/task/{tid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] for tid in threads]
    except OSError:
        return not os.path.exists(f"/proc/{pid}")
    return all(state in ("t", "Z", "X") for state in states)
