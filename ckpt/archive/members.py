"""The members of a checkpoint, wherever they are: in a directory, in a store's chunks, in an archive."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol

from ckpt.archive.layout import stage_members


class Members(Protocol):
    """Read-only access to the members of one checkpoint. Names are those of the layout; directories end in "/"."""

    def names(self) -> list[str]:
        """Every member, in the archive's order."""

    def size_bytes(self, name: str) -> int:
        """The size of a member; 0 for a directory."""

    def mtime_s(self, name: str) -> float:
        """Seconds since the epoch; 0 when nobody knows."""

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        """A member for reading from its beginning to its end (`readinto`); not all can seek."""


class StageMembers:
    """The members in a directory: an unpacked archive, a dump under way."""

    def __init__(self, stage: Path) -> None:
        self.stage = stage

    def names(self) -> list[str]:
        """As `layout.stage_members`."""
        return stage_members(self.stage)

    def size_bytes(self, name: str) -> int:
        """The size of a member; 0 for a directory."""
        return 0 if name.endswith("/") else os.lstat(self.stage / name).st_size

    def mtime_s(self, name: str) -> float:
        """When it was written; 0 for a directory that is not there."""
        try:
            return os.lstat(self.stage / name).st_mtime
        except FileNotFoundError:
            return 0.0

    def open(self, name: str) -> BinaryIO:
        """A plain file, without following a link."""
        fd = os.open(self.stage / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return os.fdopen(fd, "rb", buffering=0)
