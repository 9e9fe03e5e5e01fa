"""What goes into a registry, while it is still being made.

Two ways. `Parts`: many blobs, each sent in one piece and kept in memory until the registry has it; every registry can do that, and what
breaks is sent again, at most one part. `Upload`: one blob in chunks, for what must be one blob; it goes on after a break where the
registry says how much it has. Distribution (docker-registry) does not: it forgets an upload whose chunk broke (2.8.3, tried).

Source: OCI distribution-spec 1.1, "Pushing a blob monolithically", "Pushing a blob in chunks".
"""

from __future__ import annotations

import hashlib
import queue
import re
import threading
from contextlib import suppress
from typing import Final

from ckpt.errors import CkptError, DigestMismatch, RemoteRefused, TransferFailed
from ckpt.transports._oci_http import Answer, Client
from ckpt.transports._patience import Broken

_RANGE: Final = re.compile(r"\s*(?:bytes[= ])?0-([0-9]{1,18})\s*\Z")
_SMALL_PIECE: Final = 1 << 20
"""What is tried when a chunk is too large for somebody on the way (413)."""
_MAX_CHUNK: Final = 256 << 20
_FINISH_S: Final = 600.0
"""How long a registry may take to move a finished blob to its place."""
_TIDY_S: Final = 10.0
_BREAKS: Final = 3
"""After so many breaks without progress, the size of a chunk is suspected."""
_MANY_PARTS: Final = 1000
_LARGE_PARTS: Final = 8
"""After so many parts, they become so many times larger: the manifest that lists them must stay below 4 MiB."""


class Sender:
    """A stream cut into chunks that a thread sends. Memory: three chunks."""

    def __init__(self, client: Client, chunk_bytes: int) -> None:
        self._client = client
        self._chunk_bytes = max(chunk_bytes, 1)
        self._size = 0
        self._error: BaseException | None = None
        self._queue: queue.Queue[bytearray | None] = queue.Queue(maxsize=1)
        self._chunk = bytearray()
        self._thread = threading.Thread(target=self._carry, name="ckpt-registry", daemon=True)
        self._thread.start()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take all of `data`. Raises what went wrong with what was written before."""
        view = memoryview(data).cast("B")
        self._size += len(view)
        done = 0
        while done < len(view):
            piece = view[done : done + self._chunk_bytes - len(self._chunk)]
            self._chunk += piece
            done += len(piece)
            if len(self._chunk) >= self._chunk_bytes:
                self._pass_on(self._chunk)
                self._chunk = bytearray()
        return len(view)

    def _finish(self) -> None:
        """All was written, and all is sent."""
        if self._chunk:
            self._pass_on(self._chunk)
            self._chunk = bytearray()
        self._pass_on(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def abort(self) -> None:
        """Forget it. Whatever the registry says to that is of no interest."""
        self._client.stop.set()
        with suppress(queue.Empty):
            self._queue.get_nowait()
        with suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(self._client.options.idle_timeout_s + _TIDY_S)
        if not self._thread.is_alive():
            self._drop()

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
        except BaseException as error:  # raised again by write() or _finish(), in the thread that asked
            self._error = error

    def _send(self, chunk: memoryview) -> None:
        raise NotImplementedError

    def _drop(self) -> None:
        raise NotImplementedError


class Parts(Sender):
    """A stream as many blobs."""

    def __init__(self, client: Client, part_bytes: int) -> None:
        """Begin: the registry is asked for a place to write to. Raises RemoteRefused, CannotConnect, TransferFailed."""
        self._location, _ = begin(client)
        self._limit = _MAX_CHUNK
        self._found: list[tuple[str, int]] = []
        super().__init__(client, part_bytes)

    def finish(self) -> list[tuple[str, int]]:
        """All was written: digest and size in bytes of every part; at least one."""
        if not self._size:
            self._found.append((put(self._client, memoryview(b""), self._location), 0))
        self._finish()
        return self._found

    def _send(self, chunk: memoryview) -> None:
        done = 0
        while done < len(chunk):
            piece = chunk[done : done + self._limit]
            try:
                digest = put(self._client, piece, self._location)
            except _TooLarge:
                self._limit = _shorter(self._client, len(piece))
                continue
            finally:
                self._location = ""
            self._found.append((digest, len(piece)))
            done += len(piece)
        if len(self._found) == _MANY_PARTS:
            self._chunk_bytes *= _LARGE_PARTS

    def _drop(self) -> None:
        if self._location:
            drop(self._client, self._location)


class Upload(Sender):
    """One blob."""

    def __init__(self, client: Client, chunk_bytes: int) -> None:
        """Begin: the registry is asked for a place to write to. Raises RemoteRefused, CannotConnect, TransferFailed."""
        self._location, least = begin(client)
        if least > _MAX_CHUNK:
            raise RemoteRefused(f"{client.reference.registry} wants chunks of {least} bytes")
        self._sent = 0
        self._piece_bytes = _MAX_CHUNK
        self._digest = hashlib.sha256()
        super().__init__(client, max(chunk_bytes, least))

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """As `Sender.write`."""
        self._digest.update(data)
        return super().write(data)

    def finish(self) -> tuple[str, int]:
        """All was written: the registry takes it as a blob. Its digest and size in bytes."""
        self._finish()
        digest = f"sha256:{self._digest.hexdigest()}"
        self._close(digest)
        self._location = ""
        return digest, self._size

    def _drop(self) -> None:
        if self._location:
            drop(self._client, self._location)

    def _begin(self) -> None:
        self._location, _ = begin(self._client)
        self._sent = 0

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
                if breaks >= _BREAKS and broken.connected:
                    self._piece_bytes = min(self._piece_bytes, _SMALL_PIECE)
                sure = False
                retry.wait(broken)
                self._client.options.notice(f"{broken}: asking the registry where to go on, after byte {self._sent}")
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
            self._piece_bytes = _shorter(client, len(piece))
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
            drop(client, self._location)
            self._begin()
            return
        if not start <= has <= end:
            raise TransferFailed(f"{client.reference.registry} has {has} bytes of the upload, between {start} and {end} are right", hint="try again")
        self._sent = has

    def _close(self, digest: str) -> None:
        client, retry = self._client, self._client.retry()
        broke = False
        while True:
            try:
                if broke and stat(client, digest) == self._size:
                    return
                headers = {"Content-Type": "application/octet-stream"}
                answer = client.call("PUT", with_digest(self._location, digest), headers=headers, body=b"", idle_s=_patient_s(client))
            except Broken as broken:
                broke = True
                retry.wait(broken)
                continue
            if answer.status in (201, 204):
                _check_stored(client, answer, digest)
                return
            _check_refused(client, answer)
            if broke and answer.status in (404, 416) and stat(client, digest) == self._size:
                return
            raise client.refusal(answer, "the upload cannot be finished")


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


def begin(client: Client) -> tuple[str, int]:
    """Ask for a new place to write to: its URL, and the least size of a chunk in bytes."""
    answer = client.patient("POST", client.url("blobs/uploads/"), body=b"")
    if answer.status != 202:
        raise client.refusal(answer, "the upload cannot begin")
    location = client.follow(answer.headers.get("Location", ""), answer.url)
    least = answer.headers.get("OCI-Chunk-Min-Length", "")
    return location, int(least) if least.isascii() and least.isdigit() and len(least) < 15 else 0


def put(client: Client, data: memoryview, location: str = "") -> str:
    """A blob in one piece; its digest. `location`: where an upload was begun already."""
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    stale = [location] if location else []
    try:
        _put(client, data, digest, stale)
    finally:
        for place in stale:
            drop(client, place)
    return digest


def _put(client: Client, data: memoryview, digest: str, places: list[str]) -> None:
    """`places`: uploads that were begun; the last one is used, and taken from the list when it became a blob."""
    retry, breaks, fresh = client.retry(), 0, bool(places)
    while True:
        try:
            if breaks and stat(client, digest) == len(data):
                return
            if not fresh:
                places.append(begin(client)[0])
            headers = {"Content-Type": "application/octet-stream"}
            answer = client.call("PUT", with_digest(places[-1], digest), headers=headers, body=data, idle_s=_patient_s(client))
        except Broken as broken:
            breaks, fresh = breaks + 1, False
            retry.wait(broken)
            client.options.notice(f"{broken}: sending {len(data)} bytes again")
            if breaks == _BREAKS and broken.connected and len(data) > _SMALL_PIECE:
                raise _TooLarge("it hangs up") from None
            continue
        if answer.status in (201, 204):
            places.pop()
            _check_stored(client, answer, digest)
            return
        if answer.status == 413:
            raise _TooLarge(f"{len(data)} bytes")
        _check_refused(client, answer)
        raise client.refusal(answer, "the upload was refused")


def drop(client: Client, location: str) -> None:
    """Forget an upload. Whatever the registry says to that is of no interest."""
    with suppress(CkptError, Broken):
        client.call("DELETE", location, idle_s=_TIDY_S)


def with_digest(location: str, digest: str) -> str:
    """The URL that finishes an upload."""
    return f"{location}{'&' if '?' in location else '?'}digest={digest}"


class _TooLarge(Exception):
    """HTTP status 413."""


def _shorter(client: Client, size: int) -> int:
    """How much to send after `size` bytes were too many. Raises RemoteRefused when it cannot be less."""
    if size <= _SMALL_PIECE:
        raise RemoteRefused(f"{client.reference.registry}, or a proxy before it, does not even take {size} bytes at once (HTTP status 413)",
                            hint="raise its limit for the body of a request")  # fmt: skip
    return _SMALL_PIECE


def _patient_s(client: Client) -> float:
    return max(_FINISH_S, client.options.idle_timeout_s)


def _check_stored(client: Client, answer: Answer, digest: str) -> None:
    said = answer.headers.get("Docker-Content-Digest", "")
    if said.startswith("sha256:") and said != digest:
        raise DigestMismatch(f"{client.reference.registry} stored something else than what was sent: it says {said[:80]!r}")


def _check_refused(client: Client, answer: Answer) -> None:
    if "DIGEST_INVALID" in answer.said():
        raise DigestMismatch(f"{client.reference.registry} got something else than what was sent: {answer.said()}")
