"""When a workload really stopped and ran again: CRIU, its runtime and its engine have work to do before and after that."""

from __future__ import annotations

import threading
import time
from typing import Final, Self

from ckpt.criu import tree

_LOOK_S: Final = 0.003
_STOPPED: Final = "tT"
"""States of a process in /proc/PID/stat that is held by a tracer, as CRIU does (proc_pid_stat(5))."""


class Moment:
    """Looks at a process, in a thread, while the block runs; `at_s` (CLOCK_MONOTONIC) is when it was first seen stopped, or not stopped.

    Args:
        pid: 0 or None for one that is not known; nothing is seen then.
    """

    def __init__(self, pid: int | None, *, stopped: bool) -> None:
        self._pid = pid or 0
        self._stopped = stopped
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, name="ckpt-moment", daemon=True)
        self.at_s: float | None = None

    def __enter__(self) -> Self:
        if self._pid:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._pid:
            self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(_LOOK_S):
            found = tree.stat(self._pid)
            if found is None:
                return
            if (found.state in _STOPPED) == self._stopped:
                self.at_s = time.monotonic()
                return
