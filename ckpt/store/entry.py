"""What this store knows about a checkpoint, beside the checkpoint: `checkpoints/ID/entry.json`, schema 1.

It is no member of a checkpoint: no archive brings it along, none takes it away. What an archive says about itself is in its manifest,
which stays as it came (a signature may cover it); name and generation that this store gave, where it came from, and what people
wrote down about it are here.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, Final

from ckpt.errors import ArchiveInvalid, UsageError
from ckpt.model import Entry
from ckpt.store import durable

FILE: Final = "entry.json"
SCHEMA: Final = 1
MAX_BYTES: Final = 64 << 10
MAX_NOTE: Final = 2000
MAX_TAGS: Final = 64
_TAG: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.=/:-]{0,127}\Z")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def check_tag(text: str) -> str:
    """Raise UsageError for what cannot be a tag."""
    if not _TAG.match(text):
        raise UsageError(f"{text[:64]!r} cannot be a tag", hint="letters, digits and _ . = / : - , at most 128, the first a letter or digit")
    return text


def check_note(text: str) -> str:
    """Raise UsageError for what cannot be a note."""
    if len(text) > MAX_NOTE or _CONTROL.search(text):
        raise UsageError(f"a note has at most {MAX_NOTE} characters and no control characters")
    return text


def dumps(entry: Entry) -> bytes:
    """As JSON with `"schema": 1`."""
    return json.dumps({"schema": SCHEMA, **dataclasses.asdict(entry)}, indent=1, sort_keys=True).encode() + b"\n"


def loads(data: bytes) -> Entry:
    """Raises ArchiveInvalid when it is not a record of this schema; fields of later versions are ignored."""
    try:
        plain = json.loads(data) if len(data) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict) or plain.get("schema") != SCHEMA:
        raise ArchiveInvalid(f"{FILE} is damaged or of another version")
    values: dict[str, Any] = {}
    for field, kind in _KINDS.items():
        value = plain.get(field)
        if value is None and field not in ("name", "generation"):
            continue
        if kind is tuple:
            if not isinstance(value, list) or len(value) > MAX_TAGS or not all(isinstance(tag, str) and _TAG.match(tag) for tag in value):
                raise ArchiveInvalid(f"{FILE} has no valid {field}")
            value = tuple(value)
        elif kind is float:
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise ArchiveInvalid(f"{FILE} has no valid {field}")
            value = float(value)
        elif not isinstance(value, kind) or (isinstance(value, int) and kind is int and (isinstance(value, bool) or value < 0)):
            raise ArchiveInvalid(f"{FILE} has no valid {field}")
        values[field] = value
    return Entry(**values)


_KINDS: Final[dict[str, type]] = {
    "name": str, "generation": int, "size_bytes": int, "stored_s": float, "origin": str, "manifest_digest": str,
    "tags": tuple, "note": str, "pinned": bool, "group": str,
}  # fmt: skip


def read(directory: Path) -> Entry | None:
    """The record of the checkpoint in `directory`; None for one that an older ckpt stored. Raises ArchiveInvalid, OSError."""
    try:
        with (directory / FILE).open("rb") as file:
            return loads(file.read(MAX_BYTES + 1))
    except FileNotFoundError:
        return None


def write(directory: Path, entry: Entry) -> None:
    """Whole or not at all, on the disk (0600)."""
    durable.write_file(directory / FILE, dumps(entry))
