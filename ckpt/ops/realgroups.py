"""Which of a host's workloads move as one: those that `ckpt migrate --group` knows as a group, and can move.

What merely depends on each other, or shares a volume, goes to one host, one after the other (draining).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ckpt.errors import CkptError, UsageError
from ckpt.model import Container
from ckpt.ops import group_migrate, members
from ckpt.ops.migrate import MigrateOptions
from ckpt.ops.placing import together
from ckpt.store import groups

LABELS: Final = (members.LABEL, *members.PROJECT)
"""The label comes before the compose project when there are both."""


@dataclass(frozen=True, slots=True)
class Sets:
    """What was found."""

    names: Mapping[str, str]
    """Target -> the name of the group that it moves with."""
    held_back: Mapping[str, CkptError]
    """Those that could go, and stay because one that they move with cannot."""
    notes: tuple[str, ...]
    """Of groups that do not move as one, or not as a whole: why."""


def ties(container: Container) -> list[str]:
    """The groups that a container says to be of."""
    return [f"group {container.labels[key]}" for key in LABELS if container.labels.get(key)]


def find(
    going: Sequence[members.Found],
    skipped: Sequence[tuple[str, Container]],
    unfit: Sequence[tuple[str, Container, CkptError]],
    *,
    ignore_volumes: bool,
) -> Sets:
    """Find them.

    Args:
        going: those that may go.
        skipped: those that stay as somebody wants it; the others of their group go without them, which is told.
        unfit: those that stay because they cannot be saved; the others of their group stay with them.
    """
    by_target = {target: container for target, _, container in going}
    bad = {target: error for target, _, error in unfit}
    every = {**by_target, **{target: container for target, container, _ in unfit}, **dict(skipped)}
    leaders = together({target: ties(container) for target, container in every.items()})
    names: dict[str, str] = {}
    held_back: dict[str, CkptError] = {}
    notes: list[str] = []
    for leader in dict.fromkeys(leaders.values()):
        all_of_it = [target for target in every if leaders.get(target) == leader]
        mine = [target for target in all_of_it if target in by_target]
        broken = [target for target in all_of_it if target in bad]
        name = _name([every[target] for target in all_of_it])
        if not mine:
            continue
        if why := _refusal(name, [one for one in going if one[0] in mine], ignore_volumes) if len(mine) + len(broken) > 1 else "":
            notes.append(f"the members of {name} are moved one after the other: {why}")
            continue
        if broken:
            cause = bad[broken[0]]
            for target in mine:
                message = f"{every[target].name} stays with {every[broken[0]].name}, of the same group {name}: {cause.message}"
                held_back[target] = type(cause)(message, where=f"{every[target].name} is running, untouched", log=cause.log)
            continue
        left = [every[target].name for target in all_of_it if target not in by_target]
        if left:
            notes.append(f"{name} moves without {', '.join(left)}: connections between them and the others break")
        names.update(dict.fromkeys(mine if len(mine) > 1 else (), name))
    return Sets(names, held_back, tuple(notes))


def _name(containers: Sequence[Container]) -> str:
    """What most of them call it, the label first."""
    words = [container.labels[key] for key in LABELS for container in containers if container.labels.get(key)]
    return max(dict.fromkeys(words), key=words.count)


def _refusal(name: str, found: Sequence[members.Found], ignore_volumes: bool) -> str:
    """Why they cannot move as one; "" when they can."""
    try:
        groups.check_name(name)
        members.order(found)
        group_migrate.refuse_members(found, MigrateOptions(ignore_volumes=ignore_volumes))
    except UsageError as error:
        return error.message
    return ""
