"""What really is, for a drain whose owner died: the jobs of its migrations tell, and they are brought to their end first."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckpt.engines import registry
from ckpt.errors import CkptError
from ckpt.events import Emit, Notice
from ckpt.model import JobRecord
from ckpt.ops import children, jobs, recover
from ckpt.store import drains
from ckpt.store.drains import Drain, DrainItem, DrainState

WAIT_LIMIT_S: Final = 3600.0
"""How long a migration that a dead drain began is waited for."""
SETTLE_LIMIT_S: Final = 90.0
NEWBORN_S: Final = 5.0
_POLL_S: Final = 0.1
_SLACK_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Truth:
    """`state`: moved, waiting (job), here, or gone (it is not here, and no migration took it)."""

    state: str
    job: str = ""
    destination: str = ""


def settle(journal: Drain, *, store_root: Path, emit: Emit) -> None:
    """Bring the journal to agree with what is; migrations in doubt are continued. The caller has the journal's lock."""
    for target, state in journal.states().items():
        if state.state not in drains.UNSURE:
            continue
        _wait(target, state, emit)
        if state.state == "saving":
            journal.write("dropped", item=target, reason="its saving was broken off")  # what was saved has ended, so it is not found again
            continue
        found = settled(journal, target, store_root, emit)
        if found.state == "waiting" and continue_(found.job, store_root=store_root, emit=emit) is None:
            found = settled(journal, target, store_root, emit)
        match found.state:
            case "moved":
                item = _item(journal, target)
                facts = {"container_id": item.container_id} if "container_id" not in state.facts else {}
                journal.write("moved", item=target, destination=found.destination, job=found.job, error=None, **facts)
            case "here":
                journal.write("dropped", item=target, reason="it was broken off, and runs here")
            case other:
                journal.write(other, item=target, job=found.job, reason="" if other == "waiting" else "it is not here any more")


def truth(journal: Drain, target: str, *, store_root: Path) -> Truth:
    """Where a workload is that was being moved, by its job; without one, by its engine."""
    item, state = _item(journal, target), journal.states()[target]
    record = _record(item, state, store_root)
    destination = str(state.facts.get("destination") or item.destination)
    if record is not None and record.state == "done":
        return Truth("moved", record.id, record.destination or destination)
    if record is not None and record.state in jobs.NOT_OVER:
        return Truth("waiting" if record.state == "waiting" else "unsettled", record.id, destination)
    return Truth("here" if runs_here(item) else "gone", record.id if record is not None else "", destination)


def continue_(job: str, *, store_root: Path, emit: Emit) -> CkptError | None:
    """`ckpt migrate --continue`; the error when it still waits."""
    words = ["migrate", "--store", str(store_root), "--format", "jsonl", "--continue", job]
    return children.run(words, emit=emit).error


def _item(journal: Drain, target: str) -> DrainItem:
    return next(item for item in journal.items if item.target == target)


def _wait(target: str, state: DrainState, emit: Emit) -> None:
    """Until the migration that a dead drain began has ended."""
    began_s = state.facts.get("began_s")
    while state.facts.get("child") is None and isinstance(began_s, int | float) and 0 <= time.time() - began_s < NEWBORN_S:
        time.sleep(_POLL_S)  # it died as it began that one: its job is there by then, or never
    if not children.alive(state.facts.get("child")):
        return
    emit(Notice(target, "its migration is still under way; waiting for it"))
    until_s = time.monotonic() + WAIT_LIMIT_S
    while children.alive(state.facts.get("child")) and time.monotonic() < until_s:
        time.sleep(_POLL_S)


def settled(journal: Drain, target: str, store_root: Path, emit: Emit) -> Truth:
    """The truth, when its guard (or we) have brought an interrupted migration to its end."""
    until_s = time.monotonic() + SETTLE_LIMIT_S
    while (found := truth(journal, target, store_root=store_root)).state == "unsettled" and time.monotonic() < until_s:
        for said in recover.sweep(store_root):
            emit(Notice(target, said))
        time.sleep(_POLL_S)
    return found if found.state != "unsettled" else Truth("waiting", found.job, found.destination)


def _record(item: DrainItem, state: DrainState, store_root: Path) -> JobRecord | None:
    """The newest migration of this workload since it was begun."""
    since_s = state.facts.get("began_s")
    since_s = float(since_s) - _SLACK_S if isinstance(since_s, int | float) else 0.0
    found = [
        record
        for record in jobs.jobs(store_root=store_root)
        if record.kind == "migrate" and record.engine == item.engine and record.container_id == item.container_id and record.started_s >= since_s
    ]
    return found[-1] if found else None


def runs_here(item: DrainItem) -> bool:
    """Whether this host has it, running."""
    with suppress(CkptError, StopIteration):
        engine = registry.by_name(item.engine)
        container = next(one for one in engine.find(item.container_id) if one.id == item.container_id)
        return engine.describe(container).state in ("running", "paused")
    return False
