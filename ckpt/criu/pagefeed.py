"""The server's end of CRIU's lazy pages: answers a lazy-pages daemon that asks for the memory of a restored tree.

Protocol (criu/page-xfer.c; headers as in pageserver.py): the daemon sends GET with the pid as `dst_id`, an address and a count; the answer is
a header ADD with PE_PRESENT, the same pid and address, a count that may be smaller (the daemon asks again for the rest), and the pages. At its
end it sends CLOSE and waits for an i32 status.

CRIU's daemon can read local images too, but not those with a parent: pages of a parent never reach the process (pagemap.c calls
`io_complete` of the parent's page_read, which uffd.c does not set; CRIU 4.2.1). Hence `PageFiles`.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from ckpt.criu import loopback
from ckpt.criu.bindings import load
from ckpt.criu.pageserver import header_of
from ckpt.criu.pagestream import PAGE_BYTES, PE_LAZY, PE_PARENT, PE_PRESENT
from ckpt.errors import RestoreFailed

SEND_BUFFER_BYTES: Final = 4 << 20
ANSWER_PAGES: Final = 1024
"""At most in one answer. CRIU's daemon asks for up to 4 MiB, and a page fault has to wait for the answer before it."""
_ADD_F, _GET = 6, 7
_CLOSE, _FORCE_CLOSE = 0x1023, 0x1024
_COMMAND_MASK, _FLAGS_SHIFT = 0xFFFF, 16
_STATUS: Final = struct.pack("=i", 0)
_MAGIC_BYTES: Final = 8
_PAGES_CAP: Final = 1 << 36


class Asked(NamedTuple):
    """What a daemon wants: pages of the process `pid` (in its own pid namespace)."""

    pid: int
    vaddr: int
    nr_pages: int


class Feed:
    """A loopback port for one lazy-pages daemon of this host. `serve` answers it; any thread may `close`.

    Args:
        criu_version: of the CRIU that runs the daemon.

    Raises:
        OSError: no socket to be had.
    """

    def __init__(self, criu_version: str) -> None:
        self._header = header_of(criu_version)
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None
        self._closed = False
        self.done = False
        """The daemon said that it has everything."""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._listener = loopback.listen(SEND_BUFFER_BYTES)
        self.port: int = self._listener.getsockname()[1]

    def connect(self) -> bool:
        """Wait for the daemon; False when this was closed before it came."""
        poller = select.poll()
        with self._lock:
            if self._closed:
                return False
            poller.register(self._listener, select.POLLIN)
        poller.register(self._wake, select.POLLIN)
        while True:
            poller.poll()
            with self._lock:
                if self._closed:
                    return False
                try:
                    connection = loopback.accept(self._listener)
                except BlockingIOError:
                    continue
                if connection is None:
                    continue
                connection.setblocking(True)
                self._connection = connection
                self._listener.close()
                return True

    def asked(self) -> Iterator[Asked]:
        """What the daemon asks for, until it is through (`done`) or gone."""
        head = bytearray(self._header.size)
        while self._connection is not None and self._receive(memoryview(head)):
            command, nr_pages, vaddr, image_id = self._header.unpack(head)
            if command in (_CLOSE, _FORCE_CLOSE):
                self.done = True
                self.send(_STATUS)
                return
            if command & _COMMAND_MASK != _GET or not 0 < nr_pages < _PAGES_CAP:
                return
            yield Asked(image_id, vaddr, nr_pages)

    def answer(self, asked: Asked, nr_pages: int) -> bytes:
        """The header before `nr_pages` pages."""
        return self._header.pack(_ADD_F | PE_PRESENT << _FLAGS_SHIFT, nr_pages, asked.vaddr, asked.pid)

    def send(self, data: bytes | memoryview) -> None:
        """Raises OSError when the daemon is gone."""
        if self._connection is None:
            raise BrokenPipeError
        self._connection.sendall(data)

    def send_file(self, fd: int, offset: int, count: int) -> None:
        """Send a part of a file without reading it. Raises OSError."""
        if self._connection is None:
            raise BrokenPipeError
        while count:
            sent = os.sendfile(self._connection.fileno(), fd, offset, count)
            if not sent:
                raise BrokenPipeError
            offset += sent
            count -= sent

    def close(self) -> None:
        """End it: a daemon that is not through fails. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
            self._listener.close()
            if self._connection is not None:
                try:
                    self._connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it is gone

    def _receive(self, view: memoryview) -> bool:
        assert self._connection is not None
        while view:
            try:
                count = self._connection.recv_into(view)
            except OSError:
                return False
            if not count:
                return False
            view = view[count:]
        return True


class Piece(NamedTuple):
    """A part of a file: descriptor, offset and length in bytes."""

    fd: int
    offset: int
    length: int


class Source(Protocol):
    """Where pages are."""

    def pieces(self, pid: int, vaddr: int, nr_pages: int) -> Sequence[Piece | memoryview]:
        """The pages from `vaddr` on, as many as there are without a gap, at most `nr_pages`. Raises OSError: they are lost."""


class _Layer:
    """The runs of one image in one set of images: their addresses, counts of pages, and offsets in its pages file (-1: in the parent).

    `fd` is the pages file, as `PageFiles._open` made it.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.starts = array("Q")
        self.counts = array("Q")
        self.offsets = array("q")


class PageFiles:
    """The memory pages of a chain of CRIU images (each with its parent), the newest first.

    Raises:
        RestoreFailed: an image cannot be read.
    """

    def __init__(self, newest: Path) -> None:
        self._images: dict[int, list[_Layer]] = {}
        self._fds: list[int] = []
        directory = newest
        try:
            while True:
                for pagemap in directory.glob("pagemap-[0-9]*.img"):
                    self._images.setdefault(_pid_of(pagemap), []).append(self._read(pagemap))
                parent = directory / "parent"
                if not parent.is_symlink():
                    return
                directory = parent.resolve()
        except (OSError, ValueError, struct.error) as error:
            self.close()
            raise RestoreFailed(f"the memory in {directory.name} cannot be read: {error}") from error

    def close(self) -> None:
        """Close the files."""
        while self._fds:
            os.close(self._fds.pop())

    def _open(self, pages: Path) -> int:
        fd = os.open(pages, os.O_RDONLY | os.O_CLOEXEC)
        self._fds.append(fd)
        return fd

    def _read(self, pagemap: Path) -> _Layer:
        layer: _Layer | None = None
        offset = 0
        for entry in entries_of(pagemap):
            if layer is None:
                layer = _Layer(self._open(pagemap.with_name(f"pages-{entry.pages_id}.img")))
                continue
            count = pages_of(entry)
            layer.starts.append(entry.vaddr)
            layer.counts.append(count)
            layer.offsets.append(-1 if entry.flags & PE_PARENT else offset)
            if not entry.flags & PE_PARENT:
                offset += count * PAGE_BYTES
        if layer is None:
            raise ValueError("an empty pagemap")
        return layer

    def pieces(self, pid: int, vaddr: int, nr_pages: int) -> list[Piece]:
        """The pages from `vaddr` on, as many as there are without a gap, at most `nr_pages`."""
        found: list[Piece] = []
        self._collect(self._images.get(pid, []), vaddr, nr_pages, found)
        return found

    def _collect(self, layers: Sequence[_Layer], vaddr: int, nr_pages: int, found: list[Piece]) -> bool:
        """Append the pieces; False when there is a gap."""
        if not layers:
            return False
        layer = layers[0]
        at = bisect_right(layer.starts, vaddr) - 1
        while nr_pages:
            if at < 0 or at >= len(layer.starts):
                return False
            skipped = (vaddr - layer.starts[at]) // PAGE_BYTES
            if not 0 <= skipped < layer.counts[at]:
                return False
            count = min(layer.counts[at] - skipped, nr_pages)
            if layer.offsets[at] < 0:
                if not self._collect(layers[1:], vaddr, count, found):
                    return False
            else:
                found.append(Piece(layer.fd, layer.offsets[at] + skipped * PAGE_BYTES, count * PAGE_BYTES))
            vaddr += count * PAGE_BYTES
            nr_pages -= count
            at += 1
        return True

    def require(self, images_dir: Path) -> None:
        """Make sure that every page is here that these images, of a dump whose memory stayed, leave to the lazy-pages daemon.

        Raises:
            RestoreFailed: one is missing, or the images are damaged.
        """
        for pid, vaddr, count in lazy_runs(images_dir):
            got = sum(piece.length for piece in self.pieces(pid, vaddr, count)) // PAGE_BYTES
            if got != count:
                raise RestoreFailed(f"memory of process {pid} is missing: {count - got} pages from {vaddr + got * PAGE_BYTES:#x} on")


def lazy_runs(images_dir: Path) -> Iterator[tuple[int, int, int]]:
    """The pages that these images leave to the lazy-pages daemon, as (pid, address, count). Raises RestoreFailed: damaged."""
    for pagemap in images_dir.glob("pagemap-[0-9]*.img"):
        pid = _pid_of(pagemap)
        try:
            for number, entry in enumerate(entries_of(pagemap)):
                if number and entry.flags & PE_LAZY:
                    yield pid, entry.vaddr, pages_of(entry)
        except (OSError, ValueError, struct.error) as error:
            raise RestoreFailed(f"{pagemap.name} cannot be read: {error}") from error


def serve(feed: Feed, source: Source) -> None:
    """Answer a daemon until it is through or gone, or asks for what is not there: then it fails."""
    try:
        for asked in feed.asked():
            pieces = source.pieces(asked.pid, asked.vaddr, min(asked.nr_pages, ANSWER_PAGES))
            if not pieces:
                return
            lengths = (piece.length if isinstance(piece, Piece) else len(piece) for piece in pieces)
            feed.send(feed.answer(asked, sum(lengths) // PAGE_BYTES))
            for piece in pieces:
                if isinstance(piece, Piece):
                    feed.send_file(*piece)
                else:
                    feed.send(piece)
    except OSError:
        pass  # the daemon is gone; its exit status tells
    finally:
        feed.close()


def start(feed: Feed, source: Source, *, then: Callable[[], None] = lambda: None) -> threading.Thread:
    """`connect` and `serve` in a thread of its own."""

    def body() -> None:
        if feed.connect():
            serve(feed, source)
        then()

    thread = threading.Thread(target=body, name="ckpt-pagefeed", daemon=True)
    thread.start()
    return thread


def pages_of(entry: Any) -> int:
    """The count of a pagemap_entry: `nr_pages`, u64 since CRIU 4.2, where the u32 of before became `compat_nr_pages`."""
    count = int(entry.nr_pages or getattr(entry, "compat_nr_pages", 0))
    if not 0 < count < _PAGES_CAP:
        raise ValueError(f"{count} pages")
    return count


def _pid_of(pagemap: Path) -> int:
    return int(pagemap.name.removeprefix("pagemap-").removesuffix(".img"))


def entries_of(pagemap: Path) -> Iterator[Any]:
    """The head of a pagemap image, then its entries (see pagestream.py). Raises OSError, ValueError, struct.error."""
    pb: Any = load("images.pagemap_pb2")
    data = pagemap.read_bytes()
    at, kind = _MAGIC_BYTES, pb.pagemap_head
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        at += 4
        if at + length > len(data):
            raise ValueError("cut short")
        entry = kind()
        try:
            entry.ParseFromString(data[at : at + length])
        except Exception as error:  # protobuf's DecodeError, whose class depends on its implementation
            raise ValueError(str(error)) from error
        yield entry
        at += length
        kind = pb.pagemap_entry
