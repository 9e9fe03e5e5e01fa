"""After a boot: bring back what was saved of this host before it went down, in order, each by its ladder.

Process trees come first (their pids must be free), then what others wait for. A second resume does nothing; one that was killed is gone
on with: the journal and the jobs tell how far it came, and what runs already is not started twice.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from ckpt.engines import registry
from ckpt.engines.base import NamesContainerImages
from ckpt.errors import BusyError, CkptError, IncompatibleHost
from ckpt.events import Emit, Notice, StepDone, StepStarted
from ckpt.host import systemd
from ckpt.model import Checkpoint, Container, ContainerImage
from ckpt.ops import arm, faults, parallel, recover, warm
from ckpt.ops import restore as restoring
from ckpt.ops.hibernate import canary, guards, old, sets
from ckpt.ops.hibernate.ladder import HOW, SETTLE_S, Climb, running, step_together
from ckpt.ops.hibernate.settings import HibernateSettings, Rung, load
from ckpt.store import place
from ckpt.store.catalog import Catalog
from ckpt.store.hibernation import ITEM_BACK, OPEN, OVER, RESUMING, Hibernation, Item, ItemState, identity
from ckpt.store.job import DEFAULT_ROOT, Job
from ckpt.store.retention import when_s

"""The tag of the checkpoints that a hibernation makes."""
GUARDS_LIMIT_S: Final = 120.0
"""How long guards of a killed resume may take to undo or finish what it had begun."""
_POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True)
class Back:
    """How one workload came back."""

    target: str
    how: str
    """A state of ITEM_BACK."""
    ref: str = ""
    container_id: str = ""
    pid: int | None = None
    rungs: tuple[dict[str, Any], ...] = ()
    """What was tried: rung, ok, error, took_s."""
    error: CkptError | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Resumed:
    """How a resume went."""

    hibernation: str = ""
    """Its id, "" when nothing was done."""
    reason: str = ""
    """Why nothing was done."""
    back: tuple[Back, ...] = ()
    canary: canary.Song | None = None
    took_s: float = 0.0


def resume(
    *,
    store_root: Path = DEFAULT_ROOT,
    settings: HibernateSettings | None = None,
    same_boot: bool = False,
    at_boot: bool = False,
    rungs: Sequence[Rung] | None = None,
    width: int | None = None,
    emit: Emit,
) -> Resumed:
    """Bring back what the newest hibernation of this host saved.

    Args:
        same_boot: also when the host has not been started anew since.
        at_boot: nobody asked for it but the boot: the settings may say that nothing comes back by itself (`on_boot`).
        rungs: instead of the ladder that the settings give to each.
        width: how many at a time, instead of the settings'.

    Raises:
        IncompatibleHost: there is only another host's; nothing was touched.
        BusyError: another ckpt is at it.
        ConfigError: the settings are wrong.
    """
    began = time.monotonic()
    settings = settings or load()
    if at_boot and settings.on_boot == "ignore":
        guards.resume_over()
        return Resumed(reason='on_boot is "ignore" in hibernate.toml')
    found = _which(store_root, settings, same_boot)
    if isinstance(found, str):
        systemd.notify(found)
        guards.resume_over()
        return Resumed(reason=found)
    warm.imports(*warm.OUT_OF_CHUNKS)
    guard = None
    try:
        _own(found)
        guard = recover.start_guard(found)
        if found.state in OVER:
            return Resumed(reason=f"hibernation {found.id} is over already")
        back, song = _Resume(found, store_root, settings, rungs, width or settings.parallel_boot, emit, at_boot=at_boot).run()
    finally:
        recover.dismiss(guard)
        found.release()
    return Resumed(found.id, "", back, song, time.monotonic() - began)


def _which(root: Path, settings: HibernateSettings, same_boot: bool) -> Hibernation | str:
    """The hibernation to go on with, or why there is none."""
    every = Hibernation.every(root)
    ours = [one for one in every if one.of_this_host]
    if every and not ours and every[-1].state not in OVER:
        other = str(every[-1].plan.get("machine_id") or "none")
        raise IncompatibleHost(
            f"hibernation {every[-1].id} is another host's (machine-id {other})",
            where="nothing was touched",
            hint="its checkpoints can be restored one by one: ckpt restore",
        )
    newest = ours[-1] if ours else None
    if newest is not None and newest.state not in OVER:
        if newest.of_this_boot and not same_boot:
            return f"this host has not been started anew since hibernation {newest.id}"
        return newest
    crash = _after_crash(root, settings, ours)
    if crash is not None:
        return crash
    return "nothing was saved" if newest is None else f"hibernation {newest.id} is over: everything is back already"


def _own(hibernation: Hibernation) -> None:
    """Become its owner; the guard of a dead one may have it for a while. Raises BusyError."""
    end = time.monotonic() + GUARDS_LIMIT_S
    while True:
        try:
            hibernation.acquire()
            return
        except BusyError:
            if time.monotonic() > end:
                raise
            time.sleep(_POLL_S)


def _after_crash(root: Path, settings: HibernateSettings, ours: Sequence[Hibernation]) -> Hibernation | None:
    """A new hibernation of what was armed (`ckpt arm`) when this host went down without one; None when there is nothing to do.

    Once in a boot only: what was stopped by hand since is not brought back by the next resume.
    """
    now = identity()["boot_id"]
    armed = arm.load(root)
    if settings.on_crash != "armed" or not armed or any(_seen(one, now) for one in ours):
        return None
    known = Catalog(root).all()
    items, boots = [], []
    for target, one in armed.items():
        item = Item(target, one.engine, one.container_id, one.name, "save")
        last = last_good(known, item)
        if last is not None and last.manifest.host.boot_id not in ("", now):
            items.append(item)
            boots.append((when_s(last), last.manifest.host.boot_id))
    if not items:
        return None
    made = Hibernation.create(root, "crash", items, boot_id=max(boots)[1])
    made.release()
    return made


def _seen(hibernation: Hibernation, boot_id: str) -> bool:
    return any(entry.get("resumed_in") == boot_id for entry in hibernation.entries() if "item" not in entry)


def last_good(known: Sequence[Checkpoint], item: Item) -> Checkpoint | None:
    """The newest checkpoint of this very workload that was made for such a time."""
    mine = [c for c in known if _is_of(c, item) and not c.entry.foreign and {arm.TAG, old.TAG} & set(c.entry.tags)]
    return max(mine, key=when_s, default=None)


def _is_of(checkpoint: Checkpoint, item: Item) -> bool:
    return checkpoint.manifest.engine == item.engine and checkpoint.manifest.container_id == item.container_id


class _Resume:
    """One resume on its way."""

    def __init__(
        self,
        hibernation: Hibernation,
        root: Path,
        settings: HibernateSettings,
        rungs: Sequence[Rung] | None,
        width: int,
        emit: Emit,
        *,
        at_boot: bool = False,
    ) -> None:
        self.hibernation = hibernation
        self.root = root
        self.settings = settings
        self.rungs = rungs
        self.width = width
        self.emit = emit
        self.catalog = Catalog(root)
        self.known: list[Checkpoint] = []
        self.song: canary.Song | None = None
        self.there: dict[str, Sequence[Container]] = {}
        self.images: dict[ContainerImage, bool] = {}
        self.at_boot = at_boot
        self.pods: dict[str, str] = {}
        """Those that were made anew since."""

    def run(self) -> tuple[tuple[Back, ...], canary.Song | None]:
        """Bring everything back; returns it in the order of the plan."""
        hibernation, here = self.hibernation, identity()
        items = hibernation.items
        self.cut = hibernation.state in OPEN or any(entry.get("cut") for entry in hibernation.entries())
        hibernation.write(RESUMING, resumed_in=here["boot_id"], kernel=here["kernel"], cut=self.cut)
        faults.point("hibernate-resuming")
        self._settle({item.container_id for item in items})
        states = hibernation.states()
        todo = [item for item in items if states[item.target].state not in ITEM_BACK]
        self.known = self.catalog.all() if todo else []
        skip = self._canary(here["kernel"]) if any(item.action == "save" for item in todo) else ""
        usable = {item.engine for item in todo if item.action != "ignore"}
        self.there = {name: _containers(name) for name in sorted(usable)}
        climbs = {item.target: self._begin(item, states[item.target], skip) for item in todo}
        shared = sets.shared_volumes(climb.checkpoint for climb in climbs.values() if climb.checkpoint is not None)
        for climb in climbs.values():
            climb.shared_volumes = shared
        systemd.notify(f"bringing back {len(climbs)} workloads")
        order = layers(todo)
        # What begins anew takes the first free address, as a pod's infra container does: those that need their old one come before.
        for cold in (False, True):
            for layer in order:
                left = [climbs[item.target] for item in layer if not climbs[item.target].over]
                late = {climb.item.group or climb.label for climb in left if climb.checkpoint is not None and sets.pod_of(climb.checkpoint)}
                self._bring([climb for climb in left if (climb.item.group or climb.label) not in late], cold=cold)
                self._bring([climb for climb in left if (climb.item.group or climb.label) in late], cold=cold)
        systemd.notify(f"{sum(climb.how not in ('failed',) for climb in climbs.values())} of {len(climbs)} workloads are back")
        faults.point("hibernate-back")
        back = tuple(self._told(item, climbs.get(item.target), states[item.target]) for item in items)
        hibernation.write(
            "resumed", resumed_in=here["boot_id"], how={how: sum(one.how == how for one in back) for how in sorted({one.how for one in back})}
        )
        guards.resume_over()
        healthy = {one.target for one in back if one.how in ("restored", "restored-closed")}
        came = [climb.checkpoint for target, climb in climbs.items() if target in healthy and climb.checkpoint is not None]
        old.forget(self.catalog, self.settings, came, self.emit)
        return back, self.song

    def _settle(self, ids: set[str]) -> None:
        """Wait until what a killed resume had begun is undone or finished by its guards; raises BusyError when that takes too long."""
        end = time.monotonic() + GUARDS_LIMIT_S
        while True:
            for line in recover.sweep(self.root):
                self.emit(Notice("", line, warning=True))
            jobs = place.jobs(self.root)
            every = [Job(path).facts for path in (sorted(jobs.iterdir()) if jobs.is_dir() else [])]
            left = [facts for facts in every if facts.get("container_id") in ids and facts.get("state") not in (*recover.FINAL, "serving")]
            if not left:
                return
            if time.monotonic() > end:
                raise BusyError(f"another ckpt works on {left[0].get('name')}", where="nothing was touched", hint="ckpt jobs")
            time.sleep(_POLL_S)

    def _canary(self, kernel: str) -> str:
        """Why nothing is to be restored, "" when all is well."""
        if not self.settings.canary or kernel == self.hibernation.plan.get("kernel"):
            return ""
        self.emit(StepStarted("", "canary", kernel))
        self.song = canary.sing()
        self.hibernation.write(RESUMING, canary={"ok": self.song.ok, "error": self.song.error, "took_s": round(self.song.took_s, 6)})
        if self.song.ok:
            self.emit(StepDone("", "canary", f"CRIU works on {kernel}", self.song.took_s))
            return ""
        why = f"CRIU does not work on kernel {kernel}: {self.song.error}"
        self.emit(Notice("", why, warning=True))
        return why

    def _begin(self, item: Item, state: ItemState, skip: str) -> Climb:
        """What is to be tried for a workload; one that runs already, or is not ours to bring back, is over at once."""
        checkpoint, note = self._checkpoint(item, state)
        ladder = list(self.rungs or self.settings.ladder_of(item.target, item.name))
        climb = Climb(item, checkpoint, ladder, self.hibernation, self.settings, self.catalog, self.emit, note=note, pods=self.pods)
        climb.tried += [row for row in state.facts.get("rungs") or [] if isinstance(row, dict)]
        if item.action == "ignore" or (self.cut and checkpoint is None and self.settings.on_crash == "ignore"):
            climb.end("left")
            return climb
        rung = str(state.facts.get("rung") or "") if state.state == RESUMING else ""
        try:
            there = running(item, checkpoint.manifest if checkpoint is not None else None, self.there[item.engine])
        except CkptError as error:
            climb.error = error
            climb.end("failed")
            return climb
        if there is not None and (item.engine != "process" or rung.startswith("restore")):
            climb.container = there
            climb.note = "" if rung else climb.note or "something else had started it already"
            climb.end(HOW.get(rung, "cold"))
            return climb
        if item.action == "stop" or checkpoint is None:
            # One that was stopped, as its label says, begins anew as after every boot.
            climb.rungs = [one for one in ladder if not one.startswith("restore")]
        elif rung in ladder:
            climb.rungs = ladder[ladder.index(rung) :]
        if skip and climb.rungs != (kept := [one for one in climb.rungs if not one.startswith("restore")]):
            said = {"code": "feature-missing", "message": skip}
            climb.tried += [{"rung": one, "ok": False, "error": said, "took_s": 0.0} for one in climb.rungs if one not in kept]
            climb.rungs, climb.note = kept, skip
        if climb.rungs[:1] == ["restore"] and checkpoint is not None:
            climb.looked = self._looked(item, checkpoint)
        return climb

    def _looked(self, item: Item, checkpoint: Checkpoint) -> restoring.Looked | None:
        """What its restore need not ask podman for, which answers slowly and only after the restores that are under way; None: it must."""
        manifest, engine = checkpoint.manifest, registry.by_name(item.engine)
        there = self.there[item.engine]
        image = manifest.container_image
        taken = any(c.name == manifest.name and c.id != manifest.container_id for c in there)
        if taken or image is None or not isinstance(engine, NamesContainerImages):
            return None
        if image not in self.images:
            self.images[image] = engine.has_named(image)
        return restoring.Looked(next((c for c in there if c.id == manifest.container_id), None)) if self.images[image] else None

    def _checkpoint(self, item: Item, state: ItemState) -> tuple[Checkpoint | None, str]:
        """What a workload comes back from, and why that is not what was planned."""
        if item.action != "save":
            return None, ""
        wanted = str(state.facts.get("checkpoint_id") or "")
        found = next((c for c in self.known if c.manifest.id == wanted), None)
        if found is not None:
            return found, str(state.facts.get("note") or "")
        if wanted:
            return None, f"its checkpoint {wanted[:12]} is not in the store any more"
        plan = self.hibernation.plan
        begun = [c for c in self.known if _is_of(c, item) and not c.manifest.left_running and c.manifest.created_s >= float(plan.get("t") or 0.0)]
        if begun and plan.get("kind") != "crash":
            return max(begun, key=when_s), ""  # saved and ended; only the journal did not come to say so
        if self.cut and self.settings.on_crash == "armed" and (last := last_good(self.known, item)) is not None:
            return last, f"this host went down before it was saved; {last.ref} is its last armed checkpoint"
        return None, "this host went down before it was saved" if self.cut else "it was not saved"

    def _bring(self, climbs: list[Climb], *, cold: bool) -> None:
        """Let a layer climb, side by side: all try a rung, then those that hold are looked at, the others try their next one.

        Without `cold` each stops before it would begin anew.
        Members of a set that are all here try their first restore together.
        """
        alive = [climb for climb in climbs if not climb.over and climb.rungs[:1] != ["leave"] and (cold or climb.rungs[:1] != ["cold"])]
        # At a boot the units of the containers wait for the resume; else that of their pod would start them.
        units = [unit for climb in alive for unit in climb.item.units if not self.at_boot]
        self.pods |= sets.start_pods([climb.checkpoint for climb in alive if climb.checkpoint is not None], self.emit, hold=units)
        while left := [climb for climb in climbs if not climb.over and (cold or climb.rungs[:1] != ["cold"])]:
            began = time.monotonic()
            for climb in left:
                self.emit(StepStarted(climb.label, "resume", climb.rungs[0] if climb.rungs else ""))
            first = {climb.label: climb.checkpoint for climb in left if climb.checkpoint is not None and climb.rungs[:1] == ["restore"]}
            together = {ref: [climb for climb in left if climb.label in mine] for ref, mine in sets.whole(self.root, first).items()}
            of = {climb.label: ref for ref, mine in together.items() for climb in mine}
            works = {climb.label: climb.step for climb in left if climb.label not in of}
            works |= {ref: partial(step_together, mine, ref.partition("@")[0]) for ref, mine in together.items()}
            done = parallel.run_all(works, width=self.width, on_done=lambda label, _: self._extend(label))
            for climb in left:
                if isinstance(error := done[of.get(climb.label, climb.label)], BaseException):
                    climb.failed(error, began)
            held = [climb for climb in left if climb.at_s and not climb.over]
            for climb in held:
                time.sleep(max(0.0, climb.at_s + SETTLE_S - time.monotonic()))
            parallel.run_all({climb.label: climb.check for climb in held}, width=self.width)
            for climb in left:
                if climb.over and climb.how != "failed":
                    self.emit(StepDone(climb.label, "resume", climb.how, time.monotonic() - began))

    def _extend(self, label: str) -> None:
        systemd.notify(f"brought back {label}", extend_s=self.settings.restore_timeout_s + self.settings.cold_timeout_s)

    def _told(self, item: Item, climb: Climb | None, state: ItemState) -> Back:
        if climb is None:  # by an earlier resume, which was killed
            error = state.facts.get("error")
            said = CkptError(str(error.get("message", ""))) if isinstance(error, dict) else None
            return Back(item.target, state.state, rungs=tuple(state.facts.get("rungs") or ()), error=said)
        container = climb.container
        ref = climb.checkpoint.ref if climb.checkpoint is not None else ""
        identity, pid = (container.id, container.pid) if container is not None else ("", None)
        return Back(item.target, climb.how, ref, identity, pid, tuple(climb.tried), climb.error, tuple(climb.warnings))


def _containers(engine: str) -> Sequence[Container]:
    """All of an engine's; none when it cannot be asked, which each of them will meet again, and say."""
    try:
        registry.by_name(engine).probe()  # remembers what does not change, before many ask for it at once
        return registry.by_name(engine).containers()
    except CkptError:
        return ()


def layers(items: Sequence[Item]) -> list[list[Item]]:
    """Process trees, then the others by what they come after; those of a circle, which `save` refuses, all together at the end."""
    trees = [item for item in items if "pid" in registry.by_name(item.engine).prefixes]
    made = _by_after(trees)
    return [*made, *_by_after([item for item in items if item not in trees])]


def _by_after(items: Sequence[Item]) -> list[list[Item]]:
    made: list[list[Item]] = []
    left = list(items)
    while left:
        waiting = {item.target for item in left} | {item.name for item in left}
        alone = [item for item in left if _free([item], waiting)]
        # A group comes back as one, unless somebody else is to come between its members.
        free = [item for item in left if _free(_mates(item, left), waiting)] or alone or left
        made.append(free)
        left = [item for item in left if item not in free]
    return made


def _mates(item: Item, left: Sequence[Item]) -> list[Item]:
    return [one for one in left if one.group == item.group and one.action == "save"] if item.group and item.action == "save" else [item]


def _free(together: Sequence[Item], waiting: set[str]) -> bool:
    """Whether none of these waits for one of the others."""
    return not {name for one in together for name in one.after} & (waiting - {name for one in together for name in (one.target, one.name)})
