"""Which workloads are of a group, and which of them come back before which."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Final

from ckpt.engines.base import HasPods
from ckpt.engines.registry import NamedEngine
from ckpt.errors import TargetNotFound, UsageError
from ckpt.model import Container, Target
from ckpt.ops import resolve

Found = tuple[str, NamedEngine, Container]
"""A member: its label (what was typed), its engine, the container fully described."""

LABEL: Final = "ckpt.group"
AFTER: Final = "ckpt.after"
PROJECT: Final = ("io.podman.compose.project", "com.docker.compose.project")
_SERVICE: Final = ("io.podman.compose.service", "com.docker.compose.service")
_DEPENDS: Final = ("io.podman.compose.depends_on", "com.docker.compose.depends_on")


def chosen(name: str, targets: Sequence[Target]) -> list[Found]:
    """What the user named, each once; without targets `members_of`.

    Raises:
        CkptError: one of them is not there, or there are none.
    """
    if not targets:
        return members_of(name)
    found: dict[tuple[str, str], Found] = {}
    for target in targets:
        engine, container = resolve.resolve(target)
        found.setdefault((engine.name, container.id), (str(target), engine, container))
    return list(found.values())


def members_of(name: str) -> list[Found]:
    """The running containers that say by a label that they are of this group, or of a compose project of this name; or of the pod.

    Raises:
        TargetNotFound: there are none.
    """
    running = resolve.all_running()
    found = [(engine, c) for engine, c in running if name in (c.labels.get(LABEL), *(c.labels.get(key) for key in PROJECT))]
    if found:
        return [(c.name or c.id, engine, c) for engine, c in found]
    members = _of_pod(name, running)
    if not members:
        hint = f"name its containers, or give them the label {LABEL}={name}"
        raise TargetNotFound(f"no running container is of the group {name!r}", hint=hint)
    return members


def of_pod(name: str) -> list[Found]:
    """The running containers of a pod, but for its infra container, which holds what they share and stays.

    Raises:
        TargetNotFound: there is no such pod, or none of them runs.
    """
    members = _of_pod(name, resolve.all_running())
    if not members:
        raise TargetNotFound(f"there is no pod {name!r} with running containers", hint="podman pod ps")
    return members


def _of_pod(name: str, running: Sequence[resolve.Resolved]) -> list[Found]:
    found: list[Found] = []
    for engine in {id(engine): engine for engine, _ in running}.values():
        if isinstance(engine, HasPods) and (pod := engine.pod(name)) is not None:
            found += [(c.name or c.id, e, c) for e, c in running if e is engine and c.pod == pod[0] and c.id != pod[1]]
    return found


def order(members: Sequence[Found]) -> dict[str, set[str]]:
    """Of each member (its container's id) those of the group that come back before it.

    What a container requires of podman, its label `ckpt.after`, and compose's `depends_on` say so; names that are not of the group are
    no matter here.

    Raises:
        UsageError: they wait for each other.
    """
    by_word: dict[str, set[str]] = {}
    for _, _, c in members:
        project = next((c.labels[key] for key in PROJECT if key in c.labels), "")
        service = next((c.labels[key] for key in _SERVICE if key in c.labels), "")
        for word in {c.id, c.name, *([f"{project}/{service}"] if service else [])}:
            by_word.setdefault(word, set()).add(c.id)
    after: dict[str, set[str]] = {}
    for _, _, c in members:
        project = next((c.labels[key] for key in PROJECT if key in c.labels), "")
        depends = next((c.labels[key] for key in _DEPENDS if key in c.labels), "")
        words = [*c.requires, *c.labels.get(AFTER, "").split(",")]
        # docker compose writes SERVICE:CONDITION:RESTART,...; podman-compose the services alone.
        words += [f"{project}/{one.partition(':')[0].strip()}" for one in depends.split(",") if one.strip()]
        after[c.id] = set().union(*(by_word.get(word.strip(), set()) for word in words)) - {c.id}
    waves(after, {c.id: label for label, _, c in members})
    return after


def waves(after: Mapping[str, Collection[str]], labels: Mapping[str, str] | None = None) -> list[list[str]]:
    """The members in waves: each only after all of those before it. Raises UsageError for a circle."""
    sorter = TopologicalSorter({key: set(before) for key, before in after.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " after ".join((labels or {}).get(key, key) for key in reversed(error.args[1]))
        message = f"these members wait for each other: {circle}"
        raise UsageError(message, where="nothing was touched", hint=f"look at their labels {AFTER}") from None
    found = []
    while sorter.is_active():
        found.append(sorted(sorter.get_ready()))
        sorter.done(*found[-1])
    return found


def refuse_joined(members: Sequence[Found]) -> None:
    """Podman restores a container that shares another's namespaces only beside that one as it runs, so the two cannot be held together."""
    names = {c.id: label for label, _, c in members}
    for label, _, container in members:
        for other in container.requires:
            if other in names:
                raise UsageError(
                    f"{label} shares namespaces with {names[other]}, or requires it: podman cannot restore the two together",
                    where="nothing was touched",
                    hint="save it by itself, or give both a network of their own",
                )
