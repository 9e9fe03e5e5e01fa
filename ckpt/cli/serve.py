"""`ckpt serve`."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli import protection
from ckpt.cli.common import Duration, Rate, Session, verb
from ckpt.cli.render.rows import Row
from ckpt.cli.render.units import clean
from ckpt.errors import UsageError

if TYPE_CHECKING:
    _SizeType = click.ParamType[int]
else:
    _SizeType = click.ParamType

_PERMISSIONS = ("upload", "download", "migrate")
TOKEN_FIELDS = ("token", "id", "allow", "uses", "used", "expires_s")


class Size(_SizeType):
    """A size: `10G` and `10GiB` (of 1024), `10GB` (of 1000); a bare number is bytes. Gives bytes."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(B?|iB)", str(value).strip(), re.ASCII | re.IGNORECASE)
        if found is None or (found[3].lower() == "ib" and not found[2]):
            self.fail(f"{value!r} is no size: write 10G (GiB), 800M or 10GB", param, ctx)
        base = 1000 if found[3].lower() == "b" else 1024
        size = int(float(found[1]) * base ** " KMGT".index(found[2].upper() or " "))
        if not 0 < size < 1 << 60:
            self.fail(f"{value!r} is no usable size", param, ctx)
        return size


@dataclass(frozen=True, slots=True)
class _Place:
    """The store, and what may be done with it."""

    store: Path
    allow: frozenset[str]


@verb(
    "serve",
    fields=TOKEN_FIELDS,
    examples=(
        ("ckpt serve", "listen on port 7443 and print the certificate's fingerprint"),
        ("ckpt serve token new --allow migrate", "print a token that is good for one migration within an hour"),
        ("ckpt serve --client-ca clients.pem --write-only --max-size 50G", "take archives from clients with a certificate, give nothing back"),
        ("ckpt serve --stdio --restrict-to-path /srv/ckpt --write-only", "in authorized_keys, as command=\"...\",restrict"),
    ),
)  # fmt: skip
@click.argument("words", nargs=-1, metavar="[token new|list|revoke ID]")
@click.option("--listen", metavar="[ADDRESS]:PORT", help="Where to listen (default :7443, all addresses).")
@click.option("--cert", type=click.Path(path_type=Path), metavar="FILE", help="The server's certificate, PEM (default: self-made, in the store).")
@click.option("--key", type=click.Path(path_type=Path), metavar="FILE", help="Its key, if it is in a file of its own.")
@click.option("--client-ca", type=click.Path(path_type=Path), metavar="FILE", help="Take clients whose certificates these vouch for (or are), PEM.")
@click.option("--client-fingerprint", multiple=True, metavar="SHA256", help="Of those only this one. Can be repeated.")
@click.option("--max-size", "max_bytes", type=Size(), metavar="SIZE", help="Of one archive.")
@click.option("--quota", "quota_bytes", type=Size(), metavar="SIZE", help="Of all unfinished uploads together.")
@click.option("--rate", "rate_bytes_s", type=Rate(), metavar="RATE", help="Move at most so much a second: 50M, 100MB.")
@click.option("--write-only", is_flag=True, help="Take archives, nothing else.")
@click.option("--read-only", is_flag=True, help="Give checkpoints, nothing else.")
@click.option("--no-migrate", is_flag=True, help="Take no migrations: nothing is restored by a client's will.")
@click.option("--restrict-to-path", "below", type=click.Path(path_type=Path), metavar="DIR", help="The store, and none but those below DIR.")
@click.option("--once", is_flag=True, help="End after one upload or one migration.")
@click.option("--stdio", is_flag=True, help="For a forced command: do what SSH_ORIGINAL_COMMAND says, if that is allowed.")
@click.option("--uses", type=click.IntRange(1, 1000), metavar="N", help="token new: how many times it can be used (default 1).")
@click.option("--expires", "expires_s", type=Duration(), metavar="TIME", help="token new: how long it is good (default 1h).")
@click.option("--allow", metavar="WHAT", help="token new: upload, download, migrate, separated by commas (default upload,migrate).")
def command(session: Session, words: tuple[str, ...], **given: Any) -> int:
    """Take checkpoints and migrations from other hosts, over HTTPS.

    For hosts without ssh between them: ckpt export and ckpt migrate on the other host go to https://HOST:PORT. Clients are let in by a
    token, or by a certificate (--client-ca). They know the server by the fingerprint of its certificate, which is printed here, or by the
    authority that signed it.

    ckpt serve token new makes a token and prints it once; only its hash is kept. A token is good for so many uploads, migrations and
    downloads; one that was interrupted goes on with the same token.

    With --stdio nothing listens: it is the command of a key in authorized_keys, and lets that key's owner run ckpt peer, import and export
    with this store, as far as it is allowed.
    """
    place = _place(session, given)
    of_token = {"uses": given.pop("uses"), "expires_s": given.pop("expires_s"), "allow": given.pop("allow")}
    if words:
        return _token(session, place, words, of_token)
    used = [name for name, value in of_token.items() if value is not None]
    if used:
        raise UsageError(f"--{used[0].removesuffix('_s')} goes with `ckpt serve token new`")
    if given.pop("stdio"):
        return _stdio(session, place, given)
    return _listen(session, place, given)


def _place(session: Session, given: dict[str, Any]) -> _Place:
    write_only, read_only, no_migrate, below = (given.pop(name) for name in ("write_only", "read_only", "no_migrate", "below"))
    if write_only and read_only:
        raise UsageError("--write-only and --read-only exclude each other")
    allow = {"upload"} if write_only else {"download"} if read_only else set(_PERMISSIONS)
    store = session.store_root
    if below is not None:
        from ckpt import config

        asked_for = store != config.load().store
        store = Path(os.path.realpath(store)) if asked_for else Path(os.path.realpath(below))
        if asked_for and not store.is_relative_to(os.path.realpath(below)):
            raise UsageError(f"the store {store} is not below {below}")
    return _Place(store, frozenset(allow - ({"migrate"} if no_migrate else set())))


def _token(session: Session, place: _Place, words: Sequence[str], given: dict[str, Any]) -> int:
    from ckpt.serve.tokens import Tokens

    tokens = Tokens(place.store)
    if words[0] != "token" or len(words) < 2:
        raise UsageError(f"not understood: {' '.join(words)}", hint="ckpt serve token new, token list or token revoke ID")
    if words[1:] == ("new",):
        allow = [part.strip() for part in (given["allow"] or "upload,migrate").split(",") if part.strip()]
        made, text = tokens.new(uses=given["uses"] or 1, expires_s=given["expires_s"] or 3600.0, allow=allow)
        row: Row = {"token": text, "id": made.id, "allow": list(made.allow), "uses": made.uses, "used": 0, "expires_s": made.expires_s}
        session.reporter.show([row], table=lambda rows: [str(rows[0]["token"])])
        return 0
    if any(value is not None for value in given.values()):
        raise UsageError("--uses, --expires and --allow go with `ckpt serve token new`")
    if words[1:] == ("list",):
        rows: list[Row] = [
            {"token": "", "id": t.id, "allow": list(t.allow), "uses": t.uses, "used": len(t.claims), "expires_s": t.expires_s} for t in tokens.all()
        ]
        session.reporter.show(rows, table=_token_lines)
        return 0
    if words[1] == "revoke" and len(words) == 3:
        tokens.revoke(words[2])
        return 0
    raise UsageError(f"not understood: {' '.join(words)}", hint="ckpt serve token new, token list or token revoke ID")


def _token_lines(rows: Sequence[Row]) -> Iterable[str]:
    for row in rows:
        until = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["expires_s"]))
        yield clean(f"{row['id']}  {','.join(row['allow']):<24}  used {row['used']} of {row['uses']}, until {until}")


def _stdio(session: Session, place: _Place, given: dict[str, Any]) -> int:
    wrong = [name for name, value in given.items() if value and name != "max_bytes"]
    if wrong:
        raise UsageError("with --stdio only --restrict-to-path, --write-only, --read-only, --no-migrate and --max-size mean anything")
    from ckpt.serve import forced

    original = os.environ.pop("SSH_ORIGINAL_COMMAND", None)
    allowed = forced.permitted(original, place.allow, store=place.store)
    if given["max_bytes"] is not None and allowed.permission == "upload":
        forced.limit_stdin(given["max_bytes"])
    from ckpt.cli.main import main

    # The same program, on words that were checked one by one; its exit code is the remote command's.
    return main(allowed.words)


def _listen(session: Session, place: _Place, given: dict[str, Any]) -> int:
    from ckpt.serve import certificate, listen
    from ckpt.serve.app import Rules
    from ckpt.transports import https_peer, https_pins

    if given["key"] is not None and given["cert"] is None:
        raise UsageError("--key needs --cert")
    if given["client_fingerprint"] and given["client_ca"] is None:
        raise UsageError("--client-fingerprint chooses among the clients of --client-ca")
    if "migrate" in place.allow and os.geteuid() != 0:
        session.need_root()
    listen.parse_address(given["listen"] or f":{https_peer.DEFAULT_PORT}")
    fingerprints = frozenset(https_pins.parse(text) for text in given["client_fingerprint"])
    _log_to_stderr()
    serving = certificate.serving(given["cert"] or certificate.own(place.store), given["key"], client_ca=given["client_ca"])
    rules = Rules(
        place.store,
        allow=place.allow,
        max_bytes=given["max_bytes"],
        rate_bytes_s=given["rate_bytes_s"] or None,
        client_fingerprints=fingerprints,
        once=given["once"],
        incoming=protection.incoming(session, {}),
        outgoing=protection.outgoing(session, {}),
    )

    def ready(addresses: list[str]) -> None:
        for address in addresses:
            sys.stdout.write(f"listening on {address}\n")
        sys.stdout.write(f"fingerprint {serving.fingerprint}\n")
        sys.stdout.flush()

    listen.serve(given["listen"] or f":{https_peer.DEFAULT_PORT}", rules, serving, quota_bytes=given["quota_bytes"], ready=ready)
    return 0


def _log_to_stderr() -> None:
    """One line a request, for the journal."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("ckpt.serve")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)
