"""Live memory against real children, which map, write and unmap on command; what they did to one mapping is exactly what a scan must say."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckpt.criu.digests import DigestTable, image_of_pid
from ckpt.criu.livemem import RUN_BYTES, LiveMemory, Run, Unchanged
from ckpt.errors import PermissionDenied
from ckpt.host.procmem import PAGE, Buffer, PageMap, Span, private_regions, scan_excludes, zero_page_frame

PRELUDE = """
import ctypes, gc, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for f in (libc.munmap, libc.madvise, libc.mprotect): f.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
P = os.sysconf("SC_PAGESIZE")
def map(pages, prot=3, flags=0x22, fd=-1, at=None):  # MAP_PRIVATE | MAP_ANONYMOUS
    found = libc.mmap(at, pages * P, prot, flags, fd, 0)
    assert found != 2**64 - 1, os.strerror(ctypes.get_errno())
    if not fd >= 0: libc.madvise(found, pages * P, 15)  # MADV_NOHUGEPAGE: single pages come and go
    return found
def put(at, page, fill): ctypes.memmove(at + page * P, bytes([fill]) * P, P)
def fills(at, pages, first=1): [put(at, n, (first + n) % 255 + 1) for n in range(pages)]
while line := sys.stdin.readline():
    try: print(repr(eval(line)), flush=True)
    except SyntaxError: exec(line); print(globals().get(line.split()[0]), flush=True)
"""


class Child:
    """A process that does what it is told."""

    def __init__(self) -> None:
        self.popen = subprocess.Popen([sys.executable, "-I", "-S", "-c", PRELUDE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.popen.pid
        self.do("None")

    def do(self, code: str) -> int:
        """Run a line in it: the value of the expression, or of the name that it sets first; 0 when that is no number."""
        assert self.popen.stdin is not None and self.popen.stdout is not None
        self.popen.stdin.write(code + "\n")
        self.popen.stdin.flush()
        answer = self.popen.stdout.readline().strip()
        return int(answer) if re.fullmatch(r"-?\d+", answer) else 0

    def close(self) -> None:
        self.popen.kill()
        for pipe in (self.popen.stdin, self.popen.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]
        self.popen.wait()


@pytest.fixture
def child() -> Iterator[Child]:
    made = Child()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(params=[True, False], ids=["PAGEMAP_SCAN", "pagemap"])
def ioctl(request: pytest.FixtureRequest) -> bool:
    if request.param and not scan_excludes():
        pytest.skip("this kernel has no PAGEMAP_SCAN")
    return bool(request.param)


@pytest.fixture
def live(child: Child, ioctl: bool) -> LiveMemory:
    return LiveMemory(lambda: [child.pid], ioctl=ioctl)


def fill(page: int, first: int = 1) -> int:
    """What `fills` writes into a page."""
    return (first + page) % 255 + 1


class Seen:
    """What a scan said about the `pages` pages from `at` on: page number -> its fill, and the numbers of those unchanged."""

    def __init__(self, scan: Iterator[Run | Unchanged], at: int, pages: int) -> None:
        self.changed: dict[int, int] = {}
        self.unchanged: set[int] = set()
        for step in scan:
            count = len(step.pages) // PAGE if isinstance(step, Run) else step.page_count
            for n in range(count):
                page = (step.vaddr - at) // PAGE + n
                if not 0 <= page < pages:
                    continue
                assert page not in self.changed and page not in self.unchanged
                if isinstance(step, Run):
                    content = step.pages[n * PAGE : (n + 1) * PAGE].tobytes()
                    assert content == content[:1] * PAGE
                    self.changed[page] = content[0]
                else:
                    self.unchanged.add(page)


def test_exactly_the_changed_pages(child: Child, live: LiveMemory) -> None:
    at, table = child.do("at = map(700)"), DigestTable()
    child.do("fills(at, 700)")
    first = Seen(live.scan(table), at, 700)
    assert first.changed == {n: fill(n) for n in range(700)}
    second = Seen(live.scan(table), at, 700)
    assert second.changed == {} and second.unchanged == set(range(700))
    for page in (0, 5, 6, 255, 256, 300, 699):
        child.do(f"put(at, {page}, 0xFF)")
    third = Seen(live.scan(table), at, 700)
    assert third.changed == dict.fromkeys((0, 5, 6, 255, 256, 300, 699), 0xFF)
    assert third.unchanged == set(range(700)) - set(third.changed)


def test_every_page_once_in_ascending_order_in_runs_of_a_mebibyte(child: Child, live: LiveMemory) -> None:
    pages = 5 * RUN_BYTES // PAGE // 2
    at, table = child.do(f"at = map({pages})"), DigestTable()
    child.do(f"fills(at, {pages})")
    for scan in range(2):
        end, runs, same = 0, [], []
        for step in live.scan(table):
            assert step.pid == child.pid and step.image_id == image_of_pid(child.pid)
            assert step.vaddr >= end
            count = len(step.pages) // PAGE if isinstance(step, Run) else step.page_count
            end = step.vaddr + count * PAGE
            if at <= step.vaddr < at + pages * PAGE or step.vaddr <= at < end:
                (runs if isinstance(step, Run) else same).append(count)
        if scan == 0:
            assert max(runs) == RUN_BYTES // PAGE and len(runs) <= 4 and sum(runs) >= pages and not same
        else:
            assert len(same) == 1 and same[0] >= pages and not runs  # joined, however long


def test_of_a_stopped_process_all_pages_are_unchanged_to_the_last(child: Child, live: LiveMemory) -> None:
    child.do("at = map(300); fills(at, 300)")
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    table = DigestTable()
    first = list(seen_ranges(live, table))
    assert all(changed for changed, _, _ in first) and sum(count for _, _, count in first) * PAGE == live.statistics.scanned_bytes
    second = list(seen_ranges(live, table))
    assert not any(changed for changed, _, _ in second) and live.statistics.changed_bytes == 0
    assert sum(count for _, _, count in second) * PAGE == live.statistics.scanned_bytes == table.known_pages * PAGE
    assert len(second) <= len(first)


def test_statistics(child: Child, live: LiveMemory) -> None:
    child.do("at = map(300); fills(at, 300)")
    table, began, steps = DigestTable(), time.perf_counter(), 0
    for _ in live.scan(table):
        time.sleep(0.002)
        steps += 1
    first = live.statistics
    assert 0 < first.seconds <= time.perf_counter() - began - steps * 0.002
    assert first.complete and first.processes == 1 and first.vanished_pages == 0
    assert first.scanned_bytes == first.changed_bytes >= 300 * PAGE
    blocks, began = [], time.perf_counter()

    def between(count: int) -> None:
        blocks.append(count)
        time.sleep(0.01)

    assert list(live.scan(table, between))
    now = time.perf_counter()
    second = live.statistics
    assert second is not first
    assert sum(blocks) == second.scanned_bytes >= 300 * PAGE
    assert 0 < second.changed_bytes + 300 * PAGE <= second.scanned_bytes
    assert 0 < second.seconds <= now - began - len(blocks) * 0.01


def test_new_mappings_and_unmapped_ones(child: Child, live: LiveMemory) -> None:
    table = DigestTable()
    first = child.do("first = map(100); fills(first, 100)")
    Seen(live.scan(table), first, 100)
    second = child.do("second = map(50); fills(second, 50)")
    child.do("libc.munmap(first, 40 * P, 0)")
    steps = list(seen_ranges(live, table))
    assert pages_in(steps, second, 50) == (set(range(50)), set())
    assert pages_in(steps, first, 100) == (set(), set(range(40, 100)))
    # The very same again in the same place: an image set that says "in parent" would find nothing there.
    child.do("map(40, flags=0x32, at=first); fills(first, 40)")  # MAP_FIXED
    assert pages_in(list(seen_ranges(live, table)), first, 100) == (set(range(40)), set(range(40, 100)))


def seen_ranges(live: LiveMemory, table: DigestTable) -> Iterator[tuple[bool, int, int]]:
    for step in live.scan(table):
        yield isinstance(step, Run), step.vaddr, len(step.pages) // PAGE if isinstance(step, Run) else step.page_count


def pages_in(steps: list[tuple[bool, int, int]], at: int, pages: int) -> tuple[set[int], set[int]]:
    """Changed and unchanged pages of a mapping."""
    numbers: tuple[set[int], set[int]] = (set(), set())
    for changed, vaddr, count in steps:
        numbers[not changed].update(n for n in range((vaddr - at) // PAGE, (vaddr - at) // PAGE + count) if 0 <= n < pages)
    return numbers


def test_pages_given_back_are_forgotten(child: Child, live: LiveMemory) -> None:
    at, table = child.do("at = map(200); fills(at, 200)"), DigestTable()
    list(seen_ranges(live, table))
    child.do("libc.madvise(at + 10 * P, 3 * P, 4)")  # MADV_DONTNEED
    assert pages_in(list(seen_ranges(live, table)), at, 200) == (set(), set(range(200)) - {10, 11, 12})
    child.do("fills(at, 200)")
    assert pages_in(list(seen_ranges(live, table)), at, 200) == ({10, 11, 12}, set(range(200)) - {10, 11, 12})


def test_of_a_private_file_mapping_only_the_copied_pages(child: Child, live: LiveMemory, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"\x07" * PAGE * 20)
    child.do(f"fd = os.open({str(tmp_path / 'file')!r}, 0)")
    at = child.do("at = map(20, flags=2, fd=fd); ctypes.string_at(at, 20 * P)")
    child.do("put(at, 3, 0x33)")
    table = DigestTable()
    assert Seen(live.scan(table), at, 20).changed == {3: 0x33}
    child.do("put(at, 4, 0x44)")
    second = Seen(live.scan(table), at, 20)
    assert (second.changed, second.unchanged) == ({4: 0x44}, {3})


def test_the_zero_page_is_no_page_but_a_page_of_zeros_is(child: Child, live: LiveMemory, ioctl: bool) -> None:
    if not ioctl and zero_page_frame() < 0:
        pytest.skip("only root sees which page is the zero page")
    at = child.do("at = map(20); ctypes.string_at(at, 20 * P)")
    child.do("put(at, 7, 0)")
    table = DigestTable()
    assert Seen(live.scan(table), at, 20).changed == {7: 0}
    assert Seen(live.scan(table), at, 20).unchanged == {7}


def test_shared_memory_is_left_to_the_final_dump(child: Child, live: LiveMemory) -> None:
    shared = child.do("shared = map(20, flags=0x21); fills(shared, 20)")
    child.do("fd = os.memfd_create('m'); os.truncate(fd, 20 * P)")
    memfd = child.do("memfd = map(20, flags=1, fd=fd); fills(memfd, 20)")
    both = child.do("own = map(20, prot=3, flags=2, fd=fd); ctypes.string_at(own, 20 * P); put(own, 2, 9)")
    steps = list(seen_ranges(live, DigestTable()))
    assert pages_in(steps, shared, 20) == pages_in(steps, memfd, 20) == (set(), set())
    assert pages_in(steps, both, 20) == ({2}, set())
    assert [at for at in (shared, memfd, both) if any(r.start <= at < r.end for r in private_regions(child.pid))] == [both]


def test_droppable_memory_is_left_out_as_criu_does(child: Child) -> None:
    """As memory with any flag of that list; hugetlb pages and device memory are not to be had in every lab."""
    child.do("at = libc.mmap(None, 20 * P, 3, 0x28, -1, 0)")  # MAP_DROPPABLE | MAP_ANONYMOUS, Linux 6.11
    if child.do("at == 2**64 - 1 and 1"):
        pytest.skip("this kernel has no droppable memory")
    at = child.do("at + 0")
    child.do("fills(at, 20)")
    assert [r for r in private_regions(child.pid) if r.start <= at < r.end] == []


def test_the_kernels_own_mappings_are_left_out(child: Child) -> None:
    lines = Path(f"/proc/{child.pid}/maps").read_text().splitlines()
    own = [int(line.split("-")[0], 16) for line in lines if line.split()[-1] in ("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]")]
    stack = next(int(line.split("-")[0], 16) for line in lines if line.endswith("[stack]"))
    regions = private_regions(child.pid)
    assert [at for at in own if any(r.start <= at < r.end for r in regions)] == []
    assert any(r.start <= stack < r.end for r in regions)
    assert all(a.end < b.start or a.readable != b.readable for a, b in zip(regions, regions[1:], strict=False))


@pytest.mark.parametrize("prot", [0, 2], ids=["PROT_NONE", "PROT_WRITE"])
def test_memory_that_the_process_itself_may_not_read(child: Child, live: LiveMemory, prot: int) -> None:
    at = child.do("at = map(20); fills(at, 20)")
    child.do(f"libc.mprotect(at + 5 * P, 10 * P, {prot})")
    table = DigestTable()
    assert Seen(live.scan(table), at, 20).changed == {n: fill(n) for n in range(20)}
    child.do("libc.mprotect(at + 5 * P, 10 * P, 3); put(at, 6, 0x66)")
    child.do(f"libc.mprotect(at + 5 * P, 10 * P, {prot})")
    assert Seen(live.scan(table), at, 20).changed == {6: 0x66}


def test_a_huge_reservation_costs_nothing(child: Child, live: LiveMemory) -> None:
    at = child.do("at = map(1 << 22, prot=0, flags=0x4022)")  # 16 GiB of MAP_NORESERVE
    child.do("libc.mprotect(at + 3000000 * P, P, 3); put(at, 3000000, 5)")
    assert Seen(live.scan(DigestTable()), at, 1 << 22).changed == {3000000: 5}
    assert live.statistics.seconds < 5


def test_guard_regions_are_no_pages(child: Child, live: LiveMemory) -> None:
    at = child.do("at = map(20); fills(at, 20)")
    if child.do("libc.madvise(at + 4 * P, 2 * P, 102)"):  # MADV_GUARD_INSTALL
        pytest.skip("this kernel has no guard regions")
    assert set(Seen(live.scan(DigestTable()), at, 20).changed) == set(range(20)) - {4, 5}
    assert live.statistics.vanished_pages == 0


def test_a_process_that_ends_during_the_scan(child: Child, ioctl: bool) -> None:
    other = Child()
    try:
        at = child.do("at = map(2000); fills(at, 2000)")
        there = other.do("at = map(100); fills(at, 100)")
        live, table = LiveMemory(lambda: [child.pid, other.pid], ioctl=ioctl), DigestTable()
        list(seen_ranges(live, table))

        def between(_: int) -> None:
            child.close()  # at the first block; reaped, so the pid is free

        assert other.pid in {step.pid for step in live.scan(table, between)}
        assert live.statistics.complete and live.statistics.scanned_bytes < 2000 * PAGE * 2
        digest = memoryview(bytes([fill(0)]) * PAGE)
        assert table.compare(image_of_pid(child.pid), at, digest)[0].changed
        assert not table.compare(image_of_pid(other.pid), there, digest)[0].changed
    finally:
        other.close()


def test_processes_that_are_no_more_are_dropped(child: Child, ioctl: bool) -> None:
    listed = [child.pid]
    live, table = LiveMemory(lambda: listed, ioctl=ioctl), DigestTable()
    table.compare_and_update(image_of_pid(1 << 23), 0, memoryview(bytes(PAGE)))  # not the scan's
    list(seen_ranges(live, table))
    assert table.known_pages > 100
    listed.clear()
    assert list(live.scan(table)) == []
    assert table.known_pages == 1


@pytest.mark.parametrize("how", ["zombie", "nobody"])
def test_nothing_to_look_into(how: str, ioctl: bool) -> None:
    child = Child()
    child.popen.kill()
    if how == "nobody":
        child.close()
    else:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    try:
        live = LiveMemory(lambda: [child.pid], ioctl=ioctl)
        assert list(live.scan(DigestTable())) == [] and live.statistics.complete
    finally:
        child.close()


def test_another_program_in_the_same_process(child: Child, ioctl: bool) -> None:
    """An exec during the scan: what is left of the old memory is nothing, and the next scan sees the new."""
    child.do("at = map(2000); fills(at, 2000)")
    at, live, table = child.do("at"), LiveMemory(lambda: [child.pid], ioctl=ioctl), DigestTable()
    list(seen_ranges(live, table))
    told: list[int] = []

    def between(_: int) -> None:
        if not told:
            assert child.popen.stdin is not None
            child.popen.stdin.write("os.execv('/bin/sleep', ['sleep', '60'])\n")
            child.popen.stdin.flush()
            told.append(1)
            while "sleep" not in Path(f"/proc/{child.pid}/comm").read_text():
                time.sleep(0.01)
            time.sleep(0.1)

    for _ in live.scan(table, between):
        pass
    steps = list(seen_ranges(live, table))
    assert pages_in(steps, at, 2000) == (set(), set()) and sum(count for changed, _, count in steps if changed) > 10
    assert all(not changed for changed, _, _ in seen_ranges(live, table))


def test_a_fork_that_appears_during_the_scan(child: Child, ioctl: bool) -> None:
    at = child.do("at = map(50); fills(at, 50)")
    pids = [child.pid]

    def between(_: int) -> None:
        if len(pids) == 1:
            child.do("r, w = os.pipe()")
            pids.append(child.do("pid = os.fork(); (put(at, 3, 0xEE), os.read(r, 1)) if pid == 0 else None"))
            while Path(f"/proc/{pids[1]}/stat").read_text().rpartition(")")[2].split()[0] != "S":
                time.sleep(0.01)

    live, table = LiveMemory(lambda: list(pids), ioctl=ioctl), DigestTable()
    fork: dict[int, int] = {}
    order: list[int] = []
    try:
        for step in live.scan(table, between):
            order.append(step.pid)
            assert step.image_id == image_of_pid(step.pid)
            if step.pid != child.pid and isinstance(step, Run):
                first = (step.vaddr - at) // PAGE
                fork.update((first + n, step.pages[n * PAGE]) for n in range(len(step.pages) // PAGE) if 0 <= first + n < 50)
    finally:
        for pid in pids[1:]:
            os.kill(pid, signal.SIGKILL)
    assert fork == {n: fill(n) for n in range(50)} | {3: 0xEE}
    assert order == sorted(order, key=pids.index) and set(order) == set(pids)
    assert live.statistics.processes == 2


def test_forks_without_end_do_not_keep_a_scan(child: Child) -> None:
    listed = [child.pid]

    def pids() -> list[int]:
        listed.append(listed[-1] + (1 << 23))  # no such process
        assert len(listed) < 100
        return list(listed)

    list(seen_ranges(LiveMemory(pids), DigestTable()))


def test_a_stranger_with_a_listed_pid_is_not_read(child: Child) -> None:
    """The listed process ended and its pid went to somebody else before it could be pinned: the next listing does not have it."""
    answers = [[child.pid], []]
    live = LiveMemory(lambda: answers.pop(0) if answers else [])
    assert list(live.scan(DigestTable())) == [] and live.statistics.processes == 0


def test_many_processes_are_not_listed_for_each_of_them() -> None:
    """A listing looks at every process of the tree."""
    sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(70)]
    try:
        listings: list[int] = []

        def pids() -> list[int]:
            listings.append(1)
            return [sleeper.pid for sleeper in sleepers]

        live = LiveMemory(pids)
        assert {step.pid for step in live.scan(DigestTable())} == set(pids())
        assert live.statistics.processes == 70 and len(listings) <= 5
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()


def test_what_was_read_by_a_pid_that_changed_hands_is_thrown_away(child: Child, live: LiveMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading goes by pid. Between finding and reading, ours ended and was reaped, and another process got the number."""

    def strangers(_: int, spans: list[Span], *, forced: int = -1) -> list[Span]:
        child.close()
        return spans

    monkeypatch.setattr(live._buffer, "fill", strangers)
    table = DigestTable()
    assert list(live.scan(table)) == [] and table.known_pages == 0


def test_the_digest_is_that_of_the_bytes_handed_out(child: Child, live: LiveMemory) -> None:
    """The trap: the page changes after it was read and before it is remembered. The change must not be lost."""
    at, table, image = child.do("at = map(3); fills(at, 3)"), DigestTable(), image_of_pid(child.pid)
    handed = b""
    for step in live.scan(table):
        if isinstance(step, Run) and step.vaddr <= at < step.vaddr + len(step.pages):
            child.do("put(at, 0, 0xAB)")
            handed = step.pages[at - step.vaddr : at - step.vaddr + PAGE].tobytes()
    assert handed == bytes([fill(0)]) * PAGE
    assert not table.compare(image, at, memoryview(handed))[0].changed
    assert table.compare(image, at, memoryview(b"\xab" * PAGE))[0].changed  # as the frozen dump would
    assert Seen(live.scan(table), at, 3).changed == {0: 0xAB}


def test_a_run_that_was_not_taken_is_not_remembered(child: Child, live: LiveMemory) -> None:
    at, table = child.do("at = map(3); fills(at, 3)"), DigestTable()
    stop_at(live, table, at)
    assert Seen(live.scan(table), at, 3).changed == {n: fill(n) for n in range(3)}


@pytest.mark.parametrize("ending", ["closed", "left hanging", "failed"])
def test_after_a_run_of_unknown_fate_neither_content_counts_as_held(child: Child, live: LiveMemory, ending: str) -> None:
    """A, then B handed out and the scan stopped there: the other end holds A or B. The page is A again: it must go again."""
    at, table = child.do("at = map(3); fills(at, 3)"), DigestTable()
    list(seen_ranges(live, table))
    child.do("put(at, 1, 0xBB)")
    hanging = stop_at(live, table, at + PAGE, ending)
    child.do("fills(at, 3)")
    assert table.compare(image_of_pid(child.pid), at + PAGE, memoryview(bytes([fill(1)]) * PAGE))[0].changed
    assert Seen(live.scan(table), at, 3).changed[1] == fill(1)
    del hanging


def stop_at(live: LiveMemory, table: DigestTable, at: int, ending: str = "closed") -> Iterator[Run | Unchanged]:
    """Go on until the run with this page comes, and no further."""
    scan = live.scan(table)
    for step in scan:
        if isinstance(step, Run) and step.vaddr <= at < step.vaddr + len(step.pages):
            break
    if ending == "closed":
        scan.close()  # type: ignore[attr-defined]
    if ending == "failed":
        with contextlib.suppress(RuntimeError):
            scan.throw(RuntimeError("the line is dead"))  # type: ignore[attr-defined]
    assert not live.statistics.complete
    return scan


def test_between_can_end_the_scan(child: Child, live: LiveMemory) -> None:
    at, table = child.do("at = map(2000); fills(at, 2000)"), DigestTable()
    list(seen_ranges(live, table))
    held, blocks = table.known_pages, []

    def between(count: int) -> None:
        blocks.append(count)
        if len(blocks) == 3:
            raise InterruptedError("enough")

    descriptors = os.listdir("/proc/self/fd")
    with pytest.raises(InterruptedError):
        list(live.scan(table, between))
    assert not live.statistics.complete and live.statistics.scanned_bytes == sum(blocks) < 2000 * PAGE
    assert held - 100 < table.known_pages <= held + 100  # what was not reached stands
    assert os.listdir("/proc/self/fd") == descriptors
    assert Seen(live.scan(table), at, 2000).unchanged == set(range(2000))


def test_pages_that_vanish_while_they_are_read(child: Child) -> None:
    at = child.do("at = map(40); fills(at, 40); libc.munmap(at + 10 * P, 3 * P, 0); libc.munmap(at + 20 * P, P, 0)")
    buffer = Buffer(64)
    spans = [Span(at, 15), Span(at + 18 * PAGE, 3), Span(at + 30 * PAGE, 10)]
    want = [Span(at, 10), Span(at + 13 * PAGE, 2), Span(at + 18 * PAGE, 2), Span(at + 30 * PAGE, 10)]
    memory = os.open(f"/proc/{child.pid}/mem", os.O_RDONLY)
    try:
        for forced in (-1, memory):
            buffer.view[:] = bytes(len(buffer.view))
            assert buffer.fill(child.pid, spans, forced=forced) == want
            numbers = [(span.vaddr - at) // PAGE + n for span in want for n in range(span.page_count)]
            assert list(buffer.view[: len(numbers) * PAGE : PAGE]) == [fill(n) for n in numbers]
            assert buffer.fill(child.pid, [Span(at + 10 * PAGE, 2)], forced=forced) == []
    finally:
        os.close(memory)


def test_a_page_that_vanishes_in_a_scan_is_forgotten(child: Child, live: LiveMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    at, table = child.do("at = map(40); fills(at, 40)"), DigestTable()
    list(seen_ranges(live, table))
    buffer = live._buffer
    original: Callable[..., list[Span]] = buffer.fill

    def late(pid: int, spans: list[Span], *, forced: int = -1) -> list[Span]:
        if any(span.vaddr <= at + 10 * PAGE < span.vaddr + span.page_count * PAGE for span in spans):
            child.do("libc.munmap(at + 10 * P, 2 * P, 0)")
        return original(pid, spans, forced=forced)

    monkeypatch.setattr(buffer, "fill", late)
    steps = list(seen_ranges(live, table))
    assert pages_in(steps, at, 40)[1] == set(range(40)) - {10, 11}
    assert live.statistics.vanished_pages == 2
    assert table.compare(image_of_pid(child.pid), at + 10 * PAGE, memoryview(bytes([fill(10)]) * PAGE))[0].changed


def test_many_single_pages(child: Child, ioctl: bool) -> None:
    """Far more pieces than one call takes."""
    pages = 5000
    at = child.do(f"at = map({pages}); [put(at, n, n % 251 + 1) for n in range(0, {pages}, 2)]")
    live, table = LiveMemory(lambda: [child.pid], ioctl=ioctl), DigestTable()
    live._buffer = Buffer(3000)
    assert Seen(live.scan(table), at, pages).changed == {n: n % 251 + 1 for n in range(0, pages, 2)}
    child.do("put(at, 4000, 0xFE)")
    assert Seen(live.scan(table), at, pages).changed == {4000: 0xFE}


def test_few_pages_far_apart(child: Child, ioctl: bool) -> None:
    """At the edges of what is looked at in one go."""
    at = child.do("at = map(4 * 4096); [put(at, n, 1) for n in (0, 2 * 4096, 4 * 4096 - 1)]")
    way, found, here = PageMap(child.pid, ioctl=ioctl), list[int](), at
    while here < at + 4 * 4096 * PAGE:
        spans, here = way.own_pages(here, at + 4 * 4096 * PAGE, 100)
        found += [(span.vaddr - at) // PAGE + n for span in spans for n in range(span.page_count)]
    way.close()
    assert found == [0, 2 * 4096, 4 * 4096 - 1]


def test_both_ways_to_find_pages_agree(child: Child, tmp_path: Path) -> None:
    if not scan_excludes() or zero_page_frame() < 0:
        pytest.skip("this kernel has no PAGEMAP_SCAN, or does not show frame numbers")
    (tmp_path / "file").write_bytes(os.urandom(PAGE * 50))
    child.do("at = map(9000); [put(at, n * n % 9000, 1) for n in range(4000)]; ctypes.string_at(at + 5000 * P, 100 * P)")
    child.do(f"fd = os.open({str(tmp_path / 'file')!r}, 0); f = map(50, flags=2, fd=fd); ctypes.string_at(f, 50 * P); put(f, 20, 1)")
    os.kill(child.pid, signal.SIGSTOP)
    ways = [PageMap(child.pid, ioctl=True), PageMap(child.pid, ioctl=False)]
    found: list[list[int]] = [[], []]
    for mine, way in zip(found, ways, strict=True):
        for region in private_regions(child.pid):
            at = region.start
            while at < region.end:
                spans, at = way.own_pages(at, region.end, 100)
                assert sum(span.page_count for span in spans) <= 100
                mine += [span.vaddr + n * PAGE for span in spans for n in range(span.page_count)]
        way.close()
    assert found[0] == found[1] and len(found[0]) > 1000 and found[0] == sorted(set(found[0]))


def test_someone_who_may_not_look(child: Child) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become somebody else")
    pid = os.fork()
    if pid == 0:
        try:
            os.setresuid(65534, 65534, 65534)
            list(LiveMemory(lambda: [child.pid]).scan(DigestTable()))
            os._exit(1)
        except PermissionDenied:
            os._exit(0)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
