"""What the newest hibernation left: workloads that are saved and have not come back, or a save that was killed in the middle."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ckpt.engines import registry
from ckpt.errors import BusyError, CkptError
from ckpt.events import Emit, Notice
from ckpt.model import Checkpoint, Target
from ckpt.ops import faults, recover
from ckpt.ops.hibernate.plan import Plan, Wish
from ckpt.store import place
from ckpt.store.catalog import Catalog
from ckpt.store.hibernation import ITEM_SAVED, OPEN, OVER, SAVED, Hibernation, Item, ItemState
from ckpt.store.job import Job

GUARDS_LIMIT_S: Final = 90.0
"""How long the guard of a killed save may take to let go on what was being dumped."""
_POLL_S: Final = 0.05
_GOING: Final = ("reboot", "kexec", "poweroff")


@dataclass(slots=True)
class Earlier:
    """What the newest hibernation left: saved workloads that have not come back, or a save that was killed."""

    root: Path
    hibernation: Hibernation | None = None
    saved: dict[str, ItemState] = field(default_factory=dict)
    """Those that are saved (or stopped) and do not run, by target."""
    running: set[str] = field(default_factory=set)
    """Ids of those that are saved, and run all the same."""

    @classmethod
    def find(cls, root: Path, catalog: Catalog, emit: Emit) -> Earlier:
        """Look at the newest one; what was killed in the middle is settled first. Its lock is taken.

        Raises:
            BusyError: a resume is at it.
        """
        newest = Hibernation.newest(root)
        if newest is None or newest.state in OVER:
            return cls(root)
        if not newest.of_this_host:
            emit(Notice("", f"hibernation {newest.id} is another host's, it is left alone", warning=True))
            return cls(root)
        _acquire(newest)
        found = cls(root, newest)
        try:
            found._settle(catalog, emit)
        except BaseException:
            newest.release()
            raise
        return found

    def _settle(self, catalog: Catalog, emit: Emit) -> None:
        assert self.hibernation is not None
        hibernation = self.hibernation
        items = hibernation.items
        _wait_for_jobs(self.root, {item.container_id for item in items}, emit)
        states, known = hibernation.states(), {c.manifest.id: c for c in catalog.all()}
        for item in items:
            state = states[item.target]
            there = _running(item)
            if state.state == "saving" and not there:
                # Killed between the end of the container and the line that says so.
                begun_s = float(hibernation.plan.get("t") or 0.0)
                mine = [c for c in known.values() if c.manifest.container_id == item.container_id and c.manifest.engine == item.engine]
                made = [c for c in mine if c.manifest.created_s >= begun_s and not c.manifest.left_running]
                if made:
                    state = written(hibernation, item.target, max(made, key=lambda c: c.manifest.created_s))
            lost = item.action == "save" and state.facts.get("checkpoint_id") not in known
            if state.state not in (*ITEM_SAVED, "resuming") or lost:
                continue
            if there:
                self.running.add(item.container_id)
            else:
                self.saved[item.target] = state

    def kept(self, wish: Wish) -> set[str]:
        """Ids of containers that are left as they are.

        Those that are saved; and at the shutdown that follows `ckpt reboot` also one that was started cold since (by its unit, for it had
        ended): what was saved of it is what comes back.
        """
        earlier = self.hibernation
        if earlier is None:
            return set()
        saved = {item.container_id for item in earlier.items if item.target in self.saved}
        going = wish.at_shutdown and earlier.of_this_boot and earlier.kind in _GOING
        return saved | self.running if going else saved

    def has(self, target: Target) -> bool:
        """Whether what is named so is saved, and does not run."""
        named = str(target)
        return self.hibernation is not None and any(named in (i.target, i.name) for i in self.hibernation.items if i.target in self.saved)

    def go_on(self, wish: Wish, made: Plan) -> Hibernation | None:
        """The hibernation to work on, locked: the earlier one of this boot, else a new one that takes over what has not come back.

        None when there is nothing to be done.
        """
        items = made.items()
        earlier = self.hibernation
        mine = earlier is not None and earlier.of_this_boot and earlier.state in (*OPEN, SAVED)
        if not any(item.action != "ignore" for item in items):
            if not mine or earlier is None:
                return None
            if earlier.state == SAVED:
                if wish.kind in _GOING and earlier.kind != wish.kind:
                    earlier.write(SAVED, kind=wish.kind)
                return None
            items = ()  # what was killed is to be brought to its end
        if mine and earlier is not None:
            self.hibernation = None
            earlier.extend(items, wish.kind)
            return earlier
        carried = {target: state.facts for target, state in self.saved.items()}
        old = [item for item in earlier.items if item.target in carried] if earlier is not None else []
        fresh = {item.target for item in items}
        created = Hibernation.create(
            self.root,
            wish.kind,
            [*(item for item in old if item.target not in fresh), *items],
            carried={target: facts for target, facts in carried.items() if target not in fresh},
        )
        try:
            faults.point("hibernate-planned")
            if earlier is not None:
                earlier.write("abandoned", taken_over_by=created.id)
        except BaseException:
            created.release()  # it has all that the earlier one has
            raise
        return created

    def finished(self) -> str:
        """The id of what is saved already, when nothing new is to be done."""
        return self.hibernation.id if self.hibernation is not None and self.saved else ""

    def release(self) -> None:
        if self.hibernation is not None:
            self.hibernation.release()


def _acquire(hibernation: Hibernation) -> None:
    """Take its lock; the guard of a killed save has it for a moment."""
    end = time.monotonic() + GUARDS_LIMIT_S
    while True:
        try:
            return hibernation.acquire()
        except BusyError:
            if hibernation.state not in OPEN or time.monotonic() > end:
                raise
        time.sleep(_POLL_S)


def _wait_for_jobs(root: Path, ids: set[str], emit: Emit) -> None:
    """Until the jobs of these containers, which a killed ckpt left, are settled. Raises BusyError when that takes too long."""
    end = time.monotonic() + GUARDS_LIMIT_S
    while True:
        jobs = place.jobs(root)
        facts = [Job(path).facts for path in (sorted(jobs.iterdir()) if jobs.is_dir() else [])]
        left = [one for one in facts if one.get("kind") == "checkpoint" and one.get("container_id") in ids and one.get("state") not in recover.FINAL]
        if not left:
            return
        if time.monotonic() > end:
            raise BusyError(f"another ckpt works on {left[0].get('name')}", where="nothing was touched", hint="ckpt jobs")
        time.sleep(_POLL_S)
        for line in recover.sweep(root):
            emit(Notice("", line, warning=True))


def _running(item: Item) -> bool:
    """By name: the id of a process tree is none that can be looked for."""
    try:
        return any(c.id == item.container_id and c.state in ("running", "paused") for c in registry.by_name(item.engine).find(item.name))
    except CkptError:
        return False


def written(hibernation: Hibernation, target: str, checkpoint: Checkpoint, **figures: Any) -> ItemState:
    facts = {"checkpoint_id": checkpoint.manifest.id, "ref": checkpoint.ref, "freeze_s": checkpoint.manifest.freeze_s, "error": None, **figures}
    hibernation.write("saved", item=target, **facts)
    return ItemState("saved", facts)
