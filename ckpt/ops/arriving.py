"""Post-copy, on the destination: the keeper's `Arriving` and the peer's `bridge` (see postcopy.py for the words between them)."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from bisect import bisect_right, insort
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from ckpt.criu.pagefeed import Piece, lazy_runs
from ckpt.criu.pagestream import PAGE_BYTES
from ckpt.errors import CkptError, TransferFailed
from ckpt.ops.postcopy import BLOCK_PAGES, END, MEMBER, SWITCH_S, WORDS
from ckpt.peer.server import Session

SOCKET: Final = "memory.sock"
"""In the job's directory: where the keeper of the memory waits for a bridge."""
PATIENCE_S: Final = 600.0
EARLY_PATIENCE_S: Final = 15.0
"""Before the switchover nothing is lost by giving up."""
CONNECT_LIMIT_S: Final = 60.0
"""For the keeper to come: the restore starts it."""
ASKED_CAP_PAGES: Final = 1024
_TICK_S: Final = 0.5
_LAST_WORDS_S: Final = 10.0
_CONNECT_S: Final = 0.005
_ACK_BYTES: Final = 256 << 10


class Arriving:
    """The keeper's end: memory that arrives, kept in a file; a `pagefeed.Source`.

    Args:
        job_dir: gets the socket.
        images_dir: the CRIU images of the restore: they say which pages are needed.
        store_dir: where the file is, which has no name.
        patience_s: without a bridge for so long, it is over; asked again and again.
    """

    def __init__(self, job_dir: Path, images_dir: Path, store_dir: Path, *, patience_s: Callable[[], float]) -> None:
        self._patience_s = patience_s
        self._images_dir = images_dir
        self._file = os.open(store_dir, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._end = 0
        self._blocks: dict[int, list[tuple[int, int, int]]] = {}
        """For each pid, ascending: address, count of pages, offset in the file."""
        self._changed = threading.Condition()
        self._bridge: socket.socket | None = None
        self._over = ""
        self._wanted: set[tuple[int, int, int]] = set()
        path = job_dir / SOCKET
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self._listener.bind(os.fspath(path))
        finally:
            os.umask(before)
        self._listener.listen(4)
        threading.Thread(target=self._run, name="ckpt-arriving", daemon=True).start()

    def close(self) -> None:
        """Nobody needs it any more: end the bridge, and take no other."""
        with self._changed:
            self._over = self._over or "it is not needed any more"
            self._changed.notify_all()
            if self._bridge is not None:
                with suppress(OSError):
                    self._bridge.shutdown(socket.SHUT_RDWR)

    def pieces(self, pid: int, vaddr: int, nr_pages: int) -> list[Piece]:
        """The pages from `vaddr` on that are here, at most `nr_pages`; waits for the first one. None: it will not come."""
        with self._changed:
            while not (found := self._here(pid, vaddr, nr_pages)):
                if self._over:
                    return []
                want = (pid, vaddr, min(nr_pages, BLOCK_PAGES))
                if want not in self._wanted:
                    self._wanted.add(want)
                    self._say(WORDS.pack(*want))
                self._changed.wait()
            self._wanted.discard((pid, vaddr, min(nr_pages, BLOCK_PAGES)))
            return found

    def _here(self, pid: int, vaddr: int, nr_pages: int) -> list[Piece]:
        blocks = self._blocks.get(pid, [])
        found: list[Piece] = []
        at = bisect_right(blocks, vaddr, key=_start) - 1
        while nr_pages and 0 <= at < len(blocks):
            start, count, offset = blocks[at]
            skipped = (vaddr - start) // PAGE_BYTES
            if not 0 <= skipped < count:
                break
            taken = min(count - skipped, nr_pages)
            found.append(Piece(self._file, offset + skipped * PAGE_BYTES, taken * PAGE_BYTES))
            vaddr += taken * PAGE_BYTES
            nr_pages -= taken
            at += 1
        return found

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        reason = "its source did not come back"
        try:
            while not self._over and self._wait(poller):
                bridge, _ = self._listener.accept()
                with bridge:
                    bridge.settimeout(None)
                    with self._changed:
                        if self._over:
                            return
                        self._bridge = bridge
                        self._say(WORDS.pack(0, 0, 1))  # begin
                        for want in self._wanted:
                            self._say(WORDS.pack(*want))
                    complete = self._receive_all(bridge)
                    with self._changed:
                        self._bridge = None
                if complete:
                    reason = "it is not in the memory of the source"
                    return
        except OSError as error:
            reason = str(error)
        finally:
            self._listener.close()
            with self._changed:
                self._over = self._over or reason
                self._changed.notify_all()

    def _wait(self, poller: select.poll) -> bool:
        """Wait for a bridge; False when none came for too long."""
        since_s = time.monotonic()
        while not poller.poll(1000 * _TICK_S):
            if self._over:
                return False
            if time.monotonic() - since_s > self._patience_s():
                return False
        return True

    def _receive_all(self, bridge: socket.socket) -> bool:
        """Take what one bridge brings; whether that was all."""
        buffer = memoryview(bytearray(ASKED_CAP_PAGES * PAGE_BYTES))
        head = memoryview(bytearray(WORDS.size))
        got = told = 0
        while _receive(bridge, head):
            pid, vaddr, count = WORDS.unpack(head)
            if not count:
                missing = self._missing()
                if not missing:
                    with self._changed:
                        self._say(END)
                    return True
                for want in missing:  # what the source did not find by itself; it says again when that was all
                    with self._changed:
                        self._say(WORDS.pack(*want))
                with self._changed:
                    self._say(WORDS.pack(0, got, 1))
                continue
            if count > ASKED_CAP_PAGES or vaddr % PAGE_BYTES or not _receive(bridge, data := buffer[: count * PAGE_BYTES]):
                return False
            try:
                self._store(pid, vaddr, count, data)
            except OSError:
                return False  # a full disk: the source is told to try again, and there is time to make room
            got += count * PAGE_BYTES
            if got - told >= _ACK_BYTES:
                told = got
                with self._changed:
                    self._say(WORDS.pack(0, got, 1))
        return False

    def _store(self, pid: int, vaddr: int, count: int, data: memoryview) -> None:
        """Keep what is new of it; after a break the source sends everything again. Raises OSError."""
        with self._changed:
            here = self._here(pid, vaddr, count)
        if sum(piece.length for piece in here) == len(data):
            return
        done = 0
        while done < len(data):  # a disk that is nearly full takes a part
            done += os.pwrite(self._file, data[done:], self._end + done)
        with self._changed:
            self._add(pid, vaddr, count)
            self._changed.notify_all()

    def _add(self, pid: int, vaddr: int, count: int) -> None:
        """Note the pages that were written to the file's end, but for those that are here already: the tree may have them, changed, by now."""
        blocks = self._blocks.setdefault(pid, [])
        offset, self._end = self._end, self._end + count * PAGE_BYTES
        while count:
            at = bisect_right(blocks, vaddr, key=_start) - 1
            fresh = count
            if at >= 0:
                start, here, _ = blocks[at]
                known = min(max(0, start + here * PAGE_BYTES - vaddr) // PAGE_BYTES, count)
                vaddr, offset, count = vaddr + known * PAGE_BYTES, offset + known * PAGE_BYTES, count - known
                fresh = count
            if count and at + 1 < len(blocks):
                fresh = min(count, (blocks[at + 1][0] - vaddr) // PAGE_BYTES)
            if fresh:
                insort(blocks, (vaddr, fresh, offset))
                vaddr, offset, count = vaddr + fresh * PAGE_BYTES, offset + fresh * PAGE_BYTES, count - fresh

    def _missing(self) -> list[tuple[int, int, int]]:
        """The first pages that are needed and not here."""
        found: list[tuple[int, int, int]] = []
        with self._changed:
            for pid, vaddr, count in lazy_runs(self._images_dir):
                while count:
                    here = sum(piece.length for piece in self._here(pid, vaddr, count)) // PAGE_BYTES
                    vaddr, count = vaddr + here * PAGE_BYTES, count - here
                    if count:
                        found.append((pid, vaddr, 1))
                        vaddr, count = vaddr + PAGE_BYTES, count - 1
                    if len(found) == ASKED_CAP_PAGES:
                        return found
        return found

    def _say(self, words: bytes) -> None:
        """With the lock held. A bridge that is gone is noticed by its reader."""
        if self._bridge is not None:
            with suppress(OSError):
                self._bridge.sendall(words)


def _start(block: tuple[int, int, int]) -> int:
    return block[0]


def _receive(source: socket.socket, view: memoryview) -> bool:
    while view:
        try:
            count = source.recv_into(view, 0, socket.MSG_WAITALL)
        except OSError:
            return False
        if not count:
            return False
        view = view[count:]
    return True


class _Bridge:
    """Between the link and the keeper. The keeper comes later than the bridge: the restore starts it."""

    def __init__(self, session: Session, job_dir: Path) -> None:
        self._session = session
        self._path = job_dir / SOCKET
        self._keeper = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connected = threading.Event()
        self._stop = threading.Event()
        self.complete = False
        """The keeper has everything."""
        self._thread = threading.Thread(target=self._run, name="ckpt-bridge", daemon=True)
        self._thread.start()

    def write(self, data: bytes | memoryview, /) -> int:
        """What comes over the link goes to the keeper."""
        if not self._connected.is_set():
            raise TransferFailed("memory came that nobody asked for")
        try:
            self._keeper.sendall(data)
        except OSError:
            # A keeper that has everything closes, and the source may have sent something before it heard of that.
            self._thread.join(_LAST_WORDS_S)
            if not self.complete:
                raise
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None:
        """End both directions."""
        self._stop.set()
        with suppress(OSError):
            self._keeper.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._keeper.close()

    def _run(self) -> None:
        try:
            if not self._connect():
                if not self._stop.is_set():
                    self._session.tell({"done": False})
                return
            while len(head := self._keeper.recv(WORDS.size, socket.MSG_WAITALL)) == WORDS.size:
                pid, vaddr, nr_pages = WORDS.unpack(head)
                self.complete = not nr_pages
                if pid:
                    self._session.tell({"pid": pid, "vaddr": vaddr, "pages": nr_pages})
                else:
                    self._session.tell({"done": True} if self.complete else {"got": vaddr})
            if not self.complete and not self._stop.is_set():
                self._session.tell({"done": False})
        except (OSError, CkptError):
            pass  # either end is gone, which the other direction notices too

    def _connect(self) -> bool:
        end_s = time.monotonic() + CONNECT_LIMIT_S
        while not self._stop.wait(_CONNECT_S) and time.monotonic() < end_s:
            with suppress(FileNotFoundError, ConnectionRefusedError):
                self._keeper.connect(os.fspath(self._path))
                self._connected.set()
                return True
        return False


def bridge(session: Session, job_dir: Path) -> dict[str, Any]:
    """The peer's handler: carry memory to the keeper of the job until it has all, or the source gives up.

    Returns:
        `{"complete": True}` when the keeper has all memory.
    """
    sys.setswitchinterval(SWITCH_S)
    between = _Bridge(session, job_dir)
    try:
        sinks = {MEMBER: cast(BinaryIO, between)}
        session.receive_files(job_dir, allow=lambda path: path == MEMBER, sinks=sinks)
    finally:
        between.close()
    return {"complete": between.complete}
