"""`ckpt disarm`."""

from __future__ import annotations

import click

from ckpt.cli import completion
from ckpt.cli.arm import FIELDS, show
from ckpt.cli.common import Session, one_way, verb


@verb("disarm", fields=FIELDS, examples=(("ckpt disarm web", "no more periodic checkpoints of web"), ("ckpt disarm -a", "of nothing any more")))
@click.argument("targets", nargs=-1, metavar="[TARGET]...", shell_complete=completion.containers)
@click.option("-a", "--all", "every", is_flag=True, help="All that are armed.")
def command(session: Session, targets: tuple[str, ...], every: bool) -> int:
    """No more periodic checkpoints. Those that were made stay in the store."""
    one_way(targets, every=every, what="target")
    from ckpt.ops import arm as use_case

    session.need_root()
    chosen = tuple(use_case.load(session.store_root)) if every else targets
    show(session, use_case.disarm(chosen, store_root=session.store_root), names=True)
    return 0
