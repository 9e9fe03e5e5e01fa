"""The journal of a hibernation: a host's workloads saved together before it goes down, and brought back after it is up again.

Directory `hibernate/ID/` beside the jobs (this host's own, see place): `journal.jsonl`, one JSON object a line, on the disk before the step
that it announces; `lock`, flock of the living owner. Lines with `item` are about one workload, the others about the whole.
The first line has `state` "planned", `schema`, `kind`, `machine_id`, `boot_id`, `kernel` and `items`: what shall become of each; `carried`
(target -> its facts) are those of `items` that an earlier hibernation has saved. Lines with `more` bring further items.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

from ckpt.errors import CkptError
from ckpt.store import place
from ckpt.store.job import new_id
from ckpt.store.journal import Journal

SCHEMA: Final = 1
Action = Literal["save", "stop", "ignore"]
Kind = Literal["reboot", "kexec", "poweroff", "shutdown", "manual", "crash"]
"""What it was made for: the verbs of `ckpt reboot`, the unit at shutdown, `ckpt hibernate save`; "crash": made at boot, nothing was saved."""

OPEN: Final = ("planned", "saving")
SAVED: Final = "saved"
"""Everything that could be saved is, nothing more comes; the host may go down."""
RESUMING: Final = "resuming"
OVER: Final = ("resumed", "abandoned")

ITEM_SAVED: Final = ("saved", "stopped")
ITEM_BACK: Final = ("restored", "restored-closed", "cold", "left", "failed")
"""How a workload came back: with all; with its TCP connections closed; started cold by its engine; nothing to do; not at all."""


@dataclass(frozen=True, slots=True)
class Item:
    """One workload of a hibernation, as it was planned."""

    target: str
    """In full, `podman:web`; how everything else refers to it."""
    engine: str
    container_id: str
    name: str
    action: Action
    after: tuple[str, ...] = ()
    """Targets that come back before it."""
    units: tuple[str, ...] = ()
    """systemd units that would start it cold."""
    group: str = ""
    """Saved and brought back together with the others of that group."""
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ItemState:
    """Where a workload stands: its newest line, the facts of all lines merged."""

    state: str = "planned"
    """planned, saving, saved, stopped, save-failed, dropped (never begun); resuming, then one of ITEM_BACK."""
    facts: dict[str, Any] = field(default_factory=dict)
    """checkpoint_id, ref, freeze_s, total_s, error (CkptError.to_json), rungs (what was tried in resuming: [{rung, ok, error, took_s}])."""


class Hibernation(Journal):
    """One hibernation's directory. Made by `create`, found by `newest` or `every`."""

    what: ClassVar[str] = "hibernation"
    look: ClassVar[str] = "ckpt hibernate status"

    @classmethod
    def create(cls, root: Path, kind: Kind, items: Sequence[Item], **facts: Any) -> Hibernation:
        """Make it for the store at `root`, take its lock, write the plan.

        Raises:
            OSError: the disk.
        """
        above = place.hibernations(root)
        above.mkdir(mode=0o700, parents=True, exist_ok=True)
        made = cls(above / new_id())
        made.directory.mkdir(mode=0o700)
        made.acquire()
        made.write("planned", schema=SCHEMA, kind=kind, **{**identity(), **facts}, items=[asdict(item) for item in items])
        made.sync_directory()
        return made

    @classmethod
    def every(cls, root: Path) -> list[Hibernation]:
        """All of them, oldest first; those whose plan never reached the disk are left out."""
        try:
            found = [cls(path) for path in place.hibernations(root).iterdir() if path.is_dir()]
        except FileNotFoundError:
            return []
        return sorted((one for one in found if one.entries()), key=lambda one: (float(one.plan.get("t", 0.0)), one.id))

    @classmethod
    def newest(cls, root: Path) -> Hibernation | None:
        """The one made last."""
        return (cls.every(root) or [None])[-1]  # type: ignore[list-item]

    @property
    def kind(self) -> str:
        """What it was made, or gone on with, for."""
        return next((str(entry["kind"]) for entry in reversed(self.entries()) if "kind" in entry and "item" not in entry), "")

    def extend(self, items: Sequence[Item], kind: Kind) -> None:
        """Plan more, or some of them anew: from now on it is being saved (again).

        Raises:
            OSError: the disk.
        """
        self.write("saving", kind=kind, more=[asdict(item) for item in items])

    @property
    def items(self) -> tuple[Item, ...]:
        """What was planned, in its order. Raises CkptError when the journal makes no sense."""
        try:
            entries = self.entries()
            rows = [*(entries or [{}])[0].get("items", []), *(row for entry in entries for row in entry.get("more", []))]
            found = [
                Item(**{**row, "after": tuple(row.get("after", ())), "units": tuple(row.get("units", ())), "labels": dict(row.get("labels", {}))})
                for row in rows
            ]
            return tuple({item.target: item for item in found}.values())
        except (TypeError, ValueError, AttributeError) as error:
            raise CkptError(f"the journal of hibernation {self.id} makes no sense: {error}", hint=f"look at {self.directory}") from error

    def states(self) -> dict[str, ItemState]:
        """Where each planned workload stands, by target."""
        carried = dict(self.plan.get("carried", {}))
        found = {item.target: ItemState(SAVED, dict(carried[item.target])) if item.target in carried else ItemState() for item in self.items}
        for entry in self.entries():
            target = entry.get("item")
            if target in found:
                facts = {**found[target].facts, **{key: value for key, value in entry.items() if key not in ("t", "state", "item")}}
                found[target] = ItemState(str(entry["state"]), facts)
        return found

    @property
    def of_this_boot(self) -> bool:
        """Whether the host has not been started anew since."""
        return bool(self.plan.get("boot_id") == identity()["boot_id"])

    @property
    def of_this_host(self) -> bool:
        """Whether it was this host that was saved (machine-id(5))."""
        return bool(self.plan.get("machine_id") == identity()["machine_id"])


def identity() -> dict[str, str]:
    """Which host and which boot this is: machine_id (machine-id(5), "" without one), boot_id and kernel."""

    def text(path: str) -> str:
        try:
            return Path(path).read_text().strip()
        except OSError:
            return ""

    return {"machine_id": text("/etc/machine-id"), "boot_id": text("/proc/sys/kernel/random/boot_id"), "kernel": os.uname().release}
