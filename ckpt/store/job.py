"""A job: the durable record of one operation (its journal), and the lever that holds its CRIU action-script.

Directory `JOB/`: `journal.jsonl` (one JSON object a line, fsync before the step it announces), `lock` (flock of the living
owner), `verdict` (FIFO that CRIU's action-script reads), `held` (written by the action-script when the tree is held), `reserve`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Literal

from ckpt.store import place
from ckpt.store.place import DEFAULT_ROOT

__all__ = ["DEFAULT_ROOT", "Job", "Verdict", "new_id"]

Verdict = Literal["0", "1"]
RESERVE_BYTES: Final = 16384
"""Given up when the disk is full, so that the journal can still say how the job ended."""


def new_id() -> str:
    """The id of a job that begins now."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(4)}"


class Job:
    """One operation's directory. Create with `Job.create`, look at another's with `Job.open`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock_fd: int | None = None
        self._verdict_fd: int | None = None
        self.on_failure: Callable[[], None] | None = None
        """Called when the verdict is "1", before the action-script hears of it: what a dump that is still under way waits for need not come."""

    @classmethod
    def create(cls, root: Path, kind: str, **facts: Any) -> Job:
        """Make a job directory (0700) for the store at `root` (see place), take its lock, and journal its start."""
        job = cls(place.jobs(root) / new_id())
        job.directory.mkdir(mode=0o700, parents=True)
        try:
            os.mkfifo(job.verdict_path, 0o600)
            os.close(os.open(job.lock_path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            job.acquire()
            (job.directory / "reserve").write_bytes(bytes(RESERVE_BYTES))
            job.write("started", kind=kind, **facts)
        except BaseException:
            # A full disk: what has no journal has done nothing.
            shutil.rmtree(job.directory, ignore_errors=True)
            job.release()
            raise
        return job

    @property
    def id(self) -> str:
        return self.directory.name

    @property
    def verdict_path(self) -> Path:
        return self.directory / "verdict"

    @property
    def lock_path(self) -> Path:
        return self.directory / "lock"

    @property
    def held_path(self) -> Path:
        return self.directory / "held"

    def acquire(self, *, wait: bool = False) -> bool:
        """Take the owner's lock; False when another process lives with it (`wait`: block until it is gone).

        Raises:
            FileNotFoundError: the job is over, or on its way out.
        """
        # The file is never made here: a directory that somebody is just removing would get it again, and stay.
        fd = os.open(self.lock_path, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if not os.fstat(fd).st_nlink:
                raise FileNotFoundError(errno.ENOENT, "the job is over", os.fspath(self.directory))
        except BlockingIOError:
            os.close(fd)
            return False
        except BaseException:
            os.close(fd)
            raise
        self._lock_fd = fd
        with suppress(FileNotFoundError):  # its removal was broken off: what is left is the new owner's to remove
            # O_RDWR never blocks on a FIFO, and keeps it from reaching end of file while an owner lives.
            self._verdict_fd = os.open(self.verdict_path, os.O_RDWR | os.O_CLOEXEC)
        return True

    @property
    def owned(self) -> bool:
        """Whether a living process has the lock."""
        try:
            fd = os.open(self.lock_path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def release(self) -> None:
        """Give the lock back (also done by the kernel when the owner dies)."""
        for fd in (self._verdict_fd, self._lock_fd):
            if fd is not None:
                os.close(fd)
        self._lock_fd = self._verdict_fd = None

    def write(self, state: str, **facts: Any) -> None:
        """Append a line to the journal and bring it to the disk."""
        line = json.dumps({"t": time.time(), "state": state, **facts}, separators=(",", ":")) + "\n"
        try:
            self._append(line.encode())
        except OSError as error:
            reserve = self.directory / "reserve"
            if error.errno != errno.ENOSPC or not reserve.exists():
                raise
            reserve.unlink()
            self._append(line.encode())
        if state == "started":
            parent = os.open(self.directory, os.O_RDONLY)
            os.fsync(parent)
            os.close(parent)

    def _append(self, line: bytes) -> None:
        """All of the line or nothing: half a line would hide those that come after it."""
        fd = os.open(self.directory / "journal.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            before = os.fstat(fd).st_size
            try:
                if os.write(fd, line) < len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(self.directory))
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, before)
                raise
        finally:
            os.close(fd)

    def entries(self) -> list[dict[str, Any]]:
        """All journal lines; a torn last line (power loss) is left out."""
        found = []
        try:
            text = (self.directory / "journal.jsonl").read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return []
        for line in text.split("\n"):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(entry, dict):
                break
            found.append(entry)
        return found

    @property
    def state(self) -> str:
        """The newest state in the journal ("" for none)."""
        entries = self.entries()
        return str(entries[-1].get("state", "")) if entries else ""

    @property
    def facts(self) -> dict[str, Any]:
        """All facts of all lines, later ones winning."""
        merged: dict[str, Any] = {}
        for entry in self.entries():
            merged.update(entry)
        return merged

    def forget_verdict(self) -> None:
        """Take back a verdict that nobody read: it would answer the next hold of this job."""
        if self._verdict_fd is not None:
            os.set_blocking(self._verdict_fd, False)
            try:
                os.read(self._verdict_fd, 64)
            except BlockingIOError:
                pass
            finally:
                os.set_blocking(self._verdict_fd, True)

    def decide(self, verdict: Verdict) -> None:
        """Answer the waiting action-script: "0" success (dump: source ends; restore: goes on), "1" failure."""
        if self._verdict_fd is None:
            raise RuntimeError("only the owner of a job decides")
        if verdict == "1" and self.on_failure is not None:
            self.on_failure()
        os.write(self._verdict_fd, verdict.encode() + b"\n")
