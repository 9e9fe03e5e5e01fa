"""Failures that may pass, and how long they are borne."""

from __future__ import annotations

import threading
import time
from typing import Final

from ckpt.errors import CannotConnect, TransferFailed
from ckpt.transports.base import CarrierOptions, Location

RETRY_AFTER_CAP_S: Final = 30.0
_LONGEST_S: Final = 10.0
_ENOUGH_BYTES: Final = 64 << 10


class Broken(Exception):
    """An exchange failed in a way that may pass. The message holds no secrets."""

    def __init__(self, message: str, *, after_s: float | None = None, connected: bool = True) -> None:
        super().__init__(message)
        self.message = message
        self.after_s = after_s
        """What the other end asked to wait."""
        self.connected = connected
        """Whether the other end was reached at all."""


class Patience:
    """How long a failing other end is tried again: from the last bytes that went through."""

    def __init__(self, location: Location, options: CarrierOptions) -> None:
        self._location = location
        self._options = options
        self._tries = 0
        self._all_tries = 0
        self._moved_bytes = 0
        self._since_s: float | None = None
        self.stopped = threading.Event()
        """Set: no more tries, and no more waiting."""

    def progressed(self, count: int = _ENOUGH_BYTES) -> None:
        """So many bytes went through: the next try comes at once. Enough of them, and the time begins anew; a byte a connection is not enough."""
        self._tries = 0
        self._moved_bytes += count
        if self._moved_bytes >= _ENOUGH_BYTES:
            self._since_s, self._moved_bytes = None, 0

    def wait(self, problem: Broken) -> None:
        """Wait before the next try: not at all the first time, then longer and longer.

        Raises:
            TransferFailed: it took too long already.
            CannotConnect: so it did, and nothing was reached.
        """
        now = time.monotonic()
        if self._since_s is None:
            self._since_s, self._moved_bytes, self._all_tries = now, 0, 0
        pause = 0.0 if self._tries == 0 else min(_LONGEST_S, 0.1 * 2.0 ** (self._tries - 1))
        if problem.after_s is not None:
            pause = min(RETRY_AFTER_CAP_S, max(pause, problem.after_s))
        self._tries += 1
        self._all_tries += 1
        if now + pause > self._since_s + self._options.retry_limit_s:
            kind = TransferFailed if problem.connected else CannotConnect
            tried = f" (tried {self._all_tries} times in {now - self._since_s:.0f} s)" if self._all_tries > 1 else ""
            raise kind(f"{self._location}: {problem.message}{tried}", hint="try again later")
        if self.stopped.wait(pause):
            raise TransferFailed(f"{self._location}: {problem.message}; given up")
