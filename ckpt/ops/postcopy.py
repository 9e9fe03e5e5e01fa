"""Post-copy: the workload runs on the destination before its memory is there; the memory follows, on demand and in the background.

    source                              destination
    frozen tree, read from outside      `ckpt peer`                     keeper of the memory
    Follow  --- WORDS, pages ---------> bridge  --- WORDS, pages -----> Arriving --> CRIU's lazy-pages daemon --> userfaultfd
            <-- what is wanted, got --          <-- WORDS, on a socket

The source pushes block after block; what a page fault waits for comes next. How much may be on its way is limited by what the keeper
says it got, or faults would queue behind megabytes. The keeper holds what came in a file until the daemon asks for it, so the link is needed
only as long as the slower of link and source takes, not until the last page is in its place; and it may break at any byte: faults
then wait, and the next bridge (`ckpt migrate --continue`) brings what is missing. Only when none comes for `arriving.PATIENCE_S` the workload is
ended: it would compute with memory that it does not have.

WORDS are three u64, little-endian. Towards the keeper: pid, address, count, then so many pages; or 0, 0, 0: that was all. From it: pid, address,
count: wanted now; 0, n, 1: n bytes of pages got so far; 0, 0, 0: everything is here.
"""

from __future__ import annotations

import os
import queue
import struct
import sys
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

from ckpt.criu import tree
from ckpt.criu.pagestream import PAGE_BYTES
from ckpt.errors import CkptError, TransferFailed
from ckpt.host import procmem
from ckpt.peer.client import Peer, Upload
from ckpt.peer.frames import CHUNK_BYTES, Kind

VERB: Final = "memory"
MEMBER: Final = "memory"
BLOCK_PAGES: Final = 64
TOGETHER_PAGES: Final = 256
WORDS: Final = struct.Struct("<QQQ")
END: Final = WORDS.pack(0, 0, 0)
_LIMIT_S: Final = 60.0
_TICK_S: Final = 0.5
SWITCH_S: Final = 0.0002
"""Python's threads take turns this often (sys.setswitchinterval): with its 5 ms a page fault would wait so long at every station on its way."""
_RATE_S: Final = 0.1
_WINDOW_BYTES: Final = 2 << 20
_CALM_BYTES: Final = 512 << 10
_CALM_S: Final = 0.02
_WINDOW_S: Final = 0.005
"""So much time of the link may be on its way beyond its own delay: a page fault waits behind it."""


class _Memory:
    """The private memory of one frozen process, in blocks; each is sent once."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.fd = procmem.open_memory(pid)
        pages = procmem.PageMap(pid)
        try:
            for region in procmem.private_regions(pid):
                at = region.start
                while at < region.end:
                    spans, at = pages.own_pages(at, region.end, 1 << 18)
                    for span in spans:
                        for page in range(0, span.page_count, BLOCK_PAGES):
                            self.starts.append(span.vaddr + page * PAGE_BYTES)
                            self.counts.append(min(BLOCK_PAGES, span.page_count - page))
        finally:
            pages.close()
        self.sent = bytearray(len(self.starts))
        self.next = 0

    def take(self, vaddr: int) -> tuple[int, int] | None:
        """The block with this page, to be sent now; None: it was sent. A page that is in none makes a block of its own."""
        at = bisect_right(self.starts, vaddr) - 1
        if at < 0 or vaddr >= self.starts[at] + self.counts[at] * PAGE_BYTES:
            return vaddr, 1
        if self.sent[at]:
            return None
        self.sent[at] = 1
        return self.starts[at], self.counts[at]

    def take_next(self) -> tuple[int, int] | None:
        """The next blocks that were not sent; None: there are no more."""
        at = self.sent.find(0, self.next)
        if at < 0:
            at = self.sent.find(0)
        if at < 0:
            return None
        start, count = self.starts[at], 0
        # Neighbours together: the keeper's work is by the message, and it answers page faults meanwhile.
        while at < len(self.starts) and not self.sent[at] and self.starts[at] == start + count * PAGE_BYTES and count < TOGETHER_PAGES:
            self.sent[at] = 1
            count += self.counts[at]
            at += 1
        self.next = at
        return start, count

    def read(self, vaddr: int, view: memoryview) -> None:
        """Also what the process itself may not read: /proc/PID/mem does not look at the protection. Raises TransferFailed."""
        while view:
            try:
                count = os.preadv(self.fd, [view], vaddr)
            except OSError as error:
                raise TransferFailed(f"memory of process {self.pid} at {vaddr:#x} cannot be read: {error.strerror}") from error
            if not count:
                raise TransferFailed(f"memory of process {self.pid} is gone: it ended")
            view = view[count:]
            vaddr += count


class Follow:
    """The source's end: sends the memory of the frozen tree of `root_pid`, in a thread, until the destination has it all.

    Args:
        args: for the destination's handler.
        on_bytes: called with the bytes of memory sent so far, in a thread of its own.

    Raises:
        CkptError: the destination refused, or the link broke.
    """

    def __init__(self, peer: Peer, root_pid: int, args: dict[str, Any], on_bytes: Callable[[int], None]) -> None:
        self._pids = tree.pids(root_pid)
        self._told: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._on_bytes = on_bytes
        self._memories: dict[int, _Memory] = {}
        self._error: BaseException | None = None
        self._lease: bytearray | None = None
        self._filled = 0
        self._offset = 0
        self._got = 0
        self._window_bytes = _WINDOW_BYTES
        self._rate_from = (0.0, 0)
        self._on_way: deque[tuple[int, float]] = deque()
        self._delay_s = 1.0
        self._calm_until_s = 0.0
        self.sent_bytes = 0
        self.complete = False
        sys.setswitchinterval(SWITCH_S)
        self._upload: Upload = peer.upload(VERB, args, on_told=self._told.put)
        self._upload.__enter__()
        self._thread = threading.Thread(target=self._run, name="ckpt-follow", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the destination has everything.

        Raises:
            TransferFailed: the link broke, or the destination gave up.
        """
        self._thread.join()
        if isinstance(self._error, CkptError):
            raise self._error
        if self._error is not None or not self.complete:
            raise TransferFailed(f"the memory did not all arrive: {self._error or 'the other side gave up'}")

    def stop(self) -> None:
        """Give up: nothing of it is needed any more. Never raises."""
        self._told.put({"done": False})
        self._thread.join(_LIMIT_S)

    def _run(self) -> None:
        try:
            with _Open(self._upload):
                carrier = self._upload.carrier
                carrier.control(Kind.FILE, {"path": MEMBER, "mode": 0o600, "size": None, "digest": False})
                self._send_all()
                self._flush()
                carrier.control(Kind.END, {"size": self._offset, "sha256": ""})
            self.complete = bool(self._upload.result.get("complete"))
        except BaseException as error:
            self._error = error
        finally:
            for memory in self._memories.values():
                os.close(memory.fd)
            self._memories.clear()

    def _send_all(self) -> None:
        for pid in self._pids:
            self._memories[procmem.innermost_pid(pid)] = _Memory(pid)
        blocks = self._in_order()
        ended = begun = False
        while True:
            told = self._next(wait=ended or not begun or self.sent_bytes - self._got > self._window())
            if told is not None:
                if "done" in told:
                    return
                begun = True
                ended = not self._heed(told) and ended
                continue
            block = next(blocks, None)
            if block is not None:
                self._put(*block)
            elif not ended:
                self._words(END)
                self._flush()
                ended = True

    def _in_order(self) -> Iterator[tuple[int, int, int]]:
        for pid, memory in self._memories.items():
            while (block := memory.take_next()) is not None:
                yield pid, *block

    def _next(self, *, wait: bool) -> dict[str, Any] | None:
        """What the destination told; without `wait`, None when there is nothing."""
        while True:
            try:
                return self._told.get(timeout=_TICK_S) if wait else self._told.get_nowait()
            except queue.Empty:
                if self._upload.over:
                    raise TransferFailed("the destination does not take its memory any more") from None
                if not wait:
                    return None

    def _heed(self, told: dict[str, Any]) -> bool:
        """Do what the destination wants; whether that makes another end of it necessary."""
        got = told.get("got")
        if isinstance(got, int):
            self._acknowledged(got)
            return False
        pid, vaddr = told.get("pid"), told.get("vaddr")
        memory = self._memories.get(pid) if isinstance(pid, int) else None
        if memory is None or not isinstance(vaddr, int) or vaddr % PAGE_BYTES or not 0 <= vaddr < 1 << 64:
            raise TransferFailed(f"the destination asked for memory of process {pid} at {vaddr}, which there is not")
        assert isinstance(pid, int)
        self._calm_until_s = time.monotonic() + _CALM_S
        if (block := memory.take(vaddr)) is not None:
            self._put(pid, *block)
        self._flush()
        return True

    def _acknowledged(self, got: int) -> None:
        """What is on its way keeps the link busy and no more: the window follows its rate and its shortest delay."""
        self._got = got
        now_s = time.monotonic()
        while self._on_way and self._on_way[0][0] <= got:
            self._delay_s = min(self._delay_s, now_s - self._on_way.popleft()[1])
        then_s, before = self._rate_from
        if now_s - then_s > _RATE_S:
            if then_s:
                rate = max(0, got - before) / (now_s - then_s)
                self._window_bytes = max(_WINDOW_BYTES, int(rate * (_WINDOW_S + 1.5 * self._delay_s)))
            self._rate_from = (now_s, got)

    def _window(self) -> int:
        """How much may be on its way: little while page faults come, each of which waits behind it."""
        return _CALM_BYTES if time.monotonic() < self._calm_until_s else self._window_bytes

    def _put(self, pid: int, vaddr: int, count: int) -> None:
        self._words(WORDS.pack(pid, vaddr, count))
        total, done = count * PAGE_BYTES, 0
        while done < total:
            room = self._room()
            part = min(len(room), total - done)
            self._memories[pid].read(vaddr + done, room[:part])
            self._filled += part
            done += part
        self.sent_bytes += total
        self._on_way.append((self.sent_bytes, time.monotonic()))
        self._on_bytes(self.sent_bytes)

    def _words(self, words: bytes) -> None:
        at = 0
        while at < len(words):
            room = self._room()
            part = min(len(room), len(words) - at)
            room[:part] = words[at : at + part]
            self._filled += part
            at += part

    def _room(self) -> memoryview:
        """What is left of the frame that is being filled; a full one goes out."""
        if self._filled >= CHUNK_BYTES // 2:
            self._flush()
        if self._lease is None:
            self._lease = self._upload.carrier.buffer()
        return memoryview(self._lease)[self._filled :]

    def _flush(self) -> None:
        if self._lease is not None and self._filled:
            lease, self._lease = self._lease, None
            self._upload.carrier.data(self._offset, memoryview(lease)[: self._filled], lease)
            self._offset += self._filled
            self._filled = 0


class _Open:
    """An upload that was entered already."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: Any) -> None:
        self._upload.__exit__(*exception)
