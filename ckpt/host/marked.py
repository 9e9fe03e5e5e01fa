"""Programs of other people (hooks) with an end that is certain: what they start carries a mark in its environment, and is found by it."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Final

from ckpt.host.run import PIPE, CommandFailed, Process, Result, spawn

VARIABLE: Final = "CKPT_HOOK_ID"
OUTPUT_CAP_BYTES: Final = 64 << 10
END_LIMIT_S: Final = 5.0
POLL_S: Final = 0.01
_DRAIN_S: Final = 1.0


def new_mark() -> str:
    """A mark that no other process of this host has."""
    return secrets.token_hex(8)


def marked(mark: str) -> list[int]:
    """Pids of the living processes, in containers too, that were started with this mark. A zombie has no environment."""
    wanted = f"{VARIABLE}={mark}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
                if wanted in file.read().split(b"\0"):
                    found.append(int(name))
    return found


def end(mark: str, limit_s: float = END_LIMIT_S) -> bool:
    """Kill everything that has the mark; whether all of it is gone within the time."""
    deadline_s = time.monotonic() + limit_s
    quiet = 0
    while quiet < 2:  # once more: one may just have been starting another
        pids = marked(mark)
        quiet = 0 if pids else quiet + 1
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if pids and time.monotonic() > deadline_s:
            return False
        if quiet < 2:
            time.sleep(POLL_S)
    return True


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    mark: str,
    timeout_s: float,
    env: Mapping[str, str] | None = None,
    input: bytes = b"",
    alone: bool = False,
    pass_fds: Sequence[int] = (),
) -> Result:
    """Run a program to its end, whatever it does; its output (both streams in one, `stdout`) is cut at OUTPUT_CAP_BYTES.

    Args:
        mark: of `new_mark`; the program gets it in its environment.
        input: for its standard input; less than a pipe holds (64 KiB).
        alone: what it has started must be over as well.

    Raises:
        CommandFailed: not startable, or not over in time; then it and what it started are killed. Its exit status is the caller's to judge.
    """
    deadline_s = time.monotonic() + timeout_s
    args = tuple(os.fspath(arg) for arg in argv)
    process = spawn(argv, stdin=PIPE, stdout=PIPE, stderr=subprocess.STDOUT, env={**(env or {}), VARIABLE: mark}, new_session=True, pass_fds=pass_fds)
    assert process.stdin is not None and process.stdout is not None
    kept = bytearray()
    reader = threading.Thread(target=_read, args=(process.stdout, kept), daemon=True)
    reader.start()
    try:
        with suppress(OSError):  # it need not read
            process.stdin.write(input)
            process.stdin.flush()
        with suppress(OSError):
            process.stdin.close()
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise CommandFailed(_result(args, -signal.SIGKILL, kept), f"it was not over in {timeout_s:g} s, and was ended") from None
        while alone and marked(mark):
            if time.monotonic() > deadline_s:
                reason = f"what it started was not over in {timeout_s:g} s, and was ended"
                raise CommandFailed(_result(args, process.returncode, kept), reason)
            time.sleep(POLL_S)
    except BaseException:
        _kill(process, mark)
        raise
    finally:
        reader.join(_DRAIN_S)  # a process that lives on may keep the pipe open
    return _result(args, process.returncode, kept)


def _kill(process: Process, mark: str) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end(mark)


def _read(pipe: IO[bytes], kept: bytearray) -> None:
    """Read to the end, so that the program never waits for us; keep the beginning."""
    with suppress(OSError, ValueError):
        while block := os.read(pipe.fileno(), 1 << 16):
            kept += block[: max(0, OUTPUT_CAP_BYTES - len(kept))]


def _result(argv: tuple[str, ...], returncode: int, kept: bytearray) -> Result:
    return Result(argv, returncode, bytes(kept), b"")
