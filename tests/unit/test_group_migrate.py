"""A group that moves: what is refused, and who decides for its members on either host."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt.cli.main import main
from ckpt.criu import action
from ckpt.engines.registry import by_name
from ckpt.errors import BusyError, CkptError, TargetNotFound, UsageError
from ckpt.events import ignore
from ckpt.model import Container, Volume
from ckpt.ops import group_dest, group_migrate, groupjob, recover
from ckpt.ops.migrate import MigrateOptions
from ckpt.store.job import Job

WEB = Container("podman", "aa" * 32, "web", "running")
DB = Container("podman", "bb" * 32, "db", "running")


def members(*containers: Container) -> list[tuple[str, object, Container]]:
    return [(one.name, by_name("podman"), one) for one in containers]


@pytest.mark.parametrize(
    "words",
    [
        ["--group", "shop"],
        ["--group", "../x", "root@b"],
        ["--group", "shop", "root@b", "web", "--precopy"],
        ["--group", "shop", "root@b", "--postcopy"],
        ["--group", "shop", "root@b", "--lazy"],
        ["--group", "shop", "root@b", "--precopy", "--auto-converge"],
        ["--group", "shop", "root@b", "--name", "other"],
        ["--group", "shop", "root@b", "-p", "80:80"],
        ["--group", "shop", "--continue", "20260101T000000-00000000"],
        ["--group", "shop", "--stdio"],
        ["web", "root@b", "db"],
    ],
)
def test_bad_words(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["migrate", *words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("error: ") == 1


def test_members_that_cannot_move_together() -> None:
    shared = (Volume("data", Path("/x"), "/data"),)
    both = members(replace(WEB, volumes=shared), replace(DB, volumes=shared))
    with pytest.raises(UsageError, match="volume data in common"):
        group_migrate.refuse_members(both, MigrateOptions())  # type: ignore[arg-type]
    group_migrate.refuse_members(both, MigrateOptions(ignore_volumes=True))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="in a pod"):
        group_migrate.refuse_members(members(replace(WEB, pod="1")), MigrateOptions())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="shares namespaces"):
        group_migrate.refuse_members(members(WEB, replace(DB, requires=(WEB.id,))), MigrateOptions())  # type: ignore[arg-type]


class There:
    """A group that has arrived: two members, held."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lead, known = self._join({"group": "shop"})
        assert self.lead is not None
        self.jobs = [self.member(known)]
        _, again = self._join({action.GROUP: self.lead.job.id})
        assert again == known
        self.jobs.append(self.member(again))

    def _join(self, args: dict[str, str]) -> tuple[group_dest.Lead | None, dict[str, str]]:
        return group_dest.join(self.root, args, "a")

    def member(self, known: dict[str, str]) -> Job:
        job = Job.create(self.root, "migrate-destination", engine="podman", name="web", container_id="aa", source="a", **known)
        job.write("prepared", owner_pid=os.getpid())
        return job

    def decide(self) -> None:
        assert self.lead is not None
        self.lead.decide([job.id for job in self.jobs])


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[There]:
    monkeypatch.setattr(recover, "start_guard", lambda job: None)
    found = There(tmp_path)
    yield found
    assert found.lead is not None
    for job in (found.lead.job, *found.jobs):
        job.release()


def test_one_line_decides_there(there: There) -> None:
    assert not any(recover.committed(job) for job in there.jobs)
    there.decide()
    assert all(recover.committed(job) and not groupjob.abandon(job) for job in there.jobs)
    # What one member comes to afterwards is its own.
    there.jobs[0].write("failed")
    assert not recover.committed(there.jobs[0]) and groupjob.abandon(there.jobs[0])
    assert recover.committed(there.jobs[1])
    # The group's line is kept as long as a member needs it.
    assert there.lead is not None
    there.lead.leave()
    assert recover.committed(there.jobs[1])
    there.jobs[1].write("commit")
    assert there.lead.job.acquire()
    there.lead.leave()
    assert not there.lead.job.directory.exists() and recover.committed(there.jobs[1])


def test_what_fails_before_the_line_forbids_it(there: There, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAULT", "destination-group-commit:fail")
    with pytest.raises(CkptError, match="injected"):
        there.decide()
    assert groupjob.abandon(there.jobs[0])


def test_what_fails_after_the_line_is_no_refusal(there: There, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAULT", "destination-group-committed:fail")
    there.decide()
    assert all(recover.committed(job) for job in there.jobs)


def test_who_is_undone_takes_the_others_along(there: There) -> None:
    assert groupjob.abandon(there.jobs[1])
    with pytest.raises(BusyError, match="undone"):
        there.decide()
    assert groupjob.abandon(there.jobs[0])


@pytest.mark.parametrize("state", ["restoring", "rolled-back"])
def test_a_member_that_is_not_held(there: There, state: str) -> None:
    there.jobs[1].write(state)
    with pytest.raises(BusyError, match="not held here"):
        there.decide()
    assert not any(recover.committed(job) for job in there.jobs)
    there.jobs[1].write("prepared")
    with pytest.raises(BusyError):  # never again
        there.decide()


def test_a_member_whose_owner_is_gone(there: There) -> None:
    there.jobs[1].write("prepared", owner_pid=1 << 22)
    with pytest.raises(BusyError, match="not held here"):
        there.decide()


def test_only_its_own_members(there: There, tmp_path: Path) -> None:
    alone = Job.create(tmp_path, "migrate-destination", engine="podman", name="x")
    alone.write("prepared", owner_pid=os.getpid())
    assert there.lead is not None
    for wrong in (None, [], [alone.id], ["../x"], "x"):
        with pytest.raises((BusyError, UsageError)):
            there.lead.decide(wrong)
    alone.release()
    for args, source in (({action.GROUP: "../x"}, "a"), ({action.GROUP: alone.id}, "a"), ({action.GROUP: there.lead.job.id}, "other")):
        with pytest.raises(UsageError, match="no such group"):
            group_dest.join(tmp_path, args, source)
    with pytest.raises(UsageError, match="group's name"):
        group_dest.join(tmp_path, {"group": "../x"}, "a")


def test_the_source_waits_until_all_were_asked(tmp_path: Path) -> None:
    group = Job.create(tmp_path, groupjob.MIGRATE, name="shop")
    one = Job.create(tmp_path, "migrate-source", engine="podman", name="web", **{action.GROUP: group.id})
    group.write("begun", jobs=[one.id])
    group.write("commit")
    assert recover.settle(group) == "left" and recover.settle(one) == "left"
    recover.remove(one)
    recover.settle_group_of(one, {action.GROUP: group.id})
    assert group.directory.exists(), "it has an owner"
    group.release()
    recover.settle_group_of(one, {action.GROUP: group.id})
    assert not group.directory.exists()
    one.release()
    assert group_migrate.continue_group(group.id, store_root=tmp_path, emit=ignore) is None


def test_continue_of_a_group_without_members(tmp_path: Path) -> None:
    group = Job.create(tmp_path, groupjob.MIGRATE, name="shop")
    with pytest.raises(BusyError):
        group_migrate.continue_group(group.id, store_root=tmp_path, emit=ignore)
    group.write("commit")
    group.release()
    with pytest.raises(TargetNotFound):
        group_migrate.continue_group(group.id, store_root=tmp_path, emit=ignore)
