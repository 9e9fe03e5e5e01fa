"""Uploads: docs/http.md, the server's end."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import logging
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from aiohttp import web

from ckpt.errors import CkptError, DigestMismatch, UsageError
from ckpt.serve import answers, archives
from ckpt.serve.limits import Pace
from ckpt.serve.uploads import Upload

if TYPE_CHECKING:
    from ckpt.serve.app import Service, Who

T = TypeVar("T")
_log = logging.getLogger("ckpt.serve")

BLOCK_BYTES: Final = 1 << 20
APPEND_BYTES: Final = 8 << 20
PREEMPT_S: Final = 10.0
WAIT_S: Final = 240.0
"""How long the last PATCH waits for the import; after that the client asks again."""
MAX_IMPORTS: Final = 2
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_ENDINGS: Final = re.compile(r"(\.tar)?(\.(zst|gz|age))*$")


class Taking:
    """The requests that bring archives."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._imports = asyncio.Semaphore(MAX_IMPORTS)

    async def options(self, request: web.Request) -> web.StreamResponse:
        await self._service.need(request, "upload")
        limits = [f"max-append-size={APPEND_BYTES}"]
        if self._service.rules.max_bytes is not None:
            limits.insert(0, f"max-size={self._service.rules.max_bytes}")
        return web.Response(status=204, headers={"Upload-Limit": ", ".join(limits), "Allow": "OPTIONS, POST, PUT"})

    async def begin(self, request: web.Request) -> web.StreamResponse:
        who = await self._service.need(request, "upload")
        upload = await self._begin(request, who, _number(request, "Upload-Length", None))
        return web.Response(status=201, headers={"Location": f"/uploads/{upload.id}", "Upload-Offset": "0", **_state(upload)})

    async def _begin(self, request: web.Request, who: Who, length_bytes: int | None) -> Upload:
        name = _name(request.match_info.get("name", ""))
        upload = await asyncio.to_thread(self._service.uploads.begin, name, who.id, length_bytes)
        try:
            await self._service.claim(who, f"upload:{upload.id}")
        except BaseException:
            self._service.uploads.forget(upload)
            await asyncio.to_thread(upload.remove)
            raise
        return upload

    async def _found(self, request: web.Request) -> Upload:
        who = await self._service.need(request, "upload")
        upload = self._service.uploads.find(request.match_info["id"], who.id)
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
        self._service.uploads.forget(upload)
        await asyncio.to_thread(upload.remove)
        if not done:
            await self._service.settle(upload.owner, f"upload:{upload.id}", done=False)

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
                ref = await asyncio.to_thread(archives.take_in, upload.data, upload.name, self._service.rules.store, self._service.rules.incoming)
            result: dict[str, Any] = {"ref": ref}
            _log.info("upload %s of %s is %s", upload.id[:8], upload.owner[:20], ref)
        except Exception as error:
            status, code, message, hint = answers.described(error)
            result = {"error": [status, code, message, hint]}
            _log.warning("upload %s of %s was refused: %s", upload.id[:8], upload.owner[:20], message)
        # The checkpoint is there: a token that could not be marked, or an answer not kept, does not change that.
        with suppress(OSError, CkptError):
            await self._service.settle(upload.owner, f"upload:{upload.id}", done="ref" in result)
        with suppress(OSError):
            await asyncio.to_thread(self._service.uploads.finished, upload, result)
        upload.result = result
        upload.finishing = None
        if self._service.rules.once and "ref" in result:
            self._service.stopping.set()
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
        who = await self._service.need(request, "upload")
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
            await asyncio.to_thread(self._service.uploads.room_for, request.content_length, upload)
        pace = Pace(self._service.rules.least_bytes_s, self._service.rules.silence_s)
        pieces: list[bytes] = []
        held = 0

        def flush() -> None:
            self._service.uploads.room_for(held, upload)
            upload.append(pieces)

        try:
            while True:
                piece = await asyncio.wait_for(request.content.readany(), self._service.rules.silence_s)
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
                if self._service.bucket is not None and (wait_s := self._service.bucket.take(len(piece))) > 0:
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
