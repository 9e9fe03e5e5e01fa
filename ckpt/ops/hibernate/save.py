"""Save a host's workloads, several at a time, before it goes down.

Everything is looked at before anything is touched. The journal (store/hibernation.py) is ahead of every step, so that a save that was killed
is gone on with by the next one, or brought back by `resume`; what is saved already is not saved twice. What others come after is saved after
them. A save that breaks in the middle brings back what it had ended, unless it was asked to save what it can.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final

from ckpt.engines.base import Startable
from ckpt.errors import BusyError, CkptError, DumpFailed, NoSpace, StateUnknown
from ckpt.events import Emit, Notice, StepDone, StepStarted
from ckpt.host import systemd
from ckpt.model import Checkpoint, DumpOptions, Manifest, RestoreOptions
from ckpt.ops import checkpoint as saving
from ckpt.ops import faults, journald, recover, warm
from ckpt.ops import restore as restoring
from ckpt.ops.group import save_group
from ckpt.ops.group_restore import restore_group
from ckpt.ops.hibernate import guards, old, sets
from ckpt.ops.hibernate.earlier import Earlier, written
from ckpt.ops.hibernate.old import TAG
from ckpt.ops.hibernate.plan import Plan, Wish, plan, refusal
from ckpt.ops.hibernate.selection import Chosen, Selection
from ckpt.ops.hibernate.settings import HibernateSettings
from ckpt.ops.parallel import Dropped, run_all
from ckpt.ops.result import Outcome, failure
from ckpt.store import place
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.hibernation import ITEM_SAVED, SAVED, Hibernation
from ckpt.store.job import DEFAULT_ROOT

EXTEND_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Saved:
    """How a save went."""

    hibernation: str = ""
    """Its id, "" when there was nothing to do."""
    outcomes: tuple[Outcome, ...] = ()
    """Of those that were to be saved or stopped."""
    whole: bool = True
    """Nothing that was asked for is missing: the host may go down."""


def save(wish: Wish, *, settings: HibernateSettings, store_root: Path = DEFAULT_ROOT, emit: Emit) -> Saved:
    """Save (or stop) what is meant, and write down that it is to come back.

    Raises:
        UsageError, TargetNotFound, EngineUnavailable: the wish makes no sense, nothing was touched.
        BusyError: another ckpt is at it.
        DumpFailed: something cannot be saved; everything runs as before (or `where` says what does not).
        KeyboardInterrupt: broken off; everything runs as before.
    """
    budget_s = wish.timeout_s or settings.shutdown_timeout_s
    deadline_s = time.monotonic() + budget_s
    warm.imports(*warm.INTO_CHUNKS)
    if wish.at_shutdown and systemd.running() and not systemd.going_down():
        emit(Notice("", "this host does not go down: nothing is saved"))
        return Saved()
    if wish.at_shutdown:
        systemd.notify("looking at what is to be saved", extend_s=budget_s + EXTEND_S)
    with _alone(store_root):
        for line in recover.sweep(store_root):
            emit(Notice("", line, warning=True))
        catalog = Catalog(store_root)
        earlier = Earlier.find(store_root, catalog, emit)
        try:
            targets = tuple(target for target in wish.targets if not earlier.has(target))
            made = Plan(Selection(()))
            if targets or not wish.targets:
                asked, leave = replace(wish, targets=targets), earlier.kept(wish)
                made = plan(asked, settings, catalog, emit, leave=leave)
                short = any(isinstance(error, NoSpace) for error in made.problems.values())
                if short and old.make_room(catalog, [(one.engine.name, one.container.name) for one in made.chosen.values()], emit):
                    made = plan(asked, settings, catalog, emit, leave=leave)
            if (refused := refusal(made)) is not None:
                if not wish.lenient:
                    raise refused
                for error in made.problems.values():
                    emit(Notice("", error.message, warning=True))
            hibernation = earlier.go_on(wish, made)
            if hibernation is None:
                return Saved(earlier.finished())
            with hibernation_of(hibernation):
                return _Saving(hibernation, made, wish, settings, catalog, emit, deadline_s, budget_s).run()
        finally:
            earlier.release()


@contextmanager
def hibernation_of(hibernation: Hibernation) -> Iterator[None]:
    """With one guard for all its jobs; its lock is given back at the end."""
    guard = recover.start_guard(hibernation)
    try:
        yield
    finally:
        recover.dismiss(guard)
        hibernation.release()


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """No other save of this host's at the same time."""
    above = place.hibernations(root)
    above.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(above / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError("another ckpt is saving this host", where="nothing was touched by this one", hint="ckpt hibernate status") from None
        yield
    finally:
        os.close(fd)


@dataclass(slots=True)
class _Saving:
    """One save on its way."""

    hibernation: Hibernation
    plan: Plan
    wish: Wish
    settings: HibernateSettings
    catalog: Catalog
    emit: Emit
    deadline_s: float
    budget_s: float
    halt: threading.Event = field(default_factory=threading.Event)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    ended: dict[str, Outcome] = field(default_factory=dict)
    """What does not run any more."""
    bundles: dict[str, list[str]] = field(default_factory=dict)
    """The targets of each work, by its label: one, or those of a group."""

    @property
    def width(self) -> int:
        return self.wish.parallel or self.settings.parallel_shutdown

    def run(self) -> Saved:
        todo = {target: one for target, one in self.plan.chosen.items() if one.action != "ignore"}
        try:
            self._all(todo)
            failed = [outcome for outcome in self.outcomes.values() if not outcome.ok]
            given_up = bool(failed) and not self.wish.lenient
            if failed and self.wish.at_shutdown and self.settings.on_failure == "stop":
                self._stop_the_rest([todo[outcome.target] for outcome in failed])
            if not given_up:
                faults.point("hibernate-all")
                self.hibernation.write(SAVED)
        except BaseException as error:
            if self.wish.at_shutdown:
                with suppress(OSError):
                    self.hibernation.write(SAVED, error=str(error)[: recover.ERROR_CAP] or type(error).__name__)
                raise
            said = self._back(error)
            if isinstance(said, StateUnknown) or isinstance(error, (CkptError, OSError)):
                raise said from error
            raise
        if given_up:
            raise self._back(failed[0].error)
        faults.point("hibernate-saved")
        if not self.wish.at_shutdown:
            old.forget(self.catalog, self.settings, [one.checkpoint for one in self.ended.values() if one.checkpoint], self.emit)
        systemd.notify(f"{sum(outcome.ok for outcome in self.outcomes.values())} of {len(todo)} workloads are saved")
        return Saved(self.hibernation.id, tuple(self.outcomes[target] for target in todo), not failed)

    def _all(self, todo: Mapping[str, Chosen]) -> None:
        """Everything, layer by layer; each has its outcome then."""
        self.hibernation.write("saving")
        faults.point("hibernate-saving")
        pods = sets.pod_units(one for one in todo.values() if one.action == "save") if systemd.running() else []
        for text in guards.guard_units([unit for item in self.plan.items() for unit in item.units if item.action == "save"], pods):
            self.emit(Notice("", text, warning=True))
        for target, error in self.plan.problems.items():
            self._failed(target, error)
        for target in self.plan.problems:
            for mate in self._mates(todo, target):
                if mate.target not in self.outcomes:
                    self._failed(mate.target, DumpFailed(f"{mate.target} was not saved: {target}, of its group {mate.group}, cannot be"))
        for layer in reversed(self.plan.layers):
            works: dict[str, Callable[[], list[Outcome]]] = {}
            for target in layer:
                if target in todo and target not in self.outcomes:
                    mates = self._mates(todo, target)
                    label = f"group {mates[0].group}" if len(mates) > 1 else target
                    self.bundles[label] = [mate.target for mate in mates]
                    works[label] = partial(self._together, mates) if len(mates) > 1 else partial(self._one, todo[target])
            for label, result in run_all(works, width=self.width, deadline_s=self.deadline_s, stop=self.halt, on_done=self._done).items():
                if isinstance(result, Dropped):
                    for target in self.bundles[label]:
                        self._failed(target, result, "dropped")
                elif isinstance(result, BaseException) and not isinstance(result, Exception):
                    raise result
            if self.halt.is_set():
                break
        for target in todo:
            if target not in self.outcomes:
                self._failed(target, Dropped("it was not begun: another one could not be saved"), "dropped")

    def _mates(self, todo: Mapping[str, Chosen], target: str) -> list[Chosen]:
        """Those that are saved at one instant with it, itself included: what is to be saved of its group."""
        mine = todo.get(target)
        if mine is None or mine.action != "save" or not mine.group:
            return [mine] if mine is not None else []
        return [one for one in todo.values() if one.group == mine.group and one.action == "save"]

    # -- one workload ----------------------------------------------------------------------------------------------------

    def _one(self, one: Chosen) -> list[Outcome]:
        began = time.monotonic()
        if one.action == "stop":
            return [self._stop(one)]
        limit_s = min(self.settings.save_timeout_s, max(1.0, self.deadline_s - began))
        self.hibernation.write("saving", item=one.target)
        faults.point("hibernate-one")
        looked = self.plan.looks[one.target]
        outcome = saving.save(
            one.engine, one.container, one.target, replace(looked.options, timeout_s=limit_s), self.catalog, self.emit, self._keep,
            looked=looked, guarded=False, flat_digests=False, raw=self.settings.memory == "raw",
        )  # fmt: skip
        return self._ended([outcome], began)

    def _together(self, members: Sequence[Chosen]) -> list[Outcome]:
        """A group: all of them, of one instant, or none."""
        began = time.monotonic()
        limit_s = min(self.settings.save_timeout_s, max(1.0, self.deadline_s - began))
        for one in members:
            self.hibernation.write("saving", item=one.target)
        faults.point("hibernate-one")
        found = [(one.target, one.engine, one.container) for one in members]
        told: dict[str, Outcome] = {}
        for outcome in save_group(
            found, members[0].group, DumpOptions(timeout_s=limit_s), self.catalog, self.emit, tags=(TAG,), check=self._verify
        ):
            told.setdefault(outcome.target, outcome)
        missing = DumpFailed(f"it was not saved: others of its group {members[0].group} could not be")
        return self._ended([told.get(one.target) or failure(one.target, missing) for one in members], began)

    def _ended(self, outcomes: list[Outcome], began: float) -> list[Outcome]:
        """The journal says of which there is a checkpoint instead."""
        saved = {outcome.target: outcome for outcome in outcomes if outcome.checkpoint is not None and outcome.error is None}
        self.ended |= saved
        if saved:
            faults.point("hibernate-ended")
        for target, outcome in saved.items():
            assert outcome.checkpoint is not None
            try:
                written(self.hibernation, target, outcome.checkpoint, total_s=round(time.monotonic() - began, 6))
            except OSError as error:  # the checkpoint is there, and found by whose it is and when it was made
                self.emit(Notice(target, f"saved, but the journal could not be written: {error.strerror}", warning=True))
            faults.point("hibernate-one-saved")
        return outcomes

    def _keep(self, draft: Draft, manifest: Manifest) -> tuple[Checkpoint | None, dict[str, float | int | str]]:
        """Into the store and, if asked, read back, and marked, while the workload could still go on.

        It is read back by its restore in any case, before anything is touched.
        """
        draft.tags = (TAG,)
        kept = draft.commit(manifest)
        try:
            self._verify(kept)
        except DumpFailed:
            with suppress(CkptError):
                self.catalog.remove(kept)
            raise
        return kept, {}

    def _verify(self, kept: Checkpoint) -> None:
        """Read it back, if asked. Raises DumpFailed."""
        if self.wish.verify and (problems := self.catalog.check(kept)):
            raise DumpFailed(f"{kept.ref} was not stored as it was made: {problems[0]}", hint="look at the disk (dmesg), or name another store")

    def _stop(self, one: Chosen) -> Outcome:
        assert isinstance(one.engine, Startable)
        began = time.monotonic()
        self.emit(StepStarted(one.target, "stop"))
        self.hibernation.write("stopping", item=one.target)
        one.engine.stop(one.container, min(self.settings.stop_timeout_s, max(1.0, self.deadline_s - began)))
        outcome = self.ended[one.target] = Outcome(one.target, True, container=one.container)
        self.hibernation.write("stopped", item=one.target, total_s=round(time.monotonic() - began, 6))
        self.emit(StepDone(one.target, "stop", "", time.monotonic() - began))
        return outcome

    def _done(self, label: str, result: list[Outcome] | BaseException) -> None:
        """In the worker's thread, as each work is over."""
        for number, target in enumerate(self.bundles[label]):
            self._told(target, result if isinstance(result, BaseException) else result[number])

    def _told(self, target: str, result: Outcome | BaseException) -> None:
        if isinstance(result, Outcome) and result.ok:
            self.outcomes[target] = result
            if self.wish.at_shutdown:
                left_s = max(0.0, self.deadline_s - time.monotonic())
                systemd.notify(f"{len(self.ended)} saved, {target} was the last", extend_s=left_s + EXTEND_S)
            self._journald(target, result)
            return
        error = result.error if isinstance(result, Outcome) else result
        if not isinstance(error, Exception):
            self.halt.set()  # an interruption of this thread alone: the tests' faults
        said = error if isinstance(error, CkptError) else CkptError(f"{target}: {error or type(error).__name__}")
        self._failed(target, said)
        if not self.wish.lenient:
            self.halt.set()

    def _failed(self, target: str, error: CkptError, state: str = "save-failed") -> None:
        self.outcomes[target] = failure(target, error)
        with suppress(OSError):
            self.hibernation.write(state, item=target, error=error.to_json())
        if state == "save-failed":
            said = f"{target} could not be saved: {error.message}"
            journald.tell(said, phase="hibernate", result="failed", id=self.hibernation.id, target=target, error=error.message, priority=3)

    def _journald(self, target: str, outcome: Outcome) -> None:
        how = "saved" if outcome.checkpoint is not None else "stopped"
        freeze_s = outcome.stats.get("freeze_s")
        journald.tell(
            f"{target} is {how}",
            phase="hibernate",
            result=how,
            id=self.hibernation.id,
            target=target,
            checkpoint=outcome.checkpoint.manifest.id if outcome.checkpoint is not None else "",
            freeze_s=float(freeze_s) if isinstance(freeze_s, float) else None,
        )

    # -- what fails ------------------------------------------------------------------------------------------------------

    def _stop_the_rest(self, failed: Sequence[Chosen]) -> None:
        """At a shutdown: what could not be saved at least ends in order."""
        for one in failed:
            if isinstance(one.engine, Startable):
                try:
                    one.engine.stop(one.container, self.settings.stop_timeout_s)
                except CkptError as error:
                    self.emit(Notice(one.target, error.message, warning=True))

    def _back(self, error: BaseException | None) -> CkptError:
        """Bring back what this save has ended; returns what to raise for a failure."""
        names = self.ended
        lost: dict[str, CkptError] = {}
        with recover.uninterrupted():
            checkpoints = {target: one.checkpoint for target, one in names.items() if one.checkpoint is not None}
            together = sets.whole(self.catalog.root, checkpoints)
            units = [unit for item in self.plan.items() for unit in item.units]
            pods = tuple(sets.start_pods(checkpoints.values(), self.emit, hold=units).items())
            shared = sets.shared_volumes(checkpoints.values())
            options = RestoreOptions(timeout_s=self.settings.restore_timeout_s, kept_volumes=shared, pods=pods)
            back: set[str] = set()
            for layer in self.plan.layers:
                for ref in [ref for ref, members in together.items() if set(layer) & set(members)]:
                    back |= self._back_together(ref, together.pop(ref), options)
                works = {target: partial(self._back_one, names[target], options) for target in layer if target in names and target not in back}
                for target, result in run_all(works, width=self.width).items():
                    if isinstance(result, BaseException):
                        said = result if isinstance(result, CkptError) else CkptError(f"{target}: {result or type(result).__name__}")
                        lost[target] = said
                        with suppress(OSError):
                            self.hibernation.write("failed", item=target, error=said.to_json())
            guards.unguard_units([*units, *sets.pod_units(self.plan.chosen.values())] if systemd.running() else units)
            # What an earlier save had ended waits on: it is to come back after the next boot, or by a resume.
            waits = any(state.state in ITEM_SAVED for target, state in self.hibernation.states().items() if target not in names)
            with suppress(OSError):
                self.hibernation.write(SAVED if waits else "abandoned", error=str(error)[: recover.ERROR_CAP] or type(error).__name__)
        failed = [outcome for outcome in self.outcomes.values() if outcome.error is not None and not isinstance(outcome.error, Dropped)]
        listed = "; ".join(outcome.error.message for outcome in failed if outcome.error is not None) or str(error)
        if lost:
            refs = ", ".join(f"{target} ({names[target].checkpoint.ref})" for target in lost if names[target].checkpoint)  # type: ignore[union-attr]
            return StateUnknown(
                f"saving failed ({listed}), and so did bringing back {', '.join(lost)}: {next(iter(lost.values())).message}",
                where=f"not running: {refs or ', '.join(lost)}; all others run",
                hint="ckpt restore brings back what is in the store",
            )
        first = failed[0].error if failed else None
        where = f"all workloads run as before ({len(names)} were saved already, and brought back)" if names else "all workloads run on"
        hint, log = (first.hint, first.log) if first else (None, None)
        return DumpFailed(listed, where=where, hint=hint or "mend that, or give --best-effort", log=log)

    def _back_one(self, outcome: Outcome, options: RestoreOptions) -> None:
        one = self.plan.chosen[outcome.target]
        if outcome.checkpoint is None:
            assert isinstance(one.engine, Startable)
            one.engine.start(one.container)
            with suppress(OSError):
                self.hibernation.write("cold", item=outcome.target)
            return
        found = restoring.restore([outcome.checkpoint.manifest.id], options=options, store_root=self.catalog.root, emit=self.emit)[0]
        if found.error is not None:
            raise found.error
        with suppress(OSError):
            self.hibernation.write("restored", item=outcome.target)

    def _back_together(self, ref: str, members: Mapping[str, Checkpoint], options: RestoreOptions) -> set[str]:
        """Bring back a group; returns those that are back (each of the others is tried by itself then)."""
        after = {target: set(self.plan.after.get(target, ())) & set(members) for target in members}
        try:
            outcomes = restore_group(members, ref.partition("@")[0], options, self.catalog, self.emit, after=after)
        except CkptError as error:
            self.emit(Notice("", f"group {ref}: {error.message}", warning=True))
            return set()
        back = {outcome.target for outcome in outcomes if outcome.ok}
        for target in back:
            with suppress(OSError):
                self.hibernation.write("restored", item=target)
        return back
