"""The options that protect what goes out (encryption, signature), and those that open and judge what comes in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli.common import F, Session
from ckpt.errors import ConfigError

if TYPE_CHECKING:
    from ckpt.archive.seal import Passphrase
    from ckpt.archive.trust import Incoming, Outgoing

_FILE = click.Path(path_type=Path)
OUTGOING = ("encrypt", "sign", "passphrase_file", "passphrase_command")
INCOMING = ("identity", "verify_with", "passphrase_file", "passphrase_command")


def _passphrase_options(what: str) -> tuple[Any, ...]:
    return (
        click.option("--passphrase-file", type=_FILE, metavar="FILE", help=f"{what} the passphrase in the first line of FILE (mode 0600)."),
        click.option("--passphrase-command", metavar="COMMAND", help=f"{what} the passphrase that COMMAND prints."),
    )


def outgoing_options(function: F) -> F:
    """Whom an archive is encrypted to, and who signs it."""
    for option in reversed((
        click.option(
            "--encrypt", multiple=True, metavar="age:RECIPIENT",
            help="Encrypt the archive to age1..., an ssh public key, or a file of them; can be repeated. none: not at all.",
        ),
        *_passphrase_options("Encrypt with"),
        click.option("--sign", metavar="KEY", help="Sign with this ssh key (a public one: by ssh-agent). none: not at all."),
    )):  # fmt: skip
        function = option(function)
    return function


def decrypting_options(function: F) -> F:
    """What opens an encrypted archive."""
    for option in reversed((
        click.option("--identity", multiple=True, type=_FILE, metavar="FILE", help="Decrypt with this age identity or ssh key. Can be repeated."),
        *_passphrase_options("Decrypt with"),
    )):  # fmt: skip
        function = option(function)
    return function


def incoming_options(function: F) -> F:
    """What opens an encrypted archive, and whose signature it must have."""
    text = "Take only what somebody in FILE (allowed_signers of ssh-keygen) signed."
    return decrypting_options(click.option("--verify-with", type=_FILE, metavar="FILE", help=text)(function))


def _passphrase(given: dict[str, Any]) -> Passphrase | None:
    from ckpt.archive import seal

    return seal.passphrase(given.get("passphrase_file"), given.get("passphrase_command"))


def outgoing(session: Session, given: dict[str, Any], *, archive: bool = True) -> Outgoing:
    """Flags, else the configuration; every key is read and tried here, before anything is touched.

    Args:
        given: the options of `outgoing_options`.
        archive: an archive is written, which the configuration may want encrypted.

    Raises:
        UsageError, KeyProblem: a recipient or key that is none, or cannot be read or used.
    """
    settings = session.settings
    sign = given.get("sign") or settings.sign_key
    encrypt = tuple(given.get("encrypt") or ())
    asked = bool(encrypt) or any(given.get(name) is not None for name in ("passphrase_file", "passphrase_command"))
    if not asked and archive:
        encrypt = settings.encrypt
    from ckpt.archive import trust

    if not asked and not encrypt and (sign is None or sign == "none"):
        return trust.OPEN
    from ckpt.archive import seal

    found = trust.Outgoing(seal.recipients(encrypt, _passphrase(given)), None if sign is None or sign == "none" else Path(sign).expanduser())
    found.try_key()
    return found


def incoming(session: Session, given: dict[str, Any]) -> Incoming:
    """Flags, else the configuration.

    Raises:
        UsageError, KeyProblem: a key that is none, or cannot be read. ConfigError: require_signature without allowed_signers.
    """
    settings = session.settings
    flag = given.get("verify_with")
    signers = flag or settings.allowed_signers
    if settings.require_signature and signers is None:
        raise ConfigError("require_signature is set, and nobody is in allowed_signers", hint="name the file: allowed_signers = ...")
    files = tuple(given.get("identity") or ()) or settings.identity
    secret = _passphrase(given)
    from ckpt.archive import trust

    if not files and secret is None and signers is None:
        return trust.ANYBODY
    from ckpt.archive import seal, signature

    demand = None if signers is None else signature.Demand(signers, required=flag is not None or settings.require_signature, local=flag is not None)
    return trust.Incoming(seal.identities(files, secret), demand)


def take(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Those options out of all that a verb was given."""
    return {name: given.pop(name) for name in names if name in given}
