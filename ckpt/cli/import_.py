"""`ckpt import`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click

from ckpt.cli import protection
from ckpt.cli.common import Session, verb
from ckpt.cli.render.rows import Row
from ckpt.errors import UsageError


@verb(
    "import",
    examples=(
        ("ckpt import web.tar.zst", "an archive of ckpt or podman"),
        ("ssh a ckpt export web@2 -o - | ckpt import -", "from the store of another host"),
    ),
)
@click.argument("source", metavar="FILE", type=click.Path())
@click.option("-n", "--name", metavar="NAME", help="What to call it in the store (default: its own name).")
@protection.incoming_options
def command(session: Session, source: str, name: str | None, **given: Any) -> int:
    """Take an archive into the store, verified; nothing is restored.

    Prints the checkpoint's name in the store, ready for `ckpt restore`. - reads stdin.
    """
    if name is not None and not name.strip():
        raise UsageError("an empty --name")
    if source == "-" and sys.stdin.isatty():
        raise UsageError("an archive is nothing that a person types", hint="redirect stdin, or name a file")
    incoming = protection.incoming(session, given)
    from ckpt.ops import import_ as use_case

    place: Path | Literal["-"] = "-" if source == "-" else Path(source)
    outcome = use_case.import_(place, name=name, incoming=incoming, store_root=session.store_root, emit=session.emit)
    return session.finish([outcome], id_of="checkpoint", table=_refs)


def _refs(rows: Sequence[Row]) -> list[str]:
    return [row["ref"] or row["name"] for row in rows]
