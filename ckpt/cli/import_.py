"""`ckpt import`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ckpt.cli import carriage, protection
from ckpt.cli.carriage import carrier_options, digest_option
from ckpt.cli.common import Session, verb
from ckpt.cli.render.rows import Row
from ckpt.errors import UsageError


@verb(
    "import",
    examples=(
        ("ckpt import web.tar.zst", "an archive of ckpt or podman"),
        ("ssh a ckpt export web@2 - | ckpt import -", "from the store of another host"),
        ("ckpt import root@a:/srv/web.tar.zst", "over ssh, from a host without ckpt too"),
        ("ckpt import https://a/web.tar.zst", "from a web server"),
        ("ckpt import oci://reg:5000/ns/web:1", "from a registry, what podman pushed too"),
    ),
)
@click.argument("source", metavar="SOURCE", type=click.Path())
@click.option("-n", "--name", metavar="NAME", help="What to call it in the store (default: its own name).")
@digest_option
@protection.incoming_options
@carrier_options
def command(session: Session, source: str, name: str | None, digest: str | None, **carriage_options: Any) -> int:
    """Take an archive into the store, verified; nothing is restored.

    SOURCE is a file, - (stdin), [USER@]HOST:PATH or ssh://[USER@]HOST[:PORT]/PATH, an http(s) URL, presigned ones too, or
    oci://REGISTRY/NAME with :TAG or @sha256:DIGEST. A link that breaks is tried again for a minute, and the download goes on where it was.

    Prints the checkpoint's name in the store, ready for `ckpt restore`.
    """
    if name is not None and not name.strip():
        raise UsageError("an empty --name")
    incoming = protection.incoming(session, protection.take(carriage_options, protection.INCOMING))
    place = carriage.source(source)
    options = carriage.carrier(session, place, **carriage_options)
    from ckpt.ops import import_ as use_case

    outcome = use_case.import_(
        place, name=name, digest=carriage.digest(digest), carrier=options, incoming=incoming, store_root=session.store_root, emit=session.emit
    )
    carriage.remember(place, options)
    return session.finish([outcome], id_of="checkpoint", table=_refs)


def _refs(rows: Sequence[Row]) -> list[str]:
    return [row["ref"] or row["name"] for row in rows]
