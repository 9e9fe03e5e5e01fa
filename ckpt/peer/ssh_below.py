"""The ssh processes below a peer: the one of the link, and further ones that carry content only."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ckpt.errors import CkptError, TransferFailed
from ckpt.host.run import DEVNULL, Process
from ckpt.peer import streams
from ckpt.peer.frames import prepare
from ckpt.peer.wires import FdWire
from ckpt.transports import ssh

if TYPE_CHECKING:
    from ckpt.peer.client import Peer

_STDERR_BYTES: Final = 64 << 10
_LOGIN_LIMIT_S: Final = 120.0


class SshBelow:
    """The ssh process below a peer: its messages are kept for errors."""

    def __init__(self, destination: str, process: Process) -> None:
        self.destination = destination
        self.process = process
        self._tail = bytearray()
        self._thread = threading.Thread(target=self._drain, name="ckpt-ssh-stderr", daemon=True)
        self._thread.start()

    def _drain(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            while data := os.read(stderr.fileno(), 4096):
                self._tail += data
                del self._tail[:-_STDERR_BYTES]

    def stderr(self) -> str:
        self._thread.join(0.5)
        return self._tail.decode(errors="replace")

    def returncode(self, timeout_s: float = 2.0) -> int | None:
        deadline_s = time.monotonic() + timeout_s
        while (code := self.process.poll()) is None and time.monotonic() < deadline_s:
            time.sleep(0.02)
        return code

    def explain(self, cause: CkptError) -> CkptError:
        """What broke the link, with ssh's own last words."""
        code = self.returncode(1.0)
        lines = [line.strip() for line in self.stderr().splitlines() if line.strip()]
        said = f" (ssh: {lines[-1]})" if lines and code is not None else ""
        return TransferFailed(f"lost the link to {self.destination}: {cause.message}{said}")

    def end(self, patience_s: float) -> None:
        """See it gone: by itself, else terminated, else killed."""
        if self.returncode(patience_s) is None:
            self.process.terminate()
            if self.returncode(1.0) is None:
                self.process.kill()
            self.process.wait()
        self._thread.join(1.0)


def join(peer: Peer, destination: ssh.Destination, count: int, command: Sequence[str], options: Sequence[str], further: list[SshBelow]) -> None:
    """Open `count` further ssh connections and let uploads take them. Each is a process, and a cipher, of its own, and logs in by itself:
    with a key nobody is asked; somebody at a terminal who logs in by password is asked for each, one after the other.

    Args:
        command: what runs `ckpt peer` there.
        further: gets the processes, also of those that failed.

    Raises:
        CannotConnect: one did not come.
    """
    path = str(peer.call("streams", {"streams": count}).get("socket"))
    asking = ssh.interactive()
    wires = []
    try:
        for number in range(1, count + 1):
            process = ssh.open(destination, (*command, "--join", path), options, stdout=DEVNULL)
            assert process.stdin is not None
            further.append(SshBelow(str(destination), process))
            fd = os.dup(process.stdin.fileno())
            process.stdin.close()
            wires.append(FdWire(fd))
            prepare(fd)
            if asking or number == count:
                streams.await_joined(peer, number, _LOGIN_LIMIT_S, lambda: all(one.process.poll() is None for one in further))
    except CkptError:
        for wire in wires:
            wire.close()
        for one in further:
            if one.process.poll() not in (None, 0):
                raise ssh.explain(destination, one.returncode(), one.stderr(), command=command[0]) from None
        raise
    peer.link.send_over(wires)
