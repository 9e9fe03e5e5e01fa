"""The page server for CRIU's lazy-pages daemon: what it answers, from chains of images, and that it never answers with what is not there."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("google.protobuf")

from ckpt.criu import pagefeed
from ckpt.criu.pagefeed import Feed, PageFiles, serve
from ckpt.criu.pageserver import header_of
from ckpt.criu.pagestream import PAGE_BYTES, PE_LAZY, PE_PRESENT, Kind, PageWriter, record
from ckpt.errors import FeatureMissing, RestoreFailed

IMAGE = 7 << 8 | 1
BASE = 0x10000
GET, CLOSE = 7, 0x1023

try:
    from ckpt.criu.bindings import load

    load("images.pagemap_pb2")
except FeatureMissing:
    pytest.skip("no pycriu here", allow_module_level=True)


def page(value: int) -> bytes:
    return bytes([value]) * PAGE_BYTES


def write(directory: Path, parent: Path | None, *parts: tuple[int, bytes | int]) -> Path:
    """An image set of process 7: at each page number its pages, or how many of them the parent has."""
    directory.mkdir()
    with PageWriter(directory, parent=parent) as writer:
        writer.write(record(Kind.OPEN, IMAGE))
        for number, what in parts:
            if isinstance(what, int):
                writer.write(record(Kind.PARENT, IMAGE, BASE + number * PAGE_BYTES, what))
            else:
                writer.write(record(Kind.PAGES, IMAGE, BASE + number * PAGE_BYTES, len(what) // PAGE_BYTES, flags=PE_LAZY | PE_PRESENT))
                writer.write(what)
        writer.write(record(Kind.CLOSE, IMAGE) + record(Kind.END))
        writer.finish()
    return directory


@pytest.fixture
def chain(tmp_path: Path) -> Iterator[PageFiles]:
    """Pages 0 to 9: written as 1, then 3 and 4 as 2, then 4 as 3; and page 20."""
    first = write(tmp_path / "0", None, (0, page(1) * 10), (20, page(1)))
    second = write(tmp_path / "1", first, (0, 3), (3, page(2) * 2), (5, 5), (20, 1))
    newest = write(tmp_path / "2", second, (0, 4), (4, page(3)), (5, 5), (20, 1))
    files = PageFiles(newest)
    yield files
    files.close()


def content(files: PageFiles, number: int, count: int) -> bytes:
    import os

    return b"".join(os.pread(piece.fd, piece.length, piece.offset) for piece in files.pieces(7, BASE + number * PAGE_BYTES, count))


def test_the_newest_of_a_page_counts(chain: PageFiles) -> None:
    assert content(chain, 0, 10) == page(1) * 3 + page(2) + page(3) + page(1) * 5
    assert content(chain, 4, 1) == page(3)
    assert content(chain, 20, 1) == page(1)


def test_a_gap_ends_an_answer(chain: PageFiles) -> None:
    assert content(chain, 8, 20) == page(1) * 2
    assert content(chain, 10, 1) == b""
    assert chain.pieces(8, BASE, 1) == []


@pytest.mark.parametrize("number, missing", [(0, False), (9, False), (15, True)])
def test_what_a_dump_left_must_be_there(tmp_path: Path, chain: PageFiles, number: int, missing: bool) -> None:
    dump = write(tmp_path / "dump", None, (number, page(0)))
    if missing:
        with pytest.raises(RestoreFailed, match="process 7 is missing: 1 pages"):
            chain.require(dump)
    else:
        chain.require(dump)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:9], lambda data: data[:8] + b"\xff" * 40])
def test_damaged_images(tmp_path: Path, damage: object) -> None:
    directory = write(tmp_path / "0", None, (0, page(1)))
    pagemap = directory / "pagemap-7.img"
    pagemap.write_bytes(damage(pagemap.read_bytes()))  # type: ignore[operator]
    with pytest.raises(RestoreFailed):
        PageFiles(directory)


class Daemon:
    """What CRIU's lazy-pages daemon says and hears."""

    def __init__(self, version: str, port: int) -> None:
        self.header: struct.Struct = header_of(version)
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=10)

    def say(self, command: int, nr_pages: int = 0, vaddr: int = 0, pid: int = 7) -> None:
        self.socket.sendall(self.header.pack(command, nr_pages, vaddr, pid))

    def hear(self, count: int) -> bytes:
        """So many bytes, fewer at the end."""
        heard = b""
        while len(heard) < count and (piece := self.socket.recv(count - len(heard))):
            heard += piece
        return heard


@pytest.mark.parametrize("version", ["4.1.1", "4.2.1"])
def test_a_daemon_is_served(chain: PageFiles, version: str) -> None:
    feed = Feed(version)
    thread = pagefeed.start(feed, chain)
    daemon = Daemon(version, feed.port)
    daemon.say(GET, 10, BASE)
    command, count, vaddr, pid = daemon.header.unpack(daemon.hear(daemon.header.size))
    assert (command & 0xFFFF, command >> 16, count, vaddr, pid) == (6, PE_PRESENT, 10, BASE, 7)
    assert daemon.hear(10 * PAGE_BYTES) == content(chain, 0, 10)
    daemon.say(CLOSE)
    assert daemon.hear(4) == bytes(4)
    thread.join(10)
    assert not thread.is_alive() and feed.done


@pytest.mark.parametrize("ask", [(GET, 1, BASE + 15 * PAGE_BYTES), (GET, 0, BASE), (3, 1, BASE), (GET, 1 << 40, BASE)])
def test_what_is_not_there_breaks_the_connection(chain: PageFiles, ask: tuple[int, int, int]) -> None:
    feed = Feed("4.2.1")
    thread = pagefeed.start(feed, chain)
    daemon = Daemon("4.2.1", feed.port)
    daemon.say(*ask)
    assert daemon.hear(1) == b""
    thread.join(10)
    assert not feed.done


def test_it_can_be_closed_before_and_while_it_serves(chain: PageFiles) -> None:
    feed = Feed("4.2.1")
    thread = pagefeed.start(feed, chain)
    feed.close()
    thread.join(10)
    assert not thread.is_alive()
    feed = Feed("4.2.1")
    daemon_thread = threading.Thread(target=lambda: feed.connect() and serve(feed, chain))
    daemon_thread.start()
    daemon = Daemon("4.2.1", feed.port)
    daemon.say(GET, 1, BASE)
    daemon.hear(daemon.header.size + PAGE_BYTES)
    feed.close()
    daemon_thread.join(10)
    assert not daemon_thread.is_alive() and daemon.hear(1) == b""
