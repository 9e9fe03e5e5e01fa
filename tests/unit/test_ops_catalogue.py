"""rewind, prune, tag, note, pin and the filters of list, over the fake engine."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt.errors import BusyError, CkptError, DigestMismatch, RestoreFailed, TargetNotFound, UsageError
from ckpt.events import ignore
from ckpt.host import filesystem
from ckpt.model import Container, DumpOptions, Manifest, RestoreOptions, Target
from ckpt.ops import mark
from ckpt.ops import restore as restoring
from ckpt.ops.checkpoint import checkpoint
from ckpt.ops.list_ import list_
from ckpt.ops.prune import Pruned, prune
from ckpt.ops.rewind import BEFORE, rewind
from ckpt.ops.rm import rm
from ckpt.store import place
from ckpt.store.catalog import Catalog
from ckpt.store.job import Job
from ckpt.store.retention import Rules
from tests.contract import fake

OPTIONS = DumpOptions(tcp_established=False, file_locks=False, shell_job=False)


class World:
    def __init__(self, directory: Path, engine: fake.FakeEngine) -> None:
        self.engine, self.root = engine, directory / "store"
        self.catalog = Catalog(self.root)

    def save(self, name: str, *, leave_running: bool = True) -> str:
        (outcome,) = checkpoint(
            [Target.parse(name)],
            options=DumpOptions(tcp_established=False, file_locks=False, shell_job=False, leave_running=leave_running),
            store_root=self.root,
            emit=ignore,
        )
        assert outcome.ok and outcome.checkpoint, outcome.error
        return outcome.checkpoint.ref

    def write(self, web: Container, text: str) -> None:
        (self.engine.world / web.id / "upper" / "written").write_text(text)

    def written(self, web: Container) -> str:
        return (self.engine.world / web.id / "upper" / "written").read_text()

    def refs(self) -> list[str]:
        return [c.ref for c in self.catalog.all()]

    def rewind(self, ref: str, *, at_s: float | None = None, discard: bool = False) -> object:
        return rewind(ref, at_s=at_s, discard=discard, dump=OPTIONS, options=RestoreOptions(), store_root=self.root, emit=ignore)

    def prune(self, *names: str, dry_run: bool = False, orphans: bool = False, **rules: object) -> Pruned:
        return prune(names, Rules(**rules), orphans=orphans, dry_run=dry_run, store_root=self.root, emit=ignore)  # type: ignore[arg-type]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    (tmp_path / "world").mkdir()
    made = World(tmp_path, fake.install(tmp_path / "world", monkeypatch.setattr))
    yield made
    made.engine.end_all()


def test_rewind_saves_what_runs_and_can_be_rewound(world: World) -> None:
    web = world.engine.start("web")
    world.write(web, "one")
    assert world.save("web") == "web@1"
    world.write(web, "two")
    world.rewind("web@1")
    assert world.engine.describe(web).state == "running" and world.written(web) == "one"
    assert world.refs() == ["web@1", "web@2"] and world.catalog.find(f"web@{BEFORE}").ref == "web@2"
    assert "web@1" in world.catalog.find("web@2").entry.note
    world.rewind(f"web@{BEFORE}")
    assert world.written(web) == "two" and world.refs() == ["web@1", "web@2", "web@3"]
    world.rewind("web@1", discard=True)
    assert world.written(web) == "one" and world.refs() == ["web@1", "web@2", "web@3"]


def test_rewind_of_what_does_not_run_saves_nothing(world: World) -> None:
    web = world.engine.start("web")
    world.write(web, "one")
    world.save("web", leave_running=False)
    world.rewind("web")
    assert world.engine.describe(web).state == "running" and world.refs() == ["web@1"]


def test_rewind_by_time(world: World) -> None:
    web = world.engine.start("web")
    for text in ("one", "two", "three"):
        world.write(web, text)
        world.save("web")
    times = [c.manifest.created_s for c in world.catalog.all()]
    world.rewind("web", at_s=(times[1] + times[2]) / 2)
    assert world.written(web) == "two"
    with pytest.raises(TargetNotFound, match="that old") as caught:
        world.rewind("web", at_s=times[0] - 1)
    assert "web@1" in str(caught.value.hint)
    with pytest.raises(UsageError):
        world.rewind("web@1", at_s=times[0])
    with pytest.raises(TargetNotFound):
        world.rewind("wbe", at_s=times[0])


def test_rewind_to_a_damaged_checkpoint_touches_nothing(world: World) -> None:
    web = world.engine.start("web")
    world.save("web")
    path = world.catalog.find("web@1").directory / "config.dump"
    path.write_bytes(path.read_bytes() + b" ")
    before = world.engine.describe(web)
    with pytest.raises(DigestMismatch, match="damaged"):
        world.rewind("web@1")
    assert world.engine.describe(web) == before and world.refs() == ["web@1"]


def test_a_rewind_that_fails_brings_the_present_back(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = world.engine.start("web")
    world.write(web, "one")
    world.save("web")
    world.write(web, "two")
    real, calls = type(world.engine).restore, 0

    def broken(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise RestoreFailed("CRIU does not like it")
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(world.engine), "restore", broken)
    with pytest.raises(RestoreFailed, match="does not like it") as caught:
        world.rewind("web@1")
    assert "runs on as it was" in str(caught.value.where)
    assert world.engine.describe(web).state == "running" and world.written(web) == "two" and calls == 2


def test_prune_removes_what_no_rule_keeps_and_says_why(world: World) -> None:
    world.engine.start("web")
    for _ in range(4):
        world.save("web")
    mark.pin(["web@1"], True, store_root=world.root)
    would = world.prune(keep_last=2, dry_run=True)
    assert [v.keep for v in would.verdicts] == [True, False, True, True] and world.refs() == ["web@1", "web@2", "web@3", "web@4"]
    assert would.verdicts[0].reasons == ("pinned",)
    done = world.prune("web", keep_last=2)
    assert world.refs() == ["web@1", "web@3", "web@4"] and not done.failed
    with world.catalog.lease(world.catalog.find("web@3")):
        busy = world.prune(keep_last=1)
        assert len(busy.failed) == 1 and world.refs() == ["web@1", "web@3", "web@4"]
    world.prune(max_size_bytes=0)
    assert world.refs() == ["web@1", "web@4"]
    with pytest.raises(UsageError):
        world.prune()
    with pytest.raises(TargetNotFound):
        world.prune("other", keep_last=1)


def test_prune_takes_orphans(world: World) -> None:
    world.engine.start("web")
    world.save("web")
    (world.catalog.drafts / "dead").mkdir()
    assert world.prune(orphans=True).orphans == 1
    assert not (world.catalog.drafts / "dead").exists() and world.refs() == ["web@1"]


def test_tags_notes_and_pins(world: World) -> None:
    world.engine.start("web")
    world.save("web"), world.save("web")
    assert mark.tag(["web@1", "web@2"], ["good", "v1.2"], [], store_root=world.root)[0].ok
    assert world.catalog.find("web@good").ref == "web@2"
    mark.tag(["web@2"], [], ["good"], store_root=world.root)
    assert world.catalog.find("web@good").ref == "web@1"
    mark.note(["web@1"], "before the upgrade", store_root=world.root)
    assert world.catalog.find("web@1").entry.note == "before the upgrade"
    (refused,) = mark.tag(["web@9"], ["x"], [], store_root=world.root)
    assert isinstance(refused.error, TargetNotFound)
    for bad in ("", "a b", "latest", "12", "../x", "x" * 200, "-x"):
        with pytest.raises(UsageError):
            mark.tag(["web@1"], [bad], [], store_root=world.root)
    for bad in ("\x1b[2J", "x" * 3000):
        with pytest.raises(UsageError):
            mark.note(["web@1"], bad, store_root=world.root)
    mark.pin(["web@1"], True, store_root=world.root)
    (kept,) = rm(["web@1"], store_root=world.root, emit=ignore)
    assert isinstance(kept.error, BusyError) and "pin --remove" in str(kept.error.hint)
    rm([], all=True, store_root=world.root, emit=ignore)
    assert world.refs() == ["web@1"]
    mark.pin(["web@1"], False, store_root=world.root)
    rm(["web@1"], store_root=world.root, emit=ignore)
    assert world.refs() == []


def test_what_the_store_knows_is_damaged(world: World) -> None:
    world.engine.start("web")
    world.save("web")
    path = world.catalog.find("web@1").directory / "entry.json"
    good = json.loads(path.read_bytes())
    for change in ({"schema": 2}, {"name": 5}, {"generation": -1}, {"tags": ["a b"]}, {"pinned": "yes"}, {"manifest_digest": "sha256:" + "0" * 64}):
        path.write_text(json.dumps(good | change))
        listing = world.catalog.listing()
        assert not listing.checkpoints and len(listing.broken) == 1, change
    path.write_text(json.dumps(good | {"later": 1}))
    assert world.refs() == ["web@1"]


def test_list_filters_sorts_and_measures(world: World) -> None:
    world.engine.start("web"), world.engine.start("db")
    for name in ("web", "db", "web"):
        world.save(name)
    mark.tag(["web@2"], ["good"], [], store_root=world.root)

    def refs(**options: object) -> list[str]:
        return [one.checkpoint.ref for one in list_(store_root=world.root, **options)]  # type: ignore[arg-type]

    assert refs() == ["db@1", "web@1", "web@2"]
    assert refs(sort="created", reverse=True) == ["web@2", "db@1", "web@1"]
    assert refs(filters=[("tag", "go*")]) == ["web@2"] and refs(filters=[("name", "d?"), ("name", "nobody")]) == ["db@1"]
    assert refs(filters=[("origin", "import")]) == [] and len(refs(filters=[("origin", "local")])) == 3
    moment = world.catalog.find("db").manifest.created_s
    assert refs(since_s=moment) == ["db@1", "web@2"] and refs(before_s=moment) == ["web@1"]
    for one in list_(store_root=world.root):
        assert one.unique_bytes is not None and one.shared_bytes is not None
    for bad in ({"filters": [("colour", "red")]}, {"sort": "colour"}):
        with pytest.raises(UsageError):
            refs(**bad)


def test_an_amended_checkpoint_that_is_gone(world: World) -> None:
    world.engine.start("web")
    world.save("web")
    found = world.catalog.find("web")
    world.catalog.remove(found)
    with pytest.raises(CkptError):
        world.catalog.amend(found, lambda entry: entry)
    assert isinstance(found.manifest, Manifest)


def test_drafts_of_another_host_are_left_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """On some network mounts nobody here sees the locks of another host."""
    draft = world.catalog.begin("web")
    draft.close()
    lock = world.catalog.locks / draft.id
    lock.write_text("elsewhere\n")
    assert world.catalog.sweep() == [] and draft.stage.is_dir()
    old = time.time() - 8 * 86400
    os.utime(lock, (old, old))
    assert world.catalog.sweep() == [draft.id] and not draft.stage.exists()


def test_jobs_of_a_store_that_other_hosts_share_stay_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(place, "DEFAULT_ROOT", tmp_path / "here")
    monkeypatch.setattr(filesystem, "is_shared", lambda path: "net" in str(path))
    there = tmp_path / "net" / "store"
    job = Job.create(there, "checkpoint")
    assert tmp_path / "here" in job.directory.parents and place.store_of(job.directory) == there
    assert place.jobs(tmp_path / "disk") == tmp_path / "disk" / "jobs"
    job.release()


def test_kinds_of_file_systems(tmp_path: Path) -> None:
    assert filesystem.kind(Path("/proc/self/not/there")) == "proc" and filesystem.kind(tmp_path)
    assert not filesystem.is_shared(tmp_path)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), CkptError("no restore can begin")])
def test_a_rewind_that_is_broken_off_brings_the_present_back(world: World, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    web = world.engine.start("web")
    world.write(web, "one")
    world.save("web")
    world.write(web, "two")
    real, calls = restoring.restore, 0

    def broken(*args: object, **kwargs: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise error
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(restoring, "restore", broken)
    with pytest.raises(type(error) if isinstance(error, KeyboardInterrupt) else RestoreFailed):
        world.rewind("web@1")
    assert world.engine.describe(web).state == "running" and world.written(web) == "two"
