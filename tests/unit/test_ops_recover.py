"""Dead owners: their jobs are undone or finished, by the guard or by the next command."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ckpt.criu import action
from ckpt.engines import registry
from ckpt.errors import CkptError
from ckpt.host.cgroup import Knob
from ckpt.host.run import PIPE, spawn
from ckpt.model import Container
from ckpt.ops import faults, groupjob, knobs, recover
from ckpt.store.catalog import Catalog
from ckpt.store.job import Job

CHECKOUT = Path(__file__).resolve().parent.parent.parent


class Engine:
    name = "toy"
    prefixes = ("toy",)

    def __init__(self) -> None:
        self.rolled_back: list[str] = []
        self.state = "running"
        self.failing = False

    def rollback(self, job: Job) -> None:
        if self.failing:
            raise CkptError("not now")
        self.rolled_back.append(job.id)

    def find(self, name: str) -> list[Container]:
        return [self.describe(Container("toy", "c1", "web", "running"))] if name in ("c1", "web") else []

    def describe(self, container: Container) -> Container:
        return Container("toy", "c1", "web", self.state)  # type: ignore[arg-type]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    made = Engine()
    monkeypatch.setattr(registry, "engines", lambda: (made,))
    return made


def dead(root: Path, kind: str, *states: str, **facts: Any) -> Job:
    job = Job.create(root, kind, engine="toy", container_id="c1", name="web", **facts)
    for state in states:
        job.write(state)
    job.release()
    return job


def test_an_unfinished_job_is_undone(tmp_path: Path, engine: Engine) -> None:
    job = dead(tmp_path, "checkpoint", "dumping", "held")
    (job.directory / "dump.log").write_text("what it said")
    assert recover.sweep(tmp_path) == ["an interrupted checkpoint of web was undone"]
    assert engine.rolled_back == [job.id]
    assert not job.directory.exists()
    assert [p.read_text() for p in (tmp_path / "log").glob("*-web/dump.log")] == ["what it said"]
    assert recover.sweep(tmp_path) == []


def test_what_was_changed_in_the_cgroup_is_set_back(tmp_path: Path, engine: Engine) -> None:
    freeze, limit = tmp_path / "cgroup.freeze", tmp_path / "cpu.max"
    freeze.write_text("1")
    limit.write_text("max 100000")
    job = dead(tmp_path, "migrate-source", "begun")
    for knob in (Knob(freeze, "0"), Knob(limit, limit.read_text()), Knob(tmp_path / "gone", "0")):
        knobs.journal(job, knob)
    limit.write_text("50000 100000")
    knobs.journal(job, Knob(limit, limit.read_text()))  # the first value counts
    recover.sweep(tmp_path)
    assert engine.rolled_back == [job.id]
    assert freeze.read_text() == "0" and limit.read_text() == "max 100000"
    assert not (tmp_path / "gone").exists()


def test_a_committed_checkpoint_is_finished(tmp_path: Path, engine: Engine) -> None:
    engine.state = "exited"
    job = dead(tmp_path, "checkpoint", "held", "commit")
    assert recover.sweep(tmp_path) == ["an interrupted checkpoint of web was finished"]
    assert engine.rolled_back == [] and not job.directory.exists()


def test_a_committed_checkpoint_that_was_left_running_needs_nothing(tmp_path: Path, engine: Engine) -> None:
    dead(tmp_path, "checkpoint", "held", "resumed", "commit", leave_running=True)
    assert recover.sweep(tmp_path) == ["an interrupted checkpoint of web was finished"]
    assert engine.rolled_back == []


def test_what_cannot_be_settled_now_stays(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recover, "FINISH_LIMIT_S", 0.05)
    job = dead(tmp_path, "checkpoint", "held", "commit")
    assert "could not be settled" in recover.sweep(tmp_path)[0]
    engine.failing = True
    other = dead(tmp_path, "restore", "held")
    assert len(recover.sweep(tmp_path)) == 2
    assert job.directory.exists() and other.directory.exists()


def test_migrations(tmp_path: Path, engine: Engine) -> None:
    """A committed one is for `--continue`; to the other end, no journal means that it was undone."""
    left = dead(tmp_path, "migrate-source", "held", "commit")
    undone = dead(tmp_path, "migrate-destination", "prepared")
    runs = dead(tmp_path, "migrate-destination", "prepared", "commit")
    assert recover.sweep(tmp_path) == ["an interrupted migrate-destination of web was undone"]
    assert left.state == "commit"
    assert not undone.directory.exists()
    assert runs.state == "running"
    assert engine.rolled_back == [undone.id]
    assert recover.sweep(tmp_path) == []
    lines = '{"t": 1, "state": "commit", "kind": "migrate-destination"}\n{"t": 2, "state": "running"}\n'
    runs.directory.joinpath("journal.jsonl").write_text(lines)
    recover.sweep(tmp_path)
    assert not runs.directory.exists()


def test_the_living_and_the_newborn_are_left_alone(tmp_path: Path, engine: Engine) -> None:
    living = Job.create(tmp_path, "checkpoint", engine="toy", container_id="c1", name="web")
    newborn = tmp_path / "jobs" / "newborn"
    newborn.mkdir()
    stillborn = tmp_path / "jobs" / "stillborn"
    stillborn.mkdir()
    os.utime(stillborn, (1, 1))
    assert recover.sweep(tmp_path) == []
    assert living.directory.exists() and newborn.exists() and not stillborn.exists()
    assert Job(living.directory).owned
    living.release()
    assert not Job(living.directory).owned


def test_sweep_takes_dead_drafts(tmp_path: Path, engine: Engine) -> None:
    draft = Catalog(tmp_path).begin("web")
    draft.close()
    recover.sweep(tmp_path)
    assert not draft.stage.exists()


def test_close_takes_the_guard_along(tmp_path: Path) -> None:
    job = Job.create(tmp_path, "checkpoint", engine="toy", container_id="c1", name="web")
    guard = recover.start_guard(job)
    assert guard is not None
    job.write("done")
    recover.close(job, guard)
    assert guard.returncode is not None
    assert not job.directory.exists()


def test_the_real_guard_runs_isolated_from_a_checkout(tmp_path: Path) -> None:
    """The command line as it is used: -I, another directory, no environment. The job's journal is final, so no engine is asked."""
    job = Job.create(tmp_path, "checkpoint", engine="no-such-engine", container_id="c1", name="web")
    guard = spawn(recover.guard_argv(job.directory), cwd="/", stderr=PIPE, new_session=True)
    job.write("done")
    assert job.directory.exists()
    job.release()
    _, said = guard.communicate(timeout=60)
    assert guard.returncode == 0, said
    assert not job.directory.exists(), "it took over when the owner let go"


def test_the_real_guard_says_what_it_cannot_do(tmp_path: Path) -> None:
    job = Job.create(tmp_path, "checkpoint", engine="no-such-engine", container_id="c1", name="web")
    guard = recover.start_guard(job)
    assert guard is not None
    job.release()
    assert guard.wait(timeout=60) == 1
    assert "no-such-engine" in (job.directory / "guard.log").read_text()


def test_a_killed_owner_wakes_the_guard(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path; "
        "from ckpt.store.job import Job; from ckpt.ops import recover; "
        "job = Job.create(Path(sys.argv[2]), 'checkpoint', engine='x', container_id='c', name='n'); recover.start_guard(job); job.write('done'); "
        "print(job.directory, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    owner = spawn([sys.executable, "-c", code, CHECKOUT, tmp_path], stdout=PIPE)
    directory = Path(owner.communicate(timeout=60)[0].decode().strip())
    end = time.monotonic() + 60
    while directory.exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert not directory.exists()


def test_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    faults.point("anywhere")
    monkeypatch.setenv("CKPT_FAULT", "a:enospc, migrate:b:fail,c:interrupt")
    faults.point("b")
    with pytest.raises(OSError, match="No space"):
        faults.point("a")
    with pytest.raises(CkptError):
        faults.point("migrate:b")
    with pytest.raises(KeyboardInterrupt):
        faults.point("c")


def test_who_looks_for_the_lock_of_a_job_that_goes_makes_nothing(tmp_path: Path, engine: Engine) -> None:
    """The remover has taken the lock's name away, and is about to remove the directory."""
    job = dead(tmp_path, "checkpoint", "done")
    (job.directory / "lock").unlink()
    for wait in (False, True):
        with pytest.raises(FileNotFoundError):
            Job(job.directory).acquire(wait=wait)
    assert not (job.directory / "lock").exists()


def test_who_waited_for_the_lock_of_a_job_that_is_over_has_not_got_it(tmp_path: Path, engine: Engine) -> None:
    job = Job.create(tmp_path, "checkpoint", engine="toy", container_id="c1", name="web")
    other, said = Job(job.directory), []

    def wait() -> None:
        try:
            said.append(other.acquire(wait=True))
        except FileNotFoundError as error:
            said.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not waits_for(job.directory / "lock"):
        time.sleep(0.005)
    recover.remove(job)
    job.release()
    thread.join(30)
    assert [type(one) for one in said] == [FileNotFoundError] and not job.directory.exists()


def waits_for(path: Path) -> bool:
    """Whether somebody is blocked on the flock of a file (proc_locks(5))."""
    inode = f":{path.stat().st_ino} "
    return any("->" in line and inode in line for line in Path("/proc/locks").read_text().splitlines())


@pytest.mark.parametrize("left", [("journal.jsonl", "lock"), ("lock",), ()], ids=["journal and lock", "lock", "nothing"])
def test_a_removal_that_was_broken_off_is_finished(tmp_path: Path, engine: Engine, left: tuple[str, ...]) -> None:
    job = dead(tmp_path, "checkpoint", "commit", "done")
    for path in list(job.directory.iterdir()):
        if path.name not in left:
            path.unlink()
    os.utime(job.directory, (1, 1))
    assert recover.sweep(tmp_path) == [] and not job.directory.exists()


def test_the_guard_of_a_group_waits_for_no_member_that_is_just_going(tmp_path: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks for the member's lock between the removal of that file and that of the directory, each time."""
    group = Job.create(tmp_path, groupjob.SAVE, name="shop", generation=1)
    member = dead(tmp_path, "checkpoint", "held", "commit", "done", **{action.GROUP: group.id})
    group.write("dumping", jobs=[member.id])
    group.write("commit")
    monkeypatch.setattr(recover, "FINISH_LIMIT_S", 0.1)
    real, looked = os.rmdir, []

    def rmdir(path: Any, **more: Any) -> None:
        looked.append(Job(member.directory))
        with contextlib.suppress(OSError):
            looked[-1].acquire()
        looked[-1].release()
        real(path, **more)

    monkeypatch.setattr(os, "rmdir", rmdir)
    assert member.acquire()
    recover.settle(member)
    member.release()
    assert looked and not member.directory.exists()
    assert recover.settle(group) == "finished"
    group.release()
