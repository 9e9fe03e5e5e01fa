"""Soft-dirty tracking: which pages are not read again, and that none of them has changed.

Where the kernel has the marks the real ones are used too (the virtual machine runs this file: tests/vm); elsewhere a kernel is simulated over
real processes with their real page frames, its marks set where the content differs from that at the last clearing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import struct
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from ckpt.criu import softdirty
from ckpt.criu.digests import DigestTable, image_of_pid
from ckpt.criu.livemem import LiveMemory, Run
from ckpt.criu.softdirty import WINDOW_PAGES, Linux, Memory, SoftDirty
from ckpt.host.cgroup import Freezer, NotOwn
from ckpt.host.procmem import PAGE, PM_PRESENT, PM_SOFT_DIRTY, Span, scan_excludes
from tests.unit.test_criu_livemem import Child, pages_in

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="page frames are shown to root only")
SWAPPED = 1 << 62


class Stopping(Linux):
    """The real system; the processes are stopped by a signal, which a test may do."""

    def __init__(self, *, ioctl: bool = True) -> None:
        super().__init__(ioctl=ioctl)
        self.looks = 0
        self.refuse = self.holds = False

    def held(self, pids: Collection[int]) -> bool:
        return self.holds

    @contextlib.contextmanager
    def stopped(self, pids: Collection[int]) -> Iterator[None]:
        if self.refuse:
            raise NotOwn("not today")
        self.looks += 1
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        for pid in pids:
            while not softdirty_stopped(pid):
                time.sleep(0.0005)
        try:
            yield
        finally:
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)


def softdirty_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "TZ"


class Simulated(Stopping):
    """Marks by content: set on every present page that is not as it was when they were last taken."""

    def __init__(self) -> None:
        super().__init__(ioctl=False)
        self._clean: dict[int, dict[int, bytes]] = {}

    def words(self, pid: int, windows: Collection[int]) -> dict[int, bytes]:
        clean = self._clean.get(pid, {})
        found = {}
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for number, words in super().words(pid, windows).items():
                marked = bytearray(words)
                for at, (word,) in enumerate(struct.iter_unpack("=Q", words)):
                    page = number * WINDOW_PAGES + at
                    word &= ~PM_SOFT_DIRTY
                    struct.pack_into("=Q", marked, at * 8, word)
                    if word & PM_PRESENT and clean.get(page) != self._content(memory.fileno(), page):
                        struct.pack_into("=Q", marked, at * 8, word | PM_SOFT_DIRTY)
                found[number] = bytes(marked)
        self._last = (pid, windows)
        return found

    def clear(self, pid: int) -> None:
        pages = {}
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            for number, words in super().words(pid, self._last[1]).items():
                for at, (word,) in enumerate(struct.iter_unpack("=Q", words)):
                    if word & PM_PRESENT:
                        page = number * WINDOW_PAGES + at
                        pages[page] = self._content(memory.fileno(), page)
        self._clean[pid] = pages

    @staticmethod
    def _content(fd: int, page: int) -> bytes:
        try:
            return hashlib.blake2b(os.pread(fd, PAGE, page * PAGE), digest_size=16).digest()
        except (OSError, OverflowError):
            return b""


@pytest.fixture(params=["kernel", "kernel-words", "simulated"])
def kernel(request: pytest.FixtureRequest) -> Stopping:
    if request.param == "simulated":
        return Simulated()
    if not softdirty.works():
        pytest.skip("this kernel has no soft-dirty marks")
    if request.param == "kernel" and not softdirty.scan_works():
        pytest.skip("this kernel has no PAGEMAP_SCAN for its soft-dirty marks")
    return Stopping(ioctl=request.param == "kernel")


@pytest.fixture(params=[True, False], ids=["PAGEMAP_SCAN", "pagemap"])
def ioctl(request: pytest.FixtureRequest) -> bool:
    if request.param and not scan_excludes():
        pytest.skip("this kernel has no PAGEMAP_SCAN")
    return bool(request.param)


@pytest.fixture
def child() -> Iterator[Child]:
    made = Child()
    try:
        yield made
    finally:
        made.close()


class Reading:
    """Scans a child, and remembers what a destination would hold."""

    def __init__(self, child: Child, kernel: Stopping, ioctl: bool = True) -> None:
        self.kernel = kernel
        self.tracker = SoftDirty(kernel, ioctl=ioctl)
        self.live = LiveMemory(lambda: [child.pid], ioctl=ioctl, tracker=self.tracker)
        self.table = DigestTable()
        self.held: dict[int, bytes] = {}

    def scan(self, at: int, pages: int) -> tuple[set[int], set[int]]:
        """Changed and unchanged pages of a mapping."""
        steps, now = [], {}
        for step in self.live.scan(self.table):
            count = len(step.pages) // PAGE if isinstance(step, Run) else step.page_count
            steps.append((isinstance(step, Run), step.vaddr, count))
            for n in range(count):
                vaddr = step.vaddr + n * PAGE
                now[vaddr] = step.pages[n * PAGE : (n + 1) * PAGE].tobytes() if isinstance(step, Run) else self.held[vaddr]
        assert self.live.statistics.complete
        self.held = now  # an image set that says "in parent" finds the parent's page, or nothing
        return pages_in(steps, at, pages)

    @property
    def read_pages(self) -> int:
        return self.live.statistics.scanned_bytes // PAGE

    def check(self, child: Child) -> None:
        """All that a destination would hold is what the stopped process holds: the comparison that never looks at marks."""
        os.kill(child.pid, signal.SIGSTOP)
        while not softdirty_stopped(child.pid):
            time.sleep(0.0005)
        self.kernel.holds = True
        try:
            self.scan(0, 0)
            with open(f"/proc/{child.pid}/mem", "rb", buffering=0) as memory:
                for vaddr, page in self.held.items():
                    assert os.pread(memory.fileno(), PAGE, vaddr) == page, hex(vaddr)
            full = LiveMemory(lambda: [child.pid])
            pages = sum(len(step.pages) // PAGE for step in full.scan(DigestTable()) if isinstance(step, Run))
            assert pages == len(self.held)
        finally:
            self.kernel.holds = False
            os.kill(child.pid, signal.SIGCONT)


def test_only_what_was_written_is_read(child: Child, kernel: Stopping, ioctl: bool) -> None:
    reading, pages = Reading(child, kernel, ioctl), 3000
    at = child.do(f"at = map({pages})")
    child.do(f"fills(at, {pages})")
    assert reading.scan(at, pages) == (set(range(pages)), set())
    assert reading.read_pages >= pages
    reading.scan(at, pages)
    assert reading.read_pages < 400  # the interpreter's own
    written = {0, 5, 6, 511, 512, 1500, pages - 1}
    for page in written:
        child.do(f"put(at, {page}, 0xFF)")
    assert reading.scan(at, pages) == (written, set(range(pages)) - written)
    assert len(written) <= reading.read_pages < 400
    assert reading.live.statistics.settled_bytes >= (pages - len(written)) * PAGE
    reading.check(child)


def test_a_page_written_with_what_it_held_is_read_but_not_sent(child: Child, ioctl: bool) -> None:
    if not softdirty.works():
        pytest.skip("this kernel has no soft-dirty marks")
    reading = Reading(child, Stopping(), ioctl)
    at = child.do("at = map(100); fills(at, 100)")
    reading.scan(at, 100)
    child.do("fills(at, 100)")
    assert reading.scan(at, 100) == (set(), set(range(100)))
    assert reading.read_pages >= 100


def test_unmapped_mapped_again_and_given_back(child: Child, kernel: Stopping, ioctl: bool) -> None:
    reading = Reading(child, kernel, ioctl)
    at = child.do("at = map(600); fills(at, 600)")
    reading.scan(at, 600)
    reading.scan(at, 600)
    child.do("libc.munmap(at, 100 * P, 0)")
    child.do("map(50, flags=0x32, at=at); fills(at, 50)")  # MAP_FIXED: new frames at old addresses, and what they held before
    child.do("libc.madvise(at + 300 * P, 10 * P, 4); put(at, 305, 9)")  # MADV_DONTNEED
    changed, unchanged = reading.scan(at, 600)
    gone = set(range(50, 100)) | (set(range(300, 310)) - {305})
    assert changed | unchanged == set(range(600)) - gone
    assert 305 in changed and reading.read_pages >= 51
    reading.check(child)


def test_moved_page_tables(child: Child, kernel: Stopping, ioctl: bool) -> None:
    """mremap(2) moves aligned memory without a mark on it, over an address where a scan knows something else."""
    reading, pages = Reading(child, kernel, ioctl), 1024
    child.do("libc.mremap.restype = ctypes.c_void_p")
    child.do("libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]")
    area = child.do("area = map(8 * 512)")
    child.do("first = (area + (1 << 21) - 1) >> 21 << 21")
    child.do("second = first + (1 << 22)")
    child.do("libc.madvise(area, 8 * 512 * P, 15)")
    child.do(f"fills(first, {pages}, 1); fills(second, {pages}, 7)")
    reading.scan(area, 0)
    reading.scan(area, 0)
    child.do(f"libc.mremap(second, {pages} * P, {pages} * P, 3, first)")  # MREMAP_MAYMOVE | MREMAP_FIXED
    at = child.do("first + 0")
    changed, _ = reading.scan(at, pages)
    assert changed == set(range(pages))
    reading.check(child)


def test_exec_and_fork(child: Child, kernel: Stopping) -> None:
    reading = Reading(child, kernel)
    at = child.do("at = map(300); fills(at, 300)")
    reading.scan(at, 300)
    child.do("pid = os.fork() or os._exit(signal.pause() if 0 else __import__('time').sleep(1000) or 0)")
    child.do("put(at, 7, 0x55)")
    changed, unchanged = reading.scan(at, 300)
    assert 7 in changed and changed | unchanged == set(range(300))
    reading.check(child)
    child.do("os.kill(pid, 9); os.waitpid(pid, 0)")
    reading.check(child)


def test_what_a_scan_that_failed_did_not_read_is_read_next(child: Child, kernel: Stopping, ioctl: bool) -> None:
    reading = Reading(child, kernel, ioctl)
    at = child.do("at = map(600); fills(at, 600)")
    reading.scan(at, 600)
    child.do("put(at, 599, 0xFE)")
    for _ in reading.live.scan(reading.table):
        break  # the marks are off, the page is not read
    changed, unchanged = reading.scan(at, 600)
    assert 599 in changed and changed | unchanged == set(range(600))
    reading.check(child)


def test_when_they_cannot_be_stopped_everything_is_read(child: Child, kernel: Stopping) -> None:
    reading = Reading(child, kernel)
    at = child.do("at = map(600); fills(at, 600)")
    reading.scan(at, 600)
    kernel.refuse = True
    child.do("put(at, 3, 0xFE)")
    assert reading.scan(at, 600) == ({3}, set(range(600)) - {3})
    assert reading.read_pages >= 600 and reading.tracker.reason == "not today"
    kernel.refuse = False
    child.do("put(at, 4, 0xFE)")
    changed, _ = reading.scan(at, 600)
    assert changed == {4} and reading.read_pages < 400
    if not isinstance(kernel, Simulated):  # content that changes and changes back between two looks has no simulated mark
        reading.check(child)


def test_another_table_knows_nothing(child: Child, kernel: Stopping) -> None:
    reading = Reading(child, kernel)
    at = child.do("at = map(600); fills(at, 600)")
    reading.scan(at, 600)
    first, reading.table = reading.table, DigestTable()
    child.do("put(at, 3, 0xFE)")
    assert reading.scan(at, 600) == (set(range(600)), set())
    reading.table = first
    assert reading.scan(at, 600) == ({3}, set(range(600)) - {3})


def test_what_the_table_was_told_to_forget_is_read(child: Child, kernel: Stopping) -> None:
    reading = Reading(child, kernel)
    at = child.do("at = map(600); fills(at, 600)")
    reading.scan(at, 600)
    reading.table.forget(image_of_pid(child.pid), at + 10 * PAGE, at + 12 * PAGE)
    assert reading.scan(at, 600) == ({10, 11}, set(range(600)) - {10, 11})
    reading.table.drop(image_of_pid(child.pid))
    assert reading.scan(at, 600)[0] == set(range(600))


def test_a_process_that_takes_the_marks_itself_is_read(child: Child, kernel: Stopping) -> None:
    reading = Reading(child, kernel)
    at = child.do("at = map(600); fills(at, 600)")
    child.do("fd = os.open('/proc/self/clear_refs', os.O_WRONLY)")
    reading.scan(at, 600)
    reading.scan(at, 600)
    assert reading.read_pages >= 600


def test_while_a_tracer_holds_it_nothing_is_stopped_and_no_mark_taken(child: Child, kernel: Stopping, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = Reading(child, kernel)
    at = child.do("at = map(600); fills(at, 600)")
    reading.scan(at, 600)
    child.do("put(at, 3, 0xFE)")
    looks = kernel.looks
    kernel.holds = True
    monkeypatch.setattr(kernel, "clear", lambda pid: pytest.fail("a mark was taken"))
    assert reading.scan(at, 600)[0] == {3}
    assert kernel.looks == looks and reading.read_pages < 400


def words(*some: int) -> bytes:
    return struct.pack(f"={WINDOW_PAGES}Q", *some, *[0] * (WINDOW_PAGES - len(some)))


def test_words() -> None:
    frame = PM_PRESENT | 0x1234
    memory = Memory(1)
    memory.look({3: words(frame | PM_SOFT_DIRTY, frame + 1, 0, SWAPPED | 5, frame + 2, frame + 3)}, taken=True)
    span = Span(3 * WINDOW_PAGES * PAGE, 8)
    assert memory.settled(span) is False
    memory.end()
    memory.look({3: words(frame, (frame + 1) | PM_SOFT_DIRTY, 0, SWAPPED | 5, frame + 9, frame + 3)}, taken=True)
    assert memory.settled(span) == [True, False, False, False, False, True, False, False]
    assert memory.settled(Span(span.vaddr, 1)) is True
    assert memory.settled(Span(span.vaddr - PAGE, 2)) == [False, True]
    assert memory.settled(Span(0, 8)) is False
    # Not ended: the marks of what was not read are gone.
    memory.look({3: words(frame, frame + 1)}, taken=True)
    assert memory.settled(span) is False


def test_marks_are_put_back() -> None:
    frame = PM_PRESENT | 0x1234
    span = Span(3 * WINDOW_PAGES * PAGE, 2 * WINDOW_PAGES)
    full = struct.pack(f"={WINDOW_PAGES}Q", *range(frame, frame + WINDOW_PAGES))
    memory = Memory(1)
    memory.look({3: full, 4: full, 5: full}, taken=True)
    memory.end()
    now = {3: full, 4: full, 5: full}
    low, high = span.vaddr + 510 * PAGE, span.vaddr + 514 * PAGE
    softdirty._mark(now, memory.windows, [memoryview(struct.pack("=6Q", 0, 8 * PAGE, 0, low, high, 0)).cast("Q")])
    memory.look(now, taken=True)
    assert memory.settled(Span(span.vaddr, 510)) is True and memory.settled(Span(low, 4)) is False
    assert memory.settled(Span(low - PAGE, 6)) == [True, False, False, False, False, True]
    assert memory.settled(Span(high, 510)) is True and memory.settled(Span(5 * WINDOW_PAGES * PAGE, 512)) is True
    beyond = softdirty.SCANNED_END // (WINDOW_PAGES * PAGE)
    words = {beyond: full}
    softdirty._mark(words, {beyond}, [])
    assert all(word & PM_SOFT_DIRTY for (word,) in struct.iter_unpack("=Q", words[beyond]))


def test_a_kernel_without_marks_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (softdirty.choose() is None) != softdirty.works()
    if "CONFIG_MEM_SOFT_DIRTY" in os.environ.get("CKPT_TEST_EXPECT", ""):
        assert softdirty.works()


def test_no_cgroup_of_its_own(child: Child) -> None:
    """It shares ours (or that of the session): whoever else is in it would be stopped with it."""
    with pytest.raises(NotOwn):
        Freezer.of([child.pid, os.getpid()])
    with pytest.raises(NotOwn):
        Freezer.of([child.pid])
