"""Garbage collection: what is needed stays, whatever dies or runs beside it; what is not needed goes."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ckpt.errors import BusyError, ConfigError, DigestMismatch
from ckpt.host.run import PIPE, spawn
from ckpt.model import Checkpoint
from ckpt.store import collect, locks
from ckpt.store.catalog import Catalog
from ckpt.store.collect import Collected
from ckpt.store.dead import load_dead
from ckpt.store.pack import read_table
from tests.unit.test_store_chunks import PAGE, PAGES, add, manifest, noise

CHECKOUT = Path(__file__).resolve().parent.parent.parent
PAGES_A_GENERATION = 600


def content(generation: int) -> bytes:
    """Of generation n a third of the pages is new, the same third of all generations; the rest is as in the first."""
    base = bytearray(noise(PAGES_A_GENERATION, 0))
    part = PAGES_A_GENERATION // 3
    base[part * PAGE : 2 * part * PAGE] = noise(part, generation)
    return bytes(base)


def generations(catalog: Catalog, count: int, name: str = "web") -> list[Checkpoint]:
    return [add(catalog, {PAGES: content(n), "config.dump": b"{}"}, name) for n in range(1, count + 1)]


def disk_bytes(catalog: Catalog) -> int:
    return sum(path.stat().st_blocks * 512 for path in catalog.packs.iterdir())


def exact(catalog: Catalog) -> None:
    """After a collection: every checkpoint is whole, and the packs hold what they need and nothing else."""
    assert not catalog.listing().broken
    for checkpoint in catalog.all():
        assert catalog.check(checkpoint) == []
    assert catalog.collect() == Collected()
    needs: dict[str, set[int]] = {}
    for checkpoint in catalog.all():
        for pack, chunks in catalog.recipe(checkpoint).chunks().items():
            needs.setdefault(pack, set()).update(chunks.tolist())
    assert {path.stem for path in catalog.packs.glob("*.pack")} == set(needs)
    for pack, wanted in needs.items():
        path = catalog.packs / f"{pack}.pack"
        table = read_table(path)
        dead = set(range(len(table))) - wanted
        assert set(load_dead(catalog.packs, pack, len(table)).tolist()) == dead
        with path.open("rb") as file:
            for number in range(len(table)):
                file.seek(int(table[number]["offset"]))
                assert any(file.read(int(table[number]["stored"]))) == (number in wanted)
    assert {path.name for path in catalog.locks.iterdir()} <= {c.manifest.id for c in catalog.all()}
    assert list(catalog.drafts.iterdir()) == []


def test_what_nobody_needs_goes(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    first, second, third = generations(catalog, 3)
    before = disk_bytes(catalog)
    assert catalog.collect() == Collected()
    catalog.remove(second)
    assert before - disk_bytes(catalog) >= 200 * PAGE, "its own third"
    exact(catalog)
    catalog.remove(first)
    exact(catalog)
    assert catalog.sizes()[third.manifest.id][2] == 0
    with catalog.page_reader(third) as pages:
        assert pages.pread(PAGES, PAGES_A_GENERATION * PAGE, 0) == content(3)
    catalog.remove(third)
    assert list(catalog.packs.iterdir()) == []


def test_nothing_is_deduplicated_against_what_is_gone(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    first, _ = generations(catalog, 2)
    catalog.remove(first)
    again = add(catalog, {PAGES: content(1)})
    assert catalog.check(again) == []
    with catalog.page_reader(again) as pages:
        assert pages.pread(PAGES, PAGES_A_GENERATION * PAGE, 0) == content(1)
    exact(catalog)


def test_a_dry_run_says_and_touches_nothing(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    first, second = generations(catalog, 2)
    shutil.rmtree(second.directory)
    before = {path: path.read_bytes() for path in catalog.packs.iterdir()}
    said = catalog.collect(dry_run=True)
    assert said.packs == 1 and said.freed_bytes >= 200 * PAGE
    assert {path: path.read_bytes() for path in catalog.packs.iterdir()} == before
    assert catalog.collect() == said
    exact(catalog)
    assert catalog.all() == [first]


def test_where_no_hole_can_be_punched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(collect, "_punch_hole", no)
    catalog = Catalog(tmp_path)
    first, second = generations(catalog, 2)
    before = disk_bytes(catalog)
    with catalog.page_reader(second) as reading:
        reading.pread(PAGES, 10, 0)
        catalog.remove(first)
        assert reading.pread(PAGES, PAGES_A_GENERATION * PAGE, 0) == content(2)
    assert before - disk_bytes(catalog) >= 100 * PAGE
    exact(catalog)


def test_a_living_draft_keeps_what_it_refers_to(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    (first,) = generations(catalog, 1)
    draft = catalog.begin("web")
    (draft.stage / "checkpoint").mkdir()
    draft.prepare()
    catalog.remove(first)
    assert catalog.collect().claimed == 1
    with draft.sink(PAGES) as sink:
        sink.write(content(1))
    made = draft.commit(manifest())
    assert len(list(catalog.packs.iterdir())) == 1, "nothing new was written"
    assert catalog.check(made) == []
    exact(catalog)


def test_a_dead_draft_keeps_nothing(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    (first,) = generations(catalog, 1)
    draft = catalog.begin("web")
    draft.prepare()
    catalog.remove(first)
    draft.close()
    assert catalog.collect().packs == 1
    exact(catalog)


def test_while_a_recipe_cannot_be_read_nothing_goes(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    first, second = generations(catalog, 2)
    recipe = second.directory / "recipe"
    good = recipe.read_bytes()
    recipe.write_bytes(good[:-1] + b"?")
    before = disk_bytes(catalog)
    catalog.remove(first)
    assert disk_bytes(catalog) == before
    assert second.manifest.id in catalog.collect().problems[0]
    recipe.write_bytes(good)
    exact_after = catalog.collect()
    assert exact_after.freed_bytes and not exact_after.problems
    exact(catalog)


def test_sizes_tell_what_a_removal_gives_back(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    made = generations(catalog, 3)
    sizes = catalog.sizes()
    for checkpoint in made:
        logical, unique, shared = sizes[checkpoint.manifest.id]
        assert logical == checkpoint.manifest.size_bytes == PAGES_A_GENERATION * PAGE + 2
        assert shared >= 350 * PAGE
        before = disk_bytes(catalog)
        shutil.copytree(tmp_path, tmp_path.with_name("copy"), dirs_exist_ok=False)
        copy = Catalog(tmp_path.with_name("copy"))
        copy.remove(copy.find(checkpoint.manifest.id))
        freed = before - disk_bytes(copy)
        assert abs(freed - unique) <= 24 * PAGE
        shutil.rmtree(copy.root)


DYING = ("fsync", "rename", "mkdir", "close", "unlink", "pwrite", "open", "rmdir")


def die_at(number: int) -> None:
    """From now on the process is killed at the `number`th of these system calls, by whatever thread."""
    calls = itertools.count()

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in DYING:
        setattr(os, name, dying(getattr(os, name)))
    real_punch = collect._punch_hole
    collect._punch_hole = dying(real_punch)


def life(root: Path) -> None:
    """A day of a store: a new checkpoint, old ones go."""
    catalog = Catalog(root)
    add(catalog, {PAGES: content(4), "volumes/a.tar": noise(20, 77), "config.dump": b"{}"})
    catalog.remove(catalog.find("web@1"))
    add(catalog, {PAGES: content(5), "config.dump": b"{}"}, plain=True)
    catalog.remove(catalog.find("web@2"))
    catalog.collect()


def test_killed_at_any_moment_nothing_is_lost_and_nothing_stays(tmp_path: Path) -> None:
    prepared = tmp_path / "prepared"
    generations(Catalog(prepared), 3)
    step = 11
    for number in range(0, 3000, step):
        root = tmp_path / str(number)
        shutil.copytree(prepared, root)
        if (child := os.fork()) == 0:
            try:
                die_at(number)
                life(root)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        catalog = Catalog(root)
        there = {c.ref: c for c in catalog.all()}
        assert "web@3" in there
        assert not catalog.listing().broken
        for ref, checkpoint in there.items():
            assert catalog.check(checkpoint) == []
            with catalog.page_reader(checkpoint) as pages:
                assert pages.pread(PAGES, PAGES_A_GENERATION * PAGE, 0) == content(int(ref.partition("@")[2]))
        if number % 2:
            catalog.sweep()  # every operation begins with it
        else:
            catalog.collect()
        exact(catalog)
        shutil.rmtree(root)
        if os.WIFEXITED(status):
            assert set(there) == {"web@3", "web@4", "web@5"}
            assert number > 100
            return
    raise AssertionError("it never came to its end")


_WRITER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from ckpt.store.catalog import Catalog
from tests.unit.test_store_collect import content, add, PAGES
catalog = Catalog(Path(sys.argv[2]))
for number in range(int(sys.argv[4])):
    made = add(catalog, {PAGES: content(number % 4), "config.dump": b"{}"}, sys.argv[3])
    if number % 2:
        catalog.remove(made)
"""


def test_a_collection_beside_writers(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    keep = generations(catalog, 2, "keep")
    # Two drafts of one name at a time, as well.
    writers = [spawn([sys.executable, "-c", _WRITER, CHECKOUT, tmp_path, "web", "12"], stdout=PIPE, stderr=PIPE) for _ in range(2)]
    runs = 0
    while any(writer.poll() is None for writer in writers):
        assert catalog.collect().problems == ()
        for checkpoint in catalog.all()[:1]:
            try:
                with catalog.lease(checkpoint):
                    assert catalog.check(checkpoint) == []
            except Exception as error:
                assert "no longer" in str(error)
        runs += 1
    for writer in writers:
        out, said = writer.communicate(timeout=60)
        assert writer.returncode == 0, said
    assert runs > 2
    assert len(catalog.all()) == 2 + 12
    assert {c.manifest.id for c in keep} <= {c.manifest.id for c in catalog.all()}
    catalog.collect()
    exact(catalog)


def test_locks_are_on_files_that_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS: LOCK_EX needs a descriptor that may write, LOCK_SH one that may read; directories cannot be locked."""
    real = fcntl.flock

    def nfs(fd: int, how: int) -> None:
        mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
        if (how & fcntl.LOCK_EX and mode == os.O_RDONLY) or (how & fcntl.LOCK_SH and mode == os.O_WRONLY) or os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EBADF, "as NFS says")
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", nfs)
    catalog = Catalog(tmp_path)
    (made,) = generations(catalog, 1)
    for directory in (catalog.entries, catalog.drafts, catalog.packs, catalog.locks):
        (directory / ".nfs00000000001a2b3c00000001").write_text("removed, but open somewhere")
    with catalog.lease(made), pytest.raises(BusyError):
        catalog.remove(made)
    assert catalog.listing().checkpoints == (made,) and not catalog.listing().broken
    assert catalog.sweep() == [] and catalog.collect() == Collected()
    catalog.remove(made)
    assert catalog.all() == []


def test_a_stale_handle_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter((OSError(errno.ESTALE, "stale"), ["b", ".nfs1", "a"], FileNotFoundError(), OSError(errno.EIO, "broken")))

    def listdir(path: object) -> list[str]:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(os, "listdir", listdir)
    assert locks.listing(tmp_path) == ["a", "b"]
    assert locks.listing(tmp_path) == []
    with pytest.raises(OSError, match="broken"):
        locks.listing(tmp_path)


def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    generations(catalog, 1)
    assert json.loads((tmp_path / "store.json").read_text()) == {"schema": 2}
    (tmp_path / "store.json").write_text('{"schema": 3}')
    for call in (catalog.all, lambda: catalog.begin("x"), catalog.collect):
        with pytest.raises(ConfigError, match="newer ckpt"):
            call()


def test_what_a_sink_wrote_is_what_the_manifest_says(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    draft = catalog.begin("web")
    with draft.sink(PAGES) as sink:
        sink.write(noise(3, 1))
    with pytest.raises(DigestMismatch, match=PAGES):
        draft.commit(manifest(digests={PAGES: "sha256:" + "0" * 64}))
    draft.discard()
    assert catalog.all() == [] and list(catalog.packs.iterdir()) == []


def test_dirty_pages_all_over_are_collected_in_the_end(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    data = np.frombuffer(noise(2000, 0), np.uint8).reshape(-1, PAGE).copy()
    chance = np.random.default_rng(3)
    first = 0
    for generation in range(35):
        dirty = chance.choice(2000, 200, replace=False)
        data[dirty] = np.frombuffer(noise(200, 100 + generation), np.uint8).reshape(-1, PAGE)
        made = add(catalog, {PAGES: data.tobytes()})
        first = first or disk_bytes(catalog)
        for old in catalog.all()[:-2]:
            catalog.remove(old)
    assert catalog.check(made) == []
    assert disk_bytes(catalog) <= 3 * first, "two checkpoints are kept"
