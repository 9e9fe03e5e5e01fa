"""Looking at a process tree in /proc, and the launcher of the action-script."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt.criu import hold, tree
from ckpt.engines.process import ProcessEngine
from ckpt.errors import TargetNotFound, UsageError
from ckpt.model import Container
from ckpt.store.job import Job


def test_stat_of_ourselves() -> None:
    me = tree.stat(os.getpid())
    assert me is not None and me.ppid == os.getppid() and me.alive and not me.kernel_thread
    assert tree.same(me.pid, me.start_ticks) and not tree.same(me.pid, me.start_ticks + 1)
    assert tree.stat(2**22 + 1) is None


def test_tree_open_files_and_needs(tmp_path: Path) -> None:
    code = "import sys, time; f = open(sys.argv[1], 'w'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "data")], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdout.readline()
        assert child.pid in tree.pids(os.getpid())
        [found] = [f for f in tree.open_files(child.pid) if f.path == str(tmp_path / "data")]
        assert found.writable and not found.deleted and found.pid == child.pid
        assert tree.needs(child.pid) == tree.Needs(False, False, True)
        assert tree.argv(child.pid)[-1] == str(tmp_path / "data")
        child.communicate()


def test_needs_sees_locks_and_connections(tmp_path: Path) -> None:
    with open(tmp_path / "lock", "w") as lock, socket.create_server(("127.0.0.1", 0)) as server:
        assert not tree.needs(os.getpid()).tcp_established
        fcntl.flock(lock, fcntl.LOCK_EX)
        with socket.create_connection(server.getsockname()):
            needs = tree.needs(os.getpid())
            assert needs.file_locks and needs.tcp_established


def test_engine_finds_and_refuses() -> None:
    engine = ProcessEngine()
    [me] = engine.find(str(os.getpid()))
    assert me.name.endswith(f"-{os.getpid()}") and "/" not in me.name and engine.find(me.name) == [me]
    assert not engine.find("web") and not engine.find("0") and not engine.find(f"wrong-{os.getpid()}")
    with pytest.raises(UsageError):
        engine.describe(me)
    with pytest.raises(TargetNotFound):
        engine.describe(Container("process", "another id", me.name, "running", pid=me.pid))


def test_hold_launcher_waits_for_the_verdict(tmp_path: Path) -> None:
    job = Job.create(tmp_path / "with space", "dump")
    config = hold.prepare(job.directory)
    assert config.read_text() == f'action-script "{job.directory}/hold"\n'
    assert stat.S_IMODE((job.directory / "hold").stat().st_mode) == 0o700
    for verdict in ("0", "1"):
        job.held_path.unlink(missing_ok=True)
        with subprocess.Popen([job.directory / "hold"], env={"CRTOOLS_SCRIPT_ACTION": "post-dump", "PATH": os.environ["PATH"]}) as script:
            job.decide(verdict)  # type: ignore[arg-type]
            assert script.wait(10) == int(verdict)
        assert job.held_path.exists()
    job.release()
    done = subprocess.run([job.directory / "hold"], env={"CRTOOLS_SCRIPT_ACTION": "post-dump", "PATH": os.environ["PATH"]}, timeout=10)
    assert done.returncode == 1
    hold.prepare(job.directory)
    assert not job.held_path.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="pid namespaces are root's")
def test_the_first_process_of_a_pid_namespace_dies_while_its_tree_is_traced() -> None:
    """As CRIU leaves it: the namespace's first process waits for a zombie that only its tracer can reap."""
    libc, seize, wall = ctypes.CDLL(None, use_errno=True), 0x4206, 0x40000000
    outer = subprocess.Popen(["unshare", "--pid", "--fork", "sh", "-c", "sleep 1000 & echo; wait"], stdout=subprocess.PIPE)
    try:
        assert outer.stdout is not None and outer.stdout.readline()
        _, first, traced = tree.pids(outer.pid)
        libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
        assert libc.ptrace(seize, traced, None, None) == 0
        assert tree.kill(first, 5.0)
        assert tree.same(first, getattr(tree.stat(first), "start_ticks", 0)), "it did not have to wait: nothing was tested"
        os.waitpid(traced, wall)
        outer.wait(5.0)
    finally:
        outer.kill()
        outer.communicate()
