"""Migration: one command that moves a running workload to another host, with exactly one live copy at every moment.

DESIGN section 3: the source's dump is held (frozen, network locked) until the destination holds the restored tree; the
source's journal says `commit`, the destination resumes, the source ends. Before `commit` every failure lets the source go
on; after it only the destination's journal decides, and the source stays frozen until it has been asked.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

from ckpt.archive import layout
from ckpt.archive import manifest as manifest_file
from ckpt.engines.base import CarriesContainerImages, Engine, HeldDump
from ckpt.errors import BusyError, CkptError, MigrationRolledBack, NeedsContinue, StateUnknown, TransferFailed
from ckpt.events import BytesMoved, Emit, Figures, Frozen, Notice, StepDone, StepStarted, Thawed
from ckpt.host import announce, traffic
from ckpt.host.run import Process
from ckpt.model import Carriage, Container, DumpOptions, HostFacts, Manifest, PrecopyLimits, Target
from ckpt.ops import capture, consent, faults, filling, look, recover, statistics
from ckpt.ops import hooks as hooking
from ckpt.ops.early import EarlyStart
from ckpt.ops.memory import MemoryMove
from ckpt.ops.migrate_end import ask_destination, continue_, end_source, tell_destination
from ckpt.ops.moments import Moment
from ckpt.ops.resolve import resolve
from ckpt.ops.result import Outcome, failure
from ckpt.peer import client
from ckpt.peer.client import Peer
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.job import DEFAULT_ROOT, Job
from ckpt.transports import ssh
from ckpt.transports.https_peer import Access

if TYPE_CHECKING:
    from ckpt.ops.ahead import FilesAhead

RESTORE_LIMIT_S: Final = 230.0
ASK_LIMIT_S: Final = 20.0
"""After `commit`, for this long the destination is asked again how it ended before the answer is left to --continue."""
STEPS: Final = (
    *("check", "begin", "container-image", "files", "precopy", "prepare", "dump", "pages", "capture", "transfer", "restore"),
    *("commit", "resume", "follow", "end", "remove"),
)
"""The plan, in order; `commit` is the point of no return. Each is also a fault point `migrate-STEP` for the tests."""


__all__ = ["STEPS", "MigrateOptions", "continue_", "migrate", "plan"]


@dataclass(frozen=True, slots=True)
class MigrateOptions:
    """How to migrate. None means: ckpt looks at the workload and chooses."""

    name: str | None = None
    keep_source: bool = False
    tcp_established: bool | None = None
    file_locks: bool | None = None
    ignore_volumes: bool = False
    ssh_options: tuple[str, ...] = ()
    access: Access | None = None
    """To a destination behind `https://`."""
    publish: tuple[str, ...] = ()
    precopy: PrecopyLimits | None = None
    """Copy memory while the workload runs, first."""
    postcopy: bool = False
    """Switch over before the memory is there."""
    lazy: bool | None = None
    """Let it run there before its memory is in place."""
    carriage: Carriage = Carriage()
    """Limit of the rate, compression."""
    timeout_s: float = RESTORE_LIMIT_S
    hooks: bool = True
    """Run what is to run before and after, here and inside of it (ops/hooks.py)."""
    override_label: bool = False
    """Do it even if a label of the container forbids it."""


def plan(target: Target, destination: str, *, options: MigrateOptions) -> list[tuple[str, str]]:
    """The steps as (name, what it does) for --dry-run."""
    texts = {
        "check": f"look at {target} here and at {destination}; nothing is touched",
        "begin": "open a journal on both hosts",
        "container-image": "bring the container image along, by id, if it is missing there",
        "files": "send its root file system and volumes while it runs, then again what changed",
        "precopy": "send its memory while it runs, then again what changed" if options.precopy else "(not asked for)",
        "prepare": "let the engine there make ready for it, where that cannot be in the way of the original",
        "dump": "freeze the workload and dump it, held",
        "pages": "leave its memory here for now" if options.postcopy else "send its memory while it is frozen; none of it is written here",
        "capture": "send what changed in them since, still frozen",
        "transfer": "send the rest of the checkpoint, digests compared",
        "restore": "restore it there, held",
        "commit": "journal the point of no return",
        "resume": "let it run there",
        "follow": "send its memory, as it is needed and in the background" if options.postcopy else "(not asked for)",
        "end": "end the frozen source",
        "remove": "keep the stopped source" if options.keep_source else "remove the source container and the volumes that moved",
    }
    return [(step, texts[step]) for step in STEPS]


class Attempt:
    """One migration from this host, up to its outcome. `run` is all of it; a group (group_migrate) takes the steps of several together."""

    def __init__(self, typed: str, engine: Engine, container: Container, destination: str, options: MigrateOptions, root: Path, emit: Emit) -> None:
        self.typed = typed
        self.engine = engine
        self.container = container
        self.destination = destination
        self.options = options
        self.root = root
        self.emit = emit
        self.job: Job | None = None
        self.guard: Process | None = None
        self.draft: Draft | None = None
        self.held: HeldDump | None = None
        self.committed = False
        self.peer_name = ""
        self.memory = MemoryMove(
            typed, engine, container, emit, step=self.step, done=self.done, precopy=options.precopy, postcopy=options.postcopy, lazy=options.lazy
        )
        self.files: FilesAhead | None = None
        self.early = EarlyStart(engine, container)
        self.frozen_at_s = 0.0
        self.began_s = time.monotonic()
        self.stats: dict[str, float | int | str] = {}
        self.hooks = hooking.none(typed)
        self.job_facts: dict[str, Any] = {}
        """More for the first line of the journal."""
        self.begin_args: dict[str, Any] = {}
        """More for the destination's journal."""
        self.begun_there: dict[str, Any] = {}
        self.stopped_at_s: float | None = None
        """It stands still since then, by somebody else's doing."""

    def step(self, name: str, detail: str = "") -> None:
        """A step begins: told, and a fault point for the tests."""
        self.emit(StepStarted(self.typed, name, detail))
        faults.point(f"migrate-{name}")

    def done(self, name: str, detail: str = "") -> None:
        self.emit(StepDone(self.typed, name, detail))

    def run(self) -> Outcome:
        """All steps; undoes what it did when one before `commit` fails."""
        try:
            with ExitStack() as stack:
                dump_options, peer, report = self.check(stack)
                self.begin(peer)
                try:
                    self.bring_container_image(peer, report)
                    self.files_ahead(peer)
                    self.memory.send_ahead(peer, cast(Job, self.job))
                    if self.files is not None and self.options.precopy:
                        self.files.ahead()  # what was written while the memory went over
                    host = capture.host_facts()  # asks CRIU for its version: not while the workload is frozen
                    self.prepare(peer, report, dump_options, host)
                    self.hooks.before("pre-checkpoint")
                    manifest = self.dump_and_send(peer, dump_options, host)
                    self.step("restore")
                    self.memory.begin_to_follow(peer)
                    peer.call(
                        "restore", {"manifest": manifest_file.dumps(manifest).decode(), **self.restore_args()}, timeout_s=self.options.timeout_s
                    )
                    assert self.held is not None and self.draft is not None
                    self.early.confirm(self.held, self.draft.stage)
                    self.done("restore", "held there")
                except BaseException:
                    with suppress(CkptError):
                        peer.call("abort", timeout_s=60)
                    self.memory.give_up()
                    raise
                self.switch_over(peer)
        except BaseException as error:
            self.give_up(error)
            raise
        stats = {**self.stats, **self.memory.stats}
        container = replace(self.container, name=self.options.name or self.container.name)
        return Outcome(self.typed, True, container=container, warnings=tuple(self.hooks.warnings), stats=stats)

    def check(self, stack: ExitStack) -> tuple[DumpOptions, Peer, dict[str, Any]]:
        """Everything that can be known before anything is touched, on both ends."""
        from ckpt.ops import check

        self.step("check")
        container = self.container
        if container.state != "running":
            hint = f"podman unpause {container.name}" if container.state == "paused" else "only a running workload can be migrated"
            raise BusyError(
                f"{container.name} is {container.state}, not running", where=f"{container.name} is {container.state}, untouched", hint=hint
            )
        labels = consent.require(container, "migrate", override=self.options.override_label, emit=self.emit)
        if labels.overridden:
            self.emit(Figures(self.typed, {"overridden": labels.overridden}))
        facts = {"destination": self.destination}
        self.hooks = hooking.gather(self.typed, self.engine, labels, container=container, enabled=self.options.hooks, emit=self.emit, facts=facts)
        filling.bring_rest(self.root, container.pid or 0)
        wanted = DumpOptions(
            tcp_established=self.options.tcp_established, file_locks=self.options.file_locks, ignore_volumes=self.options.ignore_volumes
        )
        wanted = check.decide(self.engine, container, wanted)
        check.raise_on_error(container.name, check.local_findings(self.engine, container, wanted))
        try:
            peer = stack.enter_context(self.connect())
            self.peer_name = peer.hostname
            asked = self.options
            request = check.destination_request(container, name=asked.name, publish=asked.publish, ignore_volumes=asked.ignore_volumes)
            report = peer.call("facts", request)
        except CkptError as error:
            error.where = error.where or f"{container.name} is running, untouched"
            raise
        kinds = look.open_kinds(container)
        self.memory.size_bytes = kinds.dump_bytes if kinds else None
        findings = check.destination_findings(container, report, name=self.options.name, kinds=kinds)
        for finding in findings:
            if finding.severity == "warning":
                self.emit(Notice(self.typed, f"{finding.check}: {finding.detail}", warning=True))
        check.raise_on_error(container.name, findings, to=peer.hostname)
        self.emit(Figures(self.typed, {**statistics.of_hosts(report), "memory_bytes": kinds.dump_bytes if kinds else None}))
        self.memory.choose(report, peer.hostname)
        self.done("check", f"nothing stands in the way of {peer.hostname}")
        return wanted, peer, report

    def connect(self) -> AbstractContextManager[Peer]:
        """The way to the destination."""
        asked = self.options
        return client.connect(self.destination, ssh_options=asked.ssh_options, access=asked.access, carriage=asked.carriage)

    def begin(self, peer: Peer) -> None:
        container = self.container
        self.step("begin")
        facts: dict[str, Any] = {"destination": self.destination, "ssh_options": list(self.options.ssh_options)}
        facts["keep_source"] = self.options.keep_source
        facts["access"] = self.options.access.to_json() if self.options.access is not None else None
        facts["moved_volumes"] = [] if self.options.ignore_volumes else [volume.name for volume in container.volumes]
        facts |= self.job_facts
        self.job = Job.create(self.root, "migrate-source", engine=self.engine.name, container_id=container.id, name=container.name, **facts)
        self.emit(Figures(self.typed, {"job": self.job.id}))
        self.guard = recover.start_guard(self.job)
        self.draft = Catalog(self.root).begin(container.name)
        self.hooks.job = self.job
        self.hooks.before("pre-migrate")
        what = {"engine": self.engine.name, "name": self.options.name or container.name, "container_id": container.id, "hooks": self.options.hooks}
        what |= self.begin_args
        self.begun_there = there = peer.call("begin", what, timeout_s=hooking.HOST_LIMIT_S)
        self.done("begin")
        self.job.write("begun", remote_job=there["job"], remote_machine=there.get("machine", ""))

    def bring_container_image(self, peer: Peer, report: dict[str, Any]) -> None:
        image = self.container.container_image
        if image is None or report.get("container_image") is not False:
            self.done("container-image", "already there" if image else "none needed")
            faults.point("migrate-container-image")
            return
        self.step("container-image", image.name)
        carrier = cast(CarriesContainerImages, self.engine)
        with peer.upload("container-image", {"id": image.id, "name": image.name}) as upload, carrier.save_container_image(image) as stream:
            upload.send_stream("container-image.tar", stream, on_bytes=lambda done: self.emit(BytesMoved(self.typed, "container-image", done)))
        self.stats["container_image_bytes"] = upload.done_bytes
        self.done("container-image", f"{image.name} sent")

    def files_ahead(self, peer: Peer) -> None:
        """Send root file system and volumes while the workload runs."""
        from ckpt.ops.ahead import FilesAhead

        self.step("files")
        self.files = FilesAhead(peer, self.container, ignore_volumes=self.options.ignore_volumes, typed=self.typed, emit=self.emit)
        self.files.ahead()
        self.done("files", f"{self.files.ahead_bytes / (1 << 20):.1f} MiB")

    def restore_args(self) -> dict[str, Any]:
        """How it is to be restored there."""
        asked = self.options
        given = {"name": asked.name, "publish": list(asked.publish), "ignore_volumes": asked.ignore_volumes}
        return {**given, **self.memory.restore_args()}

    def prepare(self, peer: Peer, report: dict[str, Any], options: DumpOptions, host: HostFacts) -> None:
        """Let the destination's engine begin, so that less is left for the pause."""
        self.step("prepare")
        if self.memory.quick and self.early.possible(report):
            assert self.job is not None and self.draft is not None
            self.early.begin(peer, self.draft.stage, options, host, self.job, self.restore_args())
        self.done("prepare", "stands ready" if self.early.begun else "not possible before the dump")

    def dump_and_send(self, peer: Peer, options: DumpOptions, host: HostFacts) -> Manifest:
        """Freeze, dump, read what belongs to it, send everything; the dump stays held."""
        assert self.job is not None and self.draft is not None
        stage = self.draft.stage
        options = replace(options, sketched=self.early.begun)
        self.step("dump")
        began_s = time.monotonic()
        with Moment(self.container.pid, stopped=True) as stop:
            self.held = self.memory.dump(peer, stage, options, self.job, host.criu_version)
        self.dumped()
        self.frozen_at_s = self.stopped_at_s or stop.at_s or began_s
        self.emit(Frozen(self.typed, self.frozen_at_s))
        self.done("dump", f"{time.monotonic() - began_s:.2f} s")
        self.early.after_dump(peer, self.held, stage)
        self.step("capture")
        if self.files is not None:
            self.files.finish(stage)
            self.stats["files_ahead_bytes"], self.stats["files_paused_bytes"] = self.files.ahead_bytes, self.files.paused_bytes
            self.stats["files_rounds"] = self.files.rounds
        self.done("capture")
        manifest = capture.describe(stage, self.container, options, host=host, digests={})
        members = [name for name in layout.stage_members(stage) if (stage / name).is_file() and name not in self.early.digests]
        sizes = {name: (stage / name).stat().st_size for name in members}
        total_bytes = sum(sizes.values())
        self.emit(Figures(self.typed, statistics.of_members(sizes)))
        self.step("transfer")
        with peer.upload("stage") as upload:
            upload.send_stage(stage, members, on_bytes=lambda done: self.emit(BytesMoved(self.typed, "transfer", done, total_bytes)))
        self.stats.update(peer.statistics())
        self.done("transfer", f"{total_bytes / (1 << 20):.1f} MiB")
        sent = {name: f"sha256:{digest}" for name, digest in upload.digests.items()}
        return replace(manifest, id=self.draft.id, digests={**self.early.digests, **sent})

    def dumped(self) -> None:
        """It is dumped, held; what of that is not to be in the checkpoint can be set right."""

    def switch_over(self, peer: Peer) -> None:
        assert self.job is not None and self.held is not None
        self.step("commit")
        with recover.uninterrupted():
            self.job.write("commit")
            self.committed = True
            faults.point("migrate-committed")
            self.resume_there(peer)
            self.end_here()
        self.tell_there(peer)

    def resume_there(self, peer: Peer) -> None:
        """Let it run on the destination; `commit` is on the disk."""
        self.emit(StepStarted(self.typed, "resume"))
        asked_s, ran_after_s = time.monotonic(), None
        try:
            faults.point("migrate-resume")
            answer = peer.call("resume", timeout_s=60)
            ran_after_s = answer.get("ran_after_s")
            self.stats["container_id"] = str(answer.get("container_id", ""))
            if answer.get("warning"):
                self.emit(Notice(self.typed, f"{self.peer_name}: {answer['warning']}", warning=True))
        except CkptError as error:
            if isinstance(error, TransferFailed):
                self.ask(error)
            else:
                self.refused(error)
        took_s = time.monotonic() - asked_s
        frozen_s = asked_s - self.frozen_at_s + (min(ran_after_s, took_s) if isinstance(ran_after_s, float) else took_s)
        self.stats["downtime_s"] = frozen_s
        self.emit(Thawed(self.typed, frozen_s))
        self.done("resume", f"frozen {frozen_s * 1000:.0f} ms")

    def refused(self, error: CkptError) -> NoReturn:
        """After `commit` the destination says that it did not take over: take that back."""
        assert self.job is not None
        self.job.write("failed")
        self.committed = False
        raise error

    def end_here(self) -> None:
        """It runs there: end the source."""
        assert self.job is not None and self.held is not None
        if self.options.postcopy:
            # The frozen source's network goes on answering who has its address (ARP); its end may be a while off.
            traffic.block(self.job.directory, self.container.addresses)
        self.memory.follow(self.job)
        self.step("end")
        stage = self.draft.stage if self.draft else None
        end_source(self.engine, self.container, self.held, self.job, self.options.keep_source, stage=stage, faults_at="migrate-remove")

    def tell_there(self, peer: Peer) -> None:
        """The source is gone: the destination need not remember."""
        assert self.job is not None
        self.hooks.succeeded_there()
        told = tell_destination(self.job, peer, greeting_s=self.hooks.limit_s("post-restore"), warn=self.hooks.warn)
        if told:
            self.job.write("done")
        self.stats.update(peer.statistics())
        self.stats["total_s"] = time.monotonic() - self.began_s
        if told:
            self.close()
            return
        self.emit(
            Notice(self.typed, f"{self.destination} could not be told that all is done; to tidy up there: ckpt migrate --continue {self.job.id}")
        )
        if self.draft is not None:
            self.draft.discard()
        self.job.release()

    def ask(self, cause: CkptError) -> None:
        """After `commit`, with the link lost: the destination's journal decides. Returns when the workload runs there."""
        assert self.job is not None
        deadline_s = time.monotonic() + ASK_LIMIT_S
        while True:
            try:
                state = ask_destination(self.job).state
            except CkptError as error:
                state, cause = "undecided", error
            if state == "running":
                return
            if state == "failed":
                self.refused(TransferFailed(f"lost the link to {self.destination} at the switchover, before it took over"))
            if time.monotonic() > deadline_s:
                raise NeedsContinue(
                    f"no answer from {self.destination} after the point of no return: {cause.message}",
                    where=f"{self.container.name} is frozen here, and may be running on {self.destination}",
                    hint=f"when {self.destination} can be reached again: ckpt migrate --continue {self.job.id}",
                )
            time.sleep(0.2)

    def give_up(self, error: BaseException) -> None:
        """Undo this end, and say in the error where the workload is."""
        name = self.container.name
        if self.committed:
            if self.job is not None:
                self.job.release()
            if self.draft is not None:
                self.draft.discard()
            return
        with recover.uninterrupted():
            self.let_go()
            if self.job is not None:
                kept = recover.keep_logs(self.job, name, None)
                if isinstance(error, CkptError) and not (error.log or "").startswith(f"{self.peer_name}:"):
                    error.log = recover.kept_log(error.log, kept)
                self.hooks.failed_there(error)
                self.job.write("rolled-back")
            self.close()
        where = f"{name} is running here, nothing is left on {self.destination}" if self.job is not None else f"{name} is running, untouched"
        if isinstance(error, CkptError):
            error.where = where if self.job is not None else error.where or where
        elif isinstance(error, KeyboardInterrupt):
            self.emit(Notice(self.typed, f"stopped; {where}"))

    def let_go(self) -> None:
        """Let the source go on, if it was held."""
        if self.held is not None:
            self.held.resume()
            announce.now(self.container.pid or 0)  # the other host may have drawn its address to itself already
            self.emit(Thawed(self.typed, time.monotonic() - self.frozen_at_s))

    def close(self) -> None:
        if self.draft is not None:
            self.draft.discard()
        if self.job is not None:
            recover.close(self.job, self.guard)


def migrate(target: Target, destination: str, *, options: MigrateOptions, store_root: Path = DEFAULT_ROOT, emit: Emit) -> Outcome:
    """Move a running workload to another host.

    Args:
        destination: `[user@]host[:port]`, `ssh://…`, or `https://host:port` of a `ckpt serve`.

    Returns:
        The outcome; its error is a MigrationRolledBack (the source runs), a NeedsContinue (frozen, --continue resolves), or what the
        check before anything was touched found.
    """
    history = statistics.Migration(str(target), destination, statistics.mode_of(options), store_root, emit)
    try:
        return history.close(_migrate(target, destination, options, store_root, history))
    except BaseException as error:
        history.broken_off(error)
        raise


def _migrate(target: Target, destination: str, options: MigrateOptions, store_root: Path, emit: statistics.Migration) -> Outcome:
    typed = str(target)
    try:
        for said in recover.sweep(store_root):
            emit(Notice(typed, said))
        client.parse(destination)
        engine, container = resolve(target)
        container = engine.describe(container)
        emit.begin(container)
        move = Attempt(typed, engine, container, destination, options, store_root, emit)
        try:
            return move.run()
        except ssh.PeerMissing:
            from ckpt.ops import migrate_plain

            return migrate_plain.migrate(typed, engine, container, destination, options=options, store_root=store_root, emit=emit)
        except (NeedsContinue, StateUnknown) as error:
            return failure(typed, error)
        except CkptError as error:
            if move.job is None:
                return failure(typed, error)
            rolled = MigrationRolledBack(f"{container.name} was not migrated: {error.message}", where=error.where, hint=error.hint, log=error.log)
            rolled.__cause__ = error
            return failure(typed, rolled)
    except CkptError as error:
        return failure(typed, error)
