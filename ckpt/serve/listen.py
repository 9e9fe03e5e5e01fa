"""The listener: sockets, connections that bring nothing, signals, the end."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from aiohttp import web

from ckpt.errors import BusyError, CkptError, UsageError
from ckpt.host import systemd
from ckpt.serve.app import Rules, Service
from ckpt.serve.certificate import Serving
from ckpt.serve.uploads import Uploads
from ckpt.transports.https_peer import DEFAULT_PORT

HANDSHAKE_S: Final = 10.0
STOP_S: Final = 30.0
"""How long what is under way may take after a SIGTERM. An upload can be gone on with afterwards."""
CUT_S: Final = 1.0
SWEEP_S: Final = 60.0
BACKLOG: Final = 128
_log = logging.getLogger("ckpt.serve")


def parse_address(text: str) -> tuple[str | None, int]:
    """`[ADDRESS]:PORT`, `ADDRESS` or `:PORT` as (address or None for all, port). Raises UsageError."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(DEFAULT_PORT)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not (port.isascii() and port.isdigit() and int(port) < 65536):
        raise UsageError(f"not an address to listen on: {text!r}", hint=f"write it as :{DEFAULT_PORT}, 10.0.0.2:{DEFAULT_PORT} or [::1]")
    return host or None, int(port)


class _Refused(asyncio.Protocol):
    """A connection too many."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def serve(
    address: str, rules: Rules, serving: Serving, *, quota_bytes: int | None = None, ready: Callable[[list[str]], None] = lambda addresses: None
) -> None:
    """Serve until SIGTERM or SIGINT (or, with `rules.once`, until one upload or migration is done).

    Args:
        ready: called with the addresses when it listens.

    Raises:
        UsageError, BusyError: it cannot listen there; another server has the store.
    """
    host, port = parse_address(address)
    with Uploads(rules.store, max_bytes=rules.max_bytes, quota_bytes=quota_bytes) as uploads:
        asyncio.run(_serve(host, port, Service(rules, uploads), serving, ready))


async def _serve(host: str | None, port: int, service: Service, serving: Serving, ready: Callable[[list[str]], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with suppress(ValueError, RuntimeError):  # not in the main thread: a test
            loop.add_signal_handler(number, service.stopping.set)
    runner = web.AppRunner(service.app(), access_log=None, handle_signals=False, lingering_time=2.0, keepalive_timeout=service.rules.head_s)
    await runner.setup()
    assert runner.server is not None
    door = _Door(runner.server, service)
    try:
        server = await loop.create_server(
            door, host, port, ssl=serving.context, backlog=BACKLOG, ssl_handshake_timeout=HANDSHAKE_S, reuse_address=True
        )
    except OSError as error:
        await runner.cleanup()
        raise BusyError(f"cannot listen on {host or ''}:{port}: {error.strerror or error}", hint="--listen names another address") from error
    background = [asyncio.create_task(door.watch()), asyncio.create_task(_sweep(service))]
    try:
        ready([_shown(sock) for sock in server.sockets])
        systemd.notify(ready=True)
        await service.stopping.wait()
        systemd.notify(stopping=True)
        server.close()
        end_s = time.monotonic() + STOP_S
        while time.monotonic() < end_s and (service.busy or any(one.finishing for one in service.uploads.under_way())):
            await asyncio.sleep(0.05)
    finally:
        server.close()
        for task in background:
            task.cancel()
        # What is still under way is cut: an upload can go on later, a peer undoes what it began.
        await runner.server.shutdown(CUT_S)
        await runner.cleanup()


class _Door:
    """Makes the protocol of every connection, and ends those that bring no request: aiohttp would wait for ever."""

    def __init__(self, server: web.Server, service: Service) -> None:
        self._server = server
        self._service = service
        self._idle: dict[int, float] = {}

    def __call__(self) -> asyncio.BaseProtocol:
        if len(self._server.connections) >= self._service.rules.max_connections:
            return _Refused()
        return self._server()

    async def watch(self) -> None:
        """Runs all the time."""
        while True:
            await asyncio.sleep(min(1.0, self._service.rules.head_s / 4))
            now = time.monotonic()
            seen: dict[int, float] = {}
            for protocol in list(self._server.connections):
                key = id(protocol)
                if key in self._service.busy:
                    continue
                seen[key] = self._idle.get(key, now)
                if now - seen[key] > self._service.rules.head_s and protocol.transport is not None:
                    protocol.transport.abort()
            self._idle = seen


async def _sweep(service: Service) -> None:
    while True:
        try:
            for upload in service.uploads.stale():
                await asyncio.to_thread(upload.remove)
                _log.info("upload %s was given up", upload.id[:8])
                await service.settle(upload.owner, f"upload:{upload.id}", done=upload.result is not None)
        except (OSError, CkptError) as error:
            _log.warning("sweeping failed: %s", error)
        await asyncio.sleep(SWEEP_S)


def _shown(sock: Any) -> str:
    name = sock.getsockname()
    return f"[{name[0]}]:{name[1]}" if sock.family == socket.AF_INET6 else f"{name[0]}:{name[1]}"
