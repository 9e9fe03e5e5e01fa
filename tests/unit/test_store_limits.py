"""The store at its limits: full disks, bounded memory, sinks that are broken off."""

from __future__ import annotations

import errno
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt.errors import DigestMismatch, NoSpace
from ckpt.host.run import PIPE, run, spawn
from ckpt.store.catalog import Catalog
from tests.unit.test_store_chunks import PAGE, PAGES, add, manifest, noise

CHECKOUT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    if os.geteuid():
        pytest.skip("mounting needs root")
    place = tmp_path / "small"
    place.mkdir()
    run(["mount", "-t", "tmpfs", "-o", "size=12m", "ckpt-test", str(place)], timeout_s=30)
    try:
        yield place
    finally:
        run(["umount", "-l", str(place)], timeout_s=30)


@pytest.mark.parametrize("plain", [False, True])
def test_a_full_disk_leaves_what_was_there(small: Path, plain: bool) -> None:
    catalog = Catalog(small / "store")
    first = add(catalog, {PAGES: noise(1000, 1), "config.dump": b"{}"})
    threads = set(threading.enumerate())
    with pytest.raises(NoSpace, match="no space left"):
        draft = catalog.begin("web")
        try:
            (draft.stage / "checkpoint").mkdir()
            if plain:
                (draft.stage / PAGES).write_bytes(noise(1200, 2))
                (small / "filler").write_bytes(noise(700, 3))  # so that not even its first pack has room
                draft.commit(manifest())
            with draft.sink(PAGES) as sink:
                for seed in range(40):
                    sink.write(noise(100, 10 + seed))
            draft.commit(manifest())
        finally:
            draft.discard()
    assert set(threading.enumerate()) <= threads
    (small / "filler").unlink(missing_ok=True)
    assert catalog.all() == [first]
    assert catalog.check(first) == []
    assert list(catalog.drafts.iterdir()) == [] and len(list(catalog.packs.iterdir())) == 1
    add(catalog, {PAGES: noise(1000, 1) + noise(100, 5)})


def test_no_room_to_unpack(small: Path, tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "store")
    made = add(catalog, {PAGES: noise(4000, 1), "checkpoint/pages-2.img": noise(50, 2)})
    threads = set(threading.enumerate())
    with pytest.raises(NoSpace, match="to unpack the checkpoint"):
        catalog.materialize(made, small / "out")
    assert set(threading.enumerate()) <= threads
    assert catalog.check(made) == []


def test_a_sink_that_is_broken_off_does_not_count(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    draft = catalog.begin("web")
    with pytest.raises(KeyboardInterrupt), draft.sink(PAGES) as sink:
        sink.write(noise(700, 1))
        raise KeyboardInterrupt
    assert draft.digests == {}
    with draft.sink(PAGES) as sink:
        sink.write(noise(10, 1))
    for closed in (sink.write, lambda data: sink.zeros(len(data))):
        with pytest.raises(ValueError, match="closed"):
            closed(b"more")
    half = draft.sink("ctr.log")
    half.write(b"never closed")
    with pytest.raises(ValueError, match="still open"):
        draft.commit(manifest())
    half.abort()
    made = draft.commit(manifest())
    with catalog.members(made) as members:
        assert [name for name in members.names() if not name.endswith("/")] == [PAGES, "artifacts/ckpt.json"][::-1]
        assert members.size_bytes(PAGES) == 10 * PAGE


def test_an_error_of_the_disk_reaches_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog = Catalog(tmp_path)
    draft = catalog.begin("web")
    sink = draft.sink(PAGES)
    real = os.pwrite

    def broken(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "pwrite", broken)
    with pytest.raises(OSError, match="broken"):
        for seed in range(200):
            sink.write(noise(200, seed))
    monkeypatch.setattr(os, "pwrite", real)
    draft.discard()
    assert catalog.collect().freed_bytes == 0 and list(catalog.drafts.iterdir()) == []


def test_damage_in_one_member_ends_the_unpacking_of_all(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "store")
    made = add(catalog, {"volumes/a.tar": noise(3000, 1), "volumes/b.tar": noise(3000, 2)})
    (pack,) = catalog.packs.iterdir()
    with pack.open("r+b") as file:
        file.seek(500 * PAGE)
        file.write(b"damage")
    with pytest.raises(DigestMismatch, match=r"volumes/a\.tar was changed or damaged"):
        catalog.materialize(made, tmp_path / "out")


_MANY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import numpy as np
from ckpt.store.catalog import Catalog
from tests.unit.test_store_chunks import PAGES, manifest
catalog = Catalog(Path(sys.argv[2]))
chance = np.random.default_rng(int(sys.argv[3]))

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

def write(blocks):
    draft = catalog.begin("web")
    with draft.sink(PAGES) as sink:
        for _ in range(blocks):
            sink.write(chance.bytes(1 << 20))
    return draft.commit(manifest())

write(48)
before = peak()
made = write(256)
catalog.materialize(made, Path(sys.argv[2], "out"))
catalog.check(made)
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_member(tmp_path: Path) -> None:
    process = spawn([sys.executable, "-c", _MANY, CHECKOUT, tmp_path, "1"], stdout=PIPE)
    out, _ = process.communicate(timeout=120)
    assert int(out) < 100 << 20, "256 MiB went through; 32 MiB of chunks are kept for reading"
