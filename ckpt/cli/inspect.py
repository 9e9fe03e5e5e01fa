"""`ckpt inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, one_way, verb
from ckpt.cli.render.rows import INSPECT_FIELDS, Row, inspection_row
from ckpt.cli.render.tables import inspect_lines


@verb(
    "inspect",
    fields=INSPECT_FIELDS,
    examples=(("ckpt inspect web@2", "a checkpoint of the store"), ("ckpt inspect ./web.tar.zst --format json", "an archive, for a program")),
)
@click.argument("refs", nargs=-1, metavar="CHECKPOINT|FILE...", shell_complete=completion.checkpoints_or_files)
def command(session: Session, refs: tuple[str, ...]) -> int:
    """Show what is in a checkpoint or an archive.

    Its processes, what was open, the sizes, and what a restore needs. A text with a / in it is always a file.
    """
    one_way(refs, what="checkpoint")
    from ckpt.ops import inspect as use_case

    rows = [inspection_row(use_case.inspect(ref, store_root=session.store_root)) for ref in refs]
    session.reporter.show(rows, table=_lines)
    return 0


def _lines(rows: Sequence[Row]) -> chain[str]:
    return chain.from_iterable(inspect_lines(row) for row in rows)
