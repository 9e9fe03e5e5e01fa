"""The jobs of this host: those under way, those that wait for somebody, and what became of the others. Read only."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Final

from ckpt.criu import lazy
from ckpt.errors import TargetNotFound, UsageError
from ckpt.model import JobRecord
from ckpt.ops import recover
from ckpt.store import history
from ckpt.store import place as places
from ckpt.store.catalog import Catalog
from ckpt.store.job import DEFAULT_ROOT, Job

NOT_OVER: Final = ("running", "waiting", "unconfirmed", "serving", "interrupted")
RECENT_S: Final = 86400.0
"""Without a filter, what ended longer ago than this is not shown."""
FILTERS: Final = ("name", "state", "kind", "engine", "destination")


def jobs(*, store_root: Path = DEFAULT_ROOT) -> list[JobRecord]:
    """All that can be read, newest last.

    Raises:
        PermissionDenied: the store cannot be opened.
    """
    with Catalog(store_root).storage("read the jobs"):
        place = places.jobs(store_root)
        found = {}
        for directory in place.iterdir() if place.is_dir() else []:
            if history.JOB_ID.fullmatch(directory.name) and (record := _living(Job(directory))) is not None:
                found[record.id] = record
        for record in history.records(store_root):
            found.setdefault(record.id, record)
    return sorted(found.values(), key=lambda record: (record.started_s, record.id))


def selected(
    found: list[JobRecord], *, every: bool = False, running: bool = False, last: int | None = None, filters: tuple[str, ...] = ()
) -> list[JobRecord]:
    """Those to be listed.

    Args:
        every: also what is over for long.
        running: only what is not over.
        last: only so many of the newest.
        filters: KEY=VALUE each; several of one key: any of them.

    Raises:
        UsageError: a filter is none.
    """
    wanted: dict[str, set[str]] = {}
    for text in filters:
        key, equals, value = text.partition("=")
        if not equals or key not in FILTERS:
            raise UsageError(f"--filter: {text!r} is not known", hint=f"filters: {', '.join(f'{key}=…' for key in FILTERS)}")
        wanted.setdefault(key, set()).add(value)
    found = [record for record in found if all(getattr(record, key) in values for key, values in wanted.items())]
    if last is not None:
        return found[-last:] if last else []
    if running:
        return [record for record in found if record.state in NOT_OVER]
    since_s = time.time() - RECENT_S
    return found if every or filters else [r for r in found if r.state in NOT_OVER or (r.ended_s or r.started_s) >= since_s]


def find(ref: str, found: list[JobRecord]) -> JobRecord:
    """The job whose id is `ref`, or begins with it, or whose part after the hyphen does.

    Raises:
        TargetNotFound: there is none, or more than one.
    """
    begins = [record for record in found if ref and (record.id.startswith(ref) or record.id.partition("-")[2].startswith(ref))]
    if len(begins) == 1:
        return begins[0]
    if begins:
        raise TargetNotFound(f"{ref!r} is ambiguous: {', '.join(record.id for record in begins[-5:])}", hint="give more of it")
    shown = re.sub(r"[^\x20-\x7e]", "?", ref)
    raise TargetNotFound(f"there is no job {shown!r}", hint="ckpt jobs --all shows what there is; records are kept for 90 days")


def _living(job: Job) -> JobRecord | None:
    """A job that has a directory: how it stands."""
    record = history.of_journal(job)
    if record is None:
        return None
    state, owned = job.state, job.owned
    record = replace(record, settled_by="", ended_s=None, statistics={k: v for k, v in record.statistics.items() if k != "total_s"})
    if state == "lost":
        what = f"its memory did not all arrive: {record.reason}" if record.reason else "its memory did not all arrive"
        return replace(record, state="lost", reason=what, next=f"ckpt restore {record.name}" if record.kind == "restore" else "")
    if state == "serving":
        if lazy.running(job.directory):
            return replace(record, state="serving", reason="it runs; its memory still arrives from the checkpoint")
        return replace(record, state="interrupted" if not owned else "running")
    if owned:
        return replace(record, state="running", reason=f"at: {state}")
    if state in recover.FINAL:
        return record
    if recover.committed(job):
        if record.kind == "migrate-group":
            return replace(record, state="waiting", reason="its members wait", next=f"ckpt migrate --continue {record.id}", error=record.error)
        if record.kind == "migrate":
            where = "frozen here until the destination has been asked" if state != "ended" else "over; the destination has not been told"
            return replace(record, state="waiting", reason=where, next=f"ckpt migrate --continue {record.id}", error=record.error)
        if record.kind == "receive":
            return replace(record, state="unconfirmed", reason="it runs here; its source has not said that it knows")
    return replace(record, state="interrupted", reason="its command is gone; its guard, or the next command, brings it to its end")
