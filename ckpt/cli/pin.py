"""`ckpt pin`."""

from __future__ import annotations

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, one_way, verb


@verb("pin", examples=(("ckpt pin web@3", "neither prune nor rm takes it"), ("ckpt pin --remove web@3", "or may, again")))
@click.argument("refs", nargs=-1, metavar="CHECKPOINT...", shell_complete=completion.checkpoints)
@click.option("-r", "--remove", is_flag=True, help="Take the pin away.")
def command(session: Session, refs: tuple[str, ...], remove: bool) -> int:
    """Keep checkpoints from being removed by prune and rm."""
    one_way(refs, what="checkpoint")
    from ckpt.ops import mark

    return session.finish(mark.pin(refs, not remove, store_root=session.store_root), id_of="checkpoint")
