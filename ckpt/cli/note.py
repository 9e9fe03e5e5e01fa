"""`ckpt note`."""

from __future__ import annotations

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, verb


@verb("note", examples=(("ckpt note web@3 'before the upgrade'", "shown by ckpt list"), ("ckpt note web@3 ''", "remove it")))
@click.argument("ref", metavar="CHECKPOINT", shell_complete=completion.checkpoints)
@click.argument("text")
def command(session: Session, ref: str, text: str) -> int:
    """Write a note down about a checkpoint."""
    from ckpt.ops import mark

    return session.finish(mark.note([ref], text, store_root=session.store_root), id_of="checkpoint")
