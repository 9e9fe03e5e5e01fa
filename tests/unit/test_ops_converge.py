"""Auto-converge: the limit goes down step by step, is journalled before, and is the workload's own again in every case."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt.errors import CkptError, FeatureMissing, TransferFailed
from ckpt.host import cgroup
from ckpt.host.cgroup import CpuLimit
from ckpt.model import PrecopyLimits
from ckpt.ops import knobs
from ckpt.ops.converge import STEPS, Throttle
from ckpt.ops.precopy import Precopy, Round
from ckpt.store.job import Job

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["cpu.max", "cpu.cfs_quota_us"])
def limit(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a cgroup that everybody is alone in."""
    file = tmp_path / str(request.param)
    file.write_text("max 100000\n" if request.param == "cpu.max" else "-1\n")
    (tmp_path / "cpu.cfs_period_us").write_text("100000\n")
    monkeypatch.setattr(cgroup, "own_file", lambda *_: file)
    return file


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    made = Job.create(tmp_path, "migrate-source", engine="toy", container_id="c1", name="web")
    yield made
    made.release()


@pytest.fixture
def spinning() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", "while True: pass"])
    yield process
    process.kill()
    process.wait()


def quota_us(file: Path) -> int:
    return int(file.read_text().split()[0])


def test_step_by_step_and_back(limit: Path, job: Job, spinning: subprocess.Popen[bytes]) -> None:
    before = limit.read_text()
    throttle = Throttle(lambda: [spinning.pid], "web")
    time.sleep(0.3)  # some processor time
    assert throttle.slowed == 0 and limit.read_text() == before
    seen = []
    while throttle.step(job):
        seen.append(quota_us(limit))
        assert throttle.slowed == STEPS[len(seen) - 1]
    assert len(seen) == len(STEPS) and seen == sorted(seen, reverse=True) and seen[-1] < seen[0] and seen[0] < 100_000
    assert job.facts["knobs"] == {str(limit): before.strip()}
    throttle.release()
    assert limit.read_text() == before.strip() and throttle.slowed == 0
    throttle.release()


def test_never_more_than_it_had(limit: Path, job: Job, spinning: subprocess.Popen[bytes]) -> None:
    limit.write_text("1500 100000" if limit.name == "cpu.max" else "1500")
    throttle = Throttle(lambda: [spinning.pid], "web")
    time.sleep(0.2)
    throttle.step(job)
    assert quota_us(limit) <= 1500


def test_what_cannot_be_set_back_is_tried_again(tmp_path: Path, job: Job) -> None:
    job.write("begun", knobs={str(tmp_path): "1"})  # a directory
    with pytest.raises(CkptError, match="cannot set back"):
        knobs.restore(job)


def test_refused_without_a_cgroup_of_its_own() -> None:
    with pytest.raises(FeatureMissing, match="web cannot be slowed"):
        Throttle(lambda: [os.getpid()], "web")


class Scripted(Precopy):
    """Rounds that send so much, of a workload that writes less the more it is slowed."""

    def __init__(self, sent: Callable[[float], int], job: Job, throttle: Throttle | None, limits: PrecopyLimits) -> None:
        peer: Any = None
        super().__init__(peer, os.getpid(), limits, lambda _: None, job, throttle)
        self.sent = sent

    def _round(self, number: int) -> Round:
        slowed = self._throttle.slowed if self._throttle else 0.0
        sent = 1 << 30 if number == 0 else self.sent(slowed)
        done = Round(number, sent, sent, sent / (25 << 20), 0.0, slowed=slowed)
        self.rounds.append(done)
        return done


LIMITS = PrecopyLimits(max_downtime_s=1.5, max_rounds=16, auto_converge=True)


def test_slowed_until_the_downtime_is_met(limit: Path, job: Job) -> None:
    before = limit.read_text().strip()
    told = []
    ahead = Scripted(lambda slowed: int((100 << 20) * (1 - slowed)), job, Throttle(lambda: [os.getpid()], "web"), LIMITS)
    ahead.run(lambda done: told.append((done.slowed, limit.read_text().strip())))
    assert ahead.enough and [slowed for slowed, _ in told][:2] == [0.0, 0.0]
    assert 0.8 <= told[-1][0] <= 0.97 and told[-1][1] != before
    assert limit.read_text() == before  # before anything is frozen
    without = Scripted(lambda slowed: int((100 << 20) * (1 - slowed)), job, None, LIMITS)
    without.run(lambda done: None)
    assert not without.enough and len(without.rounds) == 3


def test_set_back_when_it_does_not_help(limit: Path, job: Job) -> None:
    before = limit.read_text().strip()
    ahead = Scripted(lambda slowed: 100 << 20, job, Throttle(lambda: [os.getpid()], "web"), PrecopyLimits(1.5, 16, "abort", True))
    with pytest.raises(TransferFailed):
        ahead.run(lambda done: None)
    assert len(ahead.rounds) == 3 + len(STEPS) and limit.read_text() == before


def test_set_back_when_a_round_fails(limit: Path, job: Job) -> None:
    before = limit.read_text().strip()
    ahead = Scripted(lambda slowed: 100 << 20, job, Throttle(lambda: [os.getpid()], "web"), LIMITS)

    def told(done: Round) -> None:
        if done.slowed:
            raise TransferFailed("the link broke")

    with pytest.raises(TransferFailed):
        ahead.run(told)
    assert limit.read_text() == before


@pytest.fixture
def own_cgroup(spinning: subprocess.Popen[bytes]) -> Iterator[Path]:
    """A cgroup of a real hierarchy with the cpu controller, with the spinning process in it."""
    point = cpu_hierarchy()
    if point is None or os.geteuid() != 0:
        pytest.skip("no cpu controller to be had here, or not root")
    own = point / f"ckpt-test-{os.getpid()}-cpu"
    own.mkdir()
    try:
        (own / "cgroup.procs").write_text(str(spinning.pid))
        yield own
    finally:
        os.kill(spinning.pid, signal.SIGKILL)
        spinning.wait()
        with contextlib.suppress(OSError):
            own.rmdir()


def test_the_kernel_obeys(own_cgroup: Path, spinning: subprocess.Popen[bytes]) -> None:
    limit = CpuLimit.of([spinning.pid])
    before = limit.knob.path.read_text()
    assert limit.knob.path.parent == own_cgroup
    limit.set(0.05)
    assert used_s(spinning.pid, 1.0) < 0.2
    limit.knob.restore()
    assert limit.knob.path.read_text() == before


SLOWS = """
import sys, time
from pathlib import Path
from ckpt.ops import recover
from ckpt.ops.converge import Throttle
from ckpt.store.job import Job
job = Job.create(Path(sys.argv[1]), "migrate-source", engine="podman", container_id="c1", name="web")
guard = recover.start_guard(job)
assert guard is not None and Throttle(lambda: [int(sys.argv[2])], "web").step(job)
print("slowed", flush=True)
time.sleep(1000)
"""


def test_the_guard_of_a_killed_ckpt_sets_it_back(own_cgroup: Path, spinning: subprocess.Popen[bytes], tmp_path: Path) -> None:
    limit = CpuLimit.of([spinning.pid]).knob
    argv = [sys.executable, "-c", SLOWS, str(tmp_path), str(spinning.pid)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}) as owner:
        try:
            assert owner.stdout is not None and owner.stdout.readline() == b"slowed\n"
            assert limit.path.read_text().strip() != limit.value
        finally:
            owner.kill()
    deadline = time.monotonic() + 60
    while limit.path.read_text().strip() != limit.value or any((tmp_path / "jobs").iterdir()):
        assert time.monotonic() < deadline, limit.path.read_text()
        time.sleep(0.02)


def cpu_hierarchy() -> Path | None:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        point = Path(head.split()[4])
        if tail.split()[0] == "cgroup" and "cpu" in tail.split()[-1].split(","):
            return point
        if tail.split()[0] == "cgroup2" and "cpu" in (point / "cgroup.subtree_control").read_text().split():
            return point
    return None


def used_s(pid: int, for_s: float) -> float:
    def ticks() -> int:
        return sum(int(word) for word in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])

    before = ticks()
    time.sleep(for_s)
    return (ticks() - before) / os.sysconf("SC_CLK_TCK")
