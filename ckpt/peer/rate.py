"""A limit of the rate at which content goes out."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import BinaryIO, Final

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


class LimitedWriter:
    """A binary stream that takes no more than a rate; what it is given goes on in pieces."""

    def __init__(self, out: BinaryIO, rate_bytes_s: float) -> None:
        self._out = out
        self._bucket = TokenBucket(rate_bytes_s)

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
