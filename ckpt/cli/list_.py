"""`ckpt list`."""

from __future__ import annotations

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, verb
from ckpt.cli.render.rows import CHECKPOINT_FIELDS, checkpoint_row
from ckpt.cli.render.tables import checkpoint_lines


@verb(
    "list",
    fields=CHECKPOINT_FIELDS,
    examples=(("ckpt list", "all"), ("ckpt list web --format '{{.Ref}} {{.SizeBytes}}'", "those of web, chosen fields")),
)
@click.argument("name", required=False, shell_complete=completion.checkpoints)
def command(session: Session, name: str | None) -> int:
    """List the checkpoints in the store, by name, oldest first."""
    from ckpt.ops import list_ as use_case

    rows = [checkpoint_row(checkpoint) for checkpoint in use_case.list_(store_root=session.store_root, name=name)]
    session.reporter.show(rows, table=checkpoint_lines)
    for broken in use_case.broken(store_root=session.store_root):
        session.reporter.warning(f"{broken.directory} cannot be read: {broken.reason}")
    return 0
