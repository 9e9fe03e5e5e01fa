"""Groups in a hibernation: which checkpoints are a whole set, and what the containers of a pod need before they can come back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from ckpt.archive import layout
from ckpt.engines import registry
from ckpt.engines.base import HasPods, RemakesPods
from ckpt.engines.registry import NamedEngine
from ckpt.errors import CkptError
from ckpt.events import Emit, Notice
from ckpt.host import systemd
from ckpt.model import Checkpoint, Container
from ckpt.ops.hibernate import guards
from ckpt.ops.hibernate.selection import Chosen
from ckpt.store import groups

START_LIMIT_S: Final = 120.0
"""How long a unit may take to make its pod, and start what holds the namespaces."""


def whole(root: Path, chosen: Mapping[str, Checkpoint]) -> dict[str, dict[str, Checkpoint]]:
    """By the set's reference (`shop@3`) those of `chosen` that make it up: only sets of which all are there, and more than one."""
    found: dict[str, dict[str, Checkpoint]] = {}
    for label, checkpoint in chosen.items():
        if checkpoint.entry.group:
            found.setdefault(checkpoint.entry.group, {})[label] = checkpoint
    if not found:
        return {}
    recorded = {group.ref: {member.checkpoint_id for member in group.members} for group in groups.every(root)}
    return {ref: mine for ref, mine in found.items() if len(mine) > 1 and recorded.get(ref) == {one.manifest.id for one in mine.values()}}


def shared_volumes(checkpoints: Iterable[Checkpoint]) -> tuple[str, ...]:
    """Named volumes that several of these containers have: on the disk they are as the last of them left them, which no restore may undo.

    Who restores one of them cannot see it by himself: between their removal and their return the others have no containers.
    """
    found = Counter((one.manifest.engine, volume) for one in checkpoints for volume in {name for name, _ in one.manifest.volumes})
    return tuple(sorted({volume for (_, volume), users in found.items() if users > 1}))


def pod_units(chosen: Iterable[Chosen]) -> list[str]:
    """The units that make the pods of these containers."""
    found = []
    for one in {(one.engine.name, one.container.pod): one for one in chosen if one.container.pod and one.container.units}.values():
        if isinstance(one.engine, RemakesPods) and (unit := one.engine.pod_unit(one.engine.command_of(one.container))):
            found.append(unit)
    return found


def start_pods(checkpoints: Iterable[Checkpoint], emit: Emit, *, hold: Iterable[str] = (), limit_s: float = START_LIMIT_S) -> dict[str, str]:
    """Let run what holds the namespaces of these containers' pods. Never raises: the restores that miss it say what is wrong.

    Args:
        hold: units of containers that are not to be started by that of their pod.
        limit_s: how long the unit of a pod may take.

    Returns:
        The pods that their units have made anew: their ids then, and now.
    """
    anew: dict[str, str] = {}
    for (name, pod), one in {(one.manifest.engine, pod_of(one)): one for one in checkpoints}.items():
        engine, label = registry.by_name(name), one.manifest.name
        if not pod or not isinstance(engine, HasPods):
            continue
        try:
            if isinstance(engine, RemakesPods) and systemd.running() and not _runs(engine.pod(pod), engine):
                command = engine.command_in((one.directory / layout.CONFIG).read_bytes())
                if unit := engine.pod_unit(command):
                    guards.mark_resumed(hold)
                    systemd.control("start", "--", unit, timeout_s=limit_s)  # done at once when it is active
                    if now := engine.pod_now(command):
                        anew[pod] = now
            engine.start_pod(anew.get(pod, pod))
        except (CkptError, OSError) as error:
            emit(Notice(label, error.message if isinstance(error, CkptError) else str(error), warning=True))
    return anew


def _runs(found: tuple[str, str] | None, engine: NamedEngine) -> bool:
    """Whether this pod is here, and what holds its namespaces runs."""
    if found is None or not found[1]:
        return found is not None
    return engine.describe(Container(engine.name, found[1], "", "unknown")).state == "running"


def pod_of(checkpoint: Checkpoint) -> str:
    """The id of the pod that it was in, "" for none."""
    return str(described(checkpoint).get("pod") or "")


def described(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the engine wrote down of the container (config.dump); {} when that makes no sense."""
    try:
        found = json.loads((checkpoint.directory / layout.CONFIG).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
