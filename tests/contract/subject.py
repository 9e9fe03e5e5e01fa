"""What the suite needs of a world with an engine in it. One class fits all: a real world gives it a way to run commands."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ckpt.host.run import Result, run
from tests.contract import fake

DRIVER = Path(__file__).with_name("driver.py")
LIMIT_S = 180.0


class Subject(Protocol):
    """An engine in its world (this machine, a lab host). Names given to `start_counter` are unique within a test."""

    engine: str
    killable: bool
    """Whether the world lets tests kill an operation at each of its steps (a matter of time, not of principle)."""

    def start_counter(self, name: str, *, broken: str = "") -> str:
        """Start a workload that counts, return its target as a user types it. `broken`: "dump" makes every dump of it fail, "" works,
        "tree" makes its dump claim a process that is not there; raises Unsupported."""

    def ticks(self, target: str) -> int:
        """How far it has counted; a restored one goes on from there, a fresh one would begin at 0."""

    def drive(self, verb: str, what: str = "", *options: str, fault: str = "") -> dict[str, Any]:
        """Run tests/contract/driver.py in the world. {"killed": True} when the fault killed it."""

    def close(self) -> None:
        """End every workload of this world."""


class Unsupported(Exception):
    """This world cannot play that; the test is skipped."""


def wait_until(condition: Callable[[], bool], limit_s: float = 60.0) -> bool:
    """Wait for a condition; False when it does not come."""
    import time

    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def parse(result: Result) -> dict[str, Any]:
    """What the driver said. {"killed": True} for SIGKILL, else its last line (engines may print before)."""
    if result.returncode in (-9, 137):
        return {"killed": True, "ok": False}
    assert result.ok, f"driver: {result.returncode}\n{result.text}\n{result.error_text}"
    found: dict[str, Any] = json.loads(result.text.splitlines()[-1])
    return found


class FakeSubject:
    """The fake engine on this machine, in a directory."""

    engine = "fake"
    killable = True

    def __init__(self, directory: Path) -> None:
        self.world = directory / "world"
        self.world.mkdir()
        self.store = directory / "store"
        self._engine = fake.FakeEngine(self.world)
        self._ids: dict[str, str] = {}

    def start_counter(self, name: str, *, broken: str = "") -> str:
        self._ids[name] = self._engine.start(name, broken=broken).id
        return name

    def ticks(self, target: str) -> int:
        return max(self._engine.ticks(c.id) for c in self._engine.find(target))

    def drive(self, verb: str, what: str = "", *options: str, fault: str = "") -> dict[str, Any]:
        argv = [sys.executable, DRIVER, "fake", self.world, verb, what, "--store", self.store, *options]
        extra = {"CKPT_FAULT": fault} if fault else {}
        return parse(run(argv, env={**extra, "PYTHONPATH": os.pathsep.join(sys.path)}, timeout_s=LIMIT_S, check=False))

    def close(self) -> None:
        self._engine.end_all()
