"""Stopping a workload by the freezer of its own cgroup, on the machine's real hierarchies, and never anybody else."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckpt.host import cgroup
from ckpt.host.cgroup import Freezer, Knob, NotOwn, own_file

COUNT = "import time\nwhile True: print(flush=True); time.sleep(0.001)"


def hierarchies() -> dict[str, Path]:
    found = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        point = Path(head.split()[4])
        if tail.split()[0] == "cgroup2":
            found["v2"] = point
        elif tail.split()[0] == "cgroup" and "freezer" in tail.split()[-1].split(","):
            found["v1"] = point
    return found


class Busy:
    """A process that writes lines without end, in cgroups of its own."""

    def __init__(self, groups: list[Path]) -> None:
        self.groups = groups
        self.popen = subprocess.Popen([sys.executable, "-I", "-S", "-c", COUNT], stdout=subprocess.PIPE)
        for group in groups:
            (group / "cgroup.procs").write_text(str(self.popen.pid))
        assert self.popen.stdout is not None
        os.set_blocking(self.popen.stdout.fileno(), False)

    def writes(self, limit_s: float) -> bool:
        """Whether it writes anything within this time (what it wrote before does not count)."""
        assert self.popen.stdout is not None
        while self.popen.stdout.read(1 << 16):
            pass
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self.popen.stdout.read(1):
                return True
            time.sleep(0.005)
        return False

    def runs(self) -> bool:
        return self.writes(20.0)

    def stands(self) -> bool:
        return not self.writes(0.3)


@pytest.fixture(params=["v1", "v2"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[[], Busy]]:
    """Makes busy processes in cgroups of the freezer's hierarchy of that version."""
    points = hierarchies()
    if request.param not in points or os.geteuid() != 0:
        pytest.skip(f"no freezer of cgroup {request.param} here, or not root")
    if request.param == "v2" and "v1" in points:
        pytest.skip("the freezer is that of cgroup v1 here")
    with contextlib.ExitStack() as stack:

        def busy(name: str = "own") -> Busy:
            group = points[request.param] / f"ckpt-test-{os.getpid()}-{name}"
            group.mkdir(exist_ok=True)
            made = Busy([group])

            def remove() -> None:
                made.popen.kill()
                made.popen.wait()
                assert made.popen.stdout is not None
                made.popen.stdout.close()
                with contextlib.suppress(OSError):
                    group.rmdir()

            stack.callback(remove)
            return made

        yield busy


def test_it_stops_and_goes_on(make: Callable[..., Busy]) -> None:
    busy = make()
    freezer = Freezer.of([busy.popen.pid])
    assert busy.runs()
    with freezer.frozen():
        assert busy.stands()
        with freezer.frozen():  # it was: it stays so
            pass
        assert busy.stands()
    assert busy.runs()
    with pytest.raises(ZeroDivisionError), freezer.frozen():
        raise ZeroDivisionError
    assert busy.runs()
    with contextlib.suppress(ZeroDivisionError), freezer.frozen():
        freezer.knob.restore()
        assert busy.runs()


def test_not_with_a_stranger_in_it(make: Callable[..., Busy]) -> None:
    first, second = make(), make()
    with pytest.raises(NotOwn, match="is in the same cgroup"):
        Freezer.of([first.popen.pid])
    Freezer.of([first.popen.pid, second.popen.pid])
    other = make("other")
    with pytest.raises(NotOwn):
        Freezer.of([first.popen.pid, second.popen.pid, other.popen.pid])
    with pytest.raises(NotOwn):
        Freezer.of([other.popen.pid, os.getpid()])


def test_of_nobody() -> None:
    with pytest.raises(NotOwn):
        own_file([], "freezer", "cgroup.freeze", "freezer.state")


def test_what_does_not_stop_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroup, "FREEZE_LIMIT_S", 0.05)
    freeze = tmp_path / "cgroup.freeze"
    freeze.write_text("0")
    (tmp_path / "cgroup.events").write_text("populated 1\nfrozen 0\n")
    with pytest.raises(NotOwn, match="did not stop"), Freezer(freeze).frozen():
        pytest.fail("it does not run")
    assert freeze.read_text() == "0"


def test_a_knob_of_a_cgroup_that_is_gone(tmp_path: Path) -> None:
    Knob(tmp_path / "gone/cpu.max", "max 100000").restore()
    assert not (tmp_path / "gone").exists()
