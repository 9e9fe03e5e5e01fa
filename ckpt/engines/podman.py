"""podman (rootful), driven through its command line; dumps and restores are held by the OCI-runtime shim.

Podman is asked for its own metadata only: the dump's CRIU images go straight into the stage (the shim changes the runtime's
`--image-path`), and podman's `--export` makes a small stub of `config.dump`, `spec.dump`, `network.status` and /dev/shm. The
other way round, podman imports such a stub while the runtime reads the CRIU images from the stage.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Final

from ckpt.archive.layout import CONFIG, SPEC
from ckpt.archive.manifest import json_object
from ckpt.archive.wants import Profile
from ckpt.criu import action
from ckpt.engines import _hold, _leavings, _podman_apparmor, _podman_units
from ckpt.engines._exec import exec_in
from ckpt.engines._podman_cli import QUERY_TIMEOUT_S, podman
from ckpt.engines._podman_held import (
    SHM_TAR,
    STUB,
    STUB_MEMBERS,
    PodmanEarlyRestore,
    PodmanHeldDump,
    PodmanRestore,
    conf_override,
    dump_failed,
    shm_in_use,
    undo_dump,
    undo_restore,
    unpack_stub,
)
from ckpt.engines._podman_inspect import container_from_inspect, state_of
from ckpt.engines._podman_storage import Storage
from ckpt.engines.base import HeldDump, HeldRestore, MutateFs
from ckpt.errors import BusyError, CkptError, EngineUnavailable, RestoreFailed, StateUnknown, TargetNotFound
from ckpt.host.run import CommandFailed, Process, run, spawn, which
from ckpt.model import Capabilities, Container, DumpOptions, Finding, Manifest, RestoreOptions
from ckpt.store.job import Job

PORTS: Final = ("newPortMappings", "portMappings")
"""Of podman's config.dump: the ports of the host (libpod/container_config.go)."""
START_LIMIT_S: Final = 120.0
RUN_LIMIT_S: Final = 900.0
"""It may have to fetch a container image first."""
HOLD_LIMIT_S: Final = 240.0
"""Podman gives up on a runtime that does not answer within its container-create timeout (containers.conf(5))."""


@cache
def _version(program: str) -> str:
    return run([program, "--version"], timeout_s=QUERY_TIMEOUT_S).text.split()[-1]


@cache
def _runtime(program: str, changed_ns: int) -> tuple[str, bool]:
    """What an OCI runtime calls itself, and whether it can checkpoint; asked again when the file was changed."""
    answer = run([program, "checkpoint", "--help"], check=False, timeout_s=QUERY_TIMEOUT_S)
    version = run([program, "--version"], check=False, timeout_s=QUERY_TIMEOUT_S).text
    named = version.splitlines()[0] if version else Path(program).name
    return named, answer.ok and ("crun" not in Path(program).name or "+CRIU" in version)


class Podman(Storage):
    """The engine `podman`."""

    name = "podman"
    prefixes = ("podman",)

    def probe(self) -> Capabilities:
        program = which("podman")
        if program is None:
            return Capabilities(False, "podman is not installed")
        try:
            version = _version(program)
        except CommandFailed as error:
            return Capabilities(False, f"podman does not run: {error.reason}")
        if os.geteuid() != 0:
            return Capabilities(False, "checkpointing a podman container requires root", version)
        runtimes = tuple(name for name in ("crun", "runc") if which(name))
        can = Capabilities(True, "", version, runtimes, hold=True, clone=True, container_images=True, volumes=True)
        return replace(can, pages=True, lazy=True, early=True, isolates=True, startable=True, remakes=True, takes_frozen=True)

    def containers(self) -> list[Container]:
        rows = self._rows([])
        return [
            Container(
                "podman",
                row["Id"],
                (row.get("Names") or [row["Id"][:12]])[0],
                state_of(row.get("State", "")),
                created_s=float(row.get("Created") or 0),
            )
            for row in rows
        ]

    def _rows(self, filters: Sequence[str]) -> list[dict[str, Any]]:
        try:
            return list(json.loads(podman("ps", "-a", "--no-trunc", "--format", "json", *filters).stdout or b"[]") or [])
        except (CommandFailed, ValueError) as error:
            raise EngineUnavailable(f"podman does not answer: {error}") from error

    def find(self, name: str) -> list[Container]:
        everything = self.containers()
        named = [c for c in everything if c.name == name]
        return named or [c for c in everything if len(name) >= 2 and c.id.startswith(name)]

    def describe(self, container: Container) -> Container:
        result = podman("container", "inspect", container.id or container.name, check=False)
        if not result.ok:
            raise TargetNotFound(f"podman has no container {container.name or container.id}")
        return container_from_inspect(json.loads(result.stdout)[0])

    def stay_ended(self, container: Container) -> None:
        # What it comes back from has the policy that it had (config.dump). Podman before 5.1 cannot change it.
        with suppress(CommandFailed, EngineUnavailable):
            podman("container", "update", "--restart", "no", container.id)

    def describe_many(self, containers: Sequence[Container]) -> list[Container]:
        if not containers:
            return []
        # One that is gone makes it fail, after it has told of the others.
        result = podman("container", "inspect", *(container.id for container in containers), check=False)
        try:
            return [container_from_inspect(row) for row in json.loads(result.stdout or b"[]") or []]
        except (ValueError, KeyError, TypeError) as error:
            raise EngineUnavailable(f"podman does not answer: {error}") from error

    def preflight(self, container: Container, options: DumpOptions) -> list[Finding]:
        found: list[Finding] = []
        runtime = container.runtime or "crun"
        program = which(runtime)
        if program is None:
            found.append(Finding("runtime", "error", f"{runtime} is not installed", f"apt install {Path(runtime).name}"))
        else:
            named, able = _runtime(program, os.stat(program).st_mtime_ns)
            if not able:
                hint = "use a runtime with CRIU support: podman --runtime runc, or Debian 13's crun"
                found.append(Finding("runtime", "error", f"{named} is built without CRIU support", hint))
            else:
                found.append(Finding("runtime", "ok", named))
        if container.rootfs.upper_dir is None and not options.ignore_rootfs:
            hint = "use podman's overlay storage driver, or leave the root file system behind with --ignore-rootfs"
            found.append(Finding("root file system", "error", "it is no overlay, so its changes cannot be told from its container image", hint))
        if container.infra:
            detail = "it only holds its pod's namespaces, there is nothing to save"
            found.append(Finding("infra container", "error", detail, "name the containers of the pod"))
        elif container.requires and not (container.pod and len(container.requires) == 1):
            # podman's exportCheckpoint: only a pod's infra container may be one.
            needs = ", ".join(identity[:12] for identity in container.requires)
            hint = "make it without --requires and without another container's namespaces; ckpt.after and a network of their own do as well"
            found.append(Finding("dependencies", "error", f"it depends on other containers ({needs}), which podman does not save", hint))
        if options.sealed and shm_in_use(container):
            detail = "there are files in /dev/shm, which podman would write to its own disk in clear on the way"
            found.append(Finding("/dev/shm", "error", detail, "remove them, or save it to the store (in clear) and export that"))
        if container.auto_remove:
            hint = "keep a checkpoint elsewhere (ckpt export), or start it without --rm"
            found.append(Finding("--rm", "warning", f"{container.name} was started with --rm: podman forgets it as soon as it ends", hint))
        return found

    def dump(self, container: Container, stage: Path, options: DumpOptions, job: Job) -> HeldDump:
        work = job.directory / "criu"
        _hold.arm(job, "checkpoint", stage / "checkpoint", work, page_server_port=options.page_server_port, memory_stays=options.memory_stays)
        flags = [*(["--tcp-established"] if options.tcp_established else []), *(["--file-locks"] if options.file_locks else [])]
        process = self._start_checkpoint(container, job, flags)
        whose = {"engine": self.name, "container_id": container.id, "container_name": container.name, "init_pid": container.pid}
        job.write("dumping", **whose, engine_pid=process.pid, memory_stays=options.memory_stays)
        held = PodmanHeldDump(container, job, work, frozen_at_s=time.monotonic(), process=process)
        try:
            if not _hold.wait_for(job.held_path, process, min(options.timeout_s, HOLD_LIMIT_S)):
                raise dump_failed(container, job, work)
            held.frozen_at_s = time.monotonic()
            if not options.sketched:
                held.complete(stage)
        except BaseException:
            _hold.end_process(process)
            undo_dump(job, container.pid)
            raise
        return held

    def _start_checkpoint(self, container: Container, job: Job, flags: Sequence[str]) -> Process:
        argv: list[str | os.PathLike[str]] = [which("podman") or "podman", "container", "checkpoint", "--leave-running"]
        argv += ["--export", job.directory / STUB, "--compress", "none", "--ignore-rootfs", "--ignore-volumes", *flags, container.id]
        with (job.directory / "podman.log").open("wb") as said:
            return spawn(argv, stdout=said, stderr=said, env=conf_override(job, dump=True), new_session=True)

    def sketch(self, container: Container, stage: Path, job: Job) -> bool:
        if shm_in_use(container):
            return False  # podman puts those files back before CRIU starts, and they are read when it is frozen
        _hold.arm_sketch(job)
        try:
            process = self._start_checkpoint(container, job, [])
            if _hold.exited(process, QUERY_TIMEOUT_S) != 0:
                _hold.end_process(process)
                return False
            unpack_stub(job.directory / STUB, stage)
            (stage / SHM_TAR).unlink(missing_ok=True)
        finally:
            _hold.disarm(job)
        return True

    def _pack_stub(self, stub: Path, stage: Path, manifest: Manifest, options: RestoreOptions, changed: dict[str, dict[str, Any]]) -> None:
        import io
        import tarfile

        config = b"" if options.checked and not options.name else self._by_id(stage, manifest)
        own = {CONFIG: config} if config else {}
        if not changed and (here := stage / CONFIG).exists():
            free = _podman_units.out_of_unit(json_object(config or here.read_bytes(), CONFIG))
            own |= {CONFIG: json.dumps(free).encode()} if free is not None else {}
        for name, content in changed.items():
            known = json.loads(config) if config and name == CONFIG else {}
            image = {key: known[key] for key in ("rootfsImageName",) if key in known}
            own[name] = json.dumps(content | image).encode()
        if changed:
            own["network.status"] = b"null"
        if options.unpublished and not options.publish:
            told = json_object(own.get(CONFIG) or (stage / CONFIG).read_bytes(), CONFIG)
            own[CONFIG] = json.dumps({key: value for key, value in told.items() if key not in PORTS}).encode()
        with tarfile.open(stub, "w", format=tarfile.PAX_FORMAT) as tar:
            for name in STUB_MEMBERS:
                if name in own:
                    member = tarfile.TarInfo(name)
                    member.size = len(own[name])
                    tar.addfile(member, io.BytesIO(own[name]))
                elif (stage / name).exists():
                    tar.add(stage / name, name, recursive=False)
            # podman looks whether this one is there, no more; the runtime is shown the stage's.
            tar.addfile(tarfile.TarInfo("checkpoint/inventory.img"))
        stub.chmod(0o600)

    def _by_id(self, stage: Path, manifest: Manifest) -> bytes:
        """config.dump with the id of its container image for a name, where the name means something else here, or nothing; else b"".

        Podman pulls what a name means when it knows none; the id it has.
        """
        if manifest.container_image is None or not manifest.container_image.name:
            return b""
        found = podman("image", "inspect", "--format", "{{.Id}}", "--", manifest.container_image.name, check=False)
        config = json_object((stage / CONFIG).read_bytes(), CONFIG)
        own = str(config.get("rootfsImageID", ""))
        if not own or (found.ok and found.text.strip() == own and config.get("rootfsImageName") == manifest.container_image.name):
            return b""
        return json.dumps(config | {"rootfsImageName": own}).encode()

    def restore(
        self,
        stage: Path,
        manifest: Manifest,
        options: RestoreOptions,
        job: Job,
        *,
        rootfs_ready: MutateFs,
        volume_ready: Callable[[str, Path], None],
    ) -> HeldRestore:
        early = self.begin_restore(stage, manifest, options, job, volume_ready=volume_ready)
        return early.hold(rootfs_ready)

    def begin_restore(
        self, stage: Path, manifest: Manifest, options: RestoreOptions, job: Job, *, volume_ready: Callable[[str, Path], None]
    ) -> PodmanEarlyRestore:
        if options.pod is None and not options.name:
            options = replace(options, pod=self._pod_of(stage, manifest, dict(options.pods)))
        attempt = PodmanRestore(job, manifest, options)
        job.write(
            "restoring", engine=self.name, container_id=manifest.container_id, container_name=options.name or manifest.name, copy=bool(options.name)
        )
        if not options.checked or (options.name and not options.unpublished):
            self._refuse(manifest, options)
        _podman_apparmor.ensure(stage / SPEC, lambda: self._load_profile(manifest))
        if not options.name:
            self._forget_runtime(manifest)
        try:
            changed = attempt.isolate(stage, volume_ready) if options.isolated else {}
            if not options.ignore_volumes and not options.isolated:
                attempt.make_volumes(volume_ready)
            self._pack_stub(job.directory / STUB, stage, manifest, options, changed)
            _hold.arm(job, "restore", stage / "checkpoint", job.directory / "criu", lazy=options.lazy, tcp_close=options.tcp_close, cold=options.cold)
            attempt.start(job.directory / STUB)
            attempt.mounted()
        except BaseException:
            undo_restore(job)
            raise
        return PodmanEarlyRestore(self, attempt)

    def _pod_of(self, stage: Path, manifest: Manifest, anew: Mapping[str, str]) -> str | None:
        """The pod that it was in, or its successor, None for none: podman restores it into one only when told.

        Raises:
            RestoreFailed: it is not here.
        """
        if not (stage / CONFIG).exists():
            return None
        pod = str(json_object((stage / CONFIG).read_bytes(), CONFIG).get("pod") or "")
        pod = anew.get(pod, pod)
        if pod and not podman("pod", "exists", pod, check=False).ok:
            raise RestoreFailed(f"{manifest.name} was in a pod that is not here ({pod[:12]})", hint="make one like it, and give its name: --pod NAME")
        return pod or None

    def _refuse(self, manifest: Manifest, options: RestoreOptions) -> None:
        """Raise for a restore that podman could not do, or that could not be undone without harm to another container."""
        # No `podman ps`: it waits for every container that is being restored, and those of a group wait for this one.
        if not options.name and podman("container", "exists", manifest.container_id, check=False).ok:
            raise BusyError(f"podman already has a container with the id of {manifest.name}", hint="remove it first, or restore a copy with -n NAME")
        wanted = options.name or manifest.name
        if podman("container", "exists", wanted, check=False).ok:
            raise BusyError(f"podman already has a container called {wanted}", hint="choose another name with -n NAME, or remove that one")
        if manifest.container_image and not self.has_container_image(manifest.container_image.id):
            name = manifest.container_image.name
            raise RestoreFailed(
                f"container image {name} ({manifest.container_image.id[:12]}) is missing here",
                hint=f"podman pull {name}, or bring it along: ckpt migrate",
            )

    def _load_profile(self, manifest: Manifest) -> None:
        """Make podman load its AppArmor profile: it does so for each container that it makes."""
        image = manifest.container_image.id if manifest.container_image else ""
        made = podman("container", "create", "--network", "none", "--pull", "never", image, "true", check=False).text.split()
        if made:
            podman("container", "rm", "--force", made[-1], check=False)

    def _forget_runtime(self, manifest: Manifest) -> None:
        """Remove what a runtime still keeps of a container that podman does not know (any more). Raises StateUnknown when that one lives."""
        identity, runtime = manifest.container_id, which(manifest.runtime or "crun")
        if runtime is not None:
            # podman-container-exists(1): 1 is no; any other failure tells nothing.
            _leavings.forget(runtime, identity, lambda: podman("container", "exists", identity, check=False).returncode != 1)

    def healthy(self, container: Container) -> bool:
        return podman("healthcheck", "run", container.id, check=False).ok

    exec_in = staticmethod(exec_in)

    def profile(self) -> Profile:
        from ckpt.engines import _podman_profile

        return _podman_profile.profile()

    def adopt(self, container: Container, job: Job) -> HeldDump:
        return PodmanHeldDump(container, job, job.directory / "criu", frozen_at_s=time.monotonic())

    def remove(self, container: Container) -> None:
        result = podman("container", "rm", container.id, check=False)
        if not result.ok:  # podman looks itself whether it runs
            if self.describe(container).state in ("running", "paused"):
                raise BusyError(f"{container.name} is running", hint=f"podman stop {container.name}")
            raise CkptError(f"podman cannot remove {container.name}: {result.error_text.strip() or result.returncode}")

    def pod(self, name: str) -> tuple[str, str] | None:
        found = podman("pod", "inspect", "--format", "{{.ID}} {{.InfraContainerID}}", "--", name, check=False)
        identity, _, infra = found.text.strip().partition(" ")
        return (identity, infra) if found.ok and identity else None

    def start_pod(self, name: str) -> None:
        _, infra = self.pod(name) or ("", "")
        if infra and not (result := podman("container", "start", infra, check=False, timeout_s=START_LIMIT_S)).ok:
            said = (result.error_text.strip() or f"status {result.returncode}").splitlines()[-1]
            raise RestoreFailed(f"podman cannot start the infra container of pod {name[:12]}: {said}")

    pod_unit = staticmethod(_podman_units.pod_unit)

    def pod_now(self, command: Sequence[str]) -> str:
        found = self.pod(identity) if (identity := _podman_units.pod_id(command)) else None
        return found[0] if found is not None else ""

    def start(self, container: Container) -> Container:
        result = podman("container", "start", container.id, check=False, timeout_s=START_LIMIT_S)
        if not result.ok:
            said = (result.error_text.strip() or f"status {result.returncode}").splitlines()[-1]
            raise RestoreFailed(f"podman cannot start {container.name}: {said}", where=f"{container.name} does not run")
        return self.describe(container)

    def stop(self, container: Container, timeout_s: float) -> None:
        limit_s = max(0, round(timeout_s))
        result = podman("container", "stop", "--ignore", "--time", str(limit_s), container.id, check=False, timeout_s=limit_s + QUERY_TIMEOUT_S)
        if not result.ok:
            said = (result.error_text.strip() or f"status {result.returncode}").splitlines()[-1]
            raise StateUnknown(f"podman cannot stop {container.name}: {said}", where=f"{container.name} may be running", hint="podman ps")

    def run_command(self, name: str, arguments: Sequence[str], publish: Sequence[str]) -> list[str]:
        ports = [word for mapping in publish for word in ("--publish", mapping)]
        return ["podman", "run", "--detach", "--name", name, *ports, *arguments]

    def run_new(self, name: str, command: Sequence[str]) -> Container:
        result = podman(*command[1:], check=False, timeout_s=RUN_LIMIT_S)
        made = podman("container", "inspect", "--format", "{{.Id}}", result.text.strip() or name, check=False)
        container = Container(self.name, made.text.strip(), name, "unknown") if made.ok else None
        if result.ok and container is not None:
            return self.describe(container)
        said = (result.error_text or f"status {result.returncode}").splitlines()[-1]
        if container is not None and self.command_of(container)[1:] == list(command[1:]):
            self.discard(container)  # podman leaves behind what it could not start
        raise RestoreFailed(f"podman cannot start {name}: {said}", where="nothing is left of it")

    def command_of(self, container: Container) -> list[str]:
        result = podman("container", "inspect", "--format", "{{json .Config.CreateCommand}}", container.id, check=False)
        try:
            found = json.loads(result.text or "[]")
        except ValueError:
            return []
        return [str(word) for word in found] if isinstance(found, list) else []

    def command_in(self, config: bytes) -> list[str]:
        found = json_object(config, CONFIG).get("CreateCommand")
        return [str(word) for word in found] if isinstance(found, list) else []

    def log_command(self, container: Container) -> list[str]:
        return [which("podman") or "podman", "container", "logs", "--follow", container.id]

    def last_words(self, container: Container, lines: int) -> str:
        try:
            result = podman("container", "logs", "--tail", str(lines), container.id, check=False)
        except CommandFailed:
            return ""
        return "\n".join((result.text + "\n" + result.error_text).strip().splitlines()[-lines:])

    def discard(self, container: Container) -> None:
        result = podman("container", "rm", "--force", "--ignore", "--time", "0", container.id, check=False)
        if not result.ok:
            raise StateUnknown(f"podman cannot remove {container.name}: {result.error_text[-200:]}", hint=f"podman rm -f {container.name}")

    def rollback(self, job: Job) -> None:
        facts = job.facts
        if action.committed(os.fspath(job.directory)):
            return
        if "copy" in facts:
            undo_restore(job)
        elif "init_pid" in facts:
            undo_dump(job, facts["init_pid"])
        self.drop_volumes(job)
        if facts.get("loaded_image"):
            self.remove_container_image(str(facts["loaded_image"]))


ENGINE = Podman
