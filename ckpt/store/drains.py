"""The journal of a drain: a host's workloads moved away to other hosts, and brought back when it is in service again.

Directory `drains/ID/` beside the jobs (this host's own, see place), as journal.Journal has it. A line with `state` "planned" has `request`
(what was asked for) and `items` (what shall go where); a drain that is taken up again plans anew, in the same journal, what is still here.
Other lines tell of one workload (`item`), or of several that move as one (`members`): one line, so that all of them are begun, or none.
`drained.json` beside `drains/` says that the host is drained, for `ckpt list` and `ckpt check`.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Final

from ckpt.store import durable, place
from ckpt.store.job import new_id
from ckpt.store.journal import Journal

SCHEMA: Final = 1
OPEN: Final = ("planned", "draining", "interrupted")
DRAINED: Final = "drained"
UNDRAINING: Final = "undraining"
UNDRAINED: Final = "undrained"

AWAY: Final = ("moved", "returning")
"""States of an item that is on another host, as far as this one knows."""
UNSURE: Final = ("moving", "waiting", "saving")
"""States whose truth has to be looked up when their owner is gone."""
KEPT: Final = 20
"""So many journals of drains of which all is back are kept."""
_MARK_CAP: Final = 64 << 10
_OF_THE_LINE: Final = ("t", "state", "item", "members")


@dataclass(frozen=True, slots=True)
class DrainItem:
    """One workload of a drain, as it was planned."""

    target: str
    """In full, `podman:web`; how everything else refers to it."""
    engine: str
    container_id: str
    name: str
    destination: str = ""
    """Where it was to go; "" for one that stays."""
    memory_bytes: int = 0
    group: str = ""
    """Goes to one host with the others of that group."""
    as_one: str = ""
    """Moves together with those of `group` that have the same name here, by `ckpt migrate --group`."""


@dataclass(frozen=True, slots=True)
class DrainState:
    """Where a workload stands: its newest line, the facts of all lines merged."""

    state: str = "planned"
    """planned, moving, waiting (for `--continue`), saving, then one of moved, failed, skipped, saved, gone, dropped (never begun); after
    that returning, returned, changed (it is not on its destination as it came there)."""
    facts: dict[str, Any] = field(default_factory=dict)
    """destination, began_s, child ([pid, start]), job, container_id (there), total_s, downtime_s, sent_bytes, error (CkptError.to_json),
    reason."""


class Drain(Journal):
    """One drain's directory. Made by `create`, found by `newest` or `every`."""

    what: ClassVar[str] = "drain"
    look: ClassVar[str] = "wait for it, or stop it with Ctrl-C there"

    @classmethod
    def create(cls, root: Path) -> Drain:
        """Make it for the store at `root` and take its lock. Raises OSError."""
        above = place.drains(root)
        above.mkdir(mode=0o700, parents=True, exist_ok=True)
        over = [drain for drain in cls.every(root) if drain.state == UNDRAINED]
        for drain in over[:-KEPT]:
            shutil.rmtree(drain.directory, ignore_errors=True)
        made = cls(above / new_id())
        made.directory.mkdir(mode=0o700)
        made.acquire()
        return made

    def write_plan(self, request: dict[str, Any], items: Sequence[DrainItem]) -> None:
        """What was asked for, and what shall become of each. Raises OSError."""
        self.write("planned", schema=SCHEMA, request=request, items=[asdict(item) for item in items])
        self.sync_directory()

    @classmethod
    def every(cls, root: Path) -> list[Drain]:
        """All of them, oldest first; those whose plan never reached the disk are left out."""
        try:
            found = sorted(path for path in place.drains(root).iterdir() if path.is_dir())
        except FileNotFoundError:
            return []
        return [one for path in found if (one := cls(path)).entries()]

    @classmethod
    def newest(cls, root: Path) -> Drain | None:
        """The one made last."""
        found = cls.every(root)
        return found[-1] if found else None

    @property
    def request(self) -> dict[str, Any]:
        """What was asked for last."""
        for entry in reversed(self.entries()):
            if isinstance(asked := entry.get("request"), dict):
                return asked
        return {}

    @property
    def items(self) -> tuple[DrainItem, ...]:
        """All that was ever planned, the newest plan for each; what makes no sense is left out."""
        known = {f.name for f in fields(DrainItem)}
        found: dict[str, DrainItem] = {}
        for entry in self.entries():
            rows = entry.get("items") if entry["state"] == "planned" else ()
            for row in rows if isinstance(rows, list) else ():
                with suppress(TypeError, AttributeError):
                    item = DrainItem(**{key: value for key, value in row.items() if key in known})
                    found[item.target] = item
        return tuple(found.values())

    def tell(self, state: str, targets: Sequence[str], **facts: Any) -> None:
        """One line about one workload, or about several that move as one. Raises OSError."""
        about: dict[str, Any] = {"item": targets[0]} if len(targets) == 1 else {"members": list(targets)}
        self.write(state, **about, **facts)

    def states(self) -> dict[str, DrainState]:
        """Where each workload stands, by target."""
        found = {item.target: DrainState() for item in self.items}
        for entry in self.entries():
            told = entry["members"] if isinstance(entry.get("members"), list) else [entry.get("item")]
            for target in told:
                if isinstance(target, str) and target in found:
                    facts = {**found[target].facts, **{key: value for key, value in entry.items() if key not in _OF_THE_LINE}}
                    found[target] = DrainState(str(entry["state"]), facts)
        return found

    @property
    def open(self) -> bool:
        """Whether it was begun and not brought to its end."""
        return self.state in OPEN


def mark(root: Path) -> None:
    """Say that this host is drained, and how much of it; or no more, when nothing is away. Raises OSError."""
    away = sum(state.state in AWAY for drain in Drain.every(root) if drain.state != UNDRAINED for state in drain.states().values())
    path = place.own(root) / "drained.json"
    newest = Drain.newest(root)
    if newest is None or (not away and newest.state != DRAINED):
        path.unlink(missing_ok=True)
        return
    durable.write_file(path, json.dumps({"schema": SCHEMA, "t": time.time(), "id": newest.id, "away": away}).encode() + b"\n")


def marked(root: Path) -> dict[str, Any] | None:
    """What `mark` wrote: `t`, `id`, `away` (how many workloads); None for a host in service."""
    try:
        with open(place.own(root) / "drained.json", "rb") as file:
            note = json.loads(file.read(_MARK_CAP))
    except (OSError, ValueError, RecursionError):
        return None
    return note if isinstance(note, dict) and isinstance(note.get("t"), int | float) and isinstance(note.get("away"), int) else None
