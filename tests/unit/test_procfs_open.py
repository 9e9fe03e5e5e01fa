"""procfs against real local processes: each child opens one kind of thing, says so, and waits."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt.host import procfs, procnet


@contextlib.contextmanager
def child(code: str, *args: str, **options: object) -> Iterator[subprocess.Popen[str]]:
    """A Python process that runs `code`, prints "ready" and waits for its standard input to end."""
    program = "import sys, os\n" + textwrap.dedent(code) + "\nprint('ready', flush=True)\nsys.stdin.read()\n"
    options.setdefault("stderr", subprocess.DEVNULL)  # pytest's own is a deleted file
    popen: subprocess.Popen[str] = subprocess.Popen(
        [sys.executable, "-c", program, *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True, **options
    )  # type: ignore[call-overload]
    try:
        assert popen.stdout is not None
        assert popen.stdout.readline() == "ready\n"
        yield popen
    finally:
        popen.kill()
        popen.communicate()


def test_nothing_special() -> None:
    with child("") as process:
        kinds = procfs.open_kinds(process.pid)
    assert kinds.pids == (process.pid,)
    assert (kinds.tcp_established, kinds.tcp_listen, kinds.file_locks, kinds.inotify) == (0, 0, 0, 0)
    assert not (kinds.io_uring or kinds.terminals or kinds.gpu or kinds.devices or kinds.unix_external or kinds.deleted_files)
    assert not kinds.needs_tcp_established and not kinds.needs_file_locks and not kinds.needs_shell_job
    assert kinds.rss_bytes > kinds.anon_bytes > 1 << 20 and kinds.threads == 1
    assert {"net", "mnt", "pid"} <= set(kinds.host_namespaces)


def test_tcp_established_half_closed_listening_and_waiting() -> None:
    code = """
        import socket
        server = socket.create_server(("127.0.0.1", 0))
        a = socket.create_connection(server.getsockname())
        b, _ = server.accept()
        six = socket.create_server(("::1", 0), family=socket.AF_INET6) if socket.has_ipv6 and os.path.exists("/proc/net/tcp6") else None
        b.close()                                             # a: CLOSE_WAIT
        waiting = socket.create_connection(server.getsockname())  # never accepted
        udp = socket.socket(type=socket.SOCK_DGRAM); udp.bind(("127.0.0.1", 0))
        unbound = socket.socket()
    """
    with child(code) as process:
        kinds = procfs.open_kinds(process.pid)
    assert kinds.tcp_established == 2
    assert kinds.tcp_listen in (1, 2)
    assert kinds.tcp_in_flight == 1
    assert kinds.udp == 1
    assert kinds.sockets_unsupported == ()
    assert kinds.needs_tcp_established


def test_connections_of_others_do_not_count() -> None:
    with child("import socket; s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname())"), child("") as other:
        assert procfs.open_kinds(other.pid).tcp_established == 0


def test_a_socket_of_a_child_process_counts() -> None:
    code = """
        import socket
        server = socket.create_server(("127.0.0.1", 0))
        r, w = os.pipe()
        if os.fork() == 0:
            c = socket.create_connection(server.getsockname()); os.write(w, b"x"); sys.stdin.read(); os._exit(0)
        os.read(r, 1)
    """
    with child(code) as process:
        kinds = procfs.open_kinds(process.pid)
        assert len(kinds.pids) == 2
        assert kinds.tcp_established == 1
        names = procfs.process_names(process.pid)
        assert [pid for pid, _ in names] == sorted(kinds.pids)


def test_sctp_and_the_like_are_named() -> None:
    code = """
        import socket
        s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)  # IPPROTO_MPTCP
    """
    try:
        with child(code) as process:
            kinds = procfs.open_kinds(process.pid)
    except AssertionError:
        pytest.skip("this kernel has no MPTCP")
    assert [h.what for h in kinds.sockets_unsupported] == ["MPTCP"]


@pytest.mark.parametrize("how", ["flock", "posix", "ofd"])
def test_file_locks(how: str, tmp_path: Path) -> None:
    code = """
        import fcntl, struct
        f = open(sys.argv[1], "w+")
        how = sys.argv[2]
        if how == "flock": fcntl.flock(f, fcntl.LOCK_EX)
        if how == "posix": fcntl.lockf(f, fcntl.LOCK_EX)
        if how == "ofd": fcntl.fcntl(f, 37, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
    """
    with child(code, str(tmp_path / "locked"), how) as process:
        kinds = procfs.open_kinds(process.pid)
        assert kinds.file_locks == 1
        assert kinds.needs_file_locks


def test_a_waiting_lock_is_not_a_lock(tmp_path: Path) -> None:
    with open(tmp_path / "locked", "w") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)
        code = """
            import fcntl, threading
            f = open(sys.argv[1])
            threading.Thread(target=fcntl.flock, args=(f, fcntl.LOCK_EX), daemon=True).start()
        """
        with child(code, str(tmp_path / "locked")) as process:
            assert procfs.open_kinds(process.pid).file_locks == 0


def test_inotify_counts_watches(tmp_path: Path) -> None:
    code = """
        import ctypes
        libc = ctypes.CDLL(None)
        fd = libc.inotify_init1(0)
        assert libc.inotify_add_watch(fd, sys.argv[1].encode(), 2) > 0
        assert libc.inotify_add_watch(fd, b"/proc/self", 2) > 0
    """
    with child(code, str(tmp_path)) as process:
        kinds = procfs.open_kinds(process.pid)
    assert kinds.inotify == 2
    assert kinds.anon_unsupported == ()


def test_io_uring_is_found_with_its_process() -> None:
    code = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        fd = libc.syscall(425, 4, ctypes.create_string_buffer(120))
        if fd < 0: sys.exit(0)
    """
    try:
        with child(code) as process:
            assert procfs.open_kinds(process.pid).io_uring == ((process.pid, Path(f"/proc/{process.pid}/comm").read_text().strip()),)
    except AssertionError as error:
        if "ready" in str(error):
            pytest.skip("io_uring is off here")
        raise


def test_unsupported_anonymous_file() -> None:
    code = """
        import ctypes
        fd = ctypes.CDLL(None, use_errno=True).syscall(323, 1)  # userfaultfd(UFFD_USER_MODE_ONLY)
        if fd < 0: sys.exit(0)
    """
    try:
        with child(code) as process:
            assert [h.what for h in procfs.open_kinds(process.pid).anon_unsupported] == ["[userfaultfd]"]
    except AssertionError as error:
        if "ready" in str(error):
            pytest.skip("userfaultfd is off here")
        raise


def test_terminal_whose_master_is_outside() -> None:
    master, slave = pty.openpty()
    try:
        with child("fd = int(sys.argv[1])", str(slave), pass_fds=(slave,)) as process:
            kinds = procfs.open_kinds(process.pid)
        assert [h.what for h in kinds.terminals] == [os.ttyname(slave)]
        assert kinds.needs_shell_job
    finally:
        os.close(master)
        os.close(slave)


def test_terminal_whose_master_is_inside() -> None:
    with child("import pty; pair = pty.openpty()") as process:
        kinds = procfs.open_kinds(process.pid)
    assert kinds.terminals == ()
    assert not kinds.needs_shell_job


def test_deleted_files_and_the_ghost_limit(tmp_path: Path) -> None:
    code = """
        big = open(sys.argv[1] + "/big", "w+b"); big.write(bytes(3 << 20)); big.flush(); os.unlink(big.name); again = os.dup(big.fileno())
        small = open(sys.argv[1] + "/small", "w+b"); os.unlink(small.name)
        linked = open(sys.argv[1] + "/linked", "w+b"); os.link(linked.name, sys.argv[1] + "/other"); os.unlink(linked.name)
        memory = os.memfd_create("m")
    """
    with child(code, str(tmp_path)) as process:
        kinds = procfs.open_kinds(process.pid)
    assert {(Path(f.path).name, f.size_bytes, f.linked) for f in kinds.deleted_files} == {
        ("big", 3 << 20, False),
        ("small", 0, False),
        ("linked", 0, True),
    }
    assert [Path(f.path).name for f in kinds.ghosts_over()] == ["big"]


def test_a_mapped_deleted_file_is_found() -> None:
    code = """
        import mmap, tempfile
        f = tempfile.NamedTemporaryFile(delete=False); f.write(bytes(2 << 20)); f.flush()
        m = mmap.mmap(f.fileno(), 2 << 20); os.unlink(f.name); f.close()
        os.closerange(3, 64)
    """
    if os.geteuid() != 0:
        pytest.skip("map_files needs root")
    with child(code) as process:
        assert [f.size_bytes for f in procfs.open_kinds(process.pid).ghosts_over()] == [2 << 20]


def test_unix_socket_to_the_outside_and_inside() -> None:
    import socket

    if procnet.unix_connections(os.getpid()) is None:
        pytest.skip("this kernel has no unix_diag")
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as server:
        server.bind(directory + "/s")
        server.listen()
        code = """
            import socket
            pair = socket.socketpair(); s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])
            log = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); log.connect(sys.argv[1] + "log")
        """
        datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        datagrams.bind(directory + "/slog")
        with child(code, directory + "/s") as process:
            peer, _ = server.accept()
            kinds = procfs.open_kinds(process.pid)
            peer.close()
        datagrams.close()
    assert [h.what for h in kinds.unix_datagram] == [directory + "/slog"]
    assert [h.what for h in kinds.unix_external] == [directory + "/s"]


def test_a_unix_connection_that_nobody_has_accepted_leads_to_its_listener() -> None:
    import socket

    if procnet.unix_connections(os.getpid()) is None:
        pytest.skip("this kernel has no unix_diag")
    with tempfile.TemporaryDirectory() as directory, socket.socket(socket.AF_UNIX) as server:
        server.bind(directory + "/s")
        server.listen()
        code = """
            import socket
            outside = socket.socket(socket.AF_UNIX); outside.connect(sys.argv[1] + "/s")
            own = socket.socket(socket.AF_UNIX); own.bind(sys.argv[1] + "/own"); own.listen()
            inside = socket.socket(socket.AF_UNIX); inside.connect(sys.argv[1] + "/own")
        """
        with child(code, directory) as process:
            kinds = procfs.open_kinds(process.pid)
    assert [h.what for h in kinds.unix_external] == [directory + "/s"]


def test_an_ended_process() -> None:
    with child("") as process:
        pid = process.pid
        assert procfs.alive(pid)
    assert not procfs.alive(pid)
    assert procfs.tree(pid) == ()
    assert procfs.process_names(pid) == ()
    assert procfs.open_kinds(pid).pids == ()
    assert not procfs.frozen(pid)


def test_a_zombie_is_counted_and_not_alive() -> None:
    code = """
        pid = os.fork()
        if pid == 0: os._exit(0)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    """
    with child(code) as process:
        kinds = procfs.open_kinds(process.pid)
        assert len(kinds.zombies) == 1
        assert kinds.unreadable == ()
        assert not procfs.alive(kinds.zombies[0][0])


def test_children_of_other_threads_belong_to_the_tree() -> None:
    code = """
        import subprocess, threading
        done = threading.Event(); keep = threading.Event()
        def work():
            subprocess.Popen(["cat"], stdin=subprocess.PIPE); done.set(); keep.wait()
        threading.Thread(target=work, daemon=True).start(); done.wait()
    """
    with child(code) as process:
        assert len(procfs.tree(process.pid)) == 2
        kinds = procfs.open_kinds(process.pid)
        assert kinds.threads == 3


def test_stopped_is_frozen() -> None:
    import signal

    with child("") as process:
        assert not procfs.frozen(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
        assert procfs.frozen(process.pid)


def test_traced_is_found() -> None:
    code = """
        import ctypes
        libc = ctypes.CDLL(None)
        pid = os.fork()
        if pid == 0:
            libc.ptrace(0, 0, 0, 0); sys.stdin.read(); os._exit(0)
        while not int([l for l in open(f"/proc/{pid}/status") if l.startswith("TracerPid")][0].split()[1]): pass
    """
    with child(code) as process:
        traced = procfs.open_kinds(process.pid).traced
    assert [h.what for h in traced] == [str(process.pid)]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_pid_namespace_entered_process_and_nested_namespace() -> None:
    code = """
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x20000000) == 0  # CLONE_NEWPID
        r, w = os.pipe()
        first = os.fork()
        if first == 0:
            if os.fork() == 0:
                libc.unshare(0x04000000)  # CLONE_NEWUTS
                os.write(w, b"x"); sys.stdin.read(); os._exit(0)
            sys.stdin.read(); os._exit(0)
        os.read(r, 1)
        if os.fork() == 0:  # enters the namespace from outside
            sys.stdin.read(); os._exit(0)
    """
    with child(code) as process:
        first, second = procfs.descendants(process.pid)[1:3]
        kinds = procfs.open_kinds(first)
        assert set(kinds.pids) == set(procfs.descendants(process.pid)[1:])
        assert [pid for pid, _ in kinds.entered] == [second]
        assert [h.what for h in kinds.nested_namespaces] == ["uts"]
        assert [pid for pid, _ in procfs.process_names(first)] == [1, 2]
        assert "pid" not in kinds.host_namespaces and "net" in kinds.host_namespaces


def test_listening_ports() -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        assert ("tcp", server.getsockname()[1]) in procnet.listening_ports()
