"""Credentials for a registry, where podman, skopeo and docker keep them.

Source: containers-auth.json(5) for the files, their order and the keys of namespaces; docker's `config.json` for credential helpers.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ckpt.errors import KeyProblem
from ckpt.host import run
from ckpt.transports._oci_name import Reference

_MAX_BYTES: Final = 1 << 20
_HELPER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z")
_HELPER_LIMIT_S: Final = 20.0
_TOKEN_USER: Final = "<token>"
_HUB_KEY: Final = "https://index.docker.io/v1/"


@dataclass(frozen=True, slots=True)
class Credentials:
    """Who we are to a registry. Nothing of it is ever shown."""

    user: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    """An OAuth 2 refresh token, instead of a password."""
    origin: str = ""
    """The file that it came from, for messages."""

    @property
    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def files() -> list[Path]:
    """Where credentials may be, in the order in which they are looked for; $REGISTRY_AUTH_FILE stands alone."""
    if chosen := os.environ.get("REGISTRY_AUTH_FILE"):
        return [Path(chosen)]
    home = Path(os.environ.get("HOME") or "/root")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    docker = Path(os.environ.get("DOCKER_CONFIG") or home / ".docker")
    run_dir = Path(runtime) / "containers" if runtime else Path(f"/run/containers/{os.geteuid()}")
    return [run_dir / "auth.json", config / "containers/auth.json", docker / "config.json"]


def find(reference: Reference) -> Credentials | None:
    """The credentials for a repository; None: nobody logged in.

    Raises:
        KeyProblem: a file is damaged, or a credential helper failed; the message names it and shows nothing of its content.
    """
    for path in files():
        config = _load(path)
        if config is None:
            continue
        if found := _in_file(config, path, reference):
            return found
    return None


def _load(path: Path) -> dict[str, Any] | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise KeyProblem(f"cannot read the credentials in {path}: {error.strerror}") from None
    if not data.strip():
        return None
    try:
        config = json.loads(data) if len(data) <= _MAX_BYTES else None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise KeyProblem(f"{path} is no file of registry credentials: not a JSON object", hint="log in again (podman login)")
    return config


def _keys(reference: Reference) -> Iterator[str]:
    """The keys of a repository, the most specific one first: HOST/ns/repo, HOST/ns, HOST."""
    parts = reference.repository.split("/")
    for count in range(len(parts), 0, -1):
        yield "/".join([reference.registry, *parts[:count]])
    yield reference.registry
    if reference.endpoint != reference.registry or reference.registry == reference.endpoint == "registry-1.docker.io":
        yield from ("docker.io", "index.docker.io", "registry-1.docker.io")


def _plain(key: str) -> str:
    """docker writes some keys as URLs: only their host counts."""
    scheme, found, rest = key.partition("://")
    return rest.partition("/")[0] if found else key.removesuffix("/")


def _in_file(config: dict[str, Any], path: Path, reference: Reference) -> Credentials | None:
    auths = config.get("auths")
    by_key = {_plain(key): value for key, value in auths.items()} if isinstance(auths, dict) else {}
    helpers = config.get("credHelpers")
    for key in _keys(reference):
        if isinstance(helpers, dict) and isinstance(name := helpers.get(key), str):
            if found := _ask(name, key, path):
                return found
        if isinstance(entry := by_key.get(key), dict) and (found := _entry(entry, path)):
            return found
    if isinstance(name := config.get("credsStore"), str) and name:
        return _ask(name, _HUB_KEY if reference.endpoint == "registry-1.docker.io" else reference.registry, path)
    return None


def _entry(entry: dict[str, Any], path: Path) -> Credentials | None:
    token = entry.get("identitytoken")
    user, password = entry.get("username"), entry.get("password")
    if isinstance(encoded := entry.get("auth"), str) and encoded:
        try:
            user, _, password = base64.b64decode(encoded, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            raise KeyProblem(f"{path} holds an entry that is not base64", hint="log in again (podman login)") from None
        password = password.rstrip("\0")
    if isinstance(token, str) and token:
        return Credentials(identity_token=token, origin=str(path))
    if isinstance(user, str) and isinstance(password, str) and user:
        return Credentials(user, password, origin=str(path))
    return None


def _ask(name: str, server: str, path: Path) -> Credentials | None:
    """Ask a credential helper (the docker-credential-helpers protocol: the server on stdin, JSON on stdout)."""
    if not _HELPER.match(name):
        raise KeyProblem(f"{path} names a credential helper with characters that no helper has")
    program = run.which(f"docker-credential-{name}")
    if program is None:
        raise KeyProblem(f"{path} names the credential helper docker-credential-{name}, which is not installed")
    try:
        done = run.run([program, "get"], input=server.encode() + b"\n", timeout_s=_HELPER_LIMIT_S, check=False)
    except run.CommandFailed as error:
        raise KeyProblem(f"the credential helper docker-credential-{name} failed: {error.reason}") from None
    if not done.ok:
        if "not found" in (done.text + done.error_text).lower():
            return None
        raise KeyProblem(f"the credential helper docker-credential-{name} failed (exit status {done.returncode})", hint=f"it was asked for {server}")
    try:
        said = json.loads(done.stdout[:_MAX_BYTES])
        user, secret = said["Username"], said["Secret"]
    except (ValueError, KeyError, TypeError, RecursionError):
        user = secret = None
    if not isinstance(user, str) or not isinstance(secret, str):
        raise KeyProblem(f"the credential helper docker-credential-{name} gave no credentials that can be read")
    origin = f"docker-credential-{name}"
    return Credentials(identity_token=secret, origin=origin) if user == _TOKEN_USER else Credentials(user, secret, origin=origin)
