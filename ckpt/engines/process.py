"""The `process` engine: a plain process tree of this host (`pid:1234`), through CRIU itself.

CRIU reopens files by path: the files of the tree must be on the destination, the same and at the same place (`open_files`).
A tree has no name of its own; it is called after its first process, COMM-PID.

A dump and a restore are held by CRIU's action-script (`ckpt/criu/action.py`), not by us: when ckpt is killed the journal
decides, as it does for containers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from ckpt.criu import features, hold, images, lazy, netlock, swrk, tree
from ckpt.engines import _process_files
from ckpt.engines._process_held import (
    SETTLE_LIMIT_S,
    AdoptedProcessDump,
    HeldProcessDump,
    HeldProcessRestore,
    Operation,
    existing,
    kill,
    numbers,
    plan,
    planned,
    runs,
    script_pid,
    thaw,
    wait,
)
from ckpt.engines.base import MutateFs
from ckpt.errors import BusyError, DumpFailed, RestoreFailed, StateUnknown, TargetNotFound, UsageError
from ckpt.model import Capabilities, Container, DumpOptions, Finding, Manifest, RestoreOptions
from ckpt.store.job import Job


def open_files(pid: int) -> tuple[tree.OpenFile, ...]:
    """Regular files that the tree of `pid` has open, which must be there when it is restored."""
    return tree.open_files(pid)


class ProcessEngine:
    """Process trees of this host. Fulfils `engines.base.Engine`."""

    name = "process"
    prefixes: tuple[str, ...] = ("pid", "process")

    def probe(self) -> Capabilities:
        """CRIU decides what can be done; never raises."""
        facts = features.facts()
        if os.geteuid() != 0:
            return Capabilities(False, reason="needs root", version=facts.version)
        return Capabilities(facts.working, reason=facts.reason, version=facts.version, runtimes=("criu",), hold=True, pages=True, lazy=True)

    def containers(self) -> list[Container]:
        """Nothing: what is not named is no target (`--all` must never mean every process of a host)."""
        return []

    def find(self, name: str) -> list[Container]:
        """By pid ("123") or by name ("counter-123")."""
        number = re.fullmatch(r"(?:.*-)?([1-9]\d{0,9})", name)
        if number is None:
            return []
        pid = int(number[1])
        found = tree.stat(pid)
        if found is None or not found.alive or status_tgid(pid) != pid:
            return []
        container = _container(found)
        return [container] if name in (str(pid), container.name) else []

    def describe(self, container: Container) -> Container:
        """Raises TargetNotFound when it is gone (or its pid belongs to another process now), UsageError when ckpt must not touch it."""
        found = self.find(str(container.pid or container.name))
        if not found or (container.id and container.id != found[0].id):
            raise TargetNotFound(f"there is no process {container.name} any more")
        _refuse(found[0])
        return found[0]

    def preflight(self, container: Container, options: DumpOptions) -> list[Finding]:
        """CRIU itself, and what forbids dumping this tree."""
        facts = features.facts()
        found = [Finding("criu", "ok" if facts.working else "error", f"CRIU {facts.version}" if facts.working else facts.reason, facts.hint)]
        try:
            _refuse(container)
        except UsageError as error:
            return [*found, Finding("process", "error", error.message, error.hint or "")]
        root = container.pid or 0
        own = tree.link(os.getpid(), "ns/pid")
        for pid in tree.pids(root):
            info = tree.status(pid)
            who = f"process {pid} ({info.get('Name', '?')})"
            if info.get("TracerPid", "0") != "0":
                found.append(Finding("traced", "error", f"{who} is traced by process {info['TracerPid']}", "detach the debugger or strace"))
            if "anon_inode:[io_uring]" in tree.descriptors(pid).values():
                hint = "set sysctl kernel.io_uring_disabled=2 and start it again"
                found.append(Finding("io_uring", "error", f"{who} holds an io_uring, which CRIU cannot save", hint))
            if tree.link(pid, "ns/pid") not in ("", own):
                hint = "name the container instead" if pid == root else "checkpoint the inner container itself"
                found.append(Finding("namespace", "error", f"{who} is in a pid namespace of its own (a container or sandbox)", hint))
        needs = tree.needs(root)
        if needs.shell_job and options.shell_job is False:
            found.append(Finding("session", "error", f"process {root} is not the leader of its session", "--shell-job, or start it with setsid"))
        if any(re.match(r"/dev/(pts/|tty)", what) for pid in tree.pids(root) for what in tree.descriptors(pid).values()):
            hint = "start it with </dev/null >log 2>&1"
            found.append(Finding("terminal", "warning", "the tree has a terminal open, which is not there after a restore", hint))
        return found

    def dump(self, container: Container, stage: Path, options: DumpOptions, job: Job) -> HeldProcessDump:
        """Freeze and dump, held. Raises DumpFailed with the tree running, TargetNotFound, UsageError."""
        container = self.describe(container)
        root = container.pid or 0
        checkpoint = stage / "checkpoint"
        checkpoint.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_descriptions(container, stage)
        before = [found for pid in tree.pids(root) if (found := tree.stat(pid))]
        ticks = {found.pid: found.start_ticks for found in before}
        # One that its owner stopped stays stopped.
        moving = {found.pid: found.start_ticks for found in before if found.state != "T"}
        plan(job, verb="dump", root=root, pids=ticks, moving=moving, images=str(checkpoint))
        if options.memory_stays:
            job.write("dumping", memory_stays=True)
        request = swrk.Request(
            checkpoint,
            job.directory,
            "dump.log",
            tcp_established=bool(options.tcp_established),
            file_locks=bool(options.file_locks),
            shell_job=bool(options.shell_job),
            config_file=hold.prepare(job.directory, page_server_port=options.page_server_port, memory_stays=options.memory_stays),
        )
        operation = Operation("dump", job, options.timeout_s)

        def work(on_notify: swrk.OnNotify, limit: swrk.Limit) -> None:
            swrk.dump(request, root, leave_running=options.leave_running, on_notify=on_notify, limit=limit)

        try:
            operation.start(work)
        except BaseException as error:
            thaw(moving)
            netlock.unlock(checkpoint, root)
            if not isinstance(error, Exception):
                raise
            operation.failure = operation.failure or error
            if not wait(lambda: runs(root, ticks.get(root, -1))):
                message = f"{container.name} does not run after its dump failed: {error}"
                raise StateUnknown(message, where=f"look at process {root}", log=existing(job.directory / "dump.log")) from error
            raise operation.error(DumpFailed, f"{container.name} cannot be checkpointed", f"{container.name} is running, untouched") from error
        held = HeldProcessDump(container, operation, stage, moving, options)
        try:
            _process_files.save(root, stage)
        except BaseException:
            held.resume()
            raise
        return held

    def adopt(self, container: Container, job: Job) -> AdoptedProcessDump:
        """The held dump of a job whose first owner is gone; `job` must be acquired."""
        return AdoptedProcessDump(container.name, job)

    def restore(
        self, stage: Path, manifest: Manifest, options: RestoreOptions, job: Job, *, rootfs_ready: MutateFs, volume_ready: Callable[[str, Path], None]
    ) -> HeldProcessRestore:
        """Restore, held. A tree has no root or volumes of its own, so neither callback is called.

        Raises:
            RestoreFailed: with everything that was made removed again.
            UsageError: another name was asked for.
        """
        if options.name and options.name != manifest.name:
            raise UsageError("a process tree keeps its pids, so it cannot be restored under another name", hint="leave --name away")
        checkpoint = stage / "checkpoint"
        ids = images.all_ids(checkpoint)
        _refuse_taken(ids, manifest.name)
        try:
            _process_files.put_back(stage, job)
        except BaseException:
            _process_files.undo(job)
            raise
        # The locks of a dump of this host are there already; after a failed restore they stay, for another try.
        locks = netlock.locks_of(checkpoint)
        plan(job, verb="restore", images=str(checkpoint), pids={}, locks=sorted(locks), done=False)
        work = lazy.work_dir(job.directory)
        work.mkdir(mode=0o700, exist_ok=True)
        request = swrk.Request(
            checkpoint,
            work,
            "restore.log",
            tcp_established=not options.tcp_close and (manifest.tcp_established if options.tcp_established is None else options.tcp_established),
            file_locks=manifest.file_locks if options.file_locks is None else options.file_locks,
            shell_job=manifest.shell_job if options.shell_job is None else options.shell_job,
            config_file=hold.prepare(job.directory, lazy=options.lazy, tcp_close=options.tcp_close),
        )
        began_ticks = int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))
        operation = Operation("restore", job, options.timeout_s)
        try:
            if options.lazy:
                lazy.wait_listening(job.directory, int(job.facts["keeper_pid"]))
            operation.start(lambda on_notify, limit: swrk.restore(request, on_notify=on_notify, limit=limit))
        except BaseException as error:
            # CRIU kills what it made when it fails. Not so when it was killed itself: then the new processes are its own.
            if operation.timed_out:
                kill({pid: found.start_ticks for pid in ids if (found := tree.stat(pid)) and found.start_ticks >= began_ticks})
            netlock.remove(netlock.locks_of(checkpoint) - locks)
            _process_files.undo(job)
            if not isinstance(error, Exception):
                raise
            operation.failure = operation.failure or error
            raise operation.error(RestoreFailed, f"{manifest.name} cannot be restored", "nothing is running") from error
        return HeldProcessRestore(self.find, manifest.name, operation, ids, checkpoint, locks)

    def remove(self, container: Container) -> None:
        """An ended tree leaves nothing. Raises BusyError when it runs."""
        if self.find(str(container.pid or container.name)):
            raise BusyError(f"{container.name} is running", hint=f"kill {container.pid}")

    def rollback(self, job: Job) -> None:
        """Undo what a dead owner left: a held tree is decided "1", a killed CRIU's locks and half-made processes are removed."""
        left = planned(job)
        if left.get("done"):
            return
        if script_pid(job):
            job.decide("1")
            wait(lambda: script_pid(job) is None, SETTLE_LIMIT_S)
        if left.get("verb") == "dump":
            pids = numbers(left, "pids")
            root = int(left.get("root", 0))
            wait(lambda: runs(root, pids.get(root, -1)) or not tree.same(root, pids.get(root, -1)))
            thaw(numbers(left, "moving"))
            if runs(root, pids.get(root, -1)):
                netlock.unlock(Path(left["images"]), root)
        elif left.get("verb") == "restore":
            kill(numbers(left, "pids"))
            netlock.remove(netlock.locks_of(Path(left["images"])) - set(left.get("locks", [])))
            _process_files.undo(job)


def status_tgid(pid: int) -> int:
    """The process that a thread number belongs to."""
    return int(tree.status(pid).get("Tgid", "0"))


def _container(found: tree.Stat) -> Container:
    name = (re.sub(r"[^A-Za-z0-9_.]+", "_", found.comm).strip("._") or "process") + f"-{found.pid}"
    identity = hashlib.sha256(f"{tree.boot_id()}:{found.pid}:{found.start_ticks}".encode()).hexdigest()
    return Container(
        engine="process",
        id=identity,
        name=name,
        state="running",
        pid=found.pid,
        runtime="criu",
        terminal=found.tty != 0,
        created_s=tree.started_s(found.start_ticks),
    )


def _refuse(container: Container) -> None:
    pid = container.pid or 0
    found = tree.stat(pid)
    if pid == 1:
        raise UsageError("pid 1 is the init process of this host; it cannot be checkpointed", hint="name a container or another process")
    if found is not None and found.kernel_thread:
        raise UsageError(f"process {pid} ({found.comm}) is a kernel thread; it cannot be checkpointed")
    if _is_ours(pid):
        raise UsageError(f"ckpt itself runs in the tree of process {pid}", hint="run ckpt from somewhere else")


def _is_ours(pid: int) -> bool:
    """Is it us, or one that we descend from?"""
    here = os.getpid()
    while here > 1:
        if here == pid:
            return True
        found = tree.stat(here)
        here = found.ppid if found else 0
    return False


def _refuse_taken(ids: Iterable[int], name: str) -> None:
    for number in sorted(ids):
        if number == 1 or Path(f"/proc/{number}").exists():
            found = tree.stat(number)
            raise RestoreFailed(
                f"{name} cannot be restored: pid {number} is taken by {found.comm if found else 'another process'}",
                where="nothing was touched",
                hint="end that process, or restore on another host; a restored tree needs its old pids",
            )


def _write_descriptions(container: Container, stage: Path) -> None:
    pid = container.pid or 0
    cwd = tree.link(pid, "cwd")
    config = {
        "id": container.id,
        "name": container.name,
        "engine": "process",
        "runtime": "criu",
        "createdTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(container.created_s)),
        "rootfsImage": "",
        "rootfsImageName": "",
        "openFiles": [{"path": f.path, "writable": f.writable, "size": f.size_bytes, "deleted": f.deleted} for f in tree.open_files(pid)],
    }
    spec = {
        "ociVersion": "1.0.2",
        "annotations": {"io.container.manager": "ckpt"},
        "process": {"args": list(tree.argv(pid)), "cwd": cwd},
        "root": {"path": tree.link(pid, "root") or "/"},
    }
    for name, content in (("config.dump", config), ("spec.dump", spec)):
        fd = os.open(stage / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as out:
            json.dump(content, out, indent=1)


ENGINE = ProcessEngine
