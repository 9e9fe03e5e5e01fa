"""Forgets what this host's connection tracking remembers of connections that come back to it.

A connection that was here, went on at another host and comes back is far ahead of the sequence numbers that were written down when it left.
The kernel takes its packets for invalid then, and rules that drop those (netavark's, firewalld's) let none through: the connection hangs, for
up to five days (nf_conntrack_tcp_timeout_established). Without an entry it is picked up as it goes on (nf_conntrack_tcp_loose, on by default).

Messages of ctnetlink are those of include/uapi/linux/netfilter/nfnetlink_conntrack.h; the kernel sends only what matches since Linux 5.8
(CTA_FILTER), older ones send all entries.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

_NETLINK_NETFILTER: Final = 12
_GET, _DELETE = (1 << 8) | 1, (1 << 8) | 2
_REQUEST, _ACK, _DUMP = 0x1, 0x4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NESTED: Final = 0x8000
_TYPE: Final = 0x3FFF
_ORIG, _REPLY, _ID, _ZONE, _FILTER = 1, 2, 12, 18, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_PROTO_NUM: Final = 1
_FILTER_ORIG: Final = 1
_BY_SOURCE, _BY_DESTINATION = 1, 2
"""CTA_FILTER_F_CTA_IP_SRC and _DST."""
_LOOSE: Final = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_loose")
_TIMEOUT_S: Final = 2.0
_CAP: Final = 100_000
"""So many entries are looked at."""


def forget(addresses: Iterable[str]) -> int:
    """Remove the entries of TCP connections from or to these addresses, but for those whose addresses are translated.

    Returns:
        How many. Never raises: without it a connection may hang, which is no reason not to restore.
    """
    with suppress(OSError, struct.error, ValueError):
        if _LOOSE.read_text().strip() == "0":
            return 0  # what is forgotten is never picked up again
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as link:
            link.settimeout(_TIMEOUT_S)
            found = {entry for address in addresses for entry in _entries(link, ipaddress.ip_address(address))}
            return sum(_remove(link, family, attributes) for family, attributes in found)
    return 0


def _entries(link: socket.socket, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> set[tuple[int, bytes]]:
    """(family, what names it to the kernel) of each."""
    family = int(socket.AF_INET if address.version == 4 else socket.AF_INET6)
    found: set[tuple[int, bytes]] = set()
    for flag in (_BY_SOURCE, _BY_DESTINATION):
        number = (1 if address.version == 4 else 3) + (flag == _BY_DESTINATION)
        wanted = _nest(_ORIG, _nest(_TUPLE_IP, _attribute(number, address.packed)))
        wanted += _nest(_FILTER, _attribute(_FILTER_ORIG, struct.pack("=I", flag)))
        for body in _asked(link, _GET, _REQUEST | _DUMP, family, wanted):
            entry = dict(_attributes(body[4:]))
            orig, reply = _tuple(entry.get(_ORIG, b"")), _tuple(entry.get(_REPLY, b""))
            if orig is None or reply is None or orig[:2] != reply[1::-1] or orig[2:] != reply[3:1:-1] or address.packed not in orig[:2]:
                continue
            named = b"".join(_attribute(kind | (_NESTED if kind == _ORIG else 0), entry[kind]) for kind in (_ORIG, _ID, _ZONE) if kind in entry)
            found.add((family, named))
    return found


def _tuple(value: bytes) -> tuple[bytes, bytes, bytes, bytes] | None:
    """Source and destination address, source and destination port; None for what is not TCP."""
    parts = dict(_attributes(value))
    ends, protocol = dict(_attributes(parts.get(_TUPLE_IP, b""))), dict(_attributes(parts.get(_TUPLE_PROTO, b"")))
    if protocol.get(_PROTO_NUM) != bytes([socket.IPPROTO_TCP]):
        return None
    return ends.get(1) or ends.get(3, b""), ends.get(2) or ends.get(4, b""), protocol.get(2, b""), protocol.get(3, b"")


def _remove(link: socket.socket, family: int, attributes: bytes) -> bool:
    with suppress(OSError):  # it is gone already
        for _ in _asked(link, _DELETE, _REQUEST | _ACK, family, attributes):
            pass
        return True
    return False


def _asked(link: socket.socket, kind: int, flags: int, family: int, attributes: bytes) -> Iterator[bytes]:
    """The messages of the answer, from their nfgenmsg on. Raises OSError."""
    body = struct.pack("=BBH", family, 0, 0) + attributes
    link.send(struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body)
    for _ in range(_CAP):
        data = link.recv(1 << 18)
        at = 0
        while at + 16 <= len(data):
            size, answer = struct.unpack_from("=IH", data, at)
            if answer == _NLMSG_DONE or size < 16:
                return
            if answer == _NLMSG_ERROR:
                code = -struct.unpack_from("=i", data, at + 16)[0]
                if code:
                    raise OSError(code, os.strerror(code))
                return
            yield data[at + 16 : at + size]
            at += (size + 3) & ~3


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _nest(kind: int, value: bytes) -> bytes:
    return _attribute(kind | _NESTED, value)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            return
        yield kind & _TYPE, data[at + 4 : at + length]
        at += (length + 3) & ~3
