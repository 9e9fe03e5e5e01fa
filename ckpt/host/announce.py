"""Tells the neighbours of a container where it lives now: gratuitous ARP and unsolicited neighbour advertisements.

After a migration the same address, as a rule with the same hardware address, answers at another port of the network's switches. They learn
it from the first packet that comes from there, neighbours with another hardware address in their tables from an announcement:
an ARP request for the own address (RFC 5227, 3), and for IPv6 an unsolicited advertisement with the override flag to all nodes
(RFC 4861, 7.2.6). Both are sent on every interface of the container's network namespace but the loopback, for its global addresses,
several times, because nobody acknowledges them.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from ckpt.host import netns
from ckpt.host.netns import LIMIT_S, Address

_ETH_P_ARP, _ETH_P_IPV6 = 0x0806, 0x86DD
_ALL_NODES: Final = ipaddress.IPv6Address("ff02::1").packed
_FLAG_OVERRIDE: Final = 0x20000000
EVERY_S: Final = 0.05
"""As soon as QEMU announces a migrated machine again (its `announce-initial`)."""
MOST: Final = 40


def frame(claim: Address) -> bytes:
    """The Ethernet frame that claims an address."""
    if isinstance(claim.address, ipaddress.IPv4Address):
        # RFC 826: Ethernet, IPv4, lengths, request; the target's hardware address is not looked at.
        body = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + claim.hardware + claim.address.packed + bytes(6) + claim.address.packed
        return b"\xff" * 6 + claim.hardware + struct.pack("!H", _ETH_P_ARP) + body
    body = struct.pack("!BBHI", 136, 0, 0, _FLAG_OVERRIDE) + claim.address.packed + b"\x02\x01" + claim.hardware
    pseudo = claim.address.packed + _ALL_NODES + struct.pack("!II", len(body), socket.IPPROTO_ICMPV6)
    body = body[:2] + struct.pack("!H", _checksum(pseudo + body)) + body[4:]
    header = struct.pack("!IHBB", 6 << 28, len(body), socket.IPPROTO_ICMPV6, 255) + claim.address.packed + _ALL_NODES
    return b"\x33\x33\x00\x00\x00\x01" + claim.hardware + struct.pack("!H", _ETH_P_IPV6) + header + body


def _checksum(data: bytes) -> int:
    """RFC 1071, of an even number of bytes."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


class Announcement:
    """What came of it, to be looked at when it is over."""

    def __init__(self) -> None:
        self.claims: tuple[Address, ...] = ()
        self.sent = 0
        self.problem = ""
        """Why nothing, or not all, could be sent."""


@contextmanager
def during(pid: int) -> Iterator[Announcement]:
    """Announce the addresses of the network namespace of `pid` while the block lasts, which lets it run, and once more when it is over.

    Nothing is announced for a process that shares our own network namespace: those addresses are the administrator's. Never raises by
    itself; what went wrong is in the announcement. An exception of the block ends it at once.
    """
    told = Announcement()
    if not pid:
        yield told
        return
    try:
        namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        told.problem = f"its network cannot be seen: {error.strerror}"
        yield told
        return
    over = threading.Event()
    broken = threading.Event()

    def failed(reason: str) -> None:
        told.problem = f"its addresses could not be announced: {reason}"

    thread = netns.thread(namespace, lambda: _announce(told, over, broken), failed)
    try:
        if os.path.samestat(os.fstat(namespace), os.stat("/proc/thread-self/ns/net")):
            yield told
            return
        thread.start()
        try:
            yield told
        except BaseException:
            broken.set()
            raise
        finally:
            over.set()
            thread.join(LIMIT_S)
            if thread.is_alive():
                told.problem = f"not done after {LIMIT_S:g} s"
    finally:
        os.close(namespace)


def now(pid: int) -> Announcement:
    """Announce once. Never raises."""
    with during(pid) as told:
        pass
    return told


def _announce(told: Announcement, over: threading.Event, broken: threading.Event) -> None:
    told.claims = tuple(a for a in netns.addresses() if a.hardware and not a.address.is_link_local and not a.address.is_loopback)
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0) as out:
        out.settimeout(LIMIT_S)
        last = False
        while told.claims and not broken.is_set():
            _send(out, told)
            if last:
                return
            last = over.wait(EVERY_S) if told.sent < MOST * len(told.claims) else over.wait()


def _send(out: socket.socket, told: Announcement) -> None:
    told.problem = ""  # a later try that succeeds makes up for it: the host's own block may not be gone yet (host/traffic)
    for claim in told.claims:
        try:
            out.sendto(frame(claim), (socket.if_indextoname(claim.index), 0))
            told.sent += 1
        except OSError as error:
            told.problem = f"{claim.address} could not be announced: {error.strerror}"
