"""Memory in chunks for a lazy restore: what CRIU reads itself is in files, the rest is answered; and the process that answers."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest

pytest.importorskip("google.protobuf")

from ckpt.criu import lazy
from ckpt.criu.bindings import load
from ckpt.criu.pagechunks import BLOCK_BYTES, PageChunks, write_eager
from ckpt.criu.pageserver import header_of
from ckpt.criu.pagestream import FIRST_PAGES_ID, PAGE_BYTES, PE_LAZY, PE_PRESENT, Kind, PageWriter, record
from ckpt.errors import DigestMismatch, FeatureMissing, RestoreFailed
from ckpt.model import Manifest
from ckpt.ops import feeder
from ckpt.ops.feeder import Feeder
from ckpt.store.catalog import Catalog, Draft

try:
    load("images.pagemap_pb2")
except FeatureMissing:
    pytest.skip("no pycriu here", allow_module_level=True)

PID, SHMEM = 7 << 8 | 1, 3 << 8 | 2
BASE = 0x10000
LAZY = PE_LAZY | PE_PRESENT
NAME = f"pages-{FIRST_PAGES_ID}.img"


class Memory:
    """Images in a directory, their pages in memory: `content` by name."""

    def __init__(self, directory: Path, images: dict[int, list[tuple[int, bytes, int]]]) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.content: dict[str, bytearray] = {}
        self.reads: list[tuple[int, int]] = []
        self.broken_at = -1
        with PageWriter(directory, sink=self.sink) as writer:
            for image, runs in images.items():
                writer.write(record(Kind.OPEN, image))
                for number, data, flags in runs:
                    writer.write(record(Kind.PAGES, image, BASE + number * PAGE_BYTES, len(data) // PAGE_BYTES, flags=flags) + data)
                writer.write(record(Kind.CLOSE, image))
            writer.write(record(Kind.END))
            writer.finish()

    def sink(self, name: str) -> Sink:
        self.content[name] = bytearray()
        return Sink(self.content[name])

    def reader(self, name: str) -> Reader:
        return Reader(self, name)


class Sink:
    def __init__(self, content: bytearray) -> None:
        self.content = content

    def write(self, data: bytes | bytearray | memoryview, /) -> None:
        self.content += data

    def close(self) -> None:
        pass


class Reader:
    def __init__(self, memory: Memory, name: str) -> None:
        self.memory, self.name = memory, name
        self.size_bytes = len(memory.content[name])

    def read(self, offset: int, length: int) -> bytes:
        self.memory.reads.append((offset, length))
        if offset <= self.memory.broken_at < offset + length:
            raise DigestMismatch(f"{self.name} was changed or damaged")
        return bytes(self.memory.content[self.name][offset : offset + length])


def test_what_criu_reads_itself_is_in_the_files(tmp_path: Path) -> None:
    data = random.Random(1).randbytes
    runs = [
        (0, data(PAGE_BYTES), PE_PRESENT),
        (1, data(300 * PAGE_BYTES), LAZY),
        (301, data(2 * PAGE_BYTES), PE_PRESENT),
        (400, data(PAGE_BYTES), LAZY),
    ]
    shared = data(3 * PAGE_BYTES)
    memory = Memory(tmp_path, {PID: runs, SHMEM: [(0, shared, PE_PRESENT)]})
    assert write_eager(tmp_path, memory.reader) == 6 * PAGE_BYTES
    written = tmp_path / NAME
    assert written.read_bytes() == runs[0][1] + bytes(300 * PAGE_BYTES) + runs[2][1] + bytes(PAGE_BYTES)
    assert written.stat().st_blocks * 512 < 8 * PAGE_BYTES and written.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / f"pages-{FIRST_PAGES_ID + 1}.img").read_bytes() == shared


def test_damaged_pagemaps_are_refused(tmp_path: Path) -> None:
    memory = Memory(tmp_path, {PID: [(0, bytes(PAGE_BYTES), PE_PRESENT)]})
    pagemap = tmp_path / "pagemap-7.img"
    pagemap.write_bytes(pagemap.read_bytes()[:-1])
    with pytest.raises(RestoreFailed, match=r"pagemap-7\.img"):
        write_eager(tmp_path, memory.reader)


def test_any_pages_are_answered(tmp_path: Path) -> None:
    dice = random.Random(2)
    first, second = dice.randbytes(3 * BLOCK_BYTES + 5 * PAGE_BYTES), dice.randbytes(9 * BLOCK_BYTES)
    gap = len(first) // PAGE_BYTES + 10
    memory = Memory(tmp_path, {PID: [(0, first, LAZY), (gap, second, LAZY)]})
    chunks = PageChunks(tmp_path, memory.reader)
    try:
        for _ in range(200):
            start, content = dice.choice(((0, first), (gap, second)))
            number, count = dice.randrange(len(content) // PAGE_BYTES), dice.randint(1, 1024)
            found = b"".join(chunks.pieces(7, BASE + (start + number) * PAGE_BYTES, count))
            wanted = content[number * PAGE_BYTES : (number + count) * PAGE_BYTES]
            assert found == wanted, (start, number, count)
        assert chunks.pieces(7, BASE + (gap - 1) * PAGE_BYTES, 1) == [] == chunks.pieces(8, BASE, 1)
    finally:
        chunks.close()


def test_the_next_pages_are_read_ahead(tmp_path: Path) -> None:
    memory = Memory(tmp_path, {PID: [(0, bytes(12 * BLOCK_BYTES), LAZY)]})
    chunks = PageChunks(tmp_path, memory.reader)
    chunks.pieces(7, BASE, 1)
    chunks.close()  # waits for the read that is under way
    assert (0, BLOCK_BYTES) in memory.reads
    again = PageChunks(tmp_path, memory.reader)
    memory.reads.clear()
    for number in range(12 * BLOCK_BYTES // PAGE_BYTES):
        again.pieces(7, BASE + number * PAGE_BYTES, 1)
    again.close()
    assert sorted(memory.reads) == [(at, BLOCK_BYTES) for at in range(0, 12 * BLOCK_BYTES, BLOCK_BYTES)], "each is read once"


def test_damage_is_raised_where_it_is(tmp_path: Path) -> None:
    memory = Memory(tmp_path, {PID: [(0, bytes(4 * BLOCK_BYTES), LAZY)]})
    memory.broken_at = 2 * BLOCK_BYTES + 5
    chunks = PageChunks(tmp_path, memory.reader)
    assert chunks.pieces(7, BASE, 2 * BLOCK_BYTES // PAGE_BYTES)
    with pytest.raises(DigestMismatch):
        chunks.pieces(7, BASE + 2 * BLOCK_BYTES, 1)
    chunks.close()


# -- the process that answers


@pytest.fixture(autouse=True)
def pycriu_for_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """A feeder runs isolated: it would not find the bindings that the tests bring."""
    import pycriu

    place = str(Path(str(pycriu.__file__)).parents[1])
    monkeypatch.setattr(feeder, "_BODY", f"import sys; sys.path.append({place!r}); {feeder._BODY}")


class Stored:
    """A checkpoint in a store, its pagemaps, and a feeder for it."""

    def __init__(self, root: Path, content: bytes) -> None:
        catalog = Catalog(root)
        draft: Draft = catalog.begin("web")
        images = draft.stage / "checkpoint"
        images.mkdir()
        with PageWriter(images, sink=lambda name: draft.sink(f"checkpoint/{name}")) as writer:
            pages = record(Kind.PAGES, PID, BASE, len(content) // PAGE_BYTES, flags=LAZY) + content
            writer.write(record(Kind.OPEN, PID) + pages + record(Kind.CLOSE, PID) + record(Kind.END))
            writer.finish()
        self.checkpoint = draft.commit(Manifest(id="", name="web", engine="toy", container_id="c1", created_s=0.0, digests=draft.digests))
        self.job = root / "jobs" / "one"
        self.job.mkdir(parents=True)
        plan = {"root": str(root), "job": str(self.job), "images": str(self.checkpoint.directory / "checkpoint")}
        self.feeder = Feeder({**plan, "criu_version": "4.2", "checkpoint_id": self.checkpoint.manifest.id}, ())

    def ask(self, vaddr: int, count: int) -> bytes:
        """What a daemon gets, which then goes."""
        header = header_of("4.2")
        with socket.create_connection(("127.0.0.1", self.feeder.port()), timeout=10) as daemon:
            daemon.sendall(header.pack(7, count, vaddr, 7))
            got = b""
            while len(got) < header.size + count * PAGE_BYTES and (piece := daemon.recv(1 << 20)):
                got += piece
        return got[header.size :]


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's processes are served")


@needs_root
def test_a_feeder_serves_from_the_store(tmp_path: Path) -> None:
    content = random.Random(3).randbytes(200 * PAGE_BYTES)
    stored = Stored(tmp_path / "store", content)
    assert stored.ask(BASE + 100 * PAGE_BYTES, 50) == content[100 * PAGE_BYTES : 150 * PAGE_BYTES]
    stored.feeder.close()
    assert lazy.damage(stored.job) == ""


@needs_root
def test_a_feeder_never_serves_a_damaged_chunk(tmp_path: Path) -> None:
    content = random.Random(4).randbytes(512 * PAGE_BYTES)
    stored = Stored(tmp_path / "store", content)
    (pack,) = (tmp_path / "store" / "packs").glob("*.pack")
    with pack.open("r+b") as file:
        file.seek(300 * PAGE_BYTES)
        byte = file.read(1)
        file.seek(300 * PAGE_BYTES)
        file.write(bytes([byte[0] ^ 1]))
    assert stored.ask(BASE, 512) == b""
    stored.feeder.close()
    assert "was changed or damaged" in (stored.job / lazy.DAMAGE).read_text()


def test_a_feeder_that_nobody_needs_ends(tmp_path: Path) -> None:
    stored = Stored(tmp_path / "store", bytes(PAGE_BYTES))
    stored.feeder.port()
    stored.feeder.close()
    assert stored.feeder._process.returncode == 0
