"""The stream of page records, and the images that are made of it; damaged and hostile streams are refused."""

from __future__ import annotations

import os
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from ckpt.criu import pagestream
from ckpt.criu.bindings import load
from ckpt.criu.pagestream import FIRST_PAGES_ID, HEADER, PE_LAZY, PE_PARENT, PE_PRESENT, Kind, PageWriter, record
from ckpt.errors import FeatureMissing, TransferFailed

try:
    magics = load("images.magic").by_name
except FeatureMissing:
    pytest.skip("pycriu is not installed", allow_module_level=True)

PAGE = 4096
PID, SHMEM = 12 << 8 | 1, 3 << 8 | 2
Entry = tuple[int, int, int]


def read_pagemap(path: Path) -> tuple[int, list[Entry]]:
    """The id of the pages file, and the entries as (vaddr, pages, flags), as CRIU reads them (pagemap.c, init_compat_pagemap_entry)."""
    data = path.read_bytes()
    assert struct.unpack_from("<II", data) == (magics["IMG_COMMON"], magics["PAGEMAP"])
    pb: Any = load("images.pagemap_pb2")
    at, head, entries = 8, None, []
    while at < len(data):
        size = struct.unpack_from("<I", data, at)[0]
        body = data[at + 4 : at + 4 + size]
        assert len(body) == size
        at += 4 + size
        if head is None:
            head = pb.pagemap_head.FromString(body)
            continue
        entry = pb.pagemap_entry.FromString(body)
        pages = entry.nr_pages
        if hasattr(entry, "compat_nr_pages"):
            assert entry.compat_nr_pages == pages, "CRIU before 4.2 would find no pages"
        entries.append((entry.vaddr, pages, entry.flags))
    assert head is not None
    return head.pages_id, entries


def pages(*fill: int) -> bytes:
    return b"".join(bytes([byte]) * PAGE for byte in fill)


def put(vaddr: int, data: bytes, image: int = PID, flags: int = PE_PRESENT) -> bytes:
    return record(Kind.PAGES, image, vaddr, len(data) // PAGE, flags=flags) + data


def whole(*bodies: bytes, image: int = PID) -> bytes:
    return record(Kind.OPEN, image) + b"".join(bodies) + record(Kind.CLOSE, image) + record(Kind.END)


def test_images_are_written(tmp_path: Path) -> None:
    stream = whole(put(PAGE, pages(1, 2)), put(3 * PAGE, pages(3)), put(9 * PAGE, pages(9), flags=PE_PRESENT | PE_LAZY), put(10 * PAGE, pages(7)))
    with PageWriter(tmp_path) as writer:
        assert writer.write(stream) == len(stream)
        writer.flush()
        writer.finish()
    pages_id, entries = read_pagemap(tmp_path / "pagemap-12.img")
    assert pages_id == FIRST_PAGES_ID
    assert entries == [(PAGE, 3, PE_PRESENT), (9 * PAGE, 1, PE_PRESENT | PE_LAZY), (10 * PAGE, 1, PE_PRESENT)]
    assert (tmp_path / f"pages-{pages_id}.img").read_bytes() == pages(1, 2, 3, 9, 7)
    assert sorted(os.listdir(tmp_path)) == ["pagemap-12.img", f"pages-{pages_id}.img"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())
    assert (writer.pages, writer.pages_bytes, writer.parents, writer.images, writer.complete) == (5, 5 * PAGE, 0, 1, True)


class Sinks:
    """What a writer gives to sinks: name -> content; `closed` in their order."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.closed: list[str] = []

    def __call__(self, name: str) -> Sink:
        self.content[name] = b""
        return Sink(self, name)


class Sink:
    def __init__(self, sinks: Sinks, name: str) -> None:
        self.sinks, self.name = sinks, name

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        if data[:1] == b"\xff":
            raise OSError(28, "No space left on device")
        self.sinks.content[self.name] += data

    def close(self) -> None:
        self.sinks.closed.append(self.name)


def test_pages_go_to_sinks(tmp_path: Path) -> None:
    one, two = (record(Kind.OPEN, image) + put(PAGE, pages(fill, fill), image) + record(Kind.CLOSE, image) for image, fill in ((PID, 1), (SHMEM, 2)))
    sinks = Sinks()
    with PageWriter(tmp_path, sink=sinks) as writer:
        stream = one + two + record(Kind.END)
        for at in range(0, len(stream), 1000):
            writer.write(stream[at : at + 1000])
        writer.finish()
    names = [f"pages-{FIRST_PAGES_ID + n}.img" for n in range(2)]
    assert sinks.content == dict(zip(names, (pages(1, 1), pages(2, 2)), strict=True)) and sinks.closed == names
    assert sorted(os.listdir(tmp_path)) == ["pagemap-12.img", "pagemap-shmem-3.img"]
    assert read_pagemap(tmp_path / "pagemap-shmem-3.img") == (FIRST_PAGES_ID + 1, [(PAGE, 2, PE_PRESENT)])


@pytest.mark.parametrize("full", [True, False])
def test_a_sink_that_does_not_get_all_is_not_closed(tmp_path: Path, full: bool) -> None:
    sinks = Sinks()
    with pytest.raises(OSError) if full else pytest.raises(TransferFailed), PageWriter(tmp_path, sink=sinks) as writer:
        writer.write(record(Kind.OPEN, PID) + record(Kind.PAGES, PID, PAGE, 2, flags=PE_PRESENT) + pages(0xFF if full else 1))
        writer.finish()
    assert sinks.closed == [] and os.listdir(tmp_path) == []


def test_a_process_without_pages(tmp_path: Path) -> None:
    with PageWriter(tmp_path) as writer:
        writer.write(whole())
        writer.finish()
    assert read_pagemap(tmp_path / "pagemap-12.img") == (FIRST_PAGES_ID, [])
    assert (tmp_path / f"pages-{FIRST_PAGES_ID}.img").read_bytes() == b""


@pytest.mark.parametrize("seed", range(8))
def test_any_cutting_gives_the_same_images(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    (tmp_path / "before").mkdir()
    (tmp_path / "now").mkdir()
    stream = b""
    expected: dict[str, tuple[list[Entry], bytes]] = {}
    for number in range(1, dice.randint(2, 5)):
        kind = dice.choice((1, 2))
        name = f"pagemap-{number}.img" if kind == 1 else f"pagemap-shmem-{number}.img"
        (tmp_path / "before" / name).touch()
        image = number << 8 | kind
        stream += record(Kind.OPEN, image)
        entries: list[list[int]] = []
        content = b""
        vaddr = dice.choice((0, 0x7FFF_0000_0000, 2**64 - (1 << 20)))
        for _ in range(dice.randint(0, 20)):
            vaddr += dice.choice((0, 0, 1, 5)) * PAGE
            count = dice.randint(1, 6)
            flags = dice.choice((PE_PRESENT, PE_PRESENT, PE_PARENT))
            if flags == PE_PARENT:
                stream += record(Kind.PARENT, image, vaddr, count, flags=dice.choice((0, PE_PARENT)))
            else:
                data = dice.randbytes(count * PAGE)
                content += data
                stream += put(vaddr, data, image)
            if entries and entries[-1][0] + entries[-1][1] * PAGE == vaddr and entries[-1][2] == flags:
                entries[-1][1] += count
            else:
                entries.append([vaddr, count, flags])
            vaddr += count * PAGE
        stream += record(Kind.CLOSE, image)
        expected[name] = ([(a, n, f) for a, n, f in entries], content)
    stream += record(Kind.END)
    with PageWriter(tmp_path / "now", parent=tmp_path / "before") as writer:
        at = 0
        while at < len(stream):
            size = dice.choice((1, 7, 31, 32, 33, PAGE - 1, 3 * PAGE, 20 * PAGE))
            assert writer.write(memoryview(stream)[at : at + size]) == len(stream[at : at + size])
            at += size
        writer.finish()
    for name, (wanted, content) in expected.items():
        pages_id, found = read_pagemap(tmp_path / "now" / name)
        assert found == wanted
        assert (tmp_path / "now" / f"pages-{pages_id}.img").read_bytes() == content
    assert len(os.listdir(tmp_path / "now")) == 2 * len(expected) + 1
    assert writer.pages_bytes == sum(len(content) for _, content in expected.values())
    assert writer.parents == sum(n for found, _ in expected.values() for _, n, flags in found if flags == PE_PARENT)


def test_parent_is_a_relative_link(tmp_path: Path) -> None:
    (tmp_path / "pre/1").mkdir(parents=True)
    (tmp_path / "images").mkdir()
    (tmp_path / "pre/1/pagemap-12.img").touch()
    with PageWriter(tmp_path / "images", parent=tmp_path / "pre/1") as writer:
        writer.write(whole(record(Kind.PARENT, PID, PAGE, 2), record(Kind.PARENT, PID, 3 * PAGE, 1), put(4 * PAGE, pages(4))))
        writer.finish()
    assert os.readlink(tmp_path / "images/parent") == "../pre/1"
    assert read_pagemap(tmp_path / "images/pagemap-12.img")[1] == [(PAGE, 3, PE_PARENT), (4 * PAGE, 1, PE_PRESENT)]
    assert writer.parents == 3


def test_many_entries_are_not_held_back(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    (tmp_path / "before/pagemap-12.img").touch()
    (tmp_path / "now").mkdir()
    with PageWriter(tmp_path / "now", parent=tmp_path / "before") as writer:
        writer.write(record(Kind.OPEN, PID))
        writer.write(b"".join(record(Kind.PARENT, PID, 2 * n * PAGE, 1) for n in range(10_000)))
        assert (tmp_path / "now/pagemap-12.img").stat().st_size > 100_000
        writer.write(record(Kind.CLOSE, PID) + record(Kind.END))
        writer.finish()
    assert read_pagemap(tmp_path / "now/pagemap-12.img")[1] == [(2 * n * PAGE, 1, PE_PARENT) for n in range(10_000)]


OPEN, CLOSE, END = record(Kind.OPEN, PID), record(Kind.CLOSE, PID), record(Kind.END)
HOSTILE = {
    "an unknown kind": (HEADER.pack(9, 0, 0, 0, 0), "unknown kind 9"),
    "kind zero": (bytes(32), "unknown kind 0"),
    "pages without an image": (put(PAGE, pages(1)), "not open"),
    "pages of another image": (OPEN + put(PAGE, pages(1), image=SHMEM), "not open"),
    "pages after the end of their image": (OPEN + CLOSE + put(PAGE, pages(1)), "not open"),
    "a crooked address": (OPEN + put(PAGE + 1, pages(1)), "impossible address"),
    "no pages": (OPEN + record(Kind.PAGES, PID, PAGE, 0, flags=4), "impossible address"),
    "pages beyond the address space": (OPEN + record(Kind.PAGES, PID, 2**64 - PAGE, 2, flags=4), "impossible address"),
    "a count that overflows": (OPEN + record(Kind.PAGES, PID, PAGE, 2**52, flags=4), "impossible address"),
    "pages again": (OPEN + put(PAGE, pages(1)) + put(PAGE, pages(1)), "out of order"),
    "pages that overlap": (OPEN + put(PAGE, pages(1, 2)) + put(2 * PAGE, pages(1)), "out of order"),
    "pages backwards": (OPEN + put(5 * PAGE, pages(1)) + put(PAGE, pages(1)), "out of order"),
    "unknown flags": (OPEN + put(PAGE, pages(1), flags=12), "unknown flags"),
    "pages that are in the parent": (OPEN + put(PAGE, pages(1), flags=PE_PARENT), "unknown flags"),
    "unknown flags in the parent": (OPEN + record(Kind.PARENT, PID, PAGE, 1, flags=PE_LAZY), "unknown flags"),
    "no parent": (OPEN + record(Kind.PARENT, PID, PAGE, 1), "parent images that are not there"),
    "an image within an image": (OPEN + record(Kind.OPEN, SHMEM), "within image"),
    "an image twice": (OPEN + CLOSE + OPEN, "twice"),
    "the end of no image": (CLOSE, "not open"),
    "the end of image 0": (record(Kind.CLOSE), "not open"),
    "the end of another image": (OPEN + record(Kind.CLOSE, SHMEM), "not open"),
    "the end within an image": (OPEN + END, "within an image"),
    "something after the end": (END + OPEN, "after their end"),
    "a type that there is not": (record(Kind.OPEN, 12 << 8 | 3), "unknown id"),
    "process 0": (record(Kind.OPEN, 1), "unknown id"),
    "a pid that there is not": (record(Kind.OPEN, 1 << 40 | 1), "unknown id"),
    "an address in OPEN": (record(Kind.OPEN, PID, PAGE), "malformed"),
    "flags in END": (record(Kind.END, flags=1), "malformed"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("step", [1, 1 << 20])
def test_hostile_streams_are_refused(tmp_path: Path, name: str, step: int) -> None:
    stream, complaint = HOSTILE[name]
    with PageWriter(tmp_path) as writer:
        with pytest.raises(TransferFailed, match=complaint):
            for at in range(0, len(stream), step):
                writer.write(stream[at : at + step])
        with pytest.raises(TransferFailed, match=complaint):
            writer.write(END)
        with pytest.raises(TransferFailed, match=complaint):
            writer.finish()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("cut", [0, 1, 32, 40, 64, 65, 64 + PAGE, 64 + 2 * PAGE, 64 + 2 * PAGE + 31, 64 + 2 * PAGE + 32, -1])
def test_a_stream_cut_short(tmp_path: Path, cut: int) -> None:
    (tmp_path / "other").touch()
    writer = PageWriter(tmp_path)
    writer.write(whole(put(PAGE, pages(1, 2)))[:cut])
    writer.flush()
    with pytest.raises(TransferFailed, match="broke off"):
        writer.finish()
    assert os.listdir(tmp_path) == ["other"]
    with pytest.raises(TransferFailed, match="closed"):
        writer.write(b"x")


def test_more_than_allowed(tmp_path: Path) -> None:
    stream = whole(put(PAGE, pages(1, 2)))
    with PageWriter(tmp_path / ".", max_bytes=2 * PAGE + 100) as writer:
        writer.write(stream)
        writer.finish()
    for name in os.listdir(tmp_path):
        (tmp_path / name).unlink()
    for limit in (2 * PAGE - 1, 2 * PAGE + 10):  # the pages alone, and with their pagemap
        with PageWriter(tmp_path, max_bytes=limit) as writer, pytest.raises(TransferFailed, match=f"{limit} bytes"):
            writer.write(stream)
    # A lie costs nothing: the count is looked at before anything is written.
    with PageWriter(tmp_path, max_bytes=1 << 30) as writer:
        with pytest.raises(TransferFailed, match="larger"):
            writer.write(record(Kind.OPEN, PID) + record(Kind.PAGES, PID, 0, 1 << 40, flags=4))
    assert os.listdir(tmp_path) == []


def test_too_many_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagestream, "IMAGES_CAP", 3)
    with PageWriter(tmp_path) as writer, pytest.raises(TransferFailed, match="more than 3 images"):
        for number in range(1, 5):
            writer.write(record(Kind.OPEN, number << 8 | 1) + record(Kind.CLOSE, number << 8 | 1))
    assert writer.images == 3


@pytest.mark.parametrize("name", ["pagemap-12.img", f"pages-{FIRST_PAGES_ID}.img"])
@pytest.mark.parametrize("link", [False, True])
def test_nothing_is_overwritten_and_no_link_followed(tmp_path: Path, name: str, link: bool) -> None:
    images, victim = tmp_path / "images", tmp_path / "victim"
    images.mkdir()
    victim.write_text("precious")
    if link:
        (images / name).symlink_to(victim)
    else:
        (images / name).write_text("precious")
    with PageWriter(images) as writer, pytest.raises(TransferFailed, match=f"{name} exists"):
        writer.write(whole(put(PAGE, pages(1))))
    assert victim.read_text() == "precious"
    assert os.listdir(images) == [name] and (images / name).read_text() == "precious"


def test_a_parent_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/parent").touch()
    with pytest.raises(TransferFailed, match="exists already"):
        PageWriter(tmp_path / "images", parent=tmp_path)
    assert os.listdir(tmp_path / "images") == ["parent"]


def test_a_parent_that_does_not_have_the_image(tmp_path: Path) -> None:
    (tmp_path / "before").mkdir()
    (tmp_path / "now").mkdir()
    with PageWriter(tmp_path / "now", parent=tmp_path / "before") as writer, pytest.raises(TransferFailed, match=r"pagemap-12\.img"):
        writer.write(whole(record(Kind.PARENT, PID, PAGE, 1)))


def test_a_full_disk_is_told_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def full(fd: int, data: Any) -> int:
        if len(data) >= PAGE:
            raise OSError(28, "No space left on device")
        return real(fd, data)

    with PageWriter(tmp_path) as writer:
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            writer.write(whole(put(PAGE, pages(1))))
        monkeypatch.undo()
        with pytest.raises(TransferFailed, match="No space"):
            writer.finish()
    assert os.listdir(tmp_path) == []


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:1000]))
    with PageWriter(tmp_path) as writer:
        writer.write(whole(put(PAGE, pages(1, 2, 3))))
        writer.finish()
    assert (tmp_path / f"pages-{FIRST_PAGES_ID}.img").read_bytes() == pages(1, 2, 3)


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    writer = PageWriter(tmp_path / "a", parent=tmp_path / "b")
    writer.write(OPEN)
    assert count() == before + 4
    writer.close()
    assert count() == before
    with PageWriter(tmp_path / "a") as writer:
        writer.write(whole(put(PAGE, pages(1))))
        writer.finish()
    writer.close()
    assert count() == before and len(os.listdir(tmp_path / "a")) == 2


def test_pages_of_another_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda name: 65536)
    with pytest.raises(FeatureMissing, match="65536"):
        PageWriter(tmp_path)
