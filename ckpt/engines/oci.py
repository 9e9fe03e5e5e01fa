"""runc and crun used directly: a container is a bundle (config.json and a root file system) and an id, there is no engine above.

Dumps go through the shim, as podman's do, so that CRIU outlives ckpt and the dump is held; a restore is the runtime's own, with
CRIU's action-script named in a configuration file. Containers of podman, CRI-O and the like, which use the same runtimes and often the
same state directory, are left to their engines.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from ckpt.archive.wants import PODMAN_CAPABILITIES, Profile
from ckpt.criu import action
from ckpt.engines import _hold, _shim
from ckpt.engines import _oci_bundle as bundles
from ckpt.engines._exec import exec_in
from ckpt.engines._oci_held import OciHeldDump, OciHeldRestore, OciRestore, add_config, undo_restore
from ckpt.engines.base import HeldDump, HeldRestore, MutateFs
from ckpt.errors import BusyError, CkptError, DumpFailed, EngineUnavailable, RestoreFailed, StateUnknown, TargetNotFound
from ckpt.host.run import CommandFailed, run, spawn, which
from ckpt.model import Capabilities, Container, DumpOptions, Finding, Manifest, RestoreOptions, State
from ckpt.store.job import Job

QUERY_TIMEOUT_S: Final = 60.0
START_LIMIT_S: Final = 120.0
SPEC: Final = "spec.dump"
CONFIG: Final = "config.dump"
_STATES: Final[dict[str, State]] = {"creating": "created", "created": "created", "running": "running", "paused": "paused", "stopped": "exited"}


class OciRuntime:
    """The engines `runc` and `crun`."""

    full_rootfs = True
    """A root file system that is a plain directory travels whole (there is no container image to start from)."""

    def __init__(self, runtime: str) -> None:
        self.name = runtime
        self.prefixes: tuple[str, ...] = (runtime,)

    def program(self) -> str:
        """The runtime's path. Raises EngineUnavailable."""
        program = which(self.name)
        if program is None:
            raise EngineUnavailable(f"{self.name} is not installed", hint=f"apt install {self.name}")
        return program

    def probe(self) -> Capabilities:
        try:
            version = run([self.program(), "--version"], timeout_s=QUERY_TIMEOUT_S).text.split()[2]
        except EngineUnavailable as error:
            return Capabilities(False, error.message)
        except (CommandFailed, IndexError) as error:
            return Capabilities(False, f"{self.name} does not run: {error}")
        if os.geteuid() != 0:
            return Capabilities(False, f"checkpointing a container of {self.name} requires root", version)
        return Capabilities(True, "", version, (self.name,), hold=True, clone=True, pages=True, lazy=True, startable=True, takes_frozen=True)

    def containers(self) -> list[Container]:
        return [self._container(row) for row in self._rows() if not bundles.managed(Path(row.get("bundle") or "/"))]

    def _rows(self) -> list[dict[str, Any]]:
        """`list`; asked again when a container came or went in the middle of it, which both runtimes take for an error."""
        said = ""
        for _ in range(3):
            result = run([self.program(), "list", "--format", "json"], check=False, timeout_s=QUERY_TIMEOUT_S)
            said = result.error_text
            try:
                rows = json.loads(result.stdout or b"[]") or []
            except ValueError:
                continue
            if result.ok:
                return [row for row in rows if isinstance(row, dict)]
            time.sleep(_hold.POLL_S)
        raise EngineUnavailable(f"{self.name} does not answer: {said or 'its list makes no sense'}")

    def _state(self, container_id: str) -> dict[str, Any]:
        """`state` (OCI runtime-spec, runtime.md); {} when the runtime does not know the container."""
        result = run([self.program(), "state", container_id], check=False, timeout_s=QUERY_TIMEOUT_S)
        try:
            return dict(json.loads(result.stdout)) if result.ok else {}
        except ValueError:
            return {}

    def known(self, container_id: str) -> bool:
        """True while the runtime keeps anything of this id, whoever it belongs to."""
        return bool(self._state(container_id))

    def _container(self, row: dict[str, Any]) -> Container:
        return Container(
            engine=self.name,
            id=str(row["id"]),
            name=str(row["id"]),
            state=_STATES.get(str(row.get("status")), "unknown"),
            pid=int(row.get("pid") or 0) or None,
            runtime=self.name,
            bundle_dir=Path(row["bundle"]) if row.get("bundle") else None,
            created_s=_seconds(str(row.get("created") or "")),
        )

    def find(self, name: str) -> list[Container]:
        everything = self.containers()
        named = [c for c in everything if c.name == name]
        return named or [c for c in everything if len(name) >= 2 and c.id.startswith(name)]

    def describe(self, container: Container) -> Container:
        row = self._state(container.id or container.name)
        bundle = Path(row.get("bundle") or "/")
        if not row or bundles.managed(bundle):
            raise TargetNotFound(f"{self.name} has no container {container.name or container.id}")
        spec = bundles.read_spec(bundle)
        found = self._container(row)
        rootfs = bundles.rootfs_of(bundles.root_of(spec, bundle))
        return Container(
            engine=found.engine,
            id=found.id,
            name=found.name,
            state=found.state,
            pid=found.pid,
            runtime=found.runtime,
            rootfs=rootfs,
            host_mounts=bundles.host_mounts(spec, bundle),
            labels={str(key): str(value) for key, value in (spec.get("annotations") or {}).items()},
            bundle_dir=bundle,
            terminal=bool((spec.get("process") or {}).get("terminal")),
            created_s=found.created_s,
        )

    def preflight(self, container: Container, options: DumpOptions) -> list[Finding]:
        found: list[Finding] = []
        program = which(self.name)
        if program is None:
            return [Finding("runtime", "error", f"{self.name} is not installed", f"apt install {self.name}")]
        answer = run([program, "checkpoint", "--help"], check=False, timeout_s=QUERY_TIMEOUT_S)
        version = run([program, "--version"], check=False, timeout_s=QUERY_TIMEOUT_S).text
        named = version.splitlines()[0] if version else self.name
        if not answer.ok or (self.name == "crun" and "+CRIU" not in version):
            found.append(Finding("runtime", "error", f"{named} is built without CRIU support", "use a build with CRIU support: Debian 13's has it"))
        else:
            found.append(Finding("runtime", "ok", named))
        if container.terminal:
            hint = 'start it with "terminal": false in config.json'
            found.append(Finding("terminal", "error", f"{container.name} has a terminal, whose other end cannot be restored", hint))
        if container.bundle_dir is not None and not bundles.read_spec(container.bundle_dir):
            hint = f"put config.json back into {container.bundle_dir}"
            found.append(Finding("bundle", "error", f"the bundle of {container.name} has no config.json any more", hint))
        return found

    def dump(self, container: Container, stage: Path, options: DumpOptions, job: Job) -> HeldDump:
        work = job.directory / "criu"
        spec = bundles.read_spec(container.bundle_dir) if container.bundle_dir else {}
        if not spec or not container.pid:
            raise DumpFailed(f"{container.name} cannot be checkpointed: its bundle has no config.json", hint="put it back, restore needs it")
        stdio = bundles.outside_stdio(container.pid)
        cgroup = bundles.cgroup_of(container.pid) if self.name == "runc" else ""
        cgroup = cgroup if cgroup not in ("", "/") and "/.." not in cgroup else ""
        _hold.arm(job, "checkpoint", stage / "checkpoint", work, page_server_port=options.page_server_port, memory_stays=options.memory_stays)
        add_config(job, *(f"external {entry.key}" for entry in stdio))
        if cgroup:
            # crun does this itself; runc leaves the path of the original in the CRIU images, and restores copies into it.
            add_config(job, f"cgroup-root :{cgroup}")
        flags = [
            *(["--tcp-established"] if options.tcp_established else []),
            *(["--file-locks"] if options.file_locks else []),
            *(["--shell-job"] if options.shell_job else []),
        ]
        shim: list[str | os.PathLike[str]] = [sys.executable, "-I", "-S", os.path.abspath(_shim.__file__), self.program()]
        process = spawn([*shim, "checkpoint", *flags, container.id], env={"CKPT_SHIM_JOB": os.fspath(job.directory)}, new_session=True)
        whose = {"container_id": container.id, "container_name": container.name, "init_pid": container.pid}
        job.write("dumping", **whose, engine_pid=process.pid, memory_stays=options.memory_stays)
        try:
            if not _hold.wait_for(job.held_path, process, options.timeout_s) or _hold.exited(process, options.timeout_s) != 0:
                subject, silent = f"{container.name} cannot be checkpointed", "the dump did not get ready in time"
                said = (job.directory / "runtime.log",)
                raise _hold.failure(DumpFailed, subject, work / "dump.log", verb="dump", said=said, silent=silent)
            # Looked at again: only now do positions and sizes stand still.
            _write_dumps(container, spec, stage, [asdict(entry) for entry in bundles.outside_stdio(container.pid)], cgroup)
        except BaseException:
            _hold.undo_dump(job)
            _hold.end_process(process)
            raise
        return OciHeldDump(self, container, job)

    exec_in = staticmethod(exec_in)

    def profile(self) -> Profile:
        # runc(8) and crun(1) have no defaults but what `spec` writes: AUDIT_WRITE, and no seccomp filter.
        return Profile(capabilities=PODMAN_CAPABILITIES | {"AUDIT_WRITE"}, seccomp=None, sysctls=frozenset())

    def adopt(self, container: Container, job: Job) -> HeldDump:
        return OciHeldDump(self, container, job)

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
        container_id = bundles.check_id(options.name or manifest.container_id)
        if self.known(container_id):
            hint = f"remove it first ({self.name} delete {container_id}), or restore a copy with -n NAME"
            raise BusyError(f"{self.name} already has a container called {container_id}", hint=hint)
        try:
            spec = dict(json.loads((stage / SPEC).read_bytes()))
        except (OSError, ValueError) as error:
            raise RestoreFailed(f"{container_id} cannot be restored: the checkpoint has no {SPEC}", where="nothing was touched") from error
        if (spec.get("process") or {}).get("terminal"):
            message = f"{container_id} cannot be restored: it had a terminal, whose other end is gone"
            raise RestoreFailed(message, where="nothing was touched")
        try:
            config = dict(json.loads((stage / CONFIG).read_bytes()))
        except (OSError, ValueError):
            config = {}
        was = Path(str(config.get("bundle") or ""))
        here = bundles.same_bundle(was, spec)
        overlay = config.get("rootfs") == "overlay"
        at_place = here and not options.name and not self._in_use(was)
        below = bundles.rootfs_of(bundles.root_of(spec, was)) if here and overlay else None
        if overlay and (below is None or not below.upper_dir):
            # The checkpoint holds the difference only, and what it says about directories of this host is not to be trusted.
            message = f"{container_id} cannot be restored: its root file system is an overlay, which is not mounted here"
            raise RestoreFailed(message, where="nothing was touched", hint=f"make its bundle {was} ready, with the overlay mounted")
        if not at_place:
            spec = bundles.renamed(spec, container_id)
        bundle = was if at_place else bundles.BUNDLES / container_id
        for mount in bundles.host_mounts(spec, bundle):
            if not os.path.exists(mount.source):
                message = f"{container_id} cannot be restored: {mount.source}, mounted at {mount.destination}, is missing here"
                raise RestoreFailed(message, where="nothing was touched", hint="host mounts do not travel: make it first")
        if missing := bundles.missing_namespace(spec):
            message = f"{container_id} cannot be restored: its namespace {missing} is not there (after a boot they are gone)"
            raise RestoreFailed(message, where="nothing was touched", hint="make it first, as whoever made it does (ip netns add)")
        if not at_place and self._in_use(bundle):
            raise BusyError(f"another container uses the bundle {bundle}", hint="choose another name with -n NAME")
        attempt = OciRestore(self, job, manifest, options, container_id, bundle)
        try:
            if not at_place:
                job.write("restoring", made_bundle=os.fspath(bundle))
                bundles.make_bundle(container_id, spec, below)
            root = bundles.root_of(spec, bundle)
            rootfs_ready(root)
            if not any(root.iterdir()):
                hint = f"restore it where its bundle is ({was}), or dump it again with its root file system"
                raise RestoreFailed(f"{container_id} cannot be restored: the checkpoint does not hold its root file system", hint=hint)
            attempt.start(stage, spec, config)
            init_pid = attempt.hold()
        except BaseException:
            undo_restore(self, job)
            raise
        return OciHeldRestore(attempt, init_pid)

    def _in_use(self, bundle: Path) -> bool:
        """A container of either runtime has this bundle."""
        return any(Path(row.get("bundle") or "/") == bundle for runtime in RUNTIMES if which(runtime) for row in OciRuntime(runtime)._rows())

    def remove(self, container: Container) -> None:
        if self.describe(container).state in ("running", "paused"):
            raise BusyError(f"{container.name} is running", hint=f"{self.name} kill {container.id} KILL")
        try:
            run([self.program(), "delete", container.id], timeout_s=QUERY_TIMEOUT_S)
        except CommandFailed as error:
            raise CkptError(f"{self.name} cannot remove {container.name}: {error.reason}") from error

    def start(self, container: Container) -> Container:
        name, bundle = container.name or container.id, container.bundle_dir
        spec = bundles.read_spec(bundle) if bundle else {}
        if bundle is None or not spec:
            raise RestoreFailed(f"{name} cannot be started: its bundle {bundle or ''} has no config.json", where=f"{name} does not run")
        if missing := bundles.missing_namespace(spec):
            hint = "make it first, as whoever made it does (ip netns add)"
            raise RestoreFailed(f"{name} cannot be started: its namespace {missing} is not there", where=f"{name} does not run", hint=hint)
        status = self._state(container.id).get("status", "")
        if status in ("running", "paused"):
            raise BusyError(f"{name} is {status}", where=f"{name} is {status}, untouched")
        if status:
            self.remove(container)
        with TemporaryDirectory(prefix="ckpt-") as directory, open(os.devnull, "r+b") as null:
            said = Path(directory) / "runtime.log"
            argv: list[str | os.PathLike[str]] = [self.program(), "--log", said, "run", "--detach", "--bundle", bundle, container.id]
            # Whatever it gets here for its output the container keeps, and CRIU would meet it in the next dump.
            process = spawn(argv, stdin=null, stdout=null, stderr=null, cwd=bundle, new_session=True)
            if _hold.exited(process, START_LIMIT_S) != 0:
                _hold.end_process(process)
                run([self.program(), "delete", "--force", container.id], check=False, timeout_s=QUERY_TIMEOUT_S)
                words = _hold.tail(said).strip().splitlines() or ["no answer in time"]
                raise RestoreFailed(f"{self.name} cannot start {name}: {words[-1]}", where=f"{name} does not run")
        return self.describe(container)

    def stop(self, container: Container, timeout_s: float) -> None:
        pid = int(self._state(container.id).get("pid") or 0)
        for number, limit_s in (("TERM", timeout_s), ("KILL", _hold.UNDO_LIMIT_S)):
            if not pid or not _hold.alive(pid):
                return
            run([self.program(), "kill", container.id, number], check=False, timeout_s=QUERY_TIMEOUT_S)
            if _hold.wait_gone(pid, limit_s):
                return
        raise StateUnknown(f"{container.name} does not end", where=f"{container.name} is running", hint=f"{self.name} kill {container.id} KILL")

    def rollback(self, job: Job) -> None:
        facts = job.facts
        if action.committed(os.fspath(job.directory)):
            return
        if "oci_id" in facts or "made_bundle" in facts:
            undo_restore(self, job)
        elif "init_pid" in facts:
            _hold.undo_dump(job)


def _seconds(stamp: str) -> float:
    """RFC 3339 in UTC, as both runtimes write it, as seconds since 1970; 0.0 when it is none."""
    try:
        return datetime.datetime.fromisoformat(stamp[:19] + "+00:00").timestamp()
    except ValueError:
        return 0.0


def _write_dumps(container: Container, spec: dict[str, Any], stage: Path, stdio: list[dict[str, Any]], cgroup: str) -> None:
    """`config.dump` and `spec.dump`, after podman's archives; `bundle`, `rootfs`, `stdio` and `cgroupRoot` are what our own restore needs."""
    config = {
        "id": container.id,
        "name": container.name,
        "engine": container.engine,
        "runtime": container.runtime,
        "bundle": os.fspath(container.bundle_dir or ""),
        "createdTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(container.created_s)),
        "rootfsImage": "",
        "rootfsImageName": "",
        "rootfs": "overlay" if container.rootfs.upper_dir else "directory",
        "stdio": stdio,
        "cgroupRoot": cgroup,
    }
    for name, content in ((CONFIG, config), (SPEC, spec)):
        fd = os.open(stage / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as out:
            json.dump(content, out, indent=1)


RUNTIMES: Final = ("runc", "crun")
ENGINES: Final = tuple(partial(OciRuntime, runtime) for runtime in RUNTIMES)
