"""The requests that `ckpt serve` answers: docs/http.md, and docs/serve.md for the rest.

Nothing here blocks the event loop: files, digests, imports and archives are the business of threads.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from aiohttp import hdrs, web

from ckpt.archive import trust
from ckpt.errors import CkptError, RemoteRefused, UsageError
from ckpt.host.run import CommandFailed
from ckpt.serve import answers
from ckpt.serve.giving import Giving
from ckpt.serve.limits import Bucket, Tries
from ckpt.serve.taking import Taking
from ckpt.serve.tokens import PERMISSIONS, Token, Tokens
from ckpt.serve.tunnel import Tunnel
from ckpt.serve.uploads import Uploads
from ckpt.transports.https_peer import PROTOCOL
from ckpt.transports.https_pins import fingerprint

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_log = logging.getLogger("ckpt.serve")
_access = logging.getLogger("ckpt.serve.access")

MAX_TUNNELS: Final = 8
_SESSION: Final = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Rules:
    """What this server does, and for whom."""

    store: Path
    allow: frozenset[str] = frozenset(PERMISSIONS)
    max_bytes: int | None = None
    rate_bytes_s: int | None = None
    client_fingerprints: frozenset[str] = frozenset()
    """Of the clients whose certificates the authorities vouch for, only these; empty: all."""
    silence_s: float = 30.0
    """How long a client may send (or take) nothing."""
    least_bytes_s: float = 512.0
    head_s: float = 15.0
    """How long a connection may be without a whole request."""
    max_connections: int = 256
    once: bool = False
    incoming: trust.Incoming = trust.ANYBODY
    outgoing: trust.Outgoing = trust.OPEN


@dataclass(frozen=True, slots=True)
class Who:
    """Somebody who may do something."""

    id: str
    allow: frozenset[str]
    token: Token | None = None


class Service:
    """The handlers and what they share."""

    def __init__(self, rules: Rules, uploads: Uploads) -> None:
        self.rules = rules
        self.uploads = uploads
        self.tokens = Tokens(rules.store)
        self.tries = Tries()
        self.bucket = Bucket(rules.rate_bytes_s) if rules.rate_bytes_s else None
        self.busy: dict[int, int] = {}
        """id of a connection's protocol -> requests within it."""
        self.stopping = asyncio.Event()
        self.tunnels: set[asyncio.Transport] = set()
        """Connections that carry a migration."""

    def app(self) -> web.Application:
        """The application for a server."""
        made = web.Application(middlewares=[self._frame])
        taking, giving = Taking(self), Giving(self)
        for path in ("/checkpoints/{name}", "/{name}", "/checkpoints", "/"):
            made.router.add_route("OPTIONS", path, taking.options)
            made.router.add_route("POST", path, taking.begin)
            made.router.add_route("PUT", path, taking.put)
        made.router.add_route("OPTIONS", "/uploads/{id}", taking.options)
        made.router.add_route("HEAD", "/uploads/{id}", taking.head)
        made.router.add_route("PATCH", "/uploads/{id}", taking.patch)
        made.router.add_route("DELETE", "/uploads/{id}", taking.delete)
        made.router.add_route("GET", "/peer", self.peer)
        for method in ("GET", "HEAD"):
            made.router.add_route(method, "/checkpoints", giving.list)
            made.router.add_route(method, "/checkpoints/{name}", giving.download)
        return made

    # -- every request -------------------------------------------------------------------------------------------

    @property
    def _frame(self) -> Any:
        @web.middleware
        async def frame(request: web.Request, handler: Handler) -> web.StreamResponse:
            began, key = time.monotonic(), id(request.protocol)
            self.busy[key] = self.busy.get(key, 0) + 1
            status = 0
            try:
                try:
                    response = await handler(request)
                except web.HTTPException as error:
                    response = answers.of_http(error)
                except TimeoutError:
                    response = answers.problem(408, "too-slow", "nothing came in time")
                    response.force_close()
                except Exception as error:
                    gone = isinstance(error, ConnectionError) or request.transport is None or request.transport.is_closing()
                    response = answers.problem(400, "broken", "the request was cut") if gone else answers.of_error(error)
                if response.prepared:
                    pass
                elif response.status >= 400 and not request.content.at_eof():
                    response.force_close()
                if request.method == "OPTIONS":
                    response.headers["Ckpt-Upload"] = "1"  # also with a refusal: nothing less is to be tried
                status = response.status
                return response
            finally:
                self.busy[key] -= 1
                if not self.busy[key]:
                    del self.busy[key]
                # The path is the client's own text, the query might hold anything: neither breaks the line, the query is left out.
                _access.info("%s %s %r %s %.3f s", request.remote, request.method, request.path[:200], status or "-", time.monotonic() - began)

        return frame

    async def who(self, request: web.Request) -> Who:
        """Who asks. Raises HTTPException: 401, 429."""
        address = request.remote or ""
        wait_s = self.tries.wait_s(address)
        if wait_s > 0:
            raise web.HTTPTooManyRequests(headers={"Retry-After": str(int(wait_s) + 1)})
        given = request.headers.get(hdrs.AUTHORIZATION)
        if given is not None:
            scheme, _, text = given.partition(" ")
            token = await asyncio.to_thread(self.tokens.verify, text.strip()) if scheme.lower() == "bearer" else None
            if token is None:
                self.tries.failed(address)
                _log.warning("%s showed a wrong or expired token", address)
                raise web.HTTPUnauthorized()
            return Who(f"token:{token.id}", frozenset(token.allow) & self.rules.allow, token)
        ssl_object = request.transport.get_extra_info("ssl_object") if request.transport is not None else None
        certificate = ssl_object.getpeercert(binary_form=True) if ssl_object is not None else None
        if certificate:
            shown = fingerprint(certificate)
            if self.rules.client_fingerprints and shown not in self.rules.client_fingerprints:
                self.tries.failed(address)
                raise web.HTTPUnauthorized()
            return Who(f"certificate:{shown}", self.rules.allow)
        raise web.HTTPUnauthorized()

    async def need(self, request: web.Request, permission: str) -> Who:
        """Who asks, if that is permitted. Raises HTTPException (401, 429), RemoteRefused."""
        who = await self.who(request)
        if self.stopping.is_set():
            raise web.HTTPServiceUnavailable()
        if permission not in who.allow:
            what = "this server" if permission not in self.rules.allow else "this token"
            raise RemoteRefused(f"{what} does not allow {permission}")
        return who

    async def claim(self, who: Who, use: str) -> None:
        """Count a use of a token. Raises RemoteRefused when it is used up."""
        if who.token is not None and await asyncio.to_thread(self.tokens.claim, who.token.id, use) != "open":
            raise RemoteRefused("this token is used up", hint="a new one: ckpt serve token new")

    async def settle(self, owner: str, use: str, *, done: bool) -> None:
        """The use is over: made, or come to nothing."""
        kind, _, identity = owner.partition(":")
        if kind == "token":
            await asyncio.to_thread(self.tokens.finish if done else self.tokens.release, identity, use)

    # -- migrations ----------------------------------------------------------------------------------------------

    async def peer(self, request: web.Request) -> web.StreamResponse:
        who = await self.need(request, "migrate")
        if request.headers.get(hdrs.UPGRADE, "").lower() != PROTOCOL:
            raise web.HTTPUpgradeRequired() if hasattr(web, "HTTPUpgradeRequired") else UsageError(f"Upgrade: {PROTOCOL} is wanted")
        session = request.headers.get("Ckpt-Session", "")
        ask = request.headers.get("Ckpt-Purpose") == "check"
        if not _SESSION.fullmatch(session):
            raise UsageError("a Ckpt-Session is 32 hexadecimal digits")
        use = f"migrate:{session}"
        transport = request.transport
        if len(self.tunnels) >= MAX_TUNNELS or transport is None:
            raise web.HTTPServiceUnavailable()
        self.tunnels.add(transport)
        code = None
        try:
            if not ask:
                await self.claim(who, use)
            response = web.StreamResponse(status=101, headers={"Upgrade": PROTOCOL, "Connection": "Upgrade"})
            tunnel = Tunnel(transport, request.protocol, bucket=self.bucket)
            _log.info("%s came for a migration (%s)", who.id[:20], request.remote)
            code = await tunnel.run(self.rules.store, lambda: response.prepare(request), ask=ask)
            _log.info("%s left after %d bytes, its peer ended with %s", who.id[:20], tunnel.received_bytes, code)
            return response
        except CommandFailed as error:
            raise CkptError("ckpt peer could not be started") from error
        finally:
            self.tunnels.discard(transport)
            if code == 0 and not ask:
                # After the source's goodbye; a cut link may come again.
                await self.settle(who.id, use, done=True)
                if self.rules.once:
                    self.stopping.set()
