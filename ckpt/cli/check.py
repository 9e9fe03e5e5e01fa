"""`ckpt check`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import click

from ckpt.cli import drained
from ckpt.cli.carriage import access, server_options
from ckpt.cli.common import Session, dump_options, one_way, ssh_option, state_options, targets_argument, verb
from ckpt.cli.render.rows import CHECK_FIELDS, Row, check_row
from ckpt.cli.render.tables import check_lines
from ckpt.errors import CkptError
from ckpt.model import Target


@verb(
    "check",
    fields=CHECK_FIELDS,
    examples=(("ckpt check web", "can web be saved?"), ("ckpt check web --to root@b", "can it run on b?"), ("ckpt check -a", "what about all?")),
)
@targets_argument()
@click.option("-a", "--all", "every", is_flag=True, help="Every running container.")
@click.option("--to", metavar="[USER@]HOST[:PORT]|https://HOST:PORT", help="Also ask whether it can run there.")
@ssh_option
@server_options
@state_options()
def command(session: Session, targets: tuple[str, ...], every: bool, to: str | None, ssh_options: tuple[str, ...], **state: Any) -> int:
    """Say whether containers can be saved, and why not. Touches nothing.

    Exits with 1 when one of them cannot.
    """
    one_way(targets, every=every, what="target")
    reached = access(session, to, state)
    session.need_root()
    from ckpt.ops import check as use_case

    reports = use_case.check(
        [Target.parse(target) for target in targets],
        all=every,
        to=to,
        options=dump_options(session, **state),
        emit=session.emit,
        ssh_options=(*session.settings.ssh_options, *ssh_options),
        access=reached,
    )
    rows = [check_row(report.target, report.ok, report.findings) for report in reports]
    code = 0 if all(report.ok for report in reports) else CkptError.exit_code
    session.reporter.show(rows, table=_lines, exit_code=code)
    drained.warn(session)
    return code


def _lines(rows: Sequence[Row]) -> chain[str]:
    return chain.from_iterable(check_lines(row) for row in rows)
