"""Things that are built once and kept outside the checkout, named by the digest of what they are made of."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

SYSTEM_CACHE = Path("/var/cache/ckpt-lab")


class LabUnavailable(Exception):
    """A prerequisite of the lab is missing; the message says which one and what to do."""


def cache_directory() -> Path:
    """Where the lab keeps what it built: `CKPT_LAB_CACHE`, else /var/cache/ckpt-lab (root) or the user's cache directory."""
    if override := os.environ.get("CKPT_LAB_CACHE"):
        return Path(override)
    if os.geteuid() == 0:
        return SYSTEM_CACHE
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ckpt-lab"


def digest(*parts: bytes) -> str:
    """A short name for contents (each part counts with its length, so that parts cannot run into each other)."""
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "little"))
        total.update(part)
    return total.hexdigest()[:12]


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold an flock on `path` (made when missing) for the length of the block."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The cache directory `name`; when it is not there `build` fills it under a temporary name and it is renamed when whole."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    final = cache / name
    if final.exists():
        os.utime(final)  # what was used last is kept longest
        return final
    with locked(cache / f"{name}.lock"):
        if not final.exists():
            partial = cache / f"{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(mode=0o755)
            build(partial)
            partial.rename(final)
    return final


def prune(prefix: str, keep: int) -> None:
    """Remove all but the `keep` last used directories `prefix*`, leaving those whose lock a running lab holds."""
    cache = cache_directory()
    found = [path for path in cache.glob(f"{prefix}*") if path.is_dir() and path.suffix != ".partial"]
    for path in sorted(found, key=lambda p: p.stat().st_mtime, reverse=True)[keep:]:
        fd = os.open(cache / f"{path.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
            (cache / f"{path.name}.lock").unlink(missing_ok=True)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
