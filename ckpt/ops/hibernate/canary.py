"""A small process of our own that is dumped and restored before anything else: does CRIU work on the kernel that this host runs now?"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from ckpt.criu import swrk, tree
from ckpt.errors import CkptError
from ckpt.host.run import CommandFailed, spawn
from ckpt.ops import faults

LIMIT_S: Final = 30.0
"""For each of dump and restore."""
ANSWER_LIMIT_S: Final = 60.0
"""Long: a host that has just booted is busy, and a canary that is only slow must not cost every workload its state."""
TRIES: Final = 2
_POLL_S: Final = 0.005
# What it knows it has in its memory and in a pipe; it says so, when asked, with a file.
_BIRD: Final = """
import hashlib, os, random, signal, sys
said, seed = sys.argv[1], sys.argv[2]
memory = random.Random(seed).randbytes(1 << 20)
digest = hashlib.sha256(memory).hexdigest()
reader, writer = os.pipe()
os.write(writer, seed.encode())
def tell(text):
    with open(said + ".part", "w") as out:
        out.write(text)
    os.rename(said + ".part", said)
# Blocked, so that it is not lost when it comes before anybody waits for it.
asked = {signal.SIGUSR1}
signal.pthread_sigmask(signal.SIG_BLOCK, asked)
tell("ready")
while signal.sigtimedwait(asked, 0.1) is None:
    pass
whole = os.read(reader, 64) == seed.encode() and hashlib.sha256(memory).hexdigest() == digest
tell("well" if whole else "ill")
while True:
    signal.pause()
"""


@dataclass(frozen=True, slots=True)
class Song:
    """How it went; `error` is "" when all is well."""

    ok: bool
    error: str
    took_s: float


def sing() -> Song:
    """Dump and restore a small process, twice if need be; never raises for what CRIU does not do."""
    began, song = time.monotonic(), Song(False, "", 0.0)
    for _ in range(TRIES):
        song = _try(began)
        if song.ok:
            break
    return song


def _try(began: float) -> Song:
    try:
        with TemporaryDirectory(prefix="ckpt-canary-") as directory:
            _sing(Path(directory))
    except swrk.CriuFailed as error:
        last = next((line for line in reversed(error.log_text().splitlines()) if "Error" in line), "")
        return Song(False, f"{error}{': ' + last.strip() if last else ''}", time.monotonic() - began)
    except (CkptError, CommandFailed, OSError) as error:
        return Song(False, str(error), time.monotonic() - began)
    return Song(True, "", time.monotonic() - began)


def _sing(directory: Path) -> None:
    images, work, said = directory / "images", directory / "work", directory / "said"
    images.mkdir(mode=0o700)
    work.mkdir(mode=0o700)
    with open(os.devnull, "r+b") as null:
        argv: list[str | os.PathLike[str]] = [sys.executable or "/usr/bin/python3", "-I", "-S", "-c", _BIRD, said, directory.name]
        bird = spawn(argv, stdin=null, stdout=null, stderr=null, cwd=directory, new_session=True)
    pid, restored = bird.pid, 0
    try:
        _wait(said, "ready")
        swrk.dump(swrk.Request(images, work, "dump.log"), pid, limit=swrk.Limit(LIMIT_S))
        end = time.monotonic() + ANSWER_LIMIT_S
        while bird.poll() is None and time.monotonic() < end:  # as our child it would keep its number
            time.sleep(_POLL_S)
        faults.point("canary")
        said.unlink()
        restored = swrk.restore(swrk.Request(images, work, "restore.log"), limit=swrk.Limit(LIMIT_S))
        os.kill(restored, signal.SIGUSR1)
        _wait(said, "well")
    finally:
        if bird.returncode is None:
            bird.kill()
            with suppress(CommandFailed):
                bird.wait()
        # Only the one that was restored, not whoever has its number later.
        if restored and directory.name in tree.argv(restored):
            with suppress(ProcessLookupError):
                os.kill(restored, signal.SIGKILL)
            end = time.monotonic() + ANSWER_LIMIT_S
            while (found := tree.stat(restored)) and found.alive and time.monotonic() < end:
                time.sleep(_POLL_S)


def _wait(said: Path, wanted: str) -> None:
    end = time.monotonic() + ANSWER_LIMIT_S
    while time.monotonic() < end:
        with suppress(FileNotFoundError):
            text = said.read_text()
            if text != wanted:
                raise CkptError(f"the canary is not as it was ({text})")
            return
        time.sleep(_POLL_S)
    raise CkptError(f"the canary did not answer in {ANSWER_LIMIT_S:g} s")
