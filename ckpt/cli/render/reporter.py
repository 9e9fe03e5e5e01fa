"""The one place where output happens: results to stdout, everything else to stderr, in the form that was asked for."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol, TextIO

from ckpt.cli.render.error import show_error, show_warning
from ckpt.cli.render.plain import PlainDisplay
from ckpt.cli.render.progress import Paced
from ckpt.cli.render.rows import SCHEMA, Row, event_row, plain
from ckpt.cli.render.template import Template
from ckpt.errors import CkptError, UsageError
from ckpt.events import BytesMoved, Event, StepDone, StepFailed, StepStarted

_LINES_EVERY_S = 0.25
Kind = Literal["table", "json", "jsonl", "template"]
_KINDS: dict[str, Kind] = {"table": "table", "json": "json", "jsonl": "jsonl"}
Lines = Callable[[Sequence[Row]], Iterable[str]]


class Display(Protocol):
    """Shows progress."""

    def show(self, event: Event) -> None: ...

    def line(self, text: str) -> None: ...

    def close(self) -> None: ...


class Reporter:
    """Collects the rows of one verb and shows them at its end; shows events as they come, from any thread.

    Args:
        verb: the name that JSON carries.
        fmt: what `--format` said.
        fields: the fields that a template may use.
        quiet: ids only, no progress.
        results: False when stdout carries an archive; then results are not shown.

    Raises:
        UsageError: `fmt` is neither a known word nor a template of these fields.
    """

    def __init__(self, verb: str, fmt: str, fields: Sequence[str], *, quiet: bool = False) -> None:
        self._verb = verb
        self.kind, self._template = _parse(fmt, fields)
        self.quiet = quiet
        self.results = True
        self._rows: list[Row] = []
        self._lock = threading.RLock()
        self._display: Display | None = None
        self._stdout_open = True
        self._paced = Paced(_LINES_EVERY_S)
        self._handler = _LogLines(self)

    def __enter__(self) -> Reporter:
        logging.getLogger("ckpt").addHandler(self._handler)
        return self

    def __exit__(self, *exc: object) -> None:
        logging.getLogger("ckpt").removeHandler(self._handler)
        self.close()

    def emit(self, event: Event) -> None:
        """The `Emit` that operations get."""
        with self._lock:
            if self.kind == "jsonl":
                if self.results:
                    self._line(event)
            elif not self.quiet:
                self._progress().show(event)

    def _line(self, event: Event) -> None:
        """An event as a line of JSON; of a transfer's a few a second, with its rate and what is left."""
        if isinstance(event, BytesMoved):
            progress = self._paced.due(time.monotonic(), event)
            if progress is not None:
                self._out(_json({**event_row(event), **progress.figures()}))
            return
        if isinstance(event, StepStarted | StepDone | StepFailed):
            self._paced.forget(event.target, event.step)
        self._out(_json(event_row(event)))

    def log(self, text: str) -> None:
        """A line of the log, in between the progress."""
        with self._lock:
            if self._display is not None:
                self._display.line(text)
            else:
                PlainDisplay(sys.stderr).line(text)

    def close(self) -> None:
        """End the live display. Idempotent; later events open a new one."""
        with self._lock:
            if self._display is not None:
                self._display.close()
                self._display = None

    def error(self, error: CkptError) -> None:
        self.close()
        show_error(error)

    def warning(self, text: str) -> None:
        self.close()
        show_warning(text)

    def show(self, rows: Sequence[Row], *, table: Lines, exit_code: int = 0) -> None:
        """Write the results.

        Args:
            table: the lines for a person; with `quiet` only the ids are written.
            exit_code: what JSON says the command will exit with.
        """
        self.close()
        if not self.results:
            return
        match self.kind:
            case "json":
                document = {"schema": SCHEMA, "verb": self._verb, "exit_code": exit_code, "results": plain(rows)}
                self._out(json.dumps(document, indent=2, ensure_ascii=False))
            case "jsonl":
                for row in rows:
                    self._out(_json({"schema": SCHEMA, "event": "result", **row}))
            case "template":
                assert self._template is not None
                for row in rows:
                    self._out(self._template.render(row))
            case _ if self.quiet:
                for row in rows:
                    if row.get("id"):
                        self._out(str(row["id"]))
            case _:
                for line in table(rows):
                    self._out(line)

    def document(self, value: object) -> None:
        """A JSON document of its own form (`--print-stats`)."""
        self.close()
        if self.results:
            self._out(json.dumps(plain(value), indent=4))

    def failed(self, error: CkptError) -> None:
        """The verb as a whole failed: machines get it on stdout too."""
        self.close()
        if not self.results:
            return
        if self.kind == "json":
            document = {"schema": SCHEMA, "verb": self._verb, "exit_code": error.exit_code, "results": [], "error": error.to_json()}
            self._out(json.dumps(document, indent=2, ensure_ascii=False))
        elif self.kind == "jsonl":
            self._out(_json({"schema": SCHEMA, "event": "error", **error.to_json()}))

    def _progress(self) -> Display:
        if self._display is None:
            self._display = _display(sys.stderr)
        return self._display

    def _out(self, line: str) -> None:
        if not self._stdout_open:
            return
        try:
            sys.stdout.write(line + "\n")
            if self.kind == "jsonl":
                sys.stdout.flush()
        except BrokenPipeError:
            self._stdout_open = False  # `| head` has enough; a dump is not broken off for that


class _LogLines(logging.Handler):
    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._reporter.log(f"{record.levelname.lower()}: {record.name}: {record.getMessage()}")
        except Exception:
            self.handleError(record)


def _parse(fmt: str, fields: Sequence[str]) -> tuple[Kind, Template | None]:
    if fmt in _KINDS:
        return _KINDS[fmt], None
    if "{{" in fmt:
        return "template", Template(fmt, fields)
    raise UsageError(f"--format: {fmt!r} is not known", hint="table, json, jsonl, or a template like '{{.Name}}'")


def _display(stream: TextIO) -> Display:
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        from ckpt.cli.render.live import LiveDisplay

        return LiveDisplay(stream)
    return PlainDisplay(stream)


def _json(value: object) -> str:
    return json.dumps(plain(value), separators=(",", ":"), ensure_ascii=False)
