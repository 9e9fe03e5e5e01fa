"""The destination's side of a migration: the handlers behind `ckpt peer`.

The destination's journal decides. Until it says `commit` everything is undone when the source asks for it, or when the link, this
process or the host is lost; from then on the restored workload is the live one, whatever happens to the source.
"""

from __future__ import annotations

import os
import re
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from ckpt.archive import layout
from ckpt.archive import manifest as manifest_file
from ckpt.archive.untagged import Untagged
from ckpt.criu import action
from ckpt.criu import lazy as memory
from ckpt.criu.pagestream import PageWriter
from ckpt.engines import registry
from ckpt.engines.base import CarriesContainerImages, CarriesVolumes, EarlyRestore, Engine, HeldRestore, StartsEarly
from ckpt.errors import BusyError, CkptError, DigestMismatch, RestoreFailed, UsageError
from ckpt.host import announce
from ckpt.host.run import Process
from ckpt.model import Container, ContainerImage, Manifest, RestoreOptions
from ckpt.ops import ahead_dest, faults, group_dest, groupjob, journald, lazy, policy, proof, recover
from ckpt.ops import hooks as hooking
from ckpt.ops.consent import Labels
from ckpt.ops.moments import Moment
from ckpt.peer.files import ReceivedFile
from ckpt.peer.server import Handler, Session
from ckpt.store import place
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.job import DEFAULT_ROOT, Job

CONCURRENT: Final = ("memory",)
"""Verbs that run beside others."""
QUESTIONS: Final = frozenset({"facts", "status", "settle"})
"""Verbs that begin nothing: who may look at a destination, or asks how a migration ended, gets no more."""
_IMAGE_MEMBER: Final = "container-image.tar"
_AHEAD_CAP: Final = 1000
_PAGES_MEMBER: Final = "pages"
_JOB_ID: Final = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}")


class Arrival:
    """One migration arriving here, from `begin` to `finish`, `abort` or the loss of the link."""

    def __init__(self, root: Path, engine: Engine, facts: dict[str, Any]) -> None:
        self.root = root
        self.engine = engine
        self.job = Job.create(root, "migrate-destination", engine=engine.name, **facts)
        self.guard: Process | None = recover.start_guard(self.job)
        self.draft: Draft | None = None
        self.held: HeldRestore | None = None
        self.digests: dict[str, str] = {}
        self.keeper: lazy.Keeper | None = None
        self.early: EarlyRestore | None = None
        self.lead: group_dest.Lead | None = None
        """The group's job, at the member that decides for it."""
        self.trees = ahead_dest.Trees(engine, self.job)
        self.over = False
        self.pid: int | None = None
        self.allow: tuple[str, ...] = ()
        self.hooks = hooking.none(str(facts.get("name", "")))
        self.greeter: threading.Thread | None = None
        self.inside = True
        """Hooks of the container run; those of this host always do."""
        self.trusted = True
        """False: the other end is not one who may log in here as root, so what it sends is judged as an import is."""

    def undo(self) -> None:
        """Remove everything that arrived. Never called after `commit`. Idempotent."""
        if self.over:
            return
        self.over = True
        groupjob.abandon(self.job)
        self.trees.close()
        if self.held is not None:
            self.held.abort()
        elif self.early is not None:
            self.early.abort()
        if self.keeper is not None:
            self.keeper.abort()
        self.drop_draft()
        if self.job.facts.get("volumes_ahead"):
            cast(CarriesVolumes, self.engine).drop_volumes(self.job)
        image_id = self.job.facts.get("loaded_image")
        if image_id:
            cast(CarriesContainerImages, self.engine).remove_container_image(str(image_id))
        if self.job.facts.get("hooked"):
            self.hooks.after("restore-failed", error="the migration was rolled back", inside=False)
        self.job.write("rolled-back")
        recover.close(self.job, self.guard)
        if self.lead is not None:
            self.lead.leave()

    def greet(self, container: Container) -> None:
        """It runs: the hooks that wait for that run beside what else there is to do; `greeted` waits for them."""

        def run() -> None:
            self.hooks.labels = hooking.soft_labels(container, container.name, self.hooks.emit) if self.inside else Labels()
            self.hooks.after("post-restore", container=container)
            self.job.write(self.job.state, hooked="")

        self.greeter = threading.Thread(target=run, name="hooks", daemon=True)
        self.greeter.start()

    def greeted(self) -> list[str]:
        """Wait for the hooks; what went wrong with them."""
        if self.greeter is not None:
            self.greeter.join()
        return self.hooks.warnings

    def drop_draft(self) -> None:
        """Remove the staged checkpoint; one whose memory is still needed is left to the keeper."""
        if self.draft is not None and self.keeper is not None and recover.committed(self.job):
            self.draft.close()
        elif self.draft is not None:
            self.draft.discard()
        self.draft = None

    def leave(self) -> None:
        """The link is lost. Before `commit`: undo. After: the workload lives here; the journal stays for the source's question."""
        if self.over:
            return
        if groupjob.abandon(self.job):
            self.undo()
            return
        if self.job.state == "prepared":  # its group was decided for, and nobody told it any more to run
            try:
                let_run(self)
            except CkptError:
                return  # undone
        self.over = True
        self.trees.close()
        self.greeted()
        self.drop_draft()
        self.job.release()
        if self.lead is not None:
            self.lead.leave()


def handlers(root: Path = DEFAULT_ROOT, *, trusted: bool = True, allow: tuple[str, ...] = ()) -> dict[str, Handler]:
    """The verbs of `ckpt peer` that migrations use.

    Args:
        trusted: the other end could log in here as root. False: what it sends is judged (see policy).
        allow: what it may have nevertheless, as KIND:VALUE.
    """

    def facts(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        from ckpt.ops.destination import destination_report

        return destination_report(args)

    def begin(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        recover.sweep(root)
        engine = registry.by_name(str(args["engine"]))
        lead, of_group = group_dest.join(root, args, session.source)
        known = {"name": str(args["name"]), "container_id": str(args["container_id"]), "source": session.source}
        arrival = Arrival(root, engine, {**known, **of_group})
        arrival.lead = lead
        arrival.trusted, arrival.allow = trusted, allow
        session.state["arrival"] = arrival
        session.on_lost(arrival.leave)
        arrival.draft = Catalog(root).begin(str(args["name"]), origin="migrate")
        arrival.inside = bool(args.get("hooks", True))
        known = {"name": str(args["name"]), "source": session.source}
        arrival.hooks = hooking.gather(str(args["name"]), engine, Labels(), facts=known, job=arrival.job)
        arrival.hooks.before("pre-restore")
        faults.point("destination-begin")
        return {"job": arrival.job.id, "machine": machine_id(), **of_group}

    return {
        "facts": facts,
        "begin": begin,
        "container-image": receive_container_image,
        "pages": receive_pages,
        "tree": receive_tree,
        "stage": receive_stage,
        "memory": lambda session, args: receive_memory(session, args, root),
        "prepare": begin_restore,
        "restore": restore,
        "resume": resume,
        "group-commit": decide,
        "finish": finish,
        "abort": abort,
        "status": lambda session, args: status(root, args),
        "settle": lambda session, args: forget(root, args),
    }


def machine_id() -> str:
    """Which machine this is, so that a question about a job is not asked of another one (machine-id(5), else the boot's id)."""
    for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text and text != "uninitialized":
            return text
    return ""


def _arrival(session: Session) -> Arrival:
    arrival = session.state.get("arrival")
    if not isinstance(arrival, Arrival) or arrival.over:
        raise UsageError("no migration was begun on this link")
    return arrival


def receive_container_image(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """Load the container image that the source sends, and make sure that it is the very one."""
    arrival = _arrival(session)
    engine = cast(CarriesContainerImages, arrival.engine)
    image = ContainerImage(str(args["id"]), str(args["name"]))
    process = engine.load_container_image()
    assert process.stdin is not None and process.stderr is not None and arrival.draft is not None
    arrival.job.write("container-image", loaded_image=image.id)
    untagged = Untagged(cast(BinaryIO, process.stdin))
    try:
        session.receive_files(arrival.draft.stage, allow=lambda path: path == _IMAGE_MEMBER, sinks={_IMAGE_MEMBER: cast(BinaryIO, untagged)})
        untagged.close()
        process.stdin.close()
        process.wait(timeout=300)
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode != 0 or not engine.has_container_image(image.id):
        said = process.stderr.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
        raise RestoreFailed(f"container image {image.name} could not be loaded: {said or 'its id changed on the way'}")
    engine.name_container_image(image)
    faults.point("destination-container-image")
    return {}


def receive_stage(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """Receive members of the checkpoint into the draft; their digests are kept for `restore`."""
    arrival = _arrival(session)
    assert arrival.draft is not None
    received: list[ReceivedFile] = session.receive_files(arrival.draft.stage, allow=layout.is_allowed)
    for file in received:
        arrival.digests[file.path] = file.sha256 if file.sha256.startswith("sha256:") else f"sha256:{file.sha256}"
    faults.point("destination-stage")
    return {"files": len(received)}


def receive_tree(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """Follow what changed in the root file system or in a volume (see ahead)."""
    arrival = _arrival(session)
    assert arrival.draft is not None
    arrival.trees.receive(session, arrival.draft.stage, args)
    return {}


def _number(args: dict[str, Any], key: str) -> int | None:
    value = args.get(key)
    if value is not None and not (isinstance(value, int) and 0 <= value < _AHEAD_CAP):
        raise UsageError(f"{value!r} is no number of memory images")
    return value


def _ahead(stage: Path, number: int) -> Path:
    """The directory of one round's memory images, beside that of the dump."""
    return stage / f"ahead-{number}"


def receive_pages(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """Make CRIU images of the memory pages that the source's dump sends. They come before the rest of the checkpoint."""
    arrival = _arrival(session)
    assert arrival.draft is not None
    stage, number, parent = arrival.draft.stage, _number(args, "images"), _number(args, "parent")
    directory = stage / "checkpoint" if number is None else _ahead(stage, number)
    directory.mkdir(mode=0o700, exist_ok=True)
    if parent is not None and not _ahead(stage, parent).is_dir():
        raise UsageError(f"there are no memory images number {parent}")
    with PageWriter(directory, parent=None if parent is None else _ahead(stage, parent)) as writer:
        session.receive_files(arrival.draft.stage, allow=lambda path: path == _PAGES_MEMBER, sinks={_PAGES_MEMBER: cast(BinaryIO, writer)})
        writer.finish()
        faults.point("destination-pages")
        return {"pages_bytes": writer.pages_bytes}


def receive_memory(session: Session, args: dict[str, Any], root: Path) -> dict[str, Any]:
    """Post-copy: bring the keeper of the restored workload what it asks of the source; of this migration, or again of one that was cut."""
    from ckpt.ops import arriving

    if args.get("job"):
        job = _job(root, args)
        if job is None:
            raise UsageError(f"there is no job {args['job']} here")
        return arriving.bridge(session, job.directory)
    return arriving.bridge(session, _arrival(session).job.directory)


def begin_restore(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """Begin the engine's restore of what is sketched in the stage, while the source still runs; with `undo` take it back."""
    arrival = _arrival(session)
    assert arrival.draft is not None
    if args.get("undo"):
        arrival.trees.unsettle(arrival.draft.stage)
        if arrival.early is not None:
            arrival.early.abort()
            arrival.early = None
        return {}
    manifest = manifest_file.loads(str(args["manifest"]).encode())
    engine = cast(StartsEarly, arrival.engine)
    for name, digest in arrival.digests.items():
        if manifest.digests.get(name) != digest:
            raise DigestMismatch(f"{name} did not arrive as it was sent")
    judge(arrival, manifest, _options(manifest, args))
    if args.get("memory"):
        start_keeper(arrival, str(args["memory"]), waits=True)
    arrival.early = engine.begin_restore(
        arrival.draft.stage, manifest, _options(manifest, args), arrival.job, volume_ready=lambda name, directory: None
    )
    arrival.trees.settle(arrival.draft.stage, arrival.early.root())
    faults.point("destination-prepare")
    return {}


def _options(manifest: Manifest, args: dict[str, Any]) -> RestoreOptions:
    return RestoreOptions(
        name=args.get("name") or None,
        publish=tuple(str(p) for p in args.get("publish", ())),
        ignore_volumes=bool(args.get("ignore_volumes")),
        tcp_established=manifest.tcp_established,
        file_locks=manifest.file_locks,
        checked=True,  # by `facts`, before the source froze
        lazy=bool(args.get("memory")),
    )


def restore(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """Check what arrived against the manifest, restore it, hold it: the answer means "prepared"."""
    arrival = _arrival(session)
    assert arrival.draft is not None
    stage = arrival.draft.stage
    manifest = manifest_file.loads(str(args["manifest"]).encode())
    if arrival.digests != manifest.digests:
        wrong = sorted(name for name in {*arrival.digests, *manifest.digests} if arrival.digests.get(name) != manifest.digests.get(name))
        raise DigestMismatch(f"{wrong[0]} did not arrive as it was sent")
    options = _options(manifest, args)
    judge(arrival, manifest, options)
    try:
        if options.lazy:
            keep_memory(arrival, str(args["memory"]), _number(args, "images"))
        prepare(arrival, manifest, options)
    except CkptError as error:
        # The job's directory goes when the source asks for the undoing; its logs are what the error points to.
        error.log = recover.kept_log(error.log, recover.keep_logs(arrival.job, manifest.name, stage))
        raise
    faults.point("destination-prepared")
    ready = {"hooked_inside": arrival.inside, "hook_facts": arrival.hooks.facts}
    arrival.job.write("prepared", owner_pid=os.getpid(), **({"ready": ready} if arrival.job.facts.get(action.GROUP) else {}))
    return {}


def decide(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """The point of no return for all members of a group: each is held here, and from this answer on lives here, or has failed for good."""
    arrival = _arrival(session)
    if arrival.lead is None:
        raise UsageError("this link does not decide for a group")
    with recover.uninterrupted():
        arrival.lead.decide(args.get("jobs"))
    return {}


def judge(arrival: Arrival, manifest: Manifest, options: RestoreOptions) -> None:
    """Refuse what goes beyond this host's defaults when it comes from somebody who is not root here anyway. Raises PolicyRefused."""
    if arrival.trusted or arrival.draft is None:
        return
    allowed = replace(options, allow=arrival.allow)
    policy.require(arrival.draft.stage, manifest, registry.by_name(manifest.engine), allowed, manifest.name, where="nothing was made here")


def start_keeper(arrival: Arrival, memory: str, *, newest: Path | None = None, waits: bool = False) -> None:
    """Start the keeper of the memory, which the restore leaves to CRIU's lazy-pages daemon."""
    from ckpt.criu import features

    assert arrival.draft is not None
    if memory not in ("images", "chain", "source"):
        raise UsageError(f"{memory!r} is no place where memory can be")
    arrival.keeper = lazy.Keeper(
        arrival.job,
        arrival.draft.stage,
        lease_fds=(arrival.draft.fileno(),),
        draft=True,
        memory=cast(lazy.Memory, memory),
        criu_version=features.facts().version,
        newest=newest,
        waits=waits,
    )


def keep_memory(arrival: Arrival, memory: str, number: int | None) -> None:
    """Let the keeper begin: the stage is complete."""
    assert arrival.draft is not None
    if (memory == "chain") != (number is not None):
        raise UsageError(f"{memory!r} is no place where memory can be")
    newest = None if number is None else _ahead(arrival.draft.stage, number)
    if newest is not None and not newest.is_dir():
        raise UsageError(f"there are no memory images number {number}")
    if arrival.keeper is not None:
        arrival.keeper.go(newest)
    else:
        start_keeper(arrival, memory, newest=newest)


def prepare(arrival: Arrival, manifest: Manifest, options: RestoreOptions) -> None:
    """Restore, held, and make sure that it is the tree that was dumped."""
    assert arrival.draft is not None
    stage = arrival.draft.stage
    arrival.trees.check(manifest, ignore_volumes=options.ignore_volumes)
    arrival.trees.close()
    rootfs_ready = arrival.trees.fill(stage)
    if arrival.early is not None:
        early, arrival.early = arrival.early, None
        arrival.held = early.hold(rootfs_ready)
    else:
        arrival.held = arrival.engine.restore(
            stage, manifest, options, arrival.job, rootfs_ready=rootfs_ready, volume_ready=lambda name, directory: None
        )
    proof.check(arrival.held, manifest)
    if arrival.keeper is not None:
        arrival.job.write("held", **lazy.identity(arrival.held.init_pid, manifest.name))
        arrival.keeper.check()


def resume(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """The point of no return: from the journal's `commit` on the workload lives here, or has failed for good."""
    arrival = _arrival(session)
    assert arrival.held is not None
    if arrival.job.facts.get(action.GROUP) and not recover.committed(arrival.job):
        raise BusyError("its group has not been decided for")
    faults.point("destination-commit")
    return let_run(arrival)


def let_run(arrival: Arrival) -> dict[str, Any]:
    """From the journal's `commit` on to the answer for the source. Raises RestoreFailed, with all undone."""
    assert arrival.held is not None
    asked_s = time.monotonic()
    with recover.uninterrupted():
        # Should we die before they ran, the guard runs the hooks.
        arrival.job.write("commit", hooked="post-restore", hooked_inside=arrival.inside, hook_facts=arrival.hooks.facts)
        faults.point("destination-committed")
        try:
            with announce.during(arrival.held.init_pid) as told, Moment(arrival.held.init_pid, stopped=False) as go:
                container = arrival.held.resume()
        except CkptError:
            arrival.job.write("failed")
            arrival.undo()
            raise
        arrival.job.write("running", live_container_id=container.id)
        arrival.greet(container)
        if arrival.keeper is not None:
            arrival.keeper.serve()
    faults.point("destination-running")
    arrival.drop_draft()
    arrival.pid = container.pid
    journald.tell(f"{container.name or container.id} came here and runs", phase="receive", result="running", id=arrival.job.id, target=container.name)
    ran_after_s = None if go.at_s is None else go.at_s - asked_s
    return {"container_id": container.id, "pid": container.pid, "warning": told.problem, "ran_after_s": ran_after_s}


def finish(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """The source is gone: nothing is left to ask, so the journal goes."""
    arrival = _arrival(session)
    if arrival.pid is not None:
        announce.now(arrival.pid)  # the source answered for its addresses until now
    answer = {"warnings": arrival.greeted()}
    arrival.over = True
    arrival.drop_draft()
    if arrival.keeper is not None:
        arrival.job.write("serving")
        recover.hand_over(arrival.job, arrival.guard)
        return answer
    arrival.job.write("done")
    recover.close(arrival.job, arrival.guard)
    if arrival.lead is not None:
        arrival.lead.leave()
    return answer


def abort(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """Undo, unless it has been committed."""
    arrival = _arrival(session)
    if not groupjob.abandon(arrival.job):
        raise BusyError("the workload already runs here")
    arrival.undo()
    return {}


def _job(root: Path, args: dict[str, Any]) -> Job | None:
    text = str(args.get("job", ""))
    if not _JOB_ID.fullmatch(text):
        raise UsageError(f"{text!r} is no job")
    job = Job(place.jobs(root) / text)
    return job if job.directory.is_dir() else None


def status(root: Path, args: dict[str, Any]) -> dict[str, Any]:
    """How a migration stands here.

    `state`: "running", "failed" (also: nothing is left of it), "undecided" while its owner lives, "lost" (it ran, and was ended because its
    memory did not arrive). `memory` of a running one: "all", or "waiting" for the source (post-copy).
    """
    job = _job(root, args)
    try:
        mine = job is not None and job.acquire()
    except FileNotFoundError:  # it went as we looked
        job = None
    if job is None:
        return {"state": "failed", "machine": machine_id()}
    if mine:
        try:
            recover.settle(job)
        finally:
            job.release()
    elif job.state not in ("running", "served", "serving", "lost", "done"):
        return {"state": "undecided", "machine": machine_id()}
    state = "running" if recover.committed(job) else "failed"
    if job.state == "lost":
        return {"state": "lost", "machine": machine_id(), "reason": str(job.facts.get("reason", ""))}
    waiting = (job.facts.get("lazy") or {}).get("memory") == "source" and job.state == "running"
    return {"state": state, "machine": machine_id(), "memory": "waiting" if waiting else "all"}


def forget(root: Path, args: dict[str, Any]) -> dict[str, Any]:
    """The source knows how it ended: remove the journal."""
    job = _job(root, args)
    with suppress(FileNotFoundError):  # it went as we looked
        if job is not None and job.acquire():
            if job.state != "lost" and memory.running(job.directory):
                job.write("serving")  # its keeper removes it
            else:
                job.write("done")
                recover.remove(job)
            job.release()
    return {}
