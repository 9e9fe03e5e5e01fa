"""`ckpt watch`: asks for a notice again and again (a spot instance that is to be taken away, a host that is to be rebooted), and acts on it.

The notice is a command of the administrator's: exit status 0 means that it is there. A command that fails, hangs or is not there is no notice.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ckpt.errors import CkptError
from ckpt.events import Emit, Notice
from ckpt.host import systemd
from ckpt.host.run import CommandFailed, run

SHELL: Final = "/bin/sh"
FAILING: Final = 3
"""After so many tries that could not even be made, that is told, once."""


@dataclass(frozen=True, slots=True)
class WatchRequest:
    """What is asked, and how often."""

    command: str
    """For sh -c."""
    every_s: float = 5.0
    limit_s: float = 10.0
    """How long one try may take."""
    once: bool = False
    """End after the first notice."""


def watch(request: WatchRequest, act: Callable[[], int], *, emit: Emit, stop: threading.Event | None = None) -> int:
    """Wait for the notice and act on it; then, unless `once`, wait until it is gone, and for the next one.

    Args:
        act: what is done about it; its exit code.
        stop: ends the watching.

    Returns:
        The exit code of the last `act`.

    Raises:
        KeyboardInterrupt: told to stop.
    """
    halt = stop or threading.Event()
    was_there = False
    code = failures = 0
    systemd.notify("waiting for a notice", ready=True)
    emit(Notice("watch", f"asking every {request.every_s:g} s"))
    while not halt.is_set():
        began_s = time.monotonic()
        there = noticed(request)
        failures = 0 if there is not None else failures + 1
        if failures == FAILING:
            emit(Notice("watch", "the notice command did not end in time, or could not be started: that is no notice", warning=True))
        if there and not was_there:
            emit(Notice("watch", "the notice is there", warning=True))
            systemd.notify("acting on a notice")
            systemd.journal("ckpt watch: the notice is there", priority=4, CKPT_PHASE="notice")
            try:
                code = act()
            except CkptError as error:
                if request.once:
                    raise
                emit(Notice("watch", f"{error.message}; watching on", warning=True))
                code = error.exit_code
            systemd.notify(f"acted on a notice (exit code {code}), waiting for the next")
            if request.once:
                return code
        was_there = bool(there)
        halt.wait(max(0.0, request.every_s - (time.monotonic() - began_s)))
    return code


def noticed(request: WatchRequest) -> bool | None:
    """Ask once: whether the notice is there; None when the command had no chance to say."""
    try:
        return run([SHELL, "-c", request.command], timeout_s=request.limit_s, check=False).returncode == 0
    except CommandFailed:
        return None
