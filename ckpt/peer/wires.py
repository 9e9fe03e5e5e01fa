"""What frames are read from and written to: a descriptor, or a TLS connection."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import ssl


class Wire(Protocol):
    """A non-blocking way for bytes. `read` and `write` raise BlockingIOError when they would wait; `poll` on `fileno` then."""

    def fileno(self) -> int: ...

    def read(self, view: memoryview) -> int:
        """Bytes read into the view; 0 at the end of file."""
        ...

    def write(self, parts: Sequence[memoryview]) -> int:
        """Bytes of the parts, one after the other, that were taken."""
        ...

    def close(self) -> None: ...


class FdWire:
    """A pipe or socket."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def read(self, view: memoryview) -> int:
        return os.readv(self._fd, [view])

    def write(self, parts: Sequence[memoryview]) -> int:
        return os.writev(self._fd, parts)

    def close(self) -> None:
        os.close(self._fd)


class TlsWire:
    """A TLS connection, non-blocking, for one direction: OpenSSL allows no reader beside a writer."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock

    def fileno(self) -> int:
        return self._sock.fileno()

    def read(self, view: memoryview) -> int:
        import ssl

        try:
            return self._sock.recv_into(view)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return 0

    def write(self, parts: Sequence[memoryview]) -> int:
        import ssl

        try:
            return self._sock.send(parts[0])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def close(self) -> None:
        self._sock.close()
