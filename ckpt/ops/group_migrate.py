"""A group moves to another host: all of its members or none.

Each member is a migration of its own (`migrate.Attempt`) over a link of its own; here their steps are taken together. All are checked,
then sent ahead, frozen at one instant, dumped held, sent, and restored there, held. Then one line in the journal of the group's job here,
and one in that of the group's job there, decide for all: without the first the sources go on, and without the second the destination
drops what it has. After the second all run there, whoever dies; what is left to do here `--continue` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final, NoReturn, TypeVar

from ckpt.archive import manifest as manifest_file
from ckpt.criu import action, cgroupimage
from ckpt.engines.registry import NamedEngine
from ckpt.errors import (
    BusyError,
    CkptError,
    FeatureMissing,
    MigrationRolledBack,
    NeedsContinue,
    StateUnknown,
    TargetNotFound,
    TransferFailed,
    UsageError,
)
from ckpt.events import Emit, Notice
from ckpt.model import Container, DumpOptions, Manifest, Target
from ckpt.ops import capture, faults, groupjob, instant, knobs, parallel, recover, statistics, together
from ckpt.ops import members as member
from ckpt.ops.migrate import ASK_LIMIT_S, Attempt, MigrateOptions
from ckpt.ops.migrate_end import ask_destination, continue_
from ckpt.ops.result import Outcome, failure
from ckpt.peer import client, inherited
from ckpt.peer.client import Peer
from ckpt.store import groups, place
from ckpt.store.catalog import Catalog
from ckpt.store.job import DEFAULT_ROOT, Job

DECIDE_LIMIT_S: Final = 60.0
T = TypeVar("T")


def plan(name: str, destination: str) -> list[tuple[str, str]]:
    """The steps as (name, what it does) for --dry-run."""
    return [
        ("check", f"look at each member of {name} here and at {destination}; nothing is touched"),
        ("begin", "open a journal for each, and for the group, on both hosts"),
        ("container-image", "bring the container images along that are missing there"),
        ("files", "send root file systems and volumes while all run"),
        ("dump", "freeze all at one instant and dump them, held; their memory is sent meanwhile"),
        ("transfer", "send the rest of the checkpoints, digests compared"),
        ("restore", "restore all there, held, in the order of their dependencies"),
        ("commit", "journal the point of no return, here and there, for all of them"),
        ("resume", "let them run there, in that order"),
        ("end", "end the frozen sources"),
    ]


def migrate_group(
    name: str, targets: Sequence[Target], destination: str, *, options: MigrateOptions, store_root: Path = DEFAULT_ROOT, emit: Emit
) -> list[Outcome]:
    """Move what the user named, or what belongs to the group by its labels, to another host.

    Returns:
        An outcome for each member. When it failed before the decision, first those that are the cause; then all run on here.

    Raises:
        UsageError: the options, the group or its order make no sense; nothing was touched.
        CkptError: nothing could be begun at all.
        KeyboardInterrupt: after all were brought back to running.
    """
    groups.check_name(name)
    refuse(options, destination)
    client.parse(destination)
    for line in recover.sweep(store_root):
        emit(Notice("", line, warning=True))
    chosen = [(label, engine, engine.describe(container)) for label, engine, container in member.chosen(name, targets)]
    after = member.order(chosen)
    refuse_members(chosen, options)
    return _Moving(chosen, name, after, destination, options, store_root, emit).run()


def refuse(options: MigrateOptions, destination: str) -> None:
    """Raise UsageError for what is for single workloads only."""
    given: dict[str, Any] = {"--precopy": options.precopy, "--postcopy": options.postcopy, "--lazy": options.lazy, "--name": options.name}
    given |= {"--publish": options.publish, "--stdio": destination == inherited.DESTINATION and not inherited.several()}
    wrong = [word for word, value in given.items() if value]
    if wrong:
        hint = "a group is frozen, sent and resumed as a whole; migrate its members one by one for that"
        raise UsageError(f"{' and '.join(wrong)} cannot be used with --group", where="nothing was touched", hint=hint)


def refuse_members(members: Sequence[member.Found], options: MigrateOptions) -> None:
    """Raise UsageError for members that cannot be moved together."""
    member.refuse_joined(members)
    volumes: dict[str, str] = {}
    for label, _, container in members:
        if container.pod:
            raise UsageError(f"{label} is in a pod, which cannot be migrated", where="nothing was touched")
        for volume in () if options.ignore_volumes else container.volumes:
            if volumes.setdefault(volume.name, label) != label:
                message = f"{label} and {volumes[volume.name]} have the volume {volume.name} in common, which cannot be moved with both"
                raise UsageError(message, where="nothing was touched", hint="--ignore-volumes, with the volume made there beforehand")


class _Member(Attempt):
    """One of them: the steps of its migration, as the group takes them."""

    def __init__(
        self,
        typed: str,
        engine: NamedEngine,
        container: Container,
        destination: str,
        options: MigrateOptions,
        root: Path,
        history: statistics.Migration,
    ) -> None:
        super().__init__(typed, engine, container, destination, options, root, history)
        self.engine: NamedEngine = engine
        self.history = history
        self.links = ExitStack()
        self.peer: Peer | None = None
        self.report: dict[str, Any] = {}
        self.dump_options = DumpOptions()
        self.manifest: Manifest | None = None
        self.all_told = False
        """All of the group were told to run there."""

    @property
    def journal(self) -> Job:
        assert self.job is not None
        return self.job

    @property
    def there(self) -> Peer:
        assert self.peer is not None
        return self.peer

    def look(self) -> None:
        """All that can be known beforehand; the link stands afterwards."""
        self.dump_options, self.peer, self.report = self.check(self.links)

    def start(self, group_id: str, begin_args: Mapping[str, Any]) -> None:
        """Open the journals."""
        self.job_facts, self.begin_args = {action.GROUP: group_id}, dict(begin_args)
        self.begin(self.there)
        if not self.begun_there.get(action.GROUP):
            raise FeatureMissing(f"ckpt on {self.peer_name} cannot take a group", hint="install the same version of ckpt on both hosts")

    def ahead(self) -> None:
        """What can be sent while it runs."""
        self.files_ahead(self.there)
        self.host = capture.host_facts()
        self.hooks.before("pre-checkpoint")

    def hold(self, *, stopped_at_s: float | None = None) -> None:
        """Dump it, held, and send it."""
        self.stopped_at_s = stopped_at_s
        self.manifest = self.dump_and_send(self.there, self.dump_options, self.host)

    def dumped(self) -> None:
        if self.stopped_at_s is not None and self.draft is not None:
            cgroupimage.thaw(self.draft.stage / "checkpoint")

    def restore(self) -> None:
        """Restore it there, held."""
        assert self.manifest is not None
        self.step("restore")
        args = {"manifest": manifest_file.dumps(self.manifest).decode(), **self.restore_args()}
        self.there.call("restore", args, timeout_s=self.options.timeout_s)
        self.done("restore", "held there")

    def let_go(self) -> None:
        super().let_go()
        if self.job is not None:
            knobs.restore(self.job)  # CRIU leaves a cgroup frozen that it found frozen

    def ask(self, cause: CkptError) -> None:
        if not self.all_told:
            raise cause  # the others first: podman there may not answer as long as one of them is held
        super().ask(cause)

    def refused(self, error: CkptError) -> NoReturn:
        """Others of the group may run there already: it stays frozen until somebody decides."""
        raise NeedsContinue(
            f"{self.destination} did not take over: {error.message}",
            where=f"{self.container.name} is frozen here; others of its group may run on {self.destination}",
            hint=f"to let it go on here: ckpt migrate --continue {self.journal.id}",
        )

    def abandon(self, error: BaseException) -> BaseException:
        """Undo both ends, before the decision; returns what is to be told."""
        begun = self.job is not None
        if self.peer is not None and begun:
            with suppress(CkptError):
                self.peer.call("abort", timeout_s=60)
        self.memory.give_up()
        self.give_up(error)
        if not isinstance(error, CkptError) or not begun or isinstance(error, StateUnknown):
            return error
        rolled = MigrationRolledBack(f"{self.container.name} was not migrated: {error.message}", where=error.where, hint=error.hint, log=error.log)
        rolled.__cause__ = error
        return rolled

    def cut(self) -> None:
        """End the link, so that the destination knows that nothing more will come over it."""
        if self.peer is not None:
            self.peer.close(goodbye=False)

    def leave(self, error: BaseException | None) -> None:
        """Close the link."""
        with suppress(BaseException):
            self.links.__exit__(type(error) if error is not None else None, error, None)


class _Moving:
    """A group on its way to another host."""

    def __init__(
        self,
        found: Sequence[member.Found],
        name: str,
        after: Mapping[str, set[str]],
        destination: str,
        options: MigrateOptions,
        root: Path,
        emit: Emit,
    ) -> None:
        self.name, self.destination, self.options, self.root = name, destination, options, root
        self.emit = together.one_at_a_time(emit)
        self.failed: dict[str, BaseException] = {}
        self.members: dict[str, _Member] = {}
        labels = {container.id: label for label, _, container in found}
        self.waves = [[labels[identity] for identity in wave] for wave in member.waves(after, labels)]
        single = replace(options, lazy=False)  # nothing is left to come behind it when it is resumed there
        for label, engine, container in found:
            history = statistics.Migration(label, destination, statistics.mode_of(options), root, self.emit)
            history.begin(container)
            self.members[label] = _Member(label, engine, container, destination, single, root, history)
        self.lead = next(iter(self.members.values()))
        self.skew_s = 0.0

    def run(self) -> list[Outcome]:
        own: together.GroupJob | None = None
        error: BaseException | None = None
        try:
            self._do({label: one.look for label, one in self.members.items()})
            own = together.GroupJob(Catalog(self.root), groupjob.MIGRATE, self.name, destination=self.destination)
            self._begin(own)
            self._do(self._images())
            self._do({label: one.ahead for label, one in self.members.items()})
            moment, _ = instant.hold(self.name, self.members, self._do)
            self.skew_s = round(moment.skew_s, 6)
            faults.point("migrate-group-held")
            for wave in self.waves:
                self._do({label: self.members[label].restore for label in wave})
            faults.point("migrate-group-restored")
            with recover.uninterrupted():
                self._decide(own)
                outcomes = self._switch_over()
                own.over()
            return outcomes
        except BaseException as broken:
            error = broken
            if own is not None and recover.committed(own.job):
                return self._left(own, broken)
            return self._undo(own, broken)
        finally:
            for one in self.members.values():
                one.leave(error)

    def _do(self, works: Mapping[str, Callable[[], T]]) -> None:
        """Do it for all at once. Raises together.Failed when one of them failed, KeyboardInterrupt after all are through."""
        together.settle(parallel.run_all(works, width=max(1, len(works))), self.failed)

    def _begin(self, own: together.GroupJob) -> None:
        self._do({self.lead.typed: partial(self.lead.start, own.id, {"group": self.name})})
        own.job.write("begun", jobs=[self.lead.journal.id])
        identity = self.lead.begun_there[action.GROUP]
        others = {label: one for label, one in self.members.items() if one is not self.lead}
        try:
            self._do({label: partial(one.start, own.id, {action.GROUP: identity}) for label, one in others.items()})
        finally:
            own.job.write("begun", jobs=[one.job.id for one in self.members.values() if one.job is not None])

    def _images(self) -> dict[str, Callable[[], None]]:
        """Each container image goes over once."""
        works: dict[str, Callable[[], None]] = {}
        seen: set[str] = set()
        for label, one in self.members.items():
            image = one.container.container_image
            if image is None or image.id not in seen:
                works[label] = partial(one.bring_container_image, one.there, one.report)
            if image is not None:
                seen.add(image.id)
        return works

    # -- the decision

    def _decide(self, own: together.GroupJob) -> None:
        """One line here, one there. Raises when the destination has dropped all of them, NeedsContinue when that is not known."""
        for one in self.members.values():
            one.step("commit")
        faults.point("migrate-group-commit")
        own.job.write("commit")
        faults.point("migrate-group-committed")
        jobs = [one.journal.facts["remote_job"] for one in self.members.values()]
        try:
            self.lead.there.call("group-commit", {"jobs": jobs}, timeout_s=DECIDE_LIMIT_S)
        except TransferFailed as error:
            self._ask(own, error)
        except CkptError:
            own.job.write("failed")  # it has said that it never will
            raise
        faults.point("migrate-group-decided")
        for one in self.members.values():
            one.committed = True
            one.journal.write("commit")

    def _ask(self, own: together.GroupJob, cause: CkptError) -> None:
        """The link was lost at the decision: the destination's journal has it. Returns when they run there."""
        for one in self.members.values():
            one.cut()
        deadline_s = time.monotonic() + ASK_LIMIT_S
        while True:
            states = [_state(one.journal) for one in self.members.values()]
            if "running" in states:
                return
            if all(state == "failed" for state in states):
                own.job.write("failed")
                raise TransferFailed(f"lost the link to {self.destination} at the switchover, before it took over: {cause.message}")
            if time.monotonic() > deadline_s:
                raise NeedsContinue(
                    f"no answer from {self.destination} after the point of no return: {cause.message}",
                    where=f"the members of {self.name} are frozen here, and may be running on {self.destination}",
                    hint=f"when {self.destination} can be reached again: ckpt migrate --continue {own.id}",
                )
            time.sleep(0.2)

    def _switch_over(self) -> list[Outcome]:
        """All run there, in their order; then all end here. What goes wrong now is that member's own misfortune."""
        broken: dict[str, BaseException] = {}

        def each(labels: Sequence[str], step: Callable[[_Member], None]) -> None:
            works = {label: partial(step, self.members[label]) for label in labels if label not in broken}
            results = parallel.run_all(works, width=max(1, len(works)))
            broken.update({label: result for label, result in results.items() if isinstance(result, BaseException)})

        def resume_again(one: _Member) -> None:
            one.all_told = True
            one.cut()  # the answer will not come any more
            one.resume_there(one.there)

        for wave in self.waves:
            each(wave, lambda one: one.resume_there(one.there))
        unanswered = [label for label, error in broken.items() if isinstance(error, TransferFailed)]
        for label in unanswered:
            del broken[label]
        each(unanswered, resume_again)
        faults.point("migrate-group-resumed")
        each(list(self.members), lambda one: one.end_here())
        # The first one is the group's on the destination: it is told last.
        each([label for label, one in self.members.items() if one is not self.lead], lambda one: one.tell_there(one.there))
        each([self.lead.typed], lambda one: one.tell_there(one.there))
        outcomes = []
        for label, one in self.members.items():
            if (error := broken.get(label)) is not None:
                one.give_up(error)
                if not isinstance(error, CkptError):
                    raise error
                outcomes.append(one.history.close(failure(label, self._waits(one, error))))
                continue
            stats = {**one.stats, **one.memory.stats, "group": self.name, "group_skew_s": self.skew_s}
            outcomes.append(one.history.close(Outcome(label, True, container=one.container, warnings=tuple(one.hooks.warnings), stats=stats)))
        return outcomes

    def _waits(self, one: _Member, error: CkptError) -> CkptError:
        if isinstance(error, NeedsContinue | StateUnknown):
            return error
        where = f"{one.container.name} is frozen here, and may be running on {self.destination}"
        return NeedsContinue(error.message, where=where, hint=f"ckpt migrate --continue {one.journal.id}", log=error.log)

    def _left(self, own: together.GroupJob, error: BaseException) -> list[Outcome]:
        """It has been decided here, and something broke: nobody goes on by itself."""
        for one in self.members.values():
            one.committed = True
            one.give_up(error)
        own.job.release()
        if not isinstance(error, CkptError):
            raise error
        return [one.history.close(failure(label, self._waits(one, error))) for label, one in self.members.items()]

    def _undo(self, own: together.GroupJob | None, error: BaseException) -> list[Outcome]:
        cause = next((label for label in self.failed if label), "")
        reason = error.message if isinstance(error, CkptError) else f"{cause or 'the group'} could not be" if self.failed else str(error)
        with recover.uninterrupted():
            works = {
                label: partial(one.abandon, self.failed.get(label, together.NotAlone(f"it was not moved: {reason}")))
                for label, one in self.members.items()
            }
            said = parallel.run_all(works, width=max(1, len(works)))
            if own is not None:
                own.withdraw(error)
        if not isinstance(error, CkptError | together.Failed):
            for one in self.members.values():
                one.history.broken_off(error)
            raise error
        outcomes = []
        for label in dict.fromkeys([*(label for label in self.failed if label), *self.members]):
            told = said[label]
            if not isinstance(told, CkptError):
                assert isinstance(told, BaseException)
                raise told
            outcomes.append(self.members[label].history.close(failure(label, told)))
        return outcomes


def _state(job: Job) -> str:
    try:
        return ask_destination(job).state
    except CkptError:
        return "undecided"


def continue_group(job_id: str, *, store_root: Path = DEFAULT_ROOT, emit: Emit) -> list[Outcome] | None:
    """Finish every member of a group whose migration was cut after its point of no return; None when that is no group's job.

    Raises:
        TargetNotFound, BusyError: there is nothing to finish, or it is under way.
    """
    own = Job(place.jobs(store_root) / job_id)
    if "/" in job_id or own.facts.get("kind") != groupjob.MIGRATE:
        return None
    if not own.acquire():
        raise BusyError(f"migration {job_id} is under way")
    own.release()
    waiting = [identity for identity in map(str, own.facts.get("jobs", ())) if (place.jobs(store_root) / Path(identity).name).is_dir()]
    outcomes = [continue_(identity, store_root=store_root, emit=emit) for identity in waiting]
    recover.sweep(store_root)
    if not outcomes:
        raise TargetNotFound(f"no member of {job_id} waits here")
    return outcomes
