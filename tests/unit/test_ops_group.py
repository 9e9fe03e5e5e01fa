"""Groups over the fake engine, in one process: all or none, in order; and the records of sets in the store."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt.criu import action
from ckpt.errors import ArchiveInvalid, CkptError, DumpFailed, NoSpace, RestoreFailed, TargetNotFound, UsageError
from ckpt.events import ignore
from ckpt.model import Container, DumpOptions, RestoreOptions, Target
from ckpt.ops import faults, groupjob, members, recover
from ckpt.ops.group import checkpoint_group
from ckpt.ops.group_restore import bring_back_group, find_group
from ckpt.ops.result import Outcome
from ckpt.store import groups
from ckpt.store.catalog import Catalog
from ckpt.store.job import Job
from tests.contract import fake


class World:
    def __init__(self, directory: Path, engine: fake.FakeEngine) -> None:
        self.engine, self.root = engine, directory / "store"

    def save(self, *names: str, group: str = "shop", **options: Any) -> list[Outcome]:
        chosen = DumpOptions(**{"tcp_established": False, "file_locks": False, "shell_job": False, **options})
        return checkpoint_group(group, [Target.parse(name) for name in names], options=chosen, store_root=self.root, emit=ignore)

    def back(self, ref: str = "shop", **options: Any) -> list[Outcome]:
        return bring_back_group(ref, options=RestoreOptions(**options), store_root=self.root, emit=ignore)

    def states(self, *containers: Container) -> list[str]:
        return [self.engine.describe(one).state for one in containers]

    def stored(self) -> list[str]:
        return [one.ref for one in Catalog(self.root).all()]

    def records(self) -> list[str]:
        return sorted(path.name for path in self.root.glob("groups/*"))

    def leftovers(self) -> list[str]:
        return [str(path) for place in ("jobs", "tmp") for path in sorted((self.root / place).glob("*"))]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    (tmp_path / "world").mkdir()
    made = World(tmp_path, fake.install(tmp_path / "world", monkeypatch.setattr))
    yield made
    made.engine.end_all()


def strike(monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException, *, nth: int = 1) -> None:
    """Fail when `step` is passed for the nth time."""
    passed: list[str] = []

    def point(name: str) -> None:
        passed.append(name)
        if name == step and passed.count(step) == nth:
            raise error

    monkeypatch.setattr(faults, "point", point)


def test_a_set_and_back(world: World) -> None:
    web, db = world.engine.start("web"), world.engine.start("db")
    saved = world.save("web", "db")
    assert [one.ok for one in saved] == [True, True], [one.error for one in saved]
    assert {one.stats["group"] for one in saved} == {"shop@1"} and all(one.stats["group_skew_s"] >= 0 for one in saved)
    assert world.states(web, db) == ["exited", "exited"]
    for checkpoint in Catalog(world.root).all():
        assert checkpoint.entry.group == "shop@1" and "group:shop" in checkpoint.entry.tags
    assert world.records() == ["shop@1.json"] and world.leftovers() == []
    back = world.back()
    assert [one.ok for one in back] == [True, True], [one.error for one in back]
    assert world.states(web, db) == ["running", "running"] and world.leftovers() == []
    assert world.save("web", "db", leave_running=True)[0].ok
    assert world.states(web, db) == ["running", "running"]
    assert [group.ref for group in groups.every(world.root)] == ["shop@1", "shop@2"]


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("step", ["dumping", "held", "captured", "described", "stored"])
@pytest.mark.parametrize("error", [CkptError("no"), OSError(28, os.strerror(28)), KeyboardInterrupt()], ids=["fails", "full", "interrupted"])
def test_one_fails_and_nothing_was(world: World, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException, nth: int) -> None:
    web, db = world.engine.start("web"), world.engine.start("db")
    strike(monkeypatch, step, error, nth=nth)
    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            world.save("web", "db")
    else:
        failed = world.save("web", "db")
        assert {one.target for one in failed} == {"web", "db"}
        assert isinstance(failed[0].error, NoSpace if isinstance(error, OSError) else DumpFailed)
        assert failed[1].error is not None and "could not be" in failed[1].error.message
    assert world.states(web, db) == ["running", "running"]
    assert world.stored() == [] and world.records() == [] and world.leftovers() == []


@pytest.mark.parametrize("step", ["group-freezing", "group-held", "group-stored"])
def test_the_group_fails_and_nothing_was(world: World, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    web, db = world.engine.start("web"), world.engine.start("db")
    strike(monkeypatch, step, CkptError("no"))
    with pytest.raises(DumpFailed, match="no"):
        world.save("web", "db")
    assert world.states(web, db) == ["running", "running"]
    assert world.stored() == [] and world.records() == [] and world.leftovers() == []


@pytest.mark.parametrize("step", ["verified", "restored", "group-restored"])
def test_one_does_not_come_back_and_none_does(world: World, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    web, db = world.engine.start("web"), world.engine.start("db")
    world.save("web", "db")
    with monkeypatch.context() as patched:
        strike(patched, step, CkptError("no"))
        if step.startswith("group"):
            with pytest.raises(RestoreFailed):
                world.back()
        else:
            failed = world.back()
            assert len(failed) == 2 and not any(one.ok for one in failed)
    assert "running" not in [one.state for one in world.engine.containers()]
    assert world.leftovers() == [] and len(world.stored()) == 2
    assert all(one.ok for one in world.back())
    assert world.states(web, db) == ["running", "running"]


def test_what_cannot_be_looked_at_stops_all(world: World) -> None:
    web = world.engine.start("web")
    with pytest.raises(TargetNotFound):
        world.save("web", "nobody")
    with pytest.raises(UsageError):
        world.save("web", group="../x")
    assert world.states(web) == ["running"] and world.leftovers() == []
    assert world.save("web")[0].ok
    with pytest.raises(UsageError):
        world.back("shop", name="copy")


def test_a_set_that_is_not_whole_is_not_restored(world: World) -> None:
    world.engine.start("web")
    world.engine.start("db")
    world.save("web", "db")
    world.back()
    world.save("web", "db")
    catalog = Catalog(world.root)
    catalog.remove(catalog.find("db@2"))
    with pytest.raises(TargetNotFound, match=r"shop@2 is no longer whole: its checkpoint of db") as caught:
        world.back()
    assert "shop@1" in (caught.value.hint or "")
    assert {one.ref for one in find_group(catalog, "shop@1")[1]} == {"web@1", "db@1"}
    with pytest.raises(TargetNotFound, match="no group 'shap'"):
        world.back("shap")


def named(name: str, **more: Any) -> members.Found:
    return name, None, Container("podman", f"id-{name}", name, "running", **more)  # type: ignore[return-value]


def test_order() -> None:
    compose = {"io.podman.compose.project": "shop"}
    web = named("web", labels={"ckpt.after": "cache, db,elsewhere"})
    db = named("shop_db_1", labels={**compose, "com.docker.compose.service": "db"})
    cache = named("cache", labels={**compose, "com.docker.compose.depends_on": "db:service_started:false"})
    after = members.order([web, db, cache])
    assert after == {"id-web": {"id-cache"}, "id-shop_db_1": set(), "id-cache": {"id-shop_db_1"}}
    assert members.waves(after) == [["id-shop_db_1"], ["id-cache"], ["id-web"]]
    with pytest.raises(UsageError, match="wait for each other: .*a.* after .*b"):
        members.order([named("a", labels={"ckpt.after": "b"}), named("b", labels={"ckpt.after": "a"})])
    with pytest.raises(UsageError, match="b shares namespaces with a"):
        members.refuse_joined([named("a"), named("b", requires=("id-a",))])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "members": []}', '{"schema": 1, "name": "../x", "members": [{}]}', "[" * 100_000]
)
def test_a_damaged_record_is_nobody(tmp_path: Path, text: str) -> None:
    with pytest.raises(ArchiveInvalid):
        groups.loads(text.encode())
    (tmp_path / "groups").mkdir()
    (tmp_path / "groups" / "shop@1.json").write_text(text)
    assert groups.every(tmp_path) == []


def test_one_journal_decides_for_several(tmp_path: Path) -> None:
    group = Job.create(tmp_path, groupjob.SAVE, name="shop", generation=1)
    one = Job.create(tmp_path, "checkpoint", **{action.GROUP: group.id})
    alone = Job.create(tmp_path, "checkpoint")
    assert not recover.committed(one)
    group.write("commit")
    assert recover.committed(one) and not recover.committed(alone)
    journal = one.directory / "journal.jsonl"
    journal.write_text(json.dumps({"state": "started", action.GROUP: "../../elsewhere"}) + "\n")
    assert not recover.committed(one)
    for job in (group, one, alone):
        job.release()


def test_a_committed_record_appears_whoever_settles_it(tmp_path: Path) -> None:
    group = groups.Group("shop", 3, 1.0, 0.0, (groups.Member("podman:web", "web", "00", ("podman:db",)),))
    for committed in (True, False):
        groupjob.propose(tmp_path, group)
        assert groups.every(tmp_path) == []
        job = Job.create(tmp_path, groupjob.SAVE, name="shop", generation=3)
        job.write("dumping", jobs=["20260101T000000-00000000"])
        if committed:
            job.write("commit")
        assert recover.settle(job) == ("finished" if committed else "undone")
        assert groups.every(tmp_path) == ([group] if committed else [])
        job.release()
        assert not job.directory.exists() and not list(tmp_path.glob("groups/*.pending"))
        groups.path_of(tmp_path, "shop", 3).unlink(missing_ok=True)
