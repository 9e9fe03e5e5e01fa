"""A migration through the server: the connection is handed, after the 101, to a `ckpt peer` of its own, bytes as they are.

The child gets one end of a socket pair as its standard input and output. When the connection ends the child reads the end of its link and
undoes what hangs on it, as after a cut ssh; it is left the time for that.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import ckpt
from ckpt.host.run import Process, spawn

if TYPE_CHECKING:
    from ckpt.serve.limits import Bucket

_BODY: Final = "import sys; sys.path.insert(0, sys.argv.pop(1)); from ckpt.cli.main import main; sys.exit(main())"
_HIGH_BYTES: Final = 4 << 20
UNDO_LIMIT_S: Final = 300.0
"""How long a peer may take to undo what it began."""


def start_peer(store: Path, end: socket.socket, *, ask: bool) -> Process:
    """A `ckpt peer` that speaks on `end` (still the caller's to close). Raises CommandFailed."""
    parent = str(Path(ckpt.__file__).resolve().parents[1])
    words = [sys.executable or "/usr/bin/python3", "-I", "-c", _BODY, parent, "peer", "--guest", "--store", str(store), *(["--ask"] if ask else [])]
    env = {key: value for key, value in os.environ.items() if key.startswith("CKPT_")}
    return spawn(words, stdin=end.fileno(), stdout=end.fileno(), stderr=None, env=env, new_session=True)


class _End(asyncio.Protocol):
    """One end of the tunnel: what comes goes to the other one; who takes nothing slows the other one down."""

    def __init__(self, bucket: Bucket | None = None) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _End | None = None
        self.over = asyncio.get_running_loop().create_future()
        self.moved_bytes = 0
        self._bucket = bucket
        self._full = False
        self._late = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=_HIGH_BYTES)

    def data_received(self, data: bytes) -> None:
        self.moved_bytes += len(data)
        if self.other is not None and self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.write(data)
        if self._bucket is not None and (wait_s := self._bucket.take(len(data))) > 0:
            self._late = True
            self._hold()
            asyncio.get_running_loop().call_later(wait_s, self._in_time)

    def _in_time(self) -> None:
        self._late = False
        self._hold()

    def full(self, value: bool) -> None:
        """The other end takes nothing at the moment (or does again)."""
        self._full = value
        self._hold()

    def _hold(self) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        with suppress(RuntimeError):  # it is as it should be already
            if self._full or self._late:
                self.transport.pause_reading()
            else:
                self.transport.resume_reading()

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other.full(True)

    def resume_writing(self) -> None:
        if self.other is not None:
            self.other.full(False)

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.over.done():
            self.over.set_result(None)


class Tunnel:
    """One tunnel. `run` returns when it is over.

    Args:
        inner: who had the connection so far; it hears of its end, too.
    """

    def __init__(self, outside: asyncio.Transport, inner: asyncio.BaseProtocol, *, bucket: Bucket | None = None) -> None:
        self._outside = outside
        self._inner = inner
        self._near = _End(bucket)
        self._far = _End()

    @property
    def received_bytes(self) -> int:
        return self._near.moved_bytes

    async def run(self, store: Path, accept: Callable[[], Awaitable[object]], *, ask: bool = False) -> int:
        """Carry bytes until one end closes; returns the exit status of the peer (0 after a goodbye).

        Args:
            accept: says yes to the client; called when the peer runs.

        Raises:
            CommandFailed: it could not be started; the connection is still the caller's.
        """
        loop = asyncio.get_running_loop()
        mine, theirs = socket.socketpair()
        for one in (mine, theirs):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                one.setsockopt(socket.SOL_SOCKET, option, 1 << 20)
        try:
            process = await asyncio.to_thread(start_peer, store, theirs, ask=ask)
        except BaseException:
            mine.close()
            raise
        finally:
            theirs.close()
        try:
            self._near.other, self._far.other = self._far, self._near
            # The client may speak as soon as it reads the answer, and what it says is not for who had the connection so far.
            self._outside.pause_reading()
            await accept()
            self._near.connection_made(self._outside)
            await loop.create_connection(lambda: self._far, sock=mine)
            self._outside.set_protocol(self._near)
            self._outside.resume_reading()
            await asyncio.wait({self._near.over, self._far.over}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            # What was taken from one end still goes to the other.
            if self._far.transport is not None:
                self._far.transport.close()
            else:
                mine.close()
            self._outside.close()
            await asyncio.shield(self._end(process))
        return process.returncode

    async def _end(self, process: Process) -> None:
        try:
            await asyncio.to_thread(process.wait, UNDO_LIMIT_S)
        except Exception:
            process.kill()
            await asyncio.to_thread(process.wait)
        with suppress(Exception):
            self._inner.connection_lost(None)
