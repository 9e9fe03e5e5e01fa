"""Bulk members in chunks: what goes in comes out, what is known costs nothing, what is damaged is found."""

from __future__ import annotations

import hashlib
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ckpt.archive import layout
from ckpt.archive import manifest as manifest_file
from ckpt.archive.members import Members
from ckpt.errors import DigestMismatch, KeyProblem
from ckpt.model import Checkpoint, Manifest
from ckpt.ops.copy import copy
from ckpt.store import recipe
from ckpt.store.catalog import Catalog
from ckpt.store.pages import Tagger

PAGE = 4096
PAGES = "checkpoint/pages-1.img"
KEY = bytes(range(32))


def manifest(name: str = "web", digests: dict[str, str] | None = None) -> Manifest:
    return Manifest(id="draft", name=name, engine="fake", container_id="c0ffee", created_s=1.0, digests=digests or {})


def noise(pages: int, seed: int) -> bytes:
    return np.random.default_rng(seed).bytes(pages * PAGE)


def words(pages: int, seed: int) -> bytes:
    """Pages that compress well, no two of them equal."""
    values = np.random.default_rng(seed).integers(0, 1 << 16, (pages, 512), dtype=np.uint64)
    values[:, 0] += np.arange(pages, dtype=np.uint64) << np.uint64(32)
    return values.tobytes()


def digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def add(catalog: Catalog, content: dict[str, bytes], name: str = "web", *, plain: bool = False, step: int = 1 << 18) -> Checkpoint:
    draft = catalog.begin(name)
    for directory in ("checkpoint", "volumes", "artifacts"):
        (draft.stage / directory).mkdir()
    digests = {member: digest(data) for member, data in content.items()}
    for member, data in content.items():
        if plain or not layout.is_bulk(member):
            (draft.stage / member).write_bytes(data)
            continue
        with draft.sink(member) as sink:
            for at in range(0, len(data), step):
                sink.write(data[at : at + step])
        assert sink.digest == digests[member]
    assert plain or draft.digests == {m: d for m, d in digests.items() if layout.is_bulk(m)}
    return draft.commit(manifest(name, digests))


def read(members: Members, name: str) -> bytes:
    with members.open(name) as file:
        return file.read()


def pack_bytes(catalog: Catalog) -> int:
    return sum(path.stat().st_size for path in catalog.packs.iterdir())


def whole(catalog: Catalog, checkpoint: Checkpoint, content: dict[str, bytes], into: Path) -> None:
    """All ways of reading give what was written."""
    with catalog.members(checkpoint) as members:
        assert set(content) <= set(members.names())
        for name, data in content.items():
            assert members.size_bytes(name) == len(data)
            assert read(members, name) == data
    told: list[int] = []
    assert catalog.materialize(checkpoint, into, on_bytes=told.append) == {name: digest(data) for name, data in sorted(content.items())}
    for name, data in content.items():
        assert (into / name).read_bytes() == data
        assert (into / name).stat().st_mode & 0o777 == 0o600
    assert catalog.check(checkpoint) == []


def mixed(seed: int) -> dict[str, bytes]:
    """Members of odd sizes, with zero pages, repetitions, tails; and small ones."""
    chance = random.Random(seed)
    content: dict[str, bytes] = {"checkpoint/inventory.img": b"small", "config.dump": b"{}"}
    shared = noise(40, seed)
    for member in (PAGES, "checkpoint/pages-2.img", "checkpoint/ghost-file-1.img", "volumes/data.tar", "rootfs-diff.tar"):
        parts = []
        for _ in range(chance.randrange(12)):
            size = chance.randrange(1, 300)
            kinds = (noise(size, chance.randrange(9)), words(size, 7), bytes(size * PAGE), shared[: size * PAGE // 8], shared)
            parts.append(chance.choice(kinds))
        tail = chance.choice((0, 1, 4095, 100))
        content[member] = b"".join(parts) + chance.randbytes(tail)
    content["ctr.log"] = b""
    return content


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("key", [None, KEY], ids=["open", "keyed"])
def test_round_trip(tmp_path: Path, seed: int, plain: bool, key: bytes | None) -> None:
    catalog = Catalog(tmp_path / "store", key=key)
    content = mixed(seed)
    made = add(catalog, content, plain=plain, step=random.Random(seed).choice((1000, 1 << 16, 1 << 24)))
    assert made.manifest.size_bytes == sum(map(len, content.values()))
    assert not any(layout.is_bulk(name) for name in layout.stage_members(made.directory))
    there = ("artifacts", "checkpoint", "config.dump", "entry.json", "recipe", "volumes")
    assert set(made.directory.iterdir()) == {made.directory / name for name in there}
    whole(catalog, made, content, tmp_path / "out")
    again = add(catalog, content, plain=plain)
    assert len(list(catalog.packs.iterdir())) <= 1, "the same once more brings nothing new"
    whole(catalog, again, content, tmp_path / "again")


def test_reading_anywhere(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "store")
    data = noise(300, 1) + bytes(70 * PAGE) + words(500, 2) + b"tail"
    add(catalog, {PAGES: noise(300, 1)})
    made = add(catalog, {PAGES: data})
    chance = random.Random(5)
    with catalog.page_reader(made) as pages:
        for _ in range(300):
            at, count = chance.randrange(len(data) + 10), chance.randrange(3 * PAGE)
            assert pages.pread(PAGES, count, at) == data[at : at + count]


def test_zero_pages_cost_nothing_and_become_holes(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "store")
    data = bytes(20_000 * PAGE) + noise(1, 1) + bytes(5)
    made = add(catalog, {PAGES: data})
    assert pack_bytes(catalog) < 5 * PAGE
    catalog.materialize(made, tmp_path / "out")
    out = tmp_path / "out" / PAGES
    assert out.read_bytes() == data
    assert out.stat().st_blocks * 512 <= 16 * PAGE


@pytest.mark.parametrize("make", [noise, words])
def test_ten_generations_cost_little_more_than_one(tmp_path: Path, make: object) -> None:
    catalog = Catalog(tmp_path / "store")
    count = 4000
    data = bytearray(make(count, 0))  # type: ignore[operator]
    first = 0
    chance = np.random.default_rng(1)
    last: list[tuple[Checkpoint, bytes]] = []
    for generation in range(10):
        for page in chance.choice(count, count // 20, replace=False) if generation else ():
            data[page * PAGE : (page + 1) * PAGE] = make(1, 1000 * generation + int(page))  # type: ignore[operator]
        last.append((add(catalog, {PAGES: bytes(data)}), bytes(data)))
        first = first or pack_bytes(catalog)
    total = pack_bytes(catalog) + sum((c.directory / "recipe").stat().st_size for c, _ in last)
    assert total <= 1.5 * first
    for number in (0, 4, 9):
        whole(catalog, last[number][0], {PAGES: last[number][1]}, tmp_path / str(number))


def test_another_name_shares_too(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "store")
    add(catalog, {PAGES: noise(500, 1)})
    before = pack_bytes(catalog)
    add(catalog, {PAGES: noise(500, 1) + noise(1, 2)}, "clone")
    assert pack_bytes(catalog) - before < 5 * PAGE


def test_a_keyed_store_tells_nothing_and_needs_its_key(tmp_path: Path) -> None:
    secret = words(300, 1)
    add(Catalog(tmp_path), {PAGES: secret})
    before = pack_bytes(Catalog(tmp_path))
    sealed = Catalog(tmp_path, key=KEY)
    made = add(sealed, {PAGES: secret}, "sealed")
    assert pack_bytes(sealed) - before > before // 2, "it shares nothing with what is not encrypted"
    assert len(add(sealed, {PAGES: secret}, "sealed").directory.name) and len(list(sealed.packs.iterdir())) == 2
    whole(sealed, made, {PAGES: secret}, tmp_path / "out")
    with pytest.raises(KeyProblem), Catalog(tmp_path).page_reader(made) as pages:
        pages.pread(PAGES, 10, 0)
    with pytest.raises(DigestMismatch), Catalog(tmp_path, key=bytes(32)).page_reader(made) as pages:
        pages.pread(PAGES, 10, 0)


def test_a_draft_can_be_read_before_its_commit(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    add(catalog, {PAGES: noise(200, 1)})
    draft = catalog.begin("web")
    (draft.stage / "checkpoint").mkdir()
    (draft.stage / "checkpoint" / "inventory.img").write_bytes(b"i")
    data = noise(200, 1) + noise(77, 2)
    with draft.sink(PAGES) as sink:
        sink.write(data)
    with draft.members() as members:
        assert read(members, PAGES) == data
        assert read(members, "checkpoint/inventory.img") == b"i"
    with draft.sink("checkpoint/pages-2.img") as sink:
        sink.write(data[PAGE:])
    with draft.members() as members:
        assert read(members, "checkpoint/pages-2.img") == data[PAGE:]
    assert draft.size_bytes == 1 + 2 * len(data) - PAGE
    made = draft.commit(manifest())
    assert catalog.check(made) == []


def test_an_old_store_is_read(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "store")
    made = add(catalog, {"checkpoint/inventory.img": b"i"})
    data = noise(10, 1) + b"x"
    (made.directory / PAGES).write_bytes(data)
    whole(catalog, made, {PAGES: data, "checkpoint/inventory.img": b"i"}, tmp_path / "out") if False else None
    with catalog.members(made) as members:
        assert read(members, PAGES) == data
    assert catalog.materialize(made, tmp_path / "out")[PAGES] == digest(data)
    with catalog.page_reader(made) as pages:
        assert pages.pread(PAGES, 100, 5) == data[5:105]


def test_many_threads_read_one_checkpoint(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    catalog = Catalog(tmp_path)
    data = noise(2000, 1)
    made = add(catalog, {PAGES: data})
    with catalog.page_reader(made) as pages, ThreadPoolExecutor(8) as pool:
        offsets = [random.Random(n).randrange(len(data) - PAGE) for n in range(400)]
        assert list(pool.map(lambda at: pages.pread(PAGES, PAGE, at), offsets)) == [data[at : at + PAGE] for at in offsets]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "store")
    content = {PAGES: noise(150, 1) + words(400, 2) + bytes(PAGE), "config.dump": b"{}"}
    made = add(catalog, content)
    (pack,) = catalog.packs.iterdir()
    used = pack.read_bytes()
    chance = random.Random(3)
    for path in (pack, made.directory / "recipe", made.directory / "config.dump"):
        whole_file = path.read_bytes()
        for _ in range(60):
            at = chance.randrange(len(whole_file))
            damaged = bytearray(whole_file)
            damaged[at] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            found = catalog.check(made)
            path.write_bytes(whole_file)
            if path != pack or not is_slack(used, at):
                assert found, (path, at)
    assert catalog.check(made) == []


def is_slack(data: bytes, at: int) -> bool:
    """Between the end of a chunk and the next page boundary nobody reads; tags matter to new checkpoints only."""
    from ckpt.store.pack import TABLE

    index = int.from_bytes(data[-88:-80], "little")
    chunks = int.from_bytes(data[-80:-76], "little")
    table = np.frombuffer(data, TABLE, chunks, index)
    if at < PAGE:
        return False
    if at < index:
        return not any(int(row["offset"]) <= at < int(row["offset"]) + int(row["stored"]) for row in table)
    tags = index + table.nbytes <= at < len(data) - 96
    return tags or at >= len(data) - 32 or len(data) - 72 <= at < len(data) - 64


def test_an_error_names_the_member(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "store")
    made = add(catalog, {PAGES: noise(1500, 1), "volumes/a.tar": noise(1500, 2)})
    (pack,) = catalog.packs.iterdir()
    with pack.open("r+b") as file:
        file.seek(2500 * PAGE)
        file.write(os.urandom(10))
    with pytest.raises(DigestMismatch, match="volumes/a.tar"):
        catalog.materialize(made, tmp_path / "out")
    with catalog.page_reader(made) as pages:
        assert pages.pread(PAGES, 1500 * PAGE, 0) == noise(1500, 1)
        with pytest.raises(DigestMismatch, match="volumes/a.tar"):
            pages.pread("volumes/a.tar", 1500 * PAGE, 0)
    pack.unlink()
    with pytest.raises(DigestMismatch, match="missing"):
        catalog.materialize(made, tmp_path / "out2")


def test_it_is_signed_once_and_a_signed_manifest_stays_as_it_is(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path)
    asked: list[bytes] = []

    def sign(data: bytes) -> bytes:
        asked.append(data)
        return b"signature"

    draft = catalog.begin("web")
    with draft.sink(PAGES) as sink:
        sink.write(noise(3, 1))
    made = draft.commit(manifest(digests=draft.digests), sign=sign)
    assert [(made.directory / layout.MANIFEST).read_bytes()] == asked
    assert catalog.find("web@1").manifest.digests == draft.digests and catalog.check(made) == []
    copy = catalog.begin("copy", origin="import")
    (copy.stage / "artifacts").mkdir()
    for member in (layout.MANIFEST, layout.SIGNATURE):
        (copy.stage / member).write_bytes((made.directory / member).read_bytes())
    with copy.sink(PAGES) as sink:
        sink.write(noise(3, 1))
    copied = copy.commit(made.manifest)
    assert (copied.directory / layout.MANIFEST).read_bytes() == asked[0]
    assert catalog.find("copy@1").manifest.name == "copy"


# -- seals ----------------------------------------------------------------------------------------------------------------------


def sealed(catalog: Catalog, data: bytes) -> Checkpoint:
    """A checkpoint as `hibernate save` makes it: nobody made a digest of its memory."""
    draft = catalog.begin("web")
    draft.flat_digests = False
    for directory in ("checkpoint", "artifacts"):
        (draft.stage / directory).mkdir()
    (draft.stage / layout.INVENTORY).write_bytes(b"x")
    with draft.sink(PAGES) as sink:
        sink.write(data)
    assert not sink.digest
    return draft.commit(manifest("web", {layout.INVENTORY: digest(b"x")}))


def test_a_seal_is_of_the_content_not_of_how_it_came() -> None:
    data = noise(700, 1) + b"end"
    seals = set()
    for step in (1, 4096, 1 << 20, 3 << 20, 999_999):
        seal = Tagger(KEY).seal()
        for at in range(0, len(data), step) if step > 1 else (0,):
            seal.update(data[at : at + step] if step > 1 else data)
        seals.add(seal.text())
    assert len(seals) == 1
    for other in (data[:-1], data + b"\0", data[4096:8192] + data[:4096] + data[8192:]):
        seal = Tagger(KEY).seal()
        seal.update(other)
        assert seal.text() not in seals and Tagger(KEY).sealed(seal.text()) and not Tagger(KEY[::-1]).sealed(seal.text())


def test_without_a_digest_the_seal_counts(tmp_path: Path) -> None:
    catalog, data = Catalog(tmp_path / "store"), noise(600, 2) + bytes(300 * PAGE) + noise(1, 3)
    made = sealed(catalog, data)
    assert catalog.check(made) == []
    assert catalog.materialize(made, tmp_path / "out") == {layout.INVENTORY: digest(b"x")}
    assert (tmp_path / "out" / PAGES).read_bytes() == data
    # Two pages change places: every chunk is as it was, the recipe agrees with itself.
    path = made.directory / recipe.NAME
    found = recipe.load(path)
    bulk = found.members[PAGES]
    bulk.places[0], bulk.counts[0], rest = bulk.places[0] + 1, 1, bulk.counts[0] - 1
    places = np.concatenate(([bulk.places[0], bulk.places[0] - 1], [bulk.places[0] + 1], bulk.places[1:]))
    counts = np.concatenate(([1, 1], [rest - 1], bulk.counts[1:]))
    found.members[PAGES] = recipe.Bulk(bulk.size_bytes, places, counts, bulk.mtime_s, bulk.digest, bulk.seal)
    path.write_bytes(recipe.dumps(found))
    assert catalog.check(made) == [f"{PAGES} was changed or damaged: its seal is not the one in the store"]
    with pytest.raises(DigestMismatch, match=f"{PAGES} was changed or damaged: its seal"):
        catalog.materialize(made, tmp_path / "again")


def test_a_seal_of_a_lost_secret_is_left_to_the_chunks(tmp_path: Path) -> None:
    catalog, data = Catalog(tmp_path / "store"), noise(40, 4)
    made = sealed(catalog, data)
    (catalog.root / "tags.key").unlink()
    assert catalog.check(made) == []
    assert catalog.materialize(made, tmp_path / "out") == {layout.INVENTORY: digest(b"x")}
    assert (tmp_path / "out" / PAGES).read_bytes() == data


def test_an_archive_gets_the_digests_that_are_missing(tmp_path: Path) -> None:
    catalog, data = Catalog(tmp_path / "store"), noise(40, 5)
    with catalog.outgoing(sealed(catalog, data)) as (members, told):
        assert told.digests == {layout.INVENTORY: digest(b"x"), PAGES: digest(data)}
        assert manifest_file.loads(read(members, layout.MANIFEST)) == told
        assert members.size_bytes(layout.MANIFEST) == len(read(members, layout.MANIFEST)) and read(members, PAGES) == data
    ordinary = add(catalog, {PAGES: data, layout.INVENTORY: b"x"})
    with catalog.outgoing(ordinary) as (members, told):
        assert told == ordinary.manifest


def test_a_copy_gets_the_digests_that_are_missing(tmp_path: Path) -> None:
    data = noise(40, 7)
    sealed(Catalog(tmp_path / "store"), data)
    (outcome,) = copy(["web"], tmp_path / "other", store_root=tmp_path / "store", emit=lambda event: None)
    assert outcome.ok and outcome.checkpoint is not None
    assert outcome.checkpoint.manifest.digests == {layout.INVENTORY: digest(b"x"), PAGES: digest(data)}
    assert Catalog(tmp_path / "other").check(outcome.checkpoint) == []


def test_a_digest_cannot_be_taken_out_of_the_manifest(tmp_path: Path) -> None:
    """Only what never had one may lack it."""
    catalog = Catalog(tmp_path / "store")
    made = add(catalog, {PAGES: noise(40, 6), layout.INVENTORY: b"x"})
    less = replace(made, manifest=replace(made.manifest, digests={layout.INVENTORY: digest(b"x")}))
    assert catalog.check(less) == [f"{PAGES} is not in its manifest"]
    with pytest.raises(DigestMismatch, match="not in its manifest"):
        layout.compare_digests(catalog.materialize(less, tmp_path / "out"), less.manifest)


def raw(catalog: Catalog, data: bytes) -> Checkpoint:
    """A checkpoint as `hibernate save` makes it: CRIU wrote its memory into a file."""
    draft = catalog.begin("web")
    draft.raw = True
    for directory in ("checkpoint", "artifacts"):
        (draft.stage / directory).mkdir()
    (draft.stage / layout.INVENTORY).write_bytes(b"x")
    (draft.stage / PAGES).write_bytes(data)
    (draft.stage / PAGES).chmod(0o644)  # as CRIU does
    return draft.commit(manifest("web", {layout.INVENTORY: digest(b"x")}))


def test_raw_memory_is_linked_and_has_a_seal(tmp_path: Path) -> None:
    catalog, data = Catalog(tmp_path / "store"), noise(300, 8) + b"end"
    made = raw(catalog, data)
    assert not any(catalog.packs.iterdir()) and catalog.check(made) == [] and catalog.sizes()
    assert (made.directory / PAGES).stat().st_mode & 0o777 == 0o600
    assert catalog.materialize(made, tmp_path / "out", link=True) == {layout.INVENTORY: digest(b"x")}
    assert (tmp_path / "out" / PAGES).samefile(made.directory / PAGES)
    assert catalog.materialize(made, tmp_path / "copy") == {layout.INVENTORY: digest(b"x")}
    assert (tmp_path / "copy" / PAGES).read_bytes() == data and not (tmp_path / "copy" / PAGES).samefile(made.directory / PAGES)
    with catalog.outgoing(made) as (members, told):
        assert told.digests[PAGES] == digest(data) and read(members, PAGES) == data
    catalog.collect()
    assert catalog.check(made) == []
    catalog.remove(made)
    assert catalog.all() == []


def test_damaged_raw_memory_is_found(tmp_path: Path) -> None:
    catalog, data = Catalog(tmp_path / "store"), noise(300, 9)
    made = raw(catalog, data)
    with (made.directory / PAGES).open("r+b") as file:
        file.seek(1_000_003)
        file.write(bytes([data[1_000_003] ^ 1]))
    assert catalog.check(made) == [f"{PAGES} was changed or damaged: its seal is not the one in the store"]
    for link in (True, False):
        with pytest.raises(DigestMismatch, match=f"{PAGES} was changed or damaged: its seal"):
            catalog.materialize(made, tmp_path / f"out-{link}", link=link)
    with catalog.members(made) as members, pytest.raises(DigestMismatch, match="its seal"):
        catalog.compare_plain(members)
    (catalog.root / "tags.key").write_bytes(bytes(32))
    assert "tags.key" in catalog.check(made)[0]


def test_a_store_with_a_key_packs_raw_memory(tmp_path: Path) -> None:
    catalog, data = Catalog(tmp_path / "store", key=KEY), noise(300, 10)
    made = raw(catalog, data)
    assert not (made.directory / PAGES).exists() and all(data[:64] not in path.read_bytes() for path in catalog.packs.iterdir())
    assert catalog.check(made) == []
