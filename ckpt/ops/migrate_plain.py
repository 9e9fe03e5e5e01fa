"""Migration to a host without ckpt: an archive, and that host's own `podman container restore`.

The source's dump is held here too, so that a destination that fails leaves the source running. What is missing: the
destination is not held, so when the link breaks during its restore ckpt must ask it whether it runs, and the source stays
frozen until there is an answer.
"""

from __future__ import annotations

import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, TypedDict, cast

from ckpt.archive import manifest as manifest_file
from ckpt.archive import writer
from ckpt.archive.members import StageMembers
from ckpt.engines.base import CarriesContainerImages, Engine, HeldDump
from ckpt.errors import CannotConnect, CkptError, FeatureMissing, MigrationRolledBack, NeedsContinue, RestoreFailed, TransferFailed
from ckpt.events import BytesMoved, Emit, Figures, Frozen, Notice, StepDone, StepStarted, Thawed
from ckpt.host.run import CommandFailed
from ckpt.model import Carriage, Container, DumpOptions
from ckpt.ops import capture, check, consent, faults, recover
from ckpt.ops import hooks as hooking
from ckpt.ops.migrate import ASK_LIMIT_S, MigrateOptions
from ckpt.ops.migrate_end import end_source
from ckpt.ops.result import Outcome, failure
from ckpt.peer import rate
from ckpt.store.catalog import Catalog
from ckpt.store.job import Job
from ckpt.transports import ssh
from ckpt.transports.ssh_remote import Remote

LACKS: Final = (
    "has no ckpt: the plain way is taken (an archive and podman's own restore). It lacks the check beforehand, the held restore "
    "on the destination, and the journal there"
)
STEP_LIMIT_S: Final = 600.0


class _Packing(TypedDict):
    compress: writer.Compression
    level: int | None


def migrate(typed: str, engine: Engine, container: Container, destination: str, *, options: MigrateOptions, store_root: Path, emit: Emit) -> Outcome:
    """Move a podman container to a host that has podman but no ckpt.

    Returns:
        The outcome; its error is FeatureMissing (the destination has no podman either), MigrationRolledBack, or NeedsContinue.
    """
    emit(Notice(typed, f"{destination} {LACKS}", warning=True))
    if options.carriage.direct or options.carriage.streams > 1:
        emit(Notice(typed, f"{destination} has no ckpt: one ssh connection carries all, in spite of --direct and --streams", warning=True))
    there = Remote(ssh.Destination.parse(destination), options.ssh_options)
    untouched = f"{container.name} is running, untouched"
    if engine.name != "podman":
        return failure(
            typed,
            FeatureMissing(f"{destination} has no ckpt, which {engine.name} needs there", where=untouched, hint=f"install ckpt on {destination}"),
        )
    try:
        there.run(["podman", "--version"])
        taken = there.run(["podman", "container", "exists", options.name or container.name], check=False).ok
    except CommandFailed as error:
        return failure(
            typed,
            FeatureMissing(f"{destination} has neither ckpt nor podman: {error.reason}", where=untouched, hint=f"install ckpt on {destination}"),
        )
    if taken:
        return failure(typed, FeatureMissing(f"{destination} has a container {options.name or container.name} already", where=untouched))
    try:
        labels = consent.require(container, "migrate", override=options.override_label, emit=emit)
        hooks = hooking.gather(typed, engine, labels, container=container, enabled=options.hooks, emit=emit, facts={"destination": destination})
    except CkptError as error:
        return failure(typed, error)
    wanted = check.decide(
        engine, container, DumpOptions(tcp_established=options.tcp_established, file_locks=options.file_locks, ignore_volumes=options.ignore_volumes)
    )
    job = Job.create(
        store_root,
        "migrate-source",
        engine=engine.name,
        container_id=container.id,
        name=container.name,
        destination=destination,
        ssh_options=list(options.ssh_options),
        keep_source=options.keep_source,
        moved_volumes=[] if options.ignore_volumes else [volume.name for volume in container.volumes],
        plain_name=options.name or container.name,
    )
    emit(Figures(typed, {"job": job.id, "mode": "plain"}))
    guard = recover.start_guard(job)
    draft = Catalog(store_root).begin(container.name)
    held: HeldDump | None = None
    began_s = frozen_s = time.monotonic()
    remote_file = file_there(job)
    moved_bytes = 0

    def on_bytes(more_bytes: int) -> None:
        nonlocal moved_bytes
        moved_bytes += more_bytes
        emit(BytesMoved(typed, "transfer", moved_bytes))

    hooks.job = job
    try:
        hooks.before("pre-migrate")
        _bring_container_image(there, engine, container, typed, options.carriage, emit)
        emit(StepStarted(typed, "dump"))
        hooks.before("pre-checkpoint")
        frozen_s = time.monotonic()
        held = engine.dump(container, draft.stage, wanted, job)
        emit(Frozen(typed, frozen_s))
        capture.frozen_parts(draft.stage, container, wanted, label=typed, emit=emit)
        manifest = capture.describe(draft.stage, container, wanted)
        (draft.stage / "artifacts").mkdir(mode=0o700, exist_ok=True)
        (draft.stage / "artifacts" / "ckpt.json").write_bytes(manifest_file.dumps(manifest))
        emit(StepStarted(typed, "transfer"))
        sent_bytes = there.send(
            ["sh", "-c", f"umask 077; cat > {remote_file}"],
            lambda out: writer.write(StageMembers(draft.stage), _limited(out, options.carriage), **_packing(options.carriage), on_bytes=on_bytes),
        )
        emit(StepDone(typed, "transfer", f"{sent_bytes / (1 << 20):.1f} MiB"))
        emit(StepStarted(typed, "restore"))
        flags = [*(["--tcp-established"] if wanted.tcp_established and not options.name else []), *(["--file-locks"] if wanted.file_locks else [])]
        flags += ["--name", options.name] if options.name else []
        flags += ["--ignore-volumes"] if options.ignore_volumes else []
        with recover.uninterrupted():
            # From here only the destination knows: its podman lets the workload run as soon as it is restored.
            job.write("commit")
            faults.point("plain-commit")
            try:
                _restore_there(there, job, remote_file, flags)
            except RestoreFailed:
                job.write("failed")
                raise
            frozen_for_s = time.monotonic() - frozen_s
            emit(Thawed(typed, frozen_for_s))
            faults.point("plain-restored")
            _greet(there, hooks, options.name or container.name)
            end_source(engine, container, held, job, options.keep_source, stage=draft.stage)
            hooks.succeeded_there()
            job.write("done")
    except NeedsContinue as error:
        draft.discard()
        job.release()
        return failure(typed, error)
    except BaseException as error:
        with recover.uninterrupted():
            if held is not None:
                held.resume()
            hooks.failed_there(error)
            job.write("rolled-back")
            draft.discard()
            recover.close(job, guard)
        with suppress(CommandFailed, CkptError):
            there.run(["rm", "-f", remote_file], check=False)
        if isinstance(error, CommandFailed):
            error = TransferFailed(f"{destination}: {error.reason}")
        if isinstance(error, CkptError):
            return failure(
                typed,
                MigrationRolledBack(
                    f"{container.name} was not migrated: {error.message}", where=f"{container.name} is running here", hint=error.hint, log=error.log
                ),
            )
        raise
    draft.discard()
    recover.close(job, guard)
    stats: dict[str, float | int | str] = {"downtime_s": frozen_for_s, "total_s": time.monotonic() - began_s, "sent_bytes": sent_bytes}
    return Outcome(typed, True, container=container, warnings=tuple(hooks.warnings), stats=stats)


def _greet(there: Remote, hooks: hooking.Hooks, name: str) -> None:
    """Run the container's post-restore hook there, by podman: there is no ckpt to do it."""
    hook = hooks.inside("post-restore")
    if hook is None:
        return
    try:
        result = there.run(["podman", "exec", name, *hook.argv], check=False, timeout_s=hooks.limit_s("post-restore"))
        problem = "" if result.ok else f"exit status {result.returncode}"
    except CommandFailed as error:
        problem = error.reason
    if problem:
        hooks.warn(f"{there.destination}: its hook ckpt.hook.post-restore failed: {problem}")


def _bring_container_image(there: Remote, engine: Engine, container: Container, typed: str, carriage: Carriage, emit: Emit) -> None:
    image = container.container_image
    if image is None or there.run(["podman", "image", "exists", image.id], check=False).ok:
        return
    emit(StepStarted(typed, "container-image", image.name))
    with cast(CarriesContainerImages, engine).save_container_image(image) as stream:
        there.send(["podman", "image", "load", "--quiet"], lambda out: _copy(stream, _limited(out, carriage)))
    if not there.run(["podman", "image", "exists", image.name], check=False).ok:
        there.run(["podman", "image", "tag", image.id, image.name])
    emit(StepDone(typed, "container-image", f"{image.name} sent"))


def _limited(out: BinaryIO, carriage: Carriage) -> BinaryIO:
    bucket = rate.bucket(carriage)
    return cast(BinaryIO, rate.LimitedWriter(out, bucket)) if bucket is not None else out


def _packing(carriage: Carriage) -> _Packing:
    """How the archive is packed: always, unless it was forbidden; there is nothing to measure beforehand."""
    wanted = carriage.compress
    return {"compress": "none", "level": None} if wanted.mode == "none" else {"compress": "zstd", "level": wanted.level}


def _copy(source: BinaryIO, out: BinaryIO) -> int:
    shutil.copyfileobj(source, out, 1 << 20)
    return 0


def file_there(job: Job) -> str:
    """The archive's place on the destination."""
    return f"/var/tmp/ckpt-{job.id}.tar.zst"


def _restore_there(there: Remote, job: Job, remote_file: str, flags: list[str]) -> None:
    """Run podman's restore on the destination; when it is not known how it ended, ask until it is.

    Raises:
        RestoreFailed: there is no copy on the destination.
        NeedsContinue: it is not known.
    """
    said = ""
    with suppress(CommandFailed):
        result = there.run(["podman", "container", "restore", "--import", remote_file, *flags], check=False, timeout_s=STEP_LIMIT_S)
        said = result.error_text.rsplit("\n", 1)[-1]
    deadline_s = time.monotonic() + ASK_LIMIT_S
    while True:
        state = "undecided"
        with suppress(CkptError):
            state = ask(job)
        if state == "running":
            return
        if state == "failed":
            raise RestoreFailed(f"{there.destination} could not restore it: {said or 'no copy is there'}")
        if time.monotonic() > deadline_s:
            raise NeedsContinue(
                f"no answer from {there.destination} during its restore",
                where=f"{job.facts['name']} is frozen here, and may be running on {there.destination}",
                hint=f"when {there.destination} can be reached again: ckpt migrate --continue {job.id}",
            )
        time.sleep(0.2)


def ask(job: Job) -> str:
    """How the plain way ended, asked of the destination's podman: "running", "failed" (nothing is left there) or "undecided".

    Raises:
        CannotConnect: it cannot be reached.
    """
    facts = job.facts
    there = Remote(ssh.Destination.parse(str(facts["destination"])), tuple(facts.get("ssh_options", ())))
    name, file = str(facts["plain_name"]), file_there(job)
    try:
        # The bracket keeps the shell that sshd starts from finding itself.
        busy = there.run(["pgrep", "-f", f"[i]mport {file}"], check=False)
        state = there.run(["podman", "container", "inspect", "--format", "{{.State.Status}}", name], check=False)
        if 255 in (busy.returncode, state.returncode):
            raise CannotConnect(f"{facts['destination']} cannot be reached")
        if busy.ok:
            return "undecided"
        if state.ok and state.text.strip() == "running":
            there.run(["rm", "-f", file], check=False)
            return "running"
        if state.ok:
            there.run(["podman", "container", "rm", "--force", name], check=False)
            for volume in facts.get("moved_volumes", []):
                there.run(["podman", "volume", "rm", str(volume)], check=False)
        there.run(["rm", "-f", file], check=False)
        return "failed"
    except CommandFailed as error:
        raise CannotConnect(f"{facts['destination']} does not answer: {error.reason}") from error
