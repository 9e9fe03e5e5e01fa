"""The queues between a link's threads and everybody else: bounded by bytes, closed by the link's end.

What goes out has two lanes. Control frames and heartbeats never wait behind file content, be it for a limit of the rate or for a
compressor; the frames of an upload (FILE, DATA, END, DONE) keep their order among themselves.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from ckpt.errors import TransferFailed
from ckpt.peer.frames import Frame, Kind
from ckpt.peer.rate import TokenBucket

T = TypeVar("T")

QUEUE_BYTES: Final = 8 << 20
CONTENT: Final = frozenset({Kind.FILE, Kind.DATA, Kind.END, Kind.DONE})
"""What an upload consists of; in the order of the frames' `order`, whatever way they take."""
STARVED_S: Final = 120.0
"""So long the queue may be full of frames that wait for one on another stream, while nothing at all comes."""
_SIGNAL_S: Final = 0.5
_LEAST_BYTES: Final = 512
"""What any frame counts at least, so that empty ones are bounded too."""


class Closed(Exception):
    """The queue was closed and is empty."""


class ByteQueue(Generic[T]):
    """A queue bounded by the bytes that its items hold; one item always fits."""

    def __init__(self, limit_bytes: int = QUEUE_BYTES) -> None:
        self._limit_bytes = limit_bytes
        self._items: deque[tuple[T, int]] = deque()
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: T, size_bytes: int = 0) -> bool:
        """Wait for room and append; False (and dropped) when the queue is closed."""
        with self._changed:
            while self._bytes and self._bytes + size_bytes > self._limit_bytes and not self._closed:
                self._changed.wait()
            if self._closed:
                return False
            self._items.append((item, size_bytes))
            self._bytes += size_bytes
            self._changed.notify_all()
            return True

    def get(self, timeout_s: float | None = None) -> T | None:
        """The next item, None when none came in time. Raises Closed."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._items or self._closed, timeout_s):
                return None
            if not self._items:
                raise Closed
            item, size_bytes = self._items.popleft()
            self._bytes -= size_bytes
            self._changed.notify_all()
            return item

    def close(self, *, drop: bool = False) -> None:
        """Take nothing more; what is queued can still be got unless `drop`."""
        with self._changed:
            self._closed = True
            if drop:
                self._items.clear()
                self._bytes = 0
            self._changed.notify_all()


class Inbox:
    """The frames of one upload as they arrive, got in their order, whichever stream brought them."""

    def __init__(self, limit_bytes: int = QUEUE_BYTES, *, starved_s: float = STARVED_S) -> None:
        self._limit_bytes = limit_bytes
        self._starved_s = starved_s
        self._frames: dict[int, Frame] = {}
        self._urgent: deque[Frame] = deque()
        self._next = 0
        self._bytes = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, frame: Frame) -> None:
        """Keep a frame; waits for room, but for the one that is due. Raises TransferFailed for one that came before, or when one does not come."""
        with self._changed:
            if frame.kind not in CONTENT:
                self._urgent.append(frame)
                self._changed.notify_all()
                return
            size_bytes = max(len(frame.payload), _LEAST_BYTES)
            while self._bytes and self._bytes + size_bytes > self._limit_bytes and frame.order != self._next and not self._closed:
                if not self._changed.wait(self._starved_s) and self._next not in self._frames and not self._closed:
                    raise TransferFailed("damaged data arrived: a part of an upload is missing")
            if self._closed:
                return
            if frame.order < self._next or frame.order in self._frames:
                raise TransferFailed("damaged data arrived: a part of an upload came twice")
            self._frames[frame.order] = frame
            self._bytes += size_bytes
            self._changed.notify_all()

    def get(self) -> Frame:
        """The next frame; one that ends the upload before its time overtakes all others. Raises Closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._urgent or self._next in self._frames or self._closed)
            if self._urgent:
                return self._urgent.popleft()
            frame = self._frames.pop(self._next, None)
            if frame is None:
                raise Closed
            self._next += 1
            self._bytes -= max(len(frame.payload), _LEAST_BYTES)
            self._changed.notify_all()
            return frame

    def close(self, *, drop: bool = False) -> None:
        """Take nothing more; what is there can still be got unless `drop`."""
        with self._changed:
            self._closed = True
            if drop:
                self._frames.clear()
                self._urgent.clear()
                self._bytes = 0
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A frame on its way out.

    Attributes:
        frame: it, or what a compressor makes of it.
        size_bytes: its payload, before compression.
        label: what it is counted as; "" for control frames.
        epoch: the compression's decision that it was made under.
    """

    frame: Frame | Future[Frame]
    channel: int
    size_bytes: int
    label: str = ""
    epoch: int = 0

    def ready(self) -> Frame:
        """The frame to write. Raises what the compressor raised."""
        return self.frame.result() if isinstance(self.frame, Future) else self.frame

    @property
    def unfinished(self) -> bool:
        return isinstance(self.frame, Future) and not self.frame.done()


@dataclass(slots=True)
class Waited:
    """How long content waited for the limit of the rate, and for a compressor."""

    limited_s: float = 0.0
    packing_s: float = 0.0


class Outbox:
    """What goes out."""

    def __init__(self, bucket: TokenBucket | None = None) -> None:
        self.bucket = bucket
        self._limit_bytes = min(bucket.queue_bytes, QUEUE_BYTES) if bucket else QUEUE_BYTES
        self._control: deque[Outgoing] = deque()
        self._content: deque[Outgoing] = deque()
        self._bytes = 0
        self._last: Outgoing | None = None
        self._closed = False
        self._changed = threading.Condition()

    def put(self, item: Outgoing) -> bool:
        """Append a control frame; False (and dropped) when the outbox is closed."""
        with self._changed:
            if self._closed:
                return False
            self._control.append(item)
            self._changed.notify_all()
            return True

    def put_content(self, item: Outgoing) -> bool:
        """Wait for room and append a frame of an upload; False (and dropped) when the outbox is closed."""
        size_bytes = max(item.size_bytes, _LEAST_BYTES)
        with self._changed:
            while self._bytes and self._bytes + size_bytes > self._limit_bytes and not self._closed:
                # With a limit: a signal that comes just before Python begins to wait is seen only when it wakes up.
                self._changed.wait(_SIGNAL_S)
            if self._closed:
                return False
            self._content.append(item)
            self._bytes += size_bytes
            self._changed.notify_all()
        if isinstance(item.frame, Future):
            item.frame.add_done_callback(lambda done: self._wake())
        return True

    def drop(self, channel: int) -> None:
        """Forget what is queued of an upload that was given up."""
        with self._changed:
            kept = [item for item in self._content if item.channel != channel]
            self._content = deque(kept)
            self._bytes = sum(max(item.size_bytes, _LEAST_BYTES) for item in kept)
            self._changed.notify_all()

    def get(self, timeout_s: float, *, control: bool = True, content: bool = True, waited: Waited | None = None) -> Outgoing | None:
        """The next frame that may go, control frames first; None when there was none in time. Raises Closed.

        Args:
            control, content: which lanes to look at. What `close` was given as the last frame comes with the control frames.
            waited: gets the time added that content had to wait.
        """
        waited = waited or Waited()
        end_s = time.monotonic() + timeout_s
        with self._changed:
            while True:
                now_s = time.monotonic()
                wait_s, packing, limited = end_s - now_s, False, False
                if control and self._control:
                    return self._control.popleft()
                if content and self._content:
                    limit_s = self.bucket.wait_s() if self.bucket else 0.0
                    packing = self._content[0].unfinished
                    limited = not packing and limit_s > 0
                    if not packing and not limited:
                        return self._taken()
                    wait_s = min(wait_s, limit_s) if limited else wait_s
                elif self._closed and not (control and self._content):
                    last, self._last = (self._last, None) if control else (None, self._last)
                    if last is None:
                        raise Closed
                    return last
                if end_s <= now_s:
                    return None
                self._changed.wait(wait_s)
                took_s = time.monotonic() - now_s
                waited.packing_s += took_s if packing else 0.0
                waited.limited_s += took_s if limited else 0.0

    def close(self, *, drop: bool = False, last: Frame | None = None) -> None:
        """Take nothing more; what is queued still goes unless `drop`, and `last` after it."""
        with self._changed:
            self._closed = True
            self._last = Outgoing(last, 0, 0) if last is not None else None
            if drop:
                self._control.clear()
                self._content.clear()
                self._bytes = 0
            self._changed.notify_all()

    def _taken(self) -> Outgoing:
        item = self._content.popleft()
        self._bytes -= max(item.size_bytes, _LEAST_BYTES)
        if self.bucket:
            self.bucket.take(max(len(item.ready().payload), _LEAST_BYTES))
        self._changed.notify_all()
        return item

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()
