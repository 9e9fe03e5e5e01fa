"""In which order: what a workload needs comes back before it, and is saved after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from ckpt.errors import UsageError
from ckpt.ops.hibernate.selection import Chosen, Selection

PROJECT: Final = "com.docker.compose.project"
SERVICE: Final = "com.docker.compose.service"
DEPENDS_ON: Final = "com.docker.compose.depends_on"
"""Labels of docker compose, and of podman-compose: `db:service_started:false,cache:service_healthy:true`."""


def edges(selection: Selection, *, lenient: bool = False) -> dict[str, tuple[str, ...]]:
    """For each target the targets that it comes after: by its engine (required containers), by compose's labels, by `ckpt.after`.

    What is there but not meant is left out.

    Args:
        lenient: names that nobody has, and circles, are left out instead of refused.

    Raises:
        UsageError: `after` names something that is not on this host, or there is a circle; tells of all.
    """
    problems: list[str] = []
    by_name: dict[str, list[str]] = {}
    for one in selection.chosen:
        for name in one.names:
            by_name.setdefault(name, []).append(one.target)
    services: dict[tuple[str | None, str | None], list[str]] = {}
    for one in selection.chosen:
        services.setdefault((one.labels.get(PROJECT), one.labels.get(SERVICE)), []).append(one.target)
    found: dict[str, tuple[str, ...]] = {}
    for one in selection.chosen:
        after = [target for identity in one.container.requires for target in by_name.get(identity, ())]
        after += [target for service in _services(one) for target in services.get((one.labels.get(PROJECT), service), ())]
        for name in one.after:
            if name in by_name:
                after += by_name[name]
            elif name not in selection.known:
                problems.append(f"{one.target} comes after {name[:64]!r}, which is not on this host")
        found[one.target] = tuple(dict.fromkeys(target for target in after if target != one.target))
        if one.target in after:
            problems.append(f"{one.target} comes after itself")
    circle = circle_in(found)
    if circle:
        problems.append("there is a circle: " + ", which comes after ".join([*circle, circle[0]]))
    if not problems:
        return found
    if not lenient:
        raise UsageError("; ".join(problems), where="nothing was touched", hint="mend ckpt.after (label), after (hibernate.toml) or depends_on")
    while circle:
        found[circle[0]] = tuple(target for target in found[circle[0]] if target not in circle)
        circle = circle_in(found)
    return found


def _services(one: Chosen) -> list[str]:
    if not one.labels.get(PROJECT):
        return []
    parts = one.labels.get(DEPENDS_ON, "").split(",")
    return [name for part in parts if (name := part.split(":")[0].strip())]


def circle_in(after: Mapping[str, Sequence[str]]) -> list[str]:
    """Targets that wait for each other, each for the next one; [] when there are none."""
    settled: set[str] = set()
    for start in after:
        at = [(start, iter(after[start]))] if start not in settled else []
        path = [start] if at else []
        while at:
            target, rest = at[-1]
            following = next((other for other in rest if other not in settled and other in after), None)
            if following is None:
                settled.add(target)
                at.pop()
                path.pop()
            elif following in path:
                return path[path.index(following) :]
            else:
                at.append((following, iter(after[following])))
                path.append(following)
    return []


def layers(after: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """Targets in layers: each comes after those of earlier layers only. No circle must be left."""
    left = dict(after)
    made: list[list[str]] = []
    while left:
        free = [target for target, needs in left.items() if not set(needs) & left.keys()]
        if not free:
            raise ValueError("a circle")
        made.append(free)
        for target in free:
            del left[target]
    return made
