"""From what the user named to the one container meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from ckpt.engines import registry
from ckpt.engines.base import DescribesMany
from ckpt.engines.registry import NamedEngine
from ckpt.errors import CkptError, EngineUnavailable, TargetNotFound
from ckpt.model import Container, Target

Resolved = tuple[NamedEngine, Container]


def resolve(target: Target) -> Resolved:
    """The one container that `target` names, fully described, and its engine.

    A bare name is looked for in every usable engine but those of process trees: a process is named by `pid:1234` only,
    so that a container called `1234` and a process never get mixed up.

    Raises:
        TargetNotFound: none (with names that are close) or several (with how to name each).
        EngineUnavailable, UsageError: the engine named is not usable or not known.
    """
    candidates = [_named(target.engine)] if target.engine else _implicit()
    if not target.name:
        raise TargetNotFound("an empty name names nothing")
    matches = _matches(candidates, target.name)
    if len(matches) == 1:
        engine, container = matches[0]
        return engine, engine.describe(container)
    if matches:
        listed = ", ".join(qualified(engine, container, among=matches) for engine, container in matches)
        raise TargetNotFound(f"{str(target)!r} is ambiguous: {listed}", hint="name one of them in full")
    raise TargetNotFound(f"there is no container {str(target)!r}", hint=_suggest(candidates, target))


def all_running() -> list[Resolved]:
    """Every running container of every usable engine, fully described, oldest first. Process trees and pods' infra containers are never meant."""
    found: list[Resolved] = []
    for engine in _implicit():
        running = [container for container in engine.containers() if container.state == "running"]
        found += [(engine, container) for container in described(engine, running) if not container.infra]
    return sorted(found, key=lambda pair: pair[1].created_s)


def described(engine: NamedEngine, containers: Sequence[Container]) -> list[Container]:
    """Each of them in full, in as few calls as the engine lets; those that ended while we looked are left out."""
    if isinstance(engine, DescribesMany):
        return engine.describe_many(containers)
    found: list[Container] = []
    for container in containers:
        try:
            found.append(engine.describe(container))
        except TargetNotFound:
            continue
    return found


def latest() -> Resolved:
    """The container created last, whatever its state (podman's `--latest`).

    Raises:
        TargetNotFound: there is none.
    """
    newest: Resolved | None = None
    for engine in _implicit():
        for container in engine.containers():
            try:
                full = container if container.created_s else engine.describe(container)
            except TargetNotFound:
                continue
            if newest is None or full.created_s > newest[1].created_s:
                newest = (engine, full)
    if newest is None:
        raise TargetNotFound("there is no container")
    return newest[0], newest[0].describe(newest[1])


def qualified(engine: NamedEngine, container: Container, *, among: Iterable[Resolved] = ()) -> str:
    """How to name a container so that it is not mistaken: `podman:web`, by id where the name is not enough."""
    label = container.name or container.id
    twins = [c for e, c in among if e.name == engine.name and (c.name or c.id) == label]
    return f"{engine.prefixes[0]}:{container.id[:12] if len(twins) > 1 else label}"


def _named(prefix: str) -> NamedEngine:
    engine = registry.by_prefix(prefix)
    can = engine.probe()
    if not can.usable:
        raise EngineUnavailable(f"{engine.name} cannot be used here", hint=can.reason or None)
    return engine


def _implicit() -> list[NamedEngine]:
    return registry.usable(lambda engine: "pid" not in engine.prefixes)


def _matches(candidates: Iterable[NamedEngine], name: str) -> list[Resolved]:
    found = [(engine, container) for engine in candidates for container in engine.find(name)]
    # A whole name (or id) wins over the beginning of somebody's id, as in podman.
    exact = [(engine, container) for engine, container in found if name in (container.name, container.id)]
    chosen = exact or found
    return list({(engine.name, container.id): (engine, container) for engine, container in chosen}.values())


def _suggest(candidates: Iterable[NamedEngine], target: Target) -> str:
    if target.engine is None and target.name.isascii() and target.name.isdigit():
        return f"a process tree is named pid:{target.name}"
    names: dict[str, str] = {}
    for engine in candidates:
        try:
            names.update({c.name: qualified(engine, c) for c in engine.containers() if c.name})
        except CkptError:
            continue  # a hint is not worth an error
    close = difflib.get_close_matches(target.name, names)
    if close:
        return f"did you mean {' or '.join(names[c] if target.engine else c for c in close)}?"
    return "there are no containers here" if not names else f"there are: {', '.join(sorted(names)[:8])}"
