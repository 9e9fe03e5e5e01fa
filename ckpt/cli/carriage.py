"""What `export`, `import` and `restore --import` share: locations, and how their carriers reach the other end."""

from __future__ import annotations

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

_FILE = click.Path(path_type=Path)


def carrier_options(function: F) -> F:
    """The options of every carrier. Their values are files and commands: a secret has no place on a command line."""
    for option in reversed((
        click.option("--token-file", type=_FILE, metavar="FILE", help="Bearer token for a web server (first line of FILE)."),
        click.option("--token-command", metavar="COMMAND", help="A command that prints the token."),
        click.option("--header-file", type=_FILE, metavar="FILE", help="More headers for a web server, lines of Name: value."),
        click.option("--ca", "ca_file", type=_FILE, metavar="FILE", help="Trust these certificate authorities instead of the system's."),
        click.option("--fingerprint", metavar="SHA256", help="Trust the server by its certificate's fingerprint, as ckpt serve prints it."),
        click.option("--client-cert", type=_FILE, metavar="FILE", help="Client certificate (PEM)."),
        click.option("--client-key", type=_FILE, metavar="FILE", help="Its key, if that is another file."),
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
        chosen["fingerprint"] = fingerprint(pin)
    configured = session.settings.http_of(location.raw) if location.is_url else {}
    if {"fingerprint", "ca_file"} & chosen.keys():
        configured = {name: value for name, value in configured.items() if name not in ("fingerprint", "ca_file")}
    if {"token_file", "token_command"} & chosen.keys():
        configured = {name: value for name, value in configured.items() if not name.startswith("token_")}
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


def fingerprint(text: str) -> str:
    """`sha256:HEX` of what was typed: any case, with colons or without. Raises UsageError."""
    plain = re.sub(r"^sha-?256[:= ]", "", text.strip(), flags=re.IGNORECASE).replace(":", "").lower()
    if re.fullmatch(r"[0-9a-f]{64}", plain) is None:
        raise UsageError(f"not a fingerprint: {text!r}", hint="ckpt serve prints it when it starts: sha256: and 64 hexadecimal digits")
    return "sha256:" + plain


def digest(value: str | None) -> str | None:
    """The hex digits of `sha256:HEX` (or of HEX alone). Raises UsageError."""
    if value is None:
        return None
    found = re.fullmatch(r"(?:sha256:)?([0-9a-f]{64})", value.strip().lower())
    if found is None:
        raise UsageError(f"not a SHA-256 digest: {value!r}", hint="write it as sha256: and 64 hexadecimal digits, as export prints it")
    return found[1]


digest_option = click.option("--digest", metavar="DIGEST", help="Take only the archive with this digest (sha256:HEX, as export prints it).")
