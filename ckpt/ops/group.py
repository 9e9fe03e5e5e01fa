"""Groups: workloads that are saved, and come back, together. All of them or none.

Saving: every member is looked at, then all are frozen at one instant (`host.freezer`), then CRIU dumps them side by side, each held at its
post-dump; when all checkpoints are in the store, one line in the journal of the group's job decides for all of them. Until then whatever
goes wrong lets all of them go on and leaves nothing in the store; after it all end. Coming back is the same the other way round.
"""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from ckpt.archive import trust
from ckpt.criu import tree
from ckpt.engines.registry import NamedEngine
from ckpt.errors import CkptError, DumpFailed, NoSpace, RestoreFailed, TargetNotFound, UsageError
from ckpt.events import Emit, Event, Notice
from ckpt.host import freezer
from ckpt.host.cgroup import Knob, NotOwn
from ckpt.host.run import Process
from ckpt.model import Checkpoint, Container, DumpOptions, Manifest, RestoreOptions, Target
from ckpt.ops import checkpoint as saving
from ckpt.ops import faults, groupjob, knobs, parallel, recover, resolve, warm
from ckpt.ops import restore as restoring
from ckpt.ops.result import Outcome, failure
from ckpt.store import groups
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.job import DEFAULT_ROOT, Job
from ckpt.store.place import jobs as jobs_place

Found = tuple[str, NamedEngine, Container]
"""A member: its label (what was typed), its engine, the container fully described."""

LABEL: Final = "ckpt.group"
AFTER: Final = "ckpt.after"
PROJECT: Final = ("io.podman.compose.project", "com.docker.compose.project")
_SERVICE: Final = ("io.podman.compose.service", "com.docker.compose.service")
_DEPENDS: Final = ("io.podman.compose.depends_on", "com.docker.compose.depends_on")
STOP_LIMIT_S: Final = 60.0
"""How long CRIU may take to freeze those members that have no cgroup of their own."""
_POLL_S: Final = 0.001
T = TypeVar("T")


# -- who belongs to a group ----------------------------------------------------------------------------------------------------


def members_of(name: str) -> list[Found]:
    """The running containers that say by a label that they are of this group, or of a compose project of this name.

    Raises:
        TargetNotFound: there are none.
    """
    found = [(engine, c) for engine, c in resolve.all_running() if name in (c.labels.get(LABEL), *(c.labels.get(key) for key in PROJECT))]
    if not found:
        hint = f"name its containers, or give them the label {LABEL}={name}"
        raise TargetNotFound(f"no running container is of the group {name!r}", hint=hint)
    return [(c.name or c.id, engine, c) for engine, c in found]


def order(members: Sequence[Found]) -> dict[str, set[str]]:
    """Of each member (its container's id) those of the group that come back before it.

    What a container requires of podman, its label `ckpt.after`, and compose's `depends_on` say so; names that are not of the group are
    no matter here.

    Raises:
        UsageError: they wait for each other.
    """
    by_word: dict[str, set[str]] = {}
    for _, _, c in members:
        project = next((c.labels[key] for key in PROJECT if key in c.labels), "")
        service = next((c.labels[key] for key in _SERVICE if key in c.labels), "")
        for word in {c.id, c.name, *([f"{project}/{service}"] if service else [])}:
            by_word.setdefault(word, set()).add(c.id)
    after: dict[str, set[str]] = {}
    for _, _, c in members:
        project = next((c.labels[key] for key in PROJECT if key in c.labels), "")
        depends = next((c.labels[key] for key in _DEPENDS if key in c.labels), "")
        words = [*c.requires, *c.labels.get(AFTER, "").split(",")]
        # docker compose writes SERVICE:CONDITION:RESTART,...; podman-compose the services alone.
        words += [f"{project}/{one.partition(':')[0].strip()}" for one in depends.split(",") if one.strip()]
        after[c.id] = set().union(*(by_word.get(word.strip(), set()) for word in words)) - {c.id}
    _sorted(after, {c.id: label for label, _, c in members})
    return after


def _sorted(after: Mapping[str, Collection[str]], labels: Mapping[str, str] | None = None) -> list[list[str]]:
    """The members in waves: each only after all of those before it. Raises UsageError for a circle."""
    sorter = TopologicalSorter({key: set(before) for key, before in after.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " after ".join((labels or {}).get(key, key) for key in reversed(error.args[1]))
        message = f"these members wait for each other: {circle}"
        raise UsageError(message, where="nothing was touched", hint=f"look at their labels {AFTER}") from None
    waves = []
    while sorter.is_active():
        waves.append(sorted(sorter.get_ready()))
        sorter.done(*waves[-1])
    return waves


# -- saving --------------------------------------------------------------------------------------------------------------------


def checkpoint_group(
    name: str,
    targets: Sequence[Target] = (),
    *,
    options: DumpOptions,
    store_root: Path = DEFAULT_ROOT,
    emit: Emit,
    tags: Sequence[str] = (),
    note: str = "",
    outgoing: trust.Outgoing = trust.OPEN,
) -> list[Outcome]:
    """`save_group` of what the user named; without targets of those that belong to the group by their labels.

    Raises:
        CkptError: nothing could be begun at all.
        KeyboardInterrupt: after all of them were brought back to running.
    """
    groups.check_name(name)
    warm.imports(*warm.INTO_CHUNKS)
    for line in recover.sweep(store_root):
        emit(Notice("", line, warning=True))
    if targets:
        found: dict[tuple[str, str], Found] = {}
        for target in targets:
            engine, container = resolve.resolve(target)
            found.setdefault((engine.name, container.id), (str(target), engine, container))
        members = list(found.values())
    else:
        members = members_of(name)
    return save_group(members, name, options, Catalog(store_root), emit, tags=tags, note=note, outgoing=outgoing)


def save_group(
    members: Sequence[Found],
    name: str,
    options: DumpOptions,
    catalog: Catalog,
    emit: Emit,
    *,
    tags: Sequence[str] = (),
    note: str = "",
    outgoing: trust.Outgoing = trust.OPEN,
) -> list[Outcome]:
    """Save all members at one instant, as one set, and end them (or not: `options.leave_running`).

    Args:
        tags: of each checkpoint, besides the group's own.

    Returns:
        An outcome for each member. When it failed, first those that are the cause; then nothing is in the store and all run on.

    Raises:
        UsageError: the group, or its order, makes no sense; nothing was touched.
        CkptError: the group's own job could not be made.
        KeyboardInterrupt: after all of them were brought back to running.
    """
    groups.check_name(name)
    if not members:
        raise UsageError(f"the group {name!r} has no members")
    after = order(members)
    _refuse_joined(members)
    return _Saving(members, name, after, options, catalog, emit, (groups.tag(name), *tags), note, outgoing).run()


def _refuse_joined(members: Sequence[Found]) -> None:
    """Podman restores a container that shares another's namespaces only beside that one as it runs, so the two cannot be held together."""
    names = {c.id: label for label, _, c in members}
    for label, _, container in members:
        for other in container.requires:
            if other in names:
                raise UsageError(
                    f"{label} shares namespaces with {names[other]}, or requires it: podman cannot restore the two together",
                    where="nothing was touched",
                    hint="save it by itself, or give both a network of their own",
                )


class _Job:
    """The group's own job, and its guard."""

    def __init__(self, catalog: Catalog, kind: Literal["checkpoint-group", "restore-group"], name: str, **facts: Any) -> None:
        self.root = catalog.root
        self.job = Job.create(catalog.root, kind, name=name, **facts)
        self.guard: Process | None = recover.start_guard(self.job)

    @property
    def id(self) -> str:
        return self.job.id

    def withdraw(self, error: BaseException) -> None:
        """Every member is undone."""
        groupjob.withdraw(self.root, self.job.facts)
        self.job.write("rolled-back", error=str(error)[: recover.ERROR_CAP])
        recover.close(self.job, self.guard)

    def over(self) -> None:
        """Every member is through; or it is left to the guards, which look at this job's journal."""
        if any((jobs_place(self.root) / identity).is_dir() for identity in self.job.facts.get("jobs", ())):
            self.job.release()
            return
        self.job.write("done")
        recover.close(self.job, self.guard)


class _Saving:
    """A group on its way into the store."""

    def __init__(
        self,
        members: Sequence[Found],
        name: str,
        after: Mapping[str, set[str]],
        options: DumpOptions,
        catalog: Catalog,
        emit: Emit,
        tags: tuple[str, ...],
        note: str,
        outgoing: trust.Outgoing,
    ) -> None:
        self.members, self.name, self.after, self.options, self.catalog = members, name, after, options, catalog
        self.emit = _one_at_a_time(emit)
        self.tags, self.note, self.outgoing = tags, note, outgoing
        self.signing = threading.Lock()
        self.attempts: dict[str, saving.Attempt] = {}
        """By label; what is here has a job."""
        self.failed: dict[str, BaseException] = {}
        """By label, "" for the group: why it is undone."""
        self.moment: freezer.Moment | None = None

    def run(self) -> list[Outcome]:
        with self.catalog.storage("number a group"), self.catalog.locked():
            self.generation = self.catalog.number(groups.tag(self.name))
        own = _Job(self.catalog, groupjob.SAVE, self.name, generation=self.generation, leave_running=self.options.leave_running)
        try:
            self._do("prepared", {label: partial(self._prepare, own, *found) for found in self.members for label in found[:1]})
            own.job.write("dumping", jobs=[attempt.job.id for attempt in self.attempts.values()])
            self._do("begun", {label: attempt.begin for label, attempt in self.attempts.items()})
            self._hold()
            faults.point("group-held")
            if self.options.leave_running:
                self._do("going on", {label: attempt.go_on for label, attempt in self.attempts.items()})
                freezer.thaw(self.knobs)
                self._do("gone on", {label: attempt.gone_on for label, attempt in self.attempts.items()})
            self._do("kept", {label: partial(attempt.keep, self._keep) for label, attempt in self.attempts.items()})
            faults.point("group-stored")
            groupjob.propose(self.catalog.root, self._record())
            with recover.uninterrupted():
                own.job.write("commit")
                faults.point("group-commit")
                groupjob.publish(self.catalog.root, own.job.facts)
                faults.point("group-recorded")
                outcomes = self._finish()
                own.over()
            return outcomes
        except BaseException as error:
            if recover.committed(own.job):
                own.job.release()  # its guard goes on from here
                raise
            return self._undo(own, error)

    def _prepare(self, own: _Job, label: str, engine: NamedEngine, container: Container) -> None:
        self.attempts[label] = saving.prepare(engine, container, label, self.options, self.catalog, self.emit, group_job=own.id)

    def _do(self, what: str, works: Mapping[str, Callable[[], T]]) -> None:
        """Do it for all at once. Raises _Failed when one of them failed, KeyboardInterrupt after all are through."""
        _raise(parallel.run_all(works, width=len(works)), self.failed)

    # -- the instant

    def _hold(self) -> None:
        """Freeze all at one instant and dump them, held.

        Those with a cgroup of their own, of engines that dump what is frozen, are stopped by it. The others are stopped by CRIU as it
        begins to dump them, so those begin first, and the cgroups are frozen as soon as they stand still.
        """
        self.knobs: list[Knob] = []
        slow: dict[str, saving.Attempt] = {}
        for label, attempt in self.attempts.items():
            knob = _knob(attempt)
            if knob is None:
                slow[label] = attempt
            else:
                knobs.journal(attempt.job, knob)
                self.knobs.append(knob)
        faults.point("group-freezing")
        stopped, over = threading.Event(), threading.Event()
        ended: set[str] = set()

        def dump_slow(label: str, attempt: saving.Attempt) -> None:
            try:
                attempt.hold()
            finally:
                ended.add(label)

        def conduct() -> None:
            try:
                times = _wait_stopped(slow, ended)
                cgroups = freezer.freeze(self.knobs) if self.knobs else None
                first = min([*(before for before, _ in times), *([cgroups.first_s] if cgroups else [])])
                last = max([*(seen for _, seen in times), *([cgroups.last_s] if cgroups else [])])
                self.moment = freezer.Moment(first, last)
                stopped.set()
            except freezer.NotFrozen as error:
                raise DumpFailed(f"the group {self.name} cannot be frozen: {error}") from error
            finally:
                over.set()

        def dump_frozen(attempt: saving.Attempt) -> None:
            over.wait(STOP_LIMIT_S + freezer.LIMIT_S)
            if not stopped.is_set() or self.moment is None:
                raise _NotAlone("the group could not be frozen")
            attempt.hold(stopped_at_s=self.moment.first_s)

        works: dict[str, Callable[[], None]] = {label: partial(dump_slow, label, attempt) for label, attempt in slow.items()}
        works[""] = conduct
        works |= {label: partial(dump_frozen, attempt) for label, attempt in self.attempts.items() if label not in slow}
        self._do("held", works)

    # -- the decision

    def _keep(self, draft: Draft, manifest: Manifest) -> tuple[Checkpoint | None, dict[str, float | int | str]]:
        draft.tags, draft.note, draft.group = self.tags, self.note, f"{self.name}@{self.generation}"
        signer = self.outgoing.signer()

        def sign(data: bytes) -> bytes:
            assert signer is not None
            with self.signing:  # one question to an agent, or to somebody, at a time
                return signer(data)

        return draft.commit(manifest, sign=sign if signer is not None else None), {}

    def _record(self) -> groups.Group:
        targets = {c.id: resolve.qualified(engine, c) for _, engine, c in self.members}
        found = []
        for label, _, container in self.members:
            kept = self.attempts[label].kept
            assert kept is not None
            after = tuple(sorted(targets[identity] for identity in self.after[container.id]))
            found.append(groups.Member(targets[container.id], kept.manifest.name, kept.manifest.id, after))
        return groups.Group(self.name, self.generation, time.time(), self._skew_s, tuple(found))

    @property
    def _skew_s(self) -> float:
        return round(self.moment.skew_s, 6) if self.moment else 0.0

    def _finish(self) -> list[Outcome]:
        results = parallel.run_all({label: attempt.finish for label, attempt in self.attempts.items()}, width=len(self.attempts))
        outcomes = []
        for label, result in results.items():
            if isinstance(result, BaseException):
                if not isinstance(result, CkptError):
                    raise result
                result = failure(label, result)
            result.stats.update(group=f"{self.name}@{self.generation}", group_skew_s=self._skew_s)
            outcomes.append(result)
        return outcomes

    def _undo(self, own: _Job, error: BaseException) -> list[Outcome]:
        cause = next(iter(self.failed), "")
        with recover.uninterrupted():
            others = _NotAlone(f"it was not saved: {cause or 'the group'} could not be" if self.failed else f"it was not saved: {error}")
            works = {label: partial(attempt.undo, self.failed.get(label, _same(others))) for label, attempt in self.attempts.items()}
            said = parallel.run_all(works, width=max(1, len(works)))
            own.withdraw(error)
        return _outcomes(self.failed, said, [label for label, _, _ in self.members], error, DumpFailed)


class _Failed(Exception):
    """Some of the members failed; which and why is noted elsewhere."""


class _NotAlone(DumpFailed):
    """A member that is undone because of another one."""


def _one_at_a_time(emit: Emit) -> Emit:
    lock = threading.Lock()

    def emit_one(event: Event) -> None:
        with lock:
            emit(event)

    return emit_one


def _raise(results: Mapping[str, object], failed: dict[str, BaseException]) -> None:
    """Note the failures, causes first; an interruption or a bug goes on as it is."""
    bad = {label: result for label, result in results.items() if isinstance(result, BaseException)}
    for label, error in sorted(bad.items(), key=lambda item: isinstance(item[1], (_NotAlone, parallel.Dropped))):
        failed[label] = error
    for error in bad.values():
        if not isinstance(error, (Exception,)):
            raise error
    if bad:
        raise _Failed


def _outcomes(
    failed: Mapping[str, BaseException], said: Mapping[str, object], labels: Sequence[str], error: BaseException, kind: type[CkptError]
) -> list[Outcome]:
    """What is told of a group that was undone, causes first. Raises what is no failure of a member, a CkptError as `kind`."""
    where = "all of them run on" if kind is DumpFailed else "none of them runs; their checkpoints are still in the store"
    if not isinstance(error, _Failed):
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise (NoSpace if full else kind)(f"the group's journal cannot be written: {error.strerror}", where=where) from error
        if isinstance(error, CkptError) and not isinstance(error, (DumpFailed, RestoreFailed, NoSpace)):
            raise kind(error.message, where=error.where or where, hint=error.hint, log=error.log) from error
        raise error
    outcomes = []
    for label in dict.fromkeys([*failed, *labels]):
        told = said.get(label, failed.get(label))
        if isinstance(told, CkptError):
            outcomes.append(failure(label, told) if label else Outcome(labels[0], False, error=told))
        elif isinstance(told, BaseException):
            raise told
    return outcomes


def _knob(attempt: saving.Attempt) -> Knob | None:
    """What freezes a member by itself; None when that cannot be, and CRIU is to do it."""
    if not attempt.engine.probe().takes_frozen or not attempt.container.pid:
        return None
    try:
        return freezer.knob_of(tree.pids(attempt.container.pid))
    except (NotOwn, OSError):
        return None


def _wait_stopped(attempts: Mapping[str, saving.Attempt], ended: Collection[str]) -> list[tuple[float, float]]:
    """Wait until CRIU has stopped these; of each, when it was last seen to run and first seen to stand still.

    Raises:
        freezer.NotFrozen: not within STOP_LIMIT_S, or its dump failed before.
    """
    ran = {label: time.monotonic() for label in attempts}
    still: dict[str, float] = {}
    deadline = time.monotonic() + STOP_LIMIT_S
    while len(still) < len(attempts):
        for label, attempt in attempts.items():
            if label in still:
                continue
            over = label in ended
            now = time.monotonic()
            if attempt.job.held_path.exists() or tree.status(attempt.container.pid or 0).get("TracerPid", "0") != "0":
                still[label] = now
            elif over:
                raise freezer.NotFrozen(f"{label} could not be dumped")
            elif now > deadline:
                raise freezer.NotFrozen(f"{label} did not stop within {STOP_LIMIT_S:g} s")
            else:
                ran[label] = now
        time.sleep(_POLL_S)
    return [(ran[label], still[label]) for label in attempts]


# -- coming back ---------------------------------------------------------------------------------------------------------------


def bring_back_group(
    ref: str,
    *,
    options: RestoreOptions,
    store_root: Path = DEFAULT_ROOT,
    emit: Emit,
    keep: bool = True,
    incoming: trust.Incoming = trust.ANYBODY,
) -> list[Outcome]:
    """`restore_group` of the set that NAME (its newest) or NAME@N names.

    Raises:
        CkptError: nothing could be begun at all.
    """
    warm.imports(*warm.OUT_OF_CHUNKS)
    for line in recover.sweep(store_root):
        emit(Notice("", line, warning=True))
    catalog = Catalog(store_root)
    group, checkpoints = find_group(catalog, ref)
    chosen = {member.target: checkpoint for member, checkpoint in zip(group.members, checkpoints, strict=True)}
    after = {member.target: set(member.after) & set(chosen) for member in group.members}
    return restore_group(chosen, group.name, options, catalog, emit, after=after, keep=keep, incoming=incoming)


def find_group(catalog: Catalog, ref: str) -> tuple[groups.Group, list[Checkpoint]]:
    """The set that a reference names, and its checkpoints in the order of its members.

    Raises:
        TargetNotFound: there is none, or it is no longer whole.
    """
    return groups.find(catalog.root, ref, catalog.all())


def restore_group(
    chosen: Mapping[str, Checkpoint],
    name: str,
    options: RestoreOptions,
    catalog: Catalog,
    emit: Emit,
    *,
    after: Mapping[str, Collection[str]] | None = None,
    keep: bool = True,
    incoming: trust.Incoming = trust.ANYBODY,
) -> list[Outcome]:
    """Bring all of them back: held one after the other, then let go together.

    Args:
        chosen: by label (`podman:web`) what to restore.
        after: of each label those that are held before it.
        keep: keep CRIU's logs of restores that went well.

    Returns:
        An outcome for each. When it failed, first those that are the cause; then none of them runs, and all checkpoints are still there.

    Raises:
        UsageError: options that fit one checkpoint only, a circle in `after`.
        KeyboardInterrupt: after all was undone.
    """
    if options.name is not None or options.publish or options.pod is not None or options.lazy:
        raise UsageError("--name, --publish, --pod and --lazy are for single checkpoints, not for a group")
    if not chosen:
        raise UsageError(f"the group {name!r} has no members")
    before = {label: set((after or {}).get(label, ())) for label in chosen}
    filled = _fillers(chosen, [label for wave in _sorted(before) for label in wave])
    for label, volumes in filled.items():
        before[label].update(volumes.values())
    waves = _sorted(before)
    return _Restoring(chosen, name, waves, filled, options, catalog, emit, keep, incoming).run()


def _fillers(chosen: Mapping[str, Checkpoint], ordered: Sequence[str]) -> dict[str, dict[str, str]]:
    """Named volumes that several members have: of each member those that another one fills, and which. It has to come back before."""
    first: dict[str, str] = {}
    found: dict[str, dict[str, str]] = {label: {} for label in chosen}
    for label in ordered:
        for volume, _ in chosen[label].manifest.volumes:
            if first.setdefault(volume, label) != label:
                found[label][volume] = first[volume]
    return found


class _Restoring:
    """A group on its way back."""

    def __init__(
        self,
        chosen: Mapping[str, Checkpoint],
        name: str,
        waves: list[list[str]],
        filled: Mapping[str, Collection[str]],
        options: RestoreOptions,
        catalog: Catalog,
        emit: Emit,
        keep: bool,
        incoming: trust.Incoming,
    ) -> None:
        self.chosen, self.name, self.waves, self.filled, self.options, self.catalog = chosen, name, waves, filled, options, catalog
        self.emit = _one_at_a_time(emit)
        self.keep, self.incoming = keep, incoming
        self.attempts: dict[str, restoring.Attempt] = {}
        self.failed: dict[str, BaseException] = {}

    def run(self) -> list[Outcome]:
        with ExitStack() as stack:
            sources = {
                label: stack.enter_context(restoring.stored(label, one, self.options, self.catalog, self.emit, self.incoming))
                for label, one in self.chosen.items()
            }
            own = _Job(self.catalog, groupjob.RESTORE, self.name)
            try:
                self._do({label: partial(self._prepare, own, label, source) for label, source in sources.items()})
                own.job.write("restoring", jobs=[attempt.job.id for attempt in self.attempts.values()])
                self._do({label: attempt.make_room for label, attempt in self.attempts.items()})
                for wave in self.waves:
                    # What is held already blocks packets for its addresses (host/traffic), and CRIU those within its network.
                    self._do({label: self.attempts[label].hold for label in wave})
                faults.point("group-restored")
                with recover.uninterrupted():
                    own.job.write("commit")
                    faults.point("group-restore-commit")
                    outcomes = self._release()
                    own.over()
                return outcomes
            except BaseException as error:
                if recover.committed(own.job):
                    own.job.release()
                    raise
                return self._undo(own, error)

    def _prepare(self, own: _Job, label: str, source: restoring.Source) -> None:
        ids = {one.manifest.container_id for one in self.chosen.values()}
        self.attempts[label] = restoring.prepare(
            source, self.options, self.catalog, self.emit, group_job=own.id, together=ids, kept_volumes=self.filled[label]
        )

    def _do(self, works: Mapping[str, Callable[[], None]]) -> None:
        _raise(parallel.run_all(works, width=len(works)), self.failed)

    def _release(self) -> list[Outcome]:
        """Let all run. What fails now is that member's own misfortune: the others run."""

        def release(attempt: restoring.Attempt) -> Outcome:
            try:
                attempt.release()
            except CkptError as error:
                raise attempt.undo(error) from error
            return attempt.close(keep=self.keep)

        works = {label: partial(release, self.attempts[label]) for wave in self.waves for label in wave}
        results = parallel.run_all(works, width=len(works))
        outcomes = []
        for label in self.chosen:
            result = results[label]
            if isinstance(result, BaseException) and not isinstance(result, CkptError):
                raise result
            outcomes.append(failure(label, result) if isinstance(result, CkptError) else result)
        return outcomes

    def _undo(self, own: _Job, error: BaseException) -> list[Outcome]:
        cause = next(iter(self.failed), "")
        with recover.uninterrupted():
            others = RestoreFailed(f"it was not restored: {cause} could not be" if cause else f"it was not restored: {error}")
            works = {label: partial(attempt.undo, self.failed.get(label, _same(others))) for label, attempt in self.attempts.items()}
            said = parallel.run_all(works, width=max(1, len(works)))
            own.withdraw(error)
        return _outcomes(self.failed, said, list(self.chosen), error, RestoreFailed)


def _same(error: CkptError) -> CkptError:
    """An error of its own for each member: where it is now is added to it."""
    return type(error)(error.message)
