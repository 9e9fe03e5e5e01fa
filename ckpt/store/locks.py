"""Locks and listings that also work on a network mount: flock on regular files opened read-write, directories that change under us.

NFS turns flock into locks of byte ranges, which need a descriptor that may write for LOCK_EX: a directory cannot be locked there.
A file that is removed while somebody has it open stays as `.nfsXXXX` until he closes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Final

_SILLY: Final = ".nfs"
ELSEWHERE_S: Final = 7 * 86400.0
"""How long a draft of another host is left alone; no dump or transfer takes that long."""


def take(path: Path, how: int) -> int:
    """Lock the file `path` (made if it is not there) and return its descriptor; closing it gives the lock back.

    Raises:
        BlockingIOError: LOCK_NB was asked for and somebody else has it.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, how)
            if _same(fd, path):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # it was removed between our open and our lock: the lock of a file that nobody else can find


def is_held(path: Path) -> bool:
    """Whether somebody has the lock `path`. A lock file that is not there is held by nobody."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def sign(fd: int) -> None:
    """Write into a lock file whose it is: on some network mounts other hosts do not see the lock itself."""
    os.pwrite(fd, os.uname().nodename.encode() + b"\n", 0)


def is_elsewhere(path: Path) -> bool:
    """Whether another host signed the lock file, lately: nobody here can know whether its owner lives."""
    try:
        with path.open("rb") as file:
            name = file.read(256).strip()
            age_s = time.time() - os.fstat(file.fileno()).st_mtime
    except OSError:
        return False
    return bool(name) and name != os.uname().nodename.encode() and age_s < ELSEWHERE_S


def listing(directory: Path) -> list[str]:
    """The names in a directory, sorted, without what a network file system hides there; [] when it is gone."""
    for _ in range(3):
        try:
            return sorted(name for name in os.listdir(directory) if not name.startswith(_SILLY))
        except FileNotFoundError:
            return []
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
    return []


def _same(fd: int, path: Path) -> bool:
    ours = os.fstat(fd)
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
