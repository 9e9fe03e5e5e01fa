"""The forced command of a key in authorized_keys: which commands of ckpt's own clients it lets through.

What a client may send is a list, not a pattern that something is forbidden in: every word is understood, or the command is refused. What
runs is made anew of what was understood. sshd sets SSH_ORIGINAL_COMMAND (sshd(8)).
"""

from __future__ import annotations

import io
import re
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckpt.errors import CkptError, RemoteRefused

_MAX_BYTES: Final = 4096
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
_REF: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}(@(\d{1,9}|latest))?")
_SOCKET: Final = re.compile(r"/[A-Za-z0-9_./-]{0,80}ckpt-streams-[A-Za-z0-9_]{1,32}/[A-Za-z0-9_.-]{1,64}")
_Check = Callable[[str], bool]
_KINDS: Final[dict[str, _Check]] = {
    "--compress": lambda text: text in ("zstd", "gzip", "none"),
    "--level": lambda text: bool(re.fullmatch(r"\d{1,2}", text)),
    "--name": lambda text: bool(_NAME.fullmatch(text)),
    "--join": lambda text: bool(_SOCKET.fullmatch(text)) and ".." not in text,
    "--output": lambda text: text == "-",
}
_SHORT: Final = {"-c": "--compress", "-n": "--name", "-o": "--output"}


@dataclass(frozen=True, slots=True)
class Allowed:
    """A command that may run."""

    permission: str
    words: list[str]
    """For ckpt's own command line, the store included."""


def permitted(original: str | None, allow: Collection[str], *, store: Path) -> Allowed:
    """What of the client's command is to be run.

    Raises:
        RemoteRefused: it is none of those that are allowed here.
    """
    if not original:
        raise RemoteRefused("this key is for ckpt only: no shell, no login")
    try:
        words = shlex.split(original) if len(original) <= _MAX_BYTES and original.isprintable() else []
    except ValueError:
        words = []
    if len(words) < 2 or words[0] not in ("ckpt", "/usr/bin/ckpt", "/usr/local/bin/ckpt"):
        raise _refused()
    name, rest = words[1], words[2:]
    if name == "peer":
        permission, made = "migrate", _options(rest, ("--join",), places=0)
    elif name == "import":
        permission, made = "upload", _options(rest, ("--name",), places=1)
        _exactly(made[-1:], "-")
    elif name == "export":
        permission, made = "download", _export(rest)
    else:
        raise _refused()
    if permission not in allow:
        raise RemoteRefused(f"this key does not allow {permission}")
    if permission == "download":
        _in_store(made[-2:], store)
    guest = ["--guest"] if name == "peer" else []
    return Allowed(permission, [name, "--store", str(store), *guest, *made])


def _options(words: Sequence[str], known: Collection[str], *, places: int) -> list[str]:
    """The words again: options first, each with a value that is as it must be, `--`, places. Raises RemoteRefused."""
    options: list[str] = []
    found: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "-" or not word.startswith("-"):
            found.append(word)
            continue
        name, equals, value = word.partition("=")
        name = _SHORT.get(name, name)
        if name not in known or (not equals and not rest) or name in options:
            raise _refused()
        value = value if equals else rest.pop(0)
        if not _KINDS[name](value):
            raise _refused()
        options += [name, value]
    if len(found) != places:
        raise _refused()
    return [*options, "--", *found] if places else options


def _export(words: Sequence[str]) -> list[str]:
    """`export REF -o -`, or `export REF -`."""
    known = ("--compress", "--level", "--output")
    two = [word for word in words if not word.startswith("-") or word == "-"]
    places = 2 if two[-1:] == ["-"] and not any(word in ("-o", "--output") for word in words) else 1
    made = _options(words, known, places=places)
    ref = made[made.index("--") + 1]
    if not _REF.fullmatch(ref):
        raise _refused()
    if places == 2:
        _exactly(made[-1:], "-")
    elif "--output" not in made:
        raise _refused()
    return made


def _in_store(places: Sequence[str], store: Path) -> None:
    """Only what is in the store goes out: the name of a running container would dump it."""
    from ckpt.store.catalog import Catalog

    ref = next(word for word in places if word not in ("-", "--"))
    try:
        Catalog(store).find(ref)
    except CkptError:
        raise RemoteRefused(f"there is no checkpoint {ref!r} here") from None


def _exactly(words: Sequence[str], wanted: str) -> None:
    if list(words) != [wanted]:
        raise _refused()


def _refused() -> RemoteRefused:
    return RemoteRefused("this key does not allow that command", hint="it is for ckpt migrate, `ckpt import -` and `ckpt export CHECKPOINT -o -`")


class _Limited(io.RawIOBase):
    """A stream that ends with an error when it is longer than it may be."""

    def __init__(self, below: io.BufferedIOBase, limit_bytes: int) -> None:
        self._below = below
        self._left = limit_bytes

    def readable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._below.fileno()

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)  # type: ignore[arg-type]
        count = self._below.readinto1(view)
        self._left -= count
        if self._left < 0:
            raise RemoteRefused("the archive is larger than this key may send")
        return count


def limit_stdin(limit_bytes: int) -> None:
    """From now on standard input is at most so long."""
    below = sys.stdin.buffer
    assert isinstance(below, io.BufferedIOBase)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(_Limited(below, limit_bytes), 1 << 20), encoding="utf-8", errors="replace")
