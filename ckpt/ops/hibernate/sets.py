"""Groups in a hibernation: which checkpoints are a whole set, and what the containers of a pod need before they can come back."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ckpt.archive import layout
from ckpt.engines import registry
from ckpt.engines.base import HasPods
from ckpt.errors import CkptError
from ckpt.events import Emit, Notice
from ckpt.model import Checkpoint
from ckpt.store import groups


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


def start_pods(checkpoints: Iterable[Checkpoint], emit: Emit) -> None:
    """Let run what holds the namespaces of these containers' pods. Never raises: the restores that miss it say what is wrong."""
    pods = {(one.manifest.engine, pod_of(one)): one.manifest.name for one in checkpoints}
    for (name, pod), label in pods.items():
        engine = registry.by_name(name)
        if not pod or not isinstance(engine, HasPods):
            continue
        try:
            engine.start_pod(pod)
        except CkptError as error:
            emit(Notice(label, error.message, warning=True))


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
