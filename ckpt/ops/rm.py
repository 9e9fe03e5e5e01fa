"""Remove checkpoints from the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ckpt.errors import BusyError, CkptError, UsageError
from ckpt.events import Emit
from ckpt.model import Checkpoint
from ckpt.ops import recover
from ckpt.ops.result import Outcome, failure
from ckpt.store.catalog import Catalog
from ckpt.store.job import DEFAULT_ROOT


def rm(refs: Sequence[str], *, all: bool = False, store_root: Path = DEFAULT_ROOT, emit: Emit) -> list[Outcome]:
    """Remove what `refs` name (a bare NAME: its newest checkpoint), or everything that is not pinned. All are found before the first one goes.

    Raises:
        UsageError: neither or both of `refs` and `all`.
    """
    if bool(refs) == all:
        raise UsageError("name what to remove, or say --all, one of them")
    catalog = Catalog(store_root)
    chosen: dict[str, tuple[str, Checkpoint]] = {}
    outcomes: list[Outcome] = []
    if all:
        chosen = {c.manifest.id: (c.ref, c) for c in catalog.all() if not c.entry.pinned}
    for ref in refs:
        try:
            found = catalog.find(ref)
            if found.entry.pinned:
                raise BusyError(f"{found.ref} is pinned", where="it is still in the store", hint=f"ckpt pin --remove {found.ref}")
            chosen.setdefault(found.manifest.id, (ref, found))
        except CkptError as error:
            outcomes.append(failure(ref, error))
    if outcomes:
        return outcomes  # a mistyped name: nothing is removed
    for label, checkpoint in chosen.values():
        try:
            _remove(catalog, checkpoint)
            outcomes.append(Outcome(label, True, checkpoint, stats={"size_bytes": checkpoint.manifest.size_bytes}))
        except CkptError as error:
            outcomes.append(failure(label, error))
    return outcomes


def _remove(catalog: Catalog, checkpoint: Checkpoint) -> None:
    try:
        catalog.remove(checkpoint)
    except BusyError as error:
        for facts in recover.served(catalog.root):
            if facts.get("lazy", {}).get("checkpoint_id") == checkpoint.manifest.id:
                error.message = f"{checkpoint.ref} is in use: the memory of {facts.get('name')} is still arriving from it"
                error.hint = "wait until all of it is there: seconds, as a rule (ckpt restore --lazy)"
        raise
