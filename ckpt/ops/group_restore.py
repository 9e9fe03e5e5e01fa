"""Groups come back: held one after the other, then let go together, all or none (see group)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ckpt.archive import trust
from ckpt.errors import CkptError, RestoreFailed, UsageError
from ckpt.events import Emit, Notice
from ckpt.model import Checkpoint, RestoreOptions
from ckpt.ops import faults, groupjob, parallel, recover, together, warm
from ckpt.ops import members as member
from ckpt.ops import restore as restoring
from ckpt.ops.result import Outcome, failure
from ckpt.store import groups
from ckpt.store.catalog import Catalog
from ckpt.store.job import DEFAULT_ROOT


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
    filled = _fillers(chosen, [label for wave in member.waves(before) for label in wave])
    for label, volumes in filled.items():
        before[label].update(volumes.values())
    waves = member.waves(before)
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
        self.emit = together.one_at_a_time(emit)
        self.keep, self.incoming = keep, incoming
        self.attempts: dict[str, restoring.Attempt] = {}
        self.failed: dict[str, BaseException] = {}

    def run(self) -> list[Outcome]:
        with ExitStack() as stack:
            sources = {
                label: stack.enter_context(restoring.stored(label, one, self.options, self.catalog, self.emit, self.incoming))
                for label, one in self.chosen.items()
            }
            own = together.GroupJob(self.catalog, groupjob.RESTORE, self.name)
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

    def _prepare(self, own: together.GroupJob, label: str, source: restoring.Source) -> None:
        ids = {one.manifest.container_id for one in self.chosen.values()}
        self.attempts[label] = restoring.prepare(
            source, self.options, self.catalog, self.emit, group_job=own.id, together=ids, kept_volumes=self.filled[label]
        )

    def _do(self, works: Mapping[str, Callable[[], None]]) -> None:
        together.settle(parallel.run_all(works, width=len(works)), self.failed)

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

    def _undo(self, own: together.GroupJob, error: BaseException) -> list[Outcome]:
        cause = next(iter(self.failed), "")
        with recover.uninterrupted():
            others = RestoreFailed(f"it was not restored: {cause} could not be" if cause else f"it was not restored: {error}")
            works = {label: partial(attempt.undo, self.failed.get(label, together.same(others))) for label, attempt in self.attempts.items()}
            said = parallel.run_all(works, width=max(1, len(works)))
            own.withdraw(error)
        return together.outcomes_of(self.failed, said, list(self.chosen), error, RestoreFailed)
