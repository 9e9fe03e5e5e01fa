"""Checkpoints of earlier hibernations: raw memory takes its full size each time, so only the newest of each workload stays."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from ckpt.errors import CkptError
from ckpt.events import Emit, Notice
from ckpt.model import Checkpoint
from ckpt.ops.hibernate.settings import HibernateSettings
from ckpt.store.catalog import Catalog
from ckpt.store.retention import when_s

TAG: Final = "hibernate"


def forget(catalog: Catalog, settings: HibernateSettings, of: Iterable[Checkpoint], emit: Emit) -> None:
    """Of each of these workloads the last `keep_last` checkpoints of hibernations stay, and what is pinned."""
    keep = settings.keep_last
    if keep is None:
        if settings.memory != "raw":
            return
        keep = 1
    names = {_workload(checkpoint) for checkpoint in of}
    mine = [c for c in catalog.all() if TAG in c.entry.tags and not c.entry.pinned and not c.entry.foreign] if names else []
    for name in names:
        for old in sorted((c for c in mine if _workload(c) == name), key=when_s)[: -keep or None]:
            try:
                catalog.remove(old)
            except CkptError as error:
                emit(Notice("", f"{old.ref} is still there: {error.message}", warning=True))


def make_room(catalog: Catalog, running: Iterable[tuple[str, str]], emit: Emit) -> bool:
    """Remove the checkpoints of hibernations of workloads that run: they are of the past, and nothing is left without them.

    Args:
        running: engine and name of each.

    Returns:
        Whether any was removed.
    """
    wanted, gone = set(running), []
    for checkpoint in catalog.all():
        if TAG in checkpoint.entry.tags and not checkpoint.entry.pinned and not checkpoint.entry.foreign and _workload(checkpoint) in wanted:
            with suppress(CkptError):
                catalog.remove(checkpoint)
                gone.append(checkpoint.ref)
    if gone:
        emit(Notice("", f"to make room, checkpoints of earlier hibernations are removed: {', '.join(gone)}"))
    return bool(gone)


def _workload(checkpoint: Checkpoint) -> tuple[str, str]:
    return checkpoint.manifest.engine, checkpoint.manifest.name
