"""Which workloads of this host are meant, and what becomes of each: the command line wins over a label, a label over the file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from ckpt.engines import registry
from ckpt.engines.registry import NamedEngine
from ckpt.errors import CkptError, TargetNotFound, UsageError
from ckpt.host import systemd
from ckpt.model import Container, Target
from ckpt.ops import consent, resolve
from ckpt.ops.hibernate.settings import Action, HibernateSettings, Tree
from ckpt.store.hibernation import Item

TREE: Final = "ckpt.tree"
"""Not of a container: how hibernate.toml calls a process tree."""
_KEPT: Final = ("ckpt.", "com.docker.compose.project", "com.docker.compose.service", "com.docker.compose.depends_on")
_FILTERS: Final = ("label", "name", "engine", "id", "pod")


@dataclass(frozen=True, slots=True)
class Chosen:
    """One workload that is meant."""

    engine: NamedEngine
    container: Container
    action: Action
    target: str
    """In full: `podman:web`."""
    names: tuple[str, ...] = ()
    """What it may be called by, in labels and in the file."""
    after: tuple[str, ...] = ()
    """As it was written: names or targets."""
    group: str = ""
    """By its label, else by its pod."""
    labels: dict[str, str] = field(default_factory=dict)

    def item(self, after: tuple[str, ...], units: tuple[str, ...]) -> Item:
        """As the journal keeps it."""
        kept = {key: value for key, value in self.labels.items() if key.startswith(_KEPT)}
        container = self.container
        return Item(self.target, self.engine.name, container.id, container.name or container.id, self.action, after, units, self.group, kept)


@dataclass(frozen=True, slots=True)
class Selection:
    """What is meant, and what else was found out."""

    chosen: tuple[Chosen, ...]
    known: frozenset[str] = frozenset()
    """Every name and target there is on this host, running or not."""
    notices: tuple[str, ...] = ()


def select(
    targets: Sequence[Target],
    *,
    filters: Sequence[str] = (),
    settings: HibernateSettings,
    default: Action = "save",
    lenient: bool = False,
) -> Selection:
    """Find all that is meant.

    Args:
        targets: what was named: it is saved, whatever labels and file say. None: every running container of every usable engine, and the
            process trees of the file.
        filters: `label=KEY[=VALUE]`, `name=REGEX`, `engine=NAME`, `id=BEGINNING`, `pod=ID`; as podman has it several of one key are
            alternatives, but for labels, which must all be there.
        default: what becomes of one for which neither a label nor the file says anything.
        lenient: a label that makes no sense is a notice, and taken for none (at a shutdown nobody can mend it).

    Raises:
        TargetNotFound, EngineUnavailable: what was named is not there.
        UsageError: a filter or a label makes no sense; tells of all labels.
    """
    wanted = parse_filters(filters)
    if targets and filters:
        raise UsageError("name targets, or choose them by --filter, not both")
    notices: list[str] = []
    pairs = [_named(target, settings) for target in targets] if targets else _everything(settings, notices)
    problems: list[str] = []
    chosen: dict[tuple[str, str], Chosen] = {}
    for engine, container, tree in pairs:
        if matches(container, wanted):
            one = _decide(engine, container, tree, settings, default, named=bool(targets), problems=problems)
            chosen.setdefault((engine.name, container.id), one)
    if problems and not lenient:
        hint = "make the container anew with other labels, or say in hibernate.toml what becomes of it"
        raise UsageError("; ".join(problems), where="nothing was touched", hint=hint)
    return Selection(_unique(chosen.values()), _known(), (*notices, *problems))


def _everything(settings: HibernateSettings, notices: list[str]) -> list[tuple[NamedEngine, Container, Tree | None]]:
    found: list[tuple[NamedEngine, Container, Tree | None]] = []
    for tree in settings.trees:
        try:
            found.append((*_tree(tree), tree))
        except CkptError as error:
            notices.append(f"{tree.name} is left out: {error.message}")
    try:
        found += [(engine, container, None) for engine, container in resolve.all_running()]
    except CkptError as error:
        if not found:
            raise
        notices.append(error.message)
    return found


def _named(target: Target, settings: HibernateSettings) -> tuple[NamedEngine, Container, Tree | None]:
    trees = [tree for tree in settings.trees if tree.name == target.name and target.engine is None]
    if not trees:
        engine, container = resolve.resolve(target)
        return engine, container, None
    try:
        resolve.resolve(target)
    except CkptError:
        return (*_tree(trees[0]), trees[0])
    raise TargetNotFound(f"{target.name!r} is a container, and a process tree too", hint="name the container with its engine, podman:NAME")


def _tree(tree: Tree) -> tuple[NamedEngine, Container]:
    """The process tree of an entry of the file, with the unit that would start it anew. Raises TargetNotFound, EngineUnavailable, UsageError."""
    pid = pid_of(tree)
    engine, container = resolve.resolve(Target(str(pid), "pid"))
    unit = tree.unit or systemd.unit_of(pid)
    # Only of its main process: what was started from ssh.service must not keep that from starting.
    if unit.endswith(".service") and (tree.unit or _main_pid(unit) == str(pid)):
        container = replace(container, units=(unit,))
    return engine, container


def _main_pid(unit: str) -> str:
    try:
        return systemd.control("show", "--property=MainPID", "--value", "--", unit).strip() if systemd.running() else ""
    except CkptError:
        return ""


def pid_of(tree: Tree) -> int:
    """The first process of a tree of the file.

    Raises:
        TargetNotFound: nothing says which one that is.
    """
    if tree.pid is not None:
        return tree.pid
    if tree.pidfile is not None:
        try:
            with tree.pidfile.open("rb") as source:
                text = source.read(64).decode("ascii", "replace").strip()
        except OSError as error:
            raise TargetNotFound(f"its pidfile {tree.pidfile} cannot be read: {error.strerror}") from None
        if not re.fullmatch(r"[1-9]\d{0,9}", text, re.ASCII):
            raise TargetNotFound(f"its pidfile {tree.pidfile} holds no number")
        return int(text)
    said = _main_pid(tree.unit)
    if not said.isdigit() or int(said) < 2:
        raise TargetNotFound(f"its unit {tree.unit} has no main process")
    return int(said)


def _decide(
    engine: NamedEngine, container: Container, tree: Tree | None, settings: HibernateSettings, default: Action, *, named: bool, problems: list[str]
) -> Chosen:
    name = container.name or container.id
    target = f"{engine.prefixes[0]}:{container.pid if tree or 'pid' in engine.prefixes else name}"
    file = settings.workload(target, tree.name if tree else name)
    labels = dict(container.labels)
    try:
        said = consent.labels(container)
    except UsageError as error:
        problems.append(error.message)
        said = consent.Labels()
    action: Action = said.at_reboot((tree.action if tree else None) or file.action or default)
    if named:
        if forbidding := said.forbids("hibernate"):
            problems.append(f"{target} must not be saved: its label {forbidding} forbids it")
        action = "save"
    after = [*said.after, *file.after, *(tree.after if tree else ())]
    names = tuple(dict.fromkeys(filter(None, (target, name, container.id, container.id[:12], tree.name if tree else ""))))
    if tree:
        labels[TREE] = tree.name
    group = said.group or (f"pod-{container.pod[:12]}" if container.pod else "")
    return Chosen(engine, container, action, target, names, tuple(dict.fromkeys(after)), group, labels)


def _unique(chosen: Iterable[Chosen]) -> tuple[Chosen, ...]:
    """Two of one engine cannot have one name; but whoever lets them gets ids for targets."""
    from dataclasses import replace

    listed = list(chosen)
    targets = [one.target for one in listed]
    return tuple(
        replace(one, target=f"{one.engine.prefixes[0]}:{one.container.id[:12]}") if targets.count(one.target) > 1 else one for one in listed
    )


def _known() -> frozenset[str]:
    found: set[str] = set()
    for engine in registry.engines():
        try:
            if "pid" in engine.prefixes or not engine.probe().usable:
                continue
            for container in engine.containers():
                found |= {container.id, container.id[:12], container.name, f"{engine.prefixes[0]}:{container.name}"}
        except CkptError:
            continue
    return frozenset(found)


def parse_filters(filters: Sequence[str]) -> dict[str, list[str]]:
    """Filters as `select` takes them, by key. Raises UsageError."""
    found: dict[str, list[str]] = {}
    for text in filters:
        key, equals, value = text.partition("=")
        if key not in _FILTERS or not equals or not value:
            raise UsageError(f"--filter {text!r} is not known", hint="label=KEY[=VALUE], name=REGEX, engine=NAME, id=BEGINNING, pod=ID")
        if key == "name":
            try:
                re.compile(value)
            except re.error as error:
                raise UsageError(f"--filter {text!r}: {error}") from None
        found.setdefault(key, []).append(value)
    return found


def matches(container: Container, wanted: dict[str, list[str]]) -> bool:
    """Whether a container is meant by what `parse_filters` gave."""

    def label(text: str) -> bool:
        key, equals, value = text.partition("=")
        return container.labels.get(key) == value if equals else key in container.labels

    tests = {
        "label": lambda values: all(label(value) for value in values),
        "name": lambda values: any(re.search(value, container.name) for value in values),
        "engine": lambda values: container.engine in values,
        "id": lambda values: any(container.id.startswith(value) for value in values),
        "pod": lambda values: any(container.pod and (container.pod.startswith(value) or container.pod == value) for value in values),
    }
    return all(tests[key](values) for key, values in wanted.items())
