"""A limit of the rate at which content goes out."""

from __future__ import annotations

import fcntl
import math
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from ckpt.model import Carriage
from ckpt.peer.frames import CHUNK_BYTES


class TokenBucket:
    """How much may go out: `rate` bytes a second, and what was not used in the last tenth of a second.

    One piece may always go once the balance is not negative; what it takes beyond that is waited for afterwards, so the mean is exact.
    """

    BURST_S: Final = 0.1

    def __init__(self, rate_bytes_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate_bytes_s
        self._clock = clock
        self._balance = 0.0
        self._at_s = clock()

    @property
    def piece_bytes(self) -> int:
        """How large the pieces should be, so that none blocks the way for long."""
        return int(min(CHUNK_BYTES, max(16 << 10, self._rate / 20)))

    @property
    def queue_bytes(self) -> int:
        """How much should be ready to go: half a second's worth."""
        return int(max(64 << 10, self._rate / 2))

    def wait_s(self) -> float:
        """How long to wait until the next piece may go; 0: now."""
        now_s = self._clock()
        self._balance = min(self._balance + (now_s - self._at_s) * self._rate, self._rate * self.BURST_S)
        self._at_s = now_s
        wait_s = -self._balance / self._rate
        return wait_s if wait_s > 1e-6 else 0.0

    def take(self, size_bytes: int) -> None:
        """A piece goes."""
        self._balance -= size_bytes


class SharedBucket(TokenBucket):
    """A TokenBucket that several processes of this host take from, so that all of them together keep to its rate.

    Its balance is in a small file, with the time of CLOCK_MONOTONIC at which it was right, behind a lock that the kernel takes back when its
    holder dies. Who takes nothing leaves all of it to the others.

    Raises:
        OSError: the file cannot be opened.
    """

    _STATE: Final = struct.Struct("<dd")

    def __init__(self, path: Path, rate_bytes_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(rate_bytes_s, clock=clock)
        self._file = open(path, "r+b", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_CREAT | os.O_CLOEXEC, 0o600))

    def wait_s(self) -> float:
        with self._together():
            return super().wait_s()

    def take(self, size_bytes: int) -> None:
        with self._together():
            super().take(size_bytes)

    @contextmanager
    def _together(self) -> Iterator[None]:
        fd = self._file.fileno()
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            state = os.pread(fd, self._STATE.size, 0)
            if len(state) == self._STATE.size:
                balance, at_s = self._STATE.unpack(state)
                # A time to come is that of an earlier boot.
                self._balance, self._at_s = (balance, at_s) if math.isfinite(balance) and 0 <= at_s <= self._clock() else (0.0, self._clock())
            yield
            os.pwrite(fd, self._STATE.pack(self._balance, self._at_s), 0)
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)


def bucket(carriage: Carriage) -> TokenBucket | None:
    """The limit that a carriage asks for; None for none."""
    if not carriage.bwlimit_bytes_s:
        return None
    return SharedBucket(carriage.shared_limit, carriage.bwlimit_bytes_s) if carriage.shared_limit else TokenBucket(carriage.bwlimit_bytes_s)


class LimitedWriter:
    """A binary stream that takes no more than a rate; what it is given goes on in pieces."""

    def __init__(self, out: BinaryIO, bucket: TokenBucket) -> None:
        self._out = out
        self._bucket = bucket

    def write(self, data: bytes | memoryview) -> int:
        """Write all of it; waits meanwhile."""
        rest = memoryview(data)
        while rest:
            while wait_s := self._bucket.wait_s():
                time.sleep(wait_s)
            count = self._out.write(rest[: self._bucket.piece_bytes])
            self._bucket.take(count)
            rest = rest[count:]
        return len(memoryview(data))

    def flush(self) -> None:
        self._out.flush()
