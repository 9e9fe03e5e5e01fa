"""What comes out of a registry: blobs, one after the other, as one stream.

It goes on at the byte where it broke; the last bytes of a blob are handed out only after its size and digest were right.

Source: OCI distribution-spec 1.1, "Pulling blobs".
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import requests

from ckpt.errors import DigestMismatch, TargetNotFound
from ckpt.transports._oci_http import LEAST_BYTES_S, Client, speaking
from ckpt.transports._patience import Broken

_CONTENT_RANGE: Final = re.compile(r"\s*bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)\s*\Z")
_READ_BYTES: Final = 256 << 10


class Download:
    """Blobs on their way down: `read` goes on by itself after a break."""

    def __init__(self, client: Client, blobs: Sequence[tuple[str, int]]) -> None:
        """Begin with the first of (digest, size in bytes). Raises TargetNotFound, RemoteRefused, CannotConnect, TransferFailed."""
        self._blobs = list(blobs)
        self._total = sum(size for _, size in blobs)
        self._client = client
        self._at = 0
        self._now = _Blob(client, *self._blobs[0])

    @property
    def size_bytes(self) -> int | None:
        """As the manifest says; it was checked when `read` returned b""."""
        return self._total

    @property
    def etag(self) -> str | None:
        """The digest, of a single blob."""
        return self._blobs[0][0] if len(self._blobs) == 1 else None

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes (all, when negative), b"" only at the verified end.

        Raises:
            DigestMismatch: it is not what the manifest says.
            TransferFailed, RemoteRefused: it cannot be read to its end.
        """
        if size < 0:
            return b"".join(iter(lambda: self.read(_READ_BYTES), b""))
        while not (data := self._now.read(size)) and size and self._at + 1 < len(self._blobs):
            self._at += 1
            self._now = _Blob(self._client, *self._blobs[self._at])
        return data

    def close(self) -> None:
        """No more of it."""
        self._now.close()


class _Blob:
    """One blob."""

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
        while self._response is None:
            try:
                self._open()
            except Broken as broken:
                self._retry.wait(broken)

    def close(self) -> None:
        """No more of it."""
        response, self._response = self._response, None
        if response is not None:
            with suppress(Exception):  # what a dying connection says to that is of no interest
                response.close()

    def read(self, size: int) -> bytes:
        """At most `size` bytes, b"" only at the verified end."""
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
            options = self._client.options
            with speaking(registry), self._client.within(self._response.url, options.idle_timeout_s + _READ_BYTES / LEAST_BYTES_S):
                data: bytes = self._response.raw.read(_READ_BYTES, decode_content=False)
            if not data and self._got < self._size:
                raise Broken("it ended early")
        except Broken as broken:
            self.close()
            self._retry.wait(broken)
            self._client.options.notice(f"{broken}: going on at byte {self._got} of {self._size}")
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

    def _open(self) -> None:
        client = self._client
        headers = {"Range": f"bytes={self._got}-"} if self._got else {}
        response = client.get(client.url(f"blobs/{self._digest}"), headers)
        if response.status_code == 404:
            response.close()
            raise TargetNotFound(f"{client.reference.registry} has the manifest, but not the content, of {client.reference}")
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
