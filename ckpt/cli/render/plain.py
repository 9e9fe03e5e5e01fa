"""Progress for logs and pipes: one finished line for each step, transfers at most once a second. No colours, no cursor."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from ckpt.cli.render.error import show_warning
from ckpt.cli.render.progress import Progress
from ckpt.cli.render.units import clean, duration
from ckpt.events import BytesMoved, Event, Notice, StepDone, StepFailed, StepStarted, Thawed

_EVERY_S = 1.0


def said(notice: Notice) -> str:
    """The line of a notice; one about nothing in particular has no target."""
    return f"{notice.target}: {notice.text}" if notice.target else notice.text


class PlainDisplay:
    """Writes `web: dump: ok, 1.3 GiB` lines to `stream`. Not thread-safe by itself: the reporter serialises."""

    def __init__(self, stream: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._next_s = 0.0
        self._moving: dict[tuple[str, str], Progress] = {}

    def show(self, event: Event) -> None:
        match event:
            case StepStarted():
                self._moving.pop((event.target, event.step), None)
            case BytesMoved():
                now_s = self._clock()
                progress = self._moving.setdefault((event.target, event.step), Progress())
                progress.moved(now_s, event)
                if now_s >= self._next_s:
                    self._next_s = now_s + _EVERY_S
                    self.line(f"{event.target}: {event.step}: {progress.text()}")
            case StepDone() | StepFailed():
                self._moving.pop((event.target, event.step), None)
                word = "ok" if isinstance(event, StepDone) else "failed"
                self.line(f"{event.target}: {event.step}: {word}" + (f", {event.detail}" if event.detail else ""))
            case Thawed():
                self.line(f"{event.target}: frozen {duration(event.frozen_s)}")
            case Notice(warning=True):
                show_warning(said(event), self._stream)
            case Notice():
                self.line(said(event))

    def line(self, text: str) -> None:
        try:
            self._stream.write(clean(text) + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass  # nobody reads it: no reason to break off the work

    def close(self) -> None:
        pass
