"""The wish that a tree that gets only the memory it asks for (`RestoreOptions.on_demand`) gets all of it: a dump would leave out the rest."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from ckpt.criu import lazy, tree
from ckpt.errors import BusyError
from ckpt.store import place
from ckpt.store.job import Job

FILL: Final = "fill"
"""In the directory of the restore's job: its keeper sees it, and has all brought that is left."""
FILL_LIMIT_S: Final = 120.0


def wanting(root: Path, pid: int) -> Job | None:
    """The job of the restore of a tree (its first process) that gets only what it asks for; None for any other tree."""
    jobs = place.jobs(root)
    for directory in sorted(jobs.iterdir()) if pid and jobs.is_dir() else []:
        job = Job(directory)
        facts = job.facts
        plan = facts.get("lazy")
        if job.state == "serving" and facts.get("restored_pid") == pid and isinstance(plan, dict) and plan.get("on_demand"):
            return job
    return None


def bring_rest(root: Path, pid: int, limit_s: float = FILL_LIMIT_S) -> bool:
    """Have all memory brought of a tree that gets only what it asks for: a dump needs all of it. Waits until it is there.

    Args:
        root: of the store that it was restored from.
        pid: its first process.

    Returns:
        Whether there was anything to do.

    Raises:
        BusyError: nobody is there any more to bring it, or it takes too long.
    """
    job = wanting(root, pid)
    if job is None:
        return False
    directory, facts = job.directory, job.facts
    name, keeper = str(facts.get("name", "")), int(facts.get("keeper_pid", 0))
    with suppress(OSError):
        (directory / FILL).touch(mode=0o600)
    end = time.monotonic() + limit_s
    while directory.exists() and lazy.running(directory):
        found = tree.stat(keeper)
        if found is None or not found.alive:
            why = f"{name} cannot be saved: the process that could bring the rest of its memory is gone"
            raise BusyError(why, where=f"{name} is running, with the memory that it asks for", hint="make another copy")
        if time.monotonic() > end:
            raise BusyError(f"the memory of {name} is not all there after {limit_s:g} s", where=f"{name} is running", hint="try again")
        time.sleep(lazy.POLL_S)
    return True
