"""Connections to a registry: what is trusted, and how they are cut."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import requests
import requests.adapters
import requests.utils
import urllib3.connection
import urllib3.connectionpool

from ckpt.errors import KeyProblem
from ckpt.transports._oci_name import Reference
from ckpt.transports.base import CarrierOptions

_CERTS_D: Final = (Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d"))
_BLOCK_BYTES: Final = 128 << 10


class Adapter(requests.adapters.HTTPAdapter):
    """TLS by a context of ours alone. `pin`: the hex SHA-256 of the certificate, which then needs no authority."""

    def __init__(self, context: ssl.SSLContext, pin: str | None = None) -> None:
        self._context = context
        self._pools = _pools(self)
        self.sock: socket.socket | None = None
        self._pin = pin
        if pin:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, ssl_context=self._context, assert_fingerprint=self._pin, **kwargs)
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, proxy: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(proxy, ssl_context=self._context, **kwargs)
        manager.pool_classes_by_scheme = self._pools
        return manager

    def cert_verify(self, conn: Any, url: Any, verify: Any, cert: Any) -> None:
        """Trust what the context trusts; requests would add its own bundle."""
        conn.cert_reqs = "CERT_NONE" if self._pin else "CERT_REQUIRED"

    def cut(self) -> None:
        """End the connection in use now, from another thread: whoever waits on it fails at once."""
        with suppress(OSError, TypeError):
            # Past SSLSocket's own, which would pull the TLS state from below the thread that reads.
            socket.socket.shutdown(self.sock, socket.SHUT_RDWR)  # type: ignore[arg-type]


def _pools(adapter: Adapter) -> dict[str, Any]:
    class Noticed:
        """A connection that tells of its socket, and reads an answer that came before all was sent (a 413, say)."""

        sock: Any

        def connect(self) -> None:
            super().connect()  # type: ignore[misc]
            adapter.sock = self.sock

        def send(self, data: Any) -> None:
            adapter.sock = self.sock
            try:
                # A socket's time limit is for all that is sent at once.
                view = memoryview(data) if isinstance(data, bytes | bytearray | memoryview) and len(data) > _BLOCK_BYTES else None
                if view is None:
                    super().send(data)  # type: ignore[misc]
                else:
                    for start in range(0, len(view), _BLOCK_BYTES):
                        super().send(view[start : start + _BLOCK_BYTES])  # type: ignore[misc]
            except (ConnectionResetError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
                raise BrokenPipeError from None  # urllib3 goes on to read the answer after this one

    class Plain(Noticed, urllib3.connection.HTTPConnection):
        pass

    class Secure(Noticed, urllib3.connection.HTTPSConnection):
        pass

    class PlainPool(urllib3.connectionpool.HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(urllib3.connectionpool.HTTPSConnectionPool):
        ConnectionCls = Secure

    return {"http": PlainPool, "https": SecurePool}


class Session(requests.Session):
    """No redirects, no cookies. requests reads the whole body of a redirect before it says that it does not follow it."""

    def get_redirect_target(self, resp: Any) -> None:
        """None, ever."""


def tls(reference: Reference, options: CarrierOptions) -> ssl.SSLContext:
    """What is trusted: the file that was named, else the system's authorities and what podman and docker have for this registry."""
    try:
        if options.ca_file is not None:
            context = ssl.create_default_context(cafile=str(options.ca_file))
        else:
            context = ssl.create_default_context()
            found = ssl.get_default_verify_paths()
            if not found.cafile and not found.capath:
                context.load_verify_locations(requests.utils.DEFAULT_CA_BUNDLE_PATH)
            for path in sorted(path for place in _CERTS_D for path in (place / reference.registry).glob("*.crt")):
                context.load_verify_locations(str(path))
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if options.client_cert is not None:
            context.load_cert_chain(str(options.client_cert), str(options.client_key) if options.client_key else None, _no_passphrase)
        elif pair := next(((c, c.with_suffix(".key")) for p in _CERTS_D for c in sorted((p / reference.registry).glob("*.cert"))), None):
            context.load_cert_chain(str(pair[0]), str(pair[1]), _no_passphrase)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise KeyProblem(f"a certificate or key for {reference.registry} cannot be used: {reason}") from None
    return context


def _no_passphrase() -> str:
    raise ValueError("it is locked by a passphrase")
