"""Progress on a terminal: finished steps scroll by as lines, the moving ones stand below them."""

from __future__ import annotations

import os
import time
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ckpt.cli.render.plain import said
from ckpt.cli.render.progress import Progress
from ckpt.cli.render.units import clean, duration
from ckpt.events import BytesMoved, Event, Notice, StepDone, StepFailed, StepStarted, Thawed

_STEP_WIDTH = 12


class _Moving:
    """A step that has begun."""

    def __init__(self, target: str, step: str, detail: str) -> None:
        self.target = target
        self.step = step
        self.detail = detail
        self.started_s = time.monotonic()
        self.progress = Progress()

    def text(self) -> str:
        return self.progress.text() or self.detail


class LiveDisplay:
    """The live display of DESIGN: `  ok  check        CRIU 4.2.1 -> 4.2.1`. The reporter serialises the calls."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, markup=False, emoji=False, soft_wrap=True, no_color=bool(os.environ.get("NO_COLOR")))
        self._moving: dict[tuple[str, str], _Moving] = {}
        self._target: str | None = None
        self._live: Live | None = Live(
            console=self._console,
            get_renderable=self._render,
            refresh_per_second=5,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start()

    def show(self, event: Event) -> None:
        match event:
            case StepStarted():
                self._moving[event.target, event.step] = _Moving(event.target, event.step, event.detail)
            case BytesMoved():
                key = (event.target, event.step)
                moving = self._moving.setdefault(key, _Moving(event.target, event.step, ""))
                moving.progress.moved(time.monotonic(), event)
            case StepDone():
                self._moving.pop((event.target, event.step), None)
                self._head(event.target)
                self._print(_step("ok", "green", event.step, event.detail))
            case StepFailed():
                self._moving.pop((event.target, event.step), None)
                self._head(event.target)
                self._print(_step("--", "red", event.step, event.detail))
            case Thawed():
                self._head(event.target)
                self._print(_step("ok", "green", "running", f"frozen {duration(event.frozen_s)}"))
            case Notice():
                self._target = event.target or self._target
                label = Text("warning: ", style="bold yellow") if event.warning else Text()
                self._print(label.append(clean(said(event)), style="none"))

    def line(self, text: str) -> None:
        self._print(Text(clean(text)))

    def close(self) -> None:
        """Take the moving lines away and give the terminal back. Idempotent."""
        if self._live is not None:
            self._moving.clear()
            self._live.stop()
            self._live = None

    def _head(self, target: str) -> None:
        if target != self._target:
            self._target = target
            self._print(Text(f"{clean(target)}:"))

    def _print(self, text: Text) -> None:
        self._console.print(text)

    def _render(self) -> Group:
        now_s = time.monotonic()
        lines = []
        # The refreshing thread runs beside show(): look at a copy.
        for moving in list(self._moving.values()):
            waited_s = now_s - moving.started_s
            detail = moving.text() or (duration(waited_s) if waited_s >= 1 else "")
            line = _step("..", "cyan", moving.step, detail)
            if moving.target != self._target:
                line.append(f"  ({clean(moving.target)})")
            line.no_wrap, line.overflow = True, "ellipsis"
            lines.append(line)
        return Group(*lines)


def _step(mark: str, style: str, step: str, detail: str) -> Text:
    return Text("  ").append(mark, style=style).append(f"  {clean(step):<{_STEP_WIDTH}} {clean(detail)}".rstrip())
