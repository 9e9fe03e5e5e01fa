"""What carries an archive somewhere and back: the protocol of carriers, locations, and which carriers there are.

A carrier is one file of this package with `CARRIER`, an object as `Carrier` says (or `CARRIERS`, several of them); entry points of the
group `ckpt.carriers` add more. An archive is a stream of bytes to a carrier: it is written from its beginning to its end, by somebody who
need not know its length before, and read the same way.
"""

from __future__ import annotations

import importlib
import ipaddress
import pkgutil
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal, Protocol
from urllib.parse import SplitResult, quote, urlsplit

import ckpt.transports
from ckpt.errors import UsageError
from ckpt.model import Manifest

GROUP: Final = "ckpt.carriers"
PIPE: Final = "pipe"
FILE: Final = "file"
SSH: Final = "ssh"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_SCP = re.compile(r"(?:[^@/:]+@)?(?:\[[^\]/]+\]|[^:/@\[\]]+):")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_NO_TEXT = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Location:
    """Where an archive is, or shall be. `str()` and `repr()` show neither user information nor a query: both may be credentials."""

    scheme: str
    """`file`, `pipe`, `ssh`, `http`, `https`, `oci`, …"""
    raw: str = field(repr=False)
    """As it was given, secrets and all: for the carrier alone, never for a message."""
    shown: str
    """As people may see it, also in logs and JSON."""
    path: Path | None = None
    """Of `file`."""

    @classmethod
    def parse(cls, text: str) -> Location:
        """Read `-`, a path, `SCHEME://…` or scp's `[user@]host:path` (a colon before any slash; a file of such a name is `./a:b`).

        Raises:
            UsageError: it is none of these, or no carrier knows the scheme.
        """
        if not text.strip() or _CONTROL.search(text):
            raise UsageError("an empty location" if not text.strip() else "a location with control characters")
        if text == "-":
            return cls(PIPE, text, "-")
        if found := _SCHEME.match(text):
            if _NO_TEXT.search(text):
                raise UsageError("a location with bytes that are no text", hint="write them as %XX")
            return _url(cls, found[1].lower(), text)
        if _SCP.match(text):
            return cls(SSH, text, text)
        return cls(FILE, text, text, Path(text))

    @classmethod
    def of(cls, path: Path) -> Location:
        """A file of this host, whatever it is called."""
        return cls(FILE, str(path), str(path), path)

    @property
    def split(self) -> SplitResult:
        """The URL in its parts. Secrets are among them."""
        return urlsplit(self.raw)

    @property
    def is_url(self) -> bool:
        """Whether it was written as `SCHEME://…`."""
        return "://" in self.raw and self.scheme not in (FILE, PIPE)

    def __str__(self) -> str:
        return self.shown


def _url(cls: type[Location], scheme: str, text: str) -> Location:
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise UsageError(f"not a usable {scheme} URL") from None
    if scheme == FILE:
        if host not in (None, "", "localhost") or parts.query or not parts.path.startswith("/"):
            raise UsageError("a file URL is file:///PATH")
        from urllib.parse import unquote

        path = unquote(parts.path)
        return cls(FILE, path, path, Path(path))
    if scheme not in known_schemes():
        raise UsageError(f"no carrier knows {scheme}://", hint="known are - (a pipe), a path, and " + ", ".join(f"{s}://" for s in known_schemes()))
    if not host:
        raise UsageError(f"a {scheme} URL without a host")
    if parts.fragment:
        raise UsageError(f"a {scheme} URL has no #fragment")
    shown_host = f"[{host}]" if ":" in host else host
    shown = f"{scheme}://{shown_host}" + (f":{port}" if port is not None else "") + quote(parts.path, safe="/%:@!$&'()*+,;=~")
    if scheme == SSH:  # its user name is no secret, and tells two locations apart; a password is refused
        if parts.password is not None:
            raise UsageError("a password in an ssh URL", hint="ssh takes keys, or asks")
        if parts.query:
            raise UsageError("an ssh URL has no ?query")
        shown = shown.replace("://", f"://{parts.username}@", 1) if parts.username else shown
    return cls(scheme, text, shown)


@dataclass(frozen=True, slots=True)
class CarrierOptions:
    """How to reach the other end. A carrier takes what means something to it.

    Tokens and passwords come from files or commands, never from a command line. Times are in seconds.
    """

    connect_timeout_s: float = 10.0
    idle_timeout_s: float = 30.0
    """Longest time in which a block (128 KiB at most) may come or go: a byte now and then (slow loris) counts as a dead link."""
    total_timeout_s: float | None = None
    """Longest time for the whole transfer."""
    retry_limit_s: float = 60.0
    """How long a broken or overloaded other end is tried again, from the last byte that went through."""
    chunk_bytes: int = 8 << 20
    """At most so much is sent a second time after a break, and held in memory for that."""
    token_file: Path | None = None
    token_command: tuple[str, ...] = ()
    """Prints the token (its first line)."""
    header_file: Path | None = None
    """`Name: value` lines to add to requests; may hold secrets."""
    ca_file: Path | None = None
    """Trust these certificate authorities instead of the system's."""
    fingerprint: str | None = None
    """`sha256:HEX` of the server's certificate, which then needs no authority."""
    client_cert: Path | None = None
    client_key: Path | None = None
    insecure: bool = False
    """Clear text is allowed to other hosts than this one. Certificates are checked all the same."""
    ssh_options: tuple[str, ...] = ()
    registry_form: Literal["artifact", "image"] = "artifact"
    """What a checkpoint in a registry is: an OCI artifact, or an image that podman restores too."""
    registry_subject: str | None = None
    """The container image in the same registry that an artifact belongs to; None: the one it was made from, if it is there."""
    spool_dir: Path | None = None
    """Where an archive of unknown length waits that must be sent with its length (plain PUT); None: the system's place."""
    notice: Callable[[str], None] = field(default=lambda text: None, repr=False)
    """Told what a person may want to know ("the link broke at 12 MiB, going on")."""


@dataclass(frozen=True, slots=True)
class Payload:
    """What is going to be written."""

    size_bytes: int | None = None
    """Its length, when it is known before."""
    compression: str = "none"
    """`zstd`, `gzip`, `none`: how the archive is packed, below an encryption."""
    encrypted: bool = False
    manifest: Manifest | None = None
    """What it holds; None when nobody may know (encrypted) or nobody knows."""


@dataclass(frozen=True, slots=True)
class Stored:
    """What the other end confirmed at `commit`."""

    size_bytes: int
    sha256: str | None = None
    """Hex digest of the whole that the *other end* computed, where it does; equal to ours, else `commit` had failed."""
    reference: str | None = None
    """A better name than the location, without secrets (`oci://registry/repo@sha256:…`)."""


class Download(Protocol):
    """An archive that comes in. Raises TransferFailed, CannotConnect, RemoteRefused."""

    @property
    def size_bytes(self) -> int | None:
        """The length of the whole, when the other end told; then `read` has checked it at the end."""

    @property
    def etag(self) -> str | None:
        """What the other end calls this very content, if it does."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes, b"" only at the end of the whole; goes on by itself after a break, where that is possible."""


class Upload(Protocol):
    """An archive that goes out. Leaving the context without `commit` leaves nothing on the other end."""

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Take all of `data`; the count."""

    def commit(self) -> Stored:
        """All was written: make it appear under its name, whole. Only when this returned is it safe there."""


class Carrier(Protocol):
    """One way to carry archives."""

    @property
    def schemes(self) -> tuple[str, ...]:
        """The URL schemes that it serves."""

    def check_write(self, location: Location, options: CarrierOptions) -> None:
        """Find out cheaply what would fail, before a workload is touched: paths, credentials, a connection.

        Raises:
            CkptError: it cannot be written there.
        """

    def open_read(self, location: Location, options: CarrierOptions) -> AbstractContextManager[Download]:
        """Begin to read; entering raises what the other end says to that (TargetNotFound, RemoteRefused, CannotConnect)."""

    def open_write(self, location: Location, options: CarrierOptions, payload: Payload) -> AbstractContextManager[Upload]:
        """Begin to write; nothing appears under the name before `commit`, and what was there stays as it was until then."""


def carrier_of(location: Location) -> Carrier:
    """The carrier of a location.

    Raises:
        UsageError: there is none.
    """
    for carrier in carriers():
        if location.scheme in carrier.schemes:
            return carrier
    raise UsageError(f"no carrier knows {location.scheme}://")


@cache
def carriers() -> tuple[Carrier, ...]:
    """Every carrier that is installed, ours first."""
    return (*_own(), *_others())


def known_schemes() -> list[str]:
    """The schemes that people may write before `://`."""
    return sorted({scheme for carrier in carriers() for scheme in carrier.schemes} - {PIPE})


def is_loopback(host: str) -> bool:
    """Whether a host of a URL is this one: no wire in between, so nothing to encrypt."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


def _own() -> Iterator[Carrier]:
    for info in sorted(pkgutil.iter_modules(ckpt.transports.__path__), key=lambda i: i.name):
        if not info.name.startswith("_") and info.name != "base":
            yield from _offered(importlib.import_module(f"{ckpt.transports.__name__}.{info.name}"))


def _others() -> Iterator[Carrier]:
    for entry in metadata.entry_points(group=GROUP):
        try:
            loaded: Any = entry.load()
        except Exception:  # a stranger's broken package must not stop ours
            continue
        yield from _offered(loaded)


def _offered(module: Any) -> tuple[Carrier, ...]:
    several = getattr(module, "CARRIERS", None)
    single = getattr(module, "CARRIER", None)
    return tuple(several) if several is not None else (single,) if single is not None else ()


__all__ = [
    "Carrier",
    "CarrierOptions",
    "Download",
    "Location",
    "Payload",
    "Stored",
    "Upload",
    "carrier_of",
    "carriers",
    "is_loopback",
    "known_schemes",
]
