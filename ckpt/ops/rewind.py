"""Take a workload back to an earlier checkpoint. What it is now is saved first, and comes back when the rewind fails."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

from ckpt.engines import registry
from ckpt.errors import CkptError, DigestMismatch, RestoreFailed, TargetNotFound, UsageError
from ckpt.events import Emit, Notice, StepDone, StepStarted
from ckpt.model import Checkpoint, Container, DumpOptions, RestoreOptions, Target
from ckpt.ops import checkpoint as saving
from ckpt.ops import faults, mark
from ckpt.ops import restore as restoring
from ckpt.ops.result import Outcome
from ckpt.store.catalog import Catalog
from ckpt.store.job import DEFAULT_ROOT
from ckpt.store.retention import when_s

BEFORE = "before-rewind"
"""The tag of the checkpoint that a rewind makes of the present."""


def choose(catalog: Catalog, ref: str, at_s: float | None) -> Checkpoint:
    """The checkpoint to go back to: what `ref` names, or of that name the newest that is not younger than `at_s`.

    Raises:
        TargetNotFound: none; the hint says what there is.
        UsageError: both a generation and a time.
    """
    if at_s is None:
        return catalog.find(ref)
    named = [c for c in catalog.all() if c.manifest.name == ref]
    if not named:
        if "@" in ref:
            raise UsageError("name a generation or a time, not both")
        catalog.find(ref)  # says what is close
        raise UsageError("--at goes with a name, not with an id")
    older = [c for c in named if when_s(c) <= at_s]
    if not older:
        first = min(named, key=when_s)
        raise TargetNotFound(f"no checkpoint of {ref} is that old", hint=f"the oldest is {first.ref}, of {_clock(when_s(first))}")
    return max(older, key=when_s)


def rewind(
    ref: str,
    *,
    at_s: float | None = None,
    discard: bool = False,
    dump: DumpOptions,
    options: RestoreOptions,
    store_root: Path = DEFAULT_ROOT,
    emit: Emit,
) -> Outcome:
    """Restore an earlier checkpoint in place of what runs.

    The checkpoint is known to be whole before anything is touched. A running container is saved (as its newest checkpoint, tagged
    "before-rewind") and ended by that; when the restore fails then, that one is restored.

    Args:
        discard: remove what was saved of the present once the past runs.

    Raises:
        DigestMismatch: the checkpoint is damaged; the container runs on, untouched.
        RestoreFailed: the rewind failed; `where` says what runs now.
        CkptError: as `checkpoint` and `restore`.
    """
    catalog = Catalog(store_root)
    target = choose(catalog, ref, at_s)
    running = _running(target)
    present: Checkpoint | None = None
    warnings: tuple[str, ...] = ()
    if running is not None:
        began = time.monotonic()
        emit(StepStarted(ref, "verify", target.ref))
        if problems := catalog.check(target):
            where = f"{running.name or running.id} is running, untouched"
            raise DigestMismatch(f"{target.ref} is damaged: {problems[0]}", where=where, hint="choose another one: ckpt list " + target.manifest.name)
        emit(StepDone(ref, "verify", "whole", time.monotonic() - began))
        label = f"{running.engine}:{running.name or running.id}"
        saved = saving.checkpoint([Target.parse(label)], options=replace(dump, leave_running=False), store_root=store_root, emit=emit)[0]
        if saved.error is not None or saved.checkpoint is None:
            raise saved.error or CkptError(f"{label} could not be saved")
        present = saved.checkpoint
        mark.tag([present.manifest.id], [BEFORE], [], store_root=store_root)
        mark.note([present.manifest.id], f"what ran before the rewind to {target.ref}", store_root=store_root)
        faults.point("rewind-saved")
    try:
        outcome = restoring.restore([target.manifest.id], options=options, store_root=store_root, emit=emit)[0]
    except BaseException as error:
        said = error if isinstance(error, CkptError) else RestoreFailed("it was broken off")
        undone = _undone(said, target, present, store_root, emit)
        if isinstance(error, CkptError) or _running(target) is None:
            raise undone from error
        raise
    if outcome.error is not None:
        raise _undone(outcome.error, target, present, store_root, emit)
    if present is not None and discard:
        try:
            catalog.remove(present)
        except CkptError as error:
            warnings = (f"{present.ref}, what ran before, is still in the store: {error.message}",)
    elif present is not None:
        emit(Notice(ref, f"what ran before is {present.ref}"))
    stats = dict(outcome.stats)
    if present is not None and not discard:
        stats["before"] = present.ref
    return Outcome(ref, True, target, outcome.container, warnings=(*outcome.warnings, *warnings), stats=stats)


def _undone(error: CkptError, target: Checkpoint, present: Checkpoint | None, store_root: Path, emit: Emit) -> CkptError:
    """The restore of the past failed: bring the present back."""
    if present is None:
        return error
    emit(Notice(target.ref, f"it could not be restored ({error.message}): {present.ref}, what ran before, comes back", warning=True))
    back = restoring.restore([present.manifest.id], options=RestoreOptions(), store_root=store_root, emit=emit)[0]
    if back.error is None:
        where = f"{present.manifest.name} runs on as it was before (from {present.ref})"
        return RestoreFailed(f"the rewind to {target.ref} failed: {error.message}", where=where, hint=error.hint, log=error.log)
    return RestoreFailed(
        f"the rewind to {target.ref} failed ({error.message}), and so did bringing back what ran before: {back.error.message}",
        where=f"nothing is running; {target.ref} and {present.ref}, what ran before, are in the store",
        hint=back.error.hint or f"ckpt restore {present.ref}",
        log=error.log or back.error.log,
    )


def _running(target: Checkpoint) -> Container | None:
    engine = registry.by_name(target.manifest.engine)
    for container in (*engine.find(target.manifest.container_id), *engine.find(target.manifest.name)):
        if container.id == target.manifest.container_id and container.state == "running":
            return container
    return None


def parse_time(text: str, now_s: float) -> float:
    """A moment as people write it, local time: `14:30` (the latest one), `2026-11-21 14:30[:05]`, `20m ago`, `2h ago`. Seconds since the epoch.

    Raises:
        UsageError: it is none of these, or not in the past.
    """
    words = text.strip()
    if found := re.fullmatch(r"(\d{1,6})\s*([smhd])(?:\s+ago)?", words, re.ASCII):
        return now_s - int(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
    for form in ("%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M", "%Y-%m-%d"):
        try:
            moment = time.mktime(time.strptime(words, form))
        except (ValueError, OverflowError):
            continue
        break
    else:
        found = re.fullmatch(r"(\d{1,2}):(\d\d)(?::(\d\d))?", words, re.ASCII)
        if found is None or int(found[1]) > 23 or int(found[2]) > 59 or int(found[3] or 0) > 59:
            raise UsageError(f"{text[:64]!r} is no time", hint="14:30, 2026-11-21 14:30, or 20m ago")
        today = time.localtime(now_s)
        day = (today.tm_year, today.tm_mon, today.tm_mday)
        clock = (int(found[1]), int(found[2]), int(found[3] or 0))
        moment = time.mktime((*day, *clock, 0, 0, -1))
        if moment > now_s:
            moment = time.mktime((*day[:2], day[2] - 1, *clock, 0, 0, -1))
    if moment > now_s:
        raise UsageError(f"{text!r} is still to come")
    return moment


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
