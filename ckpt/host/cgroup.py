"""The cgroup that a workload has for itself: stopping it there for a moment, slowing it (cgroups(7); freezer and cpu of v1 and v2).

Its own is a cgroup below the root that holds all its processes and nobody else's: whoever shares it would be stopped too, we ourselves among them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckpt.host.procread import cgroup_file, namespace, text

FREEZE_LIMIT_S: Final = 0.2
"""How long a freeze may take; a task in an uninterruptible sleep can hold it up without end."""
_POLL_S: Final = 0.0002
_LEAST_QUOTA_US: Final = 1000  # the kernel takes no less


@dataclass(frozen=True, slots=True)
class Knob:
    """A file of a cgroup and what it held: enough to set it back."""

    path: Path
    value: str

    def write(self, value: str) -> None:
        """Raises OSError."""
        fd = os.open(self.path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)  # never makes the file
        try:
            os.write(fd, value.encode())
        finally:
            os.close(fd)

    def restore(self) -> None:
        """Set it back; nothing is done when the cgroup is gone."""
        try:
            self.write(self.value)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise


class NotOwn(Exception):
    """The processes have no cgroup of their own, or what it has for this does not work; the message says why."""


def own_file(pids: Collection[int], controller: str, name_v2: str, name_v1: str) -> Path:
    """A file of the lowest cgroup that the processes have for themselves and that has it, in the hierarchy of the controller.

    Raises:
        NotOwn: there is no such cgroup, or none with such a file.
    """
    found = {_membership(f"{pid}/task/{tid}", controller) for pid in pids for tid in _names(f"/proc/{pid}/task")} - {None}
    if not found:
        raise NotOwn("the processes are in no cgroup")
    v2 = all(one is not None and one[0] for one in found)
    path = os.path.commonpath([one[1] for one in found if one is not None])
    if path == "/" or path.startswith("/.."):
        raise NotOwn("the processes have no cgroup of their own")
    spaces = {namespace(pid, "pid") for pid in pids} - {namespace("self", "pid")}
    ours = _membership("self", controller)
    first = path
    while path != "/":
        file = cgroup_file("cgroup2", "", path, name_v2) if v2 else cgroup_file("cgroup", controller, path, name_v1)
        if ours is not None and ours[0] == v2 and f"{ours[1]}/".startswith(f"{path}/"):
            raise NotOwn(f"ckpt runs in the same cgroup {path}")
        for stranger in members(file.parent) - set(pids):
            if namespace(stranger, "pid") not in spaces:
                raise NotOwn(f"process {stranger} is in the same cgroup {path}")
        if file.exists():
            return file
        path = os.path.dirname(path)  # crun's containers are in a cgroup below their scope, which has the limits
    raise NotOwn(f"cgroup {first} has no {file.name}")


def members(directory: Path) -> set[int]:
    """The processes of a cgroup and of those below it."""
    found: set[int] = set()
    for inside, _, _ in os.walk(directory):
        found.update(int(word) for word in text(Path(inside) / "cgroup.procs").split())
    return found


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _membership(task: str, controller: str) -> tuple[bool, str] | None:
    """(v2, path) of a task: the v1 hierarchy of the controller goes first, as in the kernel a controller is in one hierarchy only."""
    unified = None
    for line in text(Path("/proc") / task / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            if cgroup_file("cgroup", controller, path, "").is_dir():
                return False, path
        elif number == "0":
            unified = (True, path)
    return unified


class Freezer:
    """Stops processes by their cgroup. `file` is what is written to (cgroup.freeze or freezer.state), made by `of`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._v2 = file.name == "cgroup.freeze"

    @classmethod
    def of(cls, pids: Collection[int]) -> Freezer:
        """Raises NotOwn when they have no cgroup of their own."""
        return cls(own_file(pids, "freezer", "cgroup.freeze", "freezer.state"))

    @property
    def knob(self) -> Knob:
        """What sets them free again, for a journal."""
        return Knob(self._file, "0" if self._v2 else "THAWED")

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """Nothing of the cgroup runs in the block. One that is frozen already stays so afterwards.

        Raises:
            NotOwn: not in FREEZE_LIMIT_S.
        """
        mine = False
        try:
            if not self._is_frozen():
                mine = True
                self.knob.write("1" if self._v2 else "FROZEN")
                self._wait()
        except BaseException as error:
            if mine:
                with contextlib.suppress(OSError):
                    self.knob.restore()
            if isinstance(error, OSError):
                raise NotOwn(f"{self._file}: {error.strerror}") from error
            raise
        try:
            yield
        finally:
            if mine:
                self.knob.restore()

    def _is_frozen(self) -> bool:
        if self._v2:
            return "frozen 1" in text(self._file.with_name("cgroup.events")).splitlines()
        return self._file.read_text().strip() == "FROZEN"

    def _wait(self) -> None:
        deadline = time.monotonic() + FREEZE_LIMIT_S
        while not self._is_frozen():
            if time.monotonic() > deadline:
                raise NotOwn(f"the processes did not stop within {FREEZE_LIMIT_S:g} s")
            time.sleep(_POLL_S)


class CpuLimit:
    """How much processor time a cgroup gets: cpu.max of v2, cpu.cfs_quota_us of v1 (made by `of`)."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._v2 = file.name == "cpu.max"
        self.knob = Knob(file, file.read_text().strip())
        """What sets the limit back that it had."""
        if self._v2:
            quota, period = self.knob.value.split()
        else:
            quota, period = self.knob.value, file.with_name("cpu.cfs_period_us").read_text()
        self._quota_us = int(quota) if quota not in ("max", "-1") else None
        self._period_us = int(period)

    @classmethod
    def of(cls, pids: Collection[int]) -> CpuLimit:
        """Raises NotOwn when the processes have no cgroup of their own with the cpu controller."""
        try:
            return cls(own_file(pids, "cpu", "cpu.max", "cpu.cfs_quota_us"))
        except (OSError, ValueError) as error:
            raise NotOwn(f"its limit of processor time cannot be read: {error}") from error

    def set(self, cores: float) -> None:
        """At most so many processors' time, and never more than it had. Raises OSError."""
        quota_us = max(int(cores * self._period_us), _LEAST_QUOTA_US)
        if self._quota_us is not None:
            quota_us = min(quota_us, self._quota_us)
        self.knob.write(f"{quota_us} {self._period_us}" if self._v2 else str(quota_us))
