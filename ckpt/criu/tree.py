"""A running process tree as /proc shows it: who is in it, what it has open, which options its dump needs (proc(5))."""

from __future__ import annotations

import os
import signal
import stat as modes
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_POLL_S: Final = 0.003
_PF_EXITING: Final = 0x00000004
_PF_KTHREAD: Final = 0x00200000
_TCP_QUIET: Final = frozenset({"06", "07", "0A"})
"""TIME_WAIT, CLOSE, LISTEN: no --tcp-established needed (include/net/tcp_states.h)."""


@dataclass(frozen=True, slots=True)
class Stat:
    """What /proc/PID/stat says. `start_ticks` (since boot) tells a process from a later one with the same pid."""

    pid: int
    comm: str
    state: str
    ppid: int
    session: int
    tty: int
    flags: int
    start_ticks: int

    @property
    def kernel_thread(self) -> bool:
        return bool(self.flags & _PF_KTHREAD)

    @property
    def alive(self) -> bool:
        return self.state not in ("Z", "X", "x")


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A regular file that a process of the tree has open."""

    path: str
    pid: int
    fd: int
    writable: bool
    size_bytes: int
    deleted: bool


@dataclass(frozen=True, slots=True)
class Needs:
    """The CRIU options that a dump of the tree needs."""

    tcp_established: bool = False
    file_locks: bool = False
    shell_job: bool = False


def stat(pid: int) -> Stat | None:
    """None when there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    comm = text[text.index("(") + 1 : text.rindex(")")]
    rest = text[text.rindex(")") + 2 :].split()
    return Stat(pid, comm, rest[0], int(rest[1]), int(rest[3]), int(rest[4]), int(rest[6]), int(rest[19]))


def same(pid: int, start_ticks: int) -> bool:
    """Is the process that we knew still alive under this pid?"""
    now = stat(pid)
    return now is not None and now.alive and now.start_ticks == start_ticks


def pids(root: int) -> tuple[int, ...]:
    """The tree of `root`, itself first (zombies included)."""
    found, queue = [], [root]
    while queue:
        pid = queue.pop(0)
        found.append(pid)
        for task in _names(f"/proc/{pid}/task"):
            try:
                queue += [int(child) for child in Path(f"/proc/{pid}/task/{task}/children").read_text().split()]
            except OSError:
                continue
    return tuple(found)


def kill(root: int, limit_s: float) -> bool:
    """Kill the tree of `root`, which is frozen, so that it does not grow; whether all of it is dead, or dying, within the time.

    What is dying (PF_EXITING, a zombie) computes nothing any more. More cannot be waited for while CRIU traces the tree: the first process
    of a pid namespace is not dead before all others are reaped, and those are CRIU's to reap.
    """
    members = [found for pid in pids(root) if (found := stat(pid))]
    end = time.monotonic() + limit_s
    for member in members:
        if same(member.pid, member.start_ticks):
            with suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)
    while any(_computes(member) for member in members):
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_S)
    return True


def _computes(known: Stat) -> bool:
    now = stat(known.pid)
    return now is not None and now.alive and now.start_ticks == known.start_ticks and not now.flags & _PF_EXITING


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status as a dictionary (empty when it is gone)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(errors="replace")
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def argv(pid: int) -> tuple[str, ...]:
    """The command line (empty for a zombie or kernel thread)."""
    try:
        data = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ()
    return tuple(part.decode(errors="replace") for part in data.rstrip(b"\0").split(b"\0")) if data else ()


def link(pid: int, name: str) -> str:
    """Where /proc/PID/NAME points to ("" when it cannot be read)."""
    try:
        return os.readlink(f"/proc/{pid}/{name}")
    except OSError:
        return ""


def descriptors(pid: int) -> dict[int, str]:
    """Descriptor -> what it is (`/path`, `socket:[N]`, `anon_inode:[io_uring]`)."""
    found = {}
    for name in _names(f"/proc/{pid}/fd"):
        if target := link(pid, f"fd/{name}"):
            found[int(name)] = target
    return found


def open_files(root: int) -> tuple[OpenFile, ...]:
    """Regular files that the tree has open: CRIU wants them back by path, with the same size and mode."""
    found: dict[str, OpenFile] = {}
    for pid in pids(root):
        for fd, path in descriptors(pid).items():
            if not path.startswith("/"):
                continue
            try:
                info = os.stat(f"/proc/{pid}/fd/{fd}")
            except OSError:
                continue
            if not modes.S_ISREG(info.st_mode):
                continue
            flags = int(_fdinfo(pid, fd).get("flags", "0"), 8)
            writable = flags & os.O_ACCMODE != os.O_RDONLY
            if path not in found or (writable and not found[path].writable):
                found[path] = OpenFile(path.removesuffix(" (deleted)"), pid, fd, writable, info.st_size, info.st_nlink == 0)
    return tuple(found.values())


def needs(root: int) -> Needs:
    """Look at the tree and tell which options its dump needs."""
    first = stat(root)
    tcp = locks = False
    for pid in pids(root):
        sockets = {target[8:-1] for target in descriptors(pid).values() if target.startswith("socket:[")}
        tcp = tcp or bool(sockets & _connected(pid))
        locks = locks or any("lock" in _fdinfo(pid, fd) for fd in descriptors(pid))
    return Needs(tcp, locks, first is not None and first.session != root)


def boot_id() -> str:
    """The kernel's id of this boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def started_s(start_ticks: int) -> float:
    """Start of a process as seconds since the epoch."""
    try:
        for line in Path("/proc/stat").read_text().splitlines():
            if line.startswith("btime "):
                return int(line.split()[1]) + start_ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError):
        pass
    return 0.0


def _connected(pid: int) -> set[str]:
    inodes = set()
    for name in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if len(words) > 9 and words[3] not in _TCP_QUIET:
                inodes.add(words[9])
    return inodes


def _fdinfo(pid: int, fd: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/fdinfo/{fd}").read_text(errors="replace")
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
