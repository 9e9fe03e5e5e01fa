"""Every archive of the corpus is refused: one error of the right kind, nothing made, nothing outside touched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ckpt.archive import rootfs
from ckpt.archive.wants import Profile, Seccomp
from ckpt.criu.bindings import load
from ckpt.engines import registry
from ckpt.errors import CkptError, FeatureMissing, RestoreFailed
from ckpt.model import Capabilities, RestoreOptions
from ckpt.ops.import_ import import_
from ckpt.ops.restore import restore
from ckpt.store.catalog import Catalog
from ckpt.transports.base import Location

try:
    load("images.magic")
except FeatureMissing:
    pytest.skip("pycriu is not installed", allow_module_level=True)

from tests.corpus import inner, tars
from tests.corpus.all import ALL
from tests.corpus.attack import Attack
from tests.corpus.base import pack

OUTSIDE = Path("/tmp/ckpt-corpus-evil")
HERE = Profile(seccomp=Seccomp(frozenset({"read", "write"})))


class NoEngine:
    """Stands in for podman: usable, and never to be asked to restore."""

    name, prefixes = "podman", ("podman",)
    asked = 0

    def probe(self) -> Capabilities:
        return Capabilities(True, hold=True, clone=True, volumes=True)

    def find(self, name: str) -> list[Any]:
        return []

    def profile(self) -> Profile:
        return HERE

    def volume_names(self) -> list[str]:
        return ["victim"]

    def restore(self, *_: object, **__: object) -> Any:
        type(self).asked += 1
        raise RestoreFailed("the engine was asked to restore it")


def snapshot(*roots: Path) -> list[tuple[str, int, int, bytes]]:
    """Everything below the roots: names, modes, times, content."""
    found = []
    for root in roots:
        for path in sorted([root, *root.rglob("*")]):
            if {"locks", "jobs", "history", "tags.key"} & set(path.parts):  # what a store makes for itself
                continue
            facts = path.lstat()
            kept = not (path.is_dir() and "store" in path.parts) and path.name != "lock"  # a draft came and went there
            data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            found.append((str(path), facts.st_mode, facts.st_mtime_ns if kept else 0, data))
    return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store with nothing in it, and a canary beside it."""
    NoEngine.asked = 0
    monkeypatch.setattr(registry, "by_name", lambda name: NoEngine())
    canary = tmp_path / "canary"
    canary.mkdir()
    (canary / "canary").write_text("alive")
    (canary / "victim").mkdir()
    Catalog(tmp_path / "store").begin("x").discard()
    (tmp_path / "archives").mkdir()
    return tmp_path


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def refused(error: CkptError | None, attack: Attack) -> None:
    assert error is not None, "it was taken"
    assert error.exit_code in attack.codes, (error.exit_code, error.message)
    shown = error.message + (error.where or "") + (error.hint or "") + str(getattr(error, "wants", ""))
    assert shown.isprintable() and len(error.message) < 1000, shown


@pytest.mark.parametrize("attack", [a for a in ALL if a.at != "apply"], ids=lambda a: a.name)
@pytest.mark.timeout(60)
def test_it_is_refused(attack: Attack, world: Path) -> None:
    data = attack.build()
    assert isinstance(data, bytes)
    file = world / "archives/a.tar"
    file.write_bytes(data)
    store, before, running = world / "store", snapshot(world), children()
    error: CkptError | None = None
    (outcome,) = restore([], import_from=Location.of(file), options=RestoreOptions(), store_root=store, emit=lambda event: None)
    refused(outcome.error, attack)
    assert NoEngine.asked == 0
    assert snapshot(world) == before
    if attack.at == "import":
        try:
            import_(Location.of(file), store_root=store, emit=lambda event: None)
        except CkptError as caught:
            error = caught
        refused(error, attack)
        assert snapshot(world) == before
    assert children() == running
    assert not OUTSIDE.exists()


@pytest.mark.parametrize("attack", [a for a in ALL if a.at == "apply"], ids=lambda a: a.name)
@pytest.mark.timeout(60)
@pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root")
def test_what_is_inside_is_refused(attack: Attack, world: Path) -> None:
    built = attack.build()
    assert isinstance(built, tuple)
    root = world / "root"
    root.mkdir()
    (world / "archives/diff.tar").write_bytes(built[0])
    (world / "archives/deleted").write_bytes(built[1])
    outside = (world / "canary", world / "archives")
    before = snapshot(*outside)
    with pytest.raises(CkptError) as caught:
        rootfs.apply(world / "archives/diff.tar" if built[0] else None, world / "archives/deleted", root, timeout_s=20)
    refused(caught.value, attack)
    assert snapshot(*outside) == before


@pytest.mark.parametrize("name", inner.HARMLESS)
@pytest.mark.skipif(os.geteuid() != 0, reason="chroot needs root")
def test_what_is_inside_stays_inside(name: str, world: Path) -> None:
    root = world / "root"
    root.mkdir()
    parts = []
    for head, data in inner.HARMLESS[name]:
        where = str(world / "canary")
        if isinstance(head, str):
            head = head.replace("{outside}", where.lstrip("/"))
        else:
            head.linkname = head.linkname.replace("{outside}", where)
        parts.append((head, data))
    (world / "archives/diff.tar").write_bytes(pack(*parts))
    before = snapshot(world / "canary", world / "archives")
    try:
        rootfs.apply(world / "archives/diff.tar", None, root, timeout_s=20)
    except CkptError:
        pass
    assert snapshot(world / "canary", world / "archives") == before
    for path in root.rglob("*"):
        assert not [key for key in os.listxattr(path, follow_symlinks=False) if key.startswith("trusted.")]


def test_the_honest_one_is_taken(world: Path) -> None:
    """Else all of the above would prove nothing."""
    file = world / "archives/a.tar"
    file.write_bytes(tars.honest())
    assert import_(Location.of(file), store_root=world / "store", emit=lambda event: None).ok
    (outcome,) = restore(["web"], options=RestoreOptions(), store_root=world / "store", emit=lambda event: None)
    assert NoEngine.asked == 1 and not outcome.ok


def test_there_are_enough() -> None:
    assert len(ALL) >= 200
    for cve in ("53489", "50195", "53492", "94603", "92574", "8676", "27977", "4517", "7774"):
        assert any(cve in attack.stands_for for attack in ALL), cve
