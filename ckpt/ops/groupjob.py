"""The job of a group: one decision for several jobs, each of which names it in its first line (`criu.action.GROUP`).

Until its journal says `commit` every member is undone by whoever settles it, after that every one is finished, in any order and by
anybody. What tells the store that the checkpoints are a set is written beforehand under another name, and appears by a rename.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from ckpt.criu import action
from ckpt.errors import CkptError, TargetNotFound
from ckpt.store import durable, groups
from ckpt.store.catalog import Catalog
from ckpt.store.job import Job

SAVE: Final = "checkpoint-group"
RESTORE: Final = "restore-group"
MIGRATE: Final = "migrate-group"
"""Of a migration, on the source."""
RECEIVE: Final = "receive-group"
"""Of a migration, on the destination. Its members have owners of their own, so the decision needs a lock (`deciding`)."""
KINDS: Final = (SAVE, RESTORE, MIGRATE, RECEIVE)
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


@contextmanager
def deciding(group: Job) -> Iterator[int]:
    """Nobody else decides for the group meanwhile; gives its journal, to append to. Raises FileNotFoundError when the group is gone."""
    fd = os.open(group.directory / "journal.jsonl", os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        if not os.fstat(fd).st_nlink:
            raise FileNotFoundError(group.directory)
        yield fd
    finally:
        os.close(fd)


def abandon(job: Job) -> bool:
    """Whether a job may be undone: it has not been decided for, and if it is of a group that comes here, never will be after this.

    Raises:
        OSError: the group's journal cannot be written.
    """
    facts = job.facts
    identity = Path(str(facts.get(action.GROUP) or "")).name
    if facts.get("kind") == "migrate-destination" and identity:
        group = Job(job.directory.parent / identity)
        with suppress(FileNotFoundError), deciding(group) as journal:
            if not action.committed(os.fspath(group.directory)) and group.state != "rolled-back":
                line = {"t": time.time(), "state": "rolled-back", "error": f"{facts.get('name')} was undone"}
                os.write(journal, json.dumps(line, separators=(",", ":")).encode() + b"\n")
                os.fsync(journal)
    return not action.committed(os.fspath(job.directory))


def has_word(job: Job) -> bool:
    """Whether a member's own journal says how it was decided: the group's is not needed for it any more."""
    return not job.directory.is_dir() or any(entry.get("state") in ("commit", "rolled-back", "failed") for entry in job.entries())


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
