"""The canary hears that it is asked, however early that comes. (CRIU itself is in tests/lab/test_hibernate_resume.py.)"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ckpt.ops.hibernate import canary

LIMIT_S = 20.0
# The signal is raised and the wait entered by C code that calls C code (map, operator.call): no bytecode comes between the two, so the
# interpreter has no chance to run a handler there. A handler in Python that was tripped this late runs only after the wait.
LATE = """
import ctypes, functools, operator, signal
_raise = functools.partial(getattr(ctypes.CDLL(None), "raise"), int(signal.SIGUSR1))
def _late(real):
    first = [_raise]
    def wait(*args):
        return list(map(operator.call, [first.pop() if first else bool, functools.partial(real, *args)]))[-1]
    return wait
signal.pause, signal.sigtimedwait = _late(signal.pause), _late(signal.sigtimedwait)
"""


def pending() -> None:
    """Before the program is there at all: what is blocked and pending stays so across execve(2)."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize(("before", "first"), [(LATE, None), ("", pending)], ids=["as it begins to wait", "before it is there"])
def test_it_hears_what_comes_before_it_listens(tmp_path: Path, before: str, first: Callable[[], None] | None) -> None:
    said = tmp_path / "said"
    bird = subprocess.Popen([sys.executable, "-I", "-S", "-c", before + canary._BIRD, said, "a-seed"], preexec_fn=first)
    try:
        end = time.monotonic() + LIMIT_S
        while (text := said.read_text() if said.exists() else "") != "well" and time.monotonic() < end:
            assert bird.poll() is None
            time.sleep(0.005)
        assert text == "well"
    finally:
        bird.kill()
        bird.wait()
