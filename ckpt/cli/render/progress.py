"""What the displays need to know of a transfer: how far, how fast, how long still."""

from __future__ import annotations

from collections import deque
from typing import Any

from ckpt.cli.render import units
from ckpt.events import BytesMoved

_WINDOW_S = 5.0
_GRAIN_S = 0.05


class Progress:
    """The state of one moving step; the rate is that of the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()
        self._last: BytesMoved | None = None

    def moved(self, now_s: float, event: BytesMoved) -> None:
        """Take note of an event. A transfer tells thousands a second: those of one moment count as one."""
        last = self._last
        if last is not None and (event.done_bytes < last.done_bytes or event.round != last.round):
            self._seen.clear()
        self._last = event
        if len(self._seen) > 1 and now_s - self._seen[-2][0] < _GRAIN_S:
            self._seen.pop()
        self._seen.append((now_s, event.done_bytes))
        while len(self._seen) > 2 and now_s - self._seen[0][0] > _WINDOW_S:
            self._seen.popleft()

    @property
    def rate(self) -> float | None:
        """Bytes a second; None before there is anything to tell."""
        seen = tuple(self._seen)  # the live display's thread reads while another one writes
        if len(seen) < 2:
            return None
        (start_s, start), (end_s, end) = seen[0], seen[-1]
        return (end - start) / (end_s - start_s) if end_s > start_s else None

    @property
    def left_s(self) -> float | None:
        """How long it will take still; None when that cannot be told. What there is in all may be an estimate."""
        last, rate = self._last, self.rate
        if last is None or last.total_bytes is None or not rate or last.total_bytes <= last.done_bytes:
            return None
        return (last.total_bytes - last.done_bytes) / rate

    def text(self) -> str:
        """`1.3 of 2.0 GiB  412 MiB/s  round 1  dirty 18 MiB/s  2.0 s left`; empty before the first bytes."""
        last = self._last
        if last is None:
            return ""
        known = last.total_bytes is not None and last.done_bytes <= last.total_bytes
        words = [units.part(last.done_bytes, last.total_bytes if known else None)]
        if rate := self.rate:
            words.append(f"{units.size(rate)}/s")
        if last.round is not None:
            words.append(f"round {last.round}")
        if last.dirty_bytes_s is not None:
            words.append(f"dirty {units.size(last.dirty_bytes_s)}/s")
        if (left_s := self.left_s) is not None:
            words.append(f"{units.duration(left_s)} left")
        return "  ".join(words)

    def figures(self) -> dict[str, Any]:
        """For machines: `rate_bytes_s` and `left_s`, None when unknown."""
        rate, left_s = self.rate, self.left_s
        return {"rate_bytes_s": round(rate) if rate is not None else None, "left_s": round(left_s, 1) if left_s is not None else None}


class Paced:
    """The progress of all steps, for a stream of lines: says which events are worth one."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._moving: dict[tuple[str, str], tuple[Progress, float]] = {}

    def due(self, now_s: float, event: BytesMoved) -> Progress | None:
        """The progress of the event's step when it is time for a line; None when not."""
        progress, next_s = self._moving.get((event.target, event.step)) or (Progress(), now_s)
        progress.moved(now_s, event)
        due = now_s >= next_s
        self._moving[event.target, event.step] = progress, now_s + self._every_s if due else next_s
        return progress if due else None

    def forget(self, target: str, step: str) -> None:
        """The step began, or is over."""
        self._moving.pop((target, step), None)
