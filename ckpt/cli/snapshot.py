"""`ckpt snapshot`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from ckpt.cli import protection
from ckpt.cli.common import Session, dump_options, override_option, state_options, targets_argument, verb
from ckpt.cli.render import units
from ckpt.cli.render.rows import Row
from ckpt.errors import UsageError
from ckpt.model import Target


@verb(
    "snapshot",
    examples=(
        ("ckpt snapshot web --reason INC-123", "evidence of web as it is now; it runs on"),
        ("ckpt snapshot web db --reason INC-123 --case inc-123", "two links of one chain"),
        ("ckpt verify --chain web", "are all of them there, whole and in order?"),
        ("ckpt restore web@3 --isolated", "look into one, without network"),
    ),
)
@targets_argument()
@click.option("--reason", required=True, metavar="TEXT", help="Why it is taken: recorded, with who, when and where.")
@click.option("--case", metavar="NAME", help="The chain that it continues (default: the container's name).")
@click.option("--sign", metavar="KEY", help="Sign with this ssh key (a public one: by ssh-agent); default: sign_key of the configuration.")
@override_option
@state_options()
def command(session: Session, targets: tuple[str, ...], reason: str, case: str | None, sign: str | None, **state: Any) -> int:
    """Take evidence of running containers: a signed checkpoint each, which names the one before.

    The container runs on, after the shortest freeze that is possible, and nothing runs inside of it for this (no hooks). The snapshot is
    an ordinary checkpoint in the store, pinned. What is printed with it is the digest of its manifest: written down elsewhere it proves
    that nothing up to it was changed.
    """
    if not targets:
        raise UsageError("which container?", hint="ckpt snapshot web --reason INC-123")
    session.need_root()
    outgoing = protection.outgoing(session, {"sign": sign}, archive=False)
    from ckpt.ops import snapshot as use_case

    outcomes = use_case.snapshot(
        [Target.parse(target) for target in targets],
        reason=reason,
        case=case,
        command=shlex.join(["ckpt", *sys.argv[1:]]),
        options=dump_options(session, **state),
        outgoing=outgoing,
        store_root=session.store_root,
        emit=session.emit,
    )
    return session.finish(outcomes, id_of="checkpoint", table=_lines)


def _lines(rows: Sequence[Row]) -> Iterable[str]:
    return [f"{units.clean(row['ref'])} {row['stats']['digest']} frozen {row['freeze_s'] * 1000:.0f} ms" for row in rows]
