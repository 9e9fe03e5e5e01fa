"""Work inside of another network namespace, and the kernel's list of its interfaces and addresses (rtnetlink(7))."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

_CLONE_NEWNET: Final = 0x40000000
_RTM_NEWLINK, _RTM_GETLINK, _RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 16, 18, 20, 21, 22
_NLM_F_REQUEST_ACK, _NLM_F_CREATE_EXCL, _NLM_F_REQUEST_DUMP = 0x5, 0x600, 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_IFLA_ADDRESS, _IFA_ADDRESS, _IFA_LOCAL = 1, 1, 2
_IFF_UP, _IFF_LOOPBACK, _IFF_NOARP = 0x1, 0x8, 0x80
_IFA_F_NODAD, _IFA_F_DADFAILED, _IFA_F_TENTATIVE = 0x02, 0x08, 0x40
_ARPHRD_ETHER: Final = 1
_MS_BIND, _MNT_DETACH, _SIOCSIFFLAGS = 4096, 2, 0x8914
LIMIT_S: Final = 2.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Address:
    """An address of an interface; `hardware` is b"" where neighbours don't ask for it (loopback, tunnels, interfaces that are down)."""

    index: int
    hardware: bytes
    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    prefix: int = 0
    tentative: bool = False
    """The kernel still asks whether somebody else has it (RFC 4862, 5.4), and nobody can bind it; or somebody has."""


def thread(namespace: int, body: Callable[[], None], failed: Callable[[str], None]) -> threading.Thread:
    """A thread, not started yet, that runs `body` in a network namespace (an open descriptor that lives as long as it).

    setns(2) moves the calling thread alone, and this one ends with it. `failed` gets what went wrong.
    """

    def run() -> None:
        import ctypes  # not for those who never come here

        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            body()
        except (OSError, ValueError, struct.error) as error:
            failed(str(error))

    return threading.Thread(target=run, name="ckpt-netns", daemon=True)


def call(pid: int, body: Callable[[], T], limit_s: float) -> T:
    """What `body` returns, called in the network namespace of a process (setns(2)). It sees to its own time limits.

    Raises:
        OSError: of `body`, or there is no such process; TimeoutError: `body` did not come to an end in that time.
    """
    found: list[T] = []
    failed: list[OSError] = []

    def run() -> None:
        try:
            found.append(body())
        except OSError as error:
            failed.append(error)

    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        worker = thread(namespace, run, lambda text: failed.append(OSError(text)))
        worker.start()
        worker.join(limit_s)
    finally:
        os.close(namespace)
    if failed:
        raise failed[0]
    if not found:
        raise TimeoutError("no answer in time")
    return found[0]


def addresses() -> Iterator[Address]:
    """All addresses of this thread's network namespace.

    Raises:
        OSError: the kernel does not tell.
    """
    hardware: dict[int, bytes] = {}
    for kind, body in _dump(_RTM_GETLINK):
        device, index, flags = struct.unpack_from("=2xHiI", body)
        address = _attributes(body[16:]).get(_IFLA_ADDRESS, b"")
        if kind == _RTM_NEWLINK and device == _ARPHRD_ETHER and flags & _IFF_UP and not flags & (_IFF_LOOPBACK | _IFF_NOARP) and len(address) == 6:
            hardware[index] = address
    for kind, body in _dump(_RTM_GETADDR):
        prefix, flags, index = struct.unpack_from("=xBBxI", body)
        found = _attributes(body[8:])
        packed = found.get(_IFA_LOCAL) or found.get(_IFA_ADDRESS)
        if kind == _RTM_NEWADDR and packed:
            tentative = bool(flags & (_IFA_F_TENTATIVE | _IFA_F_DADFAILED))
            yield Address(index, hardware.get(index, b""), ipaddress.ip_address(packed), prefix, tentative)


def settle(path: str, wanted: Collection[str]) -> str:
    """Make these IPv6 addresses of a network namespace usable at once, without the kernel's search for duplicates.

    The host that a container comes from still has them, so the search may even find one; and a connection cannot be restored while
    it lasts: bind(2) says EADDRNOTAVAIL.

    Returns:
        What went wrong, "" for nothing.
    """
    told: list[str] = []
    them = {ipaddress.ip_address(address) for address in wanted}

    def again() -> None:
        for one in [a for a in addresses() if a.tentative and a.address in them]:
            message = struct.pack("=BBBBI", socket.AF_INET6, one.prefix, _IFA_F_NODAD, 0, one.index)
            message += struct.pack("=HH", 4 + len(one.address.packed), _IFA_ADDRESS) + one.address.packed
            _ask(_RTM_DELADDR, _NLM_F_REQUEST_ACK, message)
            _ask(_RTM_NEWADDR, _NLM_F_REQUEST_ACK | _NLM_F_CREATE_EXCL, message)

    try:
        namespace = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return f"its network cannot be seen: {error.strerror}"
    try:
        worker = thread(namespace, again, told.append)
        worker.start()
        worker.join(2 * LIMIT_S)
        return told[0] if told else "the kernel does not answer" if worker.is_alive() else ""
    finally:
        os.close(namespace)


NAMED: Final = Path("/run/netns")
"""Where ip-netns(8) and podman keep namespaces that have a name."""


def make(name: str, wanted: Collection[str] = ()) -> Path:
    """A new network namespace with a name; it has a loopback and nothing else.

    Args:
        wanted: addresses that the loopback gets: what was bound to them can be bound again, and nothing leads anywhere.

    Returns:
        Its path, for `drop`.

    Raises:
        OSError: the kernel does not make it.
    """
    told: list[str] = []
    path = NAMED / name
    NAMED.mkdir(mode=0o755, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444))

    def body() -> None:
        import ctypes
        import fcntl

        libc = ctypes.CDLL(None, use_errno=True)
        own = f"/proc/self/task/{threading.get_native_id()}/ns/net"
        try:
            if libc.unshare(_CLONE_NEWNET) or libc.mount(own.encode(), os.fsencode(path), None, _MS_BIND, None):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as card:
                fcntl.ioctl(card, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", _IFF_UP | _IFF_LOOPBACK))
            index = socket.if_nametoindex("lo")
            for address in map(ipaddress.ip_address, wanted):
                family = socket.AF_INET if address.version == 4 else socket.AF_INET6
                message = struct.pack("=BBBBI", family, address.max_prefixlen, 0 if address.version == 4 else _IFA_F_NODAD, 0, index)
                for kind in (_IFA_LOCAL, _IFA_ADDRESS):
                    message += struct.pack("=HH", 4 + len(address.packed), kind) + address.packed
                _ask(_RTM_NEWADDR, _NLM_F_REQUEST_ACK | _NLM_F_CREATE_EXCL, message)
        except (OSError, ValueError, struct.error) as error:
            told.append(str(error))

    worker = threading.Thread(target=body, name="ckpt-netns", daemon=True)
    worker.start()
    worker.join(2 * LIMIT_S)
    if told or worker.is_alive():
        drop(name)
        raise OSError(told[0] if told else "the kernel does not answer")
    return path


def drop(name: str) -> None:
    """Take the name away; the namespace goes with the last process in it. Nothing is done when there is none."""
    path = NAMED / name
    if not path.exists():
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(path), _MNT_DETACH)
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _ask(kind: int, flags: int, message: bytes) -> None:
    """One request. Raises OSError with the kernel's answer."""
    with _netlink() as link:
        link.send(struct.pack("=IHHII", 16 + len(message), kind, flags, 1, 0) + message)
        answer = link.recv(1 << 16)
        code = struct.unpack_from("=i", answer, 16)[0] if struct.unpack_from("=H", answer, 4)[0] == _NLMSG_ERROR else 0
        if code:
            raise OSError(-code, os.strerror(-code))


def _netlink() -> socket.socket:
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
    link.settimeout(LIMIT_S)
    link.bind((0, 0))
    return link


def _dump(request: int) -> Iterator[tuple[int, bytes]]:
    """The answers (type, body) to a dump request."""
    with _netlink() as link:
        link.send(struct.pack("=IHHII", 32, request, _NLM_F_REQUEST_DUMP, 1, 0) + bytes(16))
        end = time.monotonic() + LIMIT_S
        while time.monotonic() < end:
            data = link.recv(1 << 18)
            while len(data) >= 16:
                length, kind = struct.unpack_from("=IH", data)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR or not 16 <= length <= len(data):
                    raise OSError("the kernel does not list its addresses")
                yield kind, data[16:length]
                data = data[(length + 3) & ~3 :]
    raise TimeoutError("the kernel does not come to an end with its addresses")


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if not 4 <= length <= len(data):
            break
        found[kind] = data[4:length]
        data = data[(length + 3) & ~3 :]
    return found
