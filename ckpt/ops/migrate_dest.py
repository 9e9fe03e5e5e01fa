"""The destination's side of a migration: the handlers behind `ckpt peer`.

The destination's journal decides. Until it says `commit` everything is undone when the source asks for it, or when the link, this
process or the host is lost; from then on the restored workload is the live one, whatever happens to the source.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from ckpt.archive import layout
from ckpt.archive import manifest as manifest_file
from ckpt.engines import registry
from ckpt.engines.base import CarriesContainerImages, CarriesVolumes, Engine, HeldRestore
from ckpt.errors import BusyError, CkptError, DigestMismatch, RestoreFailed, UsageError
from ckpt.host.run import Process
from ckpt.model import ContainerImage, Manifest, RestoreOptions
from ckpt.ops import ahead_dest, faults, proof, recover
from ckpt.peer.files import ReceivedFile
from ckpt.peer.server import Handler, Session
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.job import DEFAULT_ROOT, Job

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
        self.trees = ahead_dest.Trees(engine, self.job)
        self.over = False

    def undo(self) -> None:
        """Remove everything that arrived. Never called after `commit`. Idempotent."""
        if self.over:
            return
        self.over = True
        self.trees.close()
        if self.held is not None:
            self.held.abort()
        self.drop_draft()
        if self.job.facts.get("created_volumes"):
            cast(CarriesVolumes, self.engine).drop_volumes(self.job)
        image_id = self.job.facts.get("loaded_image")
        if image_id:
            cast(CarriesContainerImages, self.engine).remove_container_image(str(image_id))
        self.job.write("rolled-back")
        recover.close(self.job, self.guard)

    def drop_draft(self) -> None:
        """Remove the staged checkpoint."""
        if self.draft is not None:
            self.draft.discard()
            self.draft = None

    def leave(self) -> None:
        """The link is lost. Before `commit`: undo. After: the workload lives here; the journal stays for the source's question."""
        if self.over:
            return
        if not recover.committed(self.job):
            self.undo()
            return
        self.over = True
        self.trees.close()
        self.drop_draft()
        self.job.release()


def handlers(root: Path = DEFAULT_ROOT) -> dict[str, Handler]:
    """The verbs of `ckpt peer` that migrations use."""

    def facts(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        from ckpt.ops.destination import destination_report

        return destination_report(args)

    def begin(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        recover.sweep(root)
        engine = registry.by_name(str(args["engine"]))
        arrival = Arrival(root, engine, {"name": str(args["name"]), "container_id": str(args["container_id"]), "source": session.source})
        session.state["arrival"] = arrival
        session.on_lost(arrival.leave)
        arrival.draft = Catalog(root).begin(str(args["name"]))
        faults.point("destination-begin")
        return {"job": arrival.job.id, "machine": machine_id()}

    return {
        "facts": facts,
        "begin": begin,
        "container-image": receive_container_image,
        "pages": receive_pages,
        "tree": receive_tree,
        "stage": receive_stage,
        "restore": restore,
        "resume": resume,
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
    try:
        session.receive_files(arrival.draft.stage, allow=lambda path: path == _IMAGE_MEMBER, sinks={_IMAGE_MEMBER: cast(BinaryIO, process.stdin)})
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
    from ckpt.criu.pagestream import PageWriter

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


def restore(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """Check what arrived against the manifest, restore it, hold it: the answer means "prepared"."""
    arrival = _arrival(session)
    assert arrival.draft is not None
    stage = arrival.draft.stage
    manifest = manifest_file.loads(str(args["manifest"]).encode())
    if arrival.digests != manifest.digests:
        wrong = sorted(name for name in {*arrival.digests, *manifest.digests} if arrival.digests.get(name) != manifest.digests.get(name))
        raise DigestMismatch(f"{wrong[0]} did not arrive as it was sent")
    options = RestoreOptions(
        name=args.get("name") or None,
        publish=tuple(str(p) for p in args.get("publish", ())),
        ignore_volumes=bool(args.get("ignore_volumes")),
        tcp_established=manifest.tcp_established,
        file_locks=manifest.file_locks,
        checked=True,  # by `facts`, before the source froze
    )
    try:
        prepare(arrival, manifest, options)
    except CkptError as error:
        # The job's directory goes when the source asks for the undoing; its logs are what the error points to.
        error.log = recover.kept_log(error.log, recover.keep_logs(arrival.job, manifest.name, stage))
        raise
    faults.point("destination-prepared")
    arrival.job.write("prepared")
    return {}


def prepare(arrival: Arrival, manifest: Manifest, options: RestoreOptions) -> None:
    """Restore, held, and make sure that it is the tree that was dumped."""
    assert arrival.draft is not None
    stage = arrival.draft.stage
    arrival.trees.check(manifest, ignore_volumes=options.ignore_volumes)
    arrival.trees.close()
    arrival.held = arrival.engine.restore(
        stage, manifest, options, arrival.job, rootfs_ready=ahead_dest.fill_rootfs(stage), volume_ready=lambda name, directory: None
    )
    proof.check(arrival.held, manifest)


def resume(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """The point of no return: from the journal's `commit` on the workload lives here, or has failed for good."""
    arrival = _arrival(session)
    assert arrival.held is not None
    faults.point("destination-commit")
    with recover.uninterrupted():
        arrival.job.write("commit")
        faults.point("destination-committed")
        try:
            container = arrival.held.resume()
        except CkptError:
            arrival.job.write("failed")
            arrival.undo()
            raise
        arrival.job.write("running", live_container_id=container.id)
    faults.point("destination-running")
    arrival.drop_draft()
    return {"container_id": container.id, "pid": container.pid}


def finish(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """The source is gone: nothing is left to ask, so the journal goes."""
    arrival = _arrival(session)
    arrival.over = True
    arrival.drop_draft()
    arrival.job.write("done")
    recover.close(arrival.job, arrival.guard)
    return {}


def abort(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """Undo, unless it has been committed."""
    arrival = _arrival(session)
    if recover.committed(arrival.job):
        raise BusyError("the workload already runs here")
    arrival.undo()
    return {}


def _job(root: Path, args: dict[str, Any]) -> Job | None:
    text = str(args.get("job", ""))
    if not _JOB_ID.fullmatch(text):
        raise UsageError(f"{text!r} is no job")
    job = Job(root / "jobs" / text)
    return job if job.directory.is_dir() else None


def status(root: Path, args: dict[str, Any]) -> dict[str, Any]:
    """How a migration stands here: "running", "failed" (also: nothing is left of it), or "undecided" while its owner lives."""
    job = _job(root, args)
    if job is None:
        return {"state": "failed", "machine": machine_id()}
    if job.acquire():
        try:
            recover.settle(job)
        finally:
            job.release()
    elif job.state not in ("running", "done"):
        return {"state": "undecided", "machine": machine_id()}
    state = "running" if recover.committed(job) else "failed"
    return {"state": state, "machine": machine_id()}


def forget(root: Path, args: dict[str, Any]) -> dict[str, Any]:
    """The source knows how it ended: remove the journal."""
    job = _job(root, args)
    if job is not None and job.acquire():
        job.write("done")
        shutil.rmtree(job.directory, ignore_errors=True)
        job.release()
    return {}
