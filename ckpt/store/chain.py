"""The list of a case's snapshots: ROOT/evidence/CASE.jsonl, one JSON object a line (number, id, digest, taken_s), only ever added to.

The chain itself is in the manifests, which name each other's digests. The list knows what else nobody could: that the last one is missing.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from ckpt.store import durable, locks, place

MAX_BYTES: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Link:
    """One snapshot. `digest`: "sha256:HEX" of its manifest."""

    number: int
    id: str
    digest: str
    taken_s: float = 0.0


@contextmanager
def locked(root: Path, case: str) -> Iterator[None]:
    """Nobody else adds to the case meanwhile. Raises OSError."""
    directory = place.chains(root)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = locks.take(directory / f"{case}.lock", fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(fd)


def read(root: Path, case: str) -> list[Link]:
    """The list, as far as it can be read: a torn last line (power loss) is left out. Raises OSError."""
    path = place.chains(root) / f"{case}.jsonl"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES)
    except FileNotFoundError:
        return []
    found: list[Link] = []
    for line in data.split(b"\n"):
        try:
            plain = json.loads(line)
            found.append(Link(int(plain["number"]), str(plain["id"]), str(plain["digest"]), float(plain.get("taken_s", 0.0))))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def add(root: Path, case: str, link: Link) -> None:
    """Append a line, on the disk. Raises OSError."""
    path = place.chains(root) / f"{case}.jsonl"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        # A line of its own even after a torn one.
        os.write(fd, (b"\n" if os.fstat(fd).st_size else b"") + json.dumps(asdict(link), separators=(",", ":")).encode() + b"\n")
        os.fsync(fd)
    finally:
        os.close(fd)
    durable.sync_directory(path.parent)
