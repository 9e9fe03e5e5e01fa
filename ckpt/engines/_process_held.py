"""What holds a process tree: the thread that runs CRIU, and the two held operations of the `process` engine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

from ckpt.criu import netlock, swrk, tree
from ckpt.criu.log import Verb, disk_full, explain
from ckpt.engines import _hold, _process_files
from ckpt.errors import CkptError, RestoreFailed, StateUnknown
from ckpt.model import Container, DumpOptions
from ckpt.store.job import Job

SETTLE_LIMIT_S: Final = 60.0
"""For CRIU to finish after the verdict."""
POLL_S: Final = 0.002
PLAN: Final = "process.json"
"""In the job's directory: what `rollback` needs."""


class Operation:
    """One CRIU run in a thread, from its start over the hold to its end."""

    def __init__(self, verb: Verb, job: Job, limit_s: float) -> None:
        self.verb: Verb = verb
        self.job = job
        self.limit = swrk.Limit(limit_s)
        self.failure: Exception | None = None
        self.pid: int | None = None
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[swrk.OnNotify, swrk.Limit], int | None]) -> None:
        """Run `work` until it is held. Raises what `work` raised when it ended before that."""

        def body() -> None:
            try:
                self.pid = work(self._notified, self.limit) or self.pid
            except Exception as error:
                self.failure = error

        self._thread = threading.Thread(target=body, name=f"criu-{self.verb}", daemon=True)
        self._thread.start()
        try:
            while not self.job.held_path.exists():
                if not self._thread.is_alive():
                    raise self.failure or swrk.CriuFailed(self.verb, "CRIU did not call the action-script")
                time.sleep(POLL_S)
        except BaseException:
            if self._thread.is_alive():
                self.settle("1")
            raise

    def _notified(self, script: str, pid: int | None) -> bool:
        self.pid = pid if pid else self.pid
        if script in ("post-dump", "post-restore"):
            # From here the action-script waits for a verdict, as long as it takes.
            self.limit.stop()
        return True

    def settle(self, verdict: str) -> None:
        """Give the verdict and wait for CRIU's end; its failure stays in `failure`."""
        assert self._thread is not None
        if self._thread.is_alive():
            self.limit.start(SETTLE_LIMIT_S)
            self.job.decide("0" if verdict == "0" else "1")
        self._thread.join(SETTLE_LIMIT_S + 2 * swrk.EXIT_LIMIT_S)

    @property
    def running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def timed_out(self) -> bool:
        """CRIU did not answer and was killed in the middle."""
        return isinstance(self.failure, swrk.CriuFailed) and self.failure.timed_out

    def error(self, kind: type[CkptError], subject: str, where: str) -> CkptError:
        """CRIU's failure in the words of its log."""
        failure = self.failure
        if isinstance(failure, CkptError):
            return failure
        if not isinstance(failure, swrk.CriuFailed):
            return kind(f"{subject}: {failure}", where=where)
        text = failure.log_text()
        full = disk_full(failure.log) if failure.log else None
        if full is None and (failure.timed_out or not text):
            hint = "criu check tells whether CRIU works on this host"
            return kind(f"{subject}: {failure.reason}", where=where, hint=hint, log=existing(failure.log))
        cause = full or explain(text, verb=self.verb)
        log = f"{failure.log}:{cause.line_number}" if cause.line_number else str(failure.log)
        return kind(f"{subject}: {cause.message}", where=where, hint=cause.hint, log=log)


class HeldProcessDump:
    """See `engines.base.HeldDump`."""

    def __init__(self, container: Container, operation: Operation, stage: Path, moving: dict[int, int], options: DumpOptions) -> None:
        self._name = container.name
        self._pids = {pid: found.start_ticks for pid in tree.pids(container.pid or 0) if (found := tree.stat(pid))}
        self._root = container.pid or 0
        self._operation = operation
        self._stage = stage
        self._moving = moving
        self._options = options

    def resume(self) -> None:
        """The tree goes on. Raises StateUnknown when it does not."""
        # CRIU calls it a success only with its own leave-running; otherwise the verdict "failed" is what resumes the tree.
        self._operation.settle("0" if self._options.leave_running else "1")
        self._keep_stats()
        thaw(self._moving)
        if self._operation.timed_out:
            netlock.unlock(self._stage / "checkpoint", self._root)
        if self._operation.running or not wait(lambda: runs(self._root, self._pids[self._root])):
            raise StateUnknown(
                f"{self._name} may not have gone on after its dump",
                where=f"look at process {self._root}",
                hint=f"ps -o pid,stat,comm {self._root}; kill -CONT {self._root} if it is stopped",
            )

    def end(self) -> None:
        """The tree ends; its network locks stay, so that peers of its connections hear nothing until it is restored."""
        if self._options.leave_running:
            kill(self._pids)
        _hold.end_before_verdict(self._operation.job, self._root, self._name)
        self._operation.settle("0")
        self._keep_stats()
        if self._operation.running or not wait(lambda: not any(tree.same(pid, ticks) for pid, ticks in self._pids.items())):
            raise StateUnknown(f"{self._name} is still there after its dump", where=f"process {self._root} may be frozen or running")

    def _keep_stats(self) -> None:
        source = self._operation.job.directory / "stats-dump"
        if source.is_file() and self._stage.is_dir():
            shutil.copyfile(source, self._stage / "stats-dump")


class AdoptedProcessDump:
    """The held dump of an owner that died after `commit`: the action-script still waits, only its new owner can answer."""

    def __init__(self, name: str, job: Job) -> None:
        left = planned(job)
        self._name = name
        self._job = job
        self._root = int(left.get("root", 0))
        self._pids = numbers(left, "pids")
        self._moving = numbers(left, "moving")

    def resume(self) -> None:
        """The tree goes on. Raises StateUnknown when it does not."""
        self._decide("1")
        ticks = self._pids.get(self._root, -1)
        wait(lambda: runs(self._root, ticks) or not tree.same(self._root, ticks))
        thaw(self._moving)
        if script_pid(self._job) or not runs(self._root, ticks):
            raise StateUnknown(f"{self._name} did not go on", where=f"look at process {self._root}")

    def end(self) -> None:
        """The tree ends. Raises StateUnknown when it is still there."""
        if script_pid(self._job):
            _hold.end_before_verdict(self._job, self._root, self._name)
        self._decide("0")
        if not wait(lambda: not any(tree.same(pid, ticks) for pid, ticks in self._pids.items())):
            raise StateUnknown(f"{self._name} is still there", where=f"process {self._root} may be frozen or running")

    def _decide(self, verdict: Literal["0", "1"]) -> None:
        # A verdict that nobody waits for would answer the next hold of this job.
        if script_pid(self._job):
            self._job.decide(verdict)
            wait(lambda: script_pid(self._job) is None, SETTLE_LIMIT_S)


class HeldProcessRestore:
    """See `engines.base.HeldRestore`."""

    def __init__(
        self, find: Callable[[str], list[Container]], name: str, operation: Operation, ids: frozenset[int], images_dir: Path, locks: frozenset[str]
    ) -> None:
        self._find = find
        self._images_dir = images_dir
        self._name = name
        self._operation = operation
        self._locks = locks
        self.init_pid = operation.pid or 0
        # Held, every id is one of the restored tree. Before that an id may have been taken by a stranger: touch nothing.
        self._pids = {pid: found.start_ticks for pid in ids if (found := tree.stat(pid))}
        plan(operation.job, verb="restore", images=str(images_dir), pids=self._pids, locks=sorted(locks), done=False)

    def resume(self) -> Container:
        """Let it run. Raises RestoreFailed when it ended instead."""
        self._operation.settle("0")
        pid = self._operation.pid
        if self._operation.failure is not None or self._operation.running or pid is None:
            error = self._operation.error(RestoreFailed, f"{self._name} was not restored", "nothing is running")
            self._clean()
            raise error
        plan(self._operation.job, verb="restore", done=True)
        found = self._find(str(pid))
        if not found:
            raise RestoreFailed(f"{self._name} was restored and ended at once", where="nothing is running", hint="its own output tells why")
        return found[0]

    def abort(self) -> None:
        """Kill what was restored; never raises."""
        self._operation.settle("1")
        self._clean()

    def _clean(self) -> None:
        kill(self._pids)
        wait(lambda: not any(tree.same(pid, ticks) for pid, ticks in self._pids.items()))
        netlock.remove(netlock.locks_of(self._images_dir) - self._locks)
        _process_files.undo(self._operation.job)


def plan(job: Job, **facts: Any) -> None:
    part = job.directory / (PLAN + ".part")
    part.write_text(json.dumps(facts))
    part.rename(job.directory / PLAN)


def planned(job: Job) -> dict[str, Any]:
    """What `plan` wrote ({} for nothing)."""
    try:
        left: dict[str, Any] = json.loads((job.directory / PLAN).read_text())
    except (OSError, ValueError):
        return {}
    return left


def numbers(left: dict[str, Any], key: str) -> dict[int, int]:
    """pid -> start in ticks, as `plan` wrote it (JSON's keys are text)."""
    return {int(pid): int(ticks) for pid, ticks in left.get(key, {}).items()}


def script_pid(job: Job) -> int | None:
    """The pid of the action-script that holds this job, None when none does."""
    try:
        pid = int(json.loads(job.held_path.read_text())["pid"])
    except (OSError, ValueError, KeyError):
        return None
    return pid if str(job.directory) in tree.argv(pid) else None


def runs(pid: int, start_ticks: int) -> bool:
    """Alive, and not stopped by a tracer (`t`): CRIU let it go."""
    found = tree.stat(pid)
    return found is not None and found.start_ticks == start_ticks and found.alive and found.state != "t"


def thaw(pids: dict[int, int]) -> None:
    """After a CRIU that was killed, processes may be left stopped; CONT does nothing to one that runs."""
    for pid, ticks in pids.items():
        found = tree.stat(pid)
        if found and found.start_ticks == ticks and found.state == "T":
            _signal(pid, signal.SIGCONT)


def kill(pids: dict[int, int]) -> None:
    for pid, ticks in pids.items():
        if tree.same(pid, ticks):
            _signal(pid, signal.SIGKILL)


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def wait(condition: Callable[[], bool], limit_s: float = 10.0) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def existing(path: Path | None) -> str | None:
    return str(path) if path is not None and path.exists() else None
