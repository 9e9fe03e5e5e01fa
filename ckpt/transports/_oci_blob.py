"""Blobs to a registry and back, as streams.

Up: a blob goes in chunks while it is still being made, its digest computed on the way. The chunk that is under way is kept until the
registry has said how much of it is there, so a stream that cannot be read again survives every break, and at most one chunk goes twice.
Down: goes on at the byte where it broke; the last byte is handed out only after size and digest were right.

Source: OCI distribution-spec 1.1, "Pushing a blob in chunks", "Pulling blobs".
"""

from __future__ import annotations

import hashlib
import queue
import re
import threading
import time
from contextlib import suppress
from typing import Any, Final

import requests

from ckpt.errors import CkptError, DigestMismatch, RemoteRefused, TargetNotFound, TransferFailed
from ckpt.transports._oci_http import Answer, Client, speaking
from ckpt.transports._patience import Broken

_RANGE: Final = re.compile(r"\s*(?:bytes[= ])?0-([0-9]{1,18})\s*\Z")
_CONTENT_RANGE: Final = re.compile(r"\s*bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)\s*\Z")
_SMALL_PIECE: Final = 1 << 20
"""What is tried when a chunk is too large for somebody on the way (413)."""
_MAX_CHUNK: Final = 256 << 20
_FINISH_S: Final = 600.0
"""How long a registry may take to move a finished blob to its place."""
_TIDY_S: Final = 10.0
_READ_BYTES: Final = 1 << 20
_LEAST_BYTES_S: Final = 1024
"""Less than this over the idle limit is a dead link, or somebody who means ill."""


class Upload:
    """A blob on its way up. Memory: three chunks."""

    def __init__(self, client: Client, chunk_bytes: int) -> None:
        """Begin: the registry is asked for a place to write to. Raises RemoteRefused, CannotConnect, TransferFailed."""
        self._client = client
        self._location = ""
        self._sent = 0
        self._piece_bytes = _MAX_CHUNK
        self._digest = hashlib.sha256()
        self._size = 0
        self._error: BaseException | None = None
        self._queue: queue.Queue[bytearray | None] = queue.Queue(maxsize=1)
        least = self._begin()
        if least > _MAX_CHUNK:
            raise RemoteRefused(f"{client.reference.registry} wants chunks of {least} bytes")
        self._chunk_bytes = max(chunk_bytes, least, 1)
        self._chunk = bytearray()
        self._thread = threading.Thread(target=self._carry, name="ckpt-registry", daemon=True)
        self._thread.start()

    @property
    def size_bytes(self) -> int:
        """What was written so far."""
        return self._size

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take all of `data`. Raises what went wrong with what was written before."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self._size += len(view)
        done = 0
        while done < len(view):
            piece = view[done : done + self._chunk_bytes - len(self._chunk)]
            self._chunk += piece
            done += len(piece)
            if len(self._chunk) == self._chunk_bytes:
                self._pass_on(self._chunk)
                self._chunk = bytearray()
        return len(view)

    def finish(self) -> tuple[str, int]:
        """All was written: the registry takes it as a blob. Its digest and size in bytes."""
        if self._chunk:
            self._pass_on(self._chunk)
            self._chunk = bytearray()
        self._pass_on(None)
        self._thread.join()
        if self._error is not None:
            raise self._error
        digest = f"sha256:{self._digest.hexdigest()}"
        self._close(digest)
        self._location = ""
        return digest, self._size

    def abort(self) -> None:
        """Forget it. Whatever the registry says to that is of no interest."""
        self._client.stop.set()
        with suppress(queue.Empty):
            self._queue.get_nowait()
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(self._client.options.idle_timeout_s + _TIDY_S)
        if self._location and not self._thread.is_alive():
            with suppress(CkptError, Broken):
                self._client.call("DELETE", self._location, idle_s=_TIDY_S)

    # -- the thread ----------------------------------------------------------------------------------------------------------------

    def _pass_on(self, chunk: bytearray | None) -> None:
        while self._error is None:
            with suppress(queue.Full):
                self._queue.put(chunk, timeout=0.2)
                return
        raise self._error

    def _carry(self) -> None:
        try:
            while (chunk := self._queue.get()) is not None and not self._client.stop.is_set():
                self._send(memoryview(chunk))
        except BaseException as error:  # raised again by write() or finish(), in the thread that asked
            self._error = error

    def _begin(self) -> int:
        """A new place to write to. Returns the least size of a chunk."""
        client = self._client
        answer = client.patient("POST", client.url("blobs/uploads/"), body=b"")
        if answer.status != 202:
            raise client.refusal(answer, "the upload cannot begin")
        self._move(answer)
        self._sent = 0
        least = answer.headers.get("OCI-Chunk-Min-Length", "")
        return int(least) if least.isascii() and least.isdigit() and len(least) < 15 else 0

    def _move(self, answer: Answer) -> None:
        if location := answer.headers.get("Location", ""):
            self._location = self._client.follow(location, answer.url)
        elif not self._location:
            raise RemoteRefused(f"{self._client.reference.registry} names no place to write to")

    def _send(self, chunk: memoryview) -> None:
        start, end = self._sent, self._sent + len(chunk)
        retry, breaks, sure = self._client.retry(), 0, True
        while self._sent < end:
            before = self._sent
            try:
                if sure:
                    self._patch(chunk[before - start :][: self._piece_bytes])
                else:
                    self._ask(start, end)
                    sure = True
            except Broken as broken:
                # Some who find a chunk too large just hang up.
                breaks += 1
                if breaks >= 3 and broken.connected:
                    self._piece_bytes = min(self._piece_bytes, _SMALL_PIECE)
                sure = False
                retry.wait(broken)
                continue
            if self._sent > before:
                retry.progressed()
                breaks = 0

    def _patch(self, piece: memoryview) -> None:
        client, first = self._client, self._sent
        headers = {"Content-Type": "application/octet-stream", "Content-Range": f"{first}-{first + len(piece) - 1}"}
        answer = client.call("PATCH", self._location, headers=headers, body=piece)
        if answer.status in (201, 202, 204):
            self._move(answer)
            has = _bytes_there(answer)
            if has is None or has == 0:
                has = first + len(piece)
            if not first <= has <= first + len(piece):
                raise RemoteRefused(f"{client.reference.registry} says it has {has} bytes after {first + len(piece)} were sent")
            if has == first:
                raise Broken("it takes nothing")
            self._sent = has
            return
        if answer.status == 413:
            if self._piece_bytes <= _SMALL_PIECE or len(piece) <= _SMALL_PIECE:
                raise RemoteRefused(f"{client.reference.registry}, or a proxy before it, takes no chunks of {len(piece)} bytes (HTTP status 413)",
                                    hint="raise its limit for the body of a request")  # fmt: skip
            self._piece_bytes = _SMALL_PIECE
            raise Broken("the chunk is too large", after_s=0.0)
        if answer.status in (404, 416):
            raise Broken(f"HTTP status {answer.status}", after_s=0.0)
        raise client.refusal(answer, "the upload was refused")

    def _ask(self, start: int, end: int) -> None:
        """After a break: how much does the registry have?"""
        client = self._client
        answer = client.call("GET", self._location)
        if answer.status == 404:
            if start:
                raise TransferFailed(f"{client.reference.registry} has forgotten the upload after {start} bytes", hint="try again")
            self._begin()
            return
        if answer.status not in (200, 202, 204):
            raise client.refusal(answer, "the upload cannot go on")
        self._move(answer)
        has = _bytes_there(answer)
        if not has:
            # "0-0" is what some say for no byte at all, and right for one.
            if start:
                raise TransferFailed(f"{client.reference.registry} has lost {start} bytes of the upload", hint="try again")
            with suppress(CkptError, Broken):
                client.call("DELETE", self._location, idle_s=_TIDY_S)
            self._begin()
            return
        if not start <= has <= end:
            raise TransferFailed(f"{client.reference.registry} has {has} bytes of the upload, between {start} and {end} are right", hint="try again")
        self._sent = has

    def _close(self, digest: str) -> None:
        client, retry = self._client, self._client.retry()
        what = f"the upload to {client.reference.registry} cannot be finished"
        broke = False
        while True:
            try:
                if broke and stat(client, digest) == self._size:
                    return
                separator = "&" if "?" in self._location else "?"
                headers = {"Content-Type": "application/octet-stream"}
                url = f"{self._location}{separator}digest={digest}"
                answer = client.call("PUT", url, headers=headers, body=b"", idle_s=max(_FINISH_S, client.options.idle_timeout_s))
            except Broken as broken:
                broke = True
                retry.wait(broken)
                continue
            if answer.status in (201, 204):
                if (said := answer.headers.get("Docker-Content-Digest")) and said.startswith("sha256:") and said != digest:
                    raise DigestMismatch(f"{client.reference.registry} stored something else than what was sent: it says {said[:80]!r}")
                return
            if "DIGEST_INVALID" in answer.said():
                raise DigestMismatch(f"{client.reference.registry} got something else than what was sent: {answer.said()}")
            if broke and answer.status in (404, 416) and stat(client, digest) == self._size:
                return
            raise client.refusal(answer, what)


def _bytes_there(answer: Answer) -> int | None:
    """What `Range: 0-N` says; 0 for "0-0" (see there), None when it says nothing."""
    match = _RANGE.match(answer.headers.get("Range", ""))
    if not match:
        return None
    return int(match[1]) + 1 if int(match[1]) else 0


def stat(client: Client, digest: str) -> int | None:
    """The size of a blob that is there, None when it is not."""
    answer = client.patient("HEAD", client.url(f"blobs/{digest}"))
    length = answer.headers.get("Content-Length", "")
    return int(length) if answer.status == 200 and length.isdigit() else None


def put_small(client: Client, data: bytes) -> str:
    """A small blob in one piece; its digest."""
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    if stat(client, digest) == len(data):
        return digest
    upload = Upload(client, max(len(data), 1))
    try:
        upload.write(data)
        upload.finish()
    except BaseException:
        upload.abort()
        raise
    return digest


class Download:
    """A blob on its way down: `read` goes on by itself after a break."""

    def __init__(self, client: Client, digest: str, size_bytes: int) -> None:
        """Begin. Raises TargetNotFound, RemoteRefused, CannotConnect, TransferFailed."""
        self._client = client
        self._digest = digest
        self._hash = hashlib.new(digest.partition(":")[0])
        self._size = size_bytes
        self._got = 0
        self._skip = 0
        self._done = False
        self._held = b""
        self._response: requests.Response | None = None
        self._retry = client.retry()
        self._slow_since_s, self._slow_from = time.monotonic(), 0
        while self._response is None:
            try:
                self._open()
            except Broken as broken:
                self._retry.wait(broken)

    @property
    def size_bytes(self) -> int | None:
        """As the manifest says; it was checked when `read` returned b""."""
        return self._size

    @property
    def etag(self) -> str | None:
        """The digest."""
        return self._digest

    def close(self) -> None:
        """No more of it."""
        response, self._response = self._response, None
        if response is not None:
            with suppress(Exception):  # what a dying connection says to that is of no interest
                response.close()

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes (all, when negative), b"" only at the verified end.

        Raises:
            DigestMismatch: it is not what the manifest says.
            TransferFailed, RemoteRefused: it cannot be read to its end.
        """
        if size < 0:
            return b"".join(iter(lambda: self.read(_READ_BYTES), b""))
        while not self._held and not self._done:
            self._held = self._more()
        data, self._held = self._held[:size], self._held[size:]
        return data

    def _more(self) -> bytes:
        registry = self._client.reference.registry
        try:
            if self._response is None:
                self._open()
            assert self._response is not None
            with speaking(registry):
                data: bytes = self._response.raw.read(_READ_BYTES)
            self._check_pace(len(data))
            if not data and self._got < self._size:
                raise Broken("it ended early")
        except Broken as broken:
            self.close()
            self._retry.wait(broken)
            return b""
        if skipped := min(self._skip, len(data)):
            self._skip -= skipped
            data = data[skipped:]
        if data:
            self._retry.progressed()
            self._hash.update(data)
            self._got += len(data)
        if self._got > self._size:
            raise DigestMismatch(f"{registry} sends more than the {self._size} bytes that the manifest tells of")
        if self._got == self._size:
            if self._hash.hexdigest() != self._digest.partition(":")[2]:
                raise DigestMismatch(f"what {registry} sent is damaged: its digest is not the one in the manifest")
            self._done = True
            self.close()
        return data

    def _check_pace(self, count: int) -> None:
        options, now = self._client.options, time.monotonic()
        self._slow_from += count
        if (span := now - self._slow_since_s) >= options.idle_timeout_s:
            slow = self._slow_from < _LEAST_BYTES_S * span
            self._slow_since_s, self._slow_from = now, 0
            if slow:
                raise Broken("it comes too slowly")

    def _open(self) -> None:
        client = self._client
        headers = {"Range": f"bytes={self._got}-"} if self._got else {}
        response = client.get(client.url(f"blobs/{self._digest}"), headers)
        if response.status_code == 404:
            response.close()
            raise TargetNotFound(f"{client.reference.registry} has the manifest, but not the content, of {client.reference}")
        self._slow_since_s, self._slow_from = time.monotonic(), 0
        self._skip = 0
        length: Any = response.headers.get("Content-Length")
        wrong = None
        if response.status_code == 206:
            match = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
            if not match or int(match[1]) != self._got or match[3] not in ("*", str(self._size)):
                wrong = "another part than was asked for"
        elif response.status_code == 416:
            wrong = f"nothing after byte {self._got}"
        else:
            self._skip = self._got  # it knows no ranges: what we have comes again
            if length is not None and length.isdigit() and int(length) != self._size:
                wrong = f"{int(length)} bytes instead of {self._size}"
        if wrong:
            response.close()
            raise DigestMismatch(f"{client.reference.registry} sends {wrong}")
        self._response = response


__all__ = ["Download", "Upload", "put_small", "stat"]
