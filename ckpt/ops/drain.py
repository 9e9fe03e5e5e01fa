"""`ckpt drain`: all workloads of this host go to others, several at once, each by a `ckpt migrate` of its own (docs/adr/0016), a group by one
`ckpt migrate --group`.

The journal (store/drains.py) says what was begun; what became of it the jobs of the migrations say. So a drain that was killed is taken up
again by looking at them: nothing is moved twice, nothing is left frozen.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ckpt.errors import (
    CkptError,
    DoneWithWarnings,
    DumpFailed,
    IncompatibleHost,
    MigrationRolledBack,
    NeedsContinue,
    NoSpace,
    StateUnknown,
    TargetNotFound,
    UsageError,
)
from ckpt.events import Emit, Notice
from ckpt.model import Container
from ckpt.ops import children, drainask, draining, drainstate, faults, parallel, recover
from ckpt.ops.draining import Candidate, DrainRequest, Looked
from ckpt.ops.placing import Placement, Room, reserve_bytes
from ckpt.peer import client
from ckpt.store import drains
from ckpt.store.drains import Drain, DrainItem
from ckpt.transports.https_peer import is_https

GUESSED_BYTES_S: Final = 50 << 20
"""How fast memory goes over, until the first migration has told."""
OVERHEAD_S: Final = 3.0
"""What a migration takes besides."""
SAVING_BYTES_S: Final = 100 << 20
STORE: Final = "store"


@dataclass(frozen=True, slots=True)
class Went:
    """What became of a workload. `state`: as in the journal (moved, failed, skipped, saved, waiting, dropped, gone), or planned."""

    target: str
    name: str
    state: str
    destination: str = ""
    container_id: str = ""
    memory_bytes: int = 0
    reason: str = ""
    error: CkptError | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def well(self) -> bool:
        """It is where it was to go, and nothing else is to be said."""
        return self.error is None and (self.state == "returned" or (self.state in ("moved", "planned") and not self.reason))


@dataclass(frozen=True, slots=True)
class Report:
    """A drain's end: its id ("" for a dry run), its workloads, and what ckpt exits with."""

    id: str
    went: tuple[Went, ...]
    interrupted: bool = False

    @property
    def error(self) -> CkptError | None:
        """The gravest that went wrong."""
        errors = [one.error for one in self.went if one.error is not None]
        grave = [error for error in errors if isinstance(error, StateUnknown | NeedsContinue)]
        return (grave or errors or [None])[0]

    @property
    def exit_code(self) -> int:
        """0: all are away; 100: all but those that were to stay, or somebody could not be asked; else the gravest failure's."""
        error = self.error
        if error is not None:
            return error.exit_code
        return 0 if all(one.well for one in self.went) else DoneWithWarnings.exit_code


def drain(
    request: DrainRequest, *, resume: bool = False, dry_run: bool = False, store_root: Path, emit: Emit, stop: threading.Event | None = None
) -> Report:
    """Move away what runs here.

    Args:
        request: with `resume`, only what it gives instead of the journal's request (`parallel`, `deadline_s` ...) is empty: it is ignored.
        resume: go on with the drain that was broken off, as it was asked for.
        dry_run: say what would go where.
        stop: set from another thread: begin nothing more, and let those under way undo.

    Raises:
        UsageError, TargetNotFound: nothing was touched.
        CannotConnect: no destination can be reached; nothing was touched.
        NoSpace, IncompatibleHost: some fit nowhere (without `best_effort`); nothing was touched.
        BusyError: another ckpt is at it.
        KeyboardInterrupt: told to stop; nothing new was begun, those under way were undone or finished; the journal says what is left.
    """
    began_s = time.monotonic()
    if not dry_run:
        for said in recover.sweep(store_root):
            emit(Notice("drain", said))
    journal = Drain.newest(store_root)
    if journal is not None and not journal.open:
        journal = None
    only: frozenset[str] | None = None
    if resume:
        if journal is None:
            raise TargetNotFound("no drain was broken off here", hint="ckpt drain --to HOST begins one")
        request = replace(DrainRequest.from_json(journal.request), deadline_s=request.deadline_s)
        only = frozenset(item.target for item in journal.items)
    request = replace(request, to=tuple(dict.fromkeys(request.to)))
    for destination in request.to:
        client.parse(destination)
    if not request.to:
        raise UsageError("where to?", hint="ckpt drain --to root@b,root@c")
    earlier: list[Went] = []
    try:
        if journal is not None and not dry_run:
            journal.acquire()
            drainstate.settle(journal, store_root=store_root, emit=emit)
            earlier = _asked(journal, request, _earlier(journal))
        looked = draining.workloads(request, only=only)
        for note in looked.notes:
            emit(Notice("drain", note, warning=True))
        if request.words != request.group_words and any(one.as_one for one in looked.candidates):
            emit(Notice("drain", "groups move at one instant, without --precopy, --postcopy and --lazy"))
        there = _rooms(request, looked, emit)
        took = Counter(one.destination for one in earlier if one.state == "moved")
        placed = draining.placement(looked.candidates, there, reserve=request.reserve_bytes, took=took)
        stays = [*_staying(looked), *(() if request.else_checkpoint else _unplaced(looked, placed))]
        if not request.best_effort:
            _refuse(stays, there)
        if dry_run:
            return Report("", (*_planned(looked, placed), *stays))
        if journal is None:
            journal = Drain.create(store_root)
        items = [_item(one, placed.chosen.get(one.target, "")) for one in looked.candidates]
        planned = {item.target for item in items}
        items += [DrainItem(one.target, one.target.partition(":")[0], one.container_id, one.name) for one in stays if one.target not in planned]
        journal.write_plan(request.to_json(), items)
        for one in stays:
            journal.write("skipped" if one.error is None else "failed", item=one.target, reason=one.reason, error=_json(one.error))
        faults.point("drain-planned")
        return _Draining(request, journal, looked, placed, there, store_root, emit, began_s, stop or threading.Event()).run(earlier, stays)
    finally:
        if journal is not None:
            journal.release()


class _Draining:
    """One run of a drain, from its plan on."""

    def __init__(
        self,
        request: DrainRequest,
        journal: Drain,
        looked: Looked,
        placed: Placement,
        there: list[Room],
        root: Path,
        emit: Emit,
        began_s: float,
        stop: threading.Event,
    ) -> None:
        self.request = request
        self.journal = journal
        self.placed = placed
        self.rooms = {room.destination: room for room in there}
        self.root = root
        self.emit = emit
        self.stop = stop
        self.until_s = None if request.deadline_s is None else began_s + request.deadline_s
        self.lock = threading.Lock()
        self.went: dict[str, Went] = {}
        self.rate_bytes_s = float(min(GUESSED_BYTES_S, (request.bwlimit_bytes_s or GUESSED_BYTES_S) / max(request.parallel, 1)))
        self.free = {
            room.destination: room.free_bytes - reserve_bytes(room, request.reserve_bytes) if room.free_bytes else None for room in there
        }
        self.groups: dict[str, list[Candidate]] = {}
        for one in looked.candidates:
            if one.target in placed.chosen:
                self.groups.setdefault(one.group or one.target, []).append(one)
                self._take(placed.chosen[one.target], one.memory_bytes)
            elif request.else_checkpoint:
                self.groups.setdefault(one.group or one.target, []).append(one)

    def run(self, earlier: list[Went], stays: list[Went]) -> Report:
        """All groups, `parallel` at a time."""
        self.journal.write("draining")
        ordered = sorted(self.groups, key=self._size) if self.until_s is not None else list(self.groups)  # in a hurry: as many as can be
        works = {name: lambda name=name: self._group(self.groups[name]) for name in ordered}
        interrupted: KeyboardInterrupt | None = None
        try:
            results = parallel.run_all(works, width=self.request.parallel, stop=self.stop)
        except KeyboardInterrupt as error:
            interrupted, results = error, {}
        for result in results.values():
            if isinstance(result, BaseException) and not isinstance(result, parallel.Dropped):
                raise result
        for members in self.groups.values():
            for one in members:
                if one.target not in self.went:
                    self._end(one, "dropped", reason="it was broken off" if self.stop.is_set() else "time was up")
        self.journal.write("interrupted" if interrupted is not None or self.stop.is_set() else drains.DRAINED)
        faults.point("drain-over")
        drains.mark(self.root)
        known = {*self.went, *(one.target for one in stays)}
        ours = [self.went[one.target] for group in self.groups.values() for one in group]
        went = (*(one for one in earlier if one.target not in known), *ours, *stays)
        if interrupted is not None:
            left = [one.name for one in went if one.state not in ("moved", "skipped")]
            named = f" ({', '.join(left[:8])})" if left else ""
            self.emit(Notice("drain", f"stopped; {len(left)} not moved{named}; to go on: ckpt drain --resume"))
            raise interrupted
        return Report(self.journal.id, went, self.stop.is_set())

    def _size(self, name: str) -> int:
        return sum(one.memory_bytes for one in self.groups[name])

    def _group(self, members: list[Candidate]) -> None:
        """What goes to one host: its units one after the other; to another one when the first did not take the first of them."""
        if members[0].target not in self.placed.chosen:
            for unit in draining.units(members):
                self._instead(unit)
            return
        destination = self.placed.chosen[members[0].target]
        tried = {destination}
        moved = 0
        for unit in draining.units(members):
            if self.stop.is_set():
                return
            if self._too_late(members if not moved else unit):
                self._instead(unit)
                continue
            while True:
                errors = self._move(unit, destination)
                moved += len(unit) - len(errors)
                if not errors:
                    break
                first = next(iter(errors.values()))
                unsure = any(isinstance(error, NeedsContinue | StateUnknown) for error in errors.values())
                again = not moved and not unsure and _elsewhere(first) and not self.stop.is_set()
                other = self._another(members, tried) if again else None
                if other is None:
                    for one in unit:
                        if one.target in errors:
                            self._failed(one, destination, errors[one.target], split=bool(moved))
                    break
                for member in members:
                    self._take(destination, -member.memory_bytes)
                    self._take(other, member.memory_bytes)
                what = f"{destination} did not take {'it' if len(unit) == 1 else unit[0].as_one}: {first.message}; trying {other}"
                self.emit(Notice(unit[0].target, what, warning=True))
                destination = other
                tried.add(other)

    def _move(self, unit: list[Candidate], destination: str) -> dict[str, CkptError]:
        """One migration, of one or of several that move as one; of those that did not go, and run on here or wait, the errors, causes first."""
        began_s, clock_s = time.time(), time.monotonic()
        targets = [one.target for one in unit]

        def started(pid: int, start: int) -> None:
            self.journal.tell("moving", targets, child=[pid, start])
            faults.point("drain-moving")

        self.journal.tell("moving", targets, destination=destination, began_s=began_s, child=None)
        faults.point("drain-begin")
        all_of_it = children.run(self._words(unit, destination), emit=self.emit, stopped=self._stopped, on_start=started)
        faults.point("drain-ended")
        told = {one.target: all_of_it.of(one.target) if len(unit) > 1 else all_of_it for one in unit}
        causes = {str(row.get("name")): number for number, row in enumerate(all_of_it.rows)}
        errors: dict[str, CkptError] = {}
        for one in sorted(unit, key=lambda one: causes.get(one.target, len(causes))):
            ended = told[one.target]
            error = ended.error if ended.error is None else self._truth(one, ended)
            if errors and isinstance(error, DumpFailed):  # it was stopped because of another one, before its own journal was begun
                error = MigrationRolledBack(f"{one.container.name} was not migrated: {error.message}", where=error.where)
            if error is not None:
                errors[one.target] = error
                continue
            facts = {key: ended.row.get(key) for key in ("total_s", "downtime_s", "sent_bytes")}
            container_id = str(ended.row.get("container_id") or one.container.id)
            self._end(one, "moved", destination=destination, container_id=container_id, job=ended.job, **facts)
            faults.point("drain-moved")
        took_s, size_bytes = time.monotonic() - clock_s, sum(one.memory_bytes for one in unit)
        sent = [ended.row.get("sent_bytes") for ended in told.values()]
        if not errors and size_bytes and sum(one for one in sent if isinstance(one, int | float)) > (8 << 20) and took_s > 0:
            with self.lock:
                self.rate_bytes_s = size_bytes / took_s
        return errors

    def _truth(self, one: Candidate, ended: children.Ended) -> CkptError | None:
        """What its migration failed with; None when it is there all the same. One in doubt is continued."""
        error = ended.error
        assert error is not None
        job = ended.job if isinstance(error, NeedsContinue | StateUnknown) else ""
        if not job:
            if ended.row:
                return error
            # Without a result its ckpt has crashed, or was killed: its job knows.
            found = drainstate.settled(self.journal, one.target, self.root, self.emit)
            if found.state != "waiting":
                return None if found.state == "moved" else error
            job = found.job
        self.journal.write("waiting", item=one.target, job=job)
        still = drainstate.continue_(job, store_root=self.root, emit=self.emit)
        found = drainstate.settled(self.journal, one.target, self.root, self.emit)
        if found.state == "here":
            return MigrationRolledBack(f"{one.container.name} was not migrated: {error.message}", log=error.log)
        waits = still or error
        if found.state == "waiting" and not isinstance(waits, NeedsContinue | StateUnknown):
            where = f"{one.container.name} is frozen here, and may be running there"
            waits = NeedsContinue(waits.message, where=where, hint=f"ckpt migrate --continue {job}")
        return None if found.state == "moved" else waits

    def _words(self, unit: list[Candidate], destination: str) -> list[str]:
        request = self.request
        words = ["migrate", "--store", str(self.root), "--format", "jsonl"]
        if request.bwlimit_bytes_s:
            words += ["--bwlimit", str(request.bwlimit_bytes_s), "--bwlimit-shared", str(self.journal.directory / "bwlimit")]
        if len(unit) == 1:
            return [*words, *(request.server_words if is_https(destination) else request.words), "--", unit[0].target, destination]
        words += request.group_server_words if is_https(destination) else request.group_words
        return [*words, "--group", unit[0].as_one, "--", destination, *(one.target for one in unit)]

    def _stopped(self) -> bool:
        return self.stop.is_set() or (self.until_s is not None and time.monotonic() >= self.until_s)

    def _too_late(self, members: Iterable[Candidate]) -> bool:
        """Whether they cannot be away in time."""
        if self.until_s is None:
            return False
        needed_s = OVERHEAD_S + sum(one.memory_bytes for one in members) / max(self.rate_bytes_s, 1.0)
        return time.monotonic() + needed_s > self.until_s

    def _instead(self, unit: list[Candidate]) -> None:
        """In a hurry: save it, if that is asked for and there is time; else it is left running. A group goes to the store at one instant."""
        assert self.until_s is not None
        where = self.request.else_checkpoint
        left_s = self.until_s - time.monotonic()
        if not where or OVERHEAD_S / 2 + sum(one.memory_bytes for one in unit) / SAVING_BYTES_S > left_s:
            for one in unit:
                self._end(one, "dropped", reason="there is no time to move it; it runs on here")
        elif where == STORE:
            self._save(unit, ["--group", unit[0].as_one] if len(unit) > 1 else [])
        else:
            for one in unit:
                location = f"{where.rstrip('/')}/{one.container.name.replace('/', '_')}.tar.zst"
                self._save([one], ["-e", location], location)

    def _save(self, unit: list[Candidate], how: list[str], location: str = "") -> None:
        targets = [one.target for one in unit]

        def started(pid: int, start: int) -> None:
            self.journal.tell("saving", targets, began_s=time.time(), child=[pid, start])

        words = ["checkpoint", "--store", str(self.root), "--format", "jsonl", *how, "--", *targets]
        all_of_it = children.run(words, emit=self.emit, stopped=self._stopped, on_start=started)
        for one in unit:
            ended = all_of_it.of(one.target) if len(unit) > 1 else all_of_it
            if ended.error is not None:
                self._failed(one, "", ended.error)
                continue
            saved_as = location or str(ended.row.get("ref") or "")
            self._end(one, "saved", reason=f"saved as {saved_as}: there was no time to move it", ref=saved_as)

    def _failed(self, one: Candidate, destination: str, error: CkptError, *, split: bool = False) -> None:
        waits = isinstance(error, NeedsContinue | StateUnknown)
        error.where = error.where or f"{one.container.name} is running here"
        if split and not waits:
            self.emit(Notice(one.target, f"others of its group are on {destination} already", warning=True))
        state = "waiting" if waits else "dropped" if self._stopped() else "failed"
        self._end(one, state, destination=destination, reason=error.message, error=error)

    def _end(self, one: Candidate, state: str, *, error: CkptError | None = None, **facts: Any) -> None:
        self.journal.write(state, item=one.target, error=_json(error), **facts)
        shown = {key: facts.get(key, "") for key in ("destination", "container_id", "reason")}
        went = Went(one.target, one.container.name, state, memory_bytes=one.memory_bytes, error=error, facts=facts, **shown)
        with self.lock:
            self.went[one.target] = went

    def _take(self, destination: str, size_bytes: int) -> None:
        with self.lock:
            free = self.free[destination]
            self.free[destination] = None if free is None else free - size_bytes

    def _another(self, members: list[Candidate], tried: set[str]) -> str | None:
        """Where else they fit: of the hosts that were not tried, the one with most room."""
        size = sum(one.memory_bytes for one in members)
        with self.lock:
            fit = [
                (float("inf") if free is None else free, destination)
                for destination, free in self.free.items()
                if destination not in tried
                and (free is None or free >= size)
                and not any(one.target in self.rooms[destination].refused for one in members)
            ]
        return max(fit)[1] if fit else None


def _elsewhere(error: CkptError) -> bool:
    """Whether another destination may take what this one did not."""
    return isinstance(error, MigrationRolledBack) or error.exit_code in (11, 12, 13, 33, 40, 41, 42, 43, 60)


def _json(error: CkptError | None) -> dict[str, object] | None:
    return error.to_json() if error is not None else None


def _rooms(request: DrainRequest, looked: Looked, emit: Emit) -> list[Room]:
    """The destinations. With none of them there, what can be saved instead is."""
    try:
        return draining.rooms(request, looked.candidates, emit)
    except CkptError as error:
        if not request.else_checkpoint:
            raise
        emit(Notice("drain", f"{error.message}; what there is time for is saved", warning=True))
        return []


def _item(one: Candidate, destination: str) -> DrainItem:
    return DrainItem(one.target, one.engine.name, one.container.id, one.container.name, destination, one.memory_bytes, one.group, one.as_one)


def _staying(looked: Looked) -> list[Went]:
    found = [_stays(target, container, "skipped", reason) for target, container, reason in looked.skipped]
    return found + [_stays(target, container, "failed", error.message, error) for target, container, error in looked.unfit]


def _stays(target: str, container: Container, state: str, reason: str, error: CkptError | None = None) -> Went:
    return Went(target, container.name, state, container_id=container.id, reason=reason, error=error)


def _unplaced(looked: Looked, placed: Placement) -> list[Went]:
    found = []
    for one in looked.candidates:
        if (why := placed.unplaced.get(one.target)) is None:
            continue
        text = "; ".join(f"{destination}: {reason}" for destination, reason in why.items())
        kind = NoSpace if any("of memory" in reason for reason in why.values()) else IncompatibleHost
        error = kind(f"{one.container.name} fits on no destination: {text}", where=f"{one.container.name} is running, untouched")
        found.append(Went(one.target, one.container.name, "failed", "", one.container.id, one.memory_bytes, error.message, error))
    return found


def _refuse(stays: list[Went], there: list[Room]) -> None:
    """Raises the error of those that cannot go, before anything is touched."""
    bad = [one for one in stays if one.error is not None]
    if not bad:
        return
    first = bad[0].error
    assert first is not None
    message = first.message if len(bad) == 1 else f"{len(bad)} cannot be moved: " + "; ".join(one.reason for one in bad)
    raise type(first)(
        message, where="nothing was touched", hint="--best-effort moves the others, --exclude NAME leaves one out on purpose", log=first.log
    )


def _planned(looked: Looked, placed: Placement) -> list[Went]:
    return [
        Went(one.target, one.container.name, "planned", placed.chosen[one.target], one.container.id, one.memory_bytes)
        for one in looked.candidates
        if one.target in placed.chosen
    ]


def _asked(journal: Drain, request: DrainRequest, earlier: list[Went]) -> list[Went]:
    """The same, as the other hosts have it: what is not there any more is told, and who could not be asked."""
    said = drainask.ask(drainask.sent(journal), ssh_options=request.ssh_options, access=request)
    found = []
    for one in earlier:
        answer = said.get(one.target) if one.state == "moved" else None
        if answer is None:
            found.append(one)
            continue
        if answer.state == "changed":
            journal.write("changed", item=one.target, reason=answer.reason)
        found.append(replace(one, state="changed" if answer.state == "changed" else one.state, reason=answer.reason))
    return found


def _earlier(journal: Drain) -> list[Went]:
    """What an earlier run of this drain brought to its end, for the table."""
    names = {item.target: item for item in journal.items}
    found = []
    for target, state in journal.states().items():
        if state.state not in ("moved", "saved", "waiting", "gone"):
            continue
        error: CkptError | None = None
        if state.state == "waiting":
            hint = f"ckpt migrate --continue {state.facts.get('job')}"
            error = NeedsContinue(f"{names[target].name} waits until {state.facts.get('destination')} has been asked", hint=hint)
        shown = {key: str(state.facts.get(key) or "") for key in ("destination", "container_id", "reason")}
        found.append(Went(target, names[target].name, state.state, memory_bytes=names[target].memory_bytes, error=error, facts=state.facts, **shown))
    return found
