"""Jobs as rows and as lines. What a record says may come from another host or a damaged file: nothing of it is taken for granted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from ckpt.cli.render import units
from ckpt.cli.render.rows import SCHEMA, Row, plain
from ckpt.cli.render.tables import columns, short_host
from ckpt.model import JobRecord

JOB_FIELDS: Final = (
    "schema", "id", "name", "kind", "state", "engine", "container_id", "source", "destination", "mode", "started_s", "ended_s", "settled_by",
    "freeze_s", "downtime_s", "total_s", "sent_bytes", "memory_bytes", "reason", "next", "error", "statistics",
)  # fmt: skip
_KINDS: Final = {
    "memory_ahead": "memory, while it ran", "memory": "memory, frozen", "memory_after": "memory, afterwards",
    "files_ahead": "files, while it ran", "files": "files, frozen", "rootfs": "root file system", "volumes": "volumes",
    "container_image": "container image", "criu_images": "other CRIU images", "other": "the rest", "checkpoint": "checkpoint",
}  # fmt: skip


def job_row(record: JobRecord) -> Row:
    """A record; its main figures stand beside the statistics too."""
    row: Row = {"schema": SCHEMA, **plain(record)}
    return {key: row[key] if key in row else record.statistics.get(key) for key in JOB_FIELDS}


def jobs_lines(rows: Sequence[Row]) -> Iterator[str]:
    """`ckpt jobs`."""
    yield from columns(
        ("ID", "NAME", "KIND", "STATE", "HOST", "STARTED", "TOTAL", "DOWNTIME", "SENT", "NEXT"),
        [
            (
                row["id"], row["name"], row["kind"], row["state"], _host(row), units.when(row["started_s"]), _time(row["total_s"]),
                _time(row["downtime_s"]), _size(row["sent_bytes"]), row["next"],
            )
            for row in rows
        ],
    )  # fmt: skip


def job_lines(row: Row) -> Iterator[str]:
    """`ckpt jobs show`."""
    figures: dict[str, Any] = row["statistics"]
    error: dict[str, Any] = row["error"] or {}
    state = " ".join(filter(None, (row["state"], f"(by the {row['settled_by']})" if row["settled_by"] else "")))
    yield f"{row['id']}: {units.clean(row['kind'])} {units.clean(row['name'])}"
    lines = [
        ("state", state),
        ("reason", row["reason"]),
        ("next", row["next"]),
        ("error", error.get("message")),
        ("where", error.get("where")),
        ("hint", error.get("hint")),
        ("log", error.get("log")),
        ("engine", row["engine"]),
        ("container", row["container_id"]),
        ("from", row["source"]),
        ("to", row["destination"]),
        ("mode", row["mode"]),
        ("checkpoint", figures.get("checkpoint_id")),
        ("started", units.when(row["started_s"])),
        ("ended", units.when(row["ended_s"] or 0.0)),
        ("total", _time(row["total_s"])),
        ("downtime", _time(row["downtime_s"])),
        ("frozen, dump", _time(row["freeze_s"])),
        ("memory", _size(row["memory_bytes"])),
        ("sent", _size(row["sent_bytes"])),
        ("compression", _compression(figures)),
    ]
    for side in ("source", "destination"):
        lines.append((f"{side} has", _versions(_dict(_dict(figures.get("versions")).get(side)))))
    for label, text in lines:
        if text:
            yield f"  {label:<18} {units.clean(str(text))}"
    yield from _listed("bytes", {_KINDS.get(kind, kind): _size(count) for kind, count in _dict(figures.get("bytes")).items()})
    yield from _listed("steps", {step: _time(spent_s) for step, spent_s in _dict(figures.get("steps")).items()})
    rounds = figures.get("rounds")
    for one in rounds if isinstance(rounds, list) else []:
        if isinstance(one, dict):
            dirty = _size(one.get("dirty_bytes_per_s"))
            number = one.get("number")
            name = f"round {number + 1}" if isinstance(number, int) else "round"
            yield f"  {name:<18} {_size(one.get('sent_bytes'))} in {_time(one.get('duration_s'))}{f', {dirty}/s written' if dirty else ''}"


def _listed(title: str, found: dict[str, str]) -> Iterator[str]:
    for label, text in found.items():
        if text:
            yield f"  {title:<18} {units.clean(label):<22} {text:>10}"
            title = ""


def _compression(figures: dict[str, Any]) -> str:
    ratio = _number(figures.get("compression_ratio"))
    return f"{figures.get('compression') or ''}{f', {100 * ratio:.0f} % left' if ratio is not None else ''}"


def _versions(said: dict[str, Any]) -> str:
    return ", ".join(f"{name} {said[key]}" for key, name in (("ckpt", "ckpt"), ("criu", "CRIU"), ("kernel", "Linux")) if said.get(key))


def _host(row: Row) -> str:
    if row["kind"] == "receive":
        return f"from {short_host(row['source'])}" if row["source"] else ""
    return f"to {short_host(row['destination'])}" if row["destination"] else ""


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else None


def _time(value: object) -> str:
    number = _number(value)
    return "" if number is None else units.duration(number)


def _size(value: object) -> str:
    number = _number(value)
    return "" if number is None else units.size(number)
