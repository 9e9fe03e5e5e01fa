"""Tokens and other headers that nobody may see: from files and commands, never from a command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ckpt.errors import KeyProblem
from ckpt.host.run import CommandFailed, run

MAX_BYTES: Final = 64 << 10
COMMAND_LIMIT_S: Final = 30.0
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([\x20-\x7e\t]*)")


def token(file: Path | None, command: Sequence[str]) -> str | None:
    """The first line of a file, or of what a command prints; None when neither is given.

    Raises:
        KeyProblem: it cannot be had, or is no token. The message never holds any of it.
    """
    if file is not None:
        return _usable(_read(file, "token file"), f"token file {file}")
    if command:
        try:
            done = run(list(command), timeout_s=COMMAND_LIMIT_S)
        except CommandFailed as error:
            # What it said on stderr may hold what it should have printed.
            reason = "it did not end in time" if "no answer" in error.reason else f"exit status {error.result.returncode}"
            raise KeyProblem(f"the token command {command[0]} failed: {reason}", hint="run it by hand") from None
        return _usable(done.stdout[: MAX_BYTES + 1], f"token command {command[0]}")
    return None


def headers(file: Path | None) -> dict[str, str]:
    """The `Name: value` lines of a file; empty lines and those with # are left out.

    Raises:
        KeyProblem: it cannot be read, or has another line.
    """
    found: dict[str, str] = {}
    if file is None:
        return found
    for number, line in enumerate(_read(file, "header file").decode("latin-1").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        matched = _HEADER.fullmatch(line.rstrip())
        if matched is None or matched[1].lower() in ("host", "content-length", "transfer-encoding", "connection", "range"):
            raise KeyProblem(f"line {number} of the header file {file} is not a header that can be sent", hint="write lines as: Name: value")
        found[matched[1]] = matched[2]
    return found


def _read(file: Path, what: str) -> bytes:
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_BYTES + 1)
    except OSError as error:
        raise KeyProblem(f"the {what} {file} cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise KeyProblem(f"the {what} {file} is too large")
    return data


def _usable(data: bytes, what: str) -> str:
    line = data.split(b"\n", 1)[0].strip()
    if not line:
        raise KeyProblem(f"the {what} gave nothing")
    if len(data) > MAX_BYTES or not re.fullmatch(rb"[\x21-\x7e]+", line):
        raise KeyProblem(f"the {what} gave something that is no token", hint="one line of letters, digits and signs")
    return line.decode("ascii")
