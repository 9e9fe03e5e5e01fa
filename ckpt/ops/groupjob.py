"""The job of a group: one decision for several jobs, each of which names it in its first line (`criu.action.GROUP`).

Until its journal says `commit` every member is undone by whoever settles it, after that every one is finished, in any order and by
anybody. What tells the store that the checkpoints are a set is written beforehand under another name, and appears by a rename.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ckpt.errors import CkptError, TargetNotFound
from ckpt.store import durable, groups
from ckpt.store.catalog import Catalog

SAVE: Final = "checkpoint-group"
RESTORE: Final = "restore-group"
KINDS: Final = (SAVE, RESTORE)
_PENDING: Final = ".pending"


def propose(root: Path, group: groups.Group) -> None:
    """Write the record of a set that is to be decided on. Raises OSError."""
    path = groups.path_of(root, group.name, group.generation)
    durable.write_file(path.with_name(path.name + _PENDING), groups.dumps(group))


def publish(root: Path, facts: dict[str, Any]) -> None:
    """Make the set known that a committed job proposed. Idempotent."""
    if facts.get("kind") != SAVE:
        return
    path = groups.path_of(root, str(facts["name"]), int(facts["generation"]))
    with suppress(FileNotFoundError):
        os.rename(path.with_name(path.name + _PENDING), path)
        durable.sync_directory(path.parent)


def withdraw(root: Path, facts: dict[str, Any]) -> None:
    """Forget a set that a job proposed and did not come to. Idempotent."""
    if facts.get("kind") == SAVE:
        path = groups.path_of(root, str(facts["name"]), int(facts["generation"]))
        path.with_name(path.name + _PENDING).unlink(missing_ok=True)


def drop(root: Path, checkpoint_id: str) -> None:
    """Take the checkpoint of a member out of the store, if it got there, whose group did not come to be.

    Raises:
        CkptError: not now.
    """
    catalog = Catalog(root)
    if not checkpoint_id or not (catalog.entries / Path(checkpoint_id).name).is_dir():
        return
    try:
        catalog.remove(catalog.find(checkpoint_id))
    except TargetNotFound:
        return
    except OSError as error:
        raise CkptError(f"checkpoint {checkpoint_id} cannot be removed: {error.strerror}") from error
