"""`ckpt rewind`."""

from __future__ import annotations

import time
from typing import Any

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, dump_options, hooks_option, override_option, verb
from ckpt.errors import UsageError


@verb(
    "rewind",
    examples=(
        ("ckpt rewind web@3", "back to web@3; what runs now is saved first"),
        ("ckpt rewind web @3", "the same"),
        ("ckpt rewind web --at 14:30", "to the newest checkpoint that was made by then"),
        ("ckpt rewind --discard web", "to the newest one, and don't keep what ran"),
    ),
)
@click.argument("ref", metavar="NAME|CHECKPOINT", shell_complete=completion.checkpoints)
@click.argument("generation", required=False, metavar="[@N]")
@click.option("--at", metavar="TIME", help="The newest checkpoint that is not younger: 14:30, 2026-11-21 14:30, 20m ago.")
@click.option("--discard", is_flag=True, help="Don't keep what ran before, once the rewind is done.")
@click.option("--lazy", is_flag=True, help="Let it run at once; its memory follows.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Longest time for a dump or restore (default 200)."
)
@hooks_option
@override_option
def command(
    session: Session,
    ref: str,
    generation: str | None,
    at: str | None,
    discard: bool,
    lazy: bool,
    timeout_s: float | None,
    hooks: bool,
    override_label: bool,
) -> int:
    """Take a container or process tree back to an earlier checkpoint, in its place.

    The checkpoint is verified first. What runs now is saved as a new checkpoint (tagged before-rewind), so a rewind can be rewound;
    if the restore fails that one is brought back.
    """
    if generation is not None:
        if not generation.startswith("@") or "@" in ref:
            raise UsageError(f"{generation!r} is no generation", hint="ckpt rewind web @3")
        ref += generation
    if at is not None and generation is not None:
        raise UsageError("name a generation or a time, not both")
    session.need_root()
    from ckpt.model import RestoreOptions
    from ckpt.ops import rewind as use_case

    given: dict[str, Any] = {"timeout_s": timeout_s, "hooks": hooks, "override_label": override_label}
    dump = dump_options(session, **given)
    outcome = use_case.rewind(
        ref,
        at_s=use_case.parse_time(at, time.time()) if at is not None else None,
        discard=discard,
        dump=dump,
        options=RestoreOptions(lazy=lazy, timeout_s=dump.timeout_s, hooks=hooks),
        store_root=session.store_root,
        emit=session.emit,
    )
    return session.finish([outcome], table=lambda rows: [row["ref"] for row in rows])
