"""A loopback port for root's processes only: any local user can connect to one, so the other end is looked up."""

from __future__ import annotations

import socket
from typing import Final

from ckpt.host import procnet

ADDRESS: Final = "127.0.0.1"
_SO_RCVBUFFORCE: Final = 33
_BACKLOG: Final = 64
_LOOKUPS: Final = 3


def listen(receive_buffer_bytes: int) -> socket.socket:
    """A non-blocking listener on a port of its own whose connections get this receive buffer, where we may. Raises OSError."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        try:
            listener.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, receive_buffer_bytes)
        except PermissionError:
            pass  # the kernel's own tuning is better than a buffer cut to net.core.rmem_max
        listener.bind((ADDRESS, 0))
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def accept(listener: socket.socket) -> socket.socket | None:
    """The next connection if it comes from a process of root; None, and it is closed, if not. Raises BlockingIOError, OSError."""
    connection, peer = listener.accept()
    if not _is_root(peer, connection.getsockname()):
        connection.close()
        return None
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _is_root(peer: tuple[str, int], here: tuple[str, int]) -> bool:
    # A table that changes while it is read may miss a row, so look again.
    for _ in range(_LOOKUPS):
        if (uid := procnet.connection_uid(peer, here)) is not None:
            return uid == 0
    return False
