"""Several workloads frozen at one instant, by their cgroups (cgroups(7), Linux's admin-guide/cgroup-v2: cgroup.freeze, cgroup.events).

All are told first, then all are waited for: they stand still within the time that the slowest of them needs to leave the kernel. Only
cgroup v2: there a frozen task can be traced and killed, which CRIU does to it; the freezer of v1 keeps both waiting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckpt.host.cgroup import Knob, NotOwn, own_file
from ckpt.host.procread import text

FILE: Final = "cgroup.freeze"
LIMIT_S: Final = 2.0
"""How long all may need to stand still; a task in an uninterruptible sleep can hold it up without end."""
_POLL_S: Final = 0.0002


class NotFrozen(Exception):
    """Somebody did not stop in time, or the kernel refused; all run again. The message says who and why."""


@dataclass(frozen=True, slots=True)
class Moment:
    """When the members of a freeze stood still (time.monotonic())."""

    first_s: float
    last_s: float

    @property
    def skew_s(self) -> float:
        """The time between the first one told and the last one seen standing still: no two of them are further apart."""
        return self.last_s - self.first_s


def knob_of(pids: Collection[int]) -> Knob:
    """What sets the cgroup of these processes free, for a journal. It is frozen by writing "1".

    Raises:
        NotOwn: they have no cgroup (v2) of their own, or it is frozen already.
    """
    file = own_file(pids, "freezer", FILE, "freezer.state")
    if file.name != FILE:
        raise NotOwn("the freezer of cgroup v1 cannot be used for this")
    if text(file).strip() != "0":
        raise NotOwn(f"{file.parent} is frozen already")
    return Knob(file, "0")


def freeze(knobs: Sequence[Knob]) -> Moment:
    """Freeze all of them; whoever calls it thaws them.

    Raises:
        NotFrozen: not within LIMIT_S; all are thawed again.
    """
    first_s = last_s = time.monotonic()
    try:
        files: list[int] = []
        try:
            for knob in knobs:  # all are open before the first one stands still
                files.append(os.open(knob.path, os.O_WRONLY | os.O_CLOEXEC))
            first_s = time.monotonic()
            for fd in files:
                os.write(fd, b"1")
        finally:
            for fd in files:
                os.close(fd)
        deadline = first_s + LIMIT_S
        for knob in knobs:
            while not _is_frozen(knob.path):
                if time.monotonic() > deadline:
                    raise NotFrozen(f"{knob.path.parent.name} did not stop within {LIMIT_S:g} s")
                time.sleep(_POLL_S)
        last_s = time.monotonic()
    except BaseException as error:
        thaw(knobs)
        if isinstance(error, OSError):
            raise NotFrozen(f"{error.filename or 'a cgroup'} cannot be frozen: {error.strerror}") from error
        raise
    return Moment(first_s, last_s)


def thaw(knobs: Sequence[Knob]) -> None:
    """Let all run again; nothing is done for a cgroup that is gone. The journal's copy is for those that this does not reach."""
    for knob in knobs:
        with suppress(OSError):
            knob.restore()


def _is_frozen(file: Path) -> bool:
    return "frozen 1" in text(file.with_name("cgroup.events")).splitlines()
