"""Results as plain data: the rows behind `--format json`, `jsonl` and templates. Keys are stable and only ever added (schema 1)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ckpt.errors import CkptError

if TYPE_CHECKING:
    from ckpt.criu.contents import Contents
    from ckpt.events import Event
    from ckpt.model import Checkpoint, Finding, Manifest
    from ckpt.ops.inspect import Found, Inspection
    from ckpt.ops.result import Outcome

SCHEMA: Final = 1
Row = dict[str, Any]

OUTCOME_FIELDS: Final = (
    "name", "id", "ok", "ref", "engine", "container_id", "container_name", "checkpoint_id", "state", "path",
    "size_bytes", "freeze_s", "downtime_s", "total_s", "sent_bytes", "warnings", "error", "stats", "job",
)  # fmt: skip
CHECKPOINT_FIELDS: Final = (
    "ref", "id", "name", "generation", "engine", "runtime", "container_id", "container_image", "created_s", "size_bytes", "freeze_s", "host", "path",
    "unique_bytes", "shared_bytes", "stored_s", "origin", "tags", "note", "pinned", "group",
)  # fmt: skip
INSPECT_FIELDS: Final = (
    "ref", "id", "name", "generation", "engine", "engine_version", "runtime", "container_id", "container_image", "created_s", "host",
    "tcp_established", "file_locks", "shell_job", "left_running", "processes", "volumes", "networks", "addresses", "ports", "host_mounts",
    "stats", "freeze_s", "size_bytes", "digests", "foreign", "external", "sizes", "path", "signed", "archive", "tasks", "mounts", "open_kinds",
    "memory", "unread",
)  # fmt: skip
FOUND_FIELDS: Final = ("ref", "pid", "comm", "kind", "address", "length", "context_address", "context")
CHECK_FIELDS: Final = ("name", "ok", "findings")
PLAN_FIELDS: Final = ("name", "plan")


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as what JSON knows."""
    if isinstance(value, CkptError):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)


def event_row(event: Event) -> Row:
    """An event as a row; `event` is its class in snake case (`StepDone` -> `step_done`)."""
    name = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(event).__name__).lstrip("_")
    return {"schema": SCHEMA, "event": name, **plain(event)}


def outcome_row(outcome: Outcome, *, id_of: str) -> Row:
    """An outcome; `id_of` says whose id the field `id` is, the checkpoint's or the container's."""
    manifest = outcome.checkpoint.manifest if outcome.checkpoint else None
    container = outcome.container
    checkpoint_id = manifest.id if manifest else None
    stats = dict(outcome.stats)
    # A migration's container lives on the destination, under the id that it got there.
    container_id = stats.get("container_id") or (container.id if container else manifest.container_id if manifest else None)
    return {
        "name": outcome.target,
        "id": (checkpoint_id or container_id) if id_of == "checkpoint" else (container_id or checkpoint_id),
        "ok": outcome.ok,
        "ref": outcome.checkpoint.ref if outcome.checkpoint else None,
        "engine": container.engine if container else manifest.engine if manifest else None,
        "container_id": container_id,
        "container_name": container.name if container else manifest.name if manifest else None,
        "checkpoint_id": checkpoint_id,
        "state": container.state if container else None,
        "path": str(outcome.checkpoint.directory) if outcome.checkpoint else None,
        "size_bytes": stats.get("size_bytes", manifest.size_bytes if manifest else None),
        "freeze_s": stats.get("freeze_s", manifest.freeze_s if manifest else None),
        "downtime_s": stats.get("downtime_s"),
        "total_s": stats.get("total_s"),
        "sent_bytes": stats.get("sent_bytes"),
        "warnings": list(outcome.warnings),
        "error": plain(outcome.error),
        "stats": plain(stats),
        "job": {"schema": SCHEMA, **plain(outcome.record)} if outcome.record else None,
    }


def checkpoint_row(checkpoint: Checkpoint, unique_bytes: int | None = None, shared_bytes: int | None = None) -> Row:
    """`unique_bytes`, `shared_bytes`: what of the store's disk only it needs, and what it needs together with others."""
    manifest, entry = checkpoint.manifest, checkpoint.entry
    return {
        "ref": checkpoint.ref,
        "id": manifest.id,
        "name": manifest.name,
        "generation": manifest.generation,
        "engine": manifest.engine,
        "runtime": manifest.runtime,
        "container_id": manifest.container_id,
        "container_image": plain(manifest.container_image),
        "created_s": manifest.created_s,
        "size_bytes": manifest.size_bytes,
        "freeze_s": manifest.freeze_s,
        "host": manifest.host.hostname,
        "path": str(checkpoint.directory),
        "unique_bytes": unique_bytes,
        "shared_bytes": shared_bytes,
        "stored_s": entry.stored_s,
        "origin": entry.origin,
        "tags": list(entry.tags),
        "note": entry.note,
        "pinned": entry.pinned,
        "group": entry.group,
    }


def inspection_row(inspection: Inspection) -> Row:
    manifest: Manifest = inspection.manifest
    row = {key: plain(getattr(manifest, key)) for key in INSPECT_FIELDS if hasattr(manifest, key)}
    row["ref"] = f"{manifest.name}@{manifest.generation}"
    row["foreign"] = manifest.foreign or ("yes" if inspection.foreign else "")
    row["sizes"] = plain(inspection.sizes)
    contents = inspection.contents
    row |= {
        "stats": plain(inspection.stats),
        "path": inspection.path,
        "signed": inspection.signed,
        "archive": {
            "bytes": inspection.archive_bytes,
            "compression": inspection.compression,
            "indexed": inspection.indexed,
            "encrypted": inspection.sealed,
        },
        "tasks": plain(contents.tasks) if contents else [],
        "mounts": plain(contents.mounts) if contents else [],
        "open_kinds": plain(contents.kinds) if contents else {},
        "memory": _memory(contents) if contents else {},
        "unread": inspection.unread,
    }
    for task in row["tasks"]:
        if (words := inspection.words.get(task["pid"])) is not None:
            task |= plain(words)
    return {key: row[key] for key in INSPECT_FIELDS}


def _memory(contents: Contents) -> Row:
    """The memory of all processes together; shared memory is counted once."""
    kinds: dict[str, int] = {}
    for task in contents.tasks:
        for kind, count in task.memory.by_kind_bytes.items():
            kinds[kind] = kinds.get(kind, 0) + count
    return {
        "image_bytes": sum(task.memory.image_bytes for task in contents.tasks) + contents.shared_bytes,
        "shared_image_bytes": contents.shared_bytes,
        "parent_bytes": sum(task.memory.parent_bytes for task in contents.tasks),
        "zero_bytes": sum(task.memory.zero_bytes for task in contents.tasks),
        "mapped_by_kind_bytes": kinds,
    }


def found_row(ref: str, found: Found) -> Row:
    return {"ref": ref, **plain(dataclasses.replace(found, context=b"")), "context": found.context.hex()}


def check_row(target: str, ok: bool, findings: tuple[Finding, ...]) -> Row:
    return {"name": target, "ok": ok, "findings": plain(findings)}
