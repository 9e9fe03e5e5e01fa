"""Auto-converge: a workload that writes faster than the link carries gets less processor time, step by step, until its memory is over.

The limit is that of its own cgroup. It is journalled before it is first changed (ckpt.ops.knobs) and set back before the dump, which reads
it: the destination gets the one that it had.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from ckpt.errors import CkptError, FeatureMissing
from ckpt.host.cgroup import CpuLimit, NotOwn
from ckpt.ops import knobs
from ckpt.store.job import Job

STEPS: Final = (0.2, 0.4, 0.6, 0.8, 0.9, 0.97)
"""The part of the processor time that it used which is taken away. (QEMU begins at 20 % and ends at 99 %.)"""
LEAST_CORES: Final = 0.01


class Throttle:
    """Slows one workload.

    Raises:
        FeatureMissing: it has no cgroup of its own whose processor time can be limited.
    """

    def __init__(self, pids: Callable[[], Iterable[int]], name: str) -> None:
        self._pids = pids
        try:
            self._limit = CpuLimit.of(list(pids()))
        except NotOwn as error:
            raise FeatureMissing(
                f"{name} cannot be slowed: {error}",
                where=f"{name} is running, untouched",
                hint="--auto-converge needs a cgroup of its own with the cpu controller; migrate without it",
            ) from error
        self._taken = 0
        self._used_s, self._since_s = self._cpu_s(), time.monotonic()
        self._cores = 0.0

    @property
    def slowed(self) -> float:
        """The part of its processor time that it does not get."""
        return STEPS[self._taken - 1] if self._taken else 0.0

    def step(self, job: Job) -> bool:
        """Slow it by one step more; False when there is none left.

        Raises:
            CkptError: the limit cannot be set.
        """
        if self._taken == len(STEPS):
            return False
        if not self._taken:
            knobs.journal(job, self._limit.knob)
            elapsed_s = time.monotonic() - self._since_s
            self._cores = (self._cpu_s() - self._used_s) / elapsed_s if elapsed_s > 0 else 0.0
        try:
            self._limit.set(max(self._cores * (1 - STEPS[self._taken]), LEAST_CORES))
        except OSError as error:
            raise CkptError(f"cannot limit its processor time: {self._limit.knob.path}: {error.strerror}") from error
        self._taken += 1
        return True

    def release(self) -> None:
        """Set the limit back that it had.

        Raises:
            CkptError: it cannot be set.
        """
        if not self._taken:
            return
        try:
            self._limit.knob.restore()
        except OSError as error:
            raise CkptError(f"cannot set back its processor time: {self._limit.knob.path}: {error.strerror}") from error
        self._taken = 0

    def _cpu_s(self) -> float:
        """The processor time that its living processes have used, children that they waited for included."""
        ticks = 0
        for pid in self._pids():
            try:
                fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            ticks += sum(int(word) for word in fields[11:15])  # utime, stime, cutime, cstime
        return ticks / os.sysconf("SC_CLK_TCK")
