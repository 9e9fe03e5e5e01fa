"""A place for what must not be on a disk in clear: drafts in memory (tmpfs or ramfs), 0700, swept as the store's own are.

Only the small members need room there. What goes through a draft's sinks (memory pages, files) is on the store's disk, encrypted with a key that is
nowhere but in our memory, in a file that has no name.

Memory may still be swapped out: docs/security.md says what to do about that.
"""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Final

from ckpt.errors import FeatureMissing
from ckpt.store.catalog import Catalog

PLACES: Final = (Path("/run/ckpt-sealed"), Path("/dev/shm/ckpt-sealed"))  # noqa: S108
_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})


def catalog(store_root: Path | None = None) -> Catalog:
    """Where drafts can be made in memory: of the places that are, the one with the most room.

    Args:
        store_root: of the store on whose disk sinks may put what they take, encrypted; None: all is in memory.

    Raises:
        FeatureMissing: there is none that is in memory and ours alone.
    """
    usable = [place for place in PLACES if _prepared(place)]
    if not usable:
        places = " nor ".join(str(place.parent) for place in PLACES)
        raise FeatureMissing(f"neither {places} is in memory (tmpfs): what is to be encrypted would be on a disk in clear",
                             hint="mount a tmpfs there, or save it to the store first and export that")  # fmt: skip
    spill = None if store_root is None else Catalog(store_root).drafts
    return Catalog(max(usable, key=_free_bytes), key=secrets.token_bytes(32), spill=spill)


def sweep() -> list[str]:
    """Remove what dead owners left; never raises for a place that is not ours."""
    return [name for place in PLACES if place.is_dir() and _is_ours(place) for name in Catalog(place).sweep()]


def _prepared(place: Path) -> bool:
    if not in_memory(place.parent):
        return False
    try:
        place.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError:
        return False
    return _is_ours(place)


def _is_ours(place: Path) -> bool:
    """A directory (no link) of this user that nobody else can look into."""
    try:
        facts = os.lstat(place)
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid() and not facts.st_mode & 0o077


def _free_bytes(place: Path) -> int:
    space = os.statvfs(place)
    return space.f_bavail * space.f_frsize


def in_memory(path: Path) -> bool:
    """Whether the file system that `path` is on has no disk below it (proc_pid_mountinfo(5))."""
    try:
        device = os.stat(path).st_dev
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    wanted = f"{os.major(device)}:{os.minor(device)}"
    kinds = {line.partition(" - ")[2].split(" ", 1)[0] for line in lines if line.split(" ", 3)[2] == wanted}
    return bool(kinds) and kinds <= _IN_MEMORY
