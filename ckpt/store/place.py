"""Where a store keeps what is this host's own: its jobs and their history.

Beside the checkpoints, as a rule. A store on a network mount may be another host's as well, whose jobs are none of ours, and not every
network mount has FIFOs: then they are in a directory of the default store, with a link `store` to the one they belong to.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Final

from ckpt.host import filesystem

DEFAULT_ROOT: Final = Path("/var/lib/ckpt")
_AWAY: Final = "away"
_STORE: Final = "store"
HIBERNATIONS: Final = "hibernate"


def own(root: Path) -> Path:
    """The directory for what is this host's own in the store at `root`."""
    return _own(os.path.realpath(root))


@lru_cache(maxsize=32)
def _own(root: str) -> Path:
    if not filesystem.is_shared(Path(root)):
        return Path(root)
    place = DEFAULT_ROOT / _AWAY / hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        os.symlink(root, place / _STORE)
    except FileExistsError:
        pass
    return place


def jobs(root: Path) -> Path:
    """The jobs of this host that concern the store at `root`."""
    return own(root) / "jobs"


def history(root: Path) -> Path:
    """The records of those that are over."""
    return own(root) / "history"


def chains(root: Path) -> Path:
    """What was taken as evidence to the store at `root`: a list for each case. With the checkpoints: a store that is moved takes it along."""
    return root / "evidence"


def hibernations(root: Path) -> Path:
    """What was saved of this host, for the time after its next start, to the store at `root`."""
    return own(root) / HIBERNATIONS


def drains(root: Path) -> Path:
    """The journals of the times that this host was drained."""
    return own(root) / "drains"


def store_of(job_directory: Path) -> Path:
    """The root of the store that a job concerns."""
    place = job_directory.parent.parent
    try:
        return Path(os.readlink(place / _STORE))
    except OSError:
        return place
