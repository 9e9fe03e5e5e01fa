"""A download that goes on after a break (RFC 9110, sections 13 and 14: If-Range, Range)."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import Any

import urllib3

from ckpt.errors import CannotConnect, CkptError, DigestMismatch, TargetNotFound, TransferFailed
from ckpt.transports._http_wire import BLOCK_BYTES, Wire
from ckpt.transports._patience import Broken, Patience

_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):")


class Reading:
    """A GET that is under way."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._patience = Patience(wire.location, wire.options)
        self._done = 0
        self._ended = False
        self._late = False
        self._sha256 = hashlib.sha256()
        self._response: Any = None
        self.size_bytes: int | None = None
        self.etag: str | None = None
        self._validator: str | None = None
        self._digest: bytes | None = None
        self._open()

    def close(self) -> None:
        if self._response is not None:
            self._response.close()

    def read(self, size: int = -1, /) -> bytes:
        """As `Download.read`; b"" means that length and digest, where they were told, are right."""
        while not self._ended and size:
            try:
                piece = self._some(BLOCK_BYTES if size < 0 else min(size, BLOCK_BYTES))
            except Broken as problem:
                self._again(problem)
                continue
            if piece:
                self._done += len(piece)
                self._patience.progressed(len(piece))
                if self._digest is not None:
                    self._sha256.update(piece)
                return piece
            self._ended = True
            self._check()
        return b""

    def _some(self, size: int) -> bytes:
        wire = self._wire
        if self._late:
            raise wire.late()
        wire.guard()
        try:
            piece: bytes = self._response.raw.read(size, decode_content=False)
            self._late = wire.watch.fired
        except urllib3.exceptions.IncompleteRead:
            raise wire.late() if wire.watch.fired else Broken("the connection ended before all was there") from None
        except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
            raise wire.broken(error) from None
        finally:
            wire.watch.disarm()
        if not piece and (self._late or (self.size_bytes is not None and self._done < self.size_bytes)):
            raise wire.late() if self._late else Broken("the connection ended before all was there")
        return piece

    def _check(self) -> None:
        where = self._wire.location
        if self.size_bytes is not None and self._done != self.size_bytes:
            raise TransferFailed(f"{where}: {self._done} bytes came, {self.size_bytes} were promised")
        if self._digest is not None and self._sha256.digest() != self._digest:
            raise DigestMismatch(f"{where}: what came is not what the server says it is (SHA-256)", hint="try again; if it stays, it is damaged")

    def _open(self) -> None:
        """The first answer, or the first again while nothing was read."""
        while True:
            try:
                response = self._wire.request("GET", self._wire.location.raw)
                if response.status_code == 200:
                    break
                raise self._refused(response)
            except Broken as problem:
                if not problem.connected:
                    raise unreachable(self._wire, problem) from None
                self._patience.wait(problem)
        self._response = response
        headers = response.headers
        length = headers.get("Content-Length", "")
        self.size_bytes = int(length) if re.fullmatch(r"\d{1,18}", length) and "Transfer-Encoding" not in headers else None
        self.etag = headers.get("ETag")
        # A weak tag says that two contents mean the same, not that they are the same bytes.
        self._validator = self.etag if self.etag and self.etag.startswith('"') else headers.get("Last-Modified")
        self._digest = digest_of(headers.get("Repr-Digest", ""))

    def _again(self, problem: Broken) -> None:
        where, options = self._wire.location, self._wire.options
        self.close()
        self._late = False
        self._patience.wait(problem)
        if self._done == 0:
            self._open()
            return
        if self._validator is None or self.size_bytes is None:
            raise TransferFailed(f"{where}: {problem.message} at byte {self._done}, and the server cannot send the rest only", hint="try again")
        options.notice(f"{where}: {problem.message}; going on at byte {self._done}")
        while True:
            try:
                ask = {"Range": f"bytes={self._done}-", "If-Range": self._validator}
                response = self._wire.request("GET", where.raw, headers=ask)
                if response.status_code == 206:
                    break
                if response.status_code in (200, 412, 416):
                    response.close()
                    why = "the file changed meanwhile, or the server cannot send the rest only"
                    raise TransferFailed(f"{where}: {problem.message} at byte {self._done}, and {why}", hint="try again")
                raise self._refused(response)
            except Broken as further:
                further.connected = True  # it was reached before
                self._patience.wait(further)
        found = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18})", response.headers.get("Content-Range", "").strip())
        if found is None or [int(n) for n in found.groups()] != [self._done, self.size_bytes - 1, self.size_bytes]:
            response.close()
            raise TransferFailed(f"{where}: the server sent another part than it was asked for", hint="try again")
        self._response = response

    def _refused(self, response: Any) -> Exception:
        gone = response.status_code in (404, 410)
        error = self._wire.refusal(response, "to send it")
        if gone and isinstance(error, CkptError):
            return TargetNotFound(f"there is no archive {str(self._wire.location)!r} ({response.status_code})")
        return error


def unreachable(wire: Wire, problem: Broken) -> CkptError:
    """The error for another end that was not reached at the first try: more tries would only keep a person waiting."""
    host = wire.location.split.hostname
    return CannotConnect(f"cannot connect to {host}: {problem.message}", hint="is the name right, is it up, and does a firewall let this through?")


def digest_of(field: str) -> bytes | None:
    """The SHA-256 of a `Repr-Digest` field (RFC 9530), None without one."""
    found = _DIGEST.search(field)
    if found is None:
        return None
    try:
        return base64.b64decode(found[1], validate=True)
    except binascii.Error:
        return None
