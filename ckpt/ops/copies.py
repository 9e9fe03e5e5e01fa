"""Which copies are wanted: their names, and the ports of the host for each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

from ckpt.errors import UsageError

MOST: Final = 256
"""Copies at once. Each has a network address, a conmon and a daemon of CRIU."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", re.ASCII)
_RANGE: Final = re.compile(r"(-?\d{1,9})\.\.(-?\d{1,9})", re.ASCII)
_PORT: Final = re.compile(
    r"(?:(?:(?P<ip>\[[0-9A-Fa-f:.]+\]|[0-9.]*):)?(?P<host>[0-9-]*):)?(?P<container>\d{1,5})(?:/(?P<protocol>tcp|udp|sctp))?", re.ASCII
)


def expand(text: str) -> list[str]:
    """What a shell makes of braces: `web-{1..3}`, `{a,b}-{01..10}`; a text without braces is itself.

    Raises:
        UsageError: a brace that is not closed, nested ones, or more than `MOST`.
    """
    found = [""]
    rest = text
    while rest:
        head, brace, tail = rest.partition("{")
        if "}" in head:
            raise UsageError(f"{text!r}: a brace is closed that was not opened")
        inner, closed, after = tail.partition("}")
        if brace and not closed:
            raise UsageError(f"{text!r}: a brace is not closed")
        if "{" in inner:
            raise UsageError(f"{text!r}: braces within braces are not known here", hint="let the shell expand it: leave out the quotes")
        words = list(_words(inner, text)) if brace else [""]
        if len(found) * len(words) > MOST:
            raise UsageError(f"{text!r}: more than {MOST} copies at once")
        found = [one + head + word for one in found for word in words]
        rest = after
    return found


def _words(inner: str, text: str) -> Iterator[str]:
    if range_ := _RANGE.fullmatch(inner):
        first, last = int(range_[1]), int(range_[2])
        if abs(last - first) >= MOST:
            raise UsageError(f"{text!r}: more than {MOST} copies at once")
        # As a shell does it: zeros in front of either bound are for all.
        wide = max(len(word) for word in range_.groups()) if any(re.match(r"-?0\d", word) for word in range_.groups()) else 0
        step = 1 if last >= first else -1
        for number in range(first, last + step, step):
            yield f"{number:0{wide}d}"
    elif "," in inner:
        yield from inner.split(",")
    else:
        raise UsageError(f"{text!r}: {{{inner}}} is neither a range nor a list", hint="{1..8} or {a,b}")


def names(given: Sequence[str], original: str, count: int | None) -> list[str]:
    """The names of all copies: those given, expanded, or ORIGINAL-1 … ORIGINAL-count.

    Raises:
        UsageError: none, both ways, one twice, one that is no name, too many.
    """
    if given and count is not None:
        raise UsageError("name the copies (-n) or count them (--count), not both")
    if count is not None and not 1 <= count <= MOST:
        raise UsageError(f"--count goes from 1 to {MOST}")
    found = [name for text in given for name in expand(text)] if count is None else [f"{original}-{number}" for number in range(1, count + 1)]
    if not found:
        raise UsageError("how many copies?", hint=f"-n {original}-{{1..8}}, or --count 8")
    if len(found) > MOST:
        raise UsageError(f"more than {MOST} copies at once")
    for name in found:
        if not _NAME.fullmatch(name):
            raise UsageError(f"{name[:140]!r} cannot be a container's name")
    if twice := [name for name in dict.fromkeys(found) if found.count(name) > 1]:
        raise UsageError(f"{twice[0]} is named twice")
    return found


def ports(given: Sequence[str], count: int) -> list[tuple[str, ...]]:
    """What each copy publishes: of `8080-8087:80` one port of the host each, of `80` (or `:80`) one that the engine chooses.

    Raises:
        UsageError: it is no mapping, or there are not as many ports as copies.
    """
    each: list[list[str]] = [[] for _ in range(count)]
    taken: dict[tuple[str, int, str], str] = {}
    for text in given:
        found = _PORT.fullmatch(text)
        if found is None:
            hint = "8080-8087:80, one port of the host for each copy; or 80, for ones that are free"
            raise UsageError(f"{text[:64]!r} is no published port", hint=hint)
        protocol = found["protocol"] or "tcp"
        inside = _port(found["container"], text)
        prefix, tail = (f"{found['ip']}:" if found["ip"] else ""), f"{inside}/{protocol}"
        if not found["host"]:
            for own in each:
                own.append(f"{prefix}:{tail}" if prefix else tail)
            continue
        first, dash, last = found["host"].partition("-")
        low = _port(first, text)
        high = _port(last, text) if dash else low
        if high - low + 1 != count:
            there = f"{high - low + 1} port{'s' if high > low else ''}"
            raise UsageError(f"{text}: {there} for {count} {'copies' if count > 1 else 'copy'}", hint=f"{low}-{min(low + count - 1, 65535)}:{inside}")
        for own, port in zip(each, range(low, high + 1), strict=True):
            if (before := taken.setdefault((found["ip"] or "", port, protocol), text)) != text:
                raise UsageError(f"port {port} is in both {before} and {text}")
            own.append(f"{prefix}{port}:{tail}")
    return [tuple(own) for own in each]


def _port(text: str, whole: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise UsageError(f"{whole[:64]!r}: {text or 'nothing'} is no port")
    return int(text)
