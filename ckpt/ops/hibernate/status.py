"""What a hibernation's journal says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckpt.errors import TargetNotFound
from ckpt.ops.hibernate.selection import TREE
from ckpt.store.hibernation import ITEM_BACK, OPEN, Hibernation
from ckpt.store.job import DEFAULT_ROOT


@dataclass(frozen=True, slots=True)
class Line:
    """One workload of it."""

    target: str
    tree: str
    action: str
    state: str
    facts: dict[str, Any]
    after: tuple[str, ...]
    units: tuple[str, ...]
    group: str
    at_s: float
    """When it came to this state."""


@dataclass(frozen=True, slots=True)
class Status:
    """A hibernation as it stands."""

    id: str
    state: str
    """As in the journal; "interrupted" for a save or resume that was killed."""
    kind: str
    begun_s: float
    ended_s: float
    """Of its newest line."""
    of_this_boot: bool
    of_this_host: bool
    lines: tuple[Line, ...]

    @property
    def exit_code(self) -> int:
        """0: as it should be; 21 something did not come back, 23 something was started cold, 20 it is saved in part, or was given up."""
        how = {line.state for line in self.lines}
        if self.state == "resumed":
            return 21 if "failed" in how else 23 if any(line.state == "cold" and line.action == "save" for line in self.lines) else 0
        if self.state in ("abandoned", "interrupted") or how & {"save-failed", "dropped"}:
            return 20
        return 0


def status(ref: str | None = None, *, store_root: Path = DEFAULT_ROOT) -> Status | None:
    """The newest hibernation, or the one whose id begins with `ref` (or has that after its hyphen); None when there never was one.

    Raises:
        TargetNotFound: there is none of that id, or several.
    """
    every = Hibernation.every(store_root)
    if ref is None:
        return _status(every[-1]) if every else None
    found = [one for one in every if ref and (one.id.startswith(ref) or one.id.partition("-")[2].startswith(ref))]
    if len(found) != 1:
        known = ", ".join(one.id for one in every[-5:]) or "none"
        raise TargetNotFound(f"{'no' if not found else 'more than one'} hibernation is called {ref!r}", hint=f"the newest are: {known}")
    return _status(found[0])


def _status(hibernation: Hibernation) -> Status:
    entries, states = hibernation.entries(), hibernation.states()
    state = hibernation.state
    if (state in OPEN or state == "resuming") and not hibernation.owned:
        state = "interrupted"
    times = {str(entry["item"]): float(entry.get("t") or 0.0) for entry in entries if "item" in entry}
    begun_s = float(entries[0].get("t") or 0.0) if entries else 0.0
    lines = []
    for item in hibernation.items:
        now = states[item.target]
        shown = "ignored" if item.action == "ignore" and now.state not in ITEM_BACK else now.state
        lines.append(
            Line(
                item.target, item.labels.get(TREE, ""), item.action, shown, now.facts, item.after, item.units, item.group,
                times.get(item.target, begun_s),
            )
        )  # fmt: skip
    ended_s = float(entries[-1].get("t") or 0.0) if entries else 0.0
    return Status(hibernation.id, state, hibernation.kind, begun_s, ended_s, hibernation.of_this_boot, hibernation.of_this_host, tuple(lines))
