"""CRIU images read through pycriu's protobuf classes, never the memory pages. The images are untrusted input.

Format (CRIU's Documentation and pycriu/images/images.py): u32 magic of the kind (not in inventory.img), u32 magic of the
type, then entries of u32 length and protobuf.
"""

from __future__ import annotations

import os
import re
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from ckpt.criu.bindings import load
from ckpt.errors import ArchiveInvalid
from ckpt.model import DumpStats, Process

FILE_CAP_BYTES: Final = 64 << 20
ENTRY_CAP_BYTES: Final = 4 << 20
ENTRIES_CAP: Final = 500_000
PROCESSES_CAP: Final = 32_768
_TCP, _LISTEN, _NOT_CONNECTED = 6, 10, (0, 7)
"""IPPROTO_TCP and the TCP states of include/net/tcp_states.h; 7 is CLOSE."""
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Connection:
    """A TCP socket in the CRIU images, addresses as text."""

    family: int
    source: str
    source_port: int
    destination: str
    destination_port: int


@dataclass(frozen=True, slots=True)
class OpenKinds:
    """What a dump has open that restore needs options for."""

    tcp_established: bool = False
    file_locks: bool = False
    ttys: bool = False
    external_unix: bool = False
    shell_job: bool = False
    connections: tuple[Connection, ...] = ()
    listening_ports: tuple[int, ...] = ()


def process_tree(images_dir: Path) -> tuple[Process, ...]:
    """The dumped processes in the order of pstree.img. Raises ArchiveInvalid."""
    entries = list(_entries(images_dir / "pstree.img", "PSTREE", "pstree_pb2", "pstree_entry"))
    if not entries:
        raise ArchiveInvalid("the CRIU images have no process in them (pstree.img)")
    if len(entries) > PROCESSES_CAP:
        raise ArchiveInvalid(f"the CRIU images claim {len(entries)} processes")
    return tuple(Process(e.pid, e.ppid, _comm(images_dir, e.pid), max(1, len(e.threads))) for e in entries)


def all_ids(images_dir: Path) -> frozenset[int]:
    """Every pid and thread number that a restore needs to be free. Raises ArchiveInvalid."""
    found: set[int] = set()
    for entry in _entries(images_dir / "pstree.img", "PSTREE", "pstree_pb2", "pstree_entry"):
        found.add(entry.pid)
        found.update(entry.threads)
    return frozenset(found)


def stats(path: Path) -> DumpStats:
    """CRIU's stats-dump. Raises ArchiveInvalid."""
    return _dump_stats(_entries(path, "STATS", "stats_pb2", "stats_entry"))


def stats_of(source: BinaryIO) -> DumpStats:
    """`stats`, from a stream. Raises ArchiveInvalid."""
    return _dump_stats(parse(source, "stats-dump", "STATS", "stats_pb2", "stats_entry"))


def _dump_stats(entries: Iterator[Any]) -> DumpStats:
    for entry in entries:
        if entry.HasField("dump"):
            d = entry.dump
            return DumpStats(d.freezing_time, d.frozen_time, d.memdump_time, d.memwrite_time, d.pages_scanned, d.pages_written)
    raise ArchiveInvalid("stats-dump has no statistics of a dump")


def open_kinds(images_dir: Path) -> OpenKinds:
    """What is open in the dump, for the options of its restore. Raises ArchiveInvalid."""
    ttys = external = False
    connections: list[Connection] = []
    ports: set[int] = set()
    tcp = any(entry.name.startswith("tcp-stream-") for entry in _scan(images_dir))
    for e in _entries(images_dir / "files.img", "FILES", "fdinfo_pb2", "file_entry", missing_ok=True):
        if e.HasField("tty"):
            ttys = True
        if e.HasField("usk") and e.usk.uflags & 0x1:  # USK_EXTERN
            external = True
        if e.HasField("isk") and e.isk.proto == _TCP:
            if e.isk.state == _LISTEN:
                ports.add(e.isk.src_port)
            elif e.isk.state not in _NOT_CONNECTED:
                connections.append(_connection(e.isk))
                tcp = True
    locks = any(True for _ in _entries(images_dir / "filelocks.img", "FILE_LOCKS", "file_lock_pb2", "file_lock_entry", missing_ok=True))
    shell = False
    for root in _entries(images_dir / "pstree.img", "PSTREE", "pstree_pb2", "pstree_entry"):
        shell = root.pid != root.sid
        break
    return OpenKinds(tcp, locks, ttys, external, shell, tuple(connections), tuple(sorted(ports)))


def memory_bytes(images_dir: Path) -> int:
    """Size of the memory pages on disk (pages-*.img). Raises ArchiveInvalid when the directory cannot be read."""
    total = 0
    for entry in _scan(images_dir):
        if entry.name.startswith("pages-") and entry.name.endswith(".img") and entry.is_file(follow_symlinks=False):
            total += entry.stat(follow_symlinks=False).st_size
    return total


def run_id(images_dir: Path) -> str:
    """The id that names CRIU's nftables table of this dump ("" when CRIU is too old to have one). Raises ArchiveInvalid."""
    for entry in _entries(images_dir / "inventory.img", "INVENTORY", "inventory_pb2", "inventory_entry"):
        text = str(getattr(entry, "dump_criu_run_id", ""))
        if text and not re.fullmatch(r"[0-9A-Za-z-]{1,64}", text):
            raise ArchiveInvalid("inventory.img has a malformed run id")
        return text
    return ""


def _connection(isk: Any) -> Connection:
    def text(words: Any) -> str:
        raw = b"".join(struct.pack("=I", w) for w in words)
        try:
            return socket.inet_ntop(socket.AF_INET if len(raw) == 4 else socket.AF_INET6, raw)
        except ValueError as error:
            raise ArchiveInvalid("files.img has a malformed address") from error

    return Connection(isk.family, text(isk.src_addr), isk.src_port, text(isk.dst_addr), isk.dst_port)


def _comm(images_dir: Path, pid: int) -> str:
    try:
        for entry in _entries(images_dir / f"core-{pid}.img", "CORE", "core_pb2", "core_entry", missing_ok=True):
            # It will be shown on a terminal.
            return _CONTROL.sub("?", str(entry.tc.comm))[:64]
    except ArchiveInvalid:
        # A field of another architecture must not hide the tree; the restore itself checks core images fully.
        return "?"
    return "?"


def _scan(images_dir: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(images_dir) as found:
            return list(found)
    except OSError as error:
        raise ArchiveInvalid(f"the CRIU images cannot be read: {error.strerror}") from error


def _entries(path: Path, magic: str, module: str, message: str, *, missing_ok: bool = False) -> Iterator[Any]:
    """The entries of one image in a directory."""
    try:
        # O_NOFOLLOW, O_NONBLOCK: whoever packed the archive may have put a link or a FIFO here.
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        if missing_ok:
            return
        raise ArchiveInvalid(f"{path.name} is missing") from error
    except OSError as error:
        raise ArchiveInvalid(f"{path.name} cannot be read: {error.strerror}") from error
    with os.fdopen(fd, "rb") as source:
        status = os.fstat(source.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > FILE_CAP_BYTES:
            raise ArchiveInvalid(f"{path.name} is no regular file of a sensible size")
        yield from parse(source, path.name, magic, module, message)


def parse(source: BinaryIO, name: str, magic: str, module: str, message: str, *, head_message: str = "") -> Iterator[Any]:
    """The entries of one image of a kind that has no payload between its entries, from the start of a stream.

    Args:
        head_message: what the first entry is when it is of another kind (a pagemap's).

    Raises:
        ArchiveInvalid: not what it should be, or too much; the message has `name`.
    """
    protobufs = load(f"images.{module}")
    kind = getattr(protobufs, message)
    magics = load("images.magic").by_name
    head = source.read(4)
    if head in (struct.pack("<I", magics[common]) for common in ("IMG_COMMON", "IMG_SERVICE")):  # inventory.img has none
        head = source.read(4)
    if head != struct.pack("<I", magics[magic]):
        raise ArchiveInvalid(f"{name} is not what its name says (magic)")
    for count in range(ENTRIES_CAP + 1):
        size = source.read(4)
        if not size:
            return
        if count == ENTRIES_CAP or len(size) < 4 or (length := struct.unpack("<I", size)[0]) > ENTRY_CAP_BYTES:
            raise ArchiveInvalid(f"{name} is damaged (entry {count})")
        body = source.read(length)
        if len(body) < length:
            raise ArchiveInvalid(f"{name} is cut short (entry {count})")
        entry = getattr(protobufs, head_message)() if head_message and not count else kind()
        try:
            entry.ParseFromString(body)
        except Exception as error:  # protobuf's DecodeError, whose class depends on its implementation
            raise ArchiveInvalid(f"{name} is damaged (entry {count}: {error})") from error
        yield entry
