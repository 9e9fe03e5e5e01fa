"""The source's end of a page stream: a page server that CRIU connects to, read as a file.

Protocol (criu/page-xfer.c): CRIU sends a header (u32 command, with PE_* flags in its upper half; count of pages; u64 address; u64
dst_id) in its host's byte order, and after ADD with PE_PRESENT the pages. The count is a u32 up to CRIU 4.1.1 (24 bytes in all) and
a u64, with 4 bytes of padding before it, from 4.2 (32 bytes). Nothing tells the two apart in advance, so this end must know.
Answers: one byte after OPEN2 (is there a parent?), an i32 after PARENT (the same) and after CLOSE and FORCE_CLOSE (a status: 0).
"""

from __future__ import annotations

import os
import re
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Container, Sequence
from typing import Final

from ckpt.criu import loopback
from ckpt.criu.pagestream import PAGE_BYTES, PE_LAZY, PE_PARENT, PE_PRESENT, Kind, check_page_size, pagemap_name, record
from ckpt.errors import Bug, TransferFailed

CHUNK_BYTES: Final = 1 << 20
RECEIVE_BUFFER_BYTES: Final = 4 << 20
HEADER_WAIT_S: Final = 3.0
"""CRIU sends a header in one piece over loopback; a part of one that stays a part is a header of another size."""

_ADD, _HOLE, _OPEN, _OPEN2, _PARENT, _ADD_F = 1, 2, 3, 4, 5, 6
_CLOSE, _FORCE_CLOSE = 0x1023, 0x1024
_COMMAND_MASK, _FLAGS_SHIFT = 0xFFFF, 16
_NARROW, _WIDE = struct.Struct("=IIQQ"), struct.Struct("=I4xQQQ")

Compare = Callable[[int, int, memoryview], Sequence[tuple[int, int, bool]]]
"""Called with image_id, vaddr and whole pages (at most 1 MiB, good only until it returns); says for each run of them, in order and
without a gap: its first page, counted from 0, how many, and whether they changed. What did not change is sent as PARENT."""


def config_lines(port: int) -> list[str]:
    """What CRIU's configuration file (CRIU_CONFIG_FILE) needs to send its pages to a PageTap."""
    return ["page-server", f"address {loopback.ADDRESS}", f"port {port}"]


def header_of(criu_version: str) -> struct.Struct:
    """The header of a CRIU ("4.1.1": 24 bytes, "4.2": 32). Raises Bug for what is no version."""
    if not (found := re.match(r"(\d+)\.(\d+)", criu_version)):
        raise Bug(f"no version of CRIU: {criu_version!r}")
    return _WIDE if (int(found[1]), int(found[2])) >= (4, 2) else _NARROW


class PageTap:
    """A page server on a loopback port whose pages are read from it as a stream of records (see pagestream).

    It listens from the start; the first connection by a process of root is CRIU's, connections by others are closed. One thread
    reads; any may call `close`, which also makes CRIU fail if it has not finished.

    END says that CRIU closed the stream in order. It does so when its dump *failed* for another reason than the pages too:
    whether there is a dump is for CRIU's result to say.

    Args:
        criu_version: of the CRIU that will connect ("4.2.1", as features.version_text() has it).
        timeout_s: how long to wait each time that CRIU (or, first, its connection) does not come.
        parents: image ids that the parent images have; CRIU, tracking changes, sends those as PARENT where nothing changed.
        compare: finds the pages that changed, for a CRIU that tracks nothing. Costs a copy.

    Raises:
        FeatureMissing: this kernel's pages have another size than the stream's.
        OSError: no socket to be had.
    """

    def __init__(self, criu_version: str, *, timeout_s: float = 60.0, parents: Container[int] = (), compare: Compare | None = None) -> None:
        check_page_size()
        self._header = header_of(criu_version)
        self._timeout_s = timeout_s
        self._parents_of = parents
        self._compare = compare
        self._reading = threading.Lock()
        self._gate = threading.Lock()
        """Guards `_wake` against being closed while another thread writes to it."""
        self._closed = False
        self._failure = ""
        self._finished = self._flushed = self._connected = self._spoken = False
        self._head = memoryview(bytearray(self._header.size))
        self._have = 0
        self._out: deque[memoryview] = deque()
        """What goes to the reader before anything more is received."""
        self._left = 0
        self._vaddr = self._flags = self._image = 0
        self._chunk = memoryview(bytearray(CHUNK_BYTES if compare else 0))
        self._chunk_have = 0
        self._pages = self._parents = 0
        self._connection: socket.socket | None = None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._listener: socket.socket | None = None
        try:
            self._listener = loopback.listen(RECEIVE_BUFFER_BYTES)
            self.port: int = self._listener.getsockname()[1]
        except BaseException:
            self.close()
            raise

    @property
    def pages(self) -> int:
        """Pages that CRIU sent so far (announced, with data)."""
        return self._pages

    @property
    def pages_bytes(self) -> int:
        """Bytes of page data that CRIU sent so far."""
        return self._pages * PAGE_BYTES - self._left

    @property
    def parents(self) -> int:
        """Pages emitted as PARENT so far."""
        return self._parents

    @property
    def connected(self) -> bool:
        """CRIU has connected."""
        return self._connected

    def readinto(self, buffer: bytearray | memoryview, /) -> int:
        """Put the next bytes of the stream into `buffer`, at least one; 0 after the END.

        Raises:
            TransferFailed: CRIU went away before the end, spoke another language or was silent for too long, or this was closed.
        """
        view = memoryview(buffer).cast("B")
        with self._reading:
            if self._failure:
                raise TransferFailed(self._failure)
            try:
                return self._fill(view)
            except OSError as error:
                self._give_up(f"the connection with CRIU broke: {error.strerror}: the dump failed")
                raise TransferFailed(self._failure) from error
            except BaseException as error:
                self._give_up(error.message if isinstance(error, TransferFailed) else "the page stream broke off")
                raise

    def close(self) -> None:
        """Close everything; a reader that waits ends at once with TransferFailed, and CRIU's dump fails. May be called twice."""
        self._closed = True
        with self._gate:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)
        with self._reading:
            self._give_up("")
            with self._gate:
                if self._wake >= 0:
                    os.close(self._wake)
                    self._wake = -1

    def __enter__(self) -> PageTap:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _give_up(self, message: str) -> None:
        self._failure = self._failure or message
        for end in (self._connection, self._listener):
            if end is not None:
                end.close()
        self._connection = self._listener = None

    # ---------------------------------------------------------------- the stream

    def _fill(self, view: memoryview) -> int:
        """Fill the view as far as that needs no waiting, but with one byte at least."""
        at = 0
        while at < len(view):
            if self._out:
                at += self._give(view[at:])
                continue
            if self._finished:
                break
            if self._closed:
                raise TransferFailed("the page server was closed before CRIU had sent everything")
            if self._connection is None:
                self._connection = self._accept()
            if not self._left:
                ready = self._read_header()
            elif self._compare is None:
                ready = (count := self._receive(view[at : at + self._left])) >= 0
                at += max(count, 0)
            else:
                ready = self._read_chunk(self._compare)
            if not ready:
                if at:
                    break
                self._wait(self._connection)
        return at

    def _give(self, view: memoryview) -> int:
        piece = self._out[0]
        count = min(len(piece), len(view))
        view[:count] = piece[:count]
        if count < len(piece):
            self._out[0] = piece[count:]
        else:
            self._out.popleft()
        return count

    def _emit(self, kind: Kind, vaddr: int = 0, nr_pages: int = 0, *, flags: int = 0) -> None:
        image = 0 if kind is Kind.END else self._image
        self._out.append(memoryview(record(kind, image, vaddr, nr_pages, flags=flags)))

    def _receive(self, into: memoryview) -> int:
        """Receive page data, and with the last of it the beginning of the next header; how much data came, -1 for nothing yet."""
        assert self._connection is not None
        try:
            if len(into) == self._left:
                count = self._connection.recvmsg_into([into, self._head])[0]
            else:
                count = self._connection.recv_into(into)
        except BlockingIOError:
            return -1
        if not count:
            raise _broke_off()
        data = min(count, len(into))
        self._have = count - data
        self._left -= data
        return data

    def _read_chunk(self, compare: Compare) -> bool:
        """Receive a part of a chunk, and pass on what became whole; False when nothing came."""
        whole = min(self._chunk_have + self._left, len(self._chunk))
        if (count := self._receive(self._chunk[self._chunk_have : whole])) < 0:
            return False
        self._chunk_have += count
        if self._chunk_have < whole:
            return True
        position = 0
        for first, pages, changed in compare(self._image, self._vaddr, self._chunk[:whole]):
            end = (first + pages) * PAGE_BYTES
            if first * PAGE_BYTES != position or pages <= 0 or end > whole:
                raise Bug(f"the comparison of pages has a run of {pages} at {first}, after {position // PAGE_BYTES} pages")
            vaddr = self._vaddr + position
            if changed:
                self._emit(Kind.PAGES, vaddr, pages, flags=self._flags)
                self._out.append(self._chunk[position:end])
            else:
                self._emit(Kind.PARENT, vaddr, pages, flags=PE_PARENT)
                self._parents += pages
            position = end
        if position != whole:
            raise Bug(f"the comparison of pages leaves out the last {(whole - position) // PAGE_BYTES} of them")
        self._vaddr += whole
        self._chunk_have = 0
        return True

    # ---------------------------------------------------------------- CRIU's commands

    def _read_header(self) -> bool:
        """Receive (a part of) a header and act on a whole one; False when nothing came."""
        assert self._connection is not None
        if self._have < len(self._head):
            try:
                count = self._connection.recv_into(self._head[self._have :])
            except BlockingIOError:
                self._suspect_size()
                return False
            if not count:
                if self._flushed and not self._have:
                    self._finish()
                    return True
                raise _broke_off()
            self._have += count
            if self._have < len(self._head):
                return True
        self._have = 0
        self._command(*self._header.unpack(self._head))
        return True

    def _suspect_size(self) -> None:
        """The first header of a CRIU up to 4.1.1 where 32 bytes are due: dst_id stands where the address is, which OPEN2 has not."""
        if not self._spoken and self._header is _WIDE and self._have == _NARROW.size:
            command, count, vaddr, image_id = _NARROW.unpack(self._head[: _NARROW.size])
            if command in (_OPEN, _OPEN2, _PARENT) and not count and not vaddr and pagemap_name(image_id):
                raise _wrong_size()

    def _command(self, word: int, nr_pages: int, vaddr: int, image_id: int) -> None:
        command, flags = word & _COMMAND_MASK, word >> _FLAGS_SHIFT
        first, self._spoken = not self._spoken, True
        self._flushed = False
        if command in (_CLOSE, _FORCE_CLOSE):
            self._answer(struct.pack("=i", 0))
            self._flushed = True
            if command == _FORCE_CLOSE:
                self._finish()
        elif pagemap_name(image_id) is None:
            raise _wrong_size() if first else _nonsense(word, image_id)
        elif command in (_OPEN, _OPEN2, _PARENT):
            if nr_pages or vaddr:
                raise _wrong_size() if first else _nonsense(word, image_id)
            there = image_id in self._parents_of
            if command == _PARENT:
                self._answer(struct.pack("=i", there))
                return
            self._close_image()
            self._image = image_id
            self._emit(Kind.OPEN)
            if command == _OPEN2:
                self._answer(struct.pack("=?", there))
        elif command in (_ADD, _HOLE, _ADD_F):
            self._add(word, {_ADD: PE_PRESENT, _HOLE: PE_PARENT}.get(command, flags), nr_pages, vaddr, image_id)
        else:
            raise _wrong_size() if first else _nonsense(word, image_id)

    def _add(self, word: int, flags: int, nr_pages: int, vaddr: int, image_id: int) -> None:
        if image_id != self._image or not nr_pages or vaddr % PAGE_BYTES or vaddr + nr_pages * PAGE_BYTES > 1 << 64:
            raise _nonsense(word, image_id)
        if flags & PE_PRESENT and not flags & ~(PE_PRESENT | PE_LAZY):
            self._left = nr_pages * PAGE_BYTES
            self._pages += nr_pages
            self._vaddr, self._flags = vaddr, flags
            if self._compare is None:
                self._emit(Kind.PAGES, vaddr, nr_pages, flags=flags)
        elif flags == PE_PARENT:
            self._parents += nr_pages
            self._emit(Kind.PARENT, vaddr, nr_pages, flags=PE_PARENT)
        else:  # PE_LAZY alone: the pages stay in CRIU, to be asked for later
            raise _nonsense(word, image_id)

    def _close_image(self) -> None:
        if self._image:
            self._emit(Kind.CLOSE)
            self._image = 0

    def _finish(self) -> None:
        self._close_image()
        self._emit(Kind.END)
        self._finished = True
        assert self._connection is not None
        self._connection.close()

    def _answer(self, data: bytes) -> None:
        assert self._connection is not None
        self._connection.sendall(data)

    # ---------------------------------------------------------------- waiting

    def _accept(self) -> socket.socket:
        until = time.monotonic() + self._timeout_s
        while self._listener is not None:
            self._wait(self._listener, until - time.monotonic())
            try:
                connection = loopback.accept(self._listener)
            except (BlockingIOError, ConnectionAbortedError):
                continue
            if connection is not None:
                self._listener.close()
                self._listener = None
                self._connected = True
                return connection
        raise Bug("the page server accepts twice")

    def _wait(self, on: socket.socket, timeout_s: float | None = None) -> None:
        """Wait until the socket can be read. Raises TransferFailed when it takes too long, or the tap is closed."""
        partial = 0 < self._have < len(self._head)
        if timeout_s is None:
            timeout_s = min(self._timeout_s, HEADER_WAIT_S) if partial else self._timeout_s
        poll = select.poll()
        poll.register(on, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        ready = poll.poll(max(timeout_s, 0) * 1000)
        if self._closed:
            raise TransferFailed("the page server was closed before CRIU had sent everything")
        if ready and timeout_s > 0:  # many connections by others must not keep us here
            return
        if partial:
            raise _wrong_size()
        if on is self._listener:
            raise TransferFailed(f"CRIU did not connect to send its pages in {self._timeout_s:g} s")
        raise TransferFailed(f"CRIU sent nothing for {self._timeout_s:g} s")


def _broke_off() -> TransferFailed:
    return TransferFailed("CRIU closed the page stream before its end: the dump failed")


def _wrong_size() -> TransferFailed:
    return TransferFailed(
        "what connected to the page server speaks another version of CRIU's protocol than the CRIU of this host",
        hint="is there a second CRIU, used by the container runtime? `ckpt check` names the one that ckpt uses",
    )


def _nonsense(word: int, image_id: int) -> TransferFailed:
    return TransferFailed(f"CRIU sent something unexpected to the page server (command {word:#x}, image {image_id:#x})")
