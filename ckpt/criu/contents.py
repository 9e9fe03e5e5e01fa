"""What is in a dump: processes, their memory by kind, open files, sockets, mounts. Read from the small CRIU images, never from memory pages.

The images are hostile input: whatever is wrong in them is an ArchiveInvalid. Sources of the numbers: criu/include/vma.h and image.h
(VMA_AREA_*), criu/include/pagemap.h (PE_*), include/net/tcp_states.h, criu/include/pstree.h (TASK_*), images/*.proto.
"""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final, Protocol

from ckpt.criu.bindings import load
from ckpt.criu.images import FILE_CAP_BYTES, PROCESSES_CAP, parse
from ckpt.criu.pagestream import PE_LAZY, PE_PARENT, PE_PRESENT
from ckpt.errors import ArchiveInvalid

PAGE: Final = 4096
_PAGES_CAP: Final = 1 << 40
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_STATES: Final = {1: "running", 2: "zombie", 3: "stopped", 6: "zombie"}
_TCP: Final = (
    "", "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait", "close", "close-wait", "last-ack", "listen", "closing",
)  # fmt: skip
_PROTOCOLS: Final = {6: "tcp", 17: "udp", 136: "udplite", 1: "icmp", 58: "icmpv6", 255: "raw"}
_SOCKET_TYPES: Final = {1: "stream", 2: "dgram", 3: "raw", 5: "seqpacket"}
# Status bits of a mapping, the first that fits names its kind.
_KINDS: Final = (
    (1 << 1, "stack"), (1 << 5, "heap"), (1 << 6, "file_private"), (1 << 7, "file_shared"), (1 << 8, "shared"), (1 << 10, "shared"),
    (1 << 9, "private"),
)  # fmt: skip
_FDS: Final = {
    "REG": "file", "PIPE": "pipe", "FIFO": "fifo", "INETSK": "inet", "UNIXSK": "unix", "EVENTFD": "eventfd", "EVENTPOLL": "epoll",
    "INOTIFY": "inotify", "SIGNALFD": "signalfd", "PACKETSK": "packet", "TTY": "tty", "FANOTIFY": "fanotify", "NETLINKSK": "netlink",
    "NS": "namespace", "TUNF": "tun", "EXT": "external", "TIMERFD": "timerfd", "MEMFD": "memfd", "BPFMAP": "bpf", "PIDFD": "pidfd",
    "CTL_TTY": "tty", "AUTOFS_PIPE": "pipe",
}  # fmt: skip
KINDS: Final = ("private", "heap", "stack", "file_private", "file_shared", "shared", "other")


class Source(Protocol):
    """Where CRIU images come from: names as in the archive ("checkpoint/core-1.img")."""

    def names(self) -> list[str]: ...

    def size_bytes(self, name: str) -> int: ...

    def open(self, name: str) -> AbstractContextManager[BinaryIO]: ...


@dataclass(frozen=True, slots=True)
class Mapping:
    """A mapping of a process: [start, end) in its address space."""

    start: int
    end: int
    kind: str
    prot: int = 0
    shmid: int = 0
    """Of a shared mapping the shared memory; of a file's mapping the id of the file."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring pages in a pagemap. `offset`: of their bytes in the pages image, None when these are not in it."""

    vaddr: int
    pages: int
    offset: int | None
    parent: bool = False


@dataclass(frozen=True, slots=True)
class Pagemap:
    """One pagemap image: whose memory (a process's, or a shared memory's), which pages image, its runs in order."""

    number: int
    shared: bool
    pages_id: int
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The member with the bytes."""
        return f"checkpoint/pages-{self.pages_id}.img"


@dataclass(slots=True)
class Memory:
    """Bytes of a process's memory: mapped by kind, and where the pages are. `zero`: mapped, private, and in no image (never touched, or zero)."""

    mapped_bytes: int = 0
    by_kind_bytes: dict[str, int] = field(default_factory=dict)
    image_bytes: int = 0
    parent_bytes: int = 0
    lazy_bytes: int = 0
    zero_bytes: int = 0
    shared_image_bytes: int = 0


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A descriptor. `path`: what it is for a person, "" where there is nothing to say."""

    fd: int
    kind: str
    path: str


@dataclass(frozen=True, slots=True)
class Socket:
    """A socket; addresses as text with ports ("10.0.0.1:80"), for unix sockets the name."""

    fd: int
    protocol: str
    state: str
    local: str
    remote: str


@dataclass(slots=True)
class Task:
    """A process of the dump; `pid` inside its pid namespace."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    threads: int
    comm: str = "?"
    state: str = ""
    uid: int | None = None
    gid: int | None = None
    exe: str = ""
    cwd: str = ""
    memory: Memory = field(default_factory=Memory)
    files: list[OpenFile] = field(default_factory=list)
    sockets: list[Socket] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount in the dump's mount namespaces."""

    mountpoint: str
    fstype: str
    source: str
    external: str = ""


@dataclass(frozen=True, slots=True)
class Contents:
    """All of it. `kinds`: how many open descriptors there are of each kind; `shared_bytes`: shared memory in the images, each counted once."""

    tasks: tuple[Task, ...]
    mounts: tuple[Mount, ...]
    kinds: dict[str, int]
    shared_bytes: int = 0


def read(source: Source) -> Contents:
    """Everything that the small images tell.

    Raises:
        ArchiveInvalid: an image is missing, damaged or too large.
        FeatureMissing: pycriu is not there.
    """
    names = frozenset(source.names())
    files = _files(source, names)
    shared = {p.number: sum(run.pages for run in p.runs if run.offset is not None) * PAGE for p in pagemaps(source, shared=True)}
    open_kinds: dict[str, int] = {}
    tasks: list[Task] = []
    tables: dict[int, tuple[list[OpenFile], list[Socket]]] = {}
    for entry in entries(source, "pstree.img", "PSTREE", "pstree_pb2", "pstree_entry"):
        if len(tasks) >= PROCESSES_CAP:
            raise ArchiveInvalid(f"the CRIU images claim more than {PROCESSES_CAP} processes")
        task = Task(entry.pid, entry.ppid, entry.pgid, entry.sid, max(1, len(entry.threads)))
        tasks.append(task)
        files_id = _core(source, names, task)
        if f"checkpoint/mm-{task.pid}.img" in names:
            mapped = mappings(source, task.pid)
            task.exe = _path(files.get(mapped[1]))
            _memory(task, mapped[0], list(pagemaps(source, only=task.pid)), shared)
        for fs in _optional(source, names, f"fs-{task.pid}.img", "FS", "fs_pb2", "fs_entry"):
            task.cwd = _path(files.get(fs.cwd_id))
        if files_id and files_id not in tables:
            tables[files_id] = _table(source, names, files_id, files)
            for found in tables[files_id][0]:
                open_kinds[found.kind] = open_kinds.get(found.kind, 0) + 1
        if files_id:
            task.files, task.sockets = tables[files_id]
    if not tasks:
        raise ArchiveInvalid("the CRIU images have no process in them (pstree.img)")
    return Contents(tuple(tasks), _mounts(source), dict(sorted(open_kinds.items())), sum(shared.values()))


def entries(source: Source, leaf: str, magic: str, module: str, message: str, *, head_message: str = "") -> Iterator[Any]:
    """The entries of one image of the source. Raises ArchiveInvalid."""
    name = f"checkpoint/{leaf}"
    try:
        size_bytes = source.size_bytes(name)
    except (KeyError, OSError):
        raise ArchiveInvalid(f"{leaf} is missing") from None
    if size_bytes > FILE_CAP_BYTES:
        raise ArchiveInvalid(f"{leaf} is no regular file of a sensible size")
    with source.open(name) as file:
        data = _Whole(file, size_bytes)
        yield from parse(data, leaf, magic, module, message, head_message=head_message)  # type: ignore[arg-type]


def pagemaps(source: Source, *, only: int | None = None, shared: bool | None = None) -> Iterator[Pagemap]:
    """The pagemaps: of one process, of all shared memory, of all processes, or (None) of all. Raises ArchiveInvalid."""
    pattern = re.compile(r"checkpoint/pagemap-(shmem-)?([1-9]\d{0,18})\.img")
    for name in source.names():
        match = pattern.fullmatch(name)
        if not match or (only is not None and (match[1] or int(match[2]) != only)) or (shared is not None and bool(match[1]) != shared):
            continue
        yield _pagemap(source, name.rpartition("/")[2], int(match[2]), bool(match[1]))


def _pagemap(source: Source, leaf: str, number: int, shared: bool) -> Pagemap:
    pages_id = 0
    offset = end = 0
    runs: list[Run] = []
    for count, entry in enumerate(entries(source, leaf, "PAGEMAP", "pagemap_pb2", "pagemap_entry", head_message="pagemap_head")):
        if not count:
            pages_id = int(entry.pages_id)
            continue
        pages = int(getattr(entry, "nr_pages", 0) or getattr(entry, "compat_nr_pages", 0))
        vaddr, flags = int(entry.vaddr), int(entry.flags)
        if not 0 < pages < _PAGES_CAP or vaddr % PAGE or vaddr < end or vaddr + pages * PAGE > 1 << 64:
            raise ArchiveInvalid(f"{leaf} is damaged (entry {count}: addresses)")
        end = vaddr + pages * PAGE
        parent = bool(flags & PE_PARENT) or bool(entry.in_parent)
        # Before there were flags an entry without a parent was present (criu/pagemap.c, init_compat_pagemap_entry).
        present = bool(flags & PE_PRESENT) or (not flags & PE_LAZY and not parent)
        runs.append(Run(vaddr, pages, offset if present else None, parent))
        offset += pages * PAGE if present else 0
    return Pagemap(number, shared, pages_id, tuple(runs))


def mappings(source: Source, pid: int) -> tuple[tuple[Mapping, ...], int]:
    """The mappings of a process in the order of their addresses, and the id of its executable's file. Raises ArchiveInvalid."""
    for mm in entries(source, f"mm-{pid}.img", "MM", "mm_pb2", "mm_entry"):
        found = []
        for vma in mm.vmas:
            if vma.end <= vma.start or vma.start % PAGE or vma.end % PAGE:
                raise ArchiveInvalid(f"mm-{pid}.img is damaged (addresses)")
            kind = next((kind for bit, kind in _KINDS if vma.status & bit), "other")
            if vma.start <= mm.mm_start_stack < vma.end and kind == "private":
                kind = "stack"
            found.append(Mapping(vma.start, vma.end, kind, vma.prot, vma.shmid if kind in ("shared", "file_private", "file_shared") else 0))
        return tuple(sorted(found, key=lambda mapping: mapping.start)), int(mm.exe_file_id)
    raise ArchiveInvalid(f"mm-{pid}.img is empty")


def argument_ranges(source: Source, pid: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where in its memory a process has its command line and its environment: [start, end) of each. Raises ArchiveInvalid."""
    for mm in entries(source, f"mm-{pid}.img", "MM", "mm_pb2", "mm_entry"):
        return (mm.mm_arg_start, mm.mm_arg_end), (mm.mm_env_start, mm.mm_env_end)
    raise ArchiveInvalid(f"mm-{pid}.img is empty")


def text(value: Any, limit: int = 4096) -> str:
    """Text from an image, for a person: no control characters."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return _CONTROL.sub("?", str(value))[:limit]


def _memory(task: Task, mapped: tuple[Mapping, ...], maps: list[Pagemap], shared: dict[int, int]) -> None:
    memory = task.memory
    private = 0
    shmids: set[int] = set()
    for mapping in mapped:
        size = mapping.end - mapping.start
        memory.mapped_bytes += size
        memory.by_kind_bytes[mapping.kind] = memory.by_kind_bytes.get(mapping.kind, 0) + size
        if mapping.kind in ("private", "heap", "stack"):
            private += size
        if mapping.kind == "shared":
            shmids.add(mapping.shmid)
    memory.shared_image_bytes = sum(shared.get(shmid, 0) for shmid in shmids)
    covered = 0
    for pagemap in maps:
        for run in pagemap.runs:
            size = run.pages * PAGE
            covered += size
            if run.offset is not None:
                memory.image_bytes += size
            elif run.parent:
                memory.parent_bytes += size
            else:
                memory.lazy_bytes += size
    memory.zero_bytes = max(0, private - covered)


def _core(source: Source, names: frozenset[str], task: Task) -> int:
    """Fill in what core and ids images tell; returns the id of the table of descriptors, 0 for a zombie."""
    files_id = 0
    for core in _optional(source, names, f"core-{task.pid}.img", "CORE", "core_pb2", "core_entry"):
        task.comm = text(core.tc.comm, 64)
        task.state = _STATES.get(core.tc.task_state, "")
        if core.HasField("thread_core") and core.thread_core.HasField("creds"):
            task.uid, task.gid = int(core.thread_core.creds.uid), int(core.thread_core.creds.gid)
        files_id = int(core.ids.files_id) if core.HasField("ids") else 0
        break
    for ids in _optional(source, names, f"ids-{task.pid}.img", "IDS", "core_pb2", "task_kobj_ids_entry"):
        files_id = int(ids.files_id)
        break
    return files_id


def _files(source: Source, names: frozenset[str]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for entry in _optional(source, names, "files.img", "FILES", "fdinfo_pb2", "file_entry"):
        found[entry.id] = entry
    return found


def _table(source: Source, names: frozenset[str], files_id: int, files: dict[int, Any]) -> tuple[list[OpenFile], list[Socket]]:
    kinds = load("images.fdinfo_pb2").fd_types
    opened: list[OpenFile] = []
    sockets: list[Socket] = []
    for fd in _optional(source, names, f"fdinfo-{files_id}.img", "FDINFO", "fdinfo_pb2", "fdinfo_entry"):
        try:
            kind = _FDS.get(kinds.Name(fd.type), "other")
        except ValueError:
            kind = "other"
        entry = files.get(fd.id)
        if entry is not None and (entry.HasField("isk") or entry.HasField("usk")):
            sockets.append(_socket(fd.fd, entry))
        opened.append(OpenFile(fd.fd, kind, _path(entry)))
    return sorted(opened, key=lambda file: file.fd), sorted(sockets, key=lambda found: found.fd)


def _path(entry: Any) -> str:
    """What an open file is, for a person."""
    if entry is None:
        return ""
    if entry.HasField("reg"):
        return text(entry.reg.name)
    if entry.HasField("isk") or entry.HasField("usk"):
        one = _socket(0, entry)
        return " ".join(filter(None, (one.protocol, one.local, f"-> {one.remote}" if one.remote else "")))
    if entry.HasField("pipe"):
        return f"pipe:[{entry.pipe.pipe_id}]"
    if entry.HasField("fifo"):
        return f"fifo:[{entry.fifo.pipe_id}]"
    return ""


def _socket(fd: int, entry: Any) -> Socket:
    if entry.HasField("usk"):
        usk = entry.usk
        name = text(b"@" + usk.name[1:] if usk.name[:1] == b"\0" else usk.name.rstrip(b"\0"), 128)
        state = _TCP[usk.state] if 0 <= usk.state < len(_TCP) else ""
        return Socket(fd, f"unix-{_SOCKET_TYPES.get(usk.type, usk.type)}", state, name, f"socket:[{usk.peer}]" if usk.peer else "")
    isk = entry.isk
    protocol = _PROTOCOLS.get(isk.proto, str(isk.proto)) + ("6" if isk.family == socket.AF_INET6 else "")
    state = _TCP[isk.state] if 0 <= isk.state < len(_TCP) else ""
    remote = _address(isk.family, isk.dst_addr, isk.dst_port) if isk.dst_port else ""
    return Socket(fd, protocol, state, _address(isk.family, isk.src_addr, isk.src_port), remote)


def _address(family: int, words: Any, port: int) -> str:
    raw = b"".join(struct.pack("=I", word) for word in words)
    if family == socket.AF_INET6 and len(raw) == 16:
        return f"[{socket.inet_ntop(socket.AF_INET6, raw)}]:{port}"
    if family == socket.AF_INET and len(raw) >= 4:
        return f"{socket.inet_ntop(socket.AF_INET, raw[:4])}:{port}"
    raise ArchiveInvalid("files.img has a malformed address")


def _mounts(source: Source) -> tuple[Mount, ...]:
    found: list[Mount] = []
    types = load("images.mnt_pb2").fstype
    for name in source.names():
        if not re.fullmatch(r"checkpoint/mountpoints-\d{1,10}\.img", name):
            continue
        for entry in entries(source, name.rpartition("/")[2], "MNTS", "mnt_pb2", "mnt_entry"):
            try:
                fstype = types.Name(entry.fstype).lower()
            except ValueError:
                fstype = str(entry.fstype)
            if entry.HasField("fsname") and fstype in ("auto", "unsupported"):
                fstype = text(entry.fsname, 64)
            place = text(entry.mountpoint)
            found.append(Mount("/" + place.removeprefix(".").lstrip("/"), fstype, text(entry.source), text(entry.ext_key) if entry.ext_mount else ""))
    return tuple(found)


def _optional(source: Source, names: frozenset[str], leaf: str, magic: str, module: str, message: str) -> Iterator[Any]:
    if f"checkpoint/{leaf}" in names:
        yield from entries(source, leaf, magic, module, message)


class _Whole:
    """`read(n)` that gives n bytes unless the stream ends, and no more than the member has."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        parts = []
        left = size_bytes
        while left and (piece := file.read(left)):
            parts.append(piece)
            left -= len(piece)
        self._data = memoryview(b"".join(parts))

    def read(self, count: int) -> bytes:
        piece, self._data = bytes(self._data[:count]), self._data[count:]
        return piece
