"""A directory that is kept as another host's: the receiving end of `tree_send`, and what becomes of it.

As with `rootfs.apply` nothing outside of the directory can be touched, whatever the stream says: a child process that is locked into it by
chroot does all of the work.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import ckpt
from ckpt.archive._tar import report
from ckpt.errors import RestoreFailed
from ckpt.host import run

_CHILD: Final = "import sys; sys.path.insert(0, sys.argv.pop(2)); from ckpt.archive import _tree_child; _tree_child.child()"
_END_LIMIT_S: Final = 120.0
_MAX_ANSWER: Final = 1 << 20
_PIPE_BYTES: Final = 1 << 20


class TreeWriter:
    """Keeps `directory` as the streams of changes that are written to `sink` say, one after the other, each with a `finish` after it.

    Raises:
        RestoreFailed: the child cannot be started.
    """

    def __init__(self, directory: Path) -> None:
        with open(os.devnull, "rb") as nothing:
            options = {"copy": False, "root": str(directory.absolute()), "deleted_fd": nothing.fileno()}
            self._process = _start(options, (nothing.fileno(),), run.PIPE)
        assert self._process.stdin is not None
        self.sink = cast(BinaryIO, self._process.stdin)
        with suppress(OSError):  # the user's pipe quota is used up: slower, not wrong
            fcntl.fcntl(self.sink.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)

    def finish(self) -> list[str]:
        """A stream has ended, or `sink` takes no more: see what became of it.

        Returns:
            Warnings: extended attributes that the file system cannot hold.

        Raises:
            ArchiveInvalid: the stream makes no sense.
            NoSpace: the directory is full.
            RestoreFailed: anything else, also after two minutes without an answer.
        """
        out = self._process.stdout
        assert out is not None
        with suppress(BrokenPipeError):
            self.sink.flush()
        ready, _, _ = select.select([out], [], [], _END_LIMIT_S)
        line = out.readline(_MAX_ANSWER) if ready else b""
        if line.endswith(b"\n"):
            return report(line, b"", 0)
        self._process.kill()
        _, stderr = self._process.communicate()
        return report(b"", stderr, self._process.returncode)

    def close(self) -> None:
        """End the child, now. Idempotent."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()


def copy(source: Path, deleted: Path, root: Path, *, timeout_s: float = 3600.0) -> list[str]:
    """Bring what streams made of the directory `source` onto a mounted root: deletions, then the files. `source` stays.

    Args:
        deleted: `deleted.files`; not there: nothing to delete.

    Returns:
        Warnings, as `rootfs.apply`, and it raises the same.
    """
    at = os.open(source, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        gone = os.open(deleted if os.path.lexists(deleted) else os.devnull, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            options = {"copy": True, "root": str(root.absolute()), "deleted_fd": gone, "source_fd": at}
            process = _start(options, (at, gone), run.DEVNULL)
        finally:
            os.close(gone)
    finally:
        os.close(at)
    return _end(process, timeout_s)


def _start(options: dict[str, Any], fds: tuple[int, ...], stdin: int) -> run.Process:
    above = str(Path(ckpt.__file__).resolve().parent.parent)
    try:
        return run.spawn(
            [sys.executable, "-I", "-S", "-c", _CHILD, json.dumps(options), above], stdin=stdin, stdout=run.PIPE, stderr=run.PIPE, pass_fds=fds
        )
    except run.CommandFailed as error:
        raise RestoreFailed(f"cannot start the extraction: {error.reason}") from error


def _end(process: run.Process, timeout_s: float) -> list[str]:
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except BaseException as error:
        process.kill()
        process.communicate()
        if type(error).__name__ == "TimeoutExpired":
            raise RestoreFailed(f"the files of the container were not in place within {timeout_s:g} s") from None
        raise
    return report(stdout, stderr, process.returncode)
