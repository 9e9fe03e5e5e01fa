"""One ckpt that runs others: each in a process, and a session, of its own, with its own signals, guard and memory.

What it says on standard output (`--format jsonl`) is passed on as events while it runs, and its last row is its result. It outlives us: who
is killed finds what became of it in its job.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Final

import ckpt
from ckpt.criu import tree
from ckpt.errors import Bug, CkptError
from ckpt.events import Emit, Event, Figures
from ckpt.host.run import DEVNULL, PIPE, CommandFailed, Process, spawn
from ckpt.peer import messages

_BODY: Final = "import sys; sys.path.insert(0, sys.argv.pop(1)); from ckpt.cli.main import main; sys.exit(main())"
_LOOK_S: Final = 0.2
LINE_CAP: Final = 1 << 20
_TAIL_BYTES: Final = 16 << 10


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child ended. `row` is the last of its results, `error` what it failed with, `job` the id of its job ("" for none)."""

    returncode: int
    row: dict[str, Any]
    error: CkptError | None
    job: str
    said: str = ""
    """The end of what it wrote to stderr besides events."""
    rows: tuple[dict[str, Any], ...] = ()
    """All of its results: of a group there are several."""
    jobs: Mapping[str, str] = field(default_factory=dict)
    """Target -> the id of its job."""

    @property
    def ok(self) -> bool:
        return self.error is None

    def of(self, target: str) -> Ended:
        """What became of one of several: without a result of its own, what became of the child."""
        job = self.jobs.get(target, "")
        for row in self.rows:
            if row.get("name") != target:
                continue
            if row.get("ok"):
                return replace(self, row=row, error=None, job=job)
            given = row.get("error")
            error = messages.error_from_json(given) if isinstance(given, dict) else self.error or Bug("its ckpt did not say why it failed")
            return replace(self, row=row, error=error, job=job)
        error = self.error or Bug("its ckpt did not say what became of it")
        return replace(self, row={}, error=messages.again(error), job=job)


def start(words: Sequence[str], *, stdin: int | IO[bytes] = DEVNULL, stdout: int | IO[bytes] = PIPE, stderr: int | IO[bytes] = PIPE) -> Process:
    """Start this very ckpt with another command line. Raises CommandFailed."""
    parent = str(Path(ckpt.__file__).resolve().parents[1])
    env = {key: value for key, value in os.environ.items() if key.startswith("CKPT_")}
    argv = [sys.executable or "/usr/bin/python3", "-I", "-c", _BODY, parent, *words]
    return spawn(argv, stdin=stdin, stdout=stdout, stderr=stderr, env=env, cwd="/", new_session=True)


def run(
    words: Sequence[str], *, emit: Emit, stopped: Callable[[], bool] = lambda: False, on_start: Callable[[int, int], None] = lambda pid, start: None
) -> Ended:
    """Run ckpt with `words` (which ask for jsonl) to its end.

    Args:
        stopped: looked at all the time; once it is true the child is told to stop (SIGINT), which it does as on Ctrl-C, and is waited for.
        on_start: gets its pid and when it started (clock ticks since boot).
    """
    try:
        process = start(words)
    except CommandFailed as error:
        return Ended(127, {}, CkptError(f"ckpt could not be started: {error.reason}"), "")
    found = tree.stat(process.pid)
    try:
        on_start(process.pid, found.start_ticks if found else 0)
        return follow(process, emit=emit, stopped=stopped)
    except BaseException:
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGINT)
        raise


def follow(process: Process, *, emit: Emit, stopped: Callable[[], bool], tell: Callable[[], None] | None = None) -> Ended:
    """Pass on what a started ckpt says, until it has ended. `tell`: how it is told to stop (None: SIGINT)."""
    told = False
    rows: list[dict[str, Any]] = []
    failed: CkptError | None = None
    job = ""
    jobs: dict[str, str] = {}
    tail = b""
    for number, line in _lines(process):
        if number is None:
            if not told and stopped():
                told = True
                tell() if tell is not None else _interrupt(process)
            continue
        if number == 1 and not line.startswith(b"{"):
            tail = (tail + line + b"\n")[-_TAIL_BYTES:]
        value = _json(line)
        match str(value.pop("event", "")):
            case "":
                continue
            case "result":
                rows.append(value)
            case "error":
                failed = messages.error_from_json(value)
            case name:
                event = _event(name, value)
                if isinstance(event, Figures):
                    job = str(event.values.get("job") or job)
                    jobs |= {event.target: job} if event.values.get("job") else {}
                if event is not None:
                    emit(event)
    code = process.wait()
    row = rows[-1] if rows else {}
    if failed is None and isinstance(row.get("error"), dict):
        failed = messages.error_from_json(row["error"])
    if failed is None and (not row or not row.get("ok")):
        failed = _silent(code, tail, told)
    return Ended(code, row, failed, job, tail.decode(errors="replace"), tuple(rows), jobs)


def alive(child: object) -> bool:
    """Whether a child that a journal names ([pid, start]) still runs."""
    if not (isinstance(child, list) and len(child) == 2 and all(isinstance(number, int) for number in child)):
        return False
    found = tree.stat(child[0])
    return found is not None and found.alive and found.start_ticks == child[1]


def _silent(code: int, tail: bytes, told: bool) -> CkptError:
    if told or code in (130, 143, 129):
        return CkptError("stopped", hint="ckpt drain --resume")
    said = [line for line in tail.decode(errors="replace").splitlines() if line.strip()]
    what = f"ended by {signal.Signals(-code).name}" if -code in {int(one) for one in signal.Signals} else f"ended with status {code}"
    return Bug(f"its ckpt {what}{f': {said[-1][:300]}' if said else ''}")


def _interrupt(process: Process) -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)


def _lines(process: Process) -> Iterator[tuple[int | None, bytes]]:
    """(0 for stdout or 1 for stderr, a line), and (None, b"") a few times a second. A line that is too long is left out."""
    buffers = [bytearray(), bytearray()]
    with selectors.DefaultSelector() as selector:
        for number, stream in enumerate((process.stdout, process.stderr)):
            if stream is not None:
                selector.register(stream, selectors.EVENT_READ, number)
        next_s = 0.0
        while selector.get_map():
            for key, _ in selector.select(_LOOK_S):
                data = os.read(key.fd, 1 << 16)
                if not data:
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
                buffer = buffers[key.data]
                buffer += data
                *whole, rest = bytes(buffer).split(b"\n")
                buffer[:] = rest if len(rest) <= LINE_CAP else b""
                for line in whole:
                    yield key.data, line
            if time.monotonic() >= next_s:
                next_s = time.monotonic() + _LOOK_S
                yield None, b""


def _json(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _event(name: str, value: Mapping[str, Any]) -> Event | None:
    """An event as `--format jsonl` spells it (`step_done`); None for what is none, or not with what belongs into it."""
    if not re.fullmatch(r"[a-z_]{1,40}", name):
        return None
    event = messages.event_from_json({**value, "event": "".join(part.capitalize() for part in name.split("_"))})
    if event is None:
        return None
    texts = all(isinstance(getattr(event, key, ""), str) for key in ("target", "step", "detail", "text"))
    numbers = all(isinstance(getattr(event, key, 0), int | float) for key in ("done_bytes", "duration_s", "at_s", "frozen_s", "number"))
    maybe = all(isinstance(getattr(event, key, None), int | float | None) for key in ("total_bytes", "round", "dirty_bytes_s"))
    return event if texts and numbers and maybe and isinstance(getattr(event, "values", {}), dict) else None
