"""`ckpt prune`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, Final

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, verb
from ckpt.cli.render import units
from ckpt.cli.render.rows import Row
from ckpt.cli.render.tables import columns
from ckpt.errors import UsageError

FIELDS: Final = ("ref", "id", "name", "generation", "created_s", "size_bytes", "keep", "removed", "reasons", "tags", "pinned")
_COUNT = click.IntRange(min=1)
_AGES: Final = {"m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}
_SIZES: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def age_s(text: str) -> float:
    """`36h`, `7d`, `2w3d` in seconds. Raises UsageError."""
    if not re.fullmatch(r"(\d{1,6}[mhdwy])+", text, re.ASCII):
        raise UsageError(f"{text[:64]!r} is no age", hint="36h, 7d, 2w")
    return float(sum(int(n) * _AGES[unit] for n, unit in re.findall(r"(\d+)([mhdwy])", text)))


def size_bytes(text: str) -> int:
    """`50G`, `800M` (of 1024) in bytes. Raises UsageError."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)([KMGT]?)(?:i?B)?", text, re.ASCII | re.IGNORECASE)
    if not found:
        raise UsageError(f"{text[:64]!r} is no size", hint="50G, 800M")
    return int(float(found[1]) * _SIZES[found[2].upper()])


@verb(
    "prune",
    fields=FIELDS,
    examples=(
        ("ckpt prune --keep-last 3", "of each name the last three"),
        ("ckpt prune web --keep-hourly 24 --keep-daily 7 --dry-run", "show what would become of those of web, and why"),
        ("ckpt prune --max-size 50G", "the oldest go until the store is no larger"),
        ("ckpt prune --orphans", "what dead processes left half written"),
    ),
)
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=completion.checkpoints)
@click.option("--keep-last", type=_COUNT, default=None, metavar="N", help="Keep the last N of each name.")
@click.option("--keep-hourly", type=_COUNT, default=None, metavar="N", help="Keep the newest of each of the last N hours that have one.")
@click.option("--keep-daily", type=_COUNT, default=None, metavar="N", help="Likewise for days.")
@click.option("--keep-weekly", type=_COUNT, default=None, metavar="N", help="Likewise for weeks.")
@click.option("--keep-monthly", type=_COUNT, default=None, metavar="N", help="Likewise for months.")
@click.option("--keep-within", metavar="AGE", help="Keep all that are no older: 36h, 7d, 2w.")
@click.option("--keep-tag", "keep_tags", multiple=True, metavar="TAG", help="Keep all with this tag. Repeatable.")
@click.option("--max-size", metavar="SIZE", help="Then let the oldest go until the store holds no more than this: 50G.")
@click.option("--orphans", is_flag=True, help="Also remove what belongs to no checkpoint.")
@click.option("-n", "--dry-run", is_flag=True, help="Remove nothing, show what would become of each, and why.")
def command(
    session: Session,
    names: tuple[str, ...],
    keep_within: str | None,
    keep_tags: tuple[str, ...],
    max_size: str | None,
    orphans: bool,
    dry_run: bool,
    **counts: Any,
) -> int:
    """Remove checkpoints that no rule keeps.

    The rules look at each name for itself; a checkpoint that any of them keeps stays. The newest of a name and pinned ones always
    stay. What several checkpoints share goes with the last of them.
    """
    from ckpt.ops import prune as use_case
    from ckpt.store.retention import Rules

    rules = Rules(
        keep_within_s=age_s(keep_within) if keep_within is not None else None,
        max_size_bytes=size_bytes(max_size) if max_size is not None else None,
        keep_tags=keep_tags,
        **{key: count or 0 for key, count in counts.items()},
    )
    done = use_case.prune(names, rules, orphans=orphans, dry_run=dry_run, store_root=session.store_root, emit=session.emit)
    stays = {c.manifest.id for c, _ in done.failed}
    rows: list[Row] = [
        {
            "ref": v.checkpoint.ref,
            "id": v.checkpoint.manifest.id,
            "name": v.checkpoint.manifest.name,
            "generation": v.checkpoint.manifest.generation,
            "created_s": v.checkpoint.manifest.created_s,
            "size_bytes": v.checkpoint.manifest.size_bytes,
            "keep": v.keep,
            "removed": not v.keep and not dry_run and v.checkpoint.manifest.id not in stays,
            "reasons": list(v.reasons),
            "tags": list(v.checkpoint.entry.tags),
            "pinned": v.checkpoint.entry.pinned,
        }
        for v in done.verdicts
    ]

    def lines(rows: Sequence[Row]) -> Iterator[str]:
        if rows:
            body = []
            for row in rows:
                fate = "keep" if row["keep"] else "would go" if dry_run else "removed" if row["removed"] else "in use"
                body.append((fate, row["ref"], units.when(row["created_s"]), units.size(row["size_bytes"]), ", ".join(row["reasons"])))
            yield from columns(("", "CHECKPOINT", "CREATED", "SIZE", "WHY"), body)
        gone = sum(not row["keep"] for row in rows) - len(stays)
        what = [units.plural(gone, "checkpoint"), *([units.plural(done.orphans, "orphan")] if done.orphans else [])]
        yield f"{'would remove' if dry_run else 'removed'} {' and '.join(what)}, {units.size(max(0, done.freed_bytes))}"

    session.reporter.show(rows, table=lines)
    return 100 if done.failed else 0
