"""The way to `ckpt peer` behind a `ckpt serve`: one TLS connection, upgraded by HTTP (RFC 9110, 7.8) to the bare peer protocol.

The request is `GET /peer` with `Upgrade: ckpt-peer`; the answer 101. From then on the connection carries frames and nothing else.
"""

from __future__ import annotations

import errno
import json
import secrets
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from ckpt import __version__
from ckpt.errors import BusyError, CannotConnect, CkptError, KeyProblem, NoSpace, RemoteRefused, UsageError
from ckpt.transports import _secrets, https_pins

if TYPE_CHECKING:
    import ssl

DEFAULT_PORT: Final = 7443
PROTOCOL: Final = "ckpt-peer"
_MAX_HEAD_BYTES: Final = 32 << 10
_MAX_BODY_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Access:
    """How a server is known, and how we are known to it. Names of files only: it is kept in the job's journal for --continue."""

    fingerprint: str | None = None
    """The server's certificate; None: as remembered, else by the authorities."""
    ca: str | None = None
    """File with the authorities to trust instead of the system's."""
    certificate: str | None = None
    key: str | None = None
    token_file: str | None = None
    token_command: tuple[str, ...] = ()
    session: str = field(default_factory=lambda: secrets.token_hex(16))
    """Binds a single-use token to this migration: who has the token alone cannot go on with it."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | None) -> Access | None:
        """What `to_json` gave; keys of other versions are ignored."""
        if not value:
            return None
        known = {one.name for one in fields(cls)}
        taken = {key: text for key, text in value.items() if key in known}
        return cls(**{**taken, "token_command": tuple(taken.get("token_command", ()))})

    def token(self) -> str | None:
        """The token from its file or command; None without one. Raises KeyProblem."""
        return _secrets.token(Path(self.token_file) if self.token_file is not None else None, self.token_command)


@dataclass(frozen=True, slots=True)
class Server:
    """The HOST:PORT of an `https://` destination."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Server:
        """Read `https://HOST[:PORT]`. Raises UsageError for anything more."""
        try:
            parts = urlsplit(text)
            port = parts.port or 443
        except ValueError as error:
            raise _bad(text, str(error)) from None
        if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/") or parts.query or parts.fragment:
            raise _bad(text, "it is https:// with a host and a port, and nothing else")
        if parts.username is not None or parts.password is not None:
            raise UsageError("secrets do not belong in an address", hint="use --token-file")
        if any(c <= " " or c in "\\\"'<>|" or c == "\x7f" for c in parts.hostname):
            raise _bad(text, "the host name is not usable")
        return cls(parts.hostname, port)

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_https(destination: str) -> bool:
    """True for a destination that is reached by this module."""
    return destination[:8].lower() == "https://"


def _bad(text: str, why: str) -> UsageError:
    return UsageError(f"not a destination: {text!r} ({why})", hint=f"write it as https://b:{DEFAULT_PORT}")


class TlsDuplexWire:
    """A TLS connection for a reader beside a writer (see peer.wires.Wire): OpenSSL allows one at a time, so they take turns.

    Args:
        first: bytes that were read already.
    """

    def __init__(self, sock: ssl.SSLSocket, first: bytes = b"") -> None:
        self._sock = sock
        self._first = memoryview(first)
        self._turn = threading.Lock()

    def fileno(self) -> int:
        return self._sock.fileno()

    def read(self, view: memoryview) -> int:
        import ssl

        if self._first:
            count = min(len(view), len(self._first))
            view[:count] = self._first[:count]
            self._first = self._first[count:]
            return count
        try:
            with self._turn:
                return self._sock.recv_into(view)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
            return 0
        except ssl.SSLError as error:
            raise OSError(errno.EIO, f"TLS failed: {error.reason}") from None

    def write(self, parts: Sequence[memoryview]) -> int:
        import ssl

        try:
            with self._turn:
                return self._sock.send(parts[0])
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None
        except ssl.SSLError as error:
            raise OSError(errno.EPIPE, f"TLS failed: {error.reason}") from None

    def close(self) -> None:
        self._sock.close()


def context(access: Access, *, pinned: bool) -> ssl.SSLContext:
    """TLS towards a server. With `pinned` its certificate is compared by the caller, else the authorities vouch for it.

    Raises:
        KeyProblem: the client's certificate or the file of authorities cannot be used.
    """
    import ssl

    if pinned:
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        made.check_hostname = False
        made.verify_mode = ssl.CERT_NONE
    else:
        try:
            made = ssl.create_default_context(cafile=access.ca)
        except (OSError, ssl.SSLError) as error:
            raise KeyProblem(f"cannot use the authorities in {access.ca}: {error}") from error
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    if access.certificate is not None:
        try:
            # Without a password a key that has one would make OpenSSL ask for it on the terminal.
            made.load_cert_chain(access.certificate, access.key, password=lambda: b"")
        except (OSError, ssl.SSLError) as error:
            raise KeyProblem(f"cannot use the client certificate {access.certificate}: {error}") from error
    return made


def connect(destination: str, access: Access, *, timeout_s: float = 20.0, purpose: str = "migrate") -> TlsDuplexWire:
    """A wire to a `ckpt peer` that the server starts for us.

    Args:
        timeout_s: for every step until the server's answer.
        purpose: "migrate", or "check" for questions only (that uses up no token).

    Raises:
        UsageError: the destination is not usable.
        CannotConnect: trying again may help; RemoteRefused: it does not. KeyProblem: our token or certificate is not usable.
    """
    server = Server.parse(destination)
    token = access.token()
    sock = _open(server, access, timeout_s)
    try:
        host = f"[{server.host}]" if ":" in server.host else server.host
        lines = [
            "GET /peer HTTP/1.1",
            f"Host: {host}:{server.port}",
            "Connection: Upgrade",
            f"Upgrade: {PROTOCOL}",
            f"User-Agent: ckpt/{__version__}",
            f"Ckpt-Session: {access.session}",
            f"Ckpt-Purpose: {purpose}",
        ]
        if token is not None:
            lines.append(f"Authorization: Bearer {token}")
        sock.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        head, rest = _head(sock)
        status, headers = _parse(head, server)
        if status != 101:
            raise refusal(server, status, _body(sock, rest, headers))
        if headers.get("upgrade", "").lower() != PROTOCOL:
            raise RemoteRefused(f"{server} is no ckpt serve: it speaks another protocol")
        sock.setblocking(False)
        return TlsDuplexWire(sock, rest)
    except OSError as error:
        sock.close()
        raise CannotConnect(f"{server} broke off the connection: {_said(error)}", hint="its log says more; trying again may help") from error
    except BaseException:
        sock.close()
        raise


def _open(server: Server, access: Access, timeout_s: float) -> ssl.SSLSocket:
    """A connection to the server, and to no other."""
    import ssl

    wanted = access.fingerprint
    if wanted is None and access.ca is None:
        wanted = https_pins.known(str(server))
    using = context(access, pinned=wanted is not None)
    try:
        plain = socket.create_connection((server.host, server.port), timeout_s)
    except OSError as error:
        raise _unreachable(server, error) from error
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        sock = using.wrap_socket(plain, server_hostname=server.host)
    except ssl.SSLCertVerificationError as error:
        plain.close()
        raise RemoteRefused(
            f"the certificate of {server} is not trusted: {error.verify_message}",
            hint="give the fingerprint that ckpt serve printed there, once: --fingerprint sha256:...; or the authority's file: --ca FILE",
        ) from error
    except OSError as error:
        plain.close()
        raise CannotConnect(f"no TLS connection with {server}: {_said(error)}", hint="is it ckpt serve that listens there?") from error
    if wanted is not None:
        seen = https_pins.fingerprint(sock.getpeercert(binary_form=True) or b"")
        if not secrets.compare_digest(seen, wanted):
            sock.close()
            if access.fingerprint is not None:
                raise RemoteRefused(
                    f"{server} has another certificate than the fingerprint says", hint="compare it with what ckpt serve printed there"
                )
            raise RemoteRefused(
                f"the certificate of {server} has changed since it was pinned",
                hint="make sure that it is the right host, then give the fingerprint that ckpt serve prints there now: --fingerprint sha256:...",
            )
        if access.fingerprint is not None:
            https_pins.remember(str(server), wanted)
    return sock


def _unreachable(server: Server, error: OSError) -> CannotConnect:
    if isinstance(error, socket.gaierror):
        return CannotConnect(f"cannot connect to {server}: the host name is not known", hint="check its spelling")
    if isinstance(error, TimeoutError):
        return CannotConnect(f"cannot connect to {server}: it does not answer (timed out)", hint="is it up, and does a firewall let us through?")
    hint = "is ckpt serve running there, on this port?" if isinstance(error, ConnectionRefusedError) else None
    return CannotConnect(f"cannot connect to {server}: {_said(error)}", hint=hint)


def _said(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(getattr(error, "reason", None) or error.strerror or error)


def _head(sock: ssl.SSLSocket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        more = sock.recv(8192)
        if not more:
            raise ConnectionResetError(errno.ECONNRESET, "it was closed before an answer came")
        data += more
        if len(data) > _MAX_HEAD_BYTES:
            raise ConnectionResetError(errno.EPROTO, "the answer is too long")
    head, _, rest = data.partition(b"\r\n\r\n")
    return head, rest


def _parse(head: bytes, server: Server) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isascii() or not words[1].isdigit():
        raise RemoteRefused(f"{server} does not speak HTTP", hint="is it ckpt serve that listens there?")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(words[1]), headers


def _body(sock: ssl.SSLSocket, rest: bytes, headers: Mapping[str, str]) -> bytes:
    text = headers.get("content-length", "")
    length = min(int(text), _MAX_BODY_BYTES) if text.isascii() and text.isdigit() else 0
    try:
        while len(rest) < length and (more := sock.recv(8192)):
            rest += more
    except OSError:
        pass  # the status says enough
    return rest[:length]


def refusal(server: object, status: int, body: bytes) -> CkptError:
    """The error for an answer that is not the one that was hoped for, with the server's own words where it is a ckpt serve."""
    message, hint = "", None
    try:
        value = json.loads(body)
        message = "".join(c for c in str(value["message"])[:500] if c.isprintable())
        hint = "".join(c for c in str(value["hint"])[:500] if c.isprintable()) if value.get("hint") else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    said = f"{server} answered {status}" + (f": {message}" if message else "")
    if status == 507:
        return NoSpace(said, hint=hint)
    if status == 409:
        return BusyError(said, hint=hint)
    if status in (408, 425, 429) or status >= 500 and status != 501 and status != 505:
        return CannotConnect(said, hint=hint or "try again later")
    if 300 <= status < 400:
        return RemoteRefused(said, hint="it sends us elsewhere, and that is not followed: name the right address")
    if status == 401:
        hint = hint or "give a token that ckpt serve token new printed there: --token-file FILE"
    if status == 404:
        hint = hint or "is it ckpt serve that listens there?"
    return RemoteRefused(said, hint=hint)
