"""What both displays need to know of a transfer: how far, how fast, how long still."""

from __future__ import annotations

from collections import deque

from ckpt.cli.render import units

_WINDOW_S = 5.0


class Progress:
    """The state of one moving step; the rate is that of the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self.total_bytes: int | None = None

    def moved(self, now_s: float, done_bytes: int, total_bytes: int | None) -> None:
        if self._seen and done_bytes < self._seen[-1][1]:
            self._seen.clear()  # a new round
        self._seen.append((now_s, done_bytes))
        while len(self._seen) > 2 and now_s - self._seen[0][0] > _WINDOW_S:
            self._seen.popleft()
        self.total_bytes = total_bytes

    @property
    def rate(self) -> float | None:
        """Bytes a second; None before there is anything to tell."""
        seen = tuple(self._seen)  # the live display's thread reads while another one writes
        if len(seen) < 2:
            return None
        (start_s, start), (end_s, end) = seen[0], seen[-1]
        return (end - start) / (end_s - start_s) if end_s > start_s else None

    def text(self) -> str:
        """`1.3 of 2.0 GiB  412 MiB/s  2 s left`; empty before the first bytes."""
        seen = tuple(self._seen)
        if not seen:
            return ""
        done = seen[-1][1]
        words = [units.part(done, self.total_bytes)]
        if rate := self.rate:
            words.append(f"{units.size(rate)}/s")
            if self.total_bytes is not None and self.total_bytes > done:
                words.append(f"{units.duration((self.total_bytes - done) / rate)} left")
        return "  ".join(words)
