"""`/etc/ckpt/hibernate.toml`: what becomes of a host's workloads when it goes down and when it is up again.

The words are libvirt-guests' (its ON_SHUTDOWN, ON_BOOT, PARALLEL_SHUTDOWN and SHUTDOWN_TIMEOUT are taken too, in upper case).
Every key is in docs/hibernate.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from ckpt.errors import ConfigError

FILE: Final = Path("/etc/ckpt/hibernate.toml")
Action = Literal["save", "stop", "ignore"]
Rung = Literal["restore", "restore-closed", "cold", "leave"]
ACTIONS: Final = ("save", "stop", "ignore")
RUNGS: Final = ("restore", "restore-closed", "cold", "leave")


@dataclass(frozen=True, slots=True)
class Tree:
    """A process tree that is to be saved; exactly one of `pidfile`, `unit` and `pid` says which."""

    name: str
    pidfile: Path | None = None
    unit: str = ""
    """Its main process."""
    pid: int | None = None
    action: Action | None = None
    """None: as for everything else."""
    after: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Workload:
    """What the file says about one workload, `[workload."podman:web"]`. None: as for everything else."""

    action: Action | None = None
    after: tuple[str, ...] = ()
    ladder: tuple[Rung, ...] | None = None


@dataclass(frozen=True, slots=True)
class HibernateSettings:
    """What the file decides. Without a file everything is as here."""

    on_shutdown: Action = "save"
    """What becomes of a workload for which nothing else is said."""
    on_boot: Literal["restore", "ignore"] = "restore"
    """Whether what was saved comes back by itself."""
    on_failure: Literal["stop", "ignore"] = "ignore"
    """At a shutdown: what becomes of one that could not be saved. "stop": its engine stops it."""
    parallel_shutdown: int = field(default_factory=lambda: max(3, (os.cpu_count() or 1) + 1))
    """How many are saved at a time."""
    parallel_boot: int = field(default_factory=lambda: max(4, 2 * (os.cpu_count() or 1)))
    """How many are brought back at a time; each of them waits for its engine most of its time."""
    shutdown_timeout_s: float = 300.0
    """For all together; what cannot be begun by then is not saved."""
    save_timeout_s: float = 200.0
    """For one."""
    stop_timeout_s: float = 30.0
    """How long one that is to be stopped may take before it is killed."""
    ladder: tuple[Rung, ...] = ("restore", "restore-closed", "cold")
    """How one comes back: the first of these that works."""
    restore_timeout_s: float = 200.0
    """For one rung with a restore."""
    cold_timeout_s: float = 90.0
    """For a cold start."""
    on_crash: Literal["armed", "cold", "ignore"] = "armed"
    """After a power loss: what becomes of one that was not saved. "armed": its last armed checkpoint, and cold where there is none."""
    canary: bool = True
    """After a boot of another kernel: whether a process of ckpt's own is saved and restored first."""
    memory: str = "raw"
    """How memory lies in the store: "raw", as CRIU wrote it, which is the fastest; "packed", compressed and shared with other checkpoints."""
    keep_last: int | None = None
    """How many checkpoints of hibernations are kept of each workload; None: one of raw memory, else all, until `ckpt prune` takes them."""
    trees: tuple[Tree, ...] = ()
    workloads: Mapping[str, Workload] = field(default_factory=dict)
    """By target, `podman:web`, or by name alone."""

    def workload(self, target: str, name: str) -> Workload:
        """The entry of a workload: by its target in full, else by its name."""
        return self.workloads.get(target) or self.workloads.get(name) or Workload()

    def ladder_of(self, target: str, name: str) -> tuple[Rung, ...]:
        """The ladder of one workload."""
        own = self.workload(target, name).ladder
        return self.ladder if own is None else own


def load(path: Path = FILE) -> HibernateSettings:
    """Read the file; none is as good as an empty one.

    Raises:
        ConfigError: it cannot be read, a key is unknown, or a value is wrong; names the file and the key.
    """
    try:
        with path.open("rb") as file:
            import tomllib

            values = tomllib.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return HibernateSettings()
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", hint="mend it or remove it") from error
    return parse(values, str(path))


def parse(values: Mapping[str, Any], source: str) -> HibernateSettings:
    """The settings that a file's values mean.

    Raises:
        ConfigError: as `load`.
    """
    found: dict[str, Any] = {}
    given: dict[str, str] = {}
    for name, value in values.items():
        key, words = _LIBVIRT.get(name, (name, {}))
        if key not in _KEYS:
            known = ", ".join(_KEYS)
            raise ConfigError(f"{source}: unknown key {name}", hint=f"known keys: {known}")
        if key in given:
            raise ConfigError(f"{source}: {name} and {given[key]} say the same thing", hint="keep one of them")
        given[key] = name
        try:
            if words and (not isinstance(value, str) or value not in words):
                raise ValueError("must be one of " + ", ".join(words))
            found[_FIELDS.get(key, key)] = _KEYS[key](words[value] if words else value)
        except ValueError as error:
            shown = "" if isinstance(value, (dict, list)) else f", not {value!r}"
            raise ConfigError(f"{source}: {name} {error}{shown}") from None
    return replace(HibernateSettings(), **found)


def _one_of(*allowed: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in allowed:
            raise ValueError("must be one of " + ", ".join(allowed))
        return str(value)

    return check


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
        raise ValueError("must be a positive number of seconds")
    return float(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10_000:
        raise ValueError("must be a whole number from 1 on")
    return value


def _parallel(value: Any) -> int:
    """libvirt-guests' PARALLEL_SHUTDOWN=0 means one after another."""
    return 1 if value == 0 and not isinstance(value, bool) else _count(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError("must be a list of texts")
    return tuple(value)


def _ladder(value: Any) -> tuple[Rung, ...]:
    rungs = _texts(value)
    wrong = [rung for rung in rungs if rung not in RUNGS]
    if not rungs or wrong or len(set(rungs)) < len(rungs):
        raise ValueError("must be a list of some of " + ", ".join(RUNGS) + ", each once")
    if "leave" in rungs[:-1]:
        raise ValueError("has rungs after leave")
    return rungs  # type: ignore[return-value]


def _name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", value, re.ASCII):
        raise ValueError("must be a name of letters, digits, _, . and -")
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError("must be an absolute path")
    return Path(value)


def _unit(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9:_.@\\-]{1,255}", value, re.ASCII):
        raise ValueError("must be the name of a unit")
    return value if "." in value else value + ".service"


def _pid(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 2 <= value < 2**22:
        raise ValueError("must be the number of a process")
    return value


def _table(kind: str, value: Any, keys: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"must be a table {kind}")
    found: dict[str, Any] = {}
    for key, setting in value.items():
        if key not in keys:
            raise ValueError(f"has an unknown key {key} (known are {', '.join(keys)})")
        try:
            found[key] = keys[key](setting)
        except ValueError as error:
            raise ValueError(f"has a key {key} that {error}") from None
    return found


_TREE_KEYS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "name": _name,
    "pidfile": _path,
    "unit": _unit,
    "pid": _pid,
    "action": _one_of(*ACTIONS),
    "after": _texts,
}
_WORKLOAD_KEYS: Final[Mapping[str, Callable[[Any], Any]]] = {"action": _one_of(*ACTIONS), "after": _texts, "ladder": _ladder}


def _trees(value: Any) -> tuple[Tree, ...]:
    if not isinstance(value, list):
        raise ValueError("must be tables, [[tree]]")
    found: list[Tree] = []
    for entry in value:
        tree = _table("[[tree]]", entry, _TREE_KEYS)
        if "name" not in tree:
            raise ValueError("needs a name")
        if sum(key in tree for key in ("pidfile", "unit", "pid")) != 1:
            raise ValueError(f"{tree['name']} needs one of pidfile, unit and pid")
        if any(tree["name"] == other.name for other in found):
            raise ValueError(f"{tree['name']} is there twice")
        found.append(Tree(**tree))
    return tuple(found)


def _workloads(value: Any) -> Mapping[str, Workload]:
    if not isinstance(value, dict):
        raise ValueError('must be tables, [workload."podman:web"]')
    found: dict[str, Workload] = {}
    for target, entry in value.items():
        try:
            found[target] = Workload(**_table('[workload."podman:web"]', entry, _WORKLOAD_KEYS))
        except ValueError as error:
            raise ValueError(f"{target!r} {error}") from None
    return found


_KEYS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "on_shutdown": _one_of(*ACTIONS),
    "on_boot": _one_of("restore", "ignore"),
    "on_failure": _one_of("stop", "ignore"),
    "parallel_shutdown": _parallel,
    "parallel_boot": _parallel,
    "shutdown_timeout_s": _seconds,
    "save_timeout_s": _seconds,
    "stop_timeout_s": _seconds,
    "ladder": _ladder,
    "restore_timeout_s": _seconds,
    "cold_timeout_s": _seconds,
    "on_crash": _one_of("armed", "cold", "ignore"),
    "canary": _boolean,
    "keep_last": _count,
    "memory": _one_of("raw", "packed"),
    "tree": _trees,
    "workload": _workloads,
}
_FIELDS: Final = {"tree": "trees", "workload": "workloads"}
_LIBVIRT: Final[Mapping[str, tuple[str, Mapping[Any, Any]]]] = {
    # libvirt-guests(8): name there -> (name here, words there -> words here)
    "ON_SHUTDOWN": ("on_shutdown", {"suspend": "save", "shutdown": "stop"}),
    "ON_BOOT": ("on_boot", {"start": "restore", "ignore": "ignore"}),
    "PARALLEL_SHUTDOWN": ("parallel_shutdown", {}),
    "SHUTDOWN_TIMEOUT": ("shutdown_timeout_s", {}),
}
