"""Sockets as /proc and sock_diag show them, by inode: what the descriptors of a process tree are connected to.

Formats: proc_net_tcp(5), proc_net_unix(5); sock_diag(7) for the peer of a unix socket, which /proc does not tell.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
import threading
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")

_ESTABLISHED, _SYN_SENT, _SYN_RECV, _FIN_WAIT1, _FIN_WAIT2, _TIME_WAIT, _CLOSE, _CLOSE_WAIT, _LAST_ACK, _LISTEN, _CLOSING = range(1, 12)
_CONNECTED: Final = {_ESTABLISHED, _SYN_SENT, _SYN_RECV, _FIN_WAIT1, _FIN_WAIT2, _CLOSE_WAIT, _LAST_ACK, _CLOSING}

_SOCK_DIAG_BY_FAMILY: Final = 20
_NETLINK_SOCK_DIAG: Final = 4
_NLM_F_REQUEST_DUMP: Final = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_UDIAG_SHOW_NAME_PEER_ICONS: Final = 0x1 | 0x4 | 0x8
_UNIX_DIAG_NAME, _UNIX_DIAG_PEER, _UNIX_DIAG_ICONS = 0, 2, 3
_DIAG_TIMEOUT_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class InetCounts:
    """Sockets of a set of inodes in one network namespace. `in_flight`: connections waiting to be accepted."""

    established: int = 0
    listen: int = 0
    in_flight: int = 0
    udp: int = 0
    seen: frozenset[int] = field(default_factory=frozenset)


@dataclass(frozen=True, slots=True)
class UnixSocket:
    """A unix socket that is connected: its inode, its peer's, and a name of one of them ("" for none)."""

    inode: int
    peer_inode: int
    name: str = ""
    datagram: bool = False


def count_inet(pid: int, inodes: Container[int]) -> InetCounts:
    """TCP and UDP sockets of `inodes` in the network namespace of `pid`."""
    established = listen = in_flight = udp = 0
    seen: set[int] = set()
    for row in _rows(pid, ("tcp", "tcp6")):
        inode, state = int(row[9]), int(row[3], 16)
        if inode not in inodes or not inode:
            continue
        seen.add(inode)
        if state == _LISTEN:
            listen += 1
            in_flight += int(row[4].partition(":")[2], 16)  # a listener's receive queue is its accept queue
        elif state in _CONNECTED:
            established += 1
    for row in _rows(pid, ("udp", "udp6", "udplite", "udplite6")):
        inode = int(row[9])
        if inode in inodes and inode:
            seen.add(inode)
            udp += 1
    return InetCounts(established, listen, in_flight, udp, frozenset(seen))


def listening_ports(pid: int | str = "self") -> set[tuple[str, int]]:
    """(protocol, port) pairs that are bound in the network namespace of `pid`; protocol is "tcp" or "udp"."""
    found = {("tcp", _port(row[1])) for row in _rows(pid, ("tcp", "tcp6")) if int(row[3], 16) == _LISTEN}
    # An unconnected UDP socket has state CLOSE; a connected one is somebody's client socket and blocks nobody.
    return found | {("udp", _port(row[1])) for row in _rows(pid, ("udp", "udp6")) if int(row[3], 16) == _CLOSE}


def connection_uid(end: tuple[str, int], other: tuple[str, int]) -> int | None:
    """Who owns the socket `end` of an established IPv4 TCP connection to `other` in our network namespace; None when it is not there.

    A socket whose owner has closed it already (it has no inode then, and the kernel shows uid 0 for it) is not there either.
    """
    row_end, row_other = _hex(end), _hex(other)
    for row in _rows("thread-self", ("tcp",)):
        if row[1] == row_end and row[2] == row_other and int(row[3], 16) == _ESTABLISHED and row[9] != "0":
            return int(row[7])
    return None


def _hex(address: tuple[str, int]) -> str:
    """An IPv4 address as /proc/net/tcp has it: the network-order word printed as a native one."""
    return f"{struct.unpack('=I', socket.inet_aton(address[0]))[0]:08X}:{address[1]:04X}"


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def _rows(pid: int | str, tables: tuple[str, ...]) -> Iterator[list[str]]:
    for table in tables:
        try:
            with open(PROC / str(pid) / "net" / table) as lines:
                next(lines, None)
                for line in lines:
                    row = line.split()
                    if len(row) > 9:
                        yield row
        except OSError:
            continue  # no IPv6, or the process is gone


def protocol(path: Path) -> str:
    """The protocol name of the socket behind a /proc/PID/fd entry ("TCP", "UNIX", ...), "" when it is not told."""
    try:
        return os.getxattr(path, "system.sockprotoname").rstrip(b"\0").decode(errors="replace")
    except OSError:
        return ""


def unix_connections(pid: int) -> list[UnixSocket] | None:
    """All connected unix sockets of the network namespace of `pid`; None when the kernel does not tell.

    sock_diag answers for the caller's network namespace, so a thread of its own enters the other one and ends there.
    """
    answer: list[list[UnixSocket]] = []

    def ask() -> None:
        try:
            if not _same_netns(pid):
                _enter_netns(pid)
            answer.append(_ask_unix())
        except (OSError, struct.error):
            pass

    thread = threading.Thread(target=ask, name="sock-diag", daemon=True)
    thread.start()
    thread.join(_DIAG_TIMEOUT_S)
    return answer[0] if answer else None


def _same_netns(pid: int) -> bool:
    return os.readlink(PROC / str(pid) / "ns/net") == os.readlink(PROC / "thread-self/ns/net")


def _enter_netns(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns comes with Python 3.12
    fd = os.open(PROC / str(pid) / "ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, 0x40000000) != 0:  # CLONE_NEWNET
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error))
    finally:
        os.close(fd)


def _ask_unix() -> list[UnixSocket]:
    body = struct.pack("=BBHIIIII", socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _UDIAG_SHOW_NAME_PEER_ICONS, 0xFFFFFFFF, 0xFFFFFFFF)
    header = struct.pack("=IHHII", 16 + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
    names: dict[int, str] = {}
    peers: dict[int, int] = {}
    kinds: dict[int, int] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as diag:
        diag.settimeout(_DIAG_TIMEOUT_S)
        diag.send(header + body)
        while _take(diag.recv(65536), names, peers, kinds):
            pass
    return [
        UnixSocket(inode, peer, names.get(inode) or names.get(peer, ""), kinds[inode] == socket.SOCK_DGRAM) for inode, peer in peers.items() if peer
    ]


def _take(data: bytes, names: dict[int, str], peers: dict[int, int], kinds: dict[int, int]) -> bool:
    """Take one datagram of the answer apart; False after the last one."""
    offset = 0
    while offset + 16 <= len(data):
        size, kind = struct.unpack_from("=IH", data, offset)
        if kind == _NLMSG_DONE or size < 16:
            return False
        if kind == _NLMSG_ERROR:
            code = -struct.unpack_from("=i", data, offset + 16)[0]
            raise OSError(code, os.strerror(code))
        inode = struct.unpack_from("=I", data, offset + 20)[0]
        kinds[inode] = data[offset + 17]
        at, end = offset + 32, offset + size
        while at + 4 <= end:
            length, attribute = struct.unpack_from("=HH", data, at)
            if length < 4:
                break
            value = data[at + 4 : at + length]
            if attribute == _UNIX_DIAG_NAME:
                names[inode] = value.rstrip(b"\0").replace(b"\0", b"@").decode(errors="replace")
            elif attribute == _UNIX_DIAG_PEER:
                peers[inode] = peers.get(inode) or struct.unpack("=I", value)[0]
            elif attribute == _UNIX_DIAG_ICONS:  # connected, not accepted: the peer has no inode yet, the listener stands for it
                peers.update((client, inode) for (client,) in struct.iter_unpack("=I", value) if client)
            at += (length + 3) & ~3
        offset += (size + 3) & ~3
    return True
