"""A link that was there before us: our standard input and output, with a `ckpt peer` at its other end.

So a host fetches a workload with nothing but its own ssh to the other one: it starts `ckpt migrate --stdio` there, and a `ckpt peer` here, and
puts the two together. The link is one for the life of this process; when it has ended, whoever started us asks again.

A group has a link for each member. They are brought to a socket here (`door`), by a `ckpt peer --join` each, at the end of an ssh each.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from ckpt.errors import CannotConnect, UsageError

if TYPE_CHECKING:
    from ckpt.peer.streams import Lent
    from ckpt.peer.wires import FdWire

DESTINATION: Final = "stdio:"
"""How a destination at the other end of our standard input and output is named, in journals too."""
LENT_LIMIT_S: Final = 60.0
"""How long each link is waited for: an ssh has to log in for it."""
_GREETING_S: Final = 5.0
_BACKLOG: Final = 64
_ways: list[int] = []


def take_over() -> None:
    """From now on standard input and output are the link. Input is empty afterwards, and what is written to output goes to stderr.

    Raises:
        UsageError: somebody sits there.
    """
    if os.isatty(0) or os.isatty(1):
        raise UsageError("--stdio is for ckpt on another host", hint="see ckpt undrain")
    sys.stdout.flush()
    _ways[:] = [os.dup(0), os.dup(1)]
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)


def ends() -> tuple[int, int]:
    """The link's descriptors, which are the caller's then.

    Raises:
        CannotConnect: they were taken already, or there never were any.
    """
    if not _ways:
        raise CannotConnect("the link to the host that fetches it is over", hint="ckpt undrain there, once more")
    inp, out = _ways
    _ways.clear()
    return inp, out


class _Door:
    """Where links are brought to us, and how many are still to come."""

    def __init__(self, listener: socket.socket, count: int) -> None:
        self._listener = listener
        self._left = count
        self._lock = threading.Lock()

    def next(self) -> tuple[FdWire, Lent]:
        from ckpt.peer.streams import Lent, borrow
        from ckpt.peer.wires import FdWire

        with self._lock:
            if self._left <= 0:
                raise CannotConnect("the links to the host that fetches it are over", hint="ckpt undrain there, once more")
            self._left -= 1
            self._listener.settimeout(LENT_LIMIT_S)
            try:
                sock, _ = self._listener.accept()
                sock.settimeout(_GREETING_S)
                inp, out = borrow(sock, 2)
                sock.settimeout(None)
            except OSError as error:
                raise CannotConnect(f"the host that fetches it brought no link: {error.strerror or error}") from error
        return FdWire(inp), Lent(out, sock)


_doors: list[_Door] = []


@contextmanager
def door(count: int) -> Iterator[str]:
    """A socket to which `ckpt peer --join PATH --both` brings so many links; each `lent` takes one."""
    directory = tempfile.mkdtemp(prefix="ckpt-links-")
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            path = f"{directory}/socket"
            listener.bind(path)
            listener.listen(_BACKLOG)
            _doors[:] = [_Door(listener, count)]
            yield path
    finally:
        _doors.clear()
        shutil.rmtree(directory, ignore_errors=True)


def several() -> bool:
    """Whether links are brought to us, one for each connection."""
    return bool(_doors)


def lent() -> tuple[FdWire, Lent]:
    """The next link, its two directions; the caller's then.

    Raises:
        CannotConnect: there are no more, or none was brought.
    """
    return _doors[0].next()
