"""More ways for content beside the link: further ssh connections, or TLS straight to the other host.

The destination opens a door for them, once and for a short time: a socket that only its own user can reach, to which the other ends of
further ssh connections hand over their standard input; or a TCP port with TLS, where only the source's certificate is accepted
(ckpt/peer/tls.py). Calls and heartbeats stay on the link, whose end is the end of all.
"""

from __future__ import annotations

import os
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

from ckpt.errors import BusyError, CannotConnect, FeatureMissing, UsageError
from ckpt.peer import tls
from ckpt.peer.frames import prepare
from ckpt.peer.wires import FdWire, TlsWire, Wire

if TYPE_CHECKING:
    from ckpt.peer.client import Peer
    from ckpt.peer.server import Session

MAX_STREAMS: Final = 16
PORTS: Final = range(49152, 49216)
"""Where --direct is listened for; firewalls of virtualisation hosts know these ports (libvirt uses the same)."""
DIRECT_LIMIT_S: Final = 20.0
SSH_LIMIT_S: Final = 300.0
"""Somebody may have to type a password for each connection."""
_HANDSHAKE_S: Final = 5.0
_TICK_S: Final = 0.2
_PATIENCE_S: Final = 1.0
_NO_SSH: Final = "without --direct everything goes through ssh"


class Joining:
    """The streams that join a link. Strangers that knock meanwhile are sent away, and kept few."""

    def __init__(self, session: Session, wanted: int) -> None:
        self._session = session
        self._wanted = wanted
        self._changed = threading.Condition()
        self._busy = 0
        self._listener: socket.socket | None = None
        self.count = 0
        self.said = ""
        """Why the last one was sent away."""

    @property
    def open(self) -> bool:
        """Somebody is still to come."""
        return self.count < self._wanted and not self._session.lost

    def take(self, wire: Wire) -> None:
        """One has come; closed when it is one too many."""
        with self._changed:
            if not self.open:
                wire.close()
                return
            self._session.link.receive_from(wire)
            self.count += 1
            if not self.open and self._listener is not None:
                with suppress(OSError):
                    self._listener.shutdown(socket.SHUT_RDWR)  # nobody else is wanted
            self._changed.notify_all()

    def wait(self, count: int, timeout_s: float) -> int:
        """Wait for so many; returns how many there are."""
        with self._changed:
            self._changed.wait_for(lambda: self.count >= count or self._session.lost, timeout_s)
            return self.count

    def accept(self, listener: socket.socket, limit_s: float, greet: Callable[[socket.socket], Wire]) -> None:
        """Take connections until all have come, or the time is over."""
        end_s = time.monotonic() + limit_s
        self._listener = listener
        with listener:
            listener.settimeout(_TICK_S)
            while self.open and time.monotonic() < end_s:
                try:
                    sock, _ = listener.accept()
                except TimeoutError:
                    continue
                except OSError:
                    return
                with self._changed:
                    busy = self._busy >= 2 * MAX_STREAMS
                    self._busy += not busy
                if busy:
                    sock.close()
                else:
                    threading.Thread(target=self._greet, args=(sock, greet), name="ckpt-stream-greet", daemon=True).start()

    def _greet(self, sock: socket.socket, greet: Callable[[socket.socket], Wire]) -> None:
        try:
            sock.settimeout(_HANDSHAKE_S)
            self.take(greet(sock))
        except OSError as error:
            self.said = str(getattr(error, "reason", None) or error.strerror or error)
            sock.close()
        finally:
            with self._changed:
                self._busy -= 1


# ---------------------------------------------------------------- the destination


def open_streams(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """Verb `streams`: open the door, once a link."""
    wanted = args.get("streams")
    if not isinstance(wanted, int) or not 1 <= wanted <= MAX_STREAMS:
        raise UsageError(f"{wanted!r} is no number of streams")
    if "joining" in session.state:
        raise BusyError("streams were asked for already")
    session.state["joining"] = joining = Joining(session, wanted)
    return _open_direct(joining, args) if args.get("direct") else _open_ssh(joining)


def joined(session: Session, args: dict[str, Any]) -> dict[str, Any]:
    """Verb `joined`: wait until so many streams have come."""
    joining = session.state.get("joining")
    count = args.get("count")
    if not isinstance(joining, Joining) or not isinstance(count, int):
        raise UsageError("no streams were asked for")
    return {"joined": joining.wait(count, _PATIENCE_S), "said": joining.said}


def _open_direct(joining: Joining, args: dict[str, Any]) -> dict[str, Any]:
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) != 4:
        raise FeatureMissing("sshd here does not tell on which address it was reached (SSH_CONNECTION)", hint=_NO_SSH)
    theirs, mine = tls.certificate_from(args.get("certificate")), tls.identity()
    context = tls.context(mine, theirs, server=True)
    listener = _listen(words[2])

    def greet(sock: socket.socket) -> Wire:
        return TlsWire(tls.wrap(sock, context, theirs, server=True))

    threading.Thread(target=joining.accept, args=(listener, DIRECT_LIMIT_S, greet), name="ckpt-direct", daemon=True).start()
    return {"address": words[2], "port": listener.getsockname()[1], "certificate": mine.certificate}


def _listen(address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in PORTS:
        with suppress(OSError):
            return socket.create_server((address, port), family=family, backlog=2 * MAX_STREAMS)
    raise BusyError(f"no port from {PORTS[0]} to {PORTS[-1]} is free on {address}", hint=_NO_SSH)


def _open_ssh(joining: Joining) -> dict[str, Any]:
    directory = tempfile.mkdtemp(prefix="ckpt-streams-")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{directory}/socket")
    listener.listen(MAX_STREAMS)

    def greet(sock: socket.socket) -> Wire:
        fds = borrow(sock, 1)
        return Lent(fds[0], sock)

    def accept() -> None:
        try:
            joining.accept(listener, SSH_LIMIT_S, greet)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    threading.Thread(target=accept, name="ckpt-streams", daemon=True).start()
    return {"socket": f"{directory}/socket"}


def borrow(sock: socket.socket, count: int) -> list[int]:
    """What `lend` hands over. Raises OSError when it is somebody else, or something else."""
    # The directory of the socket is ours alone; ask all the same.
    _, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    _, fds, _, _ = socket.recv_fds(sock, 1, count)
    if uid != os.geteuid() or len(fds) != count:
        for fd in fds:
            os.close(fd)
        raise PermissionError("not the user that runs ckpt here")
    for fd in fds:
        prepare(fd)
    return fds


class Lent(FdWire):
    """A descriptor of a process that waits until it is given back."""

    def __init__(self, fd: int, owner: socket.socket) -> None:
        super().__init__(fd)
        self._owner = owner

    def close(self) -> None:
        super().close()
        self._owner.close()


def lend(path: str, *, both: bool = False) -> int:
    """The body of `ckpt peer --join`: hand standard input (and output) over to the ckpt whose socket this is; ends when it needs them no more."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_HANDSHAKE_S)
        try:
            sock.connect(path)
            socket.send_fds(sock, [b"\0"], [0, 1] if both else [0])
        except OSError as error:
            raise CannotConnect(f"nobody waits for a stream here: {error.strerror or error}") from error
        sock.settimeout(None)
        with suppress(OSError):
            sock.recv(1)
    return 0


# ---------------------------------------------------------------- the source


def join_direct(peer: Peer, count: int) -> None:
    """Connect to the destination by TLS, `count` times.

    Raises:
        CannotConnect: its port cannot be reached, or the other end is not the one that ssh reached.
        CkptError: what the destination raised.
    """
    mine = tls.identity()
    answer = peer.call("streams", {"streams": count, "direct": True, "certificate": mine.certificate})
    address, port = str(answer.get("address")), int(answer.get("port") or 0)
    theirs = tls.certificate_from(answer.get("certificate"))
    context = tls.context(mine, theirs, server=False)
    wires: list[Wire] = []
    try:
        for _ in range(count):
            sock = socket.create_connection((address, port), timeout=_HANDSHAKE_S)
            wires.append(TlsWire(tls.wrap(sock, context, theirs, server=False)))
        await_joined(peer, count, _HANDSHAKE_S)
    except BaseException as error:
        for wire in wires:
            wire.close()
        if isinstance(error, OSError):
            why = getattr(error, "reason", None) or error.strerror or error
            hint = f"let TCP ports {PORTS[0]} to {PORTS[-1]} through; {_NO_SSH}"
            raise CannotConnect(f"cannot connect to {address} port {port} of {peer.name} directly: {why}", hint=hint) from error
        raise
    peer.link.send_over(wires)


def await_joined(peer: Peer, count: int, limit_s: float = DIRECT_LIMIT_S, alive: Callable[[], bool] = lambda: True) -> None:
    """Wait until the destination has `count` streams. Raises CannotConnect when they do not come, or nobody is `alive` any more who could."""
    end_s = time.monotonic() + limit_s
    while True:
        last = not alive() or time.monotonic() > end_s
        answer = peer.call("joined", {"count": count})
        if answer.get("joined") == count:
            return
        if last:
            said = f": {answer['said']}" if answer.get("said") else ""
            raise CannotConnect(f"{answer.get('joined')} of {count} streams reached {peer.name}{said}")
