"""Checkpoints of the store as archives over HTTP."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Final

from aiohttp import web

from ckpt.errors import UsageError
from ckpt.serve import answers, archives

if TYPE_CHECKING:
    from ckpt.serve.app import Service

_log = logging.getLogger("ckpt.serve")
_RANGE: Final = re.compile(r"bytes=(\d{1,18})-(\d{0,18})", re.ASCII)


class Giving:
    """The requests that read."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def list(self, request: web.Request) -> web.StreamResponse:
        await self._service.need(request, "download")
        found = await asyncio.to_thread(archives.listing, self._service.rules.store)
        return web.json_response({"schema": 1, "checkpoints": found})

    async def download(self, request: web.Request) -> web.StreamResponse:
        who = await self._service.need(request, "download")
        compress = request.query.get("compress")
        if compress not in (None, *archives.COMPRESSIONS):
            raise UsageError(f"no compression is called {compress!r}", hint=", ".join(archives.COMPRESSIONS))
        rules = self._service.rules
        archive = await asyncio.to_thread(archives.Archive, rules.store, request.match_info["name"], compress, rules.outgoing)
        try:
            size = await asyncio.to_thread(archive.size_bytes)
            headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes" if size else "none"}
            start, status = 0, 200
            if size is not None and archive.etag is not None:
                headers["ETag"] = archive.etag
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
            # Only the client knows whether the last bytes reached it, so this one may be asked for again.
            await self._service.claim(who, f"download:{archive.checkpoint.manifest.id}")
            left = None if size is None else end - start
            archive.start(start)
            await response.prepare(request)
            while left != 0 and (data := await asyncio.to_thread(archive.read)):
                if left is not None:
                    data = data[:left]
                    left -= len(data)
                await asyncio.wait_for(response.write(data), self._service.rules.silence_s)
                if self._service.bucket is not None:
                    await asyncio.sleep(self._service.bucket.take(len(data)))
            if left or (left is None and archive.error is not None):
                _log.error("cannot read %s: %s", archive.checkpoint.ref, archive.error)
                assert request.transport is not None
                request.transport.close()  # shorter than promised: the client sees that
                return response
            await response.write_eof()
            return response
        finally:
            await asyncio.to_thread(archive.close)



def _range(request: web.Request, etag: str, size: int) -> tuple[int, int]:
    """First byte and the one after the last; ranges that are not understood are ignored, as RFC 9110 wants it."""
    condition = request.headers.get("If-Range")
    found = _RANGE.fullmatch(request.headers.get("Range", "").strip())
    if found is None or (condition is not None and condition != etag):
        return 0, size
    start, end = int(found[1]), min(size, int(found[2]) + 1) if found[2] else size
    return (0, size) if end <= start < size else (start, end)
