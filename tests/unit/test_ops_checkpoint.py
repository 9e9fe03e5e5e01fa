"""checkpoint, restore, export, import, inspect, list and rm over the fake engine, in one process."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt.errors import BusyError, CkptError, DigestMismatch, DumpFailed, FeatureMissing, NoSpace, TargetNotFound, UsageError
from ckpt.events import Event, Frozen, Thawed, ignore
from ckpt.model import Container, DumpOptions, RestoreOptions, Target
from ckpt.ops.checkpoint import checkpoint
from ckpt.ops.export import export
from ckpt.ops.import_ import import_
from ckpt.ops.inspect import inspect
from ckpt.ops.list_ import broken, list_
from ckpt.ops.restore import restore
from ckpt.ops.result import Outcome
from ckpt.ops.rm import rm
from ckpt.ops.unpack import unpack
from ckpt.store.catalog import Catalog
from ckpt.transports.base import Location
from tests.contract import fake

OPTIONS = DumpOptions(tcp_established=False, file_locks=False, shell_job=False)


def flip(root: Path) -> None:
    """Change one bit of a chunk in the store."""
    (pack,) = root.glob("packs/*")
    data = bytearray(pack.read_bytes())
    data[4096 + 10] ^= 1
    pack.write_bytes(data)


class World:
    def __init__(self, directory: Path, engine: fake.FakeEngine) -> None:
        self.engine, self.root, self.directory = engine, directory / "store", directory
        self.events: list[Event] = []

    def save(self, *names: str, keep_going: bool = False, all: bool = False, **options: Any) -> list[Outcome]:
        chosen = DumpOptions(**{"tcp_established": False, "file_locks": False, "shell_job": False, **options})
        targets = [Target.parse(name) for name in names]
        return checkpoint(targets, all=all, options=chosen, store_root=self.root, emit=self.events.append, keep_going=keep_going)

    def back(self, *refs: str, **options: Any) -> list[Outcome]:
        return restore(refs, options=RestoreOptions(**options), store_root=self.root, emit=self.events.append)

    def state(self, container: Container) -> str:
        return self.engine.describe(container).state

    def leftovers(self) -> list[str]:
        return [str(p) for place in ("jobs", "tmp") for p in sorted((self.root / place).glob("*"))]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    (tmp_path / "world").mkdir()
    made = World(tmp_path, fake.install(tmp_path / "world", monkeypatch.setattr))
    yield made
    made.engine.end_all()


def test_round_trip_with_files_and_volumes(world: World) -> None:
    web = world.engine.start("web", volumes=("data",))
    (world.engine.world / "volumes" / "data" / "row").write_text("1")
    (outcome,) = world.save("web")
    assert outcome.ok and outcome.checkpoint and outcome.container
    assert outcome.container.state == "exited"
    manifest = outcome.checkpoint.manifest
    assert manifest.volumes == (("data", "/data"),)
    assert {"checkpoint/pages-1.img", "rootfs-diff.tar", "volumes/data.tar", "config.dump"} <= set(manifest.digests)
    assert manifest.freeze_s > 0 and [p.comm for p in manifest.processes]
    assert sum(isinstance(e, Frozen) for e in world.events) == 1
    assert world.leftovers() == []
    (world.engine.world / "volumes" / "data" / "row").write_text("2")
    (world.engine.world / web.id / "upper" / "written").write_text("changed")
    (back,) = world.back("web")
    assert back.ok, back.error
    assert (world.engine.world / "volumes" / "data" / "row").read_text() == "1"
    assert (world.engine.world / web.id / "upper" / "written").read_text() == "web"
    assert [one.checkpoint for one in list_(store_root=world.root)] == [outcome.checkpoint]
    assert world.leftovers() == []
    # Nothing in the store was touched by its restore.
    assert world.engine.describe(web).state == "running"
    world.engine.end_all()
    assert fake.wait(lambda: world.state(web) == "exited")
    assert world.back("web@1")[0].ok


def test_ignore_rootfs_and_volumes(world: World) -> None:
    world.engine.start("web", volumes=("data",))
    (outcome,) = world.save("web", ignore_rootfs=True, ignore_volumes=True)
    assert outcome.checkpoint
    assert not {"rootfs-diff.tar", "volumes/data.tar"} & set(outcome.checkpoint.manifest.digests)
    assert outcome.checkpoint.manifest.volumes == ()


def test_a_copy_beside_the_running_one(world: World) -> None:
    web = world.engine.start("web")
    world.save("web", leave_running=True)
    (copy,) = world.back("web", name="clone")
    assert copy.ok and copy.container and copy.container.name == "clone" and copy.container.id != web.id
    assert world.state(web) == world.state(copy.container) == "running"
    (again,) = world.back("web", name="clone")
    assert isinstance(again.error, BusyError)


def test_leave_running_goes_on_before_the_bytes_are_on_the_disk(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = world.engine.start("web")
    seen: list[str] = []
    monkeypatch.setattr("ckpt.ops.faults.point", lambda step: seen.append(f"{step} {world.state(web)}"))
    world.save("web", leave_running=True)
    assert seen[:3] == ["dumping running", "held paused", "captured paused"]
    assert seen[3:] == [f"{step} running" for step in ("resumed", "described", "stored", "commit", "ended")]
    assert any(isinstance(e, Thawed) for e in world.events)


@pytest.fixture
def streaming(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """An engine whose dumps send their pages to a page server."""
    if os.geteuid():
        pytest.skip("only root's processes may send pages")
    pytest.importorskip("pycriu")
    world.engine.streams = True
    monkeypatch.setattr("ckpt.ops.capture._criu_version", lambda: "4.2")
    return world


def test_memory_goes_into_chunks_as_it_comes(streaming: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = streaming.engine.start("web")
    seen: list[list[str]] = []
    drafts = streaming.root / "tmp"

    def look(step: str) -> None:
        if step == "held":
            seen.append(sorted(path.name for path in drafts.glob("*/checkpoint/p*")))

    monkeypatch.setattr("ckpt.ops.faults.point", look)
    (outcome,) = streaming.save("web")
    assert outcome.ok and outcome.checkpoint, outcome.error
    assert seen == [["pagemap-1.img", "pstree.img"]]
    assert "checkpoint/pages-65537.img" in outcome.checkpoint.manifest.digests
    assert not list((streaming.root / "checkpoints").glob("*/checkpoint/pages-*"))
    (back,) = streaming.back("web")
    assert back.ok and "materialize_s" in back.stats, back.error
    assert streaming.state(web) == "running" and streaming.leftovers() == []


def test_a_full_disk_while_memory_comes(streaming: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = streaming.engine.start("web")
    monkeypatch.setenv("CKPT_FAULT", "pages:enospc")
    streaming.engine.page = lambda number: bytes(8 << 20)
    (outcome,) = streaming.save("web")
    assert isinstance(outcome.error, NoSpace), outcome.error
    assert outcome.error.where == "web is running" and streaming.state(web) == "running"
    assert streaming.leftovers() == [] and list_(store_root=streaming.root) == []


def test_criu_that_dies_while_it_sends(streaming: World) -> None:
    web = streaming.engine.start("web", broken="pages")
    (outcome,) = streaming.save("web")
    assert isinstance(outcome.error, DumpFailed) and "it was killed" in outcome.error.message, outcome.error
    assert streaming.state(web) == "running" and streaming.leftovers() == []


def test_an_engine_that_sends_less_than_it_says(streaming: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dump is held, but its pages never came to their end: it is let go."""
    web = streaming.engine.start("web")
    monkeypatch.setattr(streaming.engine, "_send_pages", lambda port, pages, whole: None)
    (outcome,) = streaming.save("web", timeout_s=0.2)
    assert isinstance(outcome.error, DumpFailed) and "did not connect" in outcome.error.message, outcome.error
    assert streaming.state(web) == "running" and streaming.leftovers() == []


def test_without_bindings_pages_are_files_first(streaming: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.ops.intake.possible", lambda version: False)
    streaming.engine.start("web")
    (outcome,) = streaming.save("web")
    assert outcome.checkpoint and "checkpoint/pages-1.img" in outcome.checkpoint.manifest.digests
    assert streaming.back("web")[0].ok


@pytest.mark.parametrize("step", ["dumping", "held", "captured", "described", "stored"])
def test_ctrl_c_before_commit_brings_it_back(world: World, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    web = world.engine.start("web")
    monkeypatch.setenv("CKPT_FAULT", f"{step}:interrupt")
    with pytest.raises(KeyboardInterrupt):
        world.save("web")
    assert world.state(web) == "running"
    assert world.leftovers() == []


def test_ctrl_c_after_commit_does_not_stop_the_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = world.engine.start("web")
    monkeypatch.setattr("ckpt.ops.faults.point", lambda step: os.kill(os.getpid(), signal.SIGINT) if step == "commit" else None)
    with pytest.raises(KeyboardInterrupt):
        world.save("web")
    assert world.state(web) == "exited"
    assert len(list_(store_root=world.root)) == 1
    assert world.leftovers() == []


def test_a_bug_is_raised_as_it_is_and_the_container_runs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = world.engine.start("web")
    monkeypatch.setattr("ckpt.ops.capture.describe", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.save("web")
    assert world.state(web) == "running"
    assert world.leftovers() == []


def test_a_failed_dump_keeps_its_log(world: World) -> None:
    world.engine.start("web", broken="dump")
    (outcome,) = world.save("web")
    assert isinstance(outcome.error, DumpFailed)
    assert outcome.error.where == "web is running"
    path, _, line = str(outcome.error.log).rpartition(":")
    assert line == "1" and "cannot dump" in Path(path).read_text()
    assert world.leftovers() == []


def test_preflight_errors(world: World) -> None:
    world.engine.start("web", broken="preflight")
    (outcome,) = world.save("web")
    assert isinstance(outcome.error, FeatureMissing)
    assert outcome.error.where == "web is running, untouched"


def test_only_running_containers(world: World) -> None:
    web = world.engine.start("web")
    os.kill(web.pid or 0, signal.SIGSTOP)
    assert fake.wait(lambda: world.state(web) == "paused")
    (outcome,) = world.save("web")
    assert isinstance(outcome.error, BusyError) and "unpause" in (outcome.error.hint or "")
    os.kill(web.pid or 0, signal.SIGCONT)


def test_several_targets(world: World) -> None:
    one, two = world.engine.start("one"), world.engine.start("two")
    bad = world.engine.start("bad", broken="dump")
    assert [o.ok for o in world.save("one", "nope")] == [False]
    assert world.state(one) == "running", "a mistyped name must stop it all"
    assert [o.ok for o in world.save("bad", "one")] == [False]
    assert world.state(one) == "running"
    several = world.save("nope", "bad", "one", "fake:one", keep_going=True)
    assert [(o.target, o.ok) for o in several] == [("nope", False), ("bad", False), ("one", True)]
    assert [(o.target, o.ok) for o in world.save(all=True, keep_going=True)] == [("two", True), ("bad", False)]
    assert world.state(two) == "exited"
    assert world.state(bad) == "running"
    with pytest.raises(UsageError):
        world.save()
    with pytest.raises(UsageError):
        world.save("one", all=True)
    assert sorted(o.target for o in restore([], all=True, options=RestoreOptions(), store_root=world.root, emit=ignore) if o.ok) == ["one", "two"]


def test_a_damaged_checkpoint_touches_nothing(world: World) -> None:
    web = world.engine.start("web")
    (outcome,) = world.save("web")
    assert outcome.checkpoint
    flip(world.root)
    (back,) = world.back("web")
    assert isinstance(back.error, DigestMismatch)
    assert world.state(web) == "exited", "it must not have been removed"


def test_memory_under_a_signature_is_compared_before_it_runs_lazily(streaming: World, tmp_path: Path) -> None:
    """A chunk's check sum finds damage; only the manifest's digests say whose memory it is."""
    streaming.engine.start("web")
    (outcome,) = streaming.save("web")
    assert outcome.checkpoint
    digests = {**outcome.checkpoint.manifest.digests, "checkpoint/pages-65537.img": "sha256:" + "0" * 64}
    changed = replace(outcome.checkpoint, manifest=replace(outcome.checkpoint.manifest, digests=digests))
    catalog = Catalog(streaming.root)
    unpack(catalog, changed, tmp_path / "lazy", lazy=True, emit=ignore, label="web")
    with pytest.raises(DigestMismatch, match="pages-65537"):
        unpack(catalog, changed, tmp_path / "signed", lazy=True, signed=True, emit=ignore, label="web")
    unpack(catalog, outcome.checkpoint, tmp_path / "again", lazy=True, signed=True, emit=ignore, label="web")


def test_a_restore_without_room_touches_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    web = world.engine.start("web")
    world.save("web")

    def full(*args: object, **options: object) -> dict[str, str]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ckpt.store.catalog.Catalog.materialize", full)
    (back,) = world.back("web")
    assert isinstance(back.error, NoSpace)
    assert world.state(web) == "exited" and world.leftovers() == []


def test_failed_restore(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.engine.start("web")
    world.save("web")
    monkeypatch.setenv("CKPT_FAKE_BROKEN", "restore")
    (back,) = world.back("web")
    assert back.error and back.error.exit_code == 21
    assert back.error.where == "nothing is running; the checkpoint web@1 is still in the store"
    assert world.leftovers() == []
    monkeypatch.delenv("CKPT_FAKE_BROKEN")
    assert world.back("web")[0].ok


def test_another_container_has_taken_the_name(world: World) -> None:
    web = world.engine.start("web")
    world.save("web")
    world.engine.remove(web)
    world.engine.start("web")
    (back,) = world.back("web")
    assert isinstance(back.error, BusyError) and "-n" in (back.error.hint or "")


def at(path: Path) -> Location:
    return Location.of(path)


@pytest.mark.parametrize("compress", ["zstd", "gzip", "none"])
def test_export_import(world: World, compress: str) -> None:
    web = world.engine.start("web")
    (saved,) = world.save("web")
    file = world.directory / "web.tar"
    out = export("web@1", at(file), compress=compress, options=OPTIONS, store_root=world.root, emit=ignore)
    assert out.ok and out.stats["archive_bytes"] == file.stat().st_size
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert out.stats["digest"] == f"sha256:{digest}"
    assert file.stat().st_mode & 0o777 == 0o600
    seen = inspect(str(file), store_root=world.root)
    assert seen.manifest == (saved.checkpoint and saved.checkpoint.manifest)
    assert not seen.foreign and seen.sizes["checkpoint/pages-1.img"] > 0
    assert inspect("web", store_root=world.root).sizes == seen.sizes
    with pytest.raises(DigestMismatch):
        import_(at(file), digest="0" * 64, store_root=world.root, emit=ignore)
    copy = import_(at(file), name="other", digest=digest, store_root=world.root, emit=ignore)
    assert copy.checkpoint and copy.checkpoint.ref == "other@1"
    assert import_(at(file), store_root=world.root, emit=ignore).checkpoint.ref == "web@2"  # type: ignore[union-attr]
    (back,) = restore([], import_from=at(file), options=RestoreOptions(), store_root=world.root, emit=ignore)
    assert back.ok, back.error
    assert world.state(web) == "running"
    assert len(list_(store_root=world.root)) == 3 and world.leftovers() == []


def test_export_of_a_running_container(world: World) -> None:
    web = world.engine.start("web")
    file = world.directory / "web.tar.zst"
    left = export("web", at(file), leave_running=True, options=OPTIONS, store_root=world.root, emit=ignore)
    assert left.ok and world.state(web) == "running"
    ended = export("fake:web", at(file), options=OPTIONS, store_root=world.root, emit=ignore)
    assert ended.ok and world.state(web) == "exited" and ended.checkpoint is None
    assert list_(store_root=world.root) == [] and world.leftovers() == []
    (back,) = restore([], import_from=at(file), options=RestoreOptions(), store_root=world.root, emit=ignore)
    assert back.ok, back.error
    with pytest.raises(TargetNotFound, match="neither"):
        export("nope", at(file), options=OPTIONS, store_root=world.root, emit=ignore)


def test_export_to_a_place_that_does_not_exist_leaves_it_running(world: World) -> None:
    web = world.engine.start("web")
    with pytest.raises(TargetNotFound, match="no directory"):
        export("web", at(world.directory / "no" / "such.tar"), options=OPTIONS, store_root=world.root, emit=ignore)
    assert world.state(web) == "running" and world.leftovers() == []


def test_import_of_rubbish_leaves_the_store_as_it_was(world: World) -> None:
    file = world.directory / "rubbish"
    file.write_bytes(os.urandom(100_000))
    from ckpt.errors import ArchiveInvalid

    with pytest.raises(ArchiveInvalid):
        import_(at(file), store_root=world.root, emit=ignore)
    with pytest.raises(TargetNotFound):
        import_(at(world.directory / "nope"), store_root=world.root, emit=ignore)
    assert list_(store_root=world.root) == [] and world.leftovers() == []


def test_rm(world: World) -> None:
    world.engine.start("web")
    for _ in range(3):
        world.save("web", leave_running=True)
    assert [o.ok for o in rm(["web@1", "nope"], store_root=world.root, emit=ignore)] == [False]
    assert [o.ok for o in rm(["web@1", "web@1"], store_root=world.root, emit=ignore)] == [True]
    assert [one.checkpoint.ref for one in list_(store_root=world.root, name="web")] == ["web@2", "web@3"]
    assert len(rm([], all=True, store_root=world.root, emit=ignore)) == 2
    assert list_(store_root=world.root) == [] and broken(store_root=world.root) == []
    with pytest.raises(UsageError):
        rm([], store_root=world.root, emit=ignore)


def test_over_http_and_back(world: World) -> None:
    """A container ends only when the other end has all; whatever breaks before that, it runs on, and the exit code says whether to try again."""
    from ckpt.errors import RemoteRefused, TransferFailed
    from ckpt.events import Notice
    from ckpt.transports.base import CarrierOptions
    from tests.unit.web_double import serving

    web = world.engine.start("web")
    quick = CarrierOptions(chunk_bytes=4096, retry_limit_s=0.3, idle_timeout_s=5)
    with serving() as server:
        to = Location.parse(f"{server.url}/web.tar")

        def go() -> Outcome:
            return export("web", to, compress="none", options=OPTIONS, carrier=quick, store_root=world.root, emit=world.events.append)

        for method, status, kind in (("OPTIONS", 401, RemoteRefused), ("POST", 413, RemoteRefused), ("PATCH", 500, TransferFailed)):
            server.answers = {method: [(status, {}, b"")] * 9}
            with pytest.raises(kind) as caught:
                go()
            assert caught.value.where is None if method == "OPTIONS" else "running" in (caught.value.where or "")
            assert world.state(web) == "running" and server.objects == {} and server.uploads == {}
        server.answers, server.cuts_in = {}, [1, 3000, 2, 4095]
        out = go()
        assert out.ok and world.state(web) == "exited" and out.stats["path"] == "web@3"
        assert sum("going on" in event.text for event in world.events if isinstance(event, Notice)) >= 2
        digest = hashlib.sha256(server.objects["/web.tar"]).hexdigest()
        assert out.stats["digest"] == f"sha256:{digest}"
        server.cuts_out = [100, 5000]
        back = import_(to, digest=digest, carrier=quick, store_root=world.root, emit=ignore)
        assert back.ok and back.checkpoint and back.checkpoint.ref == "web@1"
        server.objects["/web.tar"] += b"x"
        with pytest.raises(CkptError):
            import_(to, carrier=quick, store_root=world.root, emit=ignore)
        server.objects["/web.tar"] = server.objects["/web.tar"][:-1]
        (again,) = restore([], import_from=to, digest=digest, options=RestoreOptions(), store_root=world.root, emit=ignore)
        assert again.ok, again.error
    assert world.state(web) == "running" and len(list_(store_root=world.root)) == 1 and world.leftovers() == []
