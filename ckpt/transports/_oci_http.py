"""HTTP to one registry: TLS, clear text only where allowed, authorization only to the registry itself, limits, errors as ours.

No redirect is followed but by `get` (a registry sends readers of blobs to its object storage), none of them to clear text, and what
another host gets has no Authorization. Nothing here shows a query: it may be a signature.
"""

from __future__ import annotations

import http.client
import http.cookiejar
import json
import logging
import re
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urljoin, urlsplit

import requests
import requests.adapters
import requests.utils
import urllib3.exceptions

from ckpt import __version__
from ckpt.errors import CkptError, NoSpace, RemoteRefused, TransferFailed, UsageError
from ckpt.transports import _oci_credentials
from ckpt.transports._oci_auth import Authorizer
from ckpt.transports._oci_name import SCHEME, Reference
from ckpt.transports._oci_tls import Adapter, Session, tls
from ckpt.transports._patience import Broken, Patience
from ckpt.transports.base import CarrierOptions, Location

LEAST_BYTES_S: Final = 16 << 10
"""What goes or comes slower than this is a dead link, or somebody who means ill."""
SMALL_BYTES: Final = 4 << 20
"""A manifest's limit (distribution-spec: registries take at least so much), and that of every other small answer."""
_FAILURES: Final = (requests.RequestException, urllib3.exceptions.HTTPError, http.client.HTTPException, OSError)
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_MAX_REDIRECTS: Final = 5
_BUSY: Final = (408, 425, 429, 500, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer with its (small) body."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    url: str

    def said(self) -> str:
        """What the registry says about an error, one line, safe to show; "" for nothing."""
        try:
            first = json.loads(self.body)["errors"][0]
            text = f"{first.get('code') or ''}: {first.get('message') or ''}"
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return ""
        text = re.sub(r"https?://\S+", "(URL)", text)
        return " ".join("".join(c if c.isprintable() else " " for c in text[:300]).split()).strip(": ")


@dataclass(slots=True)
class Client:
    """Requests to the registry of one repository, by one thread at a time. `actions` are those to ask a token for: "pull" or "pull,push"."""

    reference: Reference
    options: CarrierOptions
    actions: str = "pull"
    stop: threading.Event = field(default_factory=threading.Event)
    base: str = ""
    _session: requests.Session = field(init=False)
    _auth: Authorizer = field(init=False)
    _until_s: float | None = field(init=False)

    def __post_init__(self) -> None:
        if self.options.token_file or self.options.token_command or self.options.header_file:
            raise UsageError("a registry takes no token and no headers", hint=f"credentials come from podman login {self.reference.registry}")
        session = Session()
        session.cookies.set_policy(http.cookiejar.DefaultCookiePolicy(allowed_domains=[]))
        session.trust_env = False  # else ~/.netrc would go wherever a redirect leads
        session.mount("https://", Adapter(tls(self.reference, self.options)))
        session.mount("http://", Adapter(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)))
        if self.options.fingerprint:  # of the registry's own certificate, not of its token server's or its storage's
            pinned = Adapter(tls(self.reference, self.options), self.options.fingerprint.removeprefix("sha256:"))
            session.mount(f"https://{self.reference.endpoint}/", pinned)
        logging.getLogger("urllib3").setLevel(logging.CRITICAL)  # it logs paths with their queries
        session.headers.update({"User-Agent": f"ckpt/{__version__}", "Accept-Encoding": "identity"})
        self._session = session
        self._auth = Authorizer(
            self.reference.registry, self.reference.repository, self.actions, lambda: _oci_credentials.find(self.reference), self._fetch
        )
        total = self.options.total_timeout_s
        self._until_s = time.monotonic() + total if total is not None else None

    def close(self) -> None:
        self._session.close()

    # -- where it is ---------------------------------------------------------------------------------------------------------------

    @property
    def plain(self) -> bool:
        """Whether the registry is spoken to in clear text."""
        return self.base.startswith("http:")

    def connect(self) -> None:
        """Find out how the registry is reached: TLS; clear text only on this host or with `insecure`, and only if there is no TLS.

        Raises:
            CannotConnect, RemoteRefused: it is not there, or is no registry.
        """
        if self.base:
            return
        maybe_plain = self.reference.is_loopback or self.options.insecure
        retry = self.retry()
        while not self.base:
            try:
                self._ping(maybe_plain)
            except Broken as broken:
                retry.wait(broken)

    def _ping(self, maybe_plain: bool) -> None:
        try:
            answer = self._once("GET", f"https://{self.reference.endpoint}/v2/", {}, None, None)
            self.base = f"https://{self.reference.endpoint}"
        except _NoTls as error:
            if not maybe_plain:
                raise RemoteRefused(
                    f"{self.reference.registry} speaks no TLS", hint="--insecure allows clear text, where the network can be trusted"
                ) from error
            answer = self._once("GET", f"http://{self.reference.endpoint}/v2/", {}, None, None)
            self.base = f"http://{self.reference.endpoint}"
            self._auth.plain_allowed = True
        if answer.status not in (200, 401, 403):
            self.base = ""
            if answer.status in _BUSY:
                raise _busy(answer)
            raise RemoteRefused(f"{self.reference.registry} is no registry: HTTP status {answer.status} for /v2/")
        if answer.status == 401:
            self._auth.answer(answer.headers.get("WWW-Authenticate", ""))

    def url(self, path: str) -> str:
        """An URL of the repository: `blobs/uploads/`."""
        return f"{self.base}/v2/{self.reference.repository}/{path}"

    def follow(self, location: str, base: str) -> str:
        """Where a Location leads, absolute. Raises RemoteRefused for what is not gone to: clear text, other schemes, user information."""
        try:
            url = urljoin(base, location)
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host, url, parts = None, "", urlsplit("")
        if not location or not host or len(url) > 16384 or not location.isprintable() or parts.username is not None:
            raise RemoteRefused(f"{self.reference.registry} sent no usable Location")
        if parts.scheme != "https" and not (self.plain and parts.scheme == "http" and self._is_ours(url)):
            raise RemoteRefused(f"{self.reference.registry} sends us on to {parts.scheme or 'nowhere'}://{host}, which is not TLS", hint="refused")
        return url

    def _is_ours(self, url: str) -> bool:
        def origin(text: str) -> tuple[str, str | None, int | None]:
            parts = urlsplit(text)
            return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)

        return bool(self.base) and origin(url) == origin(self.base)

    # -- requests ------------------------------------------------------------------------------------------------------------------

    def retry(self) -> Patience:
        """A fresh account of tries, within the limits of the options; `stop` ends it."""
        patience = Patience(Location(SCHEME, "", str(self.reference)), self.options)
        patience.stopped = self.stop
        return patience

    def call(self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: Any = None, idle_s: float | None = None) -> Answer:
        """One request and its small answer; a 401 is answered once.

        Raises:
            Broken: the connection failed, or the other end is too busy.
            RemoteRefused: not authorized, or a certificate that is not trusted.
        """
        answer = self._once(method, url, self._authorized(url, headers), body, idle_s)
        if answer.status == 401 and self._is_ours(url):
            if not self._auth.answer(answer.headers.get("WWW-Authenticate", "")):
                raise self._auth.refused()
            answer = self._once(method, url, self._authorized(url, headers), body, idle_s)
        if answer.status in (401, 403):
            if answer.status == 401 or not answer.said():
                raise self._auth.refused()
            raise RemoteRefused(f"{self._auth.refused().message}: {answer.said()}", hint=self._auth.refused().hint)
        if answer.status in _BUSY:
            raise _busy(answer)
        return answer

    def patient(self, method: str, url: str, *, headers: Mapping[str, str] | None = None, body: Any = None) -> Answer:
        """`call` for what may be asked again, until the time is over. Raises TransferFailed, CannotConnect besides."""
        retry = self.retry()
        while True:
            try:
                return self.call(method, url, headers=headers, body=body)
            except Broken as broken:
                retry.wait(broken)

    def get(self, url: str, headers: Mapping[str, str]) -> requests.Response:
        """GET of something large, with redirects; the answer (200, 206, 404 or 416) is to be read within `speaking`. Raises as `call`."""
        answered = False
        for _ in range(_MAX_REDIRECTS + 2):
            with speaking(self.reference.registry):
                response = self._send("GET", url, self._authorized(url, headers), None, None)
            status = response.status_code
            if status in (200, 206, 404, 416):
                return response
            with response:
                if status == 401 and self._is_ours(url) and not answered:
                    answered = True
                    if not self._auth.answer(response.headers.get("WWW-Authenticate", "")):
                        raise self._auth.refused()
                elif status in _REDIRECTS:
                    url = self.follow(response.headers.get("Location", ""), url)
                elif status in (401, 403):
                    raise self._auth.refused() if self._is_ours(url) else RemoteRefused(f"{_host(url)} refuses us: HTTP status {status}")
                else:
                    with speaking(self.reference.registry):
                        answer = self.small(response)
                    raise _busy(answer) if status in _BUSY else self.refusal(answer, "it cannot be read")
        raise RemoteRefused(f"{self.reference.registry} sends us around in circles")

    def _authorized(self, url: str, headers: Mapping[str, str] | None) -> dict[str, str]:
        found = dict(headers or {})
        if self._is_ours(url) and (value := self._auth.header()):
            found["Authorization"] = value
        return found

    def _once(self, method: str, url: str, headers: Mapping[str, str], body: Any, idle_s: float | None) -> Answer:
        with speaking(self.reference.registry), self._send(method, url, headers, body, idle_s) as response:
            return self.small(response)

    def _send(self, method: str, url: str, headers: Mapping[str, str], body: Any, idle_s: float | None) -> requests.Response:
        proxies = {} if self.reference.is_loopback else requests.utils.get_environ_proxies(url)
        limits = (self.options.connect_timeout_s, idle_s if idle_s is not None else self.options.idle_timeout_s)
        if self._until_s is not None and time.monotonic() > self._until_s:
            raise TransferFailed(f"not done within {self.options.total_timeout_s:g} s", hint="allow more time")
        sending_s = len(body) / LEAST_BYTES_S if body else 0.0
        with self.within(url, 2 * limits[0] + limits[1] + sending_s):
            return self._session.request(
                method, url, headers=dict(headers), data=body, timeout=limits, allow_redirects=False, stream=True, proxies=proxies, verify=True
            )

    @contextmanager
    def within(self, url: str, limit_s: float) -> Iterator[None]:
        """Cut the connection to a URL if this takes longer: a byte now and then would hold up everything for ever."""
        adapter = self._session.get_adapter(url)
        assert isinstance(adapter, Adapter)
        timer = threading.Timer(limit_s, adapter.cut)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def small(self, response: requests.Response) -> Answer:
        """The whole body, if it is small and comes within the idle limit; to be called within `speaking`."""
        parts: list[bytes] = []
        size = 0
        with self.within(response.url or self.base, self.options.idle_timeout_s):
            while piece := response.raw.read(64 << 10, decode_content=False):
                parts.append(piece)
                size += len(piece)
                if size > SMALL_BYTES:
                    raise RemoteRefused(f"{self.reference.registry} answers with more than {SMALL_BYTES >> 20} MiB where a small answer is due")
        return Answer(response.status_code, response.headers, b"".join(parts), response.url or "")

    def _fetch(self, method: str, url: str, headers: dict[str, str], body: bytes | None) -> Answer:
        """Ask the token server; no redirect there either."""
        answer = self._once(method, url, headers, body, None)
        if answer.status in _BUSY:
            raise _busy(answer)
        return answer

    def refusal(self, answer: Answer, what: str) -> CkptError:
        """The error for a status that nobody expected."""
        said = answer.said()
        text = f"{what}: {self.reference.registry} answers with HTTP status {answer.status}" + (f" ({said})" if said else "")
        if answer.status == 507:
            return NoSpace(text)
        return RemoteRefused(text)


class _NoTls(Broken):
    """The other end answered a TLS greeting with something else."""


def _host(url: str) -> str:
    return urlsplit(url).hostname or "?"


def _busy(answer: Answer) -> Broken:
    after = answer.headers.get("Retry-After", "")
    return Broken(f"HTTP status {answer.status}", after_s=float(after) if after.isascii() and after.isdigit() and len(after) < 9 else None)


@contextmanager
def speaking(registry: str) -> Iterator[None]:
    """Failures of the connection as Broken, those of TLS for good."""
    try:
        yield
    except _FAILURES as error:
        raise _explained(error, registry) from error


def _explained(error: BaseException, registry: str) -> Exception:
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text or "doesn't match" in text:
        reason = re.search(r"certificate verify failed: ([^(\"']{1,120})", text)
        return RemoteRefused(
            f"the certificate of {registry} is not trusted" + (f": {reason[1].strip()}" if reason else ""),
            hint=f"put its authority into /etc/containers/certs.d/{registry}/ca.crt",
        )
    if "ingerprint" in text:
        return RemoteRefused(f"{registry} has another certificate than the one with this fingerprint")
    if any(word in text for word in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE")):
        return _NoTls("it speaks no TLS")
    if "TLSV13_ALERT_CERTIFICATE_REQUIRED" in text or "ALERT_BAD_CERTIFICATE" in text:
        return RemoteRefused(f"{registry} wants a client certificate")
    if isinstance(error, requests.ConnectTimeout) or "NameResolutionError" in text or "Connection refused" in text or "unreachable" in text:
        why = "no address for its name" if "NameResolution" in text else "connection refused" if "refused" in text else "no way there"
        return Broken(why, connected=False)
    if isinstance(error, (requests.Timeout, TimeoutError)) or "timed out" in text:
        return Broken("it fell silent")
    return Broken("the connection broke")
