"""What a drain looks at before anything is touched: what runs here, what may go, what its destinations have, and where each shall go."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final

from ckpt.engines.registry import NamedEngine
from ckpt.errors import CannotConnect, CkptError, UsageError
from ckpt.events import Emit, Notice, StepDone, StepStarted
from ckpt.host import cgroup
from ckpt.host import facts as host_facts
from ckpt.host.procfs import OpenKinds
from ckpt.model import Container, DumpOptions, Target
from ckpt.ops import check, consent, look, realgroups, resolve
from ckpt.ops.destination import destination_findings, destination_request, facts_from
from ckpt.ops.hibernate import selection
from ckpt.ops.placing import Demand, Placement, Room, place, together
from ckpt.peer import client
from ckpt.transports.https_peer import Access

PEER_LIMIT_S: Final = 120.0
"""How long the destinations are waited for, all at once."""


@dataclass(frozen=True, slots=True)
class DrainRequest:
    """What a drain was asked for; kept in its journal, so that it can be taken up again."""

    to: tuple[str, ...] = ()
    parallel: int = 4
    bwlimit_bytes_s: int | None = None
    exclude: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    """Targets besides the running containers: process trees."""
    words: tuple[str, ...] = ()
    """Options for `ckpt migrate`."""
    server_words: tuple[str, ...] = ()
    """The same for a destination behind `https://`."""
    group_words: tuple[str, ...] = ()
    """Options for `ckpt migrate --group`, which takes not all of them."""
    group_server_words: tuple[str, ...] = ()
    ssh_options: tuple[str, ...] = ()
    access: dict[str, Any] = field(default_factory=dict)
    """Destination -> Access as JSON."""
    ignore_volumes: bool = False
    best_effort: bool = False
    reserve_bytes: int | None = None
    deadline_s: float | None = None
    """So many seconds from its begin; what cannot be away by then is not begun."""
    else_checkpoint: str = ""
    """Where what cannot be away in time is saved instead: "store", or a location to export to."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> DrainRequest:
        """Keys of later versions are left out. Raises UsageError when it makes no sense."""
        known = {f.name for f in fields(cls)}
        try:
            given: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in value.items() if key in known}
            made = cls(**given)
        except TypeError as error:
            raise UsageError(f"the drain's journal makes no sense: {error}") from error
        if not made.to or not all(isinstance(one, str) for one in made.to):
            raise UsageError("the drain's journal names no destination", hint="ckpt drain --to HOST")
        return made

    def access_to(self, destination: str) -> Access | None:
        return Access.from_json(self.access.get(destination))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A workload that runs here and shall go."""

    target: str
    engine: NamedEngine
    container: Container
    memory_bytes: int
    group: str = ""
    after: tuple[str, ...] = ()
    kinds: OpenKinds | None = None
    as_one: str = ""
    """The name under which it moves together with those of its group that have the same."""


@dataclass(frozen=True, slots=True)
class Looked:
    """What was found: those that may go, in the order in which their groups want them; those that stay, and why."""

    candidates: tuple[Candidate, ...]
    skipped: tuple[tuple[str, Container, str], ...]
    unfit: tuple[tuple[str, Container, CkptError], ...]
    notes: tuple[str, ...] = ()
    """What is to be said about groups."""


def workloads(request: DrainRequest, *, only: frozenset[str] | None = None) -> Looked:
    """All that runs here and is meant.

    Args:
        only: nothing but these targets.

    Raises:
        UsageError: a filter or a label means nothing; a target that is named.
        EngineUnavailable: no engine can be used.
        TargetNotFound: a target that was named is not there.
    """
    wanted = selection.parse_filters(request.filters)
    every = resolve.all_running()
    found = [pair for pair in every if selection.matches(pair[1], wanted)]
    named = [resolve.resolve(Target.parse(text)) for text in request.also]
    found += [(engine, engine.describe(container)) for engine, container in named if container.id not in {one.id for _, one in found}]
    candidates: list[Candidate] = []
    skipped: list[tuple[str, Container, str]] = []
    unfit: list[tuple[str, Container, CkptError]] = []
    for engine, container in found:
        target = resolve.qualified(engine, container, among=every)
        if only is not None and target not in only:
            continue
        if {target, container.name, container.id} & set(request.exclude):
            skipped.append((target, container, "excluded"))
            continue
        capabilities = engine.probe()
        if not capabilities.hold:
            skipped.append((target, container, f"{engine.name} cannot migrate"))
            continue
        labels = consent.labels(container)
        if forbidding := labels.forbids("drain"):
            skipped.append((target, container, f"its label {forbidding} says so"))
            continue
        kinds = look.open_kinds(container)
        options = DumpOptions(ignore_volumes=request.ignore_volumes)
        try:
            options = check.decide(engine, container, options)
            check.raise_on_error(container.name, check.local_findings(engine, container, options))
        except CkptError as error:
            unfit.append((target, container, error))
            continue
        candidates.append(Candidate(target, engine, container, memory_bytes(container, kinds), after=labels.after, kinds=kinds))
    unknown = [name for name in request.exclude if not any(name in (target, one.name, one.id) for target, one in _known(every))]
    if unknown and only is None:
        raise UsageError(f"--exclude: nothing that runs here is called {unknown[0]!r}", where="nothing was touched")
    sets = realgroups.find(
        [(one.target, one.engine, one.container) for one in candidates],
        [(target, container) for target, container, _ in skipped],
        unfit,
        ignore_volumes=request.ignore_volumes,
    )
    unfit += [(one.target, one.container, sets.held_back[one.target]) for one in candidates if one.target in sets.held_back]
    candidates = [one for one in candidates if one.target not in sets.held_back]
    groups = together({one.target: _ties(one.container) for one in candidates})
    grouped = [replace(one, group=groups.get(one.target, ""), as_one=sets.names.get(one.target, "")) for one in candidates]
    return Looked(tuple(in_order(grouped)), tuple(skipped), tuple(unfit), sets.notes)


def _known(every: Sequence[resolve.Resolved]) -> list[tuple[str, Container]]:
    return [(resolve.qualified(engine, container, among=every), container) for engine, container in every]


def memory_bytes(container: Container, kinds: OpenKinds | None) -> int:
    """The memory that its processes hold; of its cgroup (with its page cache) where that cannot be told; 0: not known."""
    if kinds is not None and kinds.dump_bytes:
        return kinds.dump_bytes
    try:
        return int(cgroup.own_file([container.pid or 0], "memory", "memory.current", "memory.usage_in_bytes").read_text())
    except (cgroup.NotOwn, OSError, ValueError):
        return 0


def _ties(container: Container) -> list[str]:
    """What ties a container to others: its dependencies, its pod, its group, its compose project, named volumes that it shares."""
    ties = [container.id, *container.requires]
    ties += [f"pod {container.pod}"] if container.pod else []
    ties += [f"volume {container.engine} {volume.name}" for volume in container.volumes]
    return ties + realgroups.ties(container)


def in_order(found: Sequence[Candidate]) -> list[Candidate]:
    """What others require, or want to come after, goes before them; a cycle is taken as it comes."""
    by_word = {word: one for one in found for word in (one.container.id, one.container.name)}
    done: dict[str, Candidate] = {}

    def visit(one: Candidate, above: tuple[str, ...]) -> None:
        if one.target in done or one.target in above:
            return
        for word in (*one.container.requires, *one.after):
            if word in by_word:
                visit(by_word[word], (*above, one.target))
        done[one.target] = one

    for one in found:
        visit(one, ())
    return list(done.values())


def units(found: Sequence[Candidate]) -> list[list[Candidate]]:
    """A group in what is moved at once: those that move as one, and each other one by itself; in the order of `in_order`, as far as it goes."""
    made: dict[str, list[Candidate]] = {}
    for one in found:
        made.setdefault(f"set {one.as_one}" if one.as_one else one.target, []).append(one)
    unit_of = {word: key for key, members in made.items() for one in members for word in (one.container.id, one.container.name)}
    done: dict[str, list[Candidate]] = {}

    def visit(key: str, above: tuple[str, ...]) -> None:
        if key in done or key in above:
            return
        for word in (word for one in made[key] for word in (*one.container.requires, *one.after)):
            if word in unit_of:
                visit(unit_of[word], (*above, key))
        done[key] = made[key]

    for key in made:
        visit(key, ())
    return list(done.values())


def rooms(request: DrainRequest, candidates: Sequence[Candidate], emit: Emit) -> list[Room]:
    """Ask all destinations at once; who cannot be reached is told and left out.

    Raises:
        CannotConnect: not one can be reached.
    """
    source = host_facts.gather(look.store_root())
    found: dict[str, Room | CkptError] = {}

    def ask(destination: str) -> None:
        try:
            found[destination] = _room(request, destination, candidates, source)
        except CkptError as error:
            found[destination] = error

    emit(StepStarted("drain", "check", ", ".join(request.to)))
    threads = [threading.Thread(target=ask, args=(destination,), name="ckpt-ask", daemon=True) for destination in request.to]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PEER_LIMIT_S)
    there: list[Room] = []
    errors: list[CkptError] = []
    for destination in request.to:
        answer = found.get(destination, CannotConnect(f"{destination} does not answer"))
        if isinstance(answer, Room):
            there.append(answer)
        else:
            errors.append(answer)
            emit(Notice("drain", f"{destination} is left out: {answer.message}", warning=True))
    if not there:
        first = errors[0]
        message = first.message if len(errors) == 1 else f"no destination can be used: {'; '.join(error.message for error in errors)}"
        raise type(first)(message, where="nothing was touched", hint=first.hint)
    emit(StepDone("drain", "check", f"{len(there)} of {len(request.to)} hosts answer"))
    return there


def _room(request: DrainRequest, destination: str, candidates: Sequence[Candidate], source: Any) -> Room:
    refused: dict[str, str] = {}
    prepared: set[str] = set()
    free = 0
    with client.connect(destination, ssh_options=request.ssh_options, access=request.access_to(destination), purpose="check") as peer:
        if not candidates:
            free = facts_from(peer.call("facts", {}).get("facts") or {}).memory_available_bytes
        for one in candidates:
            asked = destination_request(one.container, ignore_volumes=request.ignore_volumes)
            report = peer.call("facts", asked, timeout_s=check.CALL_TIMEOUT_S)
            free = facts_from(report.get("facts") or {}).memory_available_bytes
            findings = destination_findings(one.container, report, source=source, kinds=one.kinds)
            bad = [finding for finding in findings if finding.severity == "error"]
            if bad:
                refused[one.target] = bad[0].detail
            if report.get("container_image") or one.container.container_image is None:
                prepared.add(one.target)
    return Room(destination, free, refused, frozenset(prepared))


def placement(candidates: Sequence[Candidate], there: Sequence[Room], *, reserve: int | None, took: Mapping[str, int]) -> Placement:
    """Where each shall go. `took`: destination -> how many of this drain it has already."""
    return place([Demand(one.target, one.memory_bytes, one.group) for one in candidates], there, reserve=reserve, took=took)
