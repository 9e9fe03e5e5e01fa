"""Bring checkpoints back. Nothing is touched before the checkpoint is known to be whole, and it stays in the store."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from ckpt.archive import layout, trust
from ckpt.criu import action, features
from ckpt.criu import lazy as memory
from ckpt.engines import registry
from ckpt.engines.base import HeldRestore, SharesVolumes
from ckpt.engines.registry import NamedEngine
from ckpt.errors import BusyError, CkptError, EngineUnavailable, NoSpace, RestoreFailed, StateUnknown, TargetNotFound, UsageError
from ckpt.events import Emit, Notice, StepDone, StepStarted, Thawed
from ckpt.host import announce
from ckpt.host.run import CommandFailed, Process
from ckpt.model import Checkpoint, Container, Manifest, RestoreOptions
from ckpt.ops import consent, faults, isolation, lazy, policy, proof, recover, warm
from ckpt.ops import hooks as hooking
from ckpt.ops.import_ import Archive, arriving
from ckpt.ops.import_ import unpack as unpack_archive
from ckpt.ops.result import Outcome, failure
from ckpt.ops.unpack import unpack
from ckpt.store import volatile
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.job import DEFAULT_ROOT, Job
from ckpt.transports.base import CarrierOptions, Location

Figures = dict[str, float | int | str]


@dataclass(frozen=True, slots=True)
class Looked:
    """What the caller saw of this host a moment ago, for many at once: the container image is here, the name is nobody else's.

    It also guards the job: when it dies, its own guard settles all of them.
    """

    old: Container | None = None
    """The stopped container that the restored one replaces."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint to restore from: in the store, or unpacked from a file for this one time."""

    label: str
    manifest: Manifest
    draft: Draft
    """Where it is unpacked, with `checkpoint` not yet. Whoever needs it last removes it: a lazy restore hands it on."""
    checkpoint: Checkpoint | None = None
    lease_fd: int = -1
    """The lock that keeps `checkpoint` in the store."""
    signed: bool = False
    """A signature was asked for, and is there."""
    unpacked: Callable[[], None] | None = None
    """It is being unpacked into the draft by the caller, for several restores at once (of lazy ones, the last keeper removes it): waits until
    all of it is there, before CRIU looks. Raises what went wrong with that."""

    @property
    def made_here(self) -> bool:
        """Whether it was made on this host: it asks for nothing that the workload did not have here."""
        return self.checkpoint is not None and not self.checkpoint.entry.foreign

    @property
    def remains(self) -> str:
        """What is still there when the restore fails."""
        return f"the checkpoint {self.checkpoint.ref} is still in the store" if self.checkpoint else f"{self.label} is unchanged"


def restore(
    refs: Sequence[str],
    *,
    all: bool = False,
    latest: bool = False,
    import_from: Location | None = None,
    digest: str | None = None,
    carrier: CarrierOptions | None = None,
    options: RestoreOptions,
    store_root: Path = DEFAULT_ROOT,
    emit: Emit,
    keep: bool = True,
    incoming: trust.Incoming = trust.ANYBODY,
) -> list[Outcome]:
    """Restore each reference from the store, or `import_from`.

    Args:
        refs: NAME (its newest checkpoint), NAME@N, NAME@latest, an id.
        all: the newest checkpoint of every name whose container does not run, instead of `refs`.
        latest: the checkpoint made last, instead of `refs`.
        import_from: an archive; it is restored without ever being in the store.
        digest: what that archive's SHA-256 must be, in hex.
        keep: also keep CRIU's logs and statistics of a restore that went well.
        incoming: what opens an encrypted archive, and whose signature the checkpoint must have.

    Raises:
        CkptError: nothing could be begun at all.
    """
    warm.imports(*warm.OUT_OF_CHUNKS, *(warm.LAZILY if options.lazy else ()))
    for line in recover.sweep(store_root):
        emit(Notice("", line, warning=True))
    catalog = Catalog(store_root)
    if sum((bool(refs), all, latest, import_from is not None)) != 1:
        raise UsageError("say what to restore: checkpoints, --all, --latest or --import SOURCE, one of them")
    if options.name is not None and (all or len(refs) > 1):
        raise UsageError("--name is for one checkpoint only")
    if import_from is not None:
        archive = partial(arriving, import_from, carrier, digest, emit)
        return [_guarded(str(import_from), partial(_from_archive, str(import_from), archive, options, catalog, emit, keep, incoming))]
    chosen, outcomes = _choose(catalog, refs, all=all, latest=latest)
    for label, checkpoint in chosen:
        outcomes.append(_guarded(label, partial(from_store, label, checkpoint, options, catalog, emit, keep, incoming)))
    return outcomes


def bring_back(
    source: Source, options: RestoreOptions, catalog: Catalog, emit: Emit, *, keep: bool = True, looked: Looked | None = None
) -> Outcome:
    """Restore: unpack and verify it, make room for it, restore it held, compare it with what was dumped, let it run.

    Raises:
        BusyError: the container runs, or its name is taken.
        ArchiveInvalid, DigestMismatch: the checkpoint is damaged; nothing was touched.
        RestoreFailed: nothing of the restore is left.
    """
    attempt = prepare(source, options, catalog, emit, looked=looked)
    try:
        attempt.hold()
        attempt.release()
    except BaseException as error:
        raise attempt.undo(error) from error
    return attempt.close(keep=keep)


def prepare(
    source: Source,
    options: RestoreOptions,
    catalog: Catalog,
    emit: Emit,
    *,
    group_job: str = "",
    together: Collection[str] = (),
    kept_volumes: Collection[str] = (),
    looked: Looked | None = None,
) -> Attempt:
    """Look whether it can be restored here, unpack and verify it, and make its job; nothing of the host is touched.

    Args:
        group_job: the job that decides for this one.
        together: ids of the containers that are restored with it, if any.
        kept_volumes: named volumes that another one of those fills.
        looked: what need not be asked for.

    Raises:
        CkptError: as `bring_back`.
    """
    manifest = source.manifest
    if manifest.foreign in ("cri-o", "containerd"):
        why = f"{source.label} was written by {manifest.foreign}: it belongs into a pod of Kubernetes, ckpt cannot restore it"
        raise EngineUnavailable(why, where="nothing was touched", hint="ckpt inspect, verify and diff can look into it")
    engine = registry.by_name(manifest.engine)
    can = engine.probe()
    if not can.usable:
        raise EngineUnavailable(f"{source.label} needs {engine.name}, which cannot be used here", hint=can.reason or None)
    options = isolation.settled(options, manifest, can)
    if options.name is not None and not can.clone:
        raise UsageError(f"{engine.name} cannot restore under another name")
    if options.cold and not can.remakes:
        raise UsageError(f"{engine.name} cannot make a container again without restoring it")
    if options.lazy:
        if not can.lazy:
            raise UsageError(f"{engine.name} cannot let it run before its memory is there", hint="restore it without --lazy")
        memory.require()
    old = _in_the_way(engine, manifest, options, source) if looked is None else looked.old
    options = options if looked is None else replace(options, checked=True, terse=True)
    isolation.require(source.checkpoint.directory if source.checkpoint else source.draft.stage, options, manifest)
    kept_volumes = {*options.kept_volumes, *kept_volumes, *_shared_volumes(engine, manifest, options, together)}
    options = replace(options, kept_volumes=tuple(kept_volumes))
    if not source.made_here:
        small = source.checkpoint.directory if source.checkpoint else source.draft.stage
        policy.require(small, manifest, engine, options, source.label, where=f"nothing was touched; {source.remains}")
    hooks = hooking.gather(source.label, engine, consent.Labels(), enabled=options.hooks, emit=emit, facts=_hook_facts(source, options))
    stats: Figures = {}
    if source.checkpoint is not None and source.unpacked is None:
        took_s = unpack(catalog, source.checkpoint, source.draft.stage, lazy=options.lazy, signed=source.signed, emit=emit, label=source.label)
        stats["materialize_s"] = round(took_s, 6)
    faults.point("verified")
    job = Job.create(
        catalog.root,
        "restore",
        engine=engine.name,
        container_id=manifest.container_id if options.name is None else "",
        name=options.name or manifest.name,
        copy=options.name is not None,
        **({action.GROUP: group_job} if group_job else {}),
    )
    hooks.job = job
    return Attempt(engine, source, options, job, None if looked is not None else recover.start_guard(job), emit, stats, hooks, old)


class Attempt:
    """One restore on its way, and how to undo it: `make_room`, `hold`, `release`, `close`; `undo` after a failure of any but the last."""

    def __init__(
        self,
        engine: NamedEngine,
        source: Source,
        options: RestoreOptions,
        job: Job,
        guard: Process | None,
        emit: Emit,
        stats: Figures,
        hooks: hooking.Hooks,
        old: Container | None,
    ) -> None:
        self.engine = engine
        self.source = source
        self.options = options
        self.job = job
        self.guard = guard
        self.emit = emit
        self.old = old
        """The stopped container that it replaces."""
        self.held: HeldRestore | None = None
        self.keeper: lazy.Keeper | None = None
        self.warnings: list[str] = []
        self.stats = stats
        self.hooks = hooks
        self.committed = False
        self.room = False
        self.container: Container | None = None

    def make_room(self) -> None:
        """All that comes before the restore itself."""
        self.hooks.before("pre-restore")
        if self.old is not None:
            # The checkpoint is whole, so what is removed can come back from it.
            self.job.write("removing", removed_id=self.old.id)
            self.engine.remove(self.old)
            faults.point("removed")
        self.room = True

    def hold(self) -> None:
        """Restore, held, and compare what is there with what was dumped."""
        from ckpt.archive import rootfs

        if not self.room:
            self.make_room()
        stage, manifest, options = self.source.draft.stage, self.source.manifest, self.options
        began = time.monotonic()
        self.emit(StepStarted(self.source.label, "restore"))
        self.job.write("restoring")
        faults.point("restoring")

        def rootfs_ready(root: Path) -> None:
            faults.point("filling")
            if not options.ignore_rootfs:
                self.warn(rootfs.apply(stage / layout.ROOTFS_DIFF, stage / layout.DELETED_FILES, root))
            if self.source.unpacked is not None:
                self.source.unpacked()

        def volume_ready(name: str, directory: Path) -> None:
            tar = stage / "volumes" / f"{name}.tar"
            if not options.ignore_volumes and tar.exists():
                self.warn(rootfs.apply_tree(tar, directory, empty=True))

        chosen = _as_dumped(options, self.source)
        if options.lazy:
            self.keeper = self._keeper()
            self.stats["lazy"] = True
            faults.point("lazy-started")
        self.held = self.engine.restore(stage, manifest, chosen, self.job, rootfs_ready=rootfs_ready, volume_ready=volume_ready)
        self.job.write("held", **(lazy.identity(self.held.init_pid, manifest.name) if self.keeper is not None else {}))
        faults.point("restored")
        proof.check(self.held, manifest)
        if self.keeper is not None:
            self.keeper.check()
        self.stats["restore_s"] = round(time.monotonic() - began, 6)
        self.emit(StepDone(self.source.label, "restore", _count(manifest, options), time.monotonic() - began))

    def _keeper(self) -> lazy.Keeper:
        source = self.source
        demand = self.options.on_demand
        if source.unpacked is not None:
            fds = tuple(fd for fd in (source.draft.fileno(), source.lease_fd) if fd >= 0)
            return lazy.Keeper(self.job, source.draft.stage, lease_fds=fds, draft=True, shared=True, on_demand=demand)
        if source.checkpoint is None:
            return lazy.Keeper(self.job, source.draft.stage, lease_fds=(source.draft.fileno(),), draft=True, on_demand=demand)
        return lazy.Keeper(
            self.job,
            source.draft.stage,
            lease_fds=(source.draft.fileno(), source.lease_fd),
            draft=True,
            memory="chunks",
            criu_version=features.version_text(),
            checkpoint_id=source.checkpoint.manifest.id,
            on_demand=demand,
        )

    def release(self) -> None:
        """Let it run: from here on nothing is undone."""
        assert self.held is not None
        with recover.uninterrupted():
            # Should we die before they ran, the guard runs the hooks.
            self.job.write(
                "commit", **({"hooked": "post-restore", "hooked_inside": True, "hook_facts": self.hooks.facts} if self.options.hooks else {})
            )
            self.committed = True
            faults.point("restore-commit")
            with announce.during(self.held.init_pid) as told:
                self.container = self.held.resume()
            self.job.write("serving" if self.keeper else "resumed", container_id=self.container.id)
            faults.point("resumed")
        if told.problem:
            self.warn([told.problem])
        self.emit(Thawed(self.source.label, max(0.0, time.time() - self.source.manifest.created_s)))

    def close(self, *, keep: bool) -> Outcome:
        """It runs: end its job, or leave it to the keeper of its memory.

        Args:
            keep: keep CRIU's logs.
        """
        assert self.container is not None
        self._greet(self.container)
        if keep:
            recover.keep_logs(self.job, self.source.label)
        if self.keeper is None:
            recover.close(self.job, self.guard)
        else:
            recover.hand_over(self.job, self.guard)
            self.keeper.serve()
        return Outcome(self.source.label, True, self.source.checkpoint, self.container, warnings=tuple(self.warnings), stats=self.stats)

    def _greet(self, container: Container) -> None:
        """It runs: run the hooks that wait for that. Broken off, the restore is complete all the same."""
        if self.options.hooks:
            self.hooks.labels = hooking.soft_labels(container, self.source.label, self.emit)
            self.hooks.container = container
        try:
            if self.hooks.any("post-restore"):
                self.hooks.after("post-restore", container=container)
                self.warnings += self.hooks.warnings
        finally:
            if self.keeper is None:
                self.job.write("done", container_id=container.id)
        faults.point("greeted")

    def warn(self, texts: Sequence[str]) -> None:
        self.warnings += texts
        for text in texts:
            self.emit(Notice(self.source.label, text, warning=True))

    def undo(self, error: BaseException) -> BaseException:
        """Remove what the restore made; returns what to raise."""
        with recover.uninterrupted():
            held, self.held = self.held, None
            try:
                if held is not None:
                    held.abort()
                elif not isinstance(error, CkptError):
                    self.engine.rollback(self.job)
                if self.keeper is not None:
                    self.keeper.abort()
            except CkptError as worse:
                self.job.write("failed", error=worse.message)
                self.job.release()  # the guard goes on trying
                return StateUnknown(f"the restore of {self.source.label} failed, and so did its undoing: {worse.message}", log=worse.log)
            if self.job.facts.get("hooked"):
                self.hooks.after("restore-failed", error=error, inside=False)
            log = recover.keep_logs(self.job, self.source.label)
            self.job.write("rolled-back", error=str(error)[: recover.ERROR_CAP])
            recover.close(self.job, self.guard)
        where = f"nothing is running; {self.source.remains}"
        if isinstance(error, (NoSpace, BusyError, RestoreFailed)):
            error.where = error.where or where
            error.log = error.log or (str(log) if log else None)
            return error
        if isinstance(error, CkptError):
            return RestoreFailed(error.message, where=error.where or where, hint=error.hint, log=error.log or (str(log) if log else None))
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoSpace(f"no space left to restore {self.source.label}", where=where)
        if isinstance(error, (OSError, CommandFailed)):
            return RestoreFailed(f"{self.source.label} could not be restored: {error}", where=where, log=str(log) if log else None)
        return error


@contextmanager
def stored(
    label: str, checkpoint: Checkpoint, options: RestoreOptions, catalog: Catalog, emit: Emit, incoming: trust.Incoming
) -> Iterator[Source]:
    """A checkpoint of the store as a source; it stays there as long as the block lasts.

    Raises:
        CkptError: it is gone, or not signed by whom it must be.
    """
    with catalog.lease_fd(checkpoint) as fd:
        draft = catalog.begin(checkpoint.manifest.name)
        with _until_restored(draft, options):
            if signer := incoming.judge_stage(checkpoint.directory, foreign=checkpoint.entry.foreign):
                emit(Notice(label, f"signed by {signer}"))
            yield Source(label, checkpoint.manifest, draft, checkpoint, fd, bool(signer))


def from_store(
    label: str,
    checkpoint: Checkpoint,
    options: RestoreOptions,
    catalog: Catalog,
    emit: Emit,
    keep: bool,
    incoming: trust.Incoming,
    looked: Looked | None = None,
) -> Outcome:
    """Restore one checkpoint of the store. Raises as `bring_back`."""
    with stored(label, checkpoint, options, catalog, emit, incoming) as source:
        return bring_back(source, options, catalog, emit, keep=keep, looked=looked)


def _from_archive(
    label: str,
    archive: Callable[[], AbstractContextManager[Archive]],
    options: RestoreOptions,
    catalog: Catalog,
    emit: Emit,
    keep: bool,
    incoming: trust.Incoming,
) -> Outcome:
    with ExitStack() as stack:
        with archive() as file:
            # What came encrypted is not on a disk in clear.
            draft = (volatile.catalog() if file.sealed else catalog).begin("import", origin="import")
            stack.enter_context(_until_restored(draft, options))
            manifest = unpack_archive(file, draft, label, emit, incoming, pack=False)
        return bring_back(Source(label, manifest, draft), options, catalog, emit, keep=keep)


@contextmanager
def _until_restored(draft: Draft, options: RestoreOptions) -> Iterator[None]:
    """Remove the draft at the end, unless memory still comes from it: then that is its keeper's."""
    try:
        yield
    except BaseException:
        draft.discard()
        raise
    if options.lazy:
        draft.close()
    else:
        draft.discard()


def _choose(catalog: Catalog, refs: Sequence[str], *, all: bool, latest: bool) -> tuple[list[tuple[str, Checkpoint]], list[Outcome]]:
    chosen: list[tuple[str, Checkpoint]] = []
    failed: list[Outcome] = []
    if all:
        newest = {c.manifest.name: c for c in catalog.all()}
        return [(name, c) for name, c in sorted(newest.items()) if not _runs(c.manifest)], []
    if latest:
        known = catalog.all()
        if not known:
            raise TargetNotFound("the store is empty")
        last = max(known, key=lambda c: c.manifest.created_s)
        return [(last.ref, last)], []
    for ref in refs:
        try:
            chosen.append((ref, catalog.find(ref)))
        except CkptError as error:
            failed.append(failure(ref, error))
    return chosen, failed


def _runs(manifest: Manifest) -> bool:
    with suppress(CkptError):
        engine = registry.by_name(manifest.engine)
        there = (*engine.find(manifest.container_id), *engine.find(manifest.name))
        return any(c.id == manifest.container_id and c.state in ("running", "paused") for c in there)
    return False


def _in_the_way(engine: NamedEngine, manifest: Manifest, options: RestoreOptions, source: Source) -> Container | None:
    """The stopped container that the restored one replaces; BusyError for one that runs, or for another of the same name."""
    if options.name is not None:
        if options.checked:
            return None
        if any(c.name == options.name for c in engine.find(options.name)):
            raise BusyError(f"there is a container {options.name!r} already", hint="choose another name, or remove it first")
        return None
    named = engine.find(manifest.name)
    # By its name as a rule; each look is a call of the engine.
    own = _with_id(named, manifest.container_id) or _with_id(engine.find(manifest.container_id), manifest.container_id)
    if own is not None:
        own = engine.describe(own)
    if own is not None and own.state in ("running", "paused"):
        where = f"{own.name or own.id} is {own.state}, untouched"
        message = f"{source.label} cannot be restored over itself: it is {own.state}"
        raise BusyError(message, where=where, hint="stop it first, or restore a copy: -n NAME")
    for container in named:
        if container.name == manifest.name and container.id != manifest.container_id:
            where = f"{container.name} is {container.state}, untouched"
            raise BusyError(f"another container is called {manifest.name!r} now", where=where, hint="remove or rename it, or restore a copy: -n NAME")
    return own


def _shared_volumes(engine: NamedEngine, manifest: Manifest, options: RestoreOptions, together: Collection[str]) -> set[str]:
    """Its named volumes that containers have which are not restored now: their content is theirs too."""
    if options.name is not None or options.ignore_volumes or not isinstance(engine, SharesVolumes):
        return set()
    own = {manifest.container_id, *together}
    return {name for name, _ in manifest.volumes if set(engine.volume_users(name)) - own}


def _with_id(containers: Sequence[Container], identity: str) -> Container | None:
    return next((container for container in containers if container.id == identity), None)


def _as_dumped(options: RestoreOptions, source: Source) -> RestoreOptions:
    """The options with what the user left open as the manifest says."""
    manifest = source.manifest
    if options.name is not None:
        volumes: Literal["refuse", "keep", "replace"] = "keep"
    else:
        # A volume of the same name on the host that was dumped is the container's own: memory and volume go together.
        volumes = "replace" if source.made_here and manifest.host.hostname == os.uname().nodename else "refuse"
    return replace(
        options,
        existing_volumes=volumes,
        tcp_established=False if options.tcp_close else manifest.tcp_established if options.tcp_established is None else options.tcp_established,
        file_locks=manifest.file_locks if options.file_locks is None else options.file_locks,
        shell_job=manifest.shell_job if options.shell_job is None else options.shell_job,
    )


def _guarded(label: str, work: Callable[[], Outcome]) -> Outcome:
    try:
        return work()
    except CkptError as error:
        return failure(label, error)


def _hook_facts(source: Source, options: RestoreOptions) -> dict[str, str]:
    manifest = source.manifest
    return {
        "name": options.name or manifest.name,
        "container_id": "" if options.name else manifest.container_id,
        "checkpoint": source.checkpoint.ref if source.checkpoint else manifest.id,
    }


def _count(manifest: Manifest, options: RestoreOptions) -> str:
    number = len(manifest.processes)
    found = [f"{number} process{'' if number == 1 else 'es'}"] if number else []
    return ", ".join([*found, *(["its memory follows"] if options.lazy else [])])
