"""Groups: workloads that are saved, and come back, together. All of them or none.

Saving: every member is looked at, then all are frozen at one instant (`host.freezer`), then CRIU dumps them side by side, each held at its
post-dump; when all checkpoints are in the store, one line in the journal of the group's job decides for all of them. Until then whatever
goes wrong lets all of them go on and leaves nothing in the store; after it all end. Coming back is the same the other way round.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from ckpt.archive import trust
from ckpt.engines.registry import NamedEngine
from ckpt.errors import CkptError, DumpFailed, UsageError
from ckpt.events import Emit, Notice
from ckpt.host import freezer
from ckpt.model import Checkpoint, Container, DumpOptions, Manifest, Target
from ckpt.ops import checkpoint as saving
from ckpt.ops import faults, groupjob, instant, parallel, recover, resolve, together, warm
from ckpt.ops import members as member
from ckpt.ops.result import Outcome, failure
from ckpt.store import groups
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.job import DEFAULT_ROOT

T = TypeVar("T")


def checkpoint_group(
    name: str,
    targets: Sequence[Target] = (),
    *,
    pod: bool = False,
    options: DumpOptions,
    store_root: Path = DEFAULT_ROOT,
    emit: Emit,
    tags: Sequence[str] = (),
    note: str = "",
    outgoing: trust.Outgoing = trust.OPEN,
) -> list[Outcome]:
    """`save_group` of what the user named; without targets of those that belong to the group by their labels.

    Args:
        pod: `name` is that of a pod, whose containers are meant.

    Raises:
        CkptError: nothing could be begun at all.
        KeyboardInterrupt: after all of them were brought back to running.
    """
    groups.check_name(name)
    warm.imports(*warm.INTO_CHUNKS)
    for line in recover.sweep(store_root):
        emit(Notice("", line, warning=True))
    chosen = member.of_pod(name) if pod else member.chosen(name, targets)
    return save_group(chosen, name, options, Catalog(store_root), emit, tags=tags, note=note, outgoing=outgoing)


def save_group(
    members: Sequence[member.Found],
    name: str,
    options: DumpOptions,
    catalog: Catalog,
    emit: Emit,
    *,
    tags: Sequence[str] = (),
    note: str = "",
    outgoing: trust.Outgoing = trust.OPEN,
    check: Callable[[Checkpoint], None] | None = None,
) -> list[Outcome]:
    """Save all members at one instant, as one set, and end them (or not: `options.leave_running`).

    Args:
        tags: of each checkpoint, besides the group's own.
        check: looks at each one that is stored, while all could still go on; what it raises undoes all of them.

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
    after = member.order(members)
    member.refuse_joined(members)
    return _Saving(members, name, after, options, catalog, emit, (groups.tag(name), *tags), note, outgoing, check).run()


class _Saving:
    """A group on its way into the store."""

    def __init__(
        self,
        members: Sequence[member.Found],
        name: str,
        after: Mapping[str, set[str]],
        options: DumpOptions,
        catalog: Catalog,
        emit: Emit,
        tags: tuple[str, ...],
        note: str,
        outgoing: trust.Outgoing,
        check: Callable[[Checkpoint], None] | None,
    ) -> None:
        self.members, self.name, self.after, self.options, self.catalog = members, name, after, options, catalog
        self.emit = together.one_at_a_time(emit)
        self.tags, self.note, self.outgoing, self.check = tags, note, outgoing, check
        self.signing = threading.Lock()
        self.attempts: dict[str, saving.Attempt] = {}
        """By label; what is here has a job."""
        self.failed: dict[str, BaseException] = {}
        """By label, "" for the group: why it is undone."""
        self.moment: freezer.Moment | None = None

    def run(self) -> list[Outcome]:
        with self.catalog.storage("number a group"), self.catalog.locked():
            self.generation = self.catalog.number(groups.tag(self.name))
        own = together.GroupJob(self.catalog, groupjob.SAVE, self.name, generation=self.generation, leave_running=self.options.leave_running)
        try:
            self._do("prepared", {label: partial(self._prepare, own, *found) for found in self.members for label in found[:1]})
            own.job.write("dumping", jobs=[attempt.job.id for attempt in self.attempts.values()])
            self._do("begun", {label: attempt.begin for label, attempt in self.attempts.items()})
            self.moment, cgroups = instant.hold(self.name, self.attempts, partial(self._do, "held"))
            faults.point("group-held")
            if self.options.leave_running:
                self._do("going on", {label: attempt.go_on for label, attempt in self.attempts.items()})
                freezer.thaw(cgroups)
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

    def _prepare(self, own: together.GroupJob, label: str, engine: NamedEngine, container: Container) -> None:
        self.attempts[label] = saving.prepare(engine, container, label, self.options, self.catalog, self.emit, group_job=own.id)

    def _do(self, what: str, works: Mapping[str, Callable[[], T]]) -> None:
        """Do it for all at once. Raises together.Failed when one of them failed, KeyboardInterrupt after all are through."""
        together.settle(parallel.run_all(works, width=len(works)), self.failed)

    # -- the decision

    def _keep(self, draft: Draft, manifest: Manifest) -> tuple[Checkpoint | None, dict[str, float | int | str]]:
        draft.tags, draft.note, draft.group = self.tags, self.note, f"{self.name}@{self.generation}"
        signer = self.outgoing.signer()

        def sign(data: bytes) -> bytes:
            assert signer is not None
            with self.signing:  # one question to an agent, or to somebody, at a time
                return signer(data)

        kept = draft.commit(manifest, sign=sign if signer is not None else None)
        if self.check is not None:
            try:
                self.check(kept)
            except CkptError:
                with suppress(CkptError):
                    self.catalog.remove(kept)
                raise
        return kept, {}

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

    def _undo(self, own: together.GroupJob, error: BaseException) -> list[Outcome]:
        cause = next(iter(self.failed), "")
        with recover.uninterrupted():
            others = together.NotAlone(f"it was not saved: {cause or 'the group'} could not be" if self.failed else f"it was not saved: {error}")
            works = {label: partial(attempt.undo, self.failed.get(label, together.same(others))) for label, attempt in self.attempts.items()}
            said = parallel.run_all(works, width=max(1, len(works)))
            own.withdraw(error)
        return together.outcomes_of(self.failed, said, [label for label, _, _ in self.members], error, DumpFailed)
