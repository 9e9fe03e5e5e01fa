"""The page server that CRIU connects to, against a client that speaks CRIU's protocol in both of its header sizes."""

from __future__ import annotations

import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ckpt.criu import loopback, pageserver
from ckpt.criu.pageserver import Compare, PageTap, config_lines, header_of
from ckpt.criu.pagestream import HEADER, PE_LAZY, PE_PARENT, PE_PRESENT, Kind, PageWriter
from ckpt.errors import Bug, TransferFailed
from ckpt.host import procnet

PAGE = 4096
PID, SHMEM = 12 << 8 | 1, 3 << 8 | 2
OLD, NEW = "4.1.1", "4.2"
ADD, HOLE, OPEN, OPEN2, PARENT, ADD_F, GET = range(1, 8)
CLOSE, FORCE_CLOSE = 0x1023, 0x1024
Record = tuple[int, int, int, int, int, bytes]


class Criu:
    """The sending end, as criu/page-xfer.c has it. `cut`: makes pieces of what is sent."""

    def __init__(self, tap: PageTap, version: str, cut: Callable[[], int] | None = None) -> None:
        self.version, self.cut = version, cut
        self.socket = socket.create_connection(("127.0.0.1", tap.port), timeout=10)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            size = self.cut() if self.cut else len(data)
            self.socket.sendall(data[at : at + size])
            at += size

    def header(self, command: int, image: int = 0, vaddr: int = 0, nr: int = 0, flags: int = 0) -> bytes:
        word = command | flags << 16
        if self.version == OLD:
            return struct.pack("=IIQQ", word, nr, vaddr, image)
        return struct.pack("=IIQQQ", word, 0xA5A5A5A5, nr, vaddr, image)  # the padding is whatever was on CRIU's stack

    def answer(self, size: int) -> bytes:
        return self.socket.recv(size, socket.MSG_WAITALL)

    def open(self, image: int) -> bool:
        self.send(self.header(OPEN2, image))
        return struct.unpack("=?", self.answer(1))[0]

    def parent(self, image: int) -> int:
        self.send(self.header(PARENT, image))
        return struct.unpack("=i", self.answer(4))[0]

    def add(self, image: int, vaddr: int, data: bytes, flags: int = PE_PRESENT) -> None:
        self.send(self.header(ADD_F, image, vaddr, len(data) // PAGE, flags) + data)

    def hole(self, image: int, vaddr: int, nr: int) -> None:
        self.send(self.header(ADD_F, image, vaddr, nr, PE_PARENT))

    def end(self, command: int = CLOSE) -> int:
        self.send(self.header(command))
        status: int = struct.unpack("=i", self.answer(4))[0]
        if command == CLOSE:
            self.socket.close()
        return status


def parse(data: bytes) -> list[Record]:
    found, at = [], 0
    while at < len(data):
        kind, flags, image, vaddr, nr = HEADER.unpack_from(data, at)
        at += HEADER.size
        size = nr * PAGE if kind == Kind.PAGES else 0
        assert len(data) >= at + size
        found.append((kind, flags, image, vaddr, nr, data[at : at + size]))
        at += size
    return found


def read_all(tap: PageTap, size: Callable[[], int] = lambda: 1 << 20) -> bytes:
    whole = bytearray()
    while True:
        buffer = bytearray(size())
        if not (count := tap.readinto(buffer)):
            return bytes(whole)
        whole += buffer[:count]


class Session:
    """A tap and a client that runs its part in a thread."""

    def __init__(self) -> None:
        self.taps: list[PageTap] = []
        self.threads: list[threading.Thread] = []
        self.failures: list[BaseException] = []

    def tap(self, version: str = NEW, *, parents: tuple[int, ...] = (), compare: Compare | None = None, timeout_s: float = 10) -> PageTap:
        tap = PageTap(version, timeout_s=timeout_s, parents=parents, compare=compare)
        self.taps.append(tap)
        return tap

    def run(self, body: Callable[[], object]) -> threading.Thread:
        def main() -> None:
            try:
                body()
            except BaseException as error:
                self.failures.append(error)

        thread = threading.Thread(target=main)
        self.threads.append(thread)
        thread.start()
        return thread

    def end(self) -> None:
        for tap in self.taps:
            tap.close()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        if self.failures:
            raise self.failures[0]


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    monkeypatch.setattr(procnet, "connection_uid", lambda end, other: 0)
    made = Session()
    yield made
    made.end()


@pytest.mark.parametrize("version", [OLD, NEW])
@pytest.mark.parametrize("last", [CLOSE, FORCE_CLOSE])
def test_a_dump(session: Session, version: str, last: int) -> None:
    tap = session.tap(version, parents=(SHMEM,))
    one, two = os.urandom(3 * PAGE), os.urandom(PAGE)
    held = []  # FORCE_CLOSE ends it even though somebody holds the connection open

    def dump() -> None:
        held.append(criu := Criu(tap, version))
        assert criu.parent(PID) == 0 and criu.parent(SHMEM) == 1
        assert criu.open(PID) is False
        criu.add(PID, 5 * PAGE, one)
        criu.add(PID, 2**47, two, PE_PRESENT | PE_LAZY)
        assert criu.open(SHMEM) is True
        criu.hole(SHMEM, 0, 7)
        criu.send(criu.header(ADD, SHMEM, 7 * PAGE, 1) + two)
        criu.send(criu.header(HOLE, SHMEM, 8 * PAGE, 2))
        assert criu.end(last) == 0

    session.run(dump)
    assert parse(read_all(tap)) == [
        (Kind.OPEN, 0, PID, 0, 0, b""),
        (Kind.PAGES, PE_PRESENT, PID, 5 * PAGE, 3, one),
        (Kind.PAGES, PE_PRESENT | PE_LAZY, PID, 2**47, 1, two),
        (Kind.CLOSE, 0, PID, 0, 0, b""),
        (Kind.OPEN, 0, SHMEM, 0, 0, b""),
        (Kind.PARENT, PE_PARENT, SHMEM, 0, 7, b""),
        (Kind.PAGES, PE_PRESENT, SHMEM, 7 * PAGE, 1, two),
        (Kind.PARENT, PE_PARENT, SHMEM, 8 * PAGE, 2, b""),
        (Kind.CLOSE, 0, SHMEM, 0, 0, b""),
        (Kind.END, 0, 0, 0, 0, b""),
    ]
    assert (tap.pages, tap.pages_bytes, tap.parents, tap.connected) == (5, 5 * PAGE, 9, True)
    assert tap.readinto(bytearray(10)) == 0
    tap.close()
    assert tap.readinto(bytearray(10)) == 0


def test_a_dump_without_memory(session: Session) -> None:
    tap = session.tap()
    session.run(lambda: Criu(tap, NEW).end())
    assert parse(read_all(tap)) == [(Kind.END, 0, 0, 0, 0, b"")]


@pytest.mark.parametrize("seed", range(10))
def test_any_cutting_into_the_writer(session: Session, tmp_path: Path, seed: int) -> None:
    """Random images, sent in random pieces, read into random buffers: the images have what was sent."""
    dice, sizes = random.Random(seed), random.Random(~seed)
    version = dice.choice((OLD, NEW))
    tap = session.tap(version)
    images: dict[int, list[tuple[int, bytes]]] = {}
    for number in range(1, dice.randint(2, 5)):
        vaddr, runs = dice.randrange(1 << 30) * PAGE, []
        for _ in range(dice.randint(0, 30)):
            runs.append((vaddr, dice.randbytes(PAGE * dice.choice((1, 1, 2, 9)))))
            vaddr += len(runs[-1][1]) + dice.choice((0, 3)) * PAGE
        images[number << 8 | dice.choice((1, 2))] = runs

    def dump() -> None:
        criu = Criu(tap, version, lambda: dice.choice((1, 5, 23, 24, 25, 32, 100, PAGE, 3 * PAGE + 1, 1 << 20)) if dice.random() < 0.3 else 1 << 20)
        for image, runs in images.items():
            assert not criu.open(image)
            for vaddr, data in runs:
                criu.add(image, vaddr, data)
        assert criu.end() == 0

    session.run(dump)
    with PageWriter(tmp_path) as writer:
        while True:
            buffer = bytearray(sizes.choice((1, 20, 33, PAGE, 70_000)))
            if not (count := tap.readinto(buffer)):
                break
            writer.write(memoryview(buffer)[:count])
        writer.finish()
    contents = [b"".join(data for _, data in runs) for runs in images.values()]
    written = sorted(tmp_path.glob("pages-*.img"), key=lambda path: int(path.stem.partition("-")[2]))
    assert [path.read_bytes() for path in written] == contents
    assert writer.pages_bytes == tap.pages_bytes == sum(map(len, contents))


@pytest.mark.parametrize("version", [OLD, NEW])
@pytest.mark.parametrize("seed", range(4))
def test_comparing_sends_what_changed(session: Session, version: str, seed: int) -> None:
    dice = random.Random(seed)
    changed_pages = {n for n in range(1000) if dice.random() < 0.5}
    seen: list[tuple[int, int, int]] = []

    def compare(image: int, vaddr: int, pages: memoryview) -> list[tuple[int, int, bool]]:
        seen.append((image, vaddr, len(pages)))
        runs: list[tuple[int, int, bool]] = []
        for n in range(len(pages) // PAGE):
            changed = vaddr // PAGE + n in changed_pages
            assert pages[n * PAGE] == (vaddr // PAGE + n) % 251
            if runs and runs[-1][2] == changed and dice.random() < 0.9:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, changed)
            else:
                runs.append((n, 1, changed))
        return runs

    tap = session.tap(version, compare=compare)
    data = b"".join(bytes([n % 251]) * PAGE for n in range(700))

    def dump() -> None:
        criu = Criu(tap, version)
        assert not criu.open(PID)
        criu.add(PID, 0, data[: 600 * PAGE])
        criu.add(PID, 650 * PAGE, data[650 * PAGE :], PE_PRESENT | PE_LAZY)
        criu.end()

    session.run(dump)
    records = parse(read_all(tap, lambda: dice.choice((1000, 1 << 20))))
    covered = 0
    for kind, flags, image, vaddr, nr, content in records[1:-2]:
        if covered == 600:
            covered = 650
        assert (image, vaddr) == (PID, covered * PAGE)
        numbers = range(covered, covered + nr)
        covered += nr
        if kind == Kind.PAGES:
            assert flags == (PE_PRESENT if vaddr < 600 * PAGE else PE_PRESENT | PE_LAZY)
            assert content == data[vaddr : vaddr + nr * PAGE] and changed_pages.issuperset(numbers)
        else:
            assert (kind, flags) == (Kind.PARENT, PE_PARENT) and changed_pages.isdisjoint(numbers)
    assert covered == 700
    assert seen == [(PID, 0, 1 << 20), (PID, 256 * PAGE, 1 << 20), (PID, 512 * PAGE, 88 * PAGE), (PID, 650 * PAGE, 50 * PAGE)]
    assert tap.pages == 650 and tap.parents == sum(r[4] for r in records if r[0] == Kind.PARENT)


@pytest.mark.parametrize("runs", [[], [(0, 1, True)], [(1, 1, True)], [(0, 3, True)], [(0, 0, True), (0, 2, False)], [(0, 1, True), (0, 1, True)]])
def test_a_comparison_with_gaps_is_a_bug(session: Session, runs: list[tuple[int, int, bool]]) -> None:
    tap = session.tap(compare=lambda image, vaddr, pages: runs)

    def dump() -> None:
        criu = Criu(tap, NEW)
        criu.open(PID)
        criu.add(PID, 0, bytes(2 * PAGE))
        assert criu.answer(1) == b"", "CRIU must see the connection closed"

    session.run(dump)
    with pytest.raises(Bug, match="comparison"):
        read_all(tap)
    with pytest.raises(TransferFailed):
        tap.readinto(bytearray(1))


def test_what_came_is_not_held_back(session: Session) -> None:
    tap = session.tap()
    whole = threading.Event()

    def dump() -> None:
        criu = Criu(tap, NEW)
        criu.open(PID)
        criu.send(criu.header(ADD_F, PID, 0, 1, PE_PRESENT) + b"half" * 512)
        assert whole.wait(10), "the reader waits for a full buffer"
        criu.send(b"rest" * 512)
        criu.end()

    session.run(dump)
    buffer, got = bytearray(1 << 20), 0
    while got < 2 * HEADER.size + 2048:
        got += tap.readinto(buffer)
    whole.set()
    read_all(tap)


# ---------------------------------------------------------------- what breaks


@pytest.mark.parametrize(("spoken", "expected"), [(OLD, NEW), (NEW, OLD)])
@pytest.mark.parametrize("command", [OPEN2, PARENT, CLOSE])
def test_the_wrong_header_size_does_not_hang(session: Session, monkeypatch: pytest.MonkeyPatch, spoken: str, expected: str, command: int) -> None:
    monkeypatch.setattr(pageserver, "HEADER_WAIT_S", 0.3)
    tap = session.tap(expected, timeout_s=30)

    def dump() -> None:
        criu = Criu(tap, spoken)
        criu.send(criu.header(command, 0 if command == CLOSE else PID))
        select.select([criu.socket], [], [], 10)
        criu.socket.close()

    session.run(dump)
    began = time.monotonic()
    with pytest.raises(TransferFailed, match="another version|before its end|broke"):
        read_all(tap)
    assert time.monotonic() - began < 5


def test_the_usual_wrong_size_is_seen_at_once(session: Session) -> None:
    tap = session.tap(NEW)

    def dump() -> None:
        criu = Criu(tap, OLD)
        criu.send(criu.header(OPEN2, PID))
        assert criu.answer(1) == b""

    session.run(dump)
    began = time.monotonic()
    with pytest.raises(TransferFailed, match="another version"):
        read_all(tap)
    assert time.monotonic() - began < pageserver.HEADER_WAIT_S / 2


HOSTILE: dict[str, Callable[[Criu], bytes]] = {
    "an unknown command": lambda c: c.header(9, PID),
    "a request for pages": lambda c: c.header(GET, PID, 0, 1),
    "an unknown type": lambda c: c.header(OPEN2, 12 << 8 | 9),
    "pid 0": lambda c: c.header(OPEN2, 1),
    "an address in OPEN2": lambda c: c.header(OPEN2, SHMEM, PAGE),
    "pages in OPEN2": lambda c: c.header(OPEN2, SHMEM, 0, 1),
    "pages of an image that is not open": lambda c: c.header(ADD_F, SHMEM, 0, 1, PE_PRESENT),
    "no pages": lambda c: c.header(ADD_F, PID, 0, 0, PE_PRESENT),
    "a crooked address": lambda c: c.header(ADD_F, PID, 1, 1, PE_PRESENT),
    "beyond the address space": lambda c: c.header(ADD_F, PID, 2**64 - PAGE, 2, PE_PRESENT),
    "lazy pages that stay behind": lambda c: c.header(ADD_F, PID, 0, 1, PE_LAZY),
    "unknown flags": lambda c: c.header(ADD_F, PID, 0, 1, PE_PRESENT | 8),
    "present and in the parent": lambda c: c.header(ADD_F, PID, 0, 1, PE_PRESENT | PE_PARENT),
    "no flags": lambda c: c.header(ADD_F, PID, 0, 1),
}


@pytest.mark.parametrize("version", [OLD, NEW])
@pytest.mark.parametrize("name", HOSTILE)
def test_nonsense_ends_it(session: Session, version: str, name: str) -> None:
    tap = session.tap(version)

    def dump() -> None:
        criu = Criu(tap, version)
        criu.open(PID)
        criu.send(HOSTILE[name](criu))
        assert criu.answer(1) == b"", "CRIU must see the connection closed"

    session.run(dump)
    with pytest.raises(TransferFailed, match="unexpected"):
        read_all(tap)
    with pytest.raises(TransferFailed, match="unexpected"):
        tap.readinto(bytearray(1))


@pytest.mark.parametrize("version", [OLD, NEW])
def test_pages_without_open_first(session: Session, version: str) -> None:
    tap = session.tap(version)

    def dump() -> None:
        criu = Criu(tap, version)
        criu.send(criu.header(ADD_F, PID, PAGE, 1, PE_PRESENT))
        assert criu.answer(1) == b""

    session.run(dump)
    with pytest.raises(TransferFailed):
        read_all(tap)


CUTS: dict[str, Callable[[Criu], object]] = {
    "before anything": lambda c: None,
    "in an image": lambda c: c.open(PID),
    "in a header": lambda c: (c.open(PID), c.send(c.header(ADD_F, PID, 0, 1, PE_PRESENT)[:10])),
    "after a header": lambda c: (c.open(PID), c.send(c.header(ADD_F, PID, 0, 1, PE_PRESENT))),
    "in the pages": lambda c: (c.open(PID), c.send(c.header(ADD_F, PID, 0, 1, PE_PRESENT) + bytes(100))),
    "after pages": lambda c: (c.open(PID), c.add(PID, 0, bytes(PAGE))),
    "in a header after the end": lambda c: (c.send(c.header(CLOSE)), c.answer(4), c.send(c.header(OPEN2, PID)[:8])),
    "in an image after the end": lambda c: (c.send(c.header(CLOSE)), c.answer(4), c.open(PID)),
}


@pytest.mark.parametrize("name", CUTS)
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("compared", [False, True])
def test_a_broken_connection_is_no_end(session: Session, name: str, reset: bool, compared: bool) -> None:
    tap = session.tap(compare=(lambda image, vaddr, pages: [(0, len(pages) // PAGE, True)]) if compared else None)

    def dump() -> None:
        criu = Criu(tap, NEW)
        CUTS[name](criu)
        if reset:
            criu.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        criu.socket.close()

    session.run(dump)
    with pytest.raises(TransferFailed, match="the dump failed"):
        read_all(tap)


def test_nobody_connects(session: Session) -> None:
    with pytest.raises(TransferFailed, match=r"did not connect to send its pages in 0\.1 s"):
        read_all(session.tap(timeout_s=0.1))


@pytest.mark.parametrize("part", [0, 100])
def test_silence(session: Session, part: int) -> None:
    tap = session.tap(timeout_s=0.2)

    def dump() -> None:
        criu = Criu(tap, NEW)
        criu.open(PID)
        criu.send(criu.header(ADD_F, PID, 0, 1, PE_PRESENT) + bytes(part))
        assert criu.answer(1) == b""

    session.run(dump)
    with pytest.raises(TransferFailed, match=r"sent nothing for 0\.2 s"):
        read_all(tap)


@pytest.mark.parametrize("when", ["nobody connected", "an image is open", "in a header", "in pages"])
def test_close_from_another_thread_wakes_the_reader(session: Session, when: str) -> None:
    tap = session.tap(timeout_s=30)
    criu = None if when == "nobody connected" else Criu(tap, NEW)
    failures: list[TransferFailed] = []

    def read() -> None:
        try:
            read_all(tap)
        except TransferFailed as error:
            failures.append(error)

    reader = session.run(read)
    if criu:
        criu.open(PID)
        header = criu.header(ADD_F, PID, 0, 1, PE_PRESENT)
        criu.send({"an image is open": b"", "in a header": header[:9], "in pages": header + b"x"}[when])
    time.sleep(0.1)
    assert reader.is_alive()
    began = time.monotonic()
    tap.close()
    reader.join(10)
    assert time.monotonic() - began < 2
    assert [error.message for error in failures] == ["the page server was closed before CRIU had sent everything"]
    if criu:
        assert criu.answer(1) == b"", "CRIU must see the connection closed"
    with pytest.raises(TransferFailed):
        tap.readinto(bytearray(1))


def test_closing_leaves_nothing_open(session: Session) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    with PageTap(NEW) as tap:
        assert count() == before + 2
    tap.close()
    assert count() == before
    with pytest.raises(TransferFailed, match="closed"):
        tap.readinto(bytearray(1))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", tap.port), timeout=5)


# ---------------------------------------------------------------- who may connect


def test_only_roots_connection_is_taken(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    tap = session.tap()
    owners: dict[int, int | None] = {}
    asked = []

    def owner(end: tuple[str, int], other: tuple[str, int]) -> int | None:
        assert other == ("127.0.0.1", tap.port)
        asked.append(end)
        return owners[end[1]]

    monkeypatch.setattr(procnet, "connection_uid", owner)

    def dump() -> None:
        for uid in (1000, None, 65534, 0):
            criu = Criu.__new__(Criu)
            criu.version, criu.cut, criu.socket = NEW, None, socket.socket()
            criu.socket.settimeout(10)
            criu.socket.bind(("127.0.0.1", 0))
            owners[criu.socket.getsockname()[1]] = uid
            criu.socket.connect(("127.0.0.1", tap.port))
            if uid != 0:
                assert criu.answer(1) == b""
                continue
            criu.open(PID)
            with pytest.raises(ConnectionRefusedError):  # one connection, and no more
                socket.create_connection(("127.0.0.1", tap.port), timeout=5)
            criu.add(PID, 0, b"r" * PAGE)
            criu.end()

    session.run(dump)
    [_, (*_, data), *_] = parse(read_all(tap))
    assert data == b"r" * PAGE
    assert len(asked) == 1 + 3 + 1 + 1, "a row that is not there is looked for again"


@pytest.mark.timeout(20)
def test_a_flood_of_others_does_not_hold_it(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    tap = session.tap(timeout_s=0.3)
    closed = session.tap(timeout_s=30)
    monkeypatch.setattr(loopback, "accept", lambda listener: None)  # there is always one more
    with socket.create_connection(("127.0.0.1", tap.port), timeout=5), socket.create_connection(("127.0.0.1", closed.port), timeout=5):
        with pytest.raises(TransferFailed, match="did not connect"):
            read_all(tap)
        session.run(lambda: (time.sleep(0.1), closed.close()))
        with pytest.raises(TransferFailed, match="was closed"):
            read_all(closed)


def test_the_owner_of_a_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as client:
        here = listener.getsockname()
        client.bind(("127.0.0.1", 0))
        end = client.getsockname()
        assert procnet.connection_uid(end, here) is None
        client.connect(here)
        server, _ = listener.accept()
        with server:
            assert procnet.connection_uid(end, here) == procnet.connection_uid(here, end) == os.getuid()
            # Closed by its owner: the kernel says "uid 0" of it, which must not let anybody in.
            client.close()
            assert procnet.connection_uid(end, here) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_the_owner_is_who_made_the_socket(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    tap = session.tap(timeout_s=0.5)
    os.seteuid(65534)
    try:
        stranger = Criu(tap, NEW)
    finally:
        os.seteuid(0)
    with pytest.raises(TransferFailed, match="did not connect"):
        read_all(tap)
    assert stranger.answer(1) == b""


def test_what_depends_on_the_version() -> None:
    sizes = {v: header_of(v).size for v in ("3.17.1", "4.0", "4.1.1", "4.2", "4.2.1", "4.10", "5.0")}
    assert sizes == {"3.17.1": 24, "4.0": 24, "4.1.1": 24, "4.2": 32, "4.2.1": 32, "4.10": 32, "5.0": 32}
    with pytest.raises(Bug):
        header_of("")
    assert config_lines(4711) == ["page-server", "address 127.0.0.1", "port 4711"]
