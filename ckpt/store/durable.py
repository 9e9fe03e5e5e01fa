"""Bytes that survive a power cut: fsync of whole trees, files that are replaced at once or not at all."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

THREADS: Final = 8
"""fsync waits for the disk, not for a processor: more threads than cores keep its queue full."""

_SYNC_FILE_RANGE_WRITE: Final = 2


def sync_directory(path: Path) -> None:
    """Bring the entries of one directory to the disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Bring the content of one regular file to the disk (a link or FIFO in its place is left alone)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        fd = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(root: Path) -> None:
    """Bring every regular file below `root`, then every directory (deepest first), to the disk.

    Raises:
        OSError: the disk is full or broken (delayed allocation shows ENOSPC only here).
    """
    directories = [Path(d) for d, _, _ in os.walk(root, topdown=False)]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(sync_file, _regular_files(root)):
            pass
    for directory in directories:
        sync_directory(directory)


def begin_writing(fd: int, offset: int, count: int) -> None:
    """Ask the kernel to begin to write a part of a file to the disk, without waiting for it (sync_file_range(2)). Promises nothing."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "sync_file_range"):
        libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        libc.sync_file_range(fd, offset, count, _SYNC_FILE_RANGE_WRITE)


def write_file(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Write or replace a file so that it is whole after a crash at any point; its directory is made (0700) and synced."""
    if not path.parent.is_dir():
        path.parent.mkdir(mode=0o700, parents=True)
        sync_directory(path.parent.parent)
    part = path.with_name(path.name + ".part")
    fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "wb") as out:
        out.write(content)
        out.flush()
        os.fsync(fd)
    os.rename(part, path)
    sync_directory(path.parent)


def tree_size_bytes(root: Path, *, skip: str = "") -> int:
    """Bytes that the regular files below `root`, but for what is in `root/skip`, hold (their length, not the blocks they take)."""
    return sum(path.lstat().st_size for path in _regular_files(root) if not skip or path.relative_to(root).parts[0] != skip)


def _regular_files(root: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            if stat.S_ISREG(path.lstat().st_mode):
                yield path
