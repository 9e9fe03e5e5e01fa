"""What a container's labels say about saving and moving it (`ckpt.*`), read strictly, and whether they let an operation happen.

A label cannot be changed on a container that exists, so whoever is stopped by one may override it: that is told, and recorded.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from ckpt.errors import PolicyRefused, UsageError
from ckpt.events import Emit, Notice, ignore
from ckpt.model import Container
from ckpt.ops import journald

Verb = Literal["checkpoint", "export", "snapshot", "arm", "hibernate", "migrate", "drain", "rewind", "clone", "group"]
"""What is to be done with a container. All but `migrate` and `drain` save it here; those move it away."""
Reboot = Literal["save", "stop", "ignore"]
OnFailure = Literal["abort", "ignore"]

PREFIX: Final = "ckpt."
PHASES_INSIDE: Final = ("pre-checkpoint", "post-checkpoint", "checkpoint-failed", "post-restore")
"""The phases in which there is a running container, so that a command can run inside of it."""
MAX_VALUE: Final = 4096
MAX_NAMES: Final = 64
MAX_TIMEOUT_S: Final = 3600.0
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}", re.ASCII)
_HOOK: Final = re.compile(r"hook\.([a-z-]+)(?:\.(timeout|on-failure))?", re.ASCII)
_MOVES: Final = frozenset({"migrate", "drain"})


@dataclass(frozen=True, slots=True)
class InsideHook:
    """A command that runs inside of the container. `timeout_s` None: as the configuration says (`hook_timeout_s`)."""

    argv: tuple[str, ...]
    timeout_s: float | None = None
    on_failure: OnFailure = "ignore"


@dataclass(frozen=True, slots=True)
class Labels:
    """The `ckpt.*` labels of a container; without a label, its default."""

    reboot: Reboot | None = None
    """What becomes of it at a reboot; None: as the host's configuration says."""
    checkpoint: Literal["allow", "deny"] = "allow"
    migratable: bool = True
    after: tuple[str, ...] = ()
    """Names of containers that start, or come back, before it."""
    group: str = ""
    hooks: Mapping[str, InsideHook] = field(default_factory=dict)
    """By phase (PHASES_INSIDE)."""
    overridden: str = ""
    """What was overridden on this occasion: a label, or "labels" when one of them means nothing."""

    def at_reboot(self, default: Reboot) -> Reboot:
        """What to do at a reboot. One that may not be saved is stopped instead: it ends anyway, and starts cold."""
        chosen = self.reboot or default
        return "stop" if chosen == "save" and self.checkpoint == "deny" else chosen

    def forbids(self, verb: Verb) -> str:
        """The label that forbids this, as it is written on the container; "" when nothing does."""
        if self.checkpoint == "deny":
            return "ckpt.checkpoint=deny"
        return "ckpt.migratable=false" if not self.migratable and verb in _MOVES else ""


def labels(container: Container) -> Labels:
    """The `ckpt.*` labels of a container (of bare runc and crun: the annotations of config.json).

    Raises:
        UsageError: one has a value that means nothing, or is unknown: whoever wrote it meant something, and would not get it.
    """
    return parse(container.labels, container.name or container.id)


def parse(given: Mapping[str, str], name: str) -> Labels:
    """The same for labels that are not a container's yet. `name`: whose they are, for the error."""
    ours = {key: value for key, value in given.items() if key.startswith(PREFIX)}
    found: dict[str, Any] = {}
    hooks: dict[str, dict[str, Any]] = {}
    for key, value in sorted(ours.items()):
        short = key.removeprefix(PREFIX)
        try:
            if len(value) > MAX_VALUE:
                raise ValueError(f"is longer than {MAX_VALUE} characters")
            if matched := _HOOK.fullmatch(short):
                _hook(hooks, matched[1], matched[2] or "", value)
            elif short in _VALUES:
                found[short] = _VALUES[short](value)
            else:
                close = difflib.get_close_matches(short, _VALUES)
                raise ValueError(f"is no label that ckpt knows{f' (did you mean {PREFIX}{close[0]}?)' if close else ''}")
        except ValueError as error:
            raise UsageError(
                f"the label {key}={value[:80]!r} of {name} {error}",
                where=f"{name} is untouched",
                hint="make the container anew with another label, or give --override-label to go without its ckpt.* labels",
            ) from None
    for phase, parts in hooks.items():
        if "argv" not in parts:
            raise UsageError(f"{name} has a label ckpt.hook.{phase}.{next(iter(parts))}, but no ckpt.hook.{phase}", where=f"{name} is untouched")
        default = "abort" if phase.startswith("pre-") else "ignore"
        hooks[phase] = {"on_failure": default, **parts}
    return Labels(**found, hooks={phase: InsideHook(**parts) for phase, parts in hooks.items()})


def require(container: Container, verb: Verb, *, override: bool = False, emit: Emit = ignore) -> Labels:
    """Let an operation happen, or not. Called before anything is touched.

    Args:
        override: `--override-label`: do it all the same. That is told as a warning; labels that mean nothing are then left out.

    Returns:
        The labels, for what else they say.

    Raises:
        UsageError: a label means nothing.
        PolicyRefused: a label forbids it.
    """
    name = container.name or container.id
    try:
        found = labels(container)
    except UsageError as error:
        if not override:
            raise
        _told(name, f"overridden (--override-label): {error.message}; it has none of its ckpt.* labels now", verb, emit)
        return Labels(overridden="labels")
    forbidding = found.forbids(verb)
    if not forbidding:
        return found
    if not override:
        what = "moved" if verb in _MOVES else "saved"
        raise PolicyRefused(
            f"{name} must not be {what}: its label {forbidding} forbids it",
            where=f"{name} is {container.state}, untouched",
            hint="--override-label does it all the same, and records that",
        )
    _told(name, f"its label {forbidding} was overridden (--override-label)", verb, emit)
    return replace(found, checkpoint="allow", migratable=True, overridden=forbidding)


def _told(name: str, text: str, verb: Verb, emit: Emit) -> None:
    emit(Notice(name, text, warning=True))
    journald.tell(f"{verb} of {name}: {text}", phase=verb, result="overridden", target=name, priority=4)


def seconds(text: str) -> float:
    """A time as labels have it: `500ms`, `10s`, `2m`; a bare number is seconds. Raises ValueError."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)(ms|s|m|)", text.strip(), re.ASCII)
    value = float(found[1]) * {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0}[found[2]] if found else 0.0
    if not 0 < value <= MAX_TIMEOUT_S:
        raise ValueError(f"is no time between 1ms and {MAX_TIMEOUT_S:g}s: write 10s")
    return value


def command(text: str) -> tuple[str, ...]:
    """A command: words as a shell splits them, or a JSON list of texts. There is no shell: `sh -c "…"` is one. Raises ValueError."""
    if text.lstrip().startswith("["):
        try:
            words = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError("is no list in JSON") from None
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("is no list of texts")
    else:
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise ValueError(f"is no command line: {str(error).lower()}") from None
    if not words or not words[0] or any("\0" in word for word in words):
        raise ValueError("is no command")
    return tuple(words)


def _hook(hooks: dict[str, dict[str, Any]], phase: str, part: str, value: str) -> None:
    if phase not in PHASES_INSIDE:
        raise ValueError(f"is for a phase in which nothing can run inside of a container ({', '.join(PHASES_INSIDE)} are possible)")
    parts = hooks.setdefault(phase, {})
    match part:
        case "timeout":
            parts["timeout_s"] = seconds(value)
        case "on-failure":
            if phase.startswith("pre-"):
                parts["on_failure"] = _one_of("abort", "ignore")(value)
            elif value != "ignore":
                raise ValueError("must be ignore: what has happened cannot be aborted any more")
        case _:
            parts["argv"] = command(value)


def _one_of(*allowed: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"must be {', '.join(allowed[:-1])} or {allowed[-1]}")
        return value

    return check


def _names(value: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(part.strip() for part in value.split(",")))
    if len(names) > MAX_NAMES or not all(_NAME.fullmatch(name) for name in names):
        raise ValueError("must be names of containers, separated by commas")
    return names


def _group(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError("must be the name of a group (letters, digits, _, . and -)")
    return value


_VALUES: Final[Mapping[str, Callable[[str], Any]]] = {
    "reboot": _one_of("save", "stop", "ignore"),
    "checkpoint": _one_of("allow", "deny"),
    "migratable": lambda value: _one_of("true", "false")(value) == "true",
    "after": _names,
    "group": _group,
}
