"""The store: whole or not there, whatever happens; names are data."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path

import pytest

from ckpt.archive import layout
from ckpt.errors import BusyError, NoSpace, TargetNotFound
from ckpt.host.run import PIPE, spawn
from ckpt.model import Checkpoint, Manifest
from ckpt.store import durable
from ckpt.store.catalog import Catalog

CHECKOUT = Path(__file__).resolve().parent.parent.parent


def manifest(name: str = "web") -> Manifest:
    return Manifest(id="draft", name=name, engine="fake", container_id="c0ffee", created_s=1.0)


def add(catalog: Catalog, name: str = "web") -> Checkpoint:
    draft = catalog.begin(name)
    (draft.stage / "checkpoint").mkdir()
    (draft.stage / "checkpoint" / "inventory.img").write_bytes(b"12345")
    return draft.commit(manifest(name))


def test_commit_puts_a_whole_checkpoint_in_place(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "store")
    made = add(catalog)
    assert made.ref == "web@1"
    assert made.directory.name == made.manifest.id
    assert made.directory.stat().st_mode & 0o777 == 0o700
    assert made.manifest.size_bytes == 5
    assert (made.directory / layout.MANIFEST).stat().st_mode & 0o777 == 0o600
    assert catalog.all() == [made]
    assert not list(catalog.drafts.iterdir())


def test_generations_are_never_given_twice(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    add(catalog)
    second = add(catalog)
    catalog.remove(second)
    assert add(catalog).ref == "web@3"
    (tmp_path / "generations.json").write_text('{"web": ')
    assert add(catalog).ref == "web@4"
    assert add(catalog, "db").ref == "db@1"


def test_find(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    first, second = add(catalog), add(catalog)
    assert catalog.find("web") == second
    assert catalog.find("web@latest") == second
    assert catalog.find("web@1") == first
    assert catalog.find(first.manifest.id) == first
    assert catalog.find(first.manifest.id[:12]) == first
    for wrong in (first.manifest.id[:3], "web@7", "web@", "wen", "", "@", "../web", "web@-1", "web@١"):
        with pytest.raises(TargetNotFound):
            catalog.find(wrong)
    with pytest.raises(TargetNotFound) as caught:
        catalog.find("wen")
    assert "web" in (caught.value.hint or "")
    with pytest.raises(TargetNotFound) as caught:
        catalog.find("web@9")
    assert "web@1, web@2" in (caught.value.hint or "")


def test_an_ambiguous_id_lists_what_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = iter(["abcd000000000001", "abcd000000000002"])
    catalog = Catalog(tmp_path)
    monkeypatch.setattr("ckpt.store.catalog.secrets.token_hex", lambda n: next(ids))
    add(catalog, "a")
    add(catalog, "b")
    with pytest.raises(TargetNotFound, match=r"ambiguous: abcd000000000001 \(a@1\), abcd000000000002 \(b@1\)"):
        catalog.find("abcd")


@pytest.mark.parametrize("name", ["a b", "-x", "ä", "web@2", "$(id)", "con:tainer", "a" * 200])
def test_names_are_data(tmp_path: Path, name: str) -> None:
    catalog = Catalog(tmp_path)
    made = add(catalog, name)
    assert catalog.find(name) == made
    assert catalog.find(f"{name}@1") == made
    assert {path.name for path in catalog.entries.iterdir()} == {made.manifest.id}


def test_a_broken_entry_is_named_and_harms_nobody(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    good, torn, empty = add(catalog), add(catalog), add(catalog)
    (torn.directory / layout.MANIFEST).write_bytes(b'{"schema": 1, "id"')
    (empty.directory / layout.MANIFEST).unlink()
    (catalog.entries / "a file").write_text("")
    os.symlink("/etc", catalog.entries / "link")
    listing = catalog.listing()
    assert listing.checkpoints == (good,)
    assert len(listing.broken) == 4
    assert catalog.find("web") == good
    # A manifest that was put beside another's directory.
    (empty.directory / layout.MANIFEST).write_bytes((good.directory / layout.MANIFEST).read_bytes())
    assert catalog.all() == [good]
    assert add(catalog).ref == "web@4"


def test_no_space_at_the_last_moment_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog(tmp_path)
    draft = catalog.begin("web")
    (draft.stage / "pages-1.img").write_bytes(b"x")

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(durable, "sync_file", full)
    with pytest.raises(NoSpace):
        draft.commit(manifest())
    draft.discard()
    assert catalog.all() == []
    assert list(catalog.drafts.iterdir()) == []


def test_sweep_takes_dead_drafts_only(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    living = catalog.begin("web")
    (living.stage / "half").write_text("")
    dead = catalog.begin("web")
    dead.close()
    assert catalog.sweep() == [dead.id]
    assert (living.stage / "half").exists()
    assert living.commit(manifest()).ref == "web@1"
    assert catalog.sweep() == []


def test_a_leased_checkpoint_is_not_removed(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    made = add(catalog)
    with catalog.lease(made), catalog.lease(made):
        with pytest.raises(BusyError):
            catalog.remove(made)
        assert catalog.all() == [made]
    catalog.remove(made)
    assert catalog.all() == []
    with pytest.raises(TargetNotFound):
        catalog.remove(made)
    with pytest.raises(TargetNotFound), catalog.lease(made):
        pass


_COMMIT_AND_DIE = """
import sys
sys.path.insert(0, sys.argv[1])
import os
calls = int(sys.argv[3])
def dying(real):
    def call(*args, **kwargs):
        global calls
        calls -= 1
        if calls < 0:
            os.kill(os.getpid(), 9)
        return real(*args, **kwargs)
    return call
from pathlib import Path
from ckpt.model import Manifest
from ckpt.store.catalog import Catalog
for name in ("fsync", "rename", "mkdir", "close"):
    setattr(os, name, dying(getattr(os, name)))
draft = Catalog(Path(sys.argv[2])).begin("web")
(draft.stage / "a").write_text("a")
print(draft.commit(Manifest("draft", "web", "fake", "c", 1.0)).ref, flush=True)
os._exit(0)
"""


def test_killed_at_each_system_call_the_store_holds_all_or_nothing(tmp_path: Path) -> None:
    for calls in range(60):
        root = tmp_path / str(calls)
        process = spawn([sys.executable, "-c", _COMMIT_AND_DIE, CHECKOUT, root, str(calls)], stdout=PIPE)
        out, _ = process.communicate(timeout=60)
        catalog = Catalog(root)
        listing = catalog.listing()
        assert not listing.broken
        for found in listing.checkpoints:
            assert (found.directory / "a").read_text() == "a"
        if process.returncode == 0:
            assert out == b"web@1\n"
            assert len(listing.checkpoints) == 1
            return
        catalog.sweep()
        assert not catalog.drafts.is_dir() or list(catalog.drafts.iterdir()) == []
        assert add(catalog).manifest.generation >= 1 + len(listing.checkpoints)
    raise AssertionError("it never got to its end")


def test_concurrent_commits_get_different_numbers(tmp_path: Path) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); from tests.unit.test_store_catalog import add; from ckpt.store.catalog import Catalog; "
    code += "from pathlib import Path; [print(add(Catalog(Path(sys.argv[2]))).ref) for _ in range(5)]"
    children = [spawn([sys.executable, "-c", code, CHECKOUT, tmp_path], stdout=PIPE) for _ in range(3)]
    refs = [ref for child in children for ref in child.communicate(timeout=60)[0].split()]
    assert sorted(refs) == sorted(f"web@{n}".encode() for n in range(1, 16))


def test_write_file_replaces_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    durable.write_file(path, b"1")
    durable.write_file(path, json.dumps([1]).encode())
    assert path.read_bytes() == b"[1]"
    assert [p.name for p in path.parent.iterdir()] == ["file"]
