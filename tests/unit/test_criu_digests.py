"""The digest table against a plain dictionary of pages, and the rules that its callers lean on."""

from __future__ import annotations

import os
import random
import time
import tracemalloc

import pytest

from ckpt.criu.digests import BLOCK_PAGES, DigestTable, Part, Sweep, image_of_pid, image_of_shmem
from ckpt.host.procmem import PAGE

IMAGE = image_of_pid(7)
BASE = 0x7F00_0000_0000


def page(fill: int) -> bytes:
    return fill.to_bytes(8, "little") * (PAGE // 8)


def pages(*fills: int) -> memoryview:
    return memoryview(b"".join(page(fill) for fill in fills))


def test_all_is_changed_at_first_and_nothing_the_second_time() -> None:
    table = DigestTable()
    assert table.compare_and_update(IMAGE, BASE, pages(1, 2, 3)) == [Part(0, 3, True)]
    assert table.compare_and_update(IMAGE, BASE, pages(1, 2, 3)) == [Part(0, 3, False)]
    assert table.compare(IMAGE, BASE + PAGE, pages(2)) == [Part(0, 1, False)]
    assert table.known_pages == 3


def test_parts_cover_the_pages_in_order() -> None:
    table = DigestTable()
    table.compare_and_update(IMAGE, BASE, pages(1, 2, 3, 4, 5))
    changed = [Part(0, 1, False), Part(1, 2, True), Part(3, 1, False), Part(4, 2, True)]
    assert table.compare(IMAGE, BASE, pages(1, 9, 9, 4, 9, 6)) == changed
    assert table.compare_and_update(IMAGE, BASE, pages(1, 9, 9, 4, 9, 6)) == changed
    assert table.compare(IMAGE, BASE, pages(1, 9, 9, 4, 9, 6)) == [Part(0, 6, False)]
    assert table.compare(IMAGE, BASE, pages()) == [] == DigestTable().compare(IMAGE, BASE, pages())


def test_compare_alone_remembers_nothing() -> None:
    table = DigestTable()
    table.compare(IMAGE, BASE, pages(1))
    assert table.compare(IMAGE, BASE, pages(1)) == [Part(0, 1, True)]


def test_one_changed_byte_is_a_change() -> None:
    table = DigestTable()
    for at in (0, 1, PAGE // 2, PAGE - 1):
        content = bytearray(os.urandom(PAGE))
        table.compare_and_update(IMAGE, BASE, memoryview(content))
        content[at] ^= 1
        assert table.compare(IMAGE, BASE, memoryview(content)) == [Part(0, 1, True)]


def test_a_page_of_zeros_is_not_the_same_as_an_unknown_one() -> None:
    table = DigestTable()
    table.compare_and_update(IMAGE, BASE + PAGE, pages(1))  # the block is there
    assert table.compare_and_update(IMAGE, BASE, pages(0)) == [Part(0, 1, True)]
    assert table.compare(IMAGE, BASE, pages(0)) == [Part(0, 1, False)]


def test_images_are_kept_apart() -> None:
    table = DigestTable()
    table.compare_and_update(IMAGE, BASE, pages(1))
    table.compare_and_update(image_of_shmem(7), BASE, pages(2))
    assert table.compare(IMAGE, BASE, pages(1)) == [Part(0, 1, False)]
    table.drop(IMAGE)
    table.drop(IMAGE)
    assert table.compare(IMAGE, BASE, pages(1)) == [Part(0, 1, True)]
    assert table.compare(image_of_shmem(7), BASE, pages(2)) == [Part(0, 1, False)]


def test_a_table_has_its_own_seed() -> None:
    assert DigestTable().digests(pages(1)) != DigestTable().digests(pages(1))


def test_odd_sizes_and_addresses_are_refused() -> None:
    table = DigestTable()
    with pytest.raises(ValueError, match="whole pages"):
        table.compare(IMAGE, BASE, memoryview(bytes(PAGE + 1)))
    with pytest.raises(ValueError, match="address of a page"):
        table.compare(IMAGE, BASE + 1, pages(1))
    with pytest.raises(ValueError, match="address of a page"):
        table.compare_and_update(IMAGE, BASE + 1, pages(1))


def test_against_a_dictionary() -> None:
    """A thousand random updates, comparisons, forgettings over a range of some blocks."""
    chance = random.Random(4)
    table, model = DigestTable(), dict[int, int]()
    room = 4 * BLOCK_PAGES
    for _ in range(1000):
        first = chance.randrange(room)
        fills = [chance.randrange(1, 4)] * chance.randrange(1, 150) if chance.random() < 0.5 else chance.choices(range(3), k=chance.randrange(1, 40))
        vaddr = BASE + first * PAGE
        what = chance.choice(["update", "update", "compare", "forget"])
        if what == "forget":
            table.forget(IMAGE, vaddr, vaddr + len(fills) * PAGE)
            model = {at: fill for at, fill in model.items() if not first <= at < first + len(fills)}
        else:
            parts = (table.compare_and_update if what == "update" else table.compare)(IMAGE, vaddr, pages(*fills))
            assert [part.first for part in parts] == [sum(p.page_count for p in parts[:n]) for n in range(len(parts))]
            assert all(a.changed != b.changed for a, b in zip(parts, parts[1:], strict=False))
            flags = [part.changed for part in parts for _ in range(part.page_count)]
            assert flags == [model.get(first + n) != fill for n, fill in enumerate(fills)]
            if what == "update":
                model.update((first + n, fill) for n, fill in enumerate(fills))
        assert table.known_pages == len(model)


def test_forgetting_many_terabytes_is_quick_and_spares_its_neighbours() -> None:
    table = DigestTable()
    far = BASE + (64 << 40)
    for vaddr in (BASE - PAGE, BASE, far - PAGE, far):
        table.compare_and_update(IMAGE, vaddr, pages(1))
    began = time.perf_counter()
    table.forget(IMAGE, BASE, far)
    assert time.perf_counter() - began < 1
    known = [vaddr for vaddr in (BASE - PAGE, BASE, far - PAGE, far) if not table.compare(IMAGE, vaddr, pages(1))[0].changed]
    assert known == [BASE - PAGE, far]


@pytest.mark.parametrize("seed", range(20))
def test_a_sweep_forgets_what_it_did_not_meet(seed: int) -> None:
    chance = random.Random(seed)
    table = DigestTable()
    there = sorted(chance.sample(range(BLOCK_PAGES * 6), 60) + [BLOCK_PAGES * 1000])
    for at in there:
        table.compare_and_update(IMAGE, BASE + at * PAGE, pages(1))
    met = [at for at in there if chance.random() < 0.6]
    sweep = Sweep(table, IMAGE)
    for at in met:
        sweep.met(BASE + at * PAGE, 1)
    sweep.end()
    assert [at for at in there if not table.compare(IMAGE, BASE + at * PAGE, pages(1))[0].changed] == met


def test_an_unfinished_sweep_leaves_what_is_behind_it() -> None:
    table = DigestTable()
    table.compare_and_update(IMAGE, BASE, pages(1, 2, 3, 4))
    Sweep(table, IMAGE).met(BASE + PAGE, 1)
    assert table.compare(IMAGE, BASE, pages(1, 2, 3, 4)) == [Part(0, 1, True), Part(1, 3, False)]


@pytest.mark.parametrize("step", [1, 3])
def test_four_gib_take_no_more_than_thirty_mib(step: int) -> None:
    """Measured with a sixteenth of it; also when only every third page is there."""
    table, budget, tracked = DigestTable(), (30 << 20) // 16, (4 << 30) // 16 // PAGE
    digests = os.urandom(16 * 256)
    tracemalloc.start()
    try:
        if step == 1:
            for at in range(0, tracked, 256):
                table.remember(IMAGE, BASE + at * PAGE, digests)
        else:
            for at in range(0, tracked, step):
                table.remember(IMAGE, BASE + at * PAGE, digests[:16])
        assert tracemalloc.get_traced_memory()[1] < budget - (2 << 20) // 16  # 1 MiB is the buffer's
    finally:
        tracemalloc.stop()
