"""`ckpt hibernate status`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import click

from ckpt.cli.common import Session, verb
from ckpt.cli.render import units
from ckpt.cli.render.rows import Row, plain
from ckpt.cli.render.tables import columns

if TYPE_CHECKING:
    from ckpt.ops.hibernate.status import Status

FIELDS: Final = (
    "name", "id", "tree", "action", "state", "ref", "checkpoint_id", "freeze_s", "total_s", "at_s", "after", "units", "group", "rungs", "note",
    "error", "hibernation", "hibernation_state", "kind", "begun_s", "ended_s", "of_this_boot", "of_this_host",
)  # fmt: skip


@verb(
    "status",
    fields=FIELDS,
    examples=(
        ("ckpt hibernate status", "what became of each workload, in the newest hibernation"),
        ("ckpt hibernate status 1a2b3c4d", "of that one"),
        ("ckpt hibernate status --format json", "all that is known, with what was tried to bring each back"),
    ),
)
@click.argument("ref", required=False, metavar="[ID]")
def command(session: Session, ref: str | None) -> int:
    """Tell what became of each workload when this host went down, and when it was up again.

    The exit status is 0 when all is as it should be (saved, or back), 20 when something is not saved or a save was given up, 21 when
    something did not come back, 23 when something was started cold instead.
    """
    from ckpt.ops.hibernate import status as use_case

    found = use_case.status(ref, store_root=session.store_root)
    if found is None:
        session.reporter.show([], table=lambda rows: ["nothing was saved here"])
        return 0
    session.reporter.show(_rows(found), table=lambda rows: _lines(found, rows), exit_code=found.exit_code)
    return found.exit_code


def _rows(found: Status) -> list[Row]:
    rows: list[Row] = []
    for line in found.lines:
        facts = line.facts
        rows.append({
            "name": line.target, "id": facts.get("checkpoint_id"), "tree": line.tree or None, "action": line.action, "state": line.state,
            "ref": facts.get("ref"), "checkpoint_id": facts.get("checkpoint_id"), "freeze_s": facts.get("freeze_s"), "total_s": facts.get("total_s"),
            "at_s": line.at_s, "after": list(line.after), "units": list(line.units), "group": line.group, "rungs": plain(facts.get("rungs") or []),
            "note": facts.get("note"), "error": plain(facts.get("error")), "hibernation": found.id, "hibernation_state": found.state,
            "kind": found.kind, "begun_s": found.begun_s, "ended_s": found.ended_s, "of_this_boot": found.of_this_boot,
            "of_this_host": found.of_this_host,
        })  # fmt: skip
    return rows


def _lines(found: Status, rows: Sequence[Row]) -> Iterator[str]:
    whose = "" if found.of_this_host else ", of another host"
    boot = "in this boot" if found.of_this_boot else "before this boot"
    yield f"hibernation {found.id} ({units.clean(found.kind)}, begun {units.when(found.begun_s)} {boot}{whose}): {units.clean(found.state)}"
    body = []
    for row in rows:
        name = f"{row['name']} ({row['tree']})" if row["tree"] else row["name"]
        error = row["error"].get("message") if isinstance(row["error"], dict) else None
        body.append((
            name, row["action"], row["state"], str(row["ref"] or ""), units.duration(row["total_s"]) if row["total_s"] else "",
            units.when(row["at_s"]), str(error or row["note"] or ""),
        ))  # fmt: skip
    yield from columns(("TARGET", "ACTION", "STATE", "CHECKPOINT", "TOOK", "AT", "WHY"), body)
