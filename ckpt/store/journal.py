"""A journal of several workloads' way: what a hibernation and a drain have in common.

A directory of its own: `journal.jsonl`, one JSON object a line, on the disk before the step that it announces; `lock`, flock of the living
owner, who writes his pid and its start (clock ticks since boot) into it: a dead one's guard has the lock as well, and is none. Lines with
`item` are about one workload, those with `members` about several, the others about the whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Final

from ckpt.errors import BusyError
from ckpt.host import procread

_START: Final = 19
"""Of procread.stat_fields: field 22 of /proc/PID/stat, counted from the state on (proc_pid_stat(5))."""


class Journal:
    """One journal's directory."""

    what: ClassVar[str] = "journal"
    """What it is the journal of, for messages."""
    look: ClassVar[str] = ""
    """The command that shows it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock_fd: int | None = None

    @property
    def id(self) -> str:
        return self.directory.name

    def acquire(self, *, wait: bool = False) -> None:
        """Become the owner. Raises BusyError when another ckpt has the lock (`wait`, of a guard: block until it is gone, and be no owner)."""
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(fd)
            raise BusyError(f"another ckpt works on {self.what} {self.id}", hint=self.look or None) from None
        self._lock_fd = fd
        if not wait:
            self._sign(f"{os.getpid()} {_start_ticks(os.getpid())}\n")
        self._mend()

    @property
    def owned(self) -> bool:
        """Whether its owner lives. Nothing is locked to see that: it would be in the way of somebody who wants to become it."""
        try:
            pid, ticks = map(int, (self.directory / "lock").read_text().split())
        except (OSError, ValueError):
            return False
        return _start_ticks(pid) == ticks and procread.state_of(pid) not in ("Z", "X", "")

    def _sign(self, text: str) -> None:
        """Say in the lock file whose it is. On a full disk nobody says it: it is for those who look."""
        assert self._lock_fd is not None
        with suppress(OSError):
            os.ftruncate(self._lock_fd, 0)
            os.pwrite(self._lock_fd, text.encode(), 0)

    def _mend(self) -> None:
        """Cut off a torn last line (power loss): what is written after it would be hidden by it."""
        path = self.directory / "journal.jsonl"
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.truncate(path, whole)

    def release(self) -> None:
        """Give the lock back (the kernel does it too when the owner dies)."""
        if self._lock_fd is not None:
            self._sign("")
            os.close(self._lock_fd)
            self._lock_fd = None

    def write(self, state: str, *, item: str = "", **facts: Any) -> None:
        """Append a line and bring it to the disk; may be called from any thread.

        Raises:
            OSError: the disk; then the line is not there at all.
        """
        entry = {"t": time.time(), "state": state, **({"item": item} if item else {}), **facts}
        line = (json.dumps(entry, separators=(",", ":")) + "\n").encode()
        fd = os.open(self.directory / "journal.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            before = os.fstat(fd).st_size
            try:
                if os.write(fd, line) < len(line):
                    raise OSError(28, os.strerror(28), os.fspath(self.directory))
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, before)
                raise
        finally:
            os.close(fd)

    def entries(self) -> list[dict[str, Any]]:
        """All lines; what follows a torn one (power loss) is left out."""
        try:
            text = (self.directory / "journal.jsonl").read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return []
        found: list[dict[str, Any]] = []
        for line in text.split("\n"):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(entry, dict) or not isinstance(entry.get("state"), str):
                break
            found.append(entry)
        return found

    @property
    def plan(self) -> dict[str, Any]:
        """The first line: what was planned, and what it was made with."""
        return (self.entries() or [{}])[0]

    @property
    def state(self) -> str:
        """The newest state of the whole."""
        return next((str(entry["state"]) for entry in reversed(self.entries()) if not {"item", "members"} & set(entry)), "")

    def sync_directory(self) -> None:
        """Bring the names of a new journal to the disk."""
        for directory in (self.directory, self.directory.parent):
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            os.fsync(fd)
            os.close(fd)


def _start_ticks(pid: int) -> int:
    """When a process began, -1 when it is gone."""
    fields = procread.stat_fields(pid)
    return int(fields[_START]) if len(fields) > _START else -1
