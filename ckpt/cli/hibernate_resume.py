"""`ckpt hibernate resume`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from ckpt.cli.common import Session, verb
from ckpt.cli.render.rows import Row, plain
from ckpt.errors import DoneWithWarnings, RestoreFailed, StartedCold, UsageError
from ckpt.events import Notice

if TYPE_CHECKING:
    from ckpt.ops.hibernate.resume import Resumed

FIELDS: Final = ("name", "ok", "how", "ref", "container_id", "pid", "rungs", "error", "warnings", "hibernation")
_RUNGS: Final = ("restore", "restore-closed", "cold", "leave")


@verb(
    "resume",
    fields=FIELDS,
    examples=(
        ("ckpt hibernate resume", "after a boot: bring back what was saved before it (a unit does that)"),
        ("ckpt hibernate resume --same-boot", "after `ckpt hibernate save`, without a reboot between"),
        ("ckpt hibernate resume --ladder restore,leave", "restore or nothing: never start one cold"),
    ),
)
@click.option("--same-boot", is_flag=True, help="Also when this host has not been started anew since.")
@click.option("--at-boot", is_flag=True, help="As the unit does it: nothing when on_boot in hibernate.toml says so.")
@click.option("--ladder", metavar="RUNG[,RUNG]...", help="What to try, in this order: restore, restore-closed, cold, leave (default: as configured).")
@click.option("--parallel", type=click.IntRange(min=1), metavar="N", help="How many at a time (default: as configured).")
def command(session: Session, same_boot: bool, at_boot: bool, ladder: str | None, parallel: int | None) -> int:
    """Bring back what was saved of this host before it went down.

    Process trees come first, then containers in the order of their dependencies. Each is restored; if that fails it is restored with its
    TCP connections closed, and if that fails too its engine starts it cold. Nothing is done when the host has not been started anew since,
    and by a second resume. The exit status is 0 when all are restored, 23 when some were started cold, 21 when some are not back at all.
    """
    rungs = ladder.split(",") if ladder is not None else None
    if rungs is not None and (len(set(rungs)) < len(rungs) or any(rung not in _RUNGS for rung in rungs) or "leave" in rungs[:-1]):
        raise UsageError(f"--ladder {ladder!r} must be some of {', '.join(_RUNGS)}, each once, leave at the end")
    session.need_root()
    from ckpt.ops.hibernate import resume as use_case

    given: dict[str, Any] = {"rungs": rungs, "width": parallel}
    done = use_case.resume(store_root=session.store_root, same_boot=same_boot, at_boot=at_boot, **given, emit=session.emit)
    return _show(session, done)


def _show(session: Session, done: Resumed) -> int:
    rows: list[dict[str, Any]] = [
        {
            "name": one.target,
            "ok": one.how in ("restored", "restored-closed", "left") or (one.how == "cold" and one.error is None),
            "how": one.how,
            "ref": one.ref or None,
            "container_id": one.container_id or None,
            "pid": one.pid,
            "rungs": plain(one.rungs),
            "error": plain(one.error),
            "warnings": list(one.warnings),
            "hibernation": done.hibernation,
        }
        for one in done.back
    ]
    code = _exit_code(done)
    machine = session.reporter.kind in ("json", "jsonl")
    session.reporter.show(rows if machine else [row for row in rows if row["how"] != "failed"], table=_names, exit_code=code)
    if done.reason:
        session.emit(Notice("", f"nothing to do: {done.reason}"))
    for one in done.back:
        for warning in one.warnings:
            session.reporter.warning(f"{one.target}: {warning}")
        if one.error is not None:
            session.reporter.error(one.error)
    return code


def _exit_code(done: Resumed) -> int:
    if any(one.how == "failed" for one in done.back):
        return RestoreFailed.exit_code
    if any(one.how == "cold" and one.error is not None for one in done.back):
        return StartedCold.exit_code
    return DoneWithWarnings.exit_code if any(one.warnings for one in done.back) else 0


def _names(rows: Sequence[Row]) -> Iterable[str]:
    return [row["name"] for row in rows]
