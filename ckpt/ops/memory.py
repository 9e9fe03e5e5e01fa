"""How the memory of one migration goes over: while it is dumped, ahead of the dump, or after the switchover.

    way          sent while it runs   sent while it is frozen         the restored workload finds it
    stop         nothing              all, as CRIU dumps it           restored, or in local CRIU images (lazily)
    --precopy    all, in rounds       what differs from the rounds    in the local rounds (lazily), or restored
    --postcopy   nothing              nothing                         on the source, page by page

Where the last column says lazily, CRIU leaves private memory in the frozen tree (`DumpOptions.memory_stays`) or in the images, and the
destination's keeper of the memory (lazy.py) brings it behind the running workload.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ckpt.criu import tree
from ckpt.engines.base import Engine, HeldDump
from ckpt.errors import CkptError, FeatureMissing, NeedsContinue
from ckpt.events import BytesMoved, Emit, Figures, Notice
from ckpt.host import limits, procmem
from ckpt.model import Container, DumpOptions, PrecopyLimits
from ckpt.ops import faults
from ckpt.peer.client import Peer
from ckpt.store.job import Job

if TYPE_CHECKING:
    from ckpt.ops.postcopy import Follow
    from ckpt.ops.precopy import Precopy

LAZY_FROM_BYTES: Final = 64 << 20
"""Less memory is restored sooner than a lazy-pages daemon is started."""

QUICK_BYTES: Final = 256 << 20

Step = Callable[[str], None]


class MemoryMove:
    """The memory of one migration, on the source.

    Args:
        typed: the name that people used, for events.
        step, done: tell of a step's beginning and end.
        lazy: None: as it seems best.
    """

    def __init__(
        self,
        typed: str,
        engine: Engine,
        container: Container,
        emit: Emit,
        *,
        step: Step,
        done: Callable[[str, str], None],
        precopy: PrecopyLimits | None,
        postcopy: bool,
        lazy: bool | None,
    ) -> None:
        self._typed = typed
        self._engine = engine
        self._container = container
        self._emit = emit
        self._step = step
        self._done = done
        self._limits = precopy
        self._postcopy = postcopy
        self._wanted = lazy
        self._ahead: Precopy | None = None
        self._follow: Follow | None = None
        self._streams = False
        self.size_bytes: int | None = None
        """About as much memory as there is, where it is known."""
        self.quick = False
        """The pause will be short, however slow the link is: what waits for its end may wait."""
        self.lazily = False
        """The destination lets it run before its memory is in place."""
        self.stats: dict[str, float | int | str] = {}

    def choose(self, report: dict[str, Any], there: str) -> None:
        """Decide by what both ends can do; `report` is the destination's.

        Raises:
            FeatureMissing: what was asked for cannot be done.
        """
        can = self._engine.probe()
        self._streams = can.pages and bool(report.get("pages"))
        able = can.lazy and bool(report.get("lazy"))
        where = f"{self._container.name} is running, untouched"
        if self._limits and not self._streams:
            hint = "install CRIU's Python bindings there (apt install python3-pycriu), or migrate without --precopy"
            raise FeatureMissing(f"memory cannot be sent ahead to {there}", where=where, hint=hint)
        if (self._postcopy or self._wanted) and not able:
            what = "--postcopy" if self._postcopy else "--lazy"
            hint = f"{there} needs CRIU with lazy pages and a kernel with userfaultfd (ckpt check --to); migrate without {what}"
            raise FeatureMissing(f"memory cannot be brought after the restore on {there}", where=where, hint=hint)
        if self._limits is not None:
            from ckpt.ops import precopy

            precopy.throttle(self._container, self._limits)  # refused here rather than on the way
        resident_bytes = procmem.resident_bytes(tree.pids(self._container.pid or 0))
        large = resident_bytes >= LAZY_FROM_BYTES
        if (self._postcopy or self._limits) and resident_bytes > (most_bytes := limits.piped_memory_bytes()):
            # CRIU would fail in the middle of the dump.
            hint = f"sysctl -w fs.pipe-max-size={4 << 20}, or a higher limit of open files (ulimit -n, LimitNOFILE=)"
            message = f"{self._container.name} has {resident_bytes >> 20} MiB of memory, CRIU can leave {most_bytes >> 20} in a frozen workload"
            if self._postcopy or self._wanted:
                raise FeatureMissing(message, where=where, hint=hint)
            self._emit(Notice(self._typed, f"{message}: its memory is restored before it runs there; {hint}"))
            able = False
        self.lazily = self._postcopy or (able and self._streams and (large if self._wanted is None else self._wanted))
        self.quick = self._postcopy or resident_bytes < QUICK_BYTES or (self._limits is not None and self.lazily)
        self._emit(Figures(self._typed, {"lazy": self.lazily}))

    def send_ahead(self, peer: Peer, job: Job) -> None:
        """The rounds of --precopy, while the workload runs."""
        faults.point("migrate-precopy")
        if self._limits is None:
            return
        from ckpt.ops import precopy

        self._ahead = precopy.copy_ahead(peer, self._typed, self._container, self._limits, job, self._emit, memory_bytes=self.size_bytes)
        self.stats["rounds"] = len(self._ahead.rounds)
        self.stats["memory_tracker"] = self._ahead.tracker
        self.stats["slowed"] = max(done.slowed for done in self._ahead.rounds)
        self.stats["precopy_read_bytes"] = sum(done.scanned_bytes for done in self._ahead.rounds)
        self.stats["precopy_bytes"] = self._ahead.sent_bytes

    def dump(self, peer: Peer, stage: Path, options: DumpOptions, job: Job, criu_version: str) -> HeldDump:
        """Freeze and dump, held; what has to go over while it is frozen goes."""
        if self._postcopy:
            held = self._engine.dump(self._container, stage, replace(options, memory_stays=True), job)
            return self._unless_it_fails(held, lambda: self._step("pages"))
        if self._ahead is not None and self.lazily:
            held = self._engine.dump(self._container, stage, replace(options, memory_stays=True), job)
            return self._unless_it_fails(held, self._send_last)
        if self._streams:
            return self._dump_streamed(peer, stage, options, job, criu_version)
        return self._engine.dump(self._container, stage, options, job)

    def _unless_it_fails(self, held: HeldDump, work: Callable[[], None]) -> HeldDump:
        try:
            work()
        except BaseException:
            held.resume()
            raise
        return held

    def _send_last(self) -> None:
        """What of the frozen memory differs from what the rounds brought there."""
        assert self._ahead is not None
        self._step("pages")
        last = self._ahead.send_last()
        self.stats["pages_bytes"] = last.sent_bytes
        self.stats["pages_read_bytes"] = last.scanned_bytes
        self._done("pages", f"{last.sent_bytes / (1 << 20):.1f} MiB of {last.scanned_bytes / (1 << 20):.0f} MiB changed, {last.seconds:.2f} s")

    def _dump_streamed(self, peer: Peer, stage: Path, options: DumpOptions, job: Job, criu_version: str) -> HeldDump:
        from ckpt.ops.pages import PageRelay

        def on_bytes(done: int) -> None:
            if not relay.sent_bytes:
                self._step("pages")
            self._emit(BytesMoved(self._typed, "pages", done, None if self._ahead else self.size_bytes))

        known, images = (self._ahead.table, self._ahead.images) if self._ahead else (None, None)
        with PageRelay(peer, criu_version, on_bytes, timeout_s=options.timeout_s, known=known, images=images) as relay:
            job.on_failure = relay.break_off
            held = self._engine.dump(self._container, stage, replace(options, page_server_port=relay.port), job)
            self._unless_it_fails(held, relay.finish)
        self.stats["pages_bytes"] = relay.sent_bytes
        self._done("pages", f"{relay.sent_bytes / (1 << 20):.1f} MiB")
        return held

    def restore_args(self) -> dict[str, Any]:
        """What the destination's restore must know of it."""
        if self._postcopy:
            return {"memory": "source"}
        if not self.lazily:
            return {}
        return {"memory": "chain", "images": self._ahead.images} if self._ahead else {"memory": "images"}

    def begin_to_follow(self, peer: Peer) -> None:
        """Post-copy: be ready for the page faults of the restore."""
        if not self._postcopy:
            return
        from ckpt.ops.postcopy import Follow

        def on_bytes(done: int) -> None:
            self._emit(BytesMoved(self._typed, "follow", done, self.size_bytes))

        assert self._container.pid is not None
        self._follow = Follow(peer, self._container.pid, {}, on_bytes)

    def follow(self, job: Job) -> None:
        """After the switchover: wait until the destination has all memory.

        Raises:
            NeedsContinue: it does not come through.
        """
        faults.point("migrate-follow")
        if self._follow is None:
            return
        self._step("follow")
        began_s = time.monotonic()
        follow = self._follow
        try:
            follow.wait()
        except CkptError as error:
            raise NeedsContinue(
                f"{self._container.name} runs on the destination, but not all of its memory is there: {error.message}",
                where=f"{self._container.name} runs there and waits for its memory, which is in the frozen source here",
                hint=f"within 10 minutes: ckpt migrate --continue {job.id}",
            ) from error
        self.stats["follow_bytes"] = follow.sent_bytes
        self.stats["follow_s"] = round(time.monotonic() - began_s, 3)
        self._done("follow", f"{follow.sent_bytes / (1 << 20):.1f} MiB")

    def give_up(self) -> None:
        """Nothing more will be asked for. Never raises."""
        if self._follow is not None:
            self._follow.stop()
