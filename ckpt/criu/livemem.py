"""The pages of a running tree that changed since the last look, found by comparing their content; with the kernel's help in fewer of them.

CRIU's own pre-dump needs the kernel's soft-dirty tracking, which arm64 and many x86 kernels lack. Here ckpt reads the memory of the running
processes itself, round by round, and keeps a digest of every page it handed out (`DigestTable`). At the end CRIU dumps the frozen tree in full
to ckpt's page server, and the same table tells which of those pages the other end already holds (`DigestTable.compare`).

A `Tracker` (ckpt.criu.softdirty, where the kernel can) tells pages that cannot have changed since they were read: those are not read again.
What is read is compared as ever, so that a page that was written with what it held before is not sent, nor all of a huge page for one byte.

What must be consistent, and what need not be. A live round is a blur: the processes run, a page may be written while it is copied, regions come
and go. None of that matters, because nothing of a live round is believed: whatever the other end holds counts only if its digest equals that of
the *frozen* page at the end. That holds under one condition, **the digest that is remembered is that of the bytes that were handed out**:

- it is computed from the buffer that is handed out, after it was read; memory is never read a second time for it;
- it is remembered when the caller comes back for more. When it does not, because it stopped or failed at that very run, nobody knows which
  bytes the other end holds, the former or these, and *neither* digest may stand: a page can change back;
- a caller that queues runs must copy them, and when a run was lost on its way it must `drop` the image (or start with a new table).

Live rounds handle private memory: anonymous memory and the copied pages of private file mappings, in memory or swap (swapped pages are brought
back in by reading them, as CRIU does). **Shared anonymous memory, memfd, tmpfs and System V segments are not read live**: they are in CRIU's
shmem images and go whole with the final dump (the table can hold their digests, `image_of_shmem`). So do the vDSO, AIO rings and hugetlb pages.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from ckpt.criu.digests import DigestTable, Sweep, image_of_pid
from ckpt.host.procmem import PAGE, Buffer, PageMap, Region, Span, innermost_pid, open_memory, private_regions

RUN_BYTES: Final = 1 << 20
"""The longest run."""

_LISTINGS: Final = 4
"""How often a scan looks for processes that appeared since it began: something that forks without end must not keep it."""

_LISTED: Final = 1 << 14
"""Pages that are listed at a time when most of them need not be read."""

_PINNED: Final = 64
"""Processes that are pinned at a time: a descriptor each."""


class Run(NamedTuple):
    """Pages that the other end does not hold as they are now.

    Attributes:
        pid: of the process, as the reader sees it.
        image_id: `image_of_pid` of its pid in its own namespace.
        vaddr: address of the first page.
        pages: the bytes, whole pages. They lie in a buffer that the next step of the scan fills again: use or copy them before it.
    """

    pid: int
    image_id: int
    vaddr: int
    pages: memoryview


class Unchanged(NamedTuple):
    """`page_count` pages from `vaddr` on that the other end holds as they are."""

    pid: int
    image_id: int
    vaddr: int
    page_count: int


@dataclass(slots=True)
class ScanStatistics:
    """Of one scan, counted up while it runs.

    Attributes:
        scanned_bytes: all that was read; `changed_bytes`: that part of it which was handed out.
        settled_bytes: not read, because the tracker knew that it had not changed.
        seconds: spent in the scan itself, without its caller's time and without `between`.
        processes: looked into. `vanished_pages`: gone between finding and reading them.
        complete: the scan went to its end.
    """

    scanned_bytes: int = 0
    changed_bytes: int = 0
    settled_bytes: int = 0
    seconds: float = 0.0
    processes: int = 0
    vanished_pages: int = 0
    complete: bool = False


class TrackedMemory(Protocol):
    """What a tracker knows of one process."""

    def settled(self, span: Span) -> list[bool] | bool:
        """For each page whether it is as it was when it was last read; one bool when that goes for all of them."""

    def end(self) -> None:
        """Every page that was not settled has been read."""


class Tracker(Protocol):
    """Tells which pages cannot have changed since they were last read."""

    def begin(self, pids: Collection[int]) -> None:
        """A scan of these processes begins. Raises PermissionDenied."""

    def of(self, pid: int) -> TrackedMemory | None:
        """What is known of a process (pinned, so that no other one has its pid); None: read all of it."""

    def forget(self) -> None:
        """What was read is not known any more."""


_Steps = Generator[Run | Unchanged, None, None]


class LiveMemory:
    """The private memory of some running processes.

    Args:
        pids: lists the processes, by pids of the reader's namespace; asked again in every scan, because processes come and go.
        ioctl: False keeps it from using PAGEMAP_SCAN (Linux 6.7).
        tracker: what spares reading (ckpt.criu.softdirty.choose), for this object alone; None: everything is read.
    """

    def __init__(self, pids: Callable[[], Iterable[int]], *, ioctl: bool = True, tracker: Tracker | None = None) -> None:
        self._pids = pids
        self._ioctl = ioctl
        self._tracker = tracker
        self._table: DigestTable | None = None
        self._buffer = Buffer(max(1, RUN_BYTES // PAGE))
        self._images: set[int] = set()
        self.statistics = ScanStatistics()

    def scan(self, table: DigestTable, between: Callable[[int], None] | None = None) -> Iterator[Run | Unchanged]:
        """Look at every page once, process by process, in ascending order in each; every page present is in one `Run` or one `Unchanged`.

        The table follows: what was handed out is remembered, and what is not there any more (pages, regions, processes) is forgotten, so that
        an image set written from one complete scan may say "in parent" for each `Unchanged`. A scan that is not run to its end forgets only in
        what it passed.

        A process that ends meanwhile just has no more pages, and one that appears is looked into last. A page that is gone when it is to be
        read is left out. `statistics` is a new object for every scan.

        Args:
            between: called after each block with the number of bytes just read; it may sleep to limit the rate, or raise to end the scan.

        Raises:
            PermissionDenied: a process may not be looked into.
        """
        self.statistics = statistics = ScanStatistics()
        with contextlib.closing(self._tree(table, between)) as steps:
            began = time.perf_counter()
            for step in steps:
                statistics.seconds += time.perf_counter() - began
                yield step
                began = time.perf_counter()
            statistics.seconds += time.perf_counter() - began
            statistics.complete = True

    def _tree(self, table: DigestTable, between: Callable[[int], None] | None) -> _Steps:
        seen: set[int] = set()
        images: set[int] = set()
        for _ in range(_LISTINGS):
            fresh = [pid for pid in self._pids() if pid not in seen]
            if not fresh:
                break
            if self._tracker is not None and not seen:  # those that come later are read in full
                if table is not self._table:  # what was read went into another one
                    self._tracker.forget()
                self._table = table
                self._tracker.begin(fresh)
            seen.update(fresh)
            for at in range(0, len(fresh), _PINNED):
                with contextlib.ExitStack() as stack:
                    pins = {pid: pin for pid in fresh[at : at + _PINNED] if (pin := _pin(stack, pid)) is not None}
                    # A pid may have gone to a stranger since it was listed. Now the processes are pinned: are they (still) ours?
                    ours = set(self._pids()) if pins else set()
                    for pid in [pid for pid in pins if pid in ours]:
                        with contextlib.suppress(ProcessLookupError, FileNotFoundError), _Process(pid, pins[pid], ioctl=self._ioctl) as process:
                            if process.image_id not in images:
                                images.add(process.image_id)
                                self.statistics.processes += 1
                                yield from self._process(process, table, between)
        for image in self._images - images:
            table.drop(image)
        self._images = images

    def _process(self, process: _Process, table: DigestTable, between: Callable[[int], None] | None) -> _Steps:
        image = process.image_id
        self._images.add(image)  # also when the scan does not get to its end
        sweep = Sweep(table, image)
        tracked = self._tracker.of(process.pid) if self._tracker is not None else None
        same: Unchanged | None = None
        try:
            for region, wanted, settled in self._blocks(process, table, tracked):
                filled = self._buffer.fill(process.pid, wanted, forced=-1 if region.readable else process.memory())
                process.check()
                read = 0
                for span, fresh in sorted([(span, True) for span in filled] + [(span, False) for span in settled]):
                    if not fresh:
                        sweep.met(span.vaddr, span.page_count)
                        self.statistics.settled_bytes += span.page_count * PAGE
                        if same is not None and same.vaddr + same.page_count * PAGE == span.vaddr:
                            same = same._replace(page_count=same.page_count + span.page_count)
                        else:
                            if same is not None:
                                yield same
                            same = Unchanged(process.pid, image, span.vaddr, span.page_count)
                        continue
                    pages = self._buffer.view[read : read + span.page_count * PAGE]
                    read += len(pages)
                    sweep.met(span.vaddr, span.page_count)
                    digests = table.digests(pages)
                    parts = table.differences(image, span.vaddr, digests)
                    known = len(parts) == 1 and not parts[0].changed
                    if not known:  # until the caller is back, the other end may hold the former bytes or these
                        table.forget(image, span.vaddr, span.vaddr + len(pages))
                    for first, count, changed in parts:
                        vaddr = span.vaddr + first * PAGE
                        if not changed and same is not None and same.vaddr + same.page_count * PAGE == vaddr:
                            same = same._replace(page_count=same.page_count + count)
                            continue
                        if same is not None:
                            yield same
                        same = None if changed else Unchanged(process.pid, image, vaddr, count)
                        if changed:
                            self.statistics.changed_bytes += count * PAGE
                            yield Run(process.pid, image, vaddr, pages[first * PAGE : (first + count) * PAGE])
                    if not known:
                        table.remember(image, span.vaddr, digests)
                self.statistics.scanned_bytes += read
                self.statistics.vanished_pages += sum(span.page_count for span in wanted) - read // PAGE
                if between is not None:
                    began = time.perf_counter()
                    try:
                        between(read)
                    finally:
                        self.statistics.seconds -= time.perf_counter() - began
        except ProcessLookupError:
            table.drop(image)  # it ended: its pages will not be asked for
            return
        if same is not None:
            yield same
        sweep.end()
        if tracked is not None:
            tracked.end()

    def _blocks(self, process: _Process, table: DigestTable, tracked: TrackedMemory | None) -> Iterator[tuple[Region, list[Span], list[Span]]]:
        """All own pages, ascending, as blocks of spans to read (no more than fit the buffer) and spans that are not to be read."""
        limit = self._buffer.pages
        if tracked is None:
            for region, spans in process.batches(limit):
                yield region, spans, []
            return
        for region, spans in process.batches(_LISTED):
            wanted: list[Span] = []
            settled: list[Span] = []
            room = limit
            for span in spans:
                for (vaddr, count), spared in _spared(span, tracked, table, process.image_id):
                    if spared:
                        settled.append(Span(vaddr, count))
                        continue
                    while count:
                        taken = min(room, count)
                        wanted.append(Span(vaddr, taken))
                        vaddr, count, room = vaddr + taken * PAGE, count - taken, room - taken
                        if not room:
                            yield region, wanted, settled
                            wanted, settled, room = [], [], limit
            if wanted or settled:
                yield region, wanted, settled


def _spared(span: Span, tracked: TrackedMemory, table: DigestTable, image: int) -> Iterator[tuple[Span, bool]]:
    """The span in parts that need not be read (they have not changed, and the table knows what they hold) and parts that must be."""
    settled = tracked.settled(span)
    if settled is False:
        yield span, False
        return
    known = table.knows(image, span.vaddr, span.page_count)
    if settled is True and known is True:
        yield span, True
        return
    both = [
        has and knows
        for has, knows in zip(
            settled if isinstance(settled, list) else [settled] * span.page_count,
            known if isinstance(known, list) else [known] * span.page_count,
            strict=True,
        )
    ]
    at = 0
    for spared, pages in itertools.groupby(both):
        count = sum(1 for _ in pages)
        yield Span(span.vaddr + at * PAGE, count), spared
        at += count


def _pin(stack: contextlib.ExitStack, pid: int) -> int | None:
    """A pidfd, closed with the stack; None when there is no such process."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return None
    stack.callback(os.close, pidfd)
    return pidfd


class _Process:
    """One process, pinned by its pidfd: when it ended and its pid went to another one, `check` fails with ProcessLookupError."""

    def __init__(self, pid: int, pidfd: int, *, ioctl: bool) -> None:
        self.pid = pid
        self._pidfd = pidfd
        with contextlib.ExitStack() as stack:
            self._pagemap = PageMap(pid, ioctl=ioctl)
            stack.callback(self._pagemap.close)
            self.image_id = image_of_pid(innermost_pid(pid))
            self.check()
            self._memory = -1
            self._stack = stack.pop_all()

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def check(self) -> None:
        """Nothing that was read by pid before a successful check came from another process.

        Raises:
            ProcessLookupError: it is gone.
        """
        signal.pidfd_send_signal(self._pidfd, 0)

    def memory(self) -> int:
        """A descriptor of /proc/PID/mem."""
        if self._memory < 0:
            self._memory = open_memory(self.pid)
            self._stack.callback(os.close, self._memory)
            self.check()
        return self._memory

    def batches(self, limit: int) -> Iterator[tuple[Region, list[Span]]]:
        """All its own pages, ascending, at most `limit` at a time."""
        for region in private_regions(self.pid):
            at = region.start
            while at < region.end:
                spans, at = self._pagemap.own_pages(at, region.end, limit)
                if spans:
                    yield region, spans
