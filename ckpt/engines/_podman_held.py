"""podman's held dump and held restore: the two verdicts, and the undoing of either after the owner's death."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ckpt.criu import lazy, tree
from ckpt.engines import _hold, _shim
from ckpt.engines import _podman_isolated as isolated
from ckpt.errors import BusyError, DumpFailed, RestoreFailed, StateUnknown
from ckpt.host import conntrack, netns, traffic
from ckpt.host.run import CommandFailed, Process, run, spawn, which
from ckpt.model import Container, Manifest, RestoreOptions
from ckpt.store.job import Job

if TYPE_CHECKING:
    from ckpt.engines.podman import Podman

UNDO_LIMIT_S: Final = _hold.UNDO_LIMIT_S
_RUNTIMES: Final = ("crun", "runc")
EXPORT_LIMIT_S: Final = 200.0
STUB: Final = "stub.tar"
SHM_TAR: Final = "devshm-checkpoint.tar"
SKETCHED: Final = ("config.dump", "spec.dump", "network.status")
STUB_MEMBERS: Final = (*SKETCHED, SHM_TAR, "ctr.log")
_FILLING: Final[dict[str, threading.Lock]] = {}
"""By the name of a volume: it is made and filled by one thread at a time."""


def conf_override(job: Job, *, dump: bool) -> dict[str, str]:
    """The environment that puts our shim in the runtimes' places for one call (containers.conf(5), CONTAINERS_CONF_OVERRIDE).

    For a dump podman starts the runtime itself, with a cleaned environment: the shim lies in the job and knows it. For a restore
    conmon does, and hands this environment on to the `podman container cleanup` at the container's end: those files stay.
    (/run would not do: Debian mounts it noexec.)
    """
    directory = job.directory / "shim" if dump else _hold.SHIM_DIR
    lines = ["[engine.runtimes]"]
    for runtime in _RUNTIMES:
        if which(runtime):
            lines.append(f'{runtime} = ["{_hold.shim_script(runtime, directory, job if dump else None)}"]')
    text = "\n".join(lines) + "\n"
    path = directory / "containers.conf"
    if not path.exists() or path.read_text() != text:
        _hold.write_whole(path, text)
    return {"CONTAINERS_CONF_OVERRIDE": os.fspath(path), "CKPT_SHIM_JOB": os.fspath(job.directory)}


def _podman(*args: str, timeout_s: float = UNDO_LIMIT_S) -> bool:
    try:
        return run([which("podman") or "podman", *args], check=False, timeout_s=timeout_s).ok
    except CommandFailed:
        return False


def _conmon(pid: int | None) -> int:
    """The conmon of a container's first process, 0 when its parent is none."""
    found = tree.stat(pid) if pid else None
    above = tree.stat(found.ppid) if found is not None else None
    return above.pid if above is not None and above.comm == "conmon" else 0


def unpack_stub(stub: Path, stage: Path) -> None:
    """What podman exported, into the stage; the stub goes."""
    import tarfile

    with tarfile.open(stub) as tar:
        for member in tar:
            if member.isreg() and member.name in STUB_MEMBERS and (source := tar.extractfile(member)):
                fd = os.open(stage / member.name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
                with os.fdopen(fd, "wb") as out, source:
                    while block := source.read(1 << 20):
                        out.write(block)
    stub.unlink()


def shm_in_use(container: Container) -> bool:
    """Whether there are files in the container's /dev/shm, which podman carries along itself."""
    try:
        with os.scandir(f"/proc/{container.pid}/root/dev/shm") as entries:
            return any(True for _ in entries)
    except OSError:
        return False


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def dump_failed(container: Container, job: Job, work: Path) -> DumpFailed:
    """What CRIU, the runtime or podman said, as one error with a cause and a next step."""
    said = (job.directory / "podman.log", job.directory / "runtime.log")
    subject, silent = f"{container.name} cannot be checkpointed", "the dump did not get ready in time"
    return _hold.failure(DumpFailed, subject, work / "dump.log", verb="dump", said=said, silent=silent)


class PodmanHeldDump:
    """A held dump of a podman container."""

    def __init__(self, container: Container, job: Job, work: Path, frozen_at_s: float, process: Process | None = None) -> None:
        self.process = process
        """podman's own command; it exports what it knows of the container while the dump is held."""
        self.container = container
        self.job = job
        self.work = work
        self.frozen_at_s = frozen_at_s

    @property
    def stats_path(self) -> Path:
        """CRIU's stats-dump, there once the verdict has been given."""
        return self.work / "stats-dump"

    def needs_more(self) -> bool:
        return shm_in_use(self.container)

    def complete(self, stage: Path) -> None:
        self._wait_for_podman()
        unpack_stub(self.job.directory / STUB, stage)

    def confirm(self, stage: Path) -> None:
        self._wait_for_podman()
        now = self.job.directory / "podman-now"
        now.mkdir(mode=0o700, exist_ok=True)
        unpack_stub(self.job.directory / STUB, now)
        changed = [name for name in SKETCHED if _bytes(now / name) != _bytes(stage / name)]
        if changed:
            raise DumpFailed(f"{self.container.name} was changed while it was migrated ({', '.join(changed)})", hint="try again")

    def _wait_for_podman(self) -> None:
        if self.process is not None and _hold.exited(self.process, EXPORT_LIMIT_S) != 0:
            raise dump_failed(self.container, self.job, self.work)

    def resume(self) -> None:
        self.job.decide("1")
        if self.process is not None:
            _hold.exited(self.process, UNDO_LIMIT_S)
        code = _hold.runtime_exit(self.job, UNDO_LIMIT_S)
        _hold.disarm(self.job)
        if code is None or not self.container.pid or not _hold.alive(self.container.pid):
            raise StateUnknown(
                f"{self.container.name} did not answer the order to go on",
                where=f"{self.container.name}: frozen or gone",
                hint=f"podman ps; look at {self.work}/dump.log",
            )

    def end(self) -> None:
        _hold.end_before_verdict(self.job, self.container.pid, self.container.name)
        monitor = _conmon(self.container.pid)
        if self.container.restarts:
            _podman("container", "update", "--restart", "no", self.container.id)
        self.job.decide("0")
        code = _hold.runtime_exit(self.job, UNDO_LIMIT_S)
        gone = _hold.wait_gone(self.container.pid or 0, UNDO_LIMIT_S) if self.container.pid else True
        _hold.disarm(self.job)
        if code is None or not gone:
            raise StateUnknown(
                f"{self.container.name} did not end after its dump", where=f"{self.container.name}: frozen", hint=f"look at {self.work}/dump.log"
            )
        # conmon tells podman of the exit, and ends when that is done; until then podman would call it running.
        if not monitor or not _hold.wait_gone(monitor, UNDO_LIMIT_S):
            _podman("wait", self.container.id)


def undo_dump(job: Job, init_pid: int | None) -> None:
    """Let a container whose dump will not be used go on: verdict 1, wait for CRIU and podman to be through. Idempotent."""
    _hold.undo_dump(job)


class PodmanRestore:
    """One attempt to restore: podman's process, and what was made on the way."""

    def __init__(self, job: Job, manifest: Manifest, options: RestoreOptions) -> None:
        self.job = job
        self.manifest = manifest
        self.options = options
        self.process: Process | None = None
        self.container_id = ""
        self.network = ""
        """Of an isolated copy: the path of its network namespace."""

    @property
    def name(self) -> str:
        return self.options.name or self.manifest.name

    def make_volumes(self, volume_ready: Callable[[str, Path], None]) -> None:
        """Create the named volumes that are missing, and fill them; one that exists is filled only by a restore in place."""
        for name, _ in self.manifest.volumes:
            if name in self.job.facts.get("volumes_ahead", []):
                continue  # made and filled before (a migration does that while the workload still runs)
            with _FILLING.setdefault(name, threading.Lock()):  # of copies that come at once the first makes it, the others wait until it is filled
                self._make_volume(name, volume_ready)

    def _make_volume(self, name: str, volume_ready: Callable[[str, Path], None]) -> None:
        podman = which("podman") or "podman"
        existed = run([podman, "volume", "exists", name], check=False).ok
        if existed and self.options.existing_volumes == "refuse":
            raise BusyError(f"volume {name} already exists here", hint="remove or rename it, or restore with --ignore-volumes to use it as it is")
        if existed and (self.options.existing_volumes == "keep" or name in self.options.kept_volumes):
            return
        if not existed:
            self.job.write("volume", created_volumes=[*self.job.facts.get("created_volumes", []), name])
            run([podman, "volume", "create", name])
        mount = run([podman, "volume", "inspect", "--format", "{{.Mountpoint}}", name]).text.strip()
        volume_ready(name, Path(mount))

    def isolate(self, stage: Path, volume_ready: Callable[[str, Path], None]) -> dict[str, dict[str, Any]]:
        """Make the network namespace and the volumes of an isolated copy; returns its config.dump and spec.dump."""
        from ckpt.archive.manifest import json_object

        podman = which("podman") or "podman"
        config, spec = (json_object((stage / name).read_bytes(), name) for name in ("config.dump", "spec.dump"))
        names, mounts = isolated.volume_names(config, self.name), {}
        changed = isolated.config(config, names)
        for name, own in names.items():
            if run([podman, "volume", "exists", own], check=False).ok:
                raise BusyError(
                    f"volume {own} already exists here", hint=f"remove it (podman volume rm {own}), or give the copy another name: -n NAME"
                )
            self.job.write("volume", created_volumes=[*self.job.facts.get("created_volumes", []), own])
            run([podman, "volume", "create", own])
            mount = run([podman, "volume", "inspect", "--format", "{{.Mountpoint}}", own]).text.strip()
            mounts[isolated.destinations(config)[name]] = mount
            volume_ready(name, Path(mount))
        try:
            self.network = os.fspath(netns.make(f"ckpt-{self.job.id}", self.manifest.addresses))  # its name goes with the job
        except OSError as error:
            raise RestoreFailed(f"no network namespace can be made for {self.name}: {error}") from error
        return {"config.dump": changed, "spec.dump": isolated.spec(spec, self.network, mounts)}

    def start(self, stub: Path) -> None:
        """Start `podman container restore --import` on the stub."""
        options = self.options
        argv: list[str | os.PathLike[str]] = [
            which("podman") or "podman",
            "container",
            "restore",
            "--import",
            stub,
            "--ignore-volumes",
            "--ignore-rootfs",
        ]
        tcp = self.manifest.tcp_established if options.tcp_established is None else options.tcp_established
        locks = self.manifest.file_locks if options.file_locks is None else options.file_locks
        if tcp and not options.name and not options.tcp_close and not options.cold:
            argv += ["--tcp-established"]
            if not options.ignore_static_ip:
                traffic.block(self.job.directory, self.manifest.addresses)
                conntrack.forget(self.manifest.addresses)
        argv += ["--file-locks"] if locks else []
        argv += ["--name", options.name] if options.name else []
        argv += ["--ignore-static-ip"] if options.ignore_static_ip else []
        argv += ["--ignore-static-mac"] if options.ignore_static_mac else []
        argv += ["--pod", options.pod] if options.pod else []
        for mapping in options.publish:
            argv += ["--publish", mapping]
        with (self.job.directory / "podman.log").open("wb") as said:
            self.process = spawn(argv, stdout=said, stderr=said, env=conf_override(self.job, dump=False), new_session=True)
        self.job.write("podman", engine_pid=self.process.pid)

    def mounted(self) -> tuple[Path, dict[str, Any]]:
        """Wait until podman has made everything and calls the runtime; the mounted root, and the spec. Raises RestoreFailed."""
        directory = self.job.directory
        if not _hold.wait_for(directory / "bundle", self.process, self.options.timeout_s):
            raise self.failed()
        told = _shim.plan_loads((directory / "bundle").read_bytes())
        if not self.container_id:
            self.container_id = told["id"]
            self.job.write("creating", new_container_id=self.container_id)
        spec = json.loads((Path(told["bundle"]) / "config.json").read_text())
        return Path(told["bundle"], spec["root"]["path"]), spec

    def hold(self, rootfs_ready: Callable[[Path], None]) -> int:
        """Fill the mounted root, let CRIU restore, and wait until the tree is held; returns its first pid."""
        directory, limit = self.job.directory, self.options.timeout_s
        root, spec = self.mounted()
        rootfs_ready(root)
        if self.options.name and Path(self.manifest.runtime or "").name == "runc":
            self._own_cgroup(spec)
        networks = [space.get("path") for space in spec["linux"]["namespaces"] if space.get("type") == "network"]
        if self.options.isolated and networks not in ([self.network], [None]):
            raise RestoreFailed(f"podman gave {self.name} another network than the isolated one: it was not started")
        if networks and networks[0]:
            netns.settle(networks[0], self.manifest.addresses)  # what goes wrong CRIU meets again, and says it
        if self.options.lazy:
            lazy.wait_listening(directory, int(self.job.facts["keeper_pid"]))
        (directory / "prepared").touch()
        if self.options.cold:
            if self.process is None or _hold.exited(self.process, limit) != 0:
                raise self.failed()
            return 0
        if not _hold.wait_for(self.job.held_path, self.process, limit):
            raise self.failed()
        return int(json.loads(self.job.held_path.read_text()).get("init_pid") or 0)

    def _own_cgroup(self, spec: dict[str, Any]) -> None:
        """Put a copy below its own cgroup: runc lets CRIU restore it into that of the original, whose freezer and limits it would share."""
        named = str((spec.get("linux") or {}).get("cgroupsPath") or "")
        if named.count(":") == 2:  # systemd's form, SLICE:PREFIX:NAME
            parent, prefix, name = named.split(":")
            named = f"/{parent}/{prefix}-{name}.scope"
        if named.startswith("/"):
            with (self.job.directory / "criu.conf").open("a") as config:
                config.write(f"cgroup-root :{named}\n")

    def failed(self) -> RestoreFailed:
        """Why the restore failed: CRIU's restore.log first, then podman's own words."""
        said = (self.job.directory / "podman.log",)
        log_path = self.job.directory / "criu" / "restore.log"
        return _hold.failure(RestoreFailed, f"{self.name} cannot be restored", log_path, verb="restore", said=said, silent="no answer in time")


class PodmanEarlyRestore:
    """A restore by podman, up to where the runtime begins its own."""

    def __init__(self, engine: Podman, attempt: PodmanRestore) -> None:
        self.engine = engine
        self.attempt = attempt

    def root(self) -> Path:
        return self.attempt.mounted()[0]

    def hold(self, rootfs_ready: Callable[[Path], None]) -> PodmanHeldRestore:
        try:
            init_pid = self.attempt.hold(rootfs_ready)
        except BaseException:
            undo_restore(self.attempt.job)
            raise
        finally:
            (self.attempt.job.directory / STUB).unlink(missing_ok=True)
        return PodmanHeldRestore(self.engine, self.attempt, init_pid)

    def abort(self) -> None:
        undo_restore(self.attempt.job)
        self.attempt.job.forget_verdict()
        (self.attempt.job.directory / STUB).unlink(missing_ok=True)


class PodmanHeldRestore:
    """A held restore of a podman container."""

    def __init__(self, engine: Podman, attempt: PodmanRestore, init_pid: int) -> None:
        self.engine = engine
        self.attempt = attempt
        self.init_pid = init_pid

    def resume(self) -> Container:
        attempt, process = self.attempt, self.attempt.process
        assert process is not None
        attempt.job.decide("0")
        traffic.unblock(attempt.job.directory)  # CRIU's own lock is in the container's network now
        end = time.monotonic() + UNDO_LIMIT_S
        while process.poll() is None and time.monotonic() < end:
            time.sleep(_hold.POLL_S)
        if process.poll() != 0:
            error = attempt.failed()
            undo_restore(attempt.job)
            raise error
        _hold.disarm(attempt.job)
        found = Container("podman", attempt.container_id, attempt.name, "running", pid=self.init_pid or None, runtime=attempt.manifest.runtime)
        return found if attempt.options.terse and self.init_pid else self.engine.describe(found)

    def abort(self) -> None:
        undo_restore(self.attempt.job)


def undo_restore(job: Job) -> None:
    """Kill a held restore and remove what it made: the container, the volumes that it created. Idempotent."""
    facts = job.facts
    (job.directory / "abort").touch()
    job.decide("1")
    if facts.get("engine_pid"):
        _hold.wait_gone(int(facts["engine_pid"]), UNDO_LIMIT_S)
    _hold.disarm(job)
    if facts.get("engine_pid"):
        # Only what this attempt made: the caller refused to begin when the id or the name was taken.
        made = facts.get("new_container_id") or (facts["container_name"] if facts.get("copy") else facts["container_id"])
        _podman("container", "rm", "--force", "--ignore", "--time", "0", str(made))
    traffic.unblock(job.directory)
    drop_volumes(job, "created_volumes")


def drop_volumes(job: Job, key: str) -> None:
    """Remove volumes that the job made, unless a container uses them by now. Idempotent.

    Args:
        key: which, in the job's journal: "created_volumes" by a restore, "volumes_ahead" before one. The latter outlive the undoing of a
            restore, for it may be tried again, and the source does not send their content twice.
    """
    podman = which("podman") or "podman"
    for volume in map(str, job.facts.get(key, [])):
        if _podman("volume", "rm", volume):
            continue
        try:
            users = run([podman, "ps", "-a", "-q", "--filter", f"volume={volume}"], timeout_s=UNDO_LIMIT_S).text
            mount = run([podman, "volume", "inspect", "--format", "{{.Mountpoint}}", volume], timeout_s=UNDO_LIMIT_S).text.strip()
        except CommandFailed:
            continue
        if not users.strip() and mount:
            # On a full disk podman cannot write its database: what fills it may well be in here.
            with suppress(OSError):
                for path in Path(mount).iterdir():
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            _podman("volume", "rm", volume)
