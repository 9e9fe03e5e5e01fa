"""Post-copy's memory on the destination: kept until it is asked for, over as many bridges as it takes, each page only as it was first."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt.criu.pagestream import PAGE_BYTES
from ckpt.ops import arriving
from ckpt.ops.arriving import SOCKET, Arriving
from ckpt.ops.postcopy import END, WORDS

BASE = 0x40000


def page(value: int) -> bytes:
    return bytes([value]) * PAGE_BYTES


class Bridge:
    """What the peer says and hears."""

    def __init__(self, job_dir: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(10)
        self.socket.connect(os.fspath(job_dir / SOCKET))
        assert self.hear() == (0, 0, 1), "it says that it may begin"

    def hear(self) -> tuple[int, int, int]:
        try:
            words = self.socket.recv(WORDS.size, socket.MSG_WAITALL)
        except ConnectionResetError:
            words = b""
        return WORDS.unpack(words) if words else (-1, -1, -1)  # type: ignore[return-value]

    def bring(self, number: int, pages: bytes, pid: int = 7) -> None:
        self.socket.sendall(WORDS.pack(pid, BASE + number * PAGE_BYTES, len(pages) // PAGE_BYTES) + pages)


@pytest.fixture
def needed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What the CRIU images of the restore leave to the daemon."""
    runs: list[tuple[int, int, int]] = []
    monkeypatch.setattr(arriving, "lazy_runs", lambda images: iter(runs))
    return runs


@pytest.fixture
def store(tmp_path: Path, needed: list[tuple[int, int, int]]) -> Iterator[Arriving]:
    made = Arriving(tmp_path, tmp_path, tmp_path, patience_s=lambda: 0.2)
    yield made
    made.close()


def content(store: Arriving, number: int, count: int) -> bytes:
    return b"".join(os.pread(piece.fd, piece.length, piece.offset) for piece in store.pieces(7, BASE + number * PAGE_BYTES, count))


def test_a_page_that_is_waited_for_is_asked_for(tmp_path: Path, store: Arriving) -> None:
    bridge = Bridge(tmp_path)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(content(store, 5, 3)))
    reader.start()
    assert bridge.hear() == (7, BASE + 5 * PAGE_BYTES, 3)
    bridge.bring(0, page(1))
    bridge.bring(4, page(2) * 3)
    reader.join(10)
    assert got == [page(2) * 2], "what is there of it"


def test_a_page_stays_what_it_was_first(tmp_path: Path, store: Arriving) -> None:
    """The restored tree may have it, and have changed it: the source's second answer must not differ, but it is not believed."""
    bridge = Bridge(tmp_path)
    bridge.bring(2, page(1) * 2)
    assert content(store, 2, 2) == page(1) * 2
    bridge.bring(0, page(9) * 6)
    assert content(store, 5, 1) == page(9)
    assert content(store, 0, 6) == page(9) * 2 + page(1) * 2 + page(9) * 2


def test_the_next_bridge_goes_on(tmp_path: Path, store: Arriving) -> None:
    first = Bridge(tmp_path)
    first.bring(0, page(1))
    assert content(store, 0, 1) == page(1)
    first.socket.sendall(WORDS.pack(7, BASE + PAGE_BYTES, 2) + page(2)[:100])
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(content(store, 1, 1)))
    reader.start()
    assert first.hear()[0] == 7
    first.socket.close()
    second = Bridge(tmp_path)
    assert second.hear() == (7, BASE + PAGE_BYTES, 1), "what is waited for is asked again"
    second.bring(1, page(3))
    reader.join(10)
    assert got == [page(3)], "half an answer is none"


def test_a_full_disk_ends_the_bridge_only(tmp_path: Path, store: Arriving, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written in part is not there: it would be read as zeros."""
    real, full = os.pwrite, [True]

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        if full[0] and len(data) < 2 * PAGE_BYTES:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data[: len(data) - PAGE_BYTES] if full[0] else data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    first = Bridge(tmp_path)
    first.bring(0, page(1) * 3)
    assert first.hear() == (-1, -1, -1)
    full[0] = False
    second = Bridge(tmp_path)
    second.bring(0, page(2) * 3)
    assert content(store, 0, 3) == page(2) * 3


def test_it_is_over_when_all_is_there(tmp_path: Path, store: Arriving, needed: list[tuple[int, int, int]]) -> None:
    needed.append((7, BASE, 3))
    bridge = Bridge(tmp_path)
    bridge.bring(0, page(1))
    bridge.bring(2, page(1))
    bridge.socket.sendall(END)
    assert bridge.hear() == (7, BASE + PAGE_BYTES, 1), "what the source did not find by itself"
    assert bridge.hear()[0] == 0
    bridge.bring(1, page(2))
    bridge.socket.sendall(END)
    assert bridge.hear() == (0, 0, 0)
    assert content(store, 0, 3) == page(1) + page(2) + page(1)
    assert store.pieces(7, BASE + 9 * PAGE_BYTES, 1) == [], "nobody waits for what will not come"


def test_without_a_bridge_nobody_waits_for_ever(tmp_path: Path, store: Arriving) -> None:
    assert store.pieces(7, BASE, 1) == []


@pytest.mark.parametrize("words", [(7, BASE + 1, 1), (7, BASE, arriving.ASKED_CAP_PAGES + 1)])
def test_nonsense_ends_the_bridge(tmp_path: Path, store: Arriving, words: tuple[int, int, int]) -> None:
    bridge = Bridge(tmp_path)
    bridge.socket.sendall(WORDS.pack(*words) + page(0))
    assert bridge.hear() == (-1, -1, -1)


def test_closing_ends_it(tmp_path: Path, store: Arriving) -> None:
    bridge = Bridge(tmp_path)
    store.close()
    assert bridge.hear() == (-1, -1, -1)
    assert store.pieces(7, BASE, 1) == []


@pytest.mark.parametrize("complete", [True, False])
def test_what_comes_after_the_last_word_is_dropped(tmp_path: Path, complete: bool) -> None:
    """A page fault may make the source send something more, or its end again, before it hears that the keeper has everything."""
    told: list[dict[str, object]] = []

    class Session:
        def tell(self, value: dict[str, object]) -> None:
            told.append(value)

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(os.fspath(tmp_path / SOCKET))
    listener.listen(1)
    between = arriving._Bridge(Session(), tmp_path)  # type: ignore[arg-type]
    keeper, _ = listener.accept()
    keeper.sendall(WORDS.pack(0, 0, 1) + (END if complete else b""))
    keeper.close()
    assert between._connected.wait(10)
    try:
        if complete:
            assert between.write(END) == len(END) and between.write(page(1)) == PAGE_BYTES
            assert told == [{"got": 0}, {"done": True}]
        else:
            with pytest.raises(OSError):
                between.write(END)
    finally:
        between.close()
        listener.close()
