"""Injected faults: what the tests use to die, run out of space or hang at an exact step of an operation.

`CKPT_FAULT="STEP:ACTION"` (several separated by commas). ACTION is `kill` (SIGKILL to ourselves), `enospc` (raises OSError),
`fail` (raises CkptError), `interrupt` (raises KeyboardInterrupt), `hang` (sleeps until a signal comes) or `gate=PATH` (makes
PATH.reached, then waits until PATH is there). Without the variable a point costs one look-up.
"""

from __future__ import annotations

import errno
import os
import signal
import time

from ckpt.errors import CkptError

VARIABLE = "CKPT_FAULT"


def point(name: str) -> None:
    """Pass the step `name`, unless the environment asks for a fault there.

    Raises:
        OSError, CkptError, KeyboardInterrupt: as the fault says.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    for item in wanted.split(","):
        step, _, action = item.strip().rpartition(":")
        if step == name:
            _strike(name, action)


def _strike(name: str, action: str) -> None:
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "enospc":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        case "fail":
            raise CkptError(f"injected fault at {name}")
        case "interrupt":
            raise KeyboardInterrupt
        case gate if gate.startswith("gate="):
            path = gate.removeprefix("gate=")
            open(f"{path}.reached", "w").close()
            while not os.path.exists(path):
                time.sleep(0.01)
        case "hang":
            while True:
                time.sleep(3600)
