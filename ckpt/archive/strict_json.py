"""JSON from outside, read so that no two readers can understand it differently: one value for a key, finite numbers, no depth without end.

Go's reader, which podman has, takes the last of two equal keys and finds `"Privileged"` where `"privileged"` is meant; C readers take
the first, and only the exact one. So equal keys are refused here, and `fields` gives what any of them could find.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from ckpt.errors import ArchiveInvalid

MAX_DEPTH: Final = 40
"""An OCI runtime configuration needs 9."""
MAX_VALUES: Final = 500_000
MAX_DIGITS: Final = 40
_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # one that does not end takes the rest, so that no text takes quadratic time


def parse(data: bytes, member: str) -> Any:
    """One JSON value; the error names `member`.

    Raises:
        ArchiveInvalid: not JSON in UTF-8, a key twice in one object, a number that is none, too deep, too many values.
    """
    # Before the parser, whose recursion is C's: brackets in strings do not count.
    depth = deepest = 0
    values = 0
    for byte in _STRING.sub(b"0", data):
        if byte in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"]}":
            depth -= 1
        elif byte in b",:":
            values += 1
    if deepest > MAX_DEPTH:
        raise ArchiveInvalid(f"{member} is nested too deeply")
    if values > MAX_VALUES:
        raise ArchiveInvalid(f"{member} has too many values")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant, parse_int=_integer, parse_float=_number)
    except (ValueError, RecursionError) as error:
        raise ArchiveInvalid(f"{member} is not valid JSON: {_printable(str(error))}") from None


def fields(value: object, where: str) -> dict[str, Any]:
    """The fields of an object by their names in lower case, as a reader that does not care for case finds them; {} for null.

    Raises:
        ArchiveInvalid: no object, or two names that differ only in case.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ArchiveInvalid(f"{where} is not an object")
    found: dict[str, Any] = {}
    for key, item in value.items():
        folded = str(key).casefold()
        if folded in found:
            raise ArchiveInvalid(f"{where} has {_printable(str(key))!r} twice, in different case")
        found[folded] = item
    return found


def texts(value: object, where: str) -> list[str]:
    """A list of texts; [] for null. Raises ArchiveInvalid."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ArchiveInvalid(f"{where} is not a list of texts")
    return value


def items(value: object, where: str) -> list[Any]:
    """A list; [] for null. Raises ArchiveInvalid."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise ArchiveInvalid(f"{where} is not a list")
    return value


def text(value: object, where: str) -> str:
    """A text; "" for null. Raises ArchiveInvalid."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ArchiveInvalid(f"{where} is not text")
    return value


def integer(value: object, where: str) -> int:
    """A whole number; 0 for null. Raises ArchiveInvalid."""
    if value is None:
        return 0
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArchiveInvalid(f"{where} is not a whole number")
    return value


def flag(value: object, where: str) -> bool:
    """True or false; false for null. Raises ArchiveInvalid."""
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ArchiveInvalid(f"{where} is neither true nor false")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:64]!r} is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError("a number has too many digits")
    return int(digits)


def _number(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")
    return value


def _printable(words: str) -> str:
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", "?", words)[:200]
