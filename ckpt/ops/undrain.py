"""`ckpt undrain`: what was moved away by a drain comes back.

This host fetches it over its own ssh to the other one (ops/fetching.py). What went as one comes back as one.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from ckpt.engines import registry
from ckpt.errors import (
    CannotConnect,
    CkptError,
    MigrationRolledBack,
    NeedsContinue,
    RemoteRefused,
    StateUnknown,
    TargetNotFound,
    TransferFailed,
    UsageError,
)
from ckpt.events import Emit, Notice
from ckpt.ops import children, drainask, drainstate, faults, parallel, recover
from ckpt.ops.drain import Report, Went
from ckpt.ops.drainask import Said
from ckpt.ops.draining import DrainRequest
from ckpt.ops.fetching import Fetch
from ckpt.peer import messages
from ckpt.store import drains
from ckpt.store.drains import Drain, DrainItem, DrainState
from ckpt.store.history import JOB_ID
from ckpt.transports import ssh
from ckpt.transports.https_peer import is_https

ASK_LIMIT_S: Final = 60.0
_ANSWER_CAP: Final = 8 << 20


@dataclass(frozen=True, slots=True)
class UndrainRequest:
    """What is to come back, and how."""

    only: tuple[str, ...] = ()
    """Names or targets; none: all."""
    parallel: int = 4
    bwlimit_bytes_s: int | None = None
    """Of each of them: they come from different hosts."""
    words: tuple[str, ...] = ()
    """Options for the `ckpt migrate` there."""
    group_words: tuple[str, ...] = ()
    """Of `ckpt migrate --group`, which takes not all of them."""
    ssh_options: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    """What they may have here beyond this host's policy, as KIND:VALUE."""


def undrain(request: UndrainRequest, *, dry_run: bool = False, store_root: Path, emit: Emit) -> Report:
    """Bring back what drains moved away.

    Raises:
        TargetNotFound: this host was not drained, or there is no such workload among those that left.
        BusyError: another ckpt is at it.
        KeyboardInterrupt: nothing more was begun, what was under way is over.
    """
    for line in recover.sweep(store_root):
        emit(Notice("undrain", line))
    journals = [journal for journal in Drain.every(store_root) if journal.state != drains.UNDRAINED]
    if not journals:
        raise TargetNotFound("this host was not drained, or all is back", where="nothing was touched")
    with ExitStack() as stack:
        for journal in journals:
            journal.acquire()
            stack.callback(journal.release)
            drainstate.settle(journal, store_root=store_root, emit=emit)
        away = {journal.id: _away(journal) for journal in journals}
        known = [item for items in away.values() for item in items]
        if unknown := [name for name in request.only if not any(name in (item.target, item.name) for item in known)]:
            raise TargetNotFound(f"{unknown[0]!r} is not among what was moved away", hint=f"there are: {', '.join(i.name for i in known) or 'none'}")
        went: list[Went] = []
        for journal in journals:
            items = [item for item in away[journal.id] if not request.only or {item.target, item.name} & set(request.only)]
            if dry_run:
                chosen = [one for one in drainask.sent(journal, drains.AWAY) if one.item in items]
                said = drainask.ask(chosen, ssh_options=request.ssh_options, access=_request(journal))
                went += [_planned(one, said[one.item.target]) for one in chosen]
            else:
                went += _Undraining(request, journal, store_root, emit).run(items)
        if not dry_run:
            drains.mark(store_root)
        return Report(journals[-1].id, tuple(went))


def _away(journal: Drain) -> list[DrainItem]:
    states = journal.states()
    return [item for item in journal.items if states[item.target].state in drains.AWAY]


class _Undraining:
    """One run of it."""

    def __init__(self, request: UndrainRequest, journal: Drain, root: Path, emit: Emit) -> None:
        self.request = request
        self.journal = journal
        self.root = root
        self.emit = emit
        self.stop = threading.Event()
        self.states = journal.states()
        self.went: dict[str, Went] = {}
        self.told: dict[str, dict[str, Any]] = {}
        """Figures of the migrations."""
        self.fetch = Fetch(request.ssh_options, request.allow, root)

    def run(self, items: Sequence[DrainItem]) -> list[Went]:
        """Groups stay together: one after the other, as they went."""
        if items:
            self.journal.write(drains.UNDRAINING)
        groups: dict[str, list[DrainItem]] = {}
        for item in items:
            groups.setdefault(item.group or item.target, []).append(item)
        works = {name: lambda name=name: self._group(groups[name]) for name in groups}
        results = parallel.run_all(works, width=self.request.parallel, stop=self.stop)
        for result in results.values():
            if isinstance(result, BaseException) and not isinstance(result, parallel.Dropped):
                raise result
        states = self.journal.states()
        if not any(state.state in drains.AWAY for state in states.values()):
            self.journal.write(drains.UNDRAINED)
        rest = [_saved(item, states[item.target]) for item in self.journal.items if states[item.target].state == "saved"]
        return [*(self.went[item.target] for item in items if item.target in self.went), *rest]

    def _group(self, items: Sequence[DrainItem]) -> None:
        units: dict[str, list[DrainItem]] = {}
        for item in items:
            key = f"set {item.as_one} on {self._destination(item)}" if item.as_one else item.target
            units.setdefault(key, []).append(item)
        for unit in units.values():
            if not self.stop.is_set():
                self._back(unit)

    def _back(self, unit: list[DrainItem]) -> None:
        destination = self._destination(unit[0])
        try:
            self._note(unit, self._fetch(unit, destination), destination)
        except CkptError as error:
            self._note(unit, {item.target: messages.again(error) for item in unit}, destination)

    def _note(self, unit: list[DrainItem], became: Mapping[str, tuple[str, str] | CkptError], destination: str) -> None:
        for item in sorted(unit, key=lambda item: isinstance(became[item.target], CkptError)):
            found = became[item.target]
            if isinstance(found, CkptError):
                self.went[item.target] = Went(
                    item.target, item.name, "moved", destination, self._id(item), item.memory_bytes, found.message, found
                )
                continue
            state, reason = found
            faults.point("undrain-back")
            self.journal.write(state, item=item.target, reason=reason)
            faults.point("undrain-noted")
            told = self.told.get(item.target, {})
            went = Went(item.target, item.name, state, "", self._id(item), item.memory_bytes, reason, None, told)
            if state == "changed":
                went = replace(went, destination=destination, error=TargetNotFound(f"{item.name} was not brought back: {reason}"))
            self.went[item.target] = went

    def _destination(self, item: DrainItem) -> str:
        return str(self.states[item.target].facts.get("destination") or item.destination)

    def _id(self, item: DrainItem) -> str:
        return str(self.states[item.target].facts.get("container_id") or item.container_id)

    def _fetch(self, unit: list[DrainItem], destination: str) -> dict[str, tuple[str, str] | CkptError]:
        """Of each: ("returned" or "changed", why), or why it is still there. Raises CkptError when all are."""
        became: dict[str, tuple[str, str] | CkptError] = {}
        answers = self._ask(unit, destination)
        for item in unit:
            said = answers[item.target]
            if self.states[item.target].state == "returning" and not is_https(destination):
                self._mend(item, destination)
            if drainstate.runs_here(replace(item, container_id=self._id(item))):
                became[item.target] = "returned", "it runs here already"
            elif said.state == "changed":
                became[item.target] = "changed", said.reason
            elif is_https(destination):
                became[item.target] = _unreachable(item, destination, said)
            elif said.error is not None:
                raise type(said.error)(said.reason, where=f"{item.name} went to {destination}", hint=said.error.hint)
        coming = [item for item in unit if item.target not in became]
        if coming:
            became |= self._come(coming, destination)
        return became

    def _come(self, unit: list[DrainItem], destination: str) -> dict[str, tuple[str, str] | CkptError]:
        """One migration to here, of one or of those that come as one."""
        self.journal.tell("returning", [item.target for item in unit])
        faults.point("undrain-begin")
        limit = ["--bwlimit", str(self.request.bwlimit_bytes_s)] if self.request.bwlimit_bytes_s else []
        targets = [self._target(item) for item in unit]
        if len(unit) == 1:
            ended = [self._pull(destination, [*self.request.words, *limit, "--", *targets], unit[0])]
        else:
            words = [*self.request.group_words, *limit, "--group", unit[0].as_one]
            by_target = dict(zip(targets, unit, strict=True))
            all_of_it = self.fetch.group(destination, words, targets, emit=self._emit_under(by_target))
            ended = [all_of_it.of(target) for target in targets]
        faults.point("undrain-came")
        became: dict[str, tuple[str, str] | CkptError] = {}
        for item, one in zip(unit, ended, strict=True):
            try:
                self._came(item, one, destination)
                became[item.target] = "returned", ""
            except CkptError as error:
                became[item.target] = error
        return became

    def _target(self, item: DrainItem) -> str:
        """How it is called there."""
        return item.target if item.engine == "process" else f"{registry.by_name(item.engine).prefixes[0]}:{self._id(item)}"

    def _came(self, item: DrainItem, ended: children.Ended, destination: str) -> None:
        """Whether it did. Raises CkptError when it is still there."""
        error = ended.error
        settled = True
        if isinstance(error, NeedsContinue | StateUnknown) and JOB_ID.fullmatch(ended.job):
            error = self._pull(destination, ["--continue", ended.job], item).error
            settled = error is None
        ids = (self._id(item), str(ended.row.get("container_id") or ""))  # a process tree has another id when it was restored
        if not any(drainstate.runs_here(replace(item, container_id=one)) for one in ids if one):
            # Continued it may have ended well for the other host: it went on there.
            raise _from_here(error or ended.error or TransferFailed(f"{item.name} was not brought back"), item, destination, settled=settled)
        self.told[item.target] = {key: ended.row.get(key) for key in ("total_s", "downtime_s", "sent_bytes")}

    def _ask(self, unit: Sequence[DrainItem], destination: str) -> dict[str, Said]:
        sent = [drainask.Sent(item, destination, self._id(item)) for item in unit]
        return drainask.ask(sent, ssh_options=self.request.ssh_options, access=_request(self.journal))

    def _mend(self, item: DrainItem, destination: str) -> None:
        """Finish what an undrain that was killed left in doubt on the other host."""
        for row in self._jobs(destination):
            if row.get("container_id") == self._id(item) and row.get("state") == "waiting" and JOB_ID.fullmatch(str(row.get("id"))):
                error = self._pull(destination, ["--continue", str(row["id"])], item).error
                if error is not None:
                    raise _from_here(error, item, destination)

    def _jobs(self, destination: str) -> list[dict[str, Any]]:
        """The migrations that wait on the other host."""
        words = ["ckpt", "jobs", "--format", "json", "--filter", "kind=migrate", "--filter", "state=waiting"]
        process = ssh.open(destination, words, self.request.ssh_options, batch=True)
        try:
            out, said = process.communicate(timeout=ASK_LIMIT_S)
        except BaseException as error:
            process.kill()
            process.wait()
            if isinstance(error, Exception):
                raise CannotConnect(f"{destination} did not say which migrations wait there") from error
            raise
        if process.returncode:
            raise ssh.explain(destination, process.returncode, said.decode(errors="replace"))
        try:
            rows = json.loads(out[:_ANSWER_CAP])["results"]
        except (ValueError, RecursionError, TypeError, KeyError):
            raise CannotConnect(f"{destination} gave no sensible answer about its migrations") from None
        return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []

    def _pull(self, destination: str, words: Sequence[str], item: DrainItem) -> children.Ended:
        return self.fetch.single(destination, words, item.name, emit=self._emit_under({"": item}))

    def _emit_under(self, items: Mapping[str, DrainItem]) -> Emit:
        """Under the names that they have here: there they are asked for by their ids. "": whatever is told."""

        def emit(event: Any) -> None:
            item = items.get(event.target) or items.get("")
            self.emit(replace(event, target=item.target if item is not None else event.target))

        return emit


def _from_here(error: CkptError, item: DrainItem, destination: str, *, settled: bool = False) -> CkptError:
    """An error of the ckpt there: what is "here" to it is there to us. `settled`: what was in doubt was continued since."""
    if settled and isinstance(error, NeedsContinue | StateUnknown):
        error = MigrationRolledBack(f"{item.name} was not brought back: {error.message}", hint="ckpt undrain, once more", log=error.log)
    if isinstance(error, NeedsContinue | StateUnknown) and not settled:
        error.where = f"{item.name} is frozen on {destination}, and may be running here"
        error.hint = "when it can be reached again: ckpt undrain"
    else:
        error.where = f"{item.name} runs on {destination}, nothing is left of it here"
    host = ssh.Destination.parse(destination).host
    if error.log is not None and error.log.startswith("/"):
        error.log = f"{host}:{error.log}"
    return error


def _unreachable(item: DrainItem, destination: str, said: Said) -> CkptError:
    message = f"{item.name} is behind a ckpt serve, from which nothing can be fetched"
    hint = f"run there: ckpt migrate {f'--group {item.as_one} root@THIS-HOST' if item.as_one else f'{item.target} root@THIS-HOST'}"
    where = f"{item.name} runs there" if not said.reason else f"{item.name} went to {destination}: {said.reason}"
    return RemoteRefused(message, where=where, hint=hint)


def _planned(one: drainask.Sent, said: Said) -> Went:
    state = "changed" if said.state == "changed" else "planned"
    return Went(one.item.target, one.item.name, state, one.destination, one.container_id, one.item.memory_bytes, said.reason)


def _request(journal: Drain) -> DrainRequest | None:
    with suppress(UsageError):
        return DrainRequest.from_json(journal.request)
    return None


def _saved(item: DrainItem, state: DrainState) -> Went:
    reason = f"it was saved, not moved: ckpt restore {item.name}" if "/" not in str(state.facts.get("ref")) else str(state.facts.get("reason"))
    return Went(item.target, item.name, "saved", "", item.container_id, item.memory_bytes, reason, None, state.facts)
