"""The destination's side of files that go over ahead: what it takes, and what it calls whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from ckpt.engines.base import Engine
from ckpt.errors import ArchiveInvalid, BusyError, CkptError, FeatureMissing, TransferFailed, UsageError
from ckpt.model import HostFacts, Manifest
from ckpt.ops.ahead_dest import ROOTFS, Trees
from ckpt.peer.server import Session
from ckpt.store.job import Job

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: changes its root")
META = [0o100640, 1, 2, 3, {}]
FILE = [{"o": "file", "p": "x", "new": True}, {"o": "data", "at": 0, "n": 0}, {"o": "end", "size": 0, "m": META}, {"o": "done"}]


class Volumes:
    """An engine that has volumes."""

    name = "fake"

    def __init__(self, root: Path) -> None:
        self.root = root

    def make_volume(self, job: Job, name: str) -> Path:
        try:
            (self.root / name).mkdir()
        except FileExistsError:
            raise BusyError(f"volume {name} exists") from None
        return self.root / name


class Stream:
    """The session's part of an upload."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def receive_files(self, into: Path, *, allow: Callable[[str], bool], sinks: Mapping[str, BinaryIO]) -> None:
        assert allow("tree") and not allow("other")
        sinks["tree"].write(self.content)
        sinks["tree"].flush()


def lines(*orders: dict[str, Any]) -> Session:
    return cast(Session, Stream(b"".join(json.dumps(order).encode() + b"\n" for order in orders)))


@pytest.fixture
def trees(tmp_path: Path) -> Iterator[Trees]:
    (tmp_path / "volumes").mkdir()
    (tmp_path / "stage").mkdir()
    made = Trees(cast(Engine, Volumes(tmp_path / "volumes")), Job.create(tmp_path, "migrate-destination"))
    yield made
    made.close()


def manifest(*volumes: str) -> Manifest:
    return Manifest(
        id="x", name="web", engine="podman", container_id="c", created_s=0.0, host=HostFacts(), volumes=tuple((name, "/v") for name in volumes)
    )


def test_both_kinds_come_to_their_places(trees: Trees, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    trees.receive(lines(*FILE), stage, {"final": False})
    trees.receive(lines(*FILE), stage, {"volume": "data", "final": True})
    assert (stage / ROOTFS / "x").stat().st_mode == 0o100640
    assert (tmp_path / "volumes/data/x").exists()
    with pytest.raises(TransferFailed, match="root file system"):
        trees.check(manifest("data"), ignore_volumes=False)
    trees.receive(lines({"o": "delete", "p": "x"}, {"o": "done"}), stage, {"final": True})
    assert not (stage / ROOTFS / "x").exists()
    trees.check(manifest("data"), ignore_volumes=False)
    trees.receive(lines({"o": "done"}), stage, {"volume": "data"})
    with pytest.raises(TransferFailed, match="volume data"):
        trees.check(manifest("data"), ignore_volumes=False)


def test_a_volume_that_never_came(trees: Trees) -> None:
    with pytest.raises(TransferFailed, match="volume data"):
        trees.check(manifest("data"), ignore_volumes=False)
    trees.check(manifest("data"), ignore_volumes=True)
    trees.check(manifest(), ignore_volumes=False)


@pytest.mark.parametrize("name", ["../etc", "--opt", "a/b", "a" * 300, ".", ["x"]])
def test_names_that_are_none(trees: Trees, tmp_path: Path, name: object) -> None:
    with pytest.raises(UsageError):
        trees.receive(lines(*FILE), tmp_path / "stage", {"volume": name})


def test_a_volume_of_somebody_else_is_not_touched(trees: Trees, tmp_path: Path) -> None:
    (tmp_path / "volumes/data").mkdir()
    with pytest.raises(BusyError):
        trees.receive(lines(*FILE), tmp_path / "stage", {"volume": "data"})
    assert not list((tmp_path / "volumes/data").iterdir())


def test_an_engine_without_volumes(tmp_path: Path) -> None:
    trees = Trees(cast(Engine, type("Bare", (), {"name": "bare"})()), Job.create(tmp_path, "migrate-destination"))
    with pytest.raises(FeatureMissing):
        trees.receive(lines(*FILE), tmp_path, {"volume": "data"})


@pytest.mark.parametrize("content", [b"nonsense\n", b'{"o":"file","p":"/../../x","new":true}\n'])
def test_a_stream_that_makes_no_sense(trees: Trees, tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ArchiveInvalid):
        trees.receive(cast(Session, Stream(content)), tmp_path / "stage", {"final": True})
    with pytest.raises(CkptError):
        trees.check(manifest(), ignore_volumes=False)


def test_a_volume_that_was_removed_meanwhile(trees: Trees, tmp_path: Path) -> None:
    trees.receive(lines(*FILE), tmp_path / "stage", {"volume": "data", "final": True})
    (tmp_path / "volumes/data").rename(tmp_path / "away")
    with pytest.raises(TransferFailed, match="removed since"):
        trees.check(manifest("data"), ignore_volumes=False)
    (tmp_path / "volumes/data").mkdir()
    with pytest.raises(TransferFailed, match="removed since"):
        trees.check(manifest("data"), ignore_volumes=False)


def test_the_root_file_system_moves_to_the_container_and_back(trees: Trees, tmp_path: Path) -> None:
    stage, root, other = tmp_path / "stage", tmp_path / "root", tmp_path / "other"
    root.mkdir()
    other.mkdir()
    trees.receive(lines(*FILE), stage, {})
    trees.settle(stage, root)
    assert (root / "x").exists()
    trees.unsettle(stage)
    trees.receive(lines({"o": "park", "p": "x", "n": 0}, {"o": "unpark", "p": "y", "n": 0}, {"o": "settle"}, {"o": "done"}), stage, {"final": True})
    assert (root / "x").exists() and not (stage / ROOTFS / "x").exists()
    trees.check(manifest(), ignore_volumes=False)
    trees.fill(stage)(other)
    assert (other / "y").exists()


def test_in_the_container_nothing_is_left_to_be_filled(trees: Trees, tmp_path: Path) -> None:
    stage, root = tmp_path / "stage", tmp_path / "root"
    root.mkdir()
    trees.receive(lines(*FILE), stage, {})
    trees.settle(stage, root)
    trees.receive(lines({"o": "delete", "p": "x"}, {"o": "done"}), stage, {"final": True})
    trees.check(manifest(), ignore_volumes=False)
    trees.fill(stage)(root)
    assert not list(root.iterdir())
