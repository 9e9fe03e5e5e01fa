"""`ckpt rm`."""

from __future__ import annotations

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, one_way, verb


@verb("rm", examples=(("ckpt rm web@2", "one checkpoint"), ("ckpt rm web", "the newest of web"), ("ckpt rm -a", "all of them")))
@click.argument("refs", nargs=-1, metavar="[CHECKPOINT]...", shell_complete=completion.checkpoints)
@click.option("-a", "--all", "every", is_flag=True, help="Every checkpoint in the store that is not pinned.")
def command(session: Session, refs: tuple[str, ...], every: bool) -> int:
    """Remove checkpoints from the store."""
    one_way(refs, every=every, what="checkpoint")
    from ckpt.ops import rm as use_case

    return session.finish(use_case.rm(refs, all=every, store_root=session.store_root, emit=session.emit), id_of="checkpoint")
