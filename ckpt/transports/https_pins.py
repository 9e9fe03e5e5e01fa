"""Certificates of servers that are known by their fingerprint, in a file like ssh's known_hosts.

One line a server, `HOST:PORT sha256:HEX`, in `$XDG_CONFIG_HOME/ckpt/known_servers` (0600), else in /etc/ckpt/known_servers, which is also
read. A server that was pinned once is only accepted with the same certificate.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
from pathlib import Path
from typing import Final

from ckpt import config
from ckpt.errors import UsageError
from ckpt.store import durable

SYSTEM_FILE: Final = Path("/etc/ckpt/known_servers")
_MAX_BYTES: Final = 1 << 20


def fingerprint(certificate: bytes) -> str:
    """`sha256:HEX` of a certificate (DER)."""
    return "sha256:" + hashlib.sha256(certificate).hexdigest()


def parse(text: str) -> str:
    """A fingerprint as a person types it (`sha256:` in any case or missing, colons allowed) in the form of `fingerprint`.

    Raises:
        UsageError: it is none.
    """
    plain = re.sub(r"^sha-?256[:= ]", "", text.strip(), flags=re.IGNORECASE).replace(":", "").lower()
    if not re.fullmatch(r"[0-9a-f]{64}", plain):
        raise UsageError(f"not a fingerprint: {text!r}", hint="ckpt serve prints it when it starts: sha256: and 64 hexadecimal digits")
    return "sha256:" + plain


def user_file() -> Path:
    """Where pins are written."""
    settings = config.user_file(os.environ)
    return SYSTEM_FILE if settings is None else settings.with_name("known_servers")


def known(server: str) -> str | None:
    """The fingerprint by which `HOST:PORT` is known; the user's own file wins."""
    for path in dict.fromkeys((user_file(), SYSTEM_FILE)):
        found = _read(path).get(server)
        if found is not None:
            return found
    return None


def remember(server: str, pin: str) -> None:
    """Accept `HOST:PORT` from now on with this certificate only. What was known before is replaced."""
    path = user_file()
    if _read(path).get(server) == pin:
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pins = {**_read(path), server: pin}
        durable.write_file(path, "".join(f"{name} {value}\n" for name, value in pins.items()).encode())
    finally:
        os.close(lock)


def _read(path: Path) -> dict[str, str]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES).decode(errors="replace")
    except OSError:
        return {}
    pins: dict[str, str] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 2 and re.fullmatch(r"sha256:[0-9a-f]{64}", words[1]):
            pins[words[0]] = words[1]
    return pins
