"""What one client may take of the server: tries, bytes a second, connections."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

FREE_TRIES: Final = 5
WINDOW_S: Final = 60.0
MAX_ADDRESSES: Final = 10_000


class Tries:
    """Failed logins by address: after FREE_TRIES within WINDOW_S the address is not listened to any more until they are old."""

    def __init__(self, *, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._failed: dict[str, list[float]] = {}

    def wait_s(self, address: str) -> float:
        """Seconds until this address is listened to again; 0: now."""
        recent = self._recent(address)
        return max(0.0, recent[-FREE_TRIES] + WINDOW_S - self._now()) if len(recent) >= FREE_TRIES else 0.0

    def failed(self, address: str) -> None:
        """One more."""
        if address not in self._failed and len(self._failed) >= MAX_ADDRESSES:
            self._failed.pop(next(iter(self._failed)))
        self._failed[address] = [*self._recent(address), self._now()][-FREE_TRIES:]

    def _recent(self, address: str) -> list[float]:
        return [at for at in self._failed.get(address, ()) if self._now() - at < WINDOW_S]


class Bucket:
    """At most so many bytes a second, for all together; one second's worth may come at once."""

    def __init__(self, bytes_s: int, *, now: Callable[[], float] = time.monotonic) -> None:
        self._bytes_s = bytes_s
        self._now = now
        self._left = float(bytes_s)
        self._at = now()

    def take(self, count: int) -> float:
        """Bytes were moved; returns for how many seconds none may be."""
        now = self._now()
        self._left = min(float(self._bytes_s), self._left + (now - self._at) * self._bytes_s) - count
        self._at = now
        return max(0.0, -self._left / self._bytes_s)


class Pace:
    """Notices a client that sends next to nothing: at least `least_bytes_s` over each `window_s`.

    Args:
        least_bytes_s: bytes a second.
    """

    def __init__(self, least_bytes_s: float, window_s: float, *, now: Callable[[], float] = time.monotonic) -> None:
        self._least = least_bytes_s * window_s
        self._window_s = window_s
        self._now = now
        self._since = now()
        self._bytes = 0

    def too_slow(self, count: int) -> bool:
        """Bytes came; True when it were too few for too long."""
        self._bytes += count
        now = self._now()
        if now - self._since < self._window_s:
            return False
        slow = self._bytes < self._least
        self._since, self._bytes = now, 0
        return slow

    def paused(self, seconds: float) -> None:
        """The server itself did not read for so long."""
        self._since += seconds
