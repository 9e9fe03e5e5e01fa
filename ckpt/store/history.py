"""What became of jobs that are over: a small file each, ROOT/history/ID.json (0600), bounded in number and in age.

Nothing depends on it: a record that cannot be written is not written, one that cannot be read is not listed.
"""

from __future__ import annotations

import json
import os
import re
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Final

from ckpt.model import JobRecord
from ckpt.store import durable, place
from ckpt.store.job import Job

SCHEMA: Final = 1
KEPT_RECORDS: Final = 1000
KEPT_S: Final = 90 * 86400.0
TORN_S: Final = 3600.0
JOB_ID: Final = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}")
STASH: Final = "record.json"
"""In a job's directory: what its command knew when it had to leave the job to somebody else."""
_KINDS: Final = {"migrate-source": "migrate", "migrate-destination": "receive"}
_RECORD_CAP_BYTES: Final = 256 << 10
_TEXT_CAP: Final = 4096
_ITEMS_CAP: Final = 1000
_DEPTH_CAP: Final = 6
_NUMBER_CAP: Final = 1 << 62
_LATEST_S: Final = 253402300799.0
"""The end of the year 9999: what a clock can be made to say."""


def directory(root: Path) -> Path:
    """The history of the store at `root`."""
    return place.history(root)


def of_journal(job: Job) -> JobRecord | None:
    """What a job's journal tells; None for one that never began. `state` is how it ended: done, rolled-back, failed or lost."""
    entries = job.entries()
    facts: dict[str, Any] = {}
    for entry in entries:
        facts.update(entry)
    kind = str(facts.get("kind", ""))
    if not kind:
        return None
    states = [str(entry.get("state", "")) for entry in entries]
    began_s, ended_s = _moment(entries[0].get("t")), _moment(entries[-1].get("t"))
    statistics: dict[str, Any] = {"total_s": round(max(0.0, ended_s - began_s), 6)}
    statistics |= {key: facts[key] for key in ("checkpoint_id", "freeze_s", "overridden") if key in facts}
    if facts.get("lazy"):
        statistics["lazy"] = True
    said = facts.get("error")
    found = JobRecord(
        id=job.id,
        kind=_KINDS.get(kind, kind),
        state=_outcome(kind, states),
        name=str(facts.get("name", "")),
        engine=str(facts.get("engine", "")),
        container_id=str(facts.get("live_container_id") or facts.get("new_container_id") or facts.get("container_id") or ""),
        source=str(facts.get("source", "")),
        destination=str(facts.get("destination", "")),
        mode="plain" if "plain_name" in facts else "",
        started_s=began_s,
        ended_s=ended_s,
        settled_by=str(facts.get("by", "")),
        reason=str(facts.get("reason", "")),
        error={"message": str(said)} if said else None,
        statistics=statistics,
    )
    found = _checked(_plain(found), job.id) or found
    stashed = _read(job.directory / STASH, job.id)
    return merged(stashed, found) if stashed else found


def _outcome(kind: str, states: list[str]) -> str:
    if "lost" in states:
        return "lost"
    if states[-1] == "rolled-back":
        return "rolled-back"
    # A migration that fails after `commit` and before the destination took over goes on at its source.
    after = states[len(states) - states[::-1].index("commit") :] if "commit" in states else ["failed"]
    if "failed" in after:
        return "rolled-back" if kind.startswith("migrate") else "failed"
    return "done" if kind != "migrate-source" or "done" in states else "waiting"


def merged(old: JobRecord, new: JobRecord) -> JobRecord:
    """Both as one: what the newer knows wins. What ended well keeps no error of its way."""
    known = {f.name: getattr(new, f.name) for f in fields(JobRecord) if getattr(new, f.name) not in ("", None, {}, 0.0)}
    known["statistics"] = {**old.statistics, **new.statistics}
    found = replace(old, **known)
    return replace(found, next="", error=None if found.state == "done" else found.error)


def keep(root: Path, record: JobRecord) -> None:
    """Write a record, or add to the one that is there, and forget what is too old or too many. Never raises for the disk's sake."""
    place = directory(root) / f"{record.id}.json"
    if not JOB_ID.fullmatch(record.id):
        return
    with suppress(OSError):
        old = _read(place, record.id)
        _write(place, merged(old, record) if old else record)
    with suppress(OSError):
        _prune(directory(root), time.time())


def stash(job: Job, record: JobRecord) -> None:
    """Leave in the job's directory what its command knows, for the record that somebody else makes in the end."""
    with suppress(OSError):
        _write(job.directory / STASH, record)


def load(root: Path, job_id: str) -> JobRecord | None:
    """The record of one job; None when there is none that can be read."""
    return _read(directory(root) / f"{job_id}.json", job_id) if JOB_ID.fullmatch(job_id) else None


def records(root: Path) -> list[JobRecord]:
    """All that can be read, oldest first.

    Raises:
        OSError: the directory itself cannot be read.
    """
    found = (_read(path, path.stem) for path in _files(directory(root)))
    return sorted((record for record in found if record is not None), key=lambda record: (record.started_s, record.id))


def _files(place: Path) -> Iterator[Path]:
    try:
        names = sorted(os.listdir(place))
    except FileNotFoundError:
        return
    for name in names[-2 * KEPT_RECORDS :]:
        if name.endswith(".json") and JOB_ID.fullmatch(name.removesuffix(".json")):
            yield place / name


def _prune(place: Path, now_s: float) -> None:
    whole = sorted((name for name in os.listdir(place) if name.endswith(".json")), reverse=True)
    torn = [name for name in os.listdir(place) if name.endswith(".json.part")]
    for name in [*whole[:KEPT_RECORDS], *torn]:
        with suppress(OSError):
            if now_s - (place / name).lstat().st_mtime > (TORN_S if name in torn else KEPT_S):
                (place / name).unlink()
    for name in whole[KEPT_RECORDS:]:
        with suppress(OSError):
            (place / name).unlink()


def _write(path: Path, record: JobRecord) -> None:
    text = json.dumps(_plain(record), ensure_ascii=True, separators=(",", ":"))
    if len(text) > _RECORD_CAP_BYTES:
        text = json.dumps(_plain(replace(record, statistics={"omitted": True})), ensure_ascii=True)
    durable.write_file(path, text.encode() + b"\n")


def _plain(record: JobRecord) -> dict[str, Any]:
    """As JSON, with everything that came from elsewhere within its bounds."""
    document = _bounded({"schema": SCHEMA, **asdict(record)}, _DEPTH_CAP)
    assert isinstance(document, dict)
    return document


def _read(path: Path, job_id: str) -> JobRecord | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return None
            text = file.read(_RECORD_CAP_BYTES + 1)
        return _checked(json.loads(text), job_id) if len(text) <= _RECORD_CAP_BYTES else None
    except (OSError, ValueError, RecursionError):
        return None


def _checked(document: object, job_id: str) -> JobRecord | None:
    """A record of what a file says; None when it is none. Keys of later versions are left out."""
    if not isinstance(document, dict) or document.get("id") != job_id or not isinstance(document.get("schema"), int):
        return None
    given = _bounded(document, _DEPTH_CAP)
    values: dict[str, Any] = {}
    for name in (f.name for f in fields(JobRecord)):
        value = given.get(name)
        if name in ("started_s", "ended_s"):
            values[name] = _moment(value) or (0.0 if name == "started_s" else None)
        elif name == "statistics":
            values[name] = value if isinstance(value, dict) else {}
        elif name == "error":
            values[name] = value if isinstance(value, dict) and isinstance(value.get("message"), str) else None
        else:
            values[name] = value if isinstance(value, str) else ""
    return JobRecord(**values) if values["kind"] and values["state"] else None


def _moment(value: object) -> float:
    """A time of the clock, 0.0 for what is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _LATEST_S else 0.0


def _bounded(value: Any, depth: int) -> Any:
    """A JSON value without what nobody can show: depth, lengths, numbers and characters (lone surrogates) have limits."""
    if isinstance(value, str):
        return value[:_TEXT_CAP].encode(errors="replace").decode()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return value if abs(value) < _NUMBER_CAP else None  # also None for nan and inf
    if depth and isinstance(value, dict):
        return {_bounded(str(key), 0): _bounded(item, depth - 1) for key, item in list(value.items())[:_ITEMS_CAP]}
    if depth and isinstance(value, list | tuple):
        return [_bounded(item, depth - 1) for item in value[:_ITEMS_CAP]]
    return None if isinstance(value, dict | list | tuple) else str(value)[:_TEXT_CAP]
