"""The moment at which a process stops or goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import time

from ckpt.ops.moments import Moment
from tests.contract.subject import wait_until


def test_it_stops_and_goes_on() -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        before = time.monotonic()
        with Moment(process.pid, stopped=True) as stop:
            os.kill(process.pid, signal.SIGSTOP)
            assert wait_until(lambda: stop.at_s is not None)
        with Moment(process.pid, stopped=False) as go:
            assert go.at_s is None
            os.kill(process.pid, signal.SIGCONT)
            assert wait_until(lambda: go.at_s is not None)
        assert before < (stop.at_s or 0) < (go.at_s or 0) < time.monotonic()
        process.kill()


def test_nothing_is_seen_of_one_that_is_not_there() -> None:
    with Moment(None, stopped=True) as moment:
        pass
    assert moment.at_s is None
