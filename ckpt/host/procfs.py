"""What a process tree has open, as /proc shows it: read only, and nothing of the tree is stopped or traced for it.

Processes may end while they are read; what is gone is left out. Formats: proc(5), proc_pid_fdinfo(5), proc_locks(5),
cgroups(7), Documentation/filesystems/proc.rst. Pids are those of the reader's pid namespace unless said otherwise.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from ckpt.host import procnet
from ckpt.host.procread import (
    PROC,
    all_pids,
    cgroup_frozen,
    children,
    comm_of,
    controlling_terminal,
    lock_fields,
    namespace,
    nspids,
    overlay_devices,
    session_of,
    state_of,
    status_of,
    stopped,
    text,
)

GHOST_LIMIT_BYTES: Final = 1 << 20
"""CRIU's default `ghost-limit`: a deleted file that is larger fails the dump."""

_NAMESPACES: Final = ("pid", "net", "ipc", "uts", "user", "cgroup", "time", "mnt")
_NESTED_REFUSED: Final = ("pid", "ipc", "uts", "user", "cgroup", "time")
_ANON_SUPPORTED: Final = {"[eventfd]", "[eventpoll]", "inotify", "[fanotify]", "[signalfd]", "[timerfd]", "[pidfd]", "bpf-map", "[io_uring]"}
_SOCKETS_SUPPORTED: Final = tuple("TCP TCPv6 UDP UDPv6 UDPLITE UDPLITEv6 RAW RAWv6 PING PINGv6 UNIX UNIX-STREAM PACKET NETLINK".split())
_GPU: Final = ("/dev/nvidia", "/dev/kfd", "/dev/dri/")
_MEM_MAJOR, _TTY_MAJOR, _TTYAUX_MAJOR, _MISC_MAJOR, _PTS_MAJOR = 1, 4, 5, 10, 136
_MISC_SUPPORTED: Final = {200, 235}  # /dev/net/tun, /dev/autofs
_DELETED: Final = " (deleted)"
_MEMORY_FILES: Final = ("/memfd:", "/dev/zero", "/SYSV", "/[aio]", "/anon_hugepage")


class Holder(NamedTuple):
    """A process and what it holds."""

    pid: int
    comm: str
    what: str


class DeletedFile(NamedTuple):
    """An open or mapped file without its name; `size_bytes` as allocated on disk; `linked`: another hard link of it still exists."""

    path: str
    size_bytes: int
    linked: bool


@dataclass(frozen=True, slots=True)
class OpenKinds:
    """What the processes of a tree hold that decides whether, and how, CRIU can dump it.

    Attributes:
        tcp_established: connected TCP sockets, half-closed ones included.
        tcp_in_flight: connections that wait to be accepted; CRIU refuses those.
        unix_external: connected unix sockets whose peer is outside the tree (empty when `unix_known` is False).
        unix_datagram: likewise, of datagram sockets, which CRIU's `ext-unix-sk` can save.
        file_locks: flock, POSIX and OFD locks and leases.
        inotify: watches; `inotify_overlay`: those of them on an overlay file system.
        terminals: terminals whose master is outside the tree.
        session_outside: the session leader of the first process is outside the tree.
        devices: other device nodes that CRIU cannot dump. `anon_unsupported`, `sockets_unsupported`: likewise.
        host_namespaces: the kinds of namespace shared with this process.
        nested_namespaces: namespaces inside the tree of kinds that CRIU dumps only once.
        entered: processes in the tree's pid namespace that were put in from outside (exec sessions): CRIU leaves them out.
        anon_bytes, shared_bytes, swap_bytes: RssAnon, RssShmem and VmSwap summed; `rss_bytes`: all resident memory.
        unreadable: pids that could not be looked into.
    """

    pids: tuple[int, ...] = ()
    tcp_established: int = 0
    tcp_listen: int = 0
    tcp_in_flight: int = 0
    udp: int = 0
    unix_external: tuple[Holder, ...] = ()
    unix_datagram: tuple[Holder, ...] = ()
    unix_known: bool = True
    file_locks: int = 0
    io_uring: tuple[tuple[int, str], ...] = ()
    inotify: int = 0
    inotify_overlay: int = 0
    gpu: tuple[Holder, ...] = ()
    terminals: tuple[Holder, ...] = ()
    session_outside: bool = False
    devices: tuple[Holder, ...] = ()
    anon_unsupported: tuple[Holder, ...] = ()
    sockets_unsupported: tuple[Holder, ...] = ()
    deleted_files: tuple[DeletedFile, ...] = ()
    host_namespaces: tuple[str, ...] = ()
    nested_namespaces: tuple[Holder, ...] = ()
    entered: tuple[tuple[int, str], ...] = ()
    traced: tuple[Holder, ...] = ()
    zombies: tuple[tuple[int, str], ...] = ()
    uninterruptible: tuple[tuple[int, str], ...] = ()
    seccomp: int = 0
    threads: int = 0
    rss_bytes: int = 0
    anon_bytes: int = 0
    shared_bytes: int = 0
    swap_bytes: int = 0
    unreadable: tuple[int, ...] = ()

    @property
    def needs_tcp_established(self) -> bool:
        """True when there are connections, and also when one may come between this look and the freeze."""
        return bool(self.tcp_established or self.tcp_listen)

    @property
    def needs_file_locks(self) -> bool:
        return self.file_locks > 0

    @property
    def needs_shell_job(self) -> bool:
        """True when terminal or session belong to somebody outside the tree."""
        return bool(self.terminals) or self.session_outside

    @property
    def terminal(self) -> bool:
        return self.needs_shell_job

    def ghosts_over(self, limit_bytes: int = GHOST_LIMIT_BYTES) -> tuple[DeletedFile, ...]:
        """Deleted files that are too large to be saved under this `ghost-limit`."""
        return tuple(f for f in self.deleted_files if not f.linked and f.size_bytes > limit_bytes)

    @property
    def dump_bytes(self) -> int:
        """The most that the memory pages of a dump can take."""
        return self.anon_bytes + self.shared_bytes + self.swap_bytes


def alive(pid: int) -> bool:
    """True while the process is there and has not ended (a zombie has)."""
    return state_of(pid) not in ("", "Z", "X", "x")


def descendants(pid: int) -> tuple[int, ...]:
    """`pid` and all its descendants, parents first: what CRIU dumps. Empty when it is gone."""
    if not (PROC / str(pid)).exists():
        return ()
    found = {pid: None}
    queue = [pid]
    while queue:
        for child in children(queue.pop(0)):
            if child not in found:
                found[child] = None
                queue.append(child)
    return tuple(found)


def tree(pid: int) -> tuple[int, ...]:
    """All processes of the tree: the descendants of `pid` and, when it is the init of a pid namespace, all in that namespace."""
    found = dict.fromkeys(descendants(pid))
    ns = namespace(pid, "pid")
    if found and ns and nspids(pid)[-1:] == [1] and ns != namespace("self", "pid"):
        for other in all_pids():
            if other not in found and namespace(other, "pid") == ns:
                found.update(dict.fromkeys(descendants(other)))
    return tuple(found)


def process_names(pid: int) -> tuple[tuple[int, str], ...]:
    """(pid in its own namespace, comm) of `pid` and its descendants, sorted: equal before a dump and after its restore."""
    names = []
    for member in descendants(pid):
        inner = nspids(member)
        if inner:
            names.append((inner[-1], comm_of(member)))
    return tuple(sorted(names))


def frozen(pid: int) -> bool:
    """True when nothing of the tree can run: its cgroup is frozen, or all its threads are stopped (as while CRIU dumps)."""
    members = descendants(pid)
    if not members or not alive(pid):
        return False
    return cgroup_frozen(pid) or all(state_of(m) in ("Z", "X") or stopped(m) for m in members)


def open_kinds(pid: int) -> OpenKinds:
    """Look at everything the tree of `pid` holds."""
    look = _Look(pid)
    for member in look.own:
        look.process(member)
    return look.result()


class _Look:
    """One pass over a tree, collecting."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.pids = tree(pid)
        self.own = dict.fromkeys(descendants(pid))
        self.entered = tuple((p, comm_of(p)) for p in self.pids if p not in self.own)
        self.sockets: dict[int, Holder] = {}
        self.netns: dict[str, int] = {}
        self.locks: set[tuple[str, ...]] = set()
        self.ring: dict[int, str] = {}
        self.watches = self.watches_overlay = 0
        self.slaves: list[tuple[Holder, int | None]] = []
        self.masters: set[int] = set()
        self.held: dict[str, dict[Holder, None]] = {k: {} for k in ("gpu", "devices", "anon", "protocols", "traced", "nested")}
        self.deleted: dict[tuple[int, int], DeletedFile] = {}
        self.zombies: list[tuple[int, str]] = []
        self.waiting: list[tuple[int, str]] = []
        self.unreadable: list[int] = []
        self.seccomp = self.threads = 0
        self.bytes = {"anon": 0, "file": 0, "shmem": 0, "swap": 0}
        self.root_ns = {kind: namespace(pid, kind) for kind in _NAMESPACES}

    def process(self, pid: int) -> None:
        status = status_of(pid)
        if not status:
            return
        comm, state = comm_of(pid), status.get("State", "?")[:1]
        if state == "Z":
            self.zombies.append((pid, comm))
            return
        if state == "D":
            self.waiting.append((pid, comm))
        if int(status.get("TracerPid", "0")):
            self.held["traced"][Holder(pid, comm, status["TracerPid"])] = None
        self.seccomp += status.get("Seccomp", "0") != "0"
        self.threads += int(status.get("Threads", "1"))
        for key, name in (("anon", "RssAnon"), ("file", "RssFile"), ("shmem", "RssShmem"), ("swap", "VmSwap")):
            self.bytes[key] += int(status.get(name, "0 kB").split()[0]) * 1024
        for kind in _NESTED_REFUSED:
            ns = namespace(pid, kind)
            if ns and self.root_ns[kind] and ns != self.root_ns[kind]:
                self.held["nested"][Holder(pid, comm, kind)] = None
        self.netns.setdefault(namespace(pid, "net"), pid)
        overlay = overlay_devices(pid)
        try:
            entries = os.listdir(PROC / str(pid) / "fd")
        except OSError as error:
            if isinstance(error, PermissionError):
                self.unreadable.append(pid)
            return
        for fd in entries:
            self.descriptor(pid, comm, fd, overlay)
        self.mappings(pid, comm)

    def descriptor(self, pid: int, comm: str, fd: str, overlay: set[int]) -> None:
        path = PROC / str(pid) / "fd" / fd
        try:
            link = os.readlink(path)
        except OSError:
            return
        if link.startswith("socket:["):
            self.sockets.setdefault(int(link[8:-1]), Holder(pid, comm, str(path)))
            return
        if link.startswith("pipe:["):
            return
        info = text(PROC / str(pid) / "fdinfo" / fd)
        self.locks.update(lock[1:] for line in info.splitlines() if line.startswith("lock:") and (lock := lock_fields(line[5:])))
        if link.startswith("anon_inode:"):
            self.anonymous(pid, comm, link.removeprefix("anon_inode:"), info, overlay)
        elif link.startswith("/dev/") or link.endswith(_DELETED):
            self.named(pid, comm, path, link, info)

    def anonymous(self, pid: int, comm: str, kind: str, info: str, overlay: set[int]) -> None:
        if kind == "[io_uring]":
            self.ring[pid] = comm
        elif kind == "inotify":
            for line in info.splitlines():
                if line.startswith("inotify "):
                    self.watches += 1
                    self.watches_overlay += any(w.startswith("sdev:") and int(w[5:], 16) in overlay for w in line.split())
        elif kind not in _ANON_SUPPORTED:
            self.held["anon"][Holder(pid, comm, kind)] = None

    def named(self, pid: int, comm: str, path: Path, link: str, info: str) -> None:
        try:
            st = os.stat(path)
        except OSError:
            return
        if stat.S_ISREG(st.st_mode) or stat.S_ISDIR(st.st_mode):
            if link.endswith(_DELETED) and not link.startswith(_MEMORY_FILES):
                self.deleted[st.st_dev, st.st_ino] = DeletedFile(link.removesuffix(_DELETED), st.st_blocks * 512, st.st_nlink > 0)
            return
        if not (stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode)):
            return
        major, minor, holder = os.major(st.st_rdev), os.minor(st.st_rdev), Holder(pid, comm, link.removesuffix(_DELETED))
        if link.startswith(_GPU):
            self.held["gpu"][holder] = None
        elif stat.S_ISBLK(st.st_mode):
            self.held["devices"][holder] = None
        elif _PTS_MAJOR <= major < _PTS_MAJOR + 8:
            self.slaves.append((holder, minor))
        elif (major, minor) == (_TTYAUX_MAJOR, 2):
            index = next((line.split()[1] for line in info.splitlines() if line.startswith("tty-index:")), "")
            self.masters.update([int(index)] if index.isdigit() else [])
        elif (major, minor) == (_TTYAUX_MAJOR, 0):
            terminal = controlling_terminal(pid)
            self.slaves.append((holder, os.minor(terminal) if _PTS_MAJOR <= os.major(terminal) < _PTS_MAJOR + 8 else None))
        elif major in (_TTY_MAJOR, _TTYAUX_MAJOR):
            self.slaves.append((holder, None))
        elif major != _MEM_MAJOR and not (major == _MISC_MAJOR and minor in _MISC_SUPPORTED):
            self.held["devices"][holder] = None

    def mappings(self, pid: int, comm: str) -> None:
        try:
            with open(PROC / str(pid) / "maps", errors="replace") as lines:
                for line in lines:
                    if "io_uring" in line or "/dev/" in line or line.endswith("(deleted)\n"):
                        area, _, rest = line.partition(" ")
                        path = rest.split(maxsplit=4)[-1].rstrip("\n")
                        if path == "anon_inode:[io_uring]":
                            self.ring[pid] = comm
                        elif not path.startswith(_MEMORY_FILES) and path.startswith("/"):
                            self.named(pid, comm, PROC / str(pid) / "map_files" / area, path, "")
        except OSError:
            pass

    def result(self) -> OpenKinds:
        inet = [procnet.count_inet(pid, self.sockets) for pid in self.netns.values()]
        unix_known, streams, datagrams = self.unix()
        for inode, holder in self.sockets.items():
            if any(inode in counts.seen for counts in inet):
                continue
            name = procnet.protocol(Path(holder.what))
            if name and name not in _SOCKETS_SUPPORTED:
                self.held["protocols"][holder._replace(what=name)] = None
        for line in text(PROC / "locks").splitlines():
            lock = lock_fields(line)
            if lock and lock[4].isdigit() and int(lock[4]) in self.own:
                self.locks.add(lock[1:])
        terminals = dict.fromkeys(h for h, index in self.slaves if index is None or index not in self.masters)
        return OpenKinds(
            pids=self.pids,
            tcp_established=sum(c.established for c in inet),
            tcp_listen=sum(c.listen for c in inet),
            tcp_in_flight=sum(c.in_flight for c in inet),
            udp=sum(c.udp for c in inet),
            unix_external=streams,
            unix_datagram=datagrams,
            unix_known=unix_known,
            file_locks=len(self.locks),
            io_uring=tuple(self.ring.items()),
            inotify=self.watches,
            inotify_overlay=self.watches_overlay,
            gpu=tuple(self.held["gpu"]),
            terminals=tuple(terminals),
            session_outside=session_of(self.pid) not in self.own,
            devices=tuple(self.held["devices"]),
            anon_unsupported=tuple(self.held["anon"]),
            sockets_unsupported=tuple(self.held["protocols"]),
            deleted_files=tuple(self.deleted.values()),
            host_namespaces=tuple(kind for kind, ns in self.root_ns.items() if ns and ns == namespace("self", kind)),
            nested_namespaces=tuple(self.held["nested"]),
            entered=self.entered,
            traced=tuple(self.held["traced"]),
            zombies=tuple(self.zombies),
            uninterruptible=tuple(self.waiting),
            seccomp=self.seccomp,
            threads=self.threads,
            rss_bytes=self.bytes["anon"] + self.bytes["file"] + self.bytes["shmem"],
            anon_bytes=self.bytes["anon"],
            shared_bytes=self.bytes["shmem"],
            swap_bytes=self.bytes["swap"],
            unreadable=tuple(self.unreadable),
        )

    def unix(self) -> tuple[bool, tuple[Holder, ...], tuple[Holder, ...]]:
        """Whether the kernel told, and the connected (stream, datagram) sockets whose peer no process of the tree has."""
        outside: tuple[list[Holder], list[Holder]] = ([], [])
        known = True
        for pid in self.netns.values():
            connections = procnet.unix_connections(pid) if self.sockets else []
            known = known and connections is not None
            for sock in connections or []:
                if sock.inode in self.sockets and sock.peer_inode not in self.sockets:
                    outside[sock.datagram].append(self.sockets[sock.inode]._replace(what=sock.name or "(unnamed)"))
        return known, tuple(outside[False]), tuple(outside[True])
