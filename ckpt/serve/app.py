"""The requests that `ckpt serve` answers: docs/http.md, and docs/serve.md for the rest.

Nothing here blocks the event loop: files, digests, imports and archives are the business of threads.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from aiohttp import hdrs, web

from ckpt.errors import CkptError, DigestMismatch, RemoteRefused, UsageError
from ckpt.host.run import CommandFailed
from ckpt.serve import answers, archives
from ckpt.serve.limits import Bucket, Pace, Tries
from ckpt.serve.tokens import MAX_USES, PERMISSIONS, Token, Tokens
from ckpt.serve.tunnel import Tunnel
from ckpt.serve.uploads import Upload, Uploads
from ckpt.transports.https_peer import PROTOCOL
from ckpt.transports.https_pins import fingerprint

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_log = logging.getLogger("ckpt.serve")
_access = logging.getLogger("ckpt.serve.access")

BLOCK_BYTES: Final = 1 << 20
APPEND_BYTES: Final = 8 << 20
PREEMPT_S: Final = 10.0
WAIT_S: Final = 240.0
"""How long the last PATCH waits for the import; after that the client asks again."""
MAX_IMPORTS: Final = 2
MAX_TUNNELS: Final = 8
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_ENDINGS: Final = re.compile(r"(\.tar)?(\.(zst|gz|age))*$")
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
        self._imports = asyncio.Semaphore(MAX_IMPORTS)
        self.tunnels: set[asyncio.Transport] = set()
        """Connections that carry a migration."""

    def app(self) -> web.Application:
        """The application for a server."""
        made = web.Application(middlewares=[self._frame])
        for path in ("/checkpoints/{name}", "/{name}", "/checkpoints", "/"):
            made.router.add_route("OPTIONS", path, self.options)
            made.router.add_route("POST", path, self.begin)
            made.router.add_route("PUT", path, self.put)
        made.router.add_route("OPTIONS", "/uploads/{id}", self.options)
        made.router.add_route("HEAD", "/uploads/{id}", self.head)
        made.router.add_route("PATCH", "/uploads/{id}", self.patch)
        made.router.add_route("DELETE", "/uploads/{id}", self.delete)
        made.router.add_route("GET", "/peer", self.peer)
        for method in ("GET", "HEAD"):
            made.router.add_route(method, "/checkpoints", self.list)
            made.router.add_route(method, "/checkpoints/{name}", self.download)
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

    # -- uploads -------------------------------------------------------------------------------------------------

    async def options(self, request: web.Request) -> web.StreamResponse:
        await self.need(request, "upload")
        limits = [f"max-append-size={APPEND_BYTES}"]
        if self.rules.max_bytes is not None:
            limits.insert(0, f"max-size={self.rules.max_bytes}")
        return web.Response(status=204, headers={"Upload-Limit": ", ".join(limits), "Allow": "OPTIONS, POST, PUT"})

    async def begin(self, request: web.Request) -> web.StreamResponse:
        who = await self.need(request, "upload")
        upload = await self._begin(request, who, _number(request, "Upload-Length", None))
        return web.Response(status=201, headers={"Location": f"/uploads/{upload.id}", "Upload-Offset": "0", **_state(upload)})

    async def _begin(self, request: web.Request, who: Who, length_bytes: int | None) -> Upload:
        name = _name(request.match_info.get("name", ""))
        upload = await asyncio.to_thread(self.uploads.begin, name, who.id, length_bytes)
        try:
            await self.claim(who, f"upload:{upload.id}")
        except BaseException:
            self.uploads.drop(upload)
            raise
        return upload

    async def _found(self, request: web.Request) -> Upload:
        who = await self.need(request, "upload")
        upload = self.uploads.find(request.match_info["id"], who.id)
        if upload is None:
            raise web.HTTPNotFound()
        return upload

    @asynccontextmanager
    async def _taken(self, request: web.Request, upload: Upload) -> AsyncIterator[None]:
        """Be the one that may change it: an earlier request on it ends now, whether it knows or not."""
        upload.turn += 1
        mine = upload.turn
        if upload.connection is not None:
            cast(asyncio.Transport, upload.connection).abort()
        try:
            await asyncio.wait_for(upload.lock.acquire(), PREEMPT_S)
        except TimeoutError:
            raise web.HTTPServiceUnavailable() from None
        try:
            if upload.turn != mine:
                raise ConnectionAbortedError  # a later one came while we waited
            upload.connection = request.transport
            yield
        finally:
            upload.connection = None
            upload.lock.release()

    async def head(self, request: web.Request) -> web.StreamResponse:
        upload = await self._found(request)
        async with self._taken(request, upload):
            if upload.result is None and upload.finishing is None:
                await _whole(upload.open)
            return web.Response(status=204, headers={"Cache-Control": "no-store", **_state(upload)})

    async def delete(self, request: web.Request) -> web.StreamResponse:
        upload = await self._found(request)
        async with self._taken(request, upload):
            if upload.finishing is not None:
                return answers.problem(423, "busy", "it is being taken into the store")
            await self._drop(upload)
            return web.Response(status=204)

    async def _drop(self, upload: Upload) -> None:
        done = upload.result is not None
        await asyncio.to_thread(self.uploads.drop, upload)
        if not done:
            await self.settle(upload.owner, f"upload:{upload.id}", done=False)

    async def patch(self, request: web.Request) -> web.StreamResponse:
        upload = await self._found(request)
        offset = _number(request, "Upload-Offset", None)
        complete = request.headers.get("Upload-Complete", "?0").strip()
        if offset is None or complete not in ("?0", "?1"):
            raise UsageError("a PATCH has an Upload-Offset, and Upload-Complete is ?0 or ?1")
        async with self._taken(request, upload):
            try:
                if upload.result is None and upload.finishing is None:
                    await _whole(upload.open)
                    if offset != upload.offset:
                        return answers.problem(409, "offset", f"{upload.offset} bytes are there", headers=_state(upload))
                    if complete == "?0":
                        await self._receive(request, upload)
                        return web.Response(status=204, headers=_state(upload))
                    digest = _digest(request)
                    if request.content_length or digest is None:
                        raise UsageError("the last PATCH has a Repr-Digest and no content")
                    await self._complete(upload, digest)
                elif complete == "?0":
                    return answers.problem(409, "finished", "this upload is complete")
            except (ConnectionError, TimeoutError, asyncio.CancelledError, UsageError):
                raise  # what has come stays
            except BaseException as error:
                # A full disk gets its room back. What is wrong stays wrong.
                _log.warning("upload %s of %s ended: %s", upload.id[:8], upload.owner[:20], error)
                if upload.finishing is None:
                    await self._drop(upload)
                raise
        return await self._outcome(upload, WAIT_S)

    async def _complete(self, upload: Upload, digest: bytes | None) -> None:
        if upload.length_bytes is not None and upload.offset != upload.length_bytes:
            raise DigestMismatch(f"{upload.offset} bytes came, {upload.length_bytes} were announced")
        if digest is not None and not hmac.compare_digest(digest, upload.digest()):
            raise DigestMismatch("the digest of what came is another one: it was altered on the way")
        upload.finishing = asyncio.create_task(self._import(upload))

    async def _import(self, upload: Upload) -> dict[str, Any]:
        """Runs to its end, whoever waits for it."""
        try:
            async with self._imports:
                ref = await asyncio.to_thread(archives.take_in, upload.data, upload.name, self.rules.store)
            result: dict[str, Any] = {"ref": ref}
            _log.info("upload %s of %s is %s", upload.id[:8], upload.owner[:20], ref)
        except Exception as error:
            status, code, message, hint = answers.described(error)
            result = {"error": [status, code, message, hint]}
            _log.warning("upload %s of %s was refused: %s", upload.id[:8], upload.owner[:20], message)
        # The checkpoint is there: a token that could not be marked, or an answer not kept, does not change that.
        with suppress(OSError, CkptError):
            await self.settle(upload.owner, f"upload:{upload.id}", done="ref" in result)
        with suppress(OSError):
            await asyncio.to_thread(self.uploads.finished, upload, result)
        upload.result = result
        upload.finishing = None
        if self.rules.once and "ref" in result:
            self.stopping.set()
        return result

    async def _outcome(self, upload: Upload, limit_s: float | None) -> web.StreamResponse:
        if upload.finishing is not None:
            await asyncio.wait({upload.finishing}, timeout=limit_s)
        if upload.result is None:
            return answers.problem(423, "busy", "it is being taken into the store", "ask again")
        if "error" in upload.result:
            return answers.problem(*upload.result["error"])
        return answers.result(upload.result, headers=_state(upload))

    async def put(self, request: web.Request) -> web.StreamResponse:
        """All in one request: nothing of it is kept when it breaks."""
        who = await self.need(request, "upload")
        digest = _digest(request)
        upload = await self._begin(request, who, request.content_length)
        async with upload.lock:
            try:
                await self._receive(request, upload)
                await self._complete(upload, digest)
            finally:
                if upload.finishing is None:
                    await self._drop(upload)
        return await self._outcome(upload, None)

    async def _receive(self, request: web.Request, upload: Upload) -> None:
        """The content of a request to the end of the upload; what came before a break is kept."""
        if request.content_length is not None:
            await asyncio.to_thread(self.uploads.room_for, request.content_length, upload)
        pace = Pace(self.rules.least_bytes_s, self.rules.silence_s)
        pieces: list[bytes] = []
        held = 0

        def flush() -> None:
            self.uploads.room_for(held, upload)
            upload.append(pieces)

        try:
            while True:
                piece = await asyncio.wait_for(request.content.readany(), self.rules.silence_s)
                if piece:
                    pieces.append(piece)
                    held += len(piece)
                    upload.touched_s = time.time()
                if pace.too_slow(len(piece)):
                    raise TimeoutError
                if not piece or held >= BLOCK_BYTES:
                    if held:
                        await _whole(flush)
                    pieces, held = [], 0
                if not piece:
                    return
                if self.bucket is not None and (wait_s := self.bucket.take(len(piece))) > 0:
                    pace.paused(wait_s)
                    await asyncio.sleep(wait_s)
        except (OSError, CkptError):
            raise
        except Exception as error:  # aiohttp's word for a body that ended too early differs from version to version
            raise ConnectionResetError from error
        finally:
            if held and pieces:
                with suppress(OSError, CkptError):
                    await _whole(flush)

    # -- reading -------------------------------------------------------------------------------------------------

    async def list(self, request: web.Request) -> web.StreamResponse:
        await self.need(request, "download")
        found = await asyncio.to_thread(archives.listing, self.rules.store)
        return web.json_response({"schema": 1, "checkpoints": found})

    async def download(self, request: web.Request) -> web.StreamResponse:
        who = await self.need(request, "download")
        compress = request.query.get("compress", "none")
        if compress not in archives.COMPRESSIONS:
            raise UsageError(f"no compression is called {compress!r}", hint=", ".join(archives.COMPRESSIONS))
        archive = await asyncio.to_thread(archives.Archive, self.rules.store, request.match_info["name"], compress)
        try:
            size = await asyncio.to_thread(archive.size_bytes)
            headers = {"ETag": archive.etag, "Content-Type": "application/x-tar", "Accept-Ranges": "bytes" if size else "none"}
            start, status = 0, 200
            if size is not None:
                start, end = _range(request, archive.etag, size)
                if start >= size:
                    return answers.problem(416, "range", "there is nothing from there on", headers={"Content-Range": f"bytes */{size}"})
                if start or end != size:
                    status = 206
                    headers["Content-Range"] = f"bytes {start}-{end - 1}/{size}"
                headers["Content-Length"] = str(end - start)
            response = web.StreamResponse(status=status, headers=headers)
            if request.method == "HEAD":
                return response
            use = await self._claim_download(who, archive.checkpoint.manifest.id)
            left = None if size is None else end - start
            archive.start(start)
            await response.prepare(request)
            while left != 0 and (data := await asyncio.to_thread(archive.read)):
                if left is not None:
                    data = data[:left]
                    left -= len(data)
                await asyncio.wait_for(response.write(data), self.rules.silence_s)
                if self.bucket is not None:
                    await asyncio.sleep(self.bucket.take(len(data)))
            if left or (left is None and archive.error is not None):
                _log.error("cannot read %s: %s", archive.checkpoint.ref, archive.error)
                assert request.transport is not None
                request.transport.close()  # shorter than promised: the client sees that
                return response
            await response.write_eof()
            if size is None or start + (end - start) == size:
                await self.settle(who.id, use, done=True)
            return response
        finally:
            await asyncio.to_thread(archive.close)

    async def _claim_download(self, who: Who, identity: str) -> str:
        """The use for a download: one that was begun and not finished goes on."""
        for number in range(1, MAX_USES + 1):
            use = f"download:{identity}:{number}"
            state = "open" if who.token is None else await asyncio.to_thread(self.tokens.claim, who.token.id, use)
            if state == "open":
                return use
            if not state:
                break
        raise RemoteRefused("this token is used up", hint="a new one: ckpt serve token new")

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
        self.tunnels.add(cast(asyncio.Transport, transport))
        code = None
        try:
            if not ask:
                await self.claim(who, use)
            response = web.StreamResponse(status=101, headers={"Upgrade": PROTOCOL, "Connection": "Upgrade"})
            tunnel = Tunnel(cast(asyncio.Transport, transport), request.protocol, bucket=self.bucket)
            _log.info("%s came for a migration (%s)", who.id[:20], request.remote)
            code = await tunnel.run(self.rules.store, lambda: response.prepare(request), ask=ask)
            _log.info("%s left after %d bytes, its peer ended with %s", who.id[:20], tunnel.received_bytes, code)
            return response
        except CommandFailed as error:
            raise CkptError("ckpt peer could not be started") from error
        finally:
            self.tunnels.discard(cast(asyncio.Transport, transport))
            if code == 0 and not ask:
                # After the source's goodbye; a cut link may come again.
                await self.settle(who.id, use, done=True)
                if self.rules.once:
                    self.stopping.set()


async def _whole(function: Callable[[], T]) -> T:
    """Run in a thread, to its end also when the request is cancelled: nothing is written behind anybody's back."""
    task = asyncio.ensure_future(asyncio.to_thread(function))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _state(upload: Upload) -> dict[str, str]:
    done = upload.result is not None and "ref" in upload.result
    return {"Upload-Offset": str(upload.offset), "Upload-Complete": "?1" if done else "?0"}


def _number(request: web.Request, header: str, default: int | None) -> int | None:
    text = request.headers.get(header)
    if text is None:
        return default
    if not re.fullmatch(r"\d{1,18}", text.strip(), re.ASCII):
        raise UsageError(f"{header} is a number of bytes")
    return int(text)


def _name(text: str) -> str | None:
    """The name that a path asks for: data, never a path. None for none."""
    name = _ENDINGS.sub("", text)
    if not name and not text:
        return None
    if not _NAME.fullmatch(name) or text in ("uploads", "peer", "checkpoints"):
        raise UsageError("not a name for a checkpoint: letters, digits, _ . and -")
    return name


def _digest(request: web.Request) -> bytes | None:
    text = request.headers.get("Repr-Digest")
    if text is None:
        return None
    found = re.search(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]{44}):", text)
    try:
        return base64.b64decode(found[1], validate=True) if found else None
    except binascii.Error:
        raise UsageError("Repr-Digest is sha-256=:BASE64:") from None


def _range(request: web.Request, etag: str, size: int) -> tuple[int, int]:
    """First byte and the one after the last; ranges that are not understood are ignored, as RFC 9110 wants it."""
    condition = request.headers.get("If-Range")
    found = re.fullmatch(r"bytes=(\d{1,18})-(\d{0,18})", request.headers.get("Range", "").strip(), re.ASCII)
    if found is None or (condition is not None and condition != etag):
        return 0, size
    start, end = int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
    return (0, size) if end <= start < size else (start, end)
