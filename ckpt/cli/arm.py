"""`ckpt arm`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, dump_options, verb
from ckpt.cli.render import units
from ckpt.cli.render.rows import Row
from ckpt.cli.render.tables import columns
from ckpt.errors import UsageError

if TYPE_CHECKING:
    from ckpt.ops.arm import Armed

FIELDS: Final = ("name", "target", "every_s", "keep_last", "newest", "newest_s", "engine", "container_id")


@verb(
    "arm",
    fields=FIELDS,
    examples=(
        ("ckpt arm web --every 15m --keep-last 8", "a checkpoint of web now and every 15 minutes, the last 8 are kept"),
        ("ckpt arm", "what is armed, and the newest checkpoint of each"),
        ("ckpt disarm web", "no more of them; those that were made stay"),
        ("ckpt restore web@armed", "after a crash: the last good one"),
    ),
)
@click.argument("targets", nargs=-1, metavar="[TARGET]...", shell_complete=completion.containers)
@click.option("--every", metavar="TIME", help="How often: 30s, 15m, 2h, 1d; 10s at least.")
@click.option("--keep-last", type=click.IntRange(min=1, max=10_000), default=None, metavar="N", help="Keep the last N of them (default 8).")
@click.option("--run", "once", metavar="TARGET", hidden=True)
def command(session: Session, targets: tuple[str, ...], every: str | None, keep_last: int | None, once: str | None) -> int:
    """Checkpoint running containers periodically, or list what is armed.

    Each checkpoint lets the container run on and is tagged "armed"; after a crash or power loss the last one is there to be restored.
    Only these are removed when newer ones come; one that you pin, tag or write a note on stays. systemd keeps the time
    (ckpt-arm@TARGET.timer). A run that finds the container stopped, or another ckpt at work on it, does nothing.
    """
    from ckpt.ops import arm as use_case

    if once is not None:
        session.need_root()
        done = use_case.run(once, options=dump_options(session), store_root=session.store_root, emit=session.emit)
        return session.finish([done], id_of="checkpoint") if done is not None else 0
    if not targets:
        if every is not None or keep_last is not None:
            raise UsageError("arm which target?", hint="ckpt arm TARGET --every 15m; ckpt arm alone lists")
        show(session, list(use_case.load(session.store_root).values()))
        return 0
    if every is None:
        raise UsageError("say how often", hint=f"ckpt arm {targets[0]} --every 15m")
    every_s = use_case.seconds(every)
    session.need_root()
    show(session, use_case.arm(targets, every_s=every_s, keep_last=keep_last or 8, store_root=session.store_root, emit=session.emit), names=True)
    return 0


def show(session: Session, armed: Sequence[Armed], *, names: bool = False) -> None:
    """The rows of what is (or was) armed; for a person a table, or only the names."""
    from ckpt.ops import arm as use_case
    from ckpt.store.retention import when_s

    rows: list[Row] = []
    for one in armed:
        newest = use_case.newest(one, session.store_root)
        rows.append({
            "name": one.name,
            "target": one.target,
            "id": one.container_id,
            "every_s": one.every_s,
            "keep_last": one.keep_last,
            "newest": newest.ref if newest else None,
            "newest_s": when_s(newest) if newest else None,
            "engine": one.engine,
            "container_id": one.container_id,
        })  # fmt: skip
    session.reporter.show(rows, table=_names if names else _table)


def _names(rows: Sequence[Row]) -> Iterator[str]:
    return (row["name"] for row in rows)


def _table(rows: Sequence[Row]) -> Iterator[str]:
    if not rows:
        return
    body = []
    for row in rows:
        age = f"{units.duration(max(0.0, time.time() - row['newest_s']))} ago" if row["newest_s"] else ""
        body.append((row["target"], units.duration(row["every_s"]), str(row["keep_last"]), row["newest"] or "none yet", age))
    yield from columns(("TARGET", "EVERY", "KEEP", "NEWEST", ""), body)
