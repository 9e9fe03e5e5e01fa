"""Results as people read them: columns, key-value lists, the closing line of a migration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ckpt.cli.render import units
from ckpt.cli.render.rows import Row

_MARKS = {"ok": "ok", "warning": "!!", "error": "--"}


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Left-aligned columns, two blanks between them, no trailing blanks."""
    table = [list(head), *([units.clean(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def checkpoint_lines(rows: Sequence[Row]) -> Iterator[str]:
    """`ckpt list`: newest last within a name, as the store gives them."""
    head = ["CHECKPOINT", "ID", "ENGINE", "CREATED", "SIZE", "ON DISK", "FROZEN", "CONTAINER IMAGE"]
    marked = any(row["tags"] or row["note"] or row["pinned"] for row in rows)
    body = []
    for row in rows:
        disk = "" if row["unique_bytes"] is None else units.size(row["unique_bytes"] + (row["shared_bytes"] or 0))
        shared = f" ({units.size(row['shared_bytes'])} shared)" if row["shared_bytes"] else ""
        cells = [
            row["ref"], str(row["id"])[:12], row["engine"], units.when(row["created_s"]), units.size(row["size_bytes"]), disk + shared,
            units.duration(row["freeze_s"]) if row["freeze_s"] else "", (row["container_image"] or {}).get("name", ""),
        ]  # fmt: skip
        if marked:
            note = row["note"] if len(row["note"]) <= 40 else row["note"][:39] + "\N{HORIZONTAL ELLIPSIS}"
            cells.append(" ".join(filter(None, ("pinned" if row["pinned"] else "", ",".join(row["tags"]), note))))
        body.append(cells)
    yield from columns([*head, "NOTES"] if marked else head, body)


def check_lines(row: Row) -> Iterator[str]:
    """`ckpt check`: a verdict, then a line for each thing that was looked at and, where something is wrong, what to do."""
    yield f"{units.clean(row['name'])}: {'can be checkpointed' if row['ok'] else 'cannot be checkpointed'}"
    width = max([12, *(len(finding["check"]) for finding in row["findings"])])
    for finding in row["findings"]:
        yield f"  {_MARKS[finding['severity']]}  {units.clean(finding['check']):<{width}} {units.clean(finding['detail'])}".rstrip()
        if finding["hint"]:
            yield f"      {'':<{width}} next: {units.clean(finding['hint'])}"


def migrated_line(target: str, destination: str, stats: dict[str, Any]) -> str:
    """`migrated web -> b: total 7.4 s, downtime 212 ms, 1.31 GiB sent (3 rounds, 178 MiB/s)`; parts that are unknown are left out."""
    words = []
    if (total_s := stats.get("total_s")) is not None:
        words.append(f"total {units.duration(total_s)}")
    if (downtime_s := stats.get("downtime_s", stats.get("freeze_s"))) is not None:
        words.append(f"downtime {units.duration(downtime_s)}")
    if (sent := stats.get("sent_bytes")) is not None:
        how = []
        if rounds := stats.get("rounds"):
            how.append(units.plural(int(rounds), "round"))
        moving_s = stats.get("transfer_s") or total_s
        if moving_s:
            how.append(f"{units.size(sent / moving_s)}/s")
        words.append(f"{units.size(sent)} sent" + (f" ({', '.join(how)})" if how else ""))
    return f"migrated {units.clean(target)} -> {short_host(destination)}" + (": " + ", ".join(words) if words else "")


def short_host(destination: str) -> str:
    """`root@b` and `ssh://root@b:22/` -> `b`."""
    rest = destination.partition("://")[2] or destination
    rest = rest.partition("/")[0].rpartition("@")[2]
    if not rest.startswith("["):
        rest = rest.partition(":")[0] if rest.count(":") == 1 else rest
    return units.clean(rest) or units.clean(destination)
