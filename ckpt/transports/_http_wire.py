"""One HTTP client with what `requests` lacks: limits in time that a trickle of bytes does not escape, redirects that lose neither TLS nor
secrets, early answers, and failures sorted into "again" and "never".
"""

from __future__ import annotations

import json
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from ckpt import __version__
from ckpt.errors import ArchiveInvalid, CkptError, DigestMismatch, KeyProblem, PolicyRefused, RemoteRefused, TransferFailed, UsageError
from ckpt.transports import _secrets
from ckpt.transports._patience import Broken
from ckpt.transports.base import CarrierOptions, Location, is_loopback

BLOCK_BYTES: Final = 128 << 10
REDIRECTS: Final = 5
_ERROR_BYTES: Final = 64 << 10
_AGAIN: Final = frozenset({408, 423, 425, 429, 500, 502, 503, 504})
_CODES: Final[Mapping[str, type[CkptError]]] = {error.slug: error for error in (DigestMismatch, ArchiveInvalid, KeyProblem, PolicyRefused)}
_REASONS: Final = {
    401: ("it wants to know who asks (401)", "give a token: --token-file or --token-command"),
    403: ("it does not allow that (403)", "look at what the token or the signed URL is good for, and whether it has expired"),
    404: ("there is no such place (404)", None),
    409: ("there is a conflict, perhaps the name is taken (409)", None),
    413: ("it is too large for it (413)", None),
    422: ("it cannot use what was sent (422)", None),
    507: ("no space is left there (507)", "make room on the other end"),
}


class _Watch:
    """Cuts the connection when a deadline passes; what waits on it then fails at once."""

    def __init__(self, cut: Any) -> None:
        self._cut = cut
        self._changed = threading.Condition()
        self._deadline_s: float | None = None
        self._closed = False
        self.fired = False
        self._thread: threading.Thread | None = None

    def arm(self, seconds: float) -> None:
        with self._changed:
            self._deadline_s = time.monotonic() + seconds
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="ckpt-http-watch", daemon=True)
                self._thread.start()
            self._changed.notify()

    def disarm(self) -> None:
        with self._changed:
            self._deadline_s, self.fired = None, False

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        with self._changed:
            while not self._closed:
                if self._deadline_s is None:
                    self._changed.wait()
                elif (left := self._deadline_s - time.monotonic()) > 0:
                    self._changed.wait(left)
                else:
                    self._deadline_s, self.fired = None, True
                    self._cut()


class Wire:
    """Requests to one location, one at a time. `close` it."""

    def __init__(self, location: Location, options: CarrierOptions, *, signed: bool) -> None:
        self.location = location
        self.options = options
        self.watch = _Watch(self._cut)
        self._began_s = time.monotonic()
        self._connection: Any = None
        self._secret = dict(_secrets.headers(options.header_file))
        if signed:  # two ways to say who asks are refused by object storage
            self._secret = {name: value for name, value in self._secret.items() if name.lower() != "authorization"}
        elif not any(name.lower() == "authorization" for name in self._secret):
            token = _secrets.token(options.token_file, options.token_command)
            if token is not None:
                self._secret["Authorization"] = f"Bearer {token}"
        self._origin = origin(location.raw)
        self._session = requests.Session()
        self._session.headers.clear()
        self._session.headers.update({"User-Agent": f"ckpt/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"})
        # Without an authentication of ours requests would look into ~/.netrc.
        self._session.auth = lambda request: request
        # Redirects are followed here; requests would read the whole content of each first, however much that is.
        self._session.get_redirect_target = lambda response: None  # type: ignore[method-assign, assignment]
        adapter = _adapter(self)
        self._session.mount("https://", adapter)
        self._session.mount("http://", adapter)
        # With a fingerprint (see _adapter) it is the certificate itself that is trusted.
        self._verify = False if options.fingerprint else str(options.ca_file) if options.ca_file else _authorities()
        if options.ca_file and not options.ca_file.is_file():
            raise KeyProblem(f"there is no file {options.ca_file} with certificate authorities")
        cert = options.client_cert
        self._cert: Any = None
        if cert is not None:
            for file in (cert, options.client_key):
                if file is not None and not file.is_file():
                    raise KeyProblem(f"there is no file {file} for the client certificate")
            self._cert = (str(cert), str(options.client_key)) if options.client_key else str(cert)
        # It logs paths with their queries.
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)

    def close(self) -> None:
        self.watch.close()
        self._session.close()

    def opened(self, connection: Any) -> None:
        """The connection that is used now."""
        self._connection = connection

    def _cut(self) -> None:
        sock: Any = getattr(self._connection, "sock", None)
        with suppress(OSError, TypeError):
            # Past SSLSocket's own, which would pull the TLS state from below the thread that reads.
            socket.socket.shutdown(sock, socket.SHUT_RDWR)

    def guard(self, seconds: float | None = None) -> None:
        """From now on the next block must come or go in this time (the idle limit), and the whole in its own.

        Raises:
            TransferFailed: the time for the whole is over.
        """
        limit = self.options.idle_timeout_s if seconds is None else seconds
        if self.options.total_timeout_s is not None:
            left = self._began_s + self.options.total_timeout_s - time.monotonic()
            if left <= 0:
                raise TransferFailed(f"{self.location}: not done in {self.options.total_timeout_s:g} s", hint="give it more time, or try again")
            limit = min(limit, left)
        self.watch.arm(limit)

    def late(self) -> Broken:
        """Of a connection that was cut because its time was over."""
        return Broken(f"nothing, or next to nothing, came or went in time ({self.options.idle_timeout_s:g} s)")

    def broken(self, error: BaseException) -> Exception:
        """What an exception of the libraries means."""
        if self.watch.fired:
            return self.late()
        for cause in _chain(error):
            if isinstance(cause, urllib3.exceptions.SSLError) and "ingerprint" in str(cause):
                hint = "make sure that it is the right host, then give the fingerprint that ckpt serve prints there"
                return RemoteRefused(f"{self.location}: its certificate is another one than expected (fingerprint)", hint=hint)
            if isinstance(cause, ssl.SSLCertVerificationError):
                why = cause.verify_message or "verification failed"
                hint = "if it is the right host: --ca FILE with the authority that signed it, or --fingerprint of ckpt serve's own"
                return RemoteRefused(f"{self.location}: its certificate is not trusted: {why}", hint=hint)
            if isinstance(cause, ssl.SSLError) and cause.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL"):
                return RemoteRefused(f"{self.location}: it speaks no TLS", hint="is the port right?")
            if isinstance(cause, ssl.SSLError) and cause.reason and "ALERT" in cause.reason:
                said = cause.reason.replace("_", " ").lower()
                return RemoteRefused(f"{self.location}: it refused the TLS connection ({said})", hint="it may want a client certificate")
        if isinstance(error, requests.exceptions.InvalidURL | requests.exceptions.InvalidHeader | requests.exceptions.MissingSchema):
            return UsageError(f"{self.location} is no usable URL")
        if isinstance(error, requests.exceptions.ProxyError):
            return Broken("the proxy cannot be used", connected=False)
        for cause in _chain(error):
            if isinstance(cause, socket.gaierror):
                return Broken("the host name is not known", connected=False)
            if isinstance(cause, ConnectionRefusedError):
                return Broken("connection refused, nothing listens there", connected=False)
        for cause in _chain(error):
            if isinstance(cause, urllib3.exceptions.ConnectTimeoutError) and not isinstance(cause, urllib3.exceptions.NewConnectionError):
                return Broken("no answer in time", connected=False)
            if isinstance(cause, TimeoutError | urllib3.exceptions.TimeoutError):
                return Broken(f"nothing came or went in time ({self.options.idle_timeout_s:g} s)")
        if isinstance(error, requests.exceptions.SSLError):
            return Broken("the TLS connection failed")
        for cause in _chain(error):
            if isinstance(cause, urllib3.exceptions.NewConnectionError):
                return Broken("it cannot be reached", connected=False)
        return Broken("the connection broke")

    def request(
        self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: Any = None, answer_s: float | None = None
    ) -> requests.Response:
        """One exchange, redirects followed, up to the head of the answer; whatever its status.

        Args:
            body: None, bytes, or an object with `read` and `__len__`, which is asked to `rewind` before a redirect.
            answer_s: how long the answer may take when all is sent; None: the idle limit.

        Raises:
            Broken: it may be tried again.
            RemoteRefused: a certificate, a redirect that is not followed.
        """
        follow = (301, 302, 303, 307, 308) if method in ("GET", "HEAD") else (307, 308)
        for _ in range(REDIRECTS + 1):
            sent = dict(headers or {})
            if origin(url) == self._origin:
                sent.update(self._secret)
            payload = _Body(self, body, answer_s) if body is not None else None
            if payload is None and method in ("POST", "PATCH", "PUT"):
                sent["Content-Length"] = "0"
            self.guard(answer_s if payload is None else None)
            timeout = (self.options.connect_timeout_s, max(self.options.idle_timeout_s, answer_s or 0.0))
            try:
                response = self._session.request(
                    method, url, headers=sent, data=payload, stream=True, allow_redirects=False, timeout=timeout, verify=self._verify, cert=self._cert
                )
            except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                raise self.broken(error) from None
            finally:
                self.watch.disarm()
            if response.status_code not in follow or "Location" not in response.headers:
                return response
            response.close()
            url = self._redirected(url, response.headers["Location"])
        raise RemoteRefused(f"{self.location} redirects more than {REDIRECTS} times")

    def _redirected(self, old: str, to: str) -> str:
        try:
            new = urljoin(old, to)
            parts = urlsplit(new)
            host, _ = parts.hostname, parts.port
        except ValueError:
            raise RemoteRefused(f"{self.location} redirects to something that is no URL") from None
        if parts.scheme not in ("http", "https") or not host or parts.username is not None:
            raise RemoteRefused(f"{self.location} redirects to something that is not https")
        if parts.scheme == "http" and urlsplit(old).scheme == "https":
            raise RemoteRefused(f"{self.location} redirects from https to http, which anybody on the way could read", hint="use the URL it should be")
        if parts.scheme == "http" and not self.options.insecure and not is_loopback(host):
            raise RemoteRefused(f"{self.location} redirects to http on another host", hint="--insecure allows that")
        return new

    def refusal(self, response: requests.Response, what: str) -> Exception:
        """The exception for an answer that is no success; its connection is given back."""
        status = response.status_code
        said, code = self._said(response)
        detail = f": {said}" if said else ""
        if status in _AGAIN or (status >= 500 and status not in (501, 505, 507)):
            return Broken(f"{what}: it answered {status}{detail}", after_s=_retry_after(response))
        reason, hint = _REASONS.get(status, (f"it answered {status}", None))
        if status == 401 and "Authorization" in self._secret:
            reason, hint = "it does not accept the token (401)", "is it the right one, and still valid?"
        kind = _CODES.get(code, RemoteRefused) if status == 422 else RemoteRefused
        return kind(f"{self.location} refused {what}: {reason}{detail}", hint=hint)

    def _said(self, response: requests.Response) -> tuple[str, str]:
        """A line of what the answer says, and its code, if it is a problem document."""
        data = self.small(response)
        if not response.headers.get("Content-Type", "").startswith("application/problem+json"):
            return "", ""
        try:
            problem = json.loads(data)
        except (ValueError, RecursionError):
            return "", ""
        if not isinstance(problem, dict):
            return "", ""
        text = problem.get("detail") or problem.get("title") or ""
        return line(text), problem["code"] if isinstance(problem.get("code"), str) else ""

    def small(self, response: requests.Response) -> bytes:
        """The content of an answer that should be small; what is more is not read. b"" when it does not come whole."""
        data = bytearray()
        try:
            self.guard()
            while len(data) <= _ERROR_BYTES and (piece := response.raw.read(8192, decode_content=False)):
                data += piece
        except (urllib3.exceptions.HTTPError, OSError, ValueError):
            data.clear()
        finally:
            self.watch.disarm()
            response.close()  # which keeps the connection when all was read
        return bytes(data[:_ERROR_BYTES])


class _Body:
    """What is sent, in blocks, each of them in its time."""

    def __init__(self, wire: Wire, source: Any, answer_s: float | None) -> None:
        self._wire = wire
        self._view = memoryview(source) if isinstance(source, bytes | bytearray | memoryview) else None
        self._file: Any = None if self._view is not None else source
        self._length = len(source)
        self._answer_s = answer_s
        self._sent = 0
        if self._file is not None:
            self._file.rewind()

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterable[bytes]:
        raise TypeError("it is read")

    def read(self, size: int = -1) -> bytes:
        done = self._sent >= self._length
        self._wire.guard(self._answer_s if done else None)
        size = min(BLOCK_BYTES if size is None or size < 0 else size, self._length - self._sent)
        piece: bytes = bytes(self._view[self._sent : self._sent + size]) if self._view is not None else self._file.read(size)
        self._sent += len(piece)
        return piece


def _adapter(wire: Wire) -> HTTPAdapter:
    class Noticed:
        """A connection that tells the wire of itself, and reads an answer that came before all was sent (a 413, say)."""

        def connect(self) -> None:
            super().connect()  # type: ignore[misc]
            wire.opened(self)

        def send(self, data: Any) -> None:
            wire.opened(self)
            try:
                super().send(data)  # type: ignore[misc]
            except (ConnectionResetError, ssl.SSLEOFError, ssl.SSLZeroReturnError):
                # urllib3 goes on to read the answer after this one.
                raise BrokenPipeError from None

    class Plain(Noticed, HTTPConnection):
        pass

    class Secure(Noticed, HTTPSConnection):
        pass

    class PlainPool(HTTPConnectionPool):
        ConnectionCls = Plain

    class SecurePool(HTTPSConnectionPool):
        ConnectionCls = Secure

    class Adapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **more: Any) -> None:
            if wire.options.fingerprint:
                more["assert_fingerprint"] = wire.options.fingerprint.removeprefix("sha256:")
            super().init_poolmanager(*args, blocksize=BLOCK_BYTES, **more)
            self.poolmanager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}

        def proxy_manager_for(self, *args: Any, **more: Any) -> Any:
            manager = super().proxy_manager_for(*args, **more)
            manager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}
            return manager

    return Adapter(max_retries=0)


def _authorities() -> str | bool:
    """The system's certificate authorities; requests' own when the system has none."""
    paths = ssl.get_default_verify_paths()
    return paths.cafile or paths.capath or True


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    waiting: list[Any] = [error]
    while waiting and len(found) < 20:
        one = waiting.pop(0)
        if isinstance(one, BaseException) and one not in found:
            found.append(one)
            waiting += [getattr(one, "reason", None), *one.args, one.__cause__, one.__context__]
    return found


def _retry_after(response: requests.Response) -> float | None:
    value = response.headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,6}", value):
        return float(value)
    from email.utils import parsedate_to_datetime

    with suppress(ValueError, TypeError, OverflowError):
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    return None


def line(text: object, limit: int = 200) -> str:
    """What another host said, fit for a message: one line, printable, short."""
    if not isinstance(text, str):
        return ""
    return "".join(c if c.isprintable() else " " for c in text)[:limit].strip()


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or (443 if parts.scheme == "https" else 80)
