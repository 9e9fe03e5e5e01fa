"""`ckpt copy`."""

from __future__ import annotations

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, one_way, verb
from ckpt.config import store_named


@verb(
    "copy",
    examples=(
        ("ckpt copy web@3 --to /mnt/backup/ckpt", "into another store"),
        ("ckpt copy web@3 --to backup", "into a store that the configuration names"),
        ("ckpt --store backup copy web@3 --to /var/lib/ckpt", "and back"),
    ),
)
@click.argument("refs", nargs=-1, metavar="CHECKPOINT...", shell_complete=completion.checkpoints)
@click.option("--to", "to", required=True, type=click.Path(file_okay=False), metavar="DIR|NAME", help="The other store.")
def command(session: Session, refs: tuple[str, ...], to: str) -> int:
    """Copy checkpoints into another store, verified, with their tags and notes.

    Prints what they are called there: each gets the next number of its name in that store.
    """
    one_way(refs, what="checkpoint")
    from ckpt.ops import copy as use_case

    outcomes = use_case.copy(refs, store_named(session.settings, to), store_root=session.store_root, emit=session.emit)
    return session.finish(outcomes, id_of="checkpoint", table=lambda rows: [row["ref"] for row in rows])
