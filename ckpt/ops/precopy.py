"""Pre-copy: the memory of a workload goes over while it runs, round by round, so that little is left for the time it is frozen.

Each round is a set of CRIU images on the destination that holds what changed since the round before and refers to it for the rest
(CRIU's incremental images, their `parent`). Nothing of the rounds is believed: at the end the frozen memory is compared with the
digests of what was sent, and what differs is sent again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from ckpt.criu import softdirty, tree
from ckpt.criu.digests import DigestTable
from ckpt.criu.livemem import LiveMemory, Run
from ckpt.criu.pagestream import PAGE_BYTES, Kind, record
from ckpt.errors import CkptError, TransferFailed
from ckpt.events import BytesMoved, Emit, Notice, RoundDone, StepDone, StepStarted
from ckpt.model import Container, PrecopyLimits
from ckpt.ops import faults, knobs
from ckpt.ops.converge import Throttle
from ckpt.ops.pages import MEMBER, VERB
from ckpt.peer.client import Peer
from ckpt.store.job import Job

FIXED_S: Final = 0.5
"""What a switchover takes besides the memory: freezing, the engine's restore, the two journals (tests/bench)."""
GAIN: Final = 0.85
"""A round that leaves more than this part of what the round before left gains nothing any more."""
MIN_ROUNDS: Final = 2


@dataclass(frozen=True, slots=True)
class Round:
    """One round: what was read, what of it was sent, and in which time; what a tracker spared reading, and how long it stopped them for that."""

    number: int
    scanned_bytes: int
    sent_bytes: int
    seconds: float
    scan_s: float
    settled_bytes: int = 0
    stopped_s: float = 0.0
    slowed: float = 0.0
    """The part of its processor time that the workload did not get."""

    @property
    def downtime_s(self) -> float:
        """The downtime to expect: what was written meanwhile goes over as fast as this round did, all memory is read once more."""
        rate = self.sent_bytes / self.seconds if self.seconds and self.sent_bytes else float("inf")
        return FIXED_S + self.scan_s + self.sent_bytes / rate


class Precopy:
    """The rounds of one migration; `table` is what the destination holds, `images` the number of the last round's images."""

    def __init__(
        self, peer: Peer, root_pid: int, limits: PrecopyLimits, on_bytes: Callable[[int], None], job: Job, throttle: Throttle | None = None
    ) -> None:
        self._peer = peer
        self._limits = limits
        self._on_bytes = on_bytes
        self._tracker = softdirty.choose(lambda knob: knobs.journal(job, knob))
        self._job = job
        self._throttle = throttle
        self._memory = LiveMemory(lambda: tree.pids(root_pid), tracker=self._tracker)
        self.table = DigestTable()
        self.rounds: list[Round] = []
        self.enough = False
        """The downtime to expect is within the limit."""

    @property
    def images(self) -> int | None:
        """The number of the newest images on the destination; None before the first round."""
        return self.rounds[-1].number if self.rounds else None

    @property
    def tracker(self) -> str:
        """What tells changed pages: "soft-dirty" (the kernel's marks), or "content" (all memory is read and compared)."""
        return "soft-dirty" if self._tracker is not None and not self._tracker.reason else "content"

    @property
    def sent_bytes(self) -> int:
        """Memory sent in all rounds."""
        return sum(one.sent_bytes for one in self.rounds)

    @property
    def dirty_bytes_s(self) -> float | None:
        """How fast the workload writes: what the last round found changed, over the time of the round before; None before there are two."""
        if len(self.rounds) < 2 or not self.rounds[-2].seconds:
            return None
        return self.rounds[-1].sent_bytes / self.rounds[-2].seconds

    def run(self, told: Callable[[Round], None]) -> None:
        """All rounds.

        Args:
            told: called after each round.

        Raises:
            TransferFailed: the link broke; the downtime stays too long and the limits say "abort".
            CkptError: what the destination raised, PermissionDenied.
        """
        try:
            while not self._stop():
                told(self._round(len(self.rounds)))
        finally:
            if self._throttle is not None:
                self._throttle.release()
        if not self.enough and self._limits.on_exceed == "abort":
            expected = self.rounds[-1].downtime_s
            raise TransferFailed(
                f"a downtime of {expected:.1f} s is to be expected, more than {self._limits.max_downtime_s:g} s, after {len(self.rounds)} rounds",
                hint="a larger --max-downtime, a faster link, or --on-exceed continue",
            )

    def send_last(self) -> Round:
        """One more round, of the frozen memory: after it the destination holds exactly that. Raises as `run` does."""
        return self._round(len(self.rounds))

    def _stop(self) -> bool:
        if not self.rounds:
            return False
        last = self.rounds[-1]
        self.enough = last.downtime_s <= self._limits.max_downtime_s
        if self.enough or len(self.rounds) >= self._limits.max_rounds:
            return True
        if len(self.rounds) < MIN_ROUNDS or last.sent_bytes <= GAIN * self.rounds[-2].sent_bytes:
            return False
        return self._throttle is None or not self._throttle.step(self._job)

    def _round(self, number: int) -> Round:
        faults.point(f"migrate-round-{number}")
        began_s = time.monotonic()
        with self._peer.upload(VERB, {"images": number, "parent": self.images}, kind="precopy") as upload:
            upload.send_stream(MEMBER, RoundStream(self._memory.scan(self.table)), on_bytes=self._on_bytes, digest=False)
        seen = self._memory.statistics
        if not seen.complete:
            raise CkptError("a round of memory was not read to its end")
        stopped_s = self._tracker.stopped_s if self._tracker is not None else 0.0
        slowed = self._throttle.slowed if self._throttle is not None else 0.0
        seconds = time.monotonic() - began_s
        done = Round(number, seen.scanned_bytes, seen.changed_bytes, seconds, seen.seconds, seen.settled_bytes, stopped_s, slowed)
        self.rounds.append(done)
        return done


def throttle(container: Container, limits: PrecopyLimits) -> Throttle | None:
    """What slows the container; None when that is not asked for.

    Raises:
        FeatureMissing: it cannot be slowed.
    """
    root_pid = container.pid
    assert root_pid is not None
    return Throttle(lambda: tree.pids(root_pid), container.name) if limits.auto_converge else None


def copy_ahead(
    peer: Peer, typed: str, container: Container, limits: PrecopyLimits, job: Job, emit: Emit, *, memory_bytes: int | None = None
) -> Precopy:
    """All rounds of a container's memory, about `memory_bytes` of it, told to people as `typed`. Raises what `Precopy.run` does."""
    began_s = time.monotonic()
    emit(StepStarted(typed, "precopy"))

    def told(done: Round) -> None:
        emit(RoundDone(typed, done.number, done.scanned_bytes, done.sent_bytes, done.seconds))
        sent = f"{done.sent_bytes / (1 << 20):.1f} MiB in {done.seconds:.1f} s"
        slowed = f", slowed by {done.slowed * 100:.0f} %" if done.slowed else ""
        emit(Notice(typed, f"round {done.number + 1}: {sent}, a downtime of about {done.downtime_s:.1f} s to expect{slowed}"))

    def on_bytes(done: int) -> None:
        number = len(ahead.rounds) + 1
        emit(BytesMoved(typed, "precopy", done, memory_bytes if number == 1 else None, number, ahead.dirty_bytes_s))

    assert container.pid is not None
    ahead = Precopy(peer, container.pid, limits, on_bytes, job, throttle(container, limits))
    ahead.run(told)
    many = "1 round" if len(ahead.rounds) == 1 else f"{len(ahead.rounds)} rounds"
    emit(StepDone(typed, "precopy", f"{many}, {ahead.sent_bytes / (1 << 20):.1f} MiB", time.monotonic() - began_s))
    return ahead


class RoundStream:
    """One scan as a stream of page records, to be read like a raw file. Every page is copied once, into the reader's buffer."""

    def __init__(self, steps: Iterator[object]) -> None:
        self._pieces = self._records(steps)
        self._piece = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill the buffer as far as one piece goes; 0 at the end."""
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = piece
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count

    @staticmethod
    def _records(steps: Iterator[object]) -> Iterator[memoryview]:
        image = 0
        for step in steps:
            found = step.image_id  # type: ignore[attr-defined]
            if found != image:
                if image:
                    yield memoryview(record(Kind.CLOSE, image))
                image = found
                yield memoryview(record(Kind.OPEN, image))
            if isinstance(step, Run):
                yield memoryview(record(Kind.PAGES, image, step.vaddr, len(step.pages) // PAGE_BYTES))
                yield step.pages
            else:
                yield memoryview(record(Kind.PARENT, image, step.vaddr, step.page_count))  # type: ignore[attr-defined]
        if image:
            yield memoryview(record(Kind.CLOSE, image))
        yield memoryview(record(Kind.END))
