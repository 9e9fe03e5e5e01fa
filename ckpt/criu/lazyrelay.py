"""Between a lazy restore and CRIU's lazy-pages daemon: keeps the daemon from bringing memory that nobody asks for.

A restore connects to `lazy-pages.socket` and hands over, for each task, its pid and its userfaultfd (a zombie's pid is negative, and nothing
follows); at its end it sends one word more (LAZY_PAGES_RESTORE_FINISHED in criu/uffd.c). Until that word has come the daemon only answers
page faults, sleeping in between; from then on it copies what is left, and ends. So the restore gets this relay's socket, all it says goes on
to the daemon, but that word is kept back until `fill`.

The socket to the daemon is made before it, and it inherits that: should this process die, the connection lives on with the daemon, which
goes on answering faults. (At the end of the connection without the word it would fail, and a daemon that fails leaves zeros behind.)
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Final

SOCKET: Final = "lazy-pages.socket"
_WORD: Final = struct.Struct("=i")
_FINISHED: Final = 0x52535446
"""No pid is so large (PID_MAX_LIMIT is 4194304)."""
CONNECT_LIMIT_S: Final = 10.0


class Relay:
    """One restore's way to its daemon.

    Args:
        work: the work directory of the restore. The daemon's own is `daemon_dir` beside it.

    Raises:
        OSError: no socket to be had.
    """

    def __init__(self, work: Path) -> None:
        self.daemon_dir = work.with_name("pages")
        self.daemon_dir.mkdir(mode=0o700, exist_ok=True)
        self.upstream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._lock = threading.Lock()
        self._said = self._filling = self._told = False
        """The restore has sent its last word; it may go on; it has."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with _short(work) as path:
            self._listener.bind(path)
        self._listener.listen(1)

    def start(self) -> None:
        """Go between them from now on, in a thread; the daemon listens. Raises OSError."""
        self.upstream.settimeout(CONNECT_LIMIT_S)
        with _short(self.daemon_dir) as path:
            self.upstream.connect(path)
        threading.Thread(target=self._run, name="ckpt-lazy-relay", daemon=True).start()

    def fill(self) -> None:
        """Let the daemon bring all that is left, and end. Idempotent."""
        with self._lock:
            self._filling = True
            self._tell()

    def close(self) -> None:
        """Give up what is ours of the connection; the daemon's end lives with it."""
        for one in (self._listener, self.upstream):
            with suppress(OSError):
                one.close()

    def _run(self) -> None:
        try:
            client, _ = self._listener.accept()
            self._listener.close()
            with client:
                while word := _exactly(client, _WORD.size):
                    (number,) = _WORD.unpack(word)
                    if number == _FINISHED:
                        with self._lock:
                            self._said = True
                            self._tell()
                        continue
                    self.upstream.sendall(word)
                    if number >= 0:
                        self._pass_on(client)
        except OSError:
            pass  # it is told by what follows: a restore that fails, or a daemon that does
        if not self._said:
            with suppress(OSError):  # the restore broke off: the daemon hears that, which has a copy of this end
                self.upstream.shutdown(socket.SHUT_RDWR)

    def _pass_on(self, client: socket.socket) -> None:
        """A message with a descriptor, in one piece: of one that is cut the kernel would drop the descriptor."""
        data, fds, _, _ = socket.recv_fds(client, 4096, 8, socket.MSG_CMSG_CLOEXEC)
        try:
            if not data or not fds:
                raise OSError("no descriptor came")
            socket.send_fds(self.upstream, [data], fds)
        finally:
            for fd in fds:
                os.close(fd)

    def _tell(self) -> None:
        if self._said and self._filling and not self._told:
            self._told = True
            with suppress(OSError):  # it has ended
                self.upstream.sendall(_WORD.pack(_FINISHED))


class _short:
    """The path of the socket in a directory, short enough for sockaddr_un however deep the directory is."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def __enter__(self) -> str:
        self._fd = os.open(self._directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        return f"/proc/self/fd/{self._fd}/{SOCKET}"

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _exactly(client: socket.socket, count: int) -> bytes:
    """So many bytes; b"" at the end. One at a time would do: what follows a pid has a descriptor with it, which must not be read along."""
    data = b""
    while len(data) < count:
        part = client.recv(count - len(data))
        if not part:
            return b""
        data += part
    return data
