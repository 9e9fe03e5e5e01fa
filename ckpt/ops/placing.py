"""Which workload goes to which host: by memory, without I/O.

Groups stay together. The largest goes first, to where the most is free afterwards; when that leaves something over, the tightest fit is tried
as well, and the better of the two is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from ckpt.ops.compat import size_text

RESERVE_SHARE: Final = 0.1
RESERVE_LEAST_BYTES: Final = 64 << 20
_NEAR: Final = 1 / 16
"""Rooms that are free to shares that differ by no more than this count as equal; then it counts how many each took, and which container images
it lacks. Free memory moves all the time: what is that near says nothing."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A workload that wants to go somewhere."""

    target: str
    memory_bytes: int
    group: str = ""
    """Goes where the others of that group go; "": alone."""


@dataclass(frozen=True, slots=True)
class Room:
    """A host that takes some."""

    destination: str
    free_bytes: int
    """Memory that is available there; 0: not known, then it is not counted."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Target -> why it cannot run there (engine, CPU, a name or port that is taken, ...)."""
    prepared: frozenset[str] = frozenset()
    """Targets of which the container image is there already."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Target -> destination; and of those that have none, target -> destination -> why not."""

    chosen: dict[str, str]
    unplaced: dict[str, dict[str, str]]


def reserve_bytes(room: Room, reserve: int | None) -> int:
    """What is left free in a room: `reserve`, else a tenth of what is available, and 64 MiB at least."""
    return max(RESERVE_LEAST_BYTES, int(room.free_bytes * RESERVE_SHARE)) if reserve is None else reserve


def place(demands: Sequence[Demand], rooms: Sequence[Room], *, reserve: int | None = None, took: Mapping[str, int] | None = None) -> Placement:
    """Place all that fits.

    Args:
        rooms: in the order in which they are preferred when all else is equal.
        reserve: memory in bytes to be left free in each (None: see reserve_bytes).
        took: destination -> how many it took before.
    """
    groups = grouped(demands)
    loose, tight = (_place(groups, rooms, reserve, took or {}, tight=way) for way in (False, True))
    return loose if len(loose.chosen) >= len(tight.chosen) else tight


def grouped(demands: Iterable[Demand]) -> list[list[Demand]]:
    """Those that go together, each group in its order."""
    found: dict[str, list[Demand]] = {}
    for demand in demands:
        found.setdefault(f"group {demand.group}" if demand.group else f"alone {demand.target}", []).append(demand)
    return list(found.values())


def _place(
    groups: Sequence[Sequence[Demand]], rooms: Sequence[Room], reserve: int | None, took: Mapping[str, int], *, tight: bool
) -> Placement:
    left = {room.destination: room.free_bytes - reserve_bytes(room, reserve) if room.free_bytes else None for room in rooms}
    chosen: dict[str, str] = {}
    unplaced: dict[str, dict[str, str]] = {}
    load = {destination: took.get(destination, 0) for destination in left}
    for members in sorted(groups, key=lambda group: (-_size(group), group[0].target)):
        size = _size(members)
        why: dict[str, str] = {}
        fit: dict[str, tuple[float, tuple[float, ...]]] = {}
        for number, room in enumerate(rooms):
            refusal = _refusal(members, room, left[room.destination], size)
            if refusal:
                why[room.destination] = refusal
                continue
            free = left[room.destination]
            after = 0 if free is None else free - size
            share = after / max(room.free_bytes, 1) * (-1 if tight else 1)
            missing = sum(member.target not in room.prepared for member in members)
            fit[room.destination] = share, (missing + load[room.destination], load[room.destination], -after, number)
        if not fit:
            unplaced.update({member.target: why for member in members})
            continue
        most = max(share for share, _ in fit.values())
        best = min((rank, destination) for destination, (share, rank) in fit.items() if share >= most - _NEAR)[1]
        chosen.update({member.target: best for member in members})
        load[best] += len(members)
        free = left[best]
        left[best] = None if free is None else free - size
    return Placement(chosen, unplaced)


def _size(members: Iterable[Demand]) -> int:
    return sum(member.memory_bytes for member in members)


def _refusal(members: Sequence[Demand], room: Room, free: int | None, size: int) -> str:
    for member in members:
        if member.target in room.refused:
            return f"{f'{member.target}: ' if len(members) > 1 else ''}{room.refused[member.target]}"
    if free is not None and size > free:
        together = f" for its group of {len(members)}" if len(members) > 1 else ""
        return f"{size_text(size)} of memory needed{together}, {size_text(max(free, 0))} free there besides what is reserved"
    return ""


def together(members: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Which belong together.

    Args:
        members: target -> what ties it to others: any words, its own included, that another one has too.

    Returns:
        target -> the name of its group (its first target), for those that are not alone.
    """
    leader: dict[str, str] = {}

    def find(word: str) -> str:
        while leader.setdefault(word, word) != word:
            leader[word] = leader[leader[word]]
            word = leader[word]
        return word

    for target, ties in members.items():
        for tie in ties:
            leader[find(f"tie {tie}")] = find(f"target {target}")
    groups: dict[str, list[str]] = {}
    for target in members:
        groups.setdefault(find(f"target {target}"), []).append(target)
    return {target: those[0] for those in groups.values() if len(those) > 1 for target in those}
