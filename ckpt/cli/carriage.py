"""What `export`, `import` and `restore --import` share: locations, and how their carriers reach the other end."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli.common import F, Session, ssh_option
from ckpt.errors import UsageError

if TYPE_CHECKING:
    from ckpt.transports.base import CarrierOptions, Location
    from ckpt.transports.https_peer import Access

_FILE = click.Path(path_type=Path)


def server_options(function: F) -> F:
    """How a web server is known, and we to it. Their values are files and commands: a secret has no place on a command line."""
    for option in reversed((
        click.option("--token-file", type=_FILE, metavar="FILE", help="Bearer token for a web server (first line of FILE)."),
        click.option("--token-command", metavar="COMMAND", help="A command that prints the token."),
        click.option("--ca", "ca_file", type=_FILE, metavar="FILE", help="Trust these certificate authorities instead of the system's."),
        click.option("--fingerprint", metavar="SHA256", help="Trust the server by its certificate, as ckpt serve prints it; remembered."),
        click.option("--client-cert", type=_FILE, metavar="FILE", help="Client certificate (PEM)."),
        click.option("--client-key", type=_FILE, metavar="FILE", help="Its key, if that is another file."),
    )):  # fmt: skip
        function = option(function)
    return function


def carrier_options(function: F) -> F:
    """The options of every carrier."""
    for option in reversed((
        server_options,
        click.option("--header-file", type=_FILE, metavar="FILE", help="More headers for a web server, lines of Name: value."),
        click.option("--insecure", is_flag=True, help="Allow http://, and registries without TLS: anybody on the way can read it."),
        ssh_option,
    )):  # fmt: skip
        function = option(function)
    return function


def carrier(session: Session, location: Location, **given: Any) -> CarrierOptions:
    """The options for one location: what was given, else what the configuration says of it. Takes what `carrier_options` gives.

    Raises:
        UsageError: two ways to a token.
    """
    from ckpt.transports import https_pins
    from ckpt.transports.base import CarrierOptions

    chosen = {name: value for name, value in given.items() if value not in (None, (), False)}
    if "token_file" in chosen and "token_command" in chosen:
        raise UsageError("give --token-file or --token-command, not both")
    if "client_key" in chosen and "client_cert" not in chosen:
        raise UsageError("--client-key needs --client-cert")
    if command := chosen.get("token_command"):
        try:
            chosen["token_command"] = tuple(shlex.split(command))
        except ValueError:
            raise UsageError("--token-command has a quote that does not end") from None
        if not chosen["token_command"]:
            raise UsageError("an empty --token-command")
    if pin := chosen.get("fingerprint"):
        chosen["fingerprint"] = https_pins.parse(pin)
    configured = session.settings.http_of(location.raw) if location.is_url else {}
    if {"fingerprint", "ca_file"} & chosen.keys():
        configured = {name: value for name, value in configured.items() if name not in ("fingerprint", "ca_file")}
    if {"token_file", "token_command"} & chosen.keys():
        configured = {name: value for name, value in configured.items() if not name.startswith("token_")}
    if not {"fingerprint", "ca_file"} & (configured.keys() | chosen.keys()) and (server := _server(location)):
        configured = {**configured, "fingerprint": https_pins.known(server)}
    return CarrierOptions(**{**configured, **chosen, "ssh_options": (*session.settings.ssh_options, *chosen.get("ssh_options", ()))})


def destination(session: Session, text: str) -> Location:
    """Where to write; stdout then carries the archive and no results. Raises UsageError for a terminal."""
    from ckpt.transports.base import PIPE, Location

    location = Location.parse(text)
    if location.scheme == PIPE:
        if sys.stdout.isatty():
            raise UsageError("an archive is nothing for a terminal", hint="redirect stdout, or name a file")
        session.reporter.results = False
    return location


def source(text: str) -> Location:
    """Where to read from. Raises UsageError for a terminal."""
    from ckpt.transports.base import PIPE, Location

    location = Location.parse(text)
    if location.scheme == PIPE and sys.stdin.isatty():
        raise UsageError("an archive is nothing that a person types", hint="redirect stdin, or name a file")
    return location


def remember(location: Location, options: CarrierOptions) -> None:
    """After a transfer: the certificate of this server is the right one, and no other is, until another is given."""
    from ckpt.transports import https_pins

    if options.fingerprint is not None and (server := _server(location)):
        https_pins.remember(server, options.fingerprint)


def _server(location: Location) -> str | None:
    """HOST:PORT of an https URL."""
    from ckpt.transports.https_peer import Server

    return str(Server(location.split.hostname or "", location.split.port or 443)) if location.scheme == "https" else None


def access(session: Session, destination: str | None, given: dict[str, Any]) -> Access | None:
    """Takes what `server_options` gives out of `given`, for a `ckpt serve` that is reached for a migration.

    Raises:
        UsageError: it does not go with the destination.
    """
    from ckpt.transports import https_peer
    from ckpt.transports.base import Location

    taken = {name: given.pop(name) for name in ("token_file", "token_command", "ca_file", "fingerprint", "client_cert", "client_key")}
    used = [name for name, value in taken.items() if value is not None]
    if destination is None or not https_peer.is_https(destination):
        if used:
            option = "ca" if used[0] == "ca_file" else used[0].replace("_", "-")
            raise UsageError(f"--{option} goes with an https:// destination only")
        return None
    https_peer.Server.parse(destination)
    if taken["fingerprint"] is not None and taken["ca_file"] is not None:
        raise UsageError("--fingerprint and --ca exclude each other: one of them says whom to trust")
    options = carrier(session, Location.parse(destination), **taken)
    given_files = {name: getattr(options, name) for name in ("ca_file", "token_file", "client_cert", "client_key")}
    files = {name: None if path is None else os.path.abspath(path) for name, path in given_files.items()}
    return https_peer.Access(
        # What is merely known is looked up when it connects: then a change is told as one.
        fingerprint=options.fingerprint if taken["fingerprint"] is not None or "fingerprint" in session.settings.http_of(destination) else None,
        ca=files["ca_file"],
        certificate=files["client_cert"],
        key=files["client_key"],
        token_file=files["token_file"],
        token_command=options.token_command,
    )


def digest(value: str | None) -> str | None:
    """The hex digits of `sha256:HEX` (or of HEX alone). Raises UsageError."""
    if value is None:
        return None
    found = re.fullmatch(r"(?:sha256:)?([0-9a-f]{64})", value.strip().lower())
    if found is None:
        raise UsageError(f"not a SHA-256 digest: {value!r}", hint="write it as sha256: and 64 hexadecimal digits, as export prints it")
    return found[1]


digest_option = click.option("--digest", metavar="DIGEST", help="Take only the archive with this digest (sha256:HEX, as export prints it).")
