"""What engines that drive an OCI runtime share: the shim, the held dump, the held restore.

A job's directory is the meeting point: the engine writes `shim.plan` and `criu.conf`, the shim and CRIU's action-script
answer with the marker files `held`, `bundle` and `runtime.exit`, and read the verdict (see ckpt/store/job.py).
"""

from __future__ import annotations

import os
import select
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

from ckpt.criu import hold, log, tree
from ckpt.engines import _shim
from ckpt.errors import CkptError, StateUnknown
from ckpt.host.run import Process, which
from ckpt.store.job import Job

SHIM_DIR: Final = Path("/var/lib/ckpt/shim")
POLL_S: Final = 0.005
LAZY_FLAG: Final = "--lazy-pages"
"""Of runc; it would else switch CRIU's own off, whatever the configuration file says."""
UNDO_LIMIT_S: Final = 60.0
_TAIL_BYTES: Final = 1 << 20
_Failure = TypeVar("_Failure", bound=CkptError)


def write_whole(path: Path, text: str, mode: int = 0o644) -> None:
    """Write or replace a small file that others read at any time, and that several threads may write at once. Not brought to the disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_native_id()}.part")
    part.write_text(text)
    part.chmod(mode)
    part.rename(path)


def quoted(word: str | os.PathLike[str]) -> str:
    """The word for a POSIX shell script."""
    return "'" + os.fspath(word).replace("'", "'\\''") + "'"


def shim_script(runtime: str, directory: Path, job: Job | None = None) -> Path:
    """Write the program that stands in for `runtime` into `directory` (nothing is done when it is there); returns its path.

    Args:
        job: the job that it serves; None: the one that CKPT_SHIM_JOB names. Without either it is the real runtime, as it also
            is when ckpt is gone: conmon remembers the program for the container's whole life.
    """
    real = which(runtime) or runtime
    path = directory / Path(runtime).name
    shim = quoted(_shim.__file__)
    # Engines call their runtime many times; Python starts only for what the shim has a part in.
    # Without a container in the end it is a question: podman asks `checkpoint --help`, `restore --lsm-mount-context`.
    text = (
        "#!/bin/sh\n"
        + (f"CKPT_SHIM_JOB={quoted(job.directory)}; export CKPT_SHIM_JOB\n" if job else "")
        + """case " $* " in *" checkpoint "*|*" restore "*) mine=1 ;; *) mine= ;; esac\n"""
        + """for last do :; done; case "$last" in -*) mine= ;; esac\n"""
        + f'[ "$mine" ] && [ -n "$CKPT_SHIM_JOB" ] && [ -d "$CKPT_SHIM_JOB" ] && [ -r {shim} ] && [ -x {quoted(sys.executable)} ] &&\n'
        f'  exec {quoted(sys.executable)} -I -S {shim} {quoted(real)} "$@"\n'
        f'exec {quoted(real)} "$@"\n'
    )
    if not path.exists() or path.read_text() != text:
        directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.mkdir(mode=0o755, exist_ok=True)
        write_whole(path, text, 0o755)
    return path


def arm(
    job: Job,
    verb: str,
    images: Path,
    work: Path,
    *,
    page_server_port: int | None = None,
    lazy: bool = False,
    memory_stays: bool = False,
    tcp_close: bool = False,
    cold: bool = False,
) -> None:
    """Tell the shim what to do for this job: CRIU images in `images`, CRIU's logs and stats in `work`.

    Args:
        lazy: a restore leaves memory to CRIU's lazy-pages daemon. crun leaves it to CRIU's configuration file, runc must be told.
        memory_stays: a dump leaves it in the frozen tree; the same holds for the runtimes.
        tcp_close: a restore closes established TCP connections; neither runtime has an option for it everywhere.
        cold: instead of a restore the runtime starts the container anew.
    """
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    for marker in ("prepared", "abort"):
        (job.directory / marker).unlink(missing_ok=True)
    hold.set_aside(job.directory, "bundle", "runtime.exit")
    config = hold.prepare(job.directory, page_server_port=page_server_port, lazy=lazy, memory_stays=memory_stays, tcp_close=tcp_close)
    plan = {"verb": verb, "images": os.fspath(images), "work": os.fspath(work), "criu_config": os.fspath(config)}
    plan |= {"cold": "1"} if cold else {}
    plan |= {"flags runc": LAZY_FLAG} if lazy or memory_stays else {}
    _write_plan(job, plan)


def arm_sketch(job: Job) -> None:
    """Let the shim answer the engine's next `checkpoint` without making one."""
    _write_plan(job, {"verb": "checkpoint", "sketch": "1"})


def _write_plan(job: Job, plan: dict[str, str]) -> None:
    part = job.directory / f"{_shim.PLAN}.part"
    part.write_bytes(_shim.plan_dumps(plan))
    part.rename(job.directory / _shim.PLAN)


def disarm(job: Job) -> None:
    """From now on the shim is the real runtime, also for what conmon starts later with this job in its environment."""
    (job.directory / _shim.PLAN).unlink(missing_ok=True)


def wait_for(marker: Path, process: Process | None, timeout_s: float, failed: Callable[[], bool] | None = None) -> bool:
    """Wait until `marker` is there; False when the process ended, `failed` says so, or the time is over."""
    end = time.monotonic() + timeout_s
    while not marker.exists():
        if (process is not None and process.poll() is not None) or (failed is not None and failed()) or time.monotonic() > end:
            return marker.exists()
        time.sleep(POLL_S)
    return True


def runtime_exit(job: Job, timeout_s: float) -> int | None:
    """How the real runtime of a held dump ended (None: it has not in this time)."""
    path = job.directory / "runtime.exit"
    return int(path.read_text() or "1") if wait_for(path, None, timeout_s) else None


def alive(pid: int) -> bool:
    """True when the process exists and is no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rsplit(")", 1)[1].split()[0] not in ("Z", "X")


def wait_gone(pid: int, timeout_s: float) -> bool:
    """Wait until the process is gone, or a zombie."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        poller = select.poll()
        poller.register(fd, select.POLLIN)  # pidfd_open(2): readable when it terminates
        return bool(poller.poll(timeout_s * 1000)) or not alive(pid)
    finally:
        os.close(fd)


def end_before_verdict(job: Job, pid: int | None, name: str) -> None:
    """Kill a held tree whose memory was not dumped (`DumpOptions.memory_stays`): CRIU fails after the verdict, and lets go of what lives.

    Nothing is done for other dumps. CRIU holds the tree's connections in repair mode to its own end, so that nobody hears of this.

    Raises:
        StateUnknown: it is still there, frozen; there is no verdict yet.
    """
    if job.facts.get("memory_stays") and pid and not tree.kill(pid, UNDO_LIMIT_S):
        raise StateUnknown(f"{name} did not end after its dump", where=f"{name}: frozen", hint=f"kill -9 {pid}")


def keep_logs(work: Path, *files: Path) -> None:
    """Copy what CRIU and the runtime said to the directory that error messages name; best effort."""
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    for file in files:
        if file.exists():
            shutil.copy2(file, work / file.name)


def end_process(process: Process, timeout_s: float = 10.0) -> None:
    """End a process that we started."""
    if process.poll() is None:
        process.terminate()
        end = time.monotonic() + timeout_s
        while process.poll() is None and time.monotonic() < end:
            time.sleep(POLL_S)
        if process.poll() is None:
            process.kill()
            process.wait()


def exited(process: Process, timeout_s: float) -> int | None:
    """Wait for a process that we started; its status, None when it has not ended in this time."""
    end = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < end:
        time.sleep(POLL_S)
    return process.poll()


def tail(path: Path) -> str:
    """The end of a log ("" when there is none)."""
    try:
        with path.open("rb") as source:
            source.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            return source.read().decode(errors="replace")
    except OSError:
        return ""


def failure(kind: type[_Failure], subject: str, log_path: Path, *, verb: log.Verb, said: tuple[Path, ...], silent: str) -> _Failure:
    """Why a dump or restore failed, as one error: what CRIU's log tells, else the last words of the runtime or engine.

    Args:
        subject: the beginning of the sentence ("web cannot be checkpointed").
        said: logs of the programs around CRIU, the best one first.
        silent: what to say when nobody said anything.
    """
    text = tail(log_path)
    cause = log.explain(text, verb=verb) if "Error" in text else None
    if full := log.disk_full(log_path):
        cause = full
    if cause and (cause.line_number or full):
        return kind(f"{subject}: {cause.message}", hint=cause.hint, log=f"{log_path}:{cause.line_number}".removesuffix(":0"))
    words = next((lines for path in said if (lines := tail(path).strip().splitlines())), [silent])
    return kind(f"{subject}: {words[-1]}", log=os.fspath(said[0]))


def undo_dump(job: Job) -> None:
    """Let a container whose dump will not be used go on: verdict 1, wait for CRIU, the runtime and the engine. Idempotent."""
    engine_pid = job.facts.get("engine_pid")
    job.decide("1")
    if engine_pid:
        wait_gone(int(engine_pid), UNDO_LIMIT_S)
    if (job.directory / "runtime.log").exists() or job.held_path.exists():
        runtime_exit(job, UNDO_LIMIT_S)
    disarm(job)
