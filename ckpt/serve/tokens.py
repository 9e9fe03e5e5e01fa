"""Tokens: who may do what, so many times, until when. The store keeps their hashes only, in `serve/tokens.json` (0600).

A token is `ckpt_ID_SECRET`; the secret has 256 bits, so a plain SHA-256 of it can be kept. A use begins with what it is bound to (an upload,
a migration, a checkpoint that is read): that one may be gone on with until it is finished, also over other connections, and counts once.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ckpt.errors import ConfigError, TargetNotFound, UsageError
from ckpt.store import durable

PERMISSIONS: Final = ("upload", "download", "migrate")
MAX_TOKENS: Final = 1000
MAX_USES: Final = 1000
_FORM: Final = re.compile(r"ckpt_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_MAX_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Token:
    """What is known of a token; `claims` maps what it was used for to "open" or "done"."""

    id: str
    digest: str
    allow: tuple[str, ...]
    uses: int
    created_s: float
    expires_s: float
    claims: dict[str, str]

    @property
    def used_up(self) -> bool:
        return len(self.claims) >= self.uses and all(state == "done" for state in self.claims.values())

    def expired(self, now_s: float) -> bool:
        return now_s >= self.expires_s

    def to_json(self) -> dict[str, Any]:
        return {
            "digest": self.digest,
            "allow": list(self.allow),
            "uses": self.uses,
            "created_s": self.created_s,
            "expires_s": self.expires_s,
            "claims": self.claims,
        }


class Tokens:
    """The tokens of a store. Every call reads the file anew: `ckpt serve token` works beside a running server.

    Args:
        root: the store's directory.
    """

    def __init__(self, root: Path, *, now: Callable[[], float] = time.time) -> None:
        self._path = root / "serve" / "tokens.json"
        self._now = now

    def new(self, *, uses: int = 1, expires_s: float = 3600.0, allow: Collection[str] = ("upload", "migrate")) -> tuple[Token, str]:
        """A new token and its text, which is not kept.

        Args:
            expires_s: seconds from now.

        Raises:
            UsageError: a permission that there is not, no use at all, or too many tokens.
        """
        unknown = sorted(set(allow) - set(PERMISSIONS))
        if unknown or not allow:
            raise UsageError(f"no permission is called {unknown[0]!r}" if unknown else "a token that allows nothing", hint=", ".join(PERMISSIONS))
        if not 1 <= uses <= MAX_USES:
            raise UsageError(f"a token can be used 1 to {MAX_USES} times")
        secret = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")
        now_s = self._now()
        made = Token(
            secrets.token_hex(6), _digest(secret), tuple(p for p in PERMISSIONS if p in allow), uses, now_s, now_s + expires_s, {}
        )
        with self._changing() as known:
            if len(known) >= MAX_TOKENS:
                raise UsageError(f"there are {MAX_TOKENS} tokens already", hint="ckpt serve token revoke")
            known[made.id] = made
        return made, f"ckpt_{made.id}_{secret}"

    def all(self) -> list[Token]:
        """Those that may still be used, oldest first."""
        return [token for token in sorted(self._read().values(), key=lambda token: token.created_s) if self._alive(token)]

    def revoke(self, identity: str) -> None:
        """Forget a token. Raises TargetNotFound when there is none."""
        with self._changing() as known:
            if known.pop(identity, None) is None:
                raise TargetNotFound(f"there is no token {identity!r}", hint="ckpt serve token list")

    def verify(self, text: str) -> Token | None:
        """The token that `text` is, when it has not expired; None for anything else. Takes as long for a wrong secret as for a right one."""
        form = _FORM.fullmatch(text)
        known = self._read().get(form[1]) if form else None
        right = hmac.compare_digest(_digest(form[2] if form else ""), known.digest if known else "0" * 64)
        return known if known is not None and right and not known.expired(self._now()) else None

    def claim(self, identity: str, use: str) -> str:
        """Begin a use, or go on with it.

        Returns:
            "open"; "done" when this very use is over; "" when the token is used up or gone.
        """
        with self._changing() as known:
            token = known.get(identity)
            if token is None or token.expired(self._now()):
                return ""
            if use not in token.claims:
                if len(token.claims) >= token.uses:
                    return ""
                token.claims[use] = "open"
            return token.claims[use]

    def finish(self, identity: str, use: str) -> None:
        """The use was made: it does not come back."""
        with self._changing() as known:
            if identity in known:
                known[identity].claims[use] = "done"

    def release(self, identity: str, use: str) -> None:
        """The use came to nothing and does not count."""
        with self._changing() as known:
            if identity in known and known[identity].claims.get(use) == "open":
                del known[identity].claims[use]

    def _alive(self, token: Token) -> bool:
        return not token.expired(self._now()) and not token.used_up

    def _read(self) -> dict[str, Token]:
        try:
            with self._path.open("rb") as file:
                values = json.loads(file.read(_MAX_BYTES))
            return {
                str(identity): Token(
                    str(identity),
                    str(value["digest"]),
                    tuple(map(str, value["allow"])),
                    int(value["uses"]),
                    float(value["created_s"]),
                    float(value["expires_s"]),
                    {str(use): str(state) for use, state in value["claims"].items()},
                )
                for identity, value in values.items()
            }
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{self._path} is damaged", hint="remove it, and make new tokens") from error

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Token]]:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(self._path.parent / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self._read()
            # Whatever was used up stays until it expires: its last answer may be asked for again.
            known = {identity: token for identity, token in before.items() if not token.expired(self._now())}
            old = json.dumps({identity: token.to_json() for identity, token in before.items()})
            yield known
            text = json.dumps({identity: token.to_json() for identity, token in known.items()})
            if text != old:
                durable.write_file(self._path, text.encode())
        finally:
            os.close(lock)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
