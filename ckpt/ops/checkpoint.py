"""Save running containers to the store. Whatever goes wrong before the checkpoint is safe, the container goes on."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from ckpt.archive import layout, trust
from ckpt.criu import action, cgroupimage
from ckpt.engines.base import HeldDump
from ckpt.engines.registry import NamedEngine
from ckpt.errors import (
    BusyError,
    CannotConnect,
    CkptError,
    DigestMismatch,
    DumpFailed,
    FeatureMissing,
    KeyProblem,
    NoSpace,
    PermissionDenied,
    RemoteRefused,
    StateUnknown,
    TargetNotFound,
    TransferFailed,
    UsageError,
)
from ckpt.events import BytesMoved, Emit, Frozen, Notice, StepDone, StepStarted, Thawed
from ckpt.host.run import CommandFailed, Process
from ckpt.model import Checkpoint, Container, DumpOptions, DumpStats, HostFacts, Manifest, Target
from ckpt.ops import capture, consent, faults, filling, intake, knobs, recover, resolve, warm
from ckpt.ops import check as checks
from ckpt.ops import hooks as hooking
from ckpt.ops.result import Outcome, failure
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.job import DEFAULT_ROOT, Job

Keep = Callable[[Draft, Manifest], tuple[Checkpoint | None, dict[str, float | int | str]]]
"""What makes a finished draft safe (the store, an archive file): the step after which the source may end. Returns the checkpoint, if
one came of it, and figures."""

_AS_THEY_ARE = (DumpFailed, NoSpace, FeatureMissing, PermissionDenied, StateUnknown, BusyError)
_CARRIED = (CannotConnect, TransferFailed, RemoteRefused, DigestMismatch, KeyProblem)
"""Of an archive that could not be brought to where it shall be: whether to try again is told by the exit code."""


def checkpoint(
    targets: Sequence[Target],
    *,
    all: bool = False,
    latest: bool = False,
    options: DumpOptions,
    store_root: Path = DEFAULT_ROOT,
    emit: Emit,
    keep_going: bool = False,
    outgoing: trust.Outgoing = trust.OPEN,
    tags: Sequence[str] = (),
) -> list[Outcome]:
    """Save each target to the store and end it (or not: `options.leave_running`).

    All targets are found before the first one is touched. Errors of single targets are in their outcomes; after the first one
    the rest is left alone unless `keep_going`.

    Args:
        all: every running container, instead of `targets`.
        latest: the container created last, instead of `targets`.
        outgoing: its key signs the checkpoint.
        tags: what it is marked with from its first moment in the store.

    Raises:
        CkptError: nothing could be begun at all.
        KeyboardInterrupt: after the target at hand was brought back to running.
    """
    warm.imports(*warm.INTO_CHUNKS)
    for line in recover.sweep(store_root):
        emit(Notice("", line, warning=True))
    found, outcomes = _find(targets, all=all, latest=latest)
    if outcomes and not keep_going:
        return outcomes
    catalog = Catalog(store_root)

    def keep(draft: Draft, manifest: Manifest) -> tuple[Checkpoint | None, dict[str, float | int | str]]:
        draft.tags = tuple(tags)
        return draft.commit(manifest, sign=outgoing.signer()), {}

    for label, engine, container in found:
        try:
            outcomes.append(save(engine, container, label, options, catalog, emit, keep))
        except CkptError as error:
            outcomes.append(failure(label, error))
        if not outcomes[-1].ok and not keep_going:
            break
    return outcomes


def save(
    engine: NamedEngine,
    container: Container,
    label: str,
    options: DumpOptions,
    catalog: Catalog,
    emit: Emit,
    keep: Keep,
    *,
    step: str = "store",
    drafts: Catalog | None = None,
    looked: checks.Looked | None = None,
    guarded: bool = True,
    flat_digests: bool = True,
    raw: bool = False,
) -> Outcome:
    """Dump one container into a draft, make it safe by `keep`, then end or resume it.

    Args:
        drafts: where the draft is made, when not in the store.
        looked: what a look a moment ago found, with nothing in the way; without it that look is had now.
        guarded: by a guard of its own; without it the caller has one for all that it does, and asks the engine itself what became of them.
        flat_digests, raw: as in `Draft`.

    Raises:
        BusyError: it does not run.
        DumpFailed, NoSpace, FeatureMissing: it runs on as before.
        StateUnknown: it could not be made sure that it runs on.
    """
    attempt = prepare(engine, container, label, options, catalog, emit, drafts=drafts, looked=looked, guarded=guarded)
    attempt.flat_digests = flat_digests
    if raw and (drafts or catalog).key is None:
        attempt.raw, attempt.streams = True, False
    try:
        attempt.hold()
        attempt.go_on()
        attempt.gone_on()
        attempt.keep(keep, step)
    except BaseException as error:
        raise attempt.undo(error) from error
    return attempt.finish(look=guarded)


def prepare(
    engine: NamedEngine,
    container: Container,
    label: str,
    options: DumpOptions,
    catalog: Catalog,
    emit: Emit,
    *,
    drafts: Catalog | None = None,
    looked: checks.Looked | None = None,
    guarded: bool = True,
    group_job: str = "",
) -> Attempt:
    """Look whether it can be dumped, and make its job; nothing of the container is touched.

    Args:
        drafts, looked, guarded: as in `save`.
        group_job: the job that decides for this one.

    Raises:
        CkptError: as `save`.
    """
    ready(container, label)
    labels = consent.require(container, "checkpoint", override=options.override_label, emit=emit)
    filling.bring_rest(catalog.root, container.pid or 0)
    hooks = hooking.gather(label, engine, labels, container=container, enabled=options.hooks, emit=emit)
    if hooks.any("pre-checkpoint"):
        chosen = options  # a hook may close what cannot be saved: it is looked for after it then
    elif looked is None:
        chosen = decided(engine, container, label, options, emit)
    else:
        chosen = replace(looked.options, timeout_s=options.timeout_s)
    # These ask CRIU and the engine, so not while the container is frozen.
    host, can = capture.store_free_bytes(capture.host_facts(), catalog.root), engine.probe()
    streams = can.pages and intake.possible(host.criu_version)
    job = Job.create(
        catalog.root,
        "checkpoint",
        engine=engine.name,
        container_id=container.id,
        name=container.name or container.id,
        leave_running=chosen.leave_running,
        **({"overridden": labels.overridden} if labels.overridden else {}),
        **({action.GROUP: group_job} if group_job else {}),
    )
    guard = recover.start_guard(job) if guarded else None
    hooks.job = job
    in_group = bool(group_job)
    return Attempt(engine, container, label, chosen, drafts or catalog, emit, job, guard, streams, host, can.version, hooks, in_group=in_group)


@dataclass(slots=True)
class Attempt:
    """One dump on its way, and how to undo it: `begin`, `hold`, `go_on`, `gone_on`, `keep`, `finish`; `undo` after a failure of any but the last."""

    engine: NamedEngine
    container: Container
    label: str
    options: DumpOptions
    catalog: Catalog
    emit: Emit
    job: Job
    guard: Process | None
    streams: bool
    """CRIU can send its pages to a page server; otherwise it writes them as files."""
    host: HostFacts
    version: str
    hooks: hooking.Hooks
    draft: Draft | None = None
    dumped: bool = False
    held: HeldDump | None = None
    frozen_at_s: float = 0.0
    freeze_s: float = 0.0
    kept: Checkpoint | None = None
    figures: dict[str, float | int | str] = field(default_factory=dict)
    in_group: bool = False
    """Others are saved with it, all or none."""
    flat_digests: bool = True
    raw: bool = False

    @property
    def journal(self) -> Job:
        """Its job."""
        return self.job

    def needed_draft(self) -> Draft:
        assert self.draft is not None
        return self.draft

    def begin(self) -> None:
        """All that can be done before it is frozen."""
        if self.hooks.any("pre-checkpoint"):
            self.hooks.before("pre-checkpoint")
            self.options = decided(self.engine, self.container, self.label, self.options, self.emit)
        self.draft = self.catalog.begin(self.container.name or self.container.id)
        self.draft.flat_digests, self.draft.raw = self.flat_digests, self.raw
        self.job.write("dumping", draft=self.draft.id)
        faults.point("dumping")
        if self.streams:
            self.draft.prepare()

    def hold(self, *, stopped_at_s: float | None = None) -> None:
        """Dump, held, and read what must not change meanwhile.

        Args:
            stopped_at_s: its cgroup is frozen since then (time.monotonic()) and stays so; the checkpoint is not to say so.
        """
        if self.draft is None:
            self.begin()
        draft = self.needed_draft()
        self.emit(StepStarted(self.label, "dump"))
        self.frozen_at_s = time.monotonic() if stopped_at_s is None else stopped_at_s
        self._dump(draft, self.host.criu_version)
        self.emit(Frozen(self.label, self.frozen_at_s))
        self.job.write("held")
        faults.point("held")
        if stopped_at_s is not None:
            cgroupimage.thaw(draft.stage / "checkpoint")
        sink = draft.sink if self.options.sealed else None
        capture.frozen_parts(draft.stage, self.container, self.options, emit=self.emit, label=self.label, sink=sink)
        faults.point("captured")
        self.freeze_s = time.monotonic() - self.frozen_at_s

    def go_on(self) -> None:
        """With leave_running: the workload goes on, before the digests are made."""
        if not self.options.leave_running:
            return
        with recover.uninterrupted():
            self.thaw()
            self.job.write("resumed")

    def gone_on(self) -> None:
        """With leave_running: what has to wait until it really runs."""
        if not self.options.leave_running:
            return
        self.hooks.after("post-checkpoint", host=False)
        self._bring_stats()
        faults.point("resumed")

    def keep(self, keep: Keep, step: str = "store") -> None:
        """Complete the draft and make it safe."""
        manifest = self._describe()
        self.dumped = True
        began = time.monotonic()
        self.emit(StepStarted(self.label, step))
        self.kept, self.figures = keep(self.needed_draft(), manifest)
        self.emit(StepDone(self.label, step, self.kept.ref if self.kept else "", time.monotonic() - began))
        faults.point("stored")

    def _describe(self) -> Manifest:
        draft = self.needed_draft()
        manifest = capture.describe(
            draft.stage,
            self.container,
            self.options,
            host=self.host,
            engine_version=self.version,
            freeze_s=self.freeze_s,
            digests=dict(sorted({**layout.digest_members(draft.stage, only=_not_pages if self.raw else None), **draft.digests}.items())),
            look=True,
        )
        self.emit(StepDone(self.label, "dump", "", time.monotonic() - self.frozen_at_s))
        faults.point("described")
        return manifest

    def _dump(self, draft: Draft, criu_version: str) -> None:
        """Freeze and dump, held; the memory goes into the store's chunks as CRIU reads it, where that can be."""
        if not self.streams:
            self.held = self.engine.dump(self.container, draft.stage, self.options, self.job)
            return

        def on_bytes(done: int) -> None:
            self.emit(BytesMoved(self.label, "dump", done))

        limit_s = self.options.timeout_s
        try:
            with intake.PageIntake(
                draft.stage / "checkpoint", criu_version, lambda name: draft.sink(f"checkpoint/{name}"), on_bytes, timeout_s=limit_s
            ) as pages:
                self.job.on_failure = pages.break_off
                self.held = self.engine.dump(self.container, draft.stage, replace(self.options, page_server_port=pages.port), self.job)
                pages.finish()
        except TransferFailed as error:  # of CRIU's pages on this host, not of an archive to another
            raise DumpFailed(error.message, hint=error.hint, log=error.log) from error

    def _bring_stats(self) -> None:
        """After a resume CRIU has written its statistics: they become a member of the checkpoint, as in podman's archives."""
        for path in self._stats_files():
            if not (self.needed_draft().stage / layout.STATS).exists():
                shutil.copyfile(path, self.needed_draft().stage / layout.STATS)

    def thaw(self) -> None:
        """Let the source go on; at most once."""
        held, self.held = self.held, None
        if held is not None:
            held.resume()
            self.freeze_s = time.monotonic() - self.frozen_at_s
            self.emit(Thawed(self.label, self.freeze_s))

    def undo(self, error: BaseException) -> BaseException:
        """Bring the source back and drop the draft; returns what to raise."""
        with recover.uninterrupted():
            try:
                if self.held is not None:
                    self.thaw()
                elif not isinstance(error, CkptError):
                    # Broken off somewhere inside of the engine: it may or may not have been dumping.
                    self.engine.rollback(self.job)
                knobs.restore(self.job)  # CRIU leaves a cgroup frozen that it found frozen
            except CkptError as worse:
                self.discard()
                self.job.release()  # the guard goes on trying
                return _unsure(worse, error, self.label)
            if self.job.facts.get("hooked"):
                self.hooks.after("checkpoint-failed", error=error, inside=self.hooks.begun)
            said = explained(error, self.label, self._whereabouts(), dumped=self.dumped)
            log = recover.keep_logs(self.job, self.label, self.draft.stage if self.draft else None)
            if isinstance(said, CkptError):
                said.log = recover.kept_log(said.log, log)
            self.job.write("rolled-back", error=str(said)[: recover.ERROR_CAP])
            self.discard()
            recover.close(self.job, self.guard)
            return said

    def discard(self) -> None:
        """Remove what was written; a checkpoint that is in the store already stays there, unless it is one of a group that will not be."""
        if self.kept is None and self.draft is not None:
            self.draft.discard()
        elif self.kept is not None and self.in_group:
            with suppress(TargetNotFound):
                self.catalog.remove(self.kept)

    def finish(self, *, look: bool = True) -> Outcome:
        """The checkpoint is safe: end the source. From here on nothing is undone."""
        kept, figures = self.kept, self.figures
        with recover.uninterrupted():
            self.job.write("commit", checkpoint_id=kept.manifest.id if kept else "", freeze_s=round(self.freeze_s, 6))
            faults.point("commit")
            try:
                if self.held is not None:
                    self.held.end()
                    self.held = None
            except CkptError as error:
                if kept is None:
                    self.discard()
                self.job.release()  # the guard gives the verdict again
                where = f"{kept.ref if kept else 'its archive'} is complete; {self.label} may still be frozen"
                worse = StateUnknown(
                    f"{self.label} was saved, but could not be ended: {error.message}",
                    where=where,
                    hint=error.hint or f"look at {self.label} with its own engine and stop it",
                    log=error.log,
                )
                return Outcome(self.label, False, checkpoint=kept, container=self.container, error=worse)
            faults.point("ended")
            stats = capture.dump_stats(kept.directory if kept else self.needed_draft().stage, *self._stats_files())
            if self.hooks.host:
                self.hooks.facts |= {"checkpoint": kept.ref} if kept else {}
                self.hooks.after("post-checkpoint", inside=False)
            self.job.write("done")
            if kept is None:
                self.discard()
            recover.close(self.job, self.guard)
        now = self.container
        if look:
            with suppress(CkptError):
                now = self.engine.describe(self.container)
        sizes: dict[str, float | int | str] = {"size_bytes": kept.manifest.size_bytes} if kept else {}
        warnings = tuple(self.hooks.warnings)
        return Outcome(
            self.label, True, kept, now, warnings=warnings, stats={"freeze_s": round(self.freeze_s, 6), **sizes, **_figures(stats), **figures}
        )

    def _stats_files(self) -> list[Path]:
        """Where CRIU leaves its statistics: the work directory that the engine gave it, in the job's."""
        return [path for pattern in ("stats-dump", "*/stats-dump") for path in sorted(self.job.directory.glob(pattern))]

    def _whereabouts(self) -> str:
        try:
            now = self.engine.describe(self.container)
        except CkptError:
            return f"{self.label} is gone"
        return f"{self.label} is {now.state}"


def _not_pages(name: str) -> bool:
    return not layout.is_pages(name)


def ready(container: Container, label: str) -> None:
    """Raise BusyError, with what to do, unless the container runs."""
    if container.state == "running":
        return
    hints = {
        "paused": "unpause it first: a paused container cannot be dumped",
        "exited": "there is nothing to save; start it first",
        "created": "there is nothing to save yet; start it first",
    }
    raise BusyError(f"{label} is {container.state}, not running", where=f"{label} is {container.state}, untouched", hint=hints.get(container.state))


def decided(engine: NamedEngine, container: Container, label: str, options: DumpOptions, emit: Emit) -> DumpOptions:
    """The options as `settle` has them, and nothing stands in the way of a dump. Raises what `check` finds."""
    chosen = settle(engine, container, label, options, emit)
    checks.raise_on_error(label, checks.local_findings(engine, container, chosen))
    return chosen


def settle(engine: NamedEngine, container: Container, label: str, options: DumpOptions, emit: Emit) -> DumpOptions:
    """The options with nothing left open: what the user did not say is found out by looking at the workload, and told."""
    chosen = checks.decide(engine, container, options)
    for text, now, before in (
        ("has TCP connections (or may get some): they are saved too", chosen.tcp_established, options.tcp_established),
        ("holds file locks: they are saved too", chosen.file_locks, options.file_locks),
        ("sits on a terminal: it is saved as a shell job", chosen.shell_job, options.shell_job),
    ):
        if now and before is None:
            emit(Notice(label, text))
    return chosen


def explained(error: BaseException, label: str, whereabouts: str, *, dumped: bool = False) -> BaseException:
    """The error as a person gets it, with where the workload is now. Bugs and interruptions stay what they are.

    Args:
        dumped: it came after the dump, from where the archive goes to.
    """
    if isinstance(error, _AS_THEY_ARE) or (dumped and isinstance(error, _CARRIED)):
        error.where = error.where or whereabouts
        return error
    if isinstance(error, CkptError):
        return DumpFailed(error.message, where=error.where or whereabouts, hint=error.hint, log=error.log)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"no space left to save {label}", where=whereabouts, hint="free some space (ckpt prune, ckpt rm) or name another store")
    if isinstance(error, (OSError, CommandFailed)):
        return DumpFailed(f"{label} could not be saved: {error}", where=whereabouts)
    return error


def _find(targets: Sequence[Target], *, all: bool, latest: bool) -> tuple[list[tuple[str, NamedEngine, Container]], list[Outcome]]:
    if all or latest:
        if targets:
            raise UsageError("name targets, or say --all or --latest, not both")
        pairs = resolve.all_running() if all else [resolve.latest()]
        return [(container.name or container.id, engine, container) for engine, container in pairs], []
    if not targets:
        raise UsageError("name what to checkpoint", hint="a container, or --all, or --latest")
    found: dict[tuple[str, str], tuple[str, NamedEngine, Container]] = {}
    failed: list[Outcome] = []
    for target in targets:
        try:
            engine, container = resolve.resolve(target)
            found.setdefault((engine.name, container.id), (str(target), engine, container))
        except CkptError as error:
            failed.append(failure(str(target), error))
    return list(found.values()), failed


def _unsure(worse: CkptError, error: BaseException, label: str) -> StateUnknown:
    first = error.message if isinstance(error, CkptError) else str(error) or type(error).__name__
    return StateUnknown(
        f"saving {label} failed ({first}), and so did letting it go on: {worse.message}",
        where=worse.where or f"{label} may be frozen",
        hint=worse.hint or "ckpt tries again in the background and at its next start",
        log=worse.log,
    )


def _figures(stats: DumpStats) -> dict[str, float | int | str]:
    values: dict[str, float | int | str] = {name: getattr(stats, name) for name in stats.__dataclass_fields__}
    return values if any(values.values()) else {}
