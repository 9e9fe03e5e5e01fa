"""`ckpt tag`."""

from __future__ import annotations

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, one_way, verb


@verb(
    "tag",
    examples=(
        ("ckpt tag web@3 --add good", "name a checkpoint: it is web@good now, too"),
        ("ckpt tag web@3 --remove good", "or no longer"),
    ),
)
@click.argument("refs", nargs=-1, metavar="CHECKPOINT...", shell_complete=completion.checkpoints)
@click.option("-a", "--add", multiple=True, metavar="TAG", help="A tag to add. Repeatable.")
@click.option("-r", "--remove", multiple=True, metavar="TAG", help="A tag to remove. Repeatable.")
def command(session: Session, refs: tuple[str, ...], add: tuple[str, ...], remove: tuple[str, ...]) -> int:
    """Give checkpoints tags, or take them away.

    NAME@TAG is the newest checkpoint of NAME with that tag. Rules of prune and filters of list know tags.
    """
    one_way(refs, what="checkpoint")
    from ckpt.ops import mark

    return session.finish(mark.tag(refs, add, remove, store_root=session.store_root), id_of="checkpoint")
