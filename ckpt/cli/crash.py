"""A bug's traceback goes to a file, never to the terminal."""

from __future__ import annotations

import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from ckpt import __version__, config
from ckpt.errors import Bug, CkptError


def report(error: BaseException, args: Sequence[str], *, log_dir: Path | None = None) -> Bug:
    """Write the traceback to `log_dir` (default: the configured one, else the temporary directory) and make the error that names the file."""
    text = _without_secrets("\n".join(
        (
            f"ckpt {__version__}, Python {platform.python_version()}, Linux {platform.release()} {platform.machine()}",
            f"command: ckpt {' '.join(args)}",
            "",
            "".join(traceback.format_exception(error)),
        )
    ))  # fmt: skip
    path = _write(text, log_dir or _log_dir())
    what = _without_secrets(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    return Bug(
        f"a bug in ckpt: {what}",
        where="not known: look with the engine's own tools (podman ps -a)",
        hint="please report it with the log",
        log=str(path) if path else None,
    )


def _without_secrets(text: str) -> str:
    """URLs lose what may be credentials: user information and query."""
    text = re.sub(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/?#'\"]*@", r"\1", text)
    return re.sub(r"(?i)\b([a-z][a-z0-9+.-]*://[^\s?'\"]*)\?[^\s'\"]*", r"\1?...", text)


def _log_dir() -> Path:
    try:
        return config.load().log_dir
    except CkptError:
        return config.Settings().log_dir


def _write(text: str, log_dir: Path) -> Path | None:
    name = f"bug-{time.strftime('%Y-%m-%dT%H-%M-%S')}-{os.getpid()}.log"
    for directory in (log_dir, Path(tempfile.gettempdir())):
        path = directory / name
        try:
            if directory == log_dir:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            # O_EXCL: in a shared temporary directory nobody's link is followed.
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            continue
        with open(fd, "w", errors="backslashreplace") as out:
            out.write(text)
        return path
    sys.stderr.write("ckpt: no place for the traceback\n")
    return None
