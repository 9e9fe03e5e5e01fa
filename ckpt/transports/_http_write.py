"""Uploads: resumable ones (docs/http.md), of which one chunk at most is sent twice, and one PUT for every other server."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import re
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urljoin

from ckpt.errors import CkptError, DigestMismatch, NoSpace, RemoteRefused, TransferFailed
from ckpt.transports._http_read import digest_of, unreachable
from ckpt.transports._http_wire import Wire, line, origin
from ckpt.transports._patience import Broken, Patience
from ckpt.transports.base import Payload, Stored

FINISH_S: Final = 300.0
"""How long the other end may take to bring all to its disk, and to compare it."""
_GIVE_UP_S: Final = 5.0
_LEAST_CHUNK: Final = 4 << 10
_MEDIA_TYPE: Final = "application/partial-upload"


@dataclass(frozen=True, slots=True)
class Offer:
    """What a server with resumable uploads allows."""

    max_size_bytes: int | None = None
    max_append_bytes: int | None = None


def offer(wire: Wire) -> Offer | None:
    """Ask the server whether an upload can go on after a break; None: it cannot.

    Raises:
        CannotConnect, TransferFailed, RemoteRefused: it says no at once.
    """
    patience = Patience(wire.location, wire.options)
    while True:
        try:
            response = wire.request("OPTIONS", wire.location.raw)
            speaks = response.headers.get("Ckpt-Upload", "").strip() == "1"
            if response.ok and speaks:
                limits = response.headers.get("Upload-Limit", "")
                wire.small(response)
                return Offer(_limit(limits, "max-size"), _limit(limits, "max-append-size"))
            if response.status_code == 401 or (speaks and response.status_code in (403, 404, 413, 507)) or response.status_code in (429, 503):
                raise wire.refusal(response, "the upload")
            wire.small(response)
            return None
        except Broken as problem:
            if not problem.connected:
                raise unreachable(wire, problem) from None
            patience.wait(problem)


def _limit(field: str, name: str) -> int | None:
    found = re.search(rf"(?:^|[,;\s]){name}=(\d{{1,18}})(?:$|[,;\s])", field)
    return int(found[1]) if found else None


class Resumable:
    """An upload in chunks, each acknowledged before the next; a thread sends one while the next is filled."""

    def __init__(self, wire: Wire, allowed: Offer, payload: Payload) -> None:
        if allowed.max_size_bytes is not None and (payload.size_bytes or 0) > allowed.max_size_bytes:
            raise RemoteRefused(f"{wire.location} takes at most {allowed.max_size_bytes} bytes, this has {payload.size_bytes}")
        self._wire = wire
        self._allowed = allowed
        self._chunk_bytes = max(_LEAST_CHUNK, min(wire.options.chunk_bytes, allowed.max_append_bytes or wire.options.chunk_bytes))
        self._patience = Patience(wire.location, wire.options)
        self._sha256 = hashlib.sha256()
        self._filling = bytearray()
        self._count = 0
        self._acknowledged = 0
        self._sender: threading.Thread | None = None
        self._error: BaseException | None = None
        self._finished = False
        self._url = self._create(payload)

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        view = memoryview(data).cast("B")
        self._sha256.update(view)
        taken = 0
        while taken < len(view):
            piece = view[taken : taken + self._chunk_bytes - len(self._filling)]
            self._filling += piece
            taken += len(piece)
            self._count += len(piece)
            if self._allowed.max_size_bytes is not None and self._count > self._allowed.max_size_bytes:
                raise RemoteRefused(f"{self._wire.location} takes at most {self._allowed.max_size_bytes} bytes")
            if len(self._filling) == self._chunk_bytes:
                self._flush()
        return taken

    def commit(self) -> Stored:
        if self._filling:
            self._flush()
        self._settle()
        digest = self._sha256.digest()
        field = f"sha-256=:{base64.b64encode(digest).decode()}:"
        headers = {"Upload-Offset": str(self._count), "Upload-Complete": "?1", "Repr-Digest": field, "Content-Type": _MEDIA_TYPE}
        asked = False
        while True:
            try:
                response = self._wire.request("PATCH", self._url, headers=headers, answer_s=FINISH_S)
                if response.status_code in (200, 201, 204):
                    break
                gone = response.status_code in (404, 410)
                error = self._wire.refusal(response, "the end of the upload")
                if gone and asked:
                    raise TransferFailed(f"{self._wire.location}: the answer was lost, so it is not known whether it was stored", hint="look there")
                raise error
            except Broken as problem:
                asked = True
                self._patience.wait(problem)
        self._finished = True
        confirmed = digest_of(response.headers.get("Repr-Digest", ""))
        if confirmed is not None and confirmed != digest:
            raise DigestMismatch(f"{self._wire.location}: the other end stored something else than was sent (SHA-256)")
        told = _offset(response)
        if told is not None and told != self._count:
            raise TransferFailed(f"{self._wire.location}: the other end has {told} bytes, {self._count} were sent")
        return Stored(self._count, confirmed.hex() if confirmed else None, self._reference(response))

    def close(self) -> None:
        """Give it up, unless it was committed: the other end is told, if it listens."""
        if self._finished:
            return
        self._patience.stopped.set()
        if self._sender is not None:
            self._wire.watch.arm(0.0)  # what is being sent ends now
            self._sender.join(_GIVE_UP_S)
        with suppress(CkptError, Broken):
            self._wire.request("DELETE", self._url, answer_s=_GIVE_UP_S).close()

    def _reference(self, response: Any) -> str | None:
        if response.headers.get("Content-Type", "").split(";")[0].strip() != "application/json":
            response.close()
            return None
        try:
            said = json.loads(self._wire.small(response))
        except (ValueError, RecursionError):
            return None
        return line(said.get("ref")) or None if isinstance(said, dict) else None

    def _create(self, payload: Payload) -> str:
        wire = self._wire
        headers = {"Ckpt-Upload": "1"}
        if payload.size_bytes is not None:
            headers["Upload-Length"] = str(payload.size_bytes)
        while True:
            try:
                response = wire.request("POST", wire.location.raw, headers=headers)
                if response.status_code == 201:
                    break
                raise wire.refusal(response, "the upload")
            except Broken as problem:
                self._patience.wait(problem)
        place = urljoin(wire.location.raw, response.headers.get("Location", ""))
        wire.small(response)
        # It gets our token, so it is the same server.
        if not response.headers.get("Location") or origin(place) != origin(wire.location.raw):
            raise RemoteRefused(f"{wire.location}: the upload would be elsewhere, or nowhere", hint="this is a fault of the server")
        return place

    def _settle(self) -> None:
        """Wait until nothing is being sent. Raises what went wrong with it."""
        if self._sender is not None:
            self._sender.join()
            self._sender = None
        if self._error is not None:
            raise self._error

    def _flush(self) -> None:
        self._settle()
        chunk, self._filling = bytes(self._filling), bytearray()
        self._sender = threading.Thread(target=self._send, args=(chunk,), name="ckpt-upload", daemon=True)
        self._sender.start()

    def _send(self, chunk: bytes) -> None:
        try:
            self._append(chunk, self._acknowledged)
        except BaseException as error:  # raised again by _settle, in the thread that writes
            self._error = error

    def _append(self, chunk: bytes, start: int) -> None:
        """Bring a chunk that begins at `start` to the other end, whatever happens on the way."""
        end = start + len(chunk)
        while self._acknowledged < end:
            at = self._acknowledged
            headers = {"Upload-Offset": str(at), "Upload-Complete": "?0", "Content-Type": _MEDIA_TYPE}
            try:
                response = self._wire.request("PATCH", self._url, headers=headers, body=memoryview(chunk)[at - start :])
                told = _offset(response)
                if response.status_code in (200, 201, 204):
                    self._wire.small(response)
                    self._advance(end if told is None else told, start, end)
                    continue
                if response.status_code == 409 and told is not None:
                    self._wire.small(response)
                    if told == at:
                        raise Broken("it answered 409 to the right offset")
                    self._advance(told, start, end)
                    continue
                raise self._refused(response)
            except Broken as problem:
                self._ask(problem, start, end)

    def _ask(self, problem: Broken, start: int, end: int) -> None:
        """Find out how far the other end got."""
        before = self._acknowledged
        while True:
            self._patience.wait(problem)
            try:
                response = self._wire.request("HEAD", self._url)
                told = _offset(response)
                if response.status_code not in (200, 204) or told is None:
                    raise self._refused(response)
                response.close()
                self._advance(told, start, end)
                break
            except Broken as further:
                problem = further
                problem.connected = True  # it was reached before
        if self._acknowledged > before:
            self._wire.options.notice(f"{self._wire.location}: {problem.message}; going on at byte {self._acknowledged}")

    def _advance(self, told: int, start: int, end: int) -> None:
        if not start <= self._acknowledged <= told <= end:
            raise TransferFailed(f"{self._wire.location}: the other end is at byte {told}, which cannot be", hint="try again")
        if told > self._acknowledged:
            self._patience.progressed(told - self._acknowledged)
            self._acknowledged = told

    def _refused(self, response: Any) -> Exception:
        if response.status_code in (404, 410):
            response.close()
            return TransferFailed(f"{self._wire.location}: the other end has forgotten the upload", hint="try again")
        if response.status_code == 409:
            response.close()
            return Broken("it is busy with an earlier request (409)")
        return self._wire.refusal(response, "the upload")


class Plain:
    """One PUT. Its length must be told before, so all waits in a nameless file first."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._sha256 = hashlib.sha256()
        self._count = 0
        place = wire.options.spool_dir
        with self._space():
            # O_TMPFILE where the file system can, else unlinked at once; 0600 in any case.
            self._spool = tempfile.TemporaryFile(buffering=0, dir=place if place is not None and place.is_dir() else None)  # noqa: SIM115

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        view = memoryview(data).cast("B")
        self._sha256.update(view)
        done = 0
        with self._space():
            while done < len(view):
                done += self._spool.write(view[done:]) or 0
        self._count += done
        return done

    def commit(self) -> Stored:
        wire = self._wire
        patience = Patience(wire.location, wire.options)
        headers = {"Content-Type": "application/octet-stream"}
        if ".blob.core." in (wire.location.split.hostname or ""):
            headers["x-ms-blob-type"] = "BlockBlob"  # Azure demands to be told
        while True:
            try:
                response = wire.request("PUT", wire.location.raw, headers=headers, body=_Spooled(self._spool, self._count), answer_s=FINISH_S)
                if response.status_code in (200, 201, 204):
                    break
                raise wire.refusal(response, "the upload")
            except Broken as problem:
                if not problem.connected:
                    raise unreachable(wire, problem) from None
                patience.wait(problem)
                wire.options.notice(f"{wire.location}: {problem.message}; sending it again, this server cannot go on in the middle")
        wire.small(response)
        self._confirm()
        return Stored(self._count)

    def _confirm(self) -> None:
        """Where it may be asked, the server must have the same length."""
        from ckpt.transports.http import is_signed

        if is_signed(self._wire.location):  # for PUT alone
            return
        with suppress(Broken):
            response = self._wire.request("HEAD", self._wire.location.raw)
            length = response.headers.get("Content-Length", "")
            response.close()
            if response.status_code == 404:
                raise TransferFailed(f"{self._wire.location}: the server took it, but has nothing there")
            if response.status_code == 200 and length.isdigit() and int(length) != self._count and "Content-Encoding" not in response.headers:
                raise TransferFailed(f"{self._wire.location}: the server has {length} bytes, {self._count} were sent")

    def close(self) -> None:
        """What waited here is gone."""
        self._spool.close()

    def _space(self) -> Any:
        return _NoSpaceHere(self._wire)


class _NoSpaceHere:
    def __init__(self, wire: Wire) -> None:
        self._where = str(wire.options.spool_dir or tempfile.gettempdir())

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoSpace(f"no space left in {self._where}, where the archive waits until its length is known", hint="free some space") from error
            raise CkptError(f"{self._where}, where the archive waits until its length is known: {error.strerror}") from error


class _Spooled:
    def __init__(self, file: Any, size_bytes: int) -> None:
        self._file = file
        self._size_bytes = size_bytes

    def __len__(self) -> int:
        return self._size_bytes

    def rewind(self) -> None:
        self._file.seek(0)

    def read(self, size: int) -> Any:
        return self._file.read(size)


def _offset(response: Any) -> int | None:
    value = response.headers.get("Upload-Offset", "").strip()
    return int(value) if re.fullmatch(r"\d{1,18}", value) else None
