"""Which engines there are: every module of this package that offers one, then entry points of the group `ckpt.engines`.

A module offers engines by `ENGINES`, a sequence of classes or factories, or by `ENGINE`, one of them. Each engine has, besides the
protocol of `base.Engine`, an attribute `prefixes`: what people write before the colon (`podman:web`, `pid:1234`).
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from functools import cache
from importlib import metadata
from types import ModuleType
from typing import Any, Final, Protocol

import ckpt.engines
from ckpt.engines.base import Engine
from ckpt.errors import EngineUnavailable, UsageError

GROUP: Final = "ckpt.engines"
_NO_ENGINE: Final = {"base", "registry"}


class NamedEngine(Engine, Protocol):
    """An engine that people can name."""

    prefixes: tuple[str, ...]


@cache
def engines() -> tuple[NamedEngine, ...]:
    """One instance of every engine that is installed, usable here or not, ours first, sorted by module name.

    An engine from an entry point never replaces one of ours; one that cannot be imported is left out.
    """
    found: dict[str, NamedEngine] = {}
    for factory in (*_own(), *_others()):
        engine = factory()
        found.setdefault(engine.name, engine)
    return tuple(found.values())


def by_name(name: str) -> NamedEngine:
    """The engine that a manifest or a journal names.

    Raises:
        EngineUnavailable: this ckpt has no such engine.
    """
    for engine in engines():
        if engine.name == name:
            return engine
    known = ", ".join(engine.name for engine in engines()) or "none"
    raise EngineUnavailable(f"this ckpt has no engine {name!r}", hint=f"it has: {known}")


def by_prefix(prefix: str) -> NamedEngine:
    """The engine that a target's prefix names.

    Raises:
        UsageError: no engine has that prefix.
    """
    for engine in engines():
        if prefix in engine.prefixes or prefix == engine.name:
            return engine
    known = ", ".join(f"{p}:" for engine in engines() for p in engine.prefixes)
    raise UsageError(f"no engine is called {prefix!r}", hint=f"known are {known}")


def usable(among: Callable[[NamedEngine], bool] = lambda engine: True) -> list[NamedEngine]:
    """The engines that can be used on this host now.

    Args:
        among: which engines count at all.

    Raises:
        EngineUnavailable: not one; says why for each.
    """
    probed = [(engine, engine.probe()) for engine in engines() if among(engine)]
    fit = [engine for engine, can in probed if can.usable]
    if not fit:
        reasons = "; ".join(f"{engine.name}: {can.reason or 'not usable'}" for engine, can in probed)
        raise EngineUnavailable("no container engine can be used here", hint=reasons or None)
    return fit


def _own() -> Iterator[Callable[[], NamedEngine]]:
    for info in sorted(pkgutil.iter_modules(ckpt.engines.__path__), key=lambda i: i.name):
        if not info.name.startswith("_") and info.name not in _NO_ENGINE:
            yield from offered(importlib.import_module(f"{ckpt.engines.__name__}.{info.name}"))


def offered(module: ModuleType) -> tuple[Callable[[], NamedEngine], ...]:
    """The engine factories of a module (`ENGINES`, `ENGINE`)."""
    several = getattr(module, "ENGINES", None)
    single = getattr(module, "ENGINE", None)
    return tuple(several) if several is not None else (single,) if single is not None else ()


def _others() -> Iterator[Callable[[], NamedEngine]]:
    for entry in metadata.entry_points(group=GROUP):
        try:
            loaded: Any = entry.load()
        except Exception:  # a stranger's broken package must not stop ours; `ckpt check` names it by its absence
            continue
        if isinstance(loaded, ModuleType):
            yield from offered(loaded)
        else:
            yield loaded
