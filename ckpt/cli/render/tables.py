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


def inspect_lines(row: Row) -> Iterator[str]:
    """`ckpt inspect`: what a checkpoint is and what its restore needs."""
    host = row["host"]
    yes = [label for key, label in (("tcp_established", "TCP connections"), ("file_locks", "file locks"), ("shell_job", "a terminal")) if row[key]]
    container_image = row["container_image"] or {}
    lines: list[tuple[str, str]] = [
        ("id", row["id"]),
        ("engine", " ".join(filter(None, (row["engine"], row["engine_version"])))),
        ("runtime", row["runtime"] or ""),
        ("container", row["container_id"]),
        ("container image", " ".join(filter(None, (container_image.get("name"), str(container_image.get("id", ""))[:19])))),
        ("created", units.when(row["created_s"])),
        ("host", ", ".join(filter(None, (host["hostname"], host["arch"], _with("Linux", host["kernel"]), _with("CRIU", host["criu_version"]))))),
        ("open", ", ".join(yes)),
        ("frozen", units.duration(row["freeze_s"]) if row["freeze_s"] else ""),
        ("left running", "yes" if row["left_running"] else ""),
        ("written by", row["foreign"]),
        ("networks", ", ".join(row["networks"])),
        ("addresses", ", ".join(row["addresses"])),
        ("ports", ", ".join(f"{p['host_port']}->{p['container_port']}/{p['protocol']}" for p in row["ports"])),
        ("volumes", ", ".join(f"{name} at {destination}" for name, destination in row["volumes"])),
        ("host mounts", ", ".join(f"{m['source']} at {m['destination']}" for m in row["host_mounts"])),
        ("size", units.size(row["size_bytes"])),
    ]  # fmt: skip
    yield units.clean(row["ref"])
    for label, text in lines:
        if text:
            yield f"  {label:<16} {units.clean(text)}"
    width = max([14, *(len(units.clean(name)) for name in row["sizes"])])
    for name, count_bytes in row["sizes"].items():
        yield f"    {units.clean(name):<{width}} {units.size(count_bytes):>10}"
    if row["processes"]:
        yield "  processes"
        for process in row["processes"]:
            threads = f"  {process['threads']} threads" if process["threads"] > 1 else ""
            yield f"    {process['pid']:>7}  {units.clean(process['comm'])}{threads}"


def _with(label: str, text: str) -> str:
    return f"{label} {text}" if text else ""


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
