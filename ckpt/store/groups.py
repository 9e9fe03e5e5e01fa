"""Checkpoints that were made together, of one instant: `groups/NAME@N.json` in the store, schema 1, written once all of them are in it.

A checkpoint of a group is one like any other; the record is what makes them a set. It is there as a whole or not at all, so no set is ever
a mixed one. One whose members are no longer all there (somebody removed one) cannot be restored as a group.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from ckpt.errors import ArchiveInvalid, TargetNotFound, UsageError
from ckpt.model import Checkpoint

SCHEMA: Final = 1
DIRECTORY: Final = "groups"
MAX_BYTES: Final = 1 << 20
MAX_MEMBERS: Final = 1000
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}\Z")
_FILE: Final = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,99})@([1-9]\d{0,9})\.json\Z", re.ASCII)


@dataclass(frozen=True, slots=True)
class Member:
    """A checkpoint of a group."""

    target: str
    """In full, `podman:web`."""
    name: str
    checkpoint_id: str
    after: tuple[str, ...] = ()
    """Targets of the group that come back before it."""


@dataclass(frozen=True, slots=True)
class Group:
    """One set of checkpoints."""

    name: str
    generation: int
    created_s: float
    skew_s: float
    """How far apart the moments may be at which the members were frozen."""
    members: tuple[Member, ...]

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.generation}"


def tag(name: str) -> str:
    """The tag that the checkpoints of a group have."""
    return f"group:{name}"


def check_name(text: str) -> str:
    """Raise UsageError for what cannot be a group's name."""
    if not _NAME.match(text):
        raise UsageError(f"{text[:64]!r} cannot be a group's name", hint="letters, digits and _ . - , at most 100, the first a letter or digit")
    return text


def dumps(group: Group) -> bytes:
    return json.dumps({"schema": SCHEMA, **asdict(group)}, indent=1, sort_keys=True).encode() + b"\n"


def loads(data: bytes) -> Group:
    """Raises ArchiveInvalid when it is not a record of this schema."""
    try:
        plain = json.loads(data) if len(data) <= MAX_BYTES else None
        if not isinstance(plain, dict) or plain.get("schema") != SCHEMA or not isinstance(plain["members"], list):
            raise ValueError
        if not 0 < len(plain["members"]) <= MAX_MEMBERS:
            raise ValueError
        members = tuple(_member(row) for row in plain["members"])
        return Group(check_name(str(plain["name"])), int(plain["generation"]), float(plain["created_s"]), float(plain["skew_s"]), members)
    except (ValueError, KeyError, TypeError, RecursionError, UsageError):
        raise ArchiveInvalid("the record of a group is damaged or of another version") from None


def _member(row: dict[str, Any]) -> Member:
    after = tuple(str(one) for one in row.get("after", ()))[:MAX_MEMBERS]
    return Member(str(row["target"]), str(row["name"]), str(row["checkpoint_id"]), after)


def every(root: Path) -> list[Group]:
    """All that can be read, by name, oldest first."""
    found = []
    with suppress(FileNotFoundError):
        for path in (root / DIRECTORY).iterdir():
            if _FILE.match(path.name):
                with suppress(ArchiveInvalid, OSError), path.open("rb") as file:
                    found.append(loads(file.read(MAX_BYTES + 1)))
    return sorted(found, key=lambda group: (group.name, group.generation))


def find(root: Path, ref: str, known: Sequence[Checkpoint]) -> tuple[Group, list[Checkpoint]]:
    """The set that NAME (its newest) or NAME@N names, and its checkpoints, in the order of its members.

    Args:
        known: what is in the store.

    Raises:
        TargetNotFound: there is none, or it is no longer whole.
    """
    name, _, number = ref.partition("@")
    there = every(root)
    named = [group for group in there if group.name == name]
    wanted = [group for group in named if not number or number == "latest" or str(group.generation) == number]
    if not wanted:
        others = [group.ref for group in named] or sorted({group.name for group in there})
        hint = f"there is: {', '.join(others[-8:])}" if others else "ckpt checkpoint --group NAME makes one"
        raise TargetNotFound(f"there is no group {ref!r} in the store", hint=hint)
    group = wanted[-1]
    by_id = {checkpoint.manifest.id: checkpoint for checkpoint in known}
    missing = [member.name for member in group.members if member.checkpoint_id not in by_id]
    if missing:
        whole = [other.ref for other in named if all(member.checkpoint_id in by_id for member in other.members)]
        hint = f"whole are: {', '.join(whole)}" if whole else "what is left of it can be restored one by one: ckpt list"
        raise TargetNotFound(f"group {group.ref} is no longer whole: its checkpoint of {', '.join(missing)} was removed", hint=hint)
    return group, [by_id[member.checkpoint_id] for member in group.members]


def forget(root: Path, known: Sequence[Checkpoint]) -> None:
    """Remove the records of which not one checkpoint is left. Never raises for the disk's sake."""
    ids = {checkpoint.manifest.id for checkpoint in known}
    for group in every(root):
        if not any(member.checkpoint_id in ids for member in group.members):
            with suppress(OSError):
                path_of(root, group.name, group.generation).unlink()


def path_of(root: Path, name: str, generation: int) -> Path:
    """Where the record of a group is."""
    return root / DIRECTORY / f"{check_name(name)}@{generation}.json"
