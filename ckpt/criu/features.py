"""What CRIU on this host is and can do."""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass, field

from ckpt.criu import swrk
from ckpt.criu.log import explain
from ckpt.errors import FeatureMissing

_NOISE = re.compile(r"RLIMIT_NOFILE")


@dataclass(frozen=True, slots=True)
class CriuFacts:
    """CRIU here. `version` is "4.2.1" ("" when absent); `working` False: `reason` and `hint` say why."""

    version: str = ""
    path: str = ""
    working: bool = False
    reason: str = ""
    hint: str = ""
    mem_dirty_track: bool = False
    lazy_pages: bool = False
    pidfd_store: bool = False
    missing: tuple[str, ...] = field(default=())

    @property
    def present(self) -> bool:
        return bool(self.path)


_working: dict[tuple[str, int, int, int], CriuFacts] = {}
"""What a CRIU program that works said, by its path, inode, size and time: it is asked once in the life of this process."""


def facts() -> CriuFacts:
    """Ask CRIU (about 50 ms, the first time); never raises."""
    try:
        path = swrk.program()
    except FeatureMissing as error:
        return CriuFacts(reason=error.message, hint=error.hint or "")
    known = _working.get(_key(path))
    if known is not None:
        return known
    found = _ask(path)
    if found.working:
        _working[_key(path)] = found
    return found


def _key(path: str) -> tuple[str, int, int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return (path, 0, 0, 0)
    return (path, status.st_ino, status.st_size, status.st_mtime_ns)


def _ask(path: str) -> CriuFacts:
    checked: list[tuple[bool, str]] = []
    checker = threading.Thread(target=lambda: checked.append(swrk.check()), daemon=True)
    checker.start()  # beside the other questions: each is a CRIU of its own
    try:
        version = _version()
        known = swrk.features()
    except FeatureMissing as error:
        return CriuFacts(path=path, reason=error.message, hint=error.hint or "")
    except swrk.CriuFailed as error:
        if error.verb == "version":
            return CriuFacts(path=path, reason=error.reason, hint="criu --version should answer; reinstall CRIU")
        known = {}
    finally:
        checker.join()
    working, said = checked[0] if checked else (False, "criu check could not be run")
    if not working:
        cause = explain(said, verb="dump")
        lines = [line for line in said.splitlines() if line.strip() and not _NOISE.search(line)]
        reason = cause.message if cause.line_number else (lines[-1] if lines else said)
        return CriuFacts(version=version, path=path, reason=f"CRIU {version} does not work on this kernel: {reason}", hint=cause.hint)
    missing = tuple(sorted(name for name, there in known.items() if not there))
    return CriuFacts(
        version=version,
        path=path,
        working=True,
        mem_dirty_track=known.get("mem_track", False),
        lazy_pages=known.get("lazy_pages", False),
        pidfd_store=known.get("pidfd_store", False),
        missing=missing,
    )


def version_text() -> str:
    """CRIU's version as its releases are named: "4.2.1", "4.2". Raises FeatureMissing, CriuFailed."""
    known = _working.get(_key(swrk.program()))
    return known.version if known else _version()


def _version() -> str:
    major, minor, sublevel = swrk.version()
    return f"{major}.{minor}.{sublevel}" if sublevel else f"{major}.{minor}"
