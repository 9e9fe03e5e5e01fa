"""How one workload comes back after a boot: rung by rung, until one holds.

A restore, one with its TCP connections closed, a cold start. Before each rung and after it the journal has a line, so that a resume that was
killed goes on where it was. Nothing is consumed: what a rung removes (podman's stopped container) can be made again from the checkpoint,
root file system and all, also for a cold start.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from ckpt.archive import trust
from ckpt.criu import tree
from ckpt.engines import registry
from ckpt.engines.base import ChecksHealth, Startable
from ckpt.engines.registry import NamedEngine
from ckpt.errors import BusyError, CkptError, RestoreFailed, StartedCold, StateUnknown
from ckpt.events import Emit, Notice
from ckpt.host import systemd
from ckpt.host.run import CommandFailed
from ckpt.model import Checkpoint, Container, Manifest, RestoreOptions
from ckpt.ops import faults, journald, proof
from ckpt.ops import restore as restoring
from ckpt.ops.group_restore import restore_group
from ckpt.ops.hibernate import guards, leavings
from ckpt.ops.hibernate.sets import described
from ckpt.ops.hibernate.settings import HibernateSettings, Rung
from ckpt.ops.result import Outcome
from ckpt.store.catalog import Catalog
from ckpt.store.hibernation import Hibernation, Item

SETTLE_S: Final = 0.3
"""How long one must have lived to be back."""
HEALTH_LIMIT_S: Final = 15.0
"""How long its own check of its health may say no."""
HOW: Final[dict[str, str]] = {"restore": "restored", "restore-closed": "restored-closed", "cold": "cold", "leave": "left"}
"""Rung -> state in the journal."""
_POLL_S: Final = 0.1


@dataclass(slots=True)
class Climb:
    """One workload on its way back."""

    item: Item
    checkpoint: Checkpoint | None
    rungs: list[Rung]
    """Those still to be tried, the next one first."""
    hibernation: Hibernation
    settings: HibernateSettings
    catalog: Catalog
    emit: Emit
    tried: list[dict[str, Any]] = field(default_factory=list)
    container: Container | None = None
    """What runs, once a rung holds so far."""
    how: str = ""
    """Where it ended: a state of ITEM_BACK."""
    looked: restoring.Looked | None = None
    """What is known of the engine's side, good for the first rung only."""
    shared_volumes: tuple[str, ...] = ()
    """Named volumes that others of the hibernation have too; they stay as they are."""
    note: str = ""
    """Why it came back another way than asked for."""
    pods: dict[str, str] = field(default_factory=dict)
    """Those that were made anew since: the id of each then, and now."""
    warnings: list[str] = field(default_factory=list)
    error: CkptError | None = None
    at_s: float = 0.0
    """time.monotonic() when the rung held."""
    took_s: float = 0.0

    @property
    def label(self) -> str:
        return self.item.target

    @property
    def over(self) -> bool:
        return bool(self.how)

    def engine(self) -> NamedEngine:
        return registry.by_name(self.item.engine)

    def step(self) -> None:
        """Try the next rung. Never raises: what goes wrong is in the journal, and the rung after it is next."""
        if not self.rungs:
            self.end("failed")
            return
        rung = self.rungs[0]
        began = time.monotonic()
        self.note_down("resuming", rung=rung, rungs=self.tried)
        try:
            faults.point("hibernate-rung")
            faults.point(f"hibernate-rung-{rung}")
            self._climb(rung)
            faults.point("hibernate-climbed")
        except (CkptError, CommandFailed, OSError) as error:
            self.failed(error, began)
            return
        self.at_s = time.monotonic()
        self.took_s = self.at_s - began

    def _climb(self, rung: Rung) -> None:
        if rung == "leave":
            self.container = None
            return
        if rung == "cold":
            self.container = self._start_cold()
            return
        if self.checkpoint is None:
            raise RestoreFailed(f"there is no checkpoint of {self.label}")
        self.container = self._restore(RestoreOptions(tcp_close=rung == "restore-closed", timeout_s=self.settings.restore_timeout_s))

    def _restore(self, options: RestoreOptions) -> Container:
        assert self.checkpoint is not None
        looked, self.looked = self.looked, None
        options = replace(options, kept_volumes=self.shared_volumes, pods=tuple(self.pods.items()))
        done = restoring.from_store(self.label, self.checkpoint, options, self.catalog, self.emit, False, trust.ANYBODY, looked)
        self.warnings += done.warnings
        if done.container is None:
            raise RestoreFailed(f"{self.label} was restored, but nobody knows it")
        return done.container

    def _start_cold(self) -> Container | None:
        """By its unit, where it has one; else made again from the checkpoint that it ended with, where that can be; else by its engine."""
        if self.checkpoint is not None:
            for what in leavings.clear(self.checkpoint):
                self.emit(Notice(self.label, f"removed {what}"))
        if self.item.units and systemd.running():
            for unit in self.item.units:
                (guards.RESUMED / unit).unlink(missing_ok=True)
                systemd.control("start", "--no-block", unit)
            return None
        engine = self.engine()
        can = engine.probe()
        # As it was when it ended, with the restart policy that was taken from the ended one. After a crash its own files are newer.
        if self.checkpoint is not None and can.remakes and not self.checkpoint.manifest.left_running:
            try:
                return self._restore(RestoreOptions(cold=True, timeout_s=self.settings.cold_timeout_s))
            except CkptError as error:
                if isinstance(error, StateUnknown) or not self._there(engine):
                    raise
                self.emit(Notice(self.label, f"made again: {error.message}", warning=True))
        there = self._there(engine)
        if there is None and self.checkpoint is not None and can.remakes:
            return self._restore(RestoreOptions(cold=True, timeout_s=self.settings.cold_timeout_s))
        if not can.startable or not isinstance(engine, Startable):
            hint = "name its unit in /etc/ckpt/hibernate.toml, then that is started" if self.item.engine == "process" else None
            raise RestoreFailed(f"{self.label} cannot be started without a checkpoint", where="nothing is running", hint=hint)
        if there is None:
            there = Container(self.item.engine, self.item.container_id, self.item.name, "exited", bundle_dir=self._bundle())
        now = engine.describe(there) if there.bundle_dir is None else there
        return now if now.state == "running" else engine.start(now)

    def _there(self, engine: NamedEngine) -> Container | None:
        return next((c for c in engine.find(self.item.container_id) if c.id == self.item.container_id), None)

    def _bundle(self) -> Path | None:
        """Where a bare runtime's container lies: what the runtime knew of it went with the boot."""
        text = str(described(self.checkpoint).get("bundle") or "") if self.checkpoint is not None else self.item.labels.get("ckpt.bundle", "")
        return Path(text) if text else None

    def check(self) -> None:
        """After a rung: it still runs, is what was dumped and calls itself healthy, or the rung has failed. Never raises."""
        if self.over or not self.rungs or not self.at_s:
            return
        rung, began = self.rungs[0], self.at_s
        try:
            if self.container is not None:
                self._healthy(self.container, asked=rung != "cold")
        except (CkptError, CommandFailed, OSError) as error:
            with suppress(CkptError, CommandFailed):
                self._take_back()
            self.failed(error, began)
            return
        self.tried.append({"rung": rung, "ok": True, "error": None, "took_s": round(self.took_s, 6)})
        self.end(HOW[rung])

    def _healthy(self, container: Container, *, asked: bool) -> None:
        """Raise RestoreFailed for one that ended; with `asked` (one that has just begun cannot answer yet) also for one that says it is not well."""
        if container.pid and not _alive(container.pid):
            raise RestoreFailed(f"{self.label} ended as soon as it ran")
        config = described(self.checkpoint) if self.checkpoint is not None else {}
        check, engine = config.get("healthcheck"), self.engine()
        tests = check.get("Test") if isinstance(check, dict) else None
        if asked and tests and tests != ["NONE"] and isinstance(engine, ChecksHealth):
            end = time.monotonic() + HEALTH_LIMIT_S
            while not engine.healthy(container):
                if not container.pid or not _alive(container.pid) or time.monotonic() > end:
                    raise RestoreFailed(f"{self.label} runs, but its healthcheck fails")
                time.sleep(_POLL_S)

    def _take_back(self) -> None:
        """End what a rung brought, so that the next one has room."""
        engine, container = self.engine(), self.container
        self.container = None
        if container is None:
            return
        if isinstance(engine, Startable) and engine.probe().startable:
            engine.stop(container, 0.0)
        elif container.pid and _alive(container.pid):
            raise BusyError(f"{self.label} is still there", where=f"process {container.pid}")

    def failed(self, error: BaseException, began: float) -> None:
        """The rung did not hold."""
        said = error if isinstance(error, CkptError) else RestoreFailed(f"{self.label}: {error or type(error).__name__}")
        rung = self.rungs.pop(0)
        self.error, self.container, self.at_s = said, None, 0.0
        self.tried.append({"rung": rung, "ok": False, "error": said.to_json(), "took_s": round(time.monotonic() - began, 6)})
        self.emit(Notice(self.label, f"{rung}: {said.message}", warning=True))
        self.note_down("resuming", rung=self.rungs[0] if self.rungs else "", rungs=self.tried)
        if isinstance(said, StateUnknown):
            self.rungs.clear()  # what may still be there must not get a twin; its guard goes on undoing it
        if not self.rungs:
            self.end("failed")

    def end(self, how: str) -> None:
        """It is back, or it is not; the journal says so, and who would start it again is told."""
        self.how = how
        if how in ("restored", "restored-closed"):
            self.keep_unit_from_starting()
            self.give_scope()
            faults.point("hibernate-healthy")
        if how == "cold" and (why := self.note or self._first_failure()):
            hint, log = (self.error.hint, self.error.log) if self.error is not None else (None, None)
            self.error = StartedCold(f"{self.label} was started cold: {why}", hint=hint, log=log)
        elif how == "failed" and self.error is None:
            self.error = RestoreFailed(f"{self.label} is not back: there is no rung left to try")
        elif how in ("restored", "restored-closed"):
            self.error = None
        said = self.error.to_json() if self.error is not None else None
        self.note_down(how, rungs=self.tried, error=said, **({"note": self.note} if self.note else {}))
        priority = 3 if how == "failed" else 4 if how == "cold" else 6
        error = self.error.message if self.error is not None else ""
        journald.tell(
            f"{self.label}: {how}" + (f" ({error})" if error else ""),
            phase="resume",
            result=how,
            id=self.hibernation.id,
            target=self.item.target,
            checkpoint=self.checkpoint.manifest.id if self.checkpoint is not None else "",
            total_s=self.took_s,
            error=error,
            priority=priority,
        )

    def _first_failure(self) -> str:
        """Why the first rung did not hold, also when an earlier resume tried it; "" when none failed."""
        failures = [row.get("error") for row in self.tried if not row.get("ok")]
        return next((str(error.get("message") or "") for error in failures if isinstance(error, dict)), "")

    def keep_unit_from_starting(self) -> None:
        """Say that a unit's container runs already."""
        if self.item.units:
            try:
                guards.mark_resumed(self.item.units)
            except OSError as error:
                self.warnings.append(f"{', '.join(self.item.units)} may start it again: {error}")

    def give_scope(self) -> None:
        """Put a process tree into a unit of its own: in that of the resume it would end with it."""
        pid = self.container.pid if self.container is not None else None
        if self.item.engine != "process" or not pid or not systemd.running():
            return
        name = f"ckpt-{systemd.escape(self.item.name)}"
        if systemd.unit_of(pid) == f"{name}.scope":
            return
        try:
            systemd.scope(name, tree.pids(pid))
        except CkptError as error:
            self.warnings.append(f"it has no unit of its own and may end with that of ckpt: {error.message}")

    def note_down(self, state: str, **facts: Any) -> None:
        """A line of the journal. On a full disk it is missing, which is no reason to leave a workload down."""
        try:
            self.hibernation.write(state, item=self.item.target, **facts)
        except OSError as error:
            self.emit(Notice(self.label, f"the journal cannot be written: {error}", warning=True))


def step_together(climbs: Sequence[Climb], name: str) -> None:
    """The first rung of a set's members: all are held, then let go together. Never raises; when it fails each goes on by its own ladder."""
    began = time.monotonic()
    first, chosen = climbs[0], {climb.label: climb.checkpoint for climb in climbs if climb.checkpoint is not None}
    for climb in climbs:
        climb.looked = None
        climb.note_down("resuming", rung=climb.rungs[0], rungs=climb.tried)
    found: dict[str, Outcome] = {}
    try:
        faults.point("hibernate-rung")
        faults.point("hibernate-rung-restore")
        limit_s, pods = first.settings.restore_timeout_s, tuple(first.pods.items())
        options = RestoreOptions(timeout_s=limit_s, kept_volumes=first.shared_volumes, pods=pods)
        after = {climb.label: set(climb.item.after) & set(chosen) for climb in climbs}
        for outcome in restore_group(chosen, name, options, first.catalog, first.emit, after=after, keep=False):
            found.setdefault(outcome.target, outcome)
        faults.point("hibernate-climbed")
    except (CkptError, CommandFailed, OSError) as error:
        for climb in climbs:
            climb.failed(error, began)
        return
    for climb in climbs:
        one = found.get(climb.label)
        if one is None or one.container is None:
            others = RestoreFailed(f"{climb.label} was not restored: others of its group could not be")
            climb.failed((one.error if one is not None else None) or others, began)
            continue
        climb.container, climb.warnings = one.container, [*climb.warnings, *one.warnings]
        climb.at_s = time.monotonic()
        climb.took_s = climb.at_s - began


def running(item: Item, manifest: Manifest | None, there: Sequence[Container]) -> Container | None:
    """The workload, when it runs (again): a container by its id, a process tree by its name, number and processes.

    Args:
        there: all containers of its engine.
    """
    engine = registry.by_name(item.engine)
    if item.engine != "process":
        found = next((c for c in there if c.id == item.container_id and c.state != "exited"), None)
        now = engine.describe(found) if found is not None else None
        return now if now is not None and now.state in ("running", "paused") else None
    for container in engine.find(manifest.name) if manifest is not None else ():
        with suppress(RestoreFailed):
            proof.compare(manifest.processes if manifest else (), proof.tree(container.pid or 0), item.target)
            return container
    return None


def _alive(pid: int) -> bool:
    found = tree.stat(pid)
    return found is not None and found.alive
