"""Errors in their four lines: what failed, where the workload is, what to do next, which log tells more."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import TextIO

from ckpt.cli.render.units import clean
from ckpt.errors import CkptError, PolicyRefused

_RED, _YELLOW, _OFF = "\033[1;31m", "\033[1;33m", "\033[0m"


def coloured(stream: TextIO) -> bool:
    """Colour only on a terminal that can, and not where NO_COLOR is set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def error_lines(error: CkptError) -> Iterator[str]:
    yield f"error: {clean(error.message)}"
    if isinstance(error, PolicyRefused) and error.wants:
        from ckpt.cli.render.tables import columns

        rows = [(row["what"], row["asks"], row["default"], row["allow"]) for row in error.wants]
        yield from (f"  {line}" for line in columns(("WHAT", "THE CHECKPOINT ASKS", "THIS HOST'S DEFAULT", "ALLOW WITH"), rows))
    for label, text in (("where:", error.where), ("next: ", error.hint), ("log:  ", error.log)):
        if text:
            yield f"  {label} {clean(text)}"


def show_error(error: CkptError, stream: TextIO | None = None) -> None:
    out = stream or sys.stderr
    text = "\n".join(error_lines(error)) + "\n"
    if coloured(out):
        text = text.replace("error:", f"{_RED}error:{_OFF}", 1)
    _write(out, text)


def show_warning(text: str, stream: TextIO | None = None) -> None:
    out = stream or sys.stderr
    label = f"{_YELLOW}warning:{_OFF}" if coloured(out) else "warning:"
    _write(out, f"{label} {clean(text)}\n")


def _write(out: TextIO, text: str) -> None:
    try:
        out.write(text)
        out.flush()
    except (OSError, ValueError):
        pass  # nobody reads it any more; the exit code still tells
