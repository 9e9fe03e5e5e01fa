"""Authorization at a registry: challenges, basic and bearer.

Source: OCI distribution-spec 1.1; the token protocol: distribution's docs/spec/auth (token.md, oauth.md); RFC 9110 section 11.6.1.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Protocol
from urllib.parse import urlencode, urlsplit

from ckpt.errors import RemoteRefused
from ckpt.transports._oci_credentials import Credentials

_PARAM: Final = re.compile(r'\s*,?\s*([A-Za-z0-9_-]{1,32})\s*=\s*(?:"((?:[^"\\]|\\.)*)"|([^\s",]*))')
_SCHEME: Final = re.compile(r"\s*,?\s*(Basic|Bearer)(?=\s|\Z)", re.IGNORECASE)
_OTHER: Final = re.compile(r"\s*,?\s*[A-Za-z0-9_-]{1,32}(?=\s|\Z)\s*")
_MAX_TOKEN: Final = 64 << 10
_EARLY_S: Final = 10.0
"""A token is replaced so long before its end."""
_DEFAULT_LIFE_S: Final = 60.0
"""What a token's life is when nobody says (token.md)."""


class Asked(Protocol):
    """An answer of the token server."""

    @property
    def status(self) -> int: ...

    @property
    def body(self) -> bytes: ...


Fetch = Callable[[str, str, dict[str, str], bytes | None], Asked]
"""(method, URL, headers, body) -> answer, without any authorization of its own."""


def challenges(header: str) -> list[tuple[str, dict[str, str]]]:
    """The (scheme, parameters) of a WWW-Authenticate header; several may stand in one, separated by commas. Schemes but ours are left out."""
    found: list[tuple[str, dict[str, str]]] = []
    position, header = 0, header[:8192]
    current: dict[str, str] | None = None
    while position < len(header):
        if match := _SCHEME.match(header, position):
            current = {}
            found.append((match[1].lower(), current))
        elif match := _PARAM.match(header, position):
            if current is not None:
                value = re.sub(r"\\(.)", r"\1", match[2]) if match[2] is not None else match[3]
                current.setdefault(match[1].lower(), value)
        elif match := _OTHER.match(header, position):
            current = None
        else:
            break
        position = match.end()
    return found


@dataclass(slots=True)
class Authorizer:
    """What is sent as Authorization to one registry for one repository.

    `plain_allowed`: the registry itself is reached in clear text, so its token server may be. Credentials are looked for when the
    registry asks for some, not before.
    """

    registry: str
    repository: str
    actions: str
    credentials: Callable[[], Credentials | None]
    fetch: Fetch
    plain_allowed: bool = False
    clock: Callable[[], float] = time.monotonic
    _header: str = field(default="", repr=False)
    _until_s: float = float("inf")
    _challenge: dict[str, str] | None = None
    _known: list[Credentials | None] = field(default_factory=list, repr=False)

    def header(self) -> str:
        """The header's value, "" when nobody asked for one yet; a token near its end is replaced first."""
        if self._challenge is not None and self.clock() >= self._until_s:
            self._token(self._challenge)
        return self._header

    def answer(self, header: str) -> bool:
        """Answer a 401. False: there is nothing (more) that could be sent.

        Raises:
            RemoteRefused: the token server says no, or is at a place where credentials are not sent to.
        """
        offered = challenges(header)
        for scheme, parameters in offered:
            if scheme == "bearer" and parameters.get("realm"):
                self._token(parameters)
                return True
        for scheme, _ in offered:
            if scheme == "basic" and (found := self._credentials()) and found.user:
                same = self._header == found.basic
                self._header, self._challenge = found.basic, None
                return not same
        return False

    def _credentials(self) -> Credentials | None:
        if not self._known:
            self._known.append(self.credentials())
        return self._known[0]

    @property
    def origin(self) -> str:
        """Where the credentials in use came from, "" for none."""
        found = self._known[0] if self._known else None
        return found.origin if found else ""

    def _token(self, parameters: dict[str, str]) -> None:
        realm = parameters["realm"]
        self._check_realm(realm)
        scope = parameters.get("scope") or f"repository:{self.repository}:{self.actions}"
        wanted = {"service": parameters["service"]} if parameters.get("service") else {}
        wanted["scope"] = scope
        found = self._credentials()
        if found and found.identity_token:
            form = {"grant_type": "refresh_token", "client_id": "ckpt", "refresh_token": found.identity_token, **wanted}
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            said = self.fetch("POST", realm, headers, urlencode(form).encode())
        else:
            url = realm + ("&" if urlsplit(realm).query else "?") + urlencode(wanted)
            said = self.fetch("GET", url, {"Authorization": found.basic} if found else {}, None)
        if said.status in (401, 403):
            raise self.refused()
        if said.status != 200:
            raise RemoteRefused(f"the token server of {self.registry} answered with HTTP status {said.status}")
        token, life_s = _read_token(said.body, self.registry)
        self._header = f"Bearer {token}"
        self._challenge = {**parameters, "scope": scope}
        self._until_s = self.clock() + max(life_s - _EARLY_S, life_s / 2)

    def refused(self) -> RemoteRefused:
        """The error when the registry does not let us do it."""
        what = "written to" if "push" in self.actions else "read"
        message = f"{self.registry} does not let {self.repository} be {what}"
        if self.origin:
            return RemoteRefused(f"{message} with the credentials in {self.origin}", hint=f"log in again: podman login {self.registry}")
        return RemoteRefused(f"{message} without credentials", hint=f"podman login {self.registry}")

    def _check_realm(self, realm: str) -> None:
        try:
            parts = urlsplit(realm)
            host, _ = parts.hostname, parts.port
        except ValueError:
            host = None
        if not host or parts.username is not None or len(realm) > 4096 or not realm.isprintable():
            raise RemoteRefused(f"{self.registry} names no usable token server")
        if parts.scheme != "https" and not (parts.scheme == "http" and self.plain_allowed):
            raise RemoteRefused(f"{self.registry} wants the credentials sent in clear text, to {host}", hint="nothing was sent")


def _read_token(body: bytes, registry: str) -> tuple[str, float]:
    try:
        said: Any = json.loads(body)
    except (ValueError, RecursionError):
        said = None
    token = (said.get("token") or said.get("access_token")) if isinstance(said, dict) else None
    if not isinstance(token, str) or not token.isascii() or not token.isprintable() or " " in token or len(token) > _MAX_TOKEN:
        raise RemoteRefused(f"the token server of {registry} gave no token")
    life = said.get("expires_in")
    good = isinstance(life, (int, float)) and not isinstance(life, bool) and 0 < life < 1e9
    return token, float(life) if good else _DEFAULT_LIFE_S
