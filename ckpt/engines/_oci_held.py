"""Held dumps and held restores of runc and crun used directly: the two verdicts, and the undoing of either after the owner's death."""

from __future__ import annotations

import json
import os
import stat
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final

from ckpt.criu import lazy
from ckpt.engines import _hold
from ckpt.engines._oci_bundle import BUNDLES, Stdio, cgroup_exists, cgroup_to_be, remove_bundle, remove_cgroup
from ckpt.errors import BusyError, CkptError, RestoreFailed, StateUnknown
from ckpt.host.run import CommandFailed, Process, run, spawn
from ckpt.model import Container, Manifest, RestoreOptions
from ckpt.store.job import Job

if TYPE_CHECKING:
    from ckpt.engines.oci import OciRuntime

DESTROY_LIMIT_S: Final = 10.0
OUTPUT: Final = "output.log"
INPUT: Final = "input.empty"


def add_config(job: Job, *lines: str) -> None:
    """Add lines to the job's CRIU configuration file."""
    with (job.directory / "criu.conf").open("a") as out:
        out.writelines(f"{line}\n" for line in lines)


class OciHeldDump:
    """A held dump of a runtime's container."""

    def __init__(self, engine: OciRuntime, container: Container, job: Job) -> None:
        self.engine = engine
        self.container = container
        self.job = job
        self.work = job.directory / "criu"

    @property
    def stats_path(self) -> Path:
        """CRIU's stats-dump, there once the verdict has been given."""
        return self.work / "stats-dump"

    def resume(self) -> None:
        name, pid = self.container.name, self.container.pid
        self.job.decide("1")
        code = _hold.runtime_exit(self.job, _hold.UNDO_LIMIT_S)
        _hold.disarm(self.job)
        if code is None or not pid or not _hold.alive(pid):
            hint = f"{self.engine.name} state {name}; look at {self.work}/dump.log"
            raise StateUnknown(f"{name} did not answer the order to go on", where=f"{name}: frozen or gone", hint=hint)

    def end(self) -> None:
        name, pid = self.container.name, self.container.pid
        _hold.end_before_verdict(self.job, pid, name)
        self.job.decide("0")
        code = _hold.runtime_exit(self.job, _hold.UNDO_LIMIT_S)
        gone = _hold.wait_gone(pid, _hold.UNDO_LIMIT_S) if pid else True
        _hold.disarm(self.job)
        if code is None or not gone:
            raise StateUnknown(f"{name} did not end after its dump", where=f"{name}: frozen", hint=f"look at {self.work}/dump.log")
        # The runtime destroys what it keeps of the container; a `runc run` in the foreground may be doing the same.
        end = time.monotonic() + DESTROY_LIMIT_S
        while self.engine.known(self.container.id) and time.monotonic() < end:
            time.sleep(_hold.POLL_S)


class OciRestore:
    """One attempt to restore: the runtime's process, and what was made on the way."""

    def __init__(self, engine: OciRuntime, job: Job, manifest: Manifest, options: RestoreOptions, container_id: str, bundle: Path) -> None:
        self.engine = engine
        self.job = job
        self.manifest = manifest
        self.options = options
        self.container_id = container_id
        self.bundle = bundle
        self.work = job.directory / "criu"
        self.process: Process | None = None

    def start(self, stage: Path, spec: dict[str, Any], config: dict[str, Any]) -> None:
        """Start the runtime's restore on the stage's CRIU images; `config` is its config.dump."""
        options, manifest = self.options, self.manifest
        _hold.arm(self.job, "restore", stage / "checkpoint", self.work, lazy=options.lazy, tcp_close=options.tcp_close)
        tcp = manifest.tcp_established if options.tcp_established is None else options.tcp_established
        locks = manifest.file_locks if options.file_locks is None else options.file_locks
        shell = manifest.shell_job if options.shell_job is None else options.shell_job
        argv: list[str | os.PathLike[str]] = [self.engine.program(), "--log", self.job.directory / "runtime.log", "restore", "--detach"]
        argv += ["--bundle", self.bundle, "--image-path", stage / "checkpoint", "--work-path", self.work]
        argv += ["--pid-file", self.job.directory / "init.pid"]
        argv += ["--tcp-established"] if tcp and not options.tcp_close else []
        argv += [*(["--file-locks"] if locks else []), *(["--shell-job"] if shell else [])]
        argv += [_hold.LAZY_FLAG] if options.lazy and self.engine.name == "runc" else []
        argv += [self.container_id]
        cgroup = cgroup_to_be(self.engine.name, spec, self.container_id)
        if self.engine.name == "runc" and config.get("cgroupRoot"):
            # The dump is relative to this (see OciRuntime.dump): without it runc puts copies into the cgroup of the original.
            add_config(self.job, f"cgroup-root :{cgroup}")
        with ExitStack() as stack:
            stdin, stdout, stderr = self._stdio(stack, [entry for found in config.get("stdio") or [] if (entry := Stdio.parse(found))])
            env = {"CRIU_CONFIG_FILE": os.fspath(self.job.directory / "criu.conf")}
            self.job.write("oci-restore", oci_id=self.container_id, made_cgroup="" if cgroup_exists(cgroup) else cgroup)
            if options.lazy:
                lazy.wait_listening(self.job.directory, int(self.job.facts["keeper_pid"]))
            self.process = spawn(argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd=self.bundle, new_session=True)
        self.job.write("oci-restore", engine_pid=self.process.pid)

    def _stdio(self, stack: ExitStack, wanted: list[Stdio]) -> list[IO[bytes]]:
        """Standard input and output as CRIU wants them: files of the host are inherited by it under their keys, the rest is /dev/null.

        A pipe's other end ended with the source; CRIU takes /dev/null in its place (descriptors.json tells the runtime of them).
        """
        files: list[IO[bytes]] = [stack.enter_context(open(os.devnull, "rb" if fd == 0 else "wb")) for fd in range(3)]
        for entry in wanted:
            opened = stack.enter_context(self._open(entry, reading=entry.fds == (0,)))
            for fd in entry.fds:
                files[fd] = opened
            add_config(self.job, f"inherit-fd fd[{entry.fds[0]}]:{entry.key}")
        return files

    def _open(self, entry: Stdio, *, reading: bool) -> IO[bytes]:
        """The file that was open, when the container is back where it was and the file still there; else one of our own.

        The checkpoint comes from anywhere: it must not make us write to whatever it names.
        """
        if entry.path == os.devnull:
            return open(os.devnull, "rb" if reading else "wb")
        if self.bundle.parent != BUNDLES:
            flags = os.O_RDONLY if reading else os.O_WRONLY | os.O_APPEND
            with suppress(OSError):
                fd = os.open(entry.path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                file = os.fdopen(fd, "rb" if reading else "ab")
                status = os.fstat(fd)
                if stat.S_ISREG(status.st_mode) and stat.S_IMODE(status.st_mode) == entry.mode and entry.size in (-1, status.st_size):
                    if reading:
                        file.seek(entry.position)
                    return file
                file.close()
        # Not /dev/null: CRIU insists on a regular file with the mode and the size of the old one. It opens it anew, at the old
        # position, so an output that was not open for appending begins with a hole (zero bytes, no space).
        name = INPUT if reading else OUTPUT
        own = BUNDLES / f"{self.container_id}.{name}" if self.bundle.parent != BUNDLES else self.bundle / name
        own.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if entry.size >= 0 and own.exists():
            own.rename(own.with_name(own.name + ".old"))
        fd = os.open(own, (os.O_RDONLY if reading else os.O_WRONLY | os.O_APPEND) | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        os.fchmod(fd, entry.mode)
        if entry.size >= 0:
            os.truncate(own, entry.size)
        return os.fdopen(fd, "rb" if reading else "ab")

    def hold(self) -> int:
        """Wait until the tree is there and held; returns its first pid."""
        if not _hold.wait_for(self.job.held_path, self.process, self.options.timeout_s):
            raise self.failed()
        return int(json.loads(self.job.held_path.read_text()).get("init_pid") or 0)

    def failed(self) -> RestoreFailed:
        """Why the restore failed: CRIU's restore.log first, then the runtime's own words."""
        said = (self.job.directory / "runtime.log",)
        subject = f"{self.container_id} cannot be restored"
        return _hold.failure(RestoreFailed, subject, self.work / "restore.log", verb="restore", said=said, silent="no answer in time")


class OciHeldRestore:
    """A held restore of a runtime's container."""

    def __init__(self, attempt: OciRestore, init_pid: int) -> None:
        self.attempt = attempt
        self.init_pid = init_pid

    def resume(self) -> Container:
        attempt, process = self.attempt, self.attempt.process
        assert process is not None
        attempt.job.decide("0")
        if _hold.exited(process, _hold.UNDO_LIMIT_S) != 0:
            error = attempt.failed()
            undo_restore(attempt.engine, attempt.job)
            raise error
        _hold.disarm(attempt.job)
        container = attempt.engine.describe(Container(attempt.engine.name, attempt.container_id, attempt.container_id, "running"))
        if container.state != "running":
            undo_restore(attempt.engine, attempt.job)
            message = f"{attempt.container_id} was restored and ended at once"
            raise RestoreFailed(message, where="nothing is running", hint="its own output tells why")
        return container

    def abort(self) -> None:
        undo_restore(self.attempt.engine, self.attempt.job)


def undo_restore(engine: OciRuntime, job: Job) -> None:
    """Kill a held restore and remove what it made: the runtime's container and the bundle, when we made that. Idempotent."""
    facts = job.facts
    job.decide("1")
    if facts.get("engine_pid"):
        _hold.wait_gone(int(facts["engine_pid"]), _hold.UNDO_LIMIT_S)
    _hold.disarm(job)
    if facts.get("oci_id"):
        # Ours: the restore did not begin while the runtime knew that id.
        with suppress(CommandFailed, CkptError):
            run([engine.program(), "delete", "--force", str(facts["oci_id"])], check=False, timeout_s=_hold.UNDO_LIMIT_S)
    if facts.get("made_cgroup"):
        # The runtime removes it with the container, but not when it never came to know of one.
        remove_cgroup(str(facts["made_cgroup"]))
    if facts.get("made_bundle"):
        with suppress(BusyError, OSError):
            remove_bundle(Path(str(facts["made_bundle"])))
