"""Names of what is in a registry: `oci://HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]`.

Source of the grammar: OCI distribution-spec 1.1, "Pulling manifests"; the short names of Docker Hub: docker's reference package.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass
from typing import Final

from ckpt.errors import UsageError

SCHEME: Final = "oci"
_HOST: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?)(?::(?P<port>[0-9]{1,5}))?\Z")
_PART: Final = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY: Final = re.compile(rf"{_PART}(?:/{_PART})*\Z")
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_DIGEST: Final = re.compile(r"(?:sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})\Z")
_DOCKER_HUB: Final = ("docker.io", "index.docker.io", "registry-1.docker.io")


@dataclass(frozen=True, slots=True)
class Reference:
    """A name in a registry. `registry` is host[:port] as it was written; `digest`, when given, decides and not the tag."""

    registry: str
    repository: str
    tag: str = "latest"
    digest: str = ""

    @property
    def wanted(self) -> str:
        """What stands for it in the URL of a manifest."""
        return self.digest or self.tag

    @property
    def host(self) -> str:
        """The registry's host without its port."""
        return self.registry.rpartition(":")[0] if re.search(r":[0-9]+\Z", self.registry) else self.registry

    @property
    def endpoint(self) -> str:
        """host[:port] that is asked."""
        return "registry-1.docker.io" if self.registry in _DOCKER_HUB else self.registry

    @property
    def is_loopback(self) -> bool:
        """Whether the registry is this very host by its address or the name `localhost`."""
        host = self.host.strip("[]")
        if host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def at(self, digest: str) -> str:
        """This repository's name with a digest, as people give it to ckpt."""
        return f"{SCHEME}://{self.registry}/{self.repository}@{digest}"

    def __str__(self) -> str:
        return f"{SCHEME}://{self.registry}/{self.repository}" + (f"@{self.digest}" if self.digest else f":{self.tag}")


def is_digest(text: object) -> bool:
    """Whether it is a digest of a kind that ckpt verifies."""
    return isinstance(text, str) and bool(_DIGEST.match(text))


def parse(text: str) -> Reference:
    """Read a name, with or without `oci://`.

    Raises:
        UsageError: it is none.
    """
    rest = text.removeprefix(f"{SCHEME}://")
    hint = "oci://HOST[:PORT]/NAME:TAG, the name in lower case"
    if "?" in rest or "#" in rest or "@" in rest.partition("/")[0]:
        raise UsageError("a registry's location has no user, ?query or #fragment", hint="credentials come from `podman login` or `docker login`")
    registry, slash, path = rest.partition("/")
    match = _HOST.match(registry)
    if not match or not slash or (match["port"] and not 0 < int(match["port"]) < 65536):
        raise UsageError(f"{text!r} names no registry", hint=hint)
    path, at, digest = path.partition("@")
    if at and not _DIGEST.match(digest):
        raise UsageError(f"{text!r} has no valid digest after @", hint="sha256: and 64 hexadecimal digits")
    repository, colon, tag = path.partition(":")
    if colon and not _TAG.match(tag):
        raise UsageError(f"{text!r} has no valid tag after the colon", hint=hint)
    if len(repository) > 255 or not _REPOSITORY.match(repository):
        raise UsageError(f"{text!r} names no repository", hint=hint)
    if registry in _DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    return Reference(registry, repository, tag or "latest", digest)
