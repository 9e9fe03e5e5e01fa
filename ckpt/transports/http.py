"""http and https: archives from and to web servers, object storage (presigned URLs) and `ckpt serve`. docs/http.md has the protocol.

What needs `requests` is in `_http_*`, imported when the first request is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final
from urllib.parse import parse_qsl

from ckpt.errors import UsageError
from ckpt.transports.base import CarrierOptions, Download, Location, Payload, Upload, is_loopback

if TYPE_CHECKING:
    from ckpt.transports._http_wire import Wire

_SIGNATURES: Final = frozenset({"x-amz-signature", "x-goog-signature", "x-oss-signature", "x-obs-signature", "q-signature", "signature", "sig"})
"""Parameters that make a URL a presigned one: S3 (v4, v2) and what is like it, Google, Azure."""


class HttpCarrier:
    """GET with ranges; uploads that go on after a break where the server offers that, else one PUT."""

    schemes = ("http", "https")

    def check_write(self, location: Location, options: CarrierOptions) -> None:
        """Raises CannotConnect, RemoteRefused, KeyProblem, UsageError. A presigned URL is for one PUT: it cannot be tried."""
        from ckpt.transports import _http_write

        with _wire(location, options) as wire:
            if not is_signed(location):
                _http_write.offer(wire)

    @contextmanager
    def open_read(self, location: Location, options: CarrierOptions) -> Iterator[Download]:
        """Raises TargetNotFound (404, 410), RemoteRefused, CannotConnect, TransferFailed."""
        from ckpt.transports import _http_read

        with _wire(location, options) as wire:
            reading = _http_read.Reading(wire)
            try:
                yield reading
            finally:
                reading.close()

    @contextmanager
    def open_write(self, location: Location, options: CarrierOptions, payload: Payload) -> Iterator[Upload]:
        """Raises as `check_write`, TransferFailed and NoSpace (of this host, where a PUT waits)."""
        from ckpt.transports import _http_write

        with _wire(location, options) as wire:
            offer = None if is_signed(location) else _http_write.offer(wire)
            writing = _http_write.Resumable(wire, offer, payload) if offer is not None else _http_write.Plain(wire)
            try:
                yield writing
            finally:
                writing.close()


CARRIER: Final = HttpCarrier()


def is_signed(location: Location) -> bool:
    """Whether the URL's query is its own authorization."""
    return any(name.lower() in _SIGNATURES for name, _ in parse_qsl(location.split.query, keep_blank_values=True))


@contextmanager
def _wire(location: Location, options: CarrierOptions) -> Iterator[Wire]:
    parts = location.split
    if parts.username is not None:
        raise UsageError("a user or password in an http URL", hint="--token-file, --token-command, or --header-file with an Authorization line")
    if location.scheme == "http" and not options.insecure and not is_loopback(parts.hostname or ""):
        hint = "use https, or --insecure when everybody on the way may read it"
        raise UsageError(f"{location} is not encrypted on the way, and a checkpoint holds secrets", hint=hint)
    from ckpt.transports._http_wire import Wire

    wire = Wire(location, options, signed=is_signed(location))
    try:
        yield wire
    finally:
        wire.close()
