"""The journal of a hibernation: a host's workloads saved together before it goes down, and brought back after it is up again.

Directory `hibernate/ID/` beside the jobs (this host's own, see place): `journal.jsonl`, one JSON object a line, on the disk before the step
that it announces; `lock`, flock of the living owner. Lines with `item` are about one workload, the others about the whole.
The first line has `state` "planned", `schema`, `kind`, `machine_id`, `boot_id`, `kernel` and `items`: what shall become of each.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from ckpt.errors import BusyError, CkptError
from ckpt.store import place
from ckpt.store.job import new_id

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


class Hibernation:
    """One hibernation's directory. Made by `create`, found by `newest` or `every`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock_fd: int | None = None

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
        for directory in (made.directory, above):
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            os.fsync(fd)
            os.close(fd)
        return made

    @classmethod
    def every(cls, root: Path) -> list[Hibernation]:
        """All of them, oldest first; those whose plan never reached the disk are left out."""
        try:
            found = sorted(path for path in place.hibernations(root).iterdir() if path.is_dir())
        except FileNotFoundError:
            return []
        return [one for path in found if (one := cls(path)).entries()]

    @classmethod
    def newest(cls, root: Path) -> Hibernation | None:
        """The one made last."""
        return (cls.every(root) or [None])[-1]  # type: ignore[list-item]

    @property
    def id(self) -> str:
        return self.directory.name

    def acquire(self) -> None:
        """Take the owner's lock. Raises BusyError when another ckpt has it."""
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise BusyError(f"another ckpt works on hibernation {self.id}", hint="ckpt hibernate status") from None
        self._lock_fd = fd

    def release(self) -> None:
        """Give the lock back (the kernel does it too when the owner dies)."""
        fd, self._lock_fd = self._lock_fd, None
        if fd is not None:
            os.close(fd)

    def write(self, state: str, *, item: str = "", **facts: Any) -> None:
        """Append a line and bring it to the disk; may be called from any thread.

        Raises:
            OSError: the disk; then the line is not there at all.
        """
        entry = {"t": time.time(), "state": state, **({"item": item} if item else {}), **facts}
        line = (json.dumps(entry, separators=(",", ":")) + "\n").encode()
        fd = os.open(self.directory / "journal.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            before = os.fstat(fd).st_size
            try:
                if os.write(fd, line) < len(line):
                    raise OSError(28, os.strerror(28), os.fspath(self.directory))
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, before)
                raise
        finally:
            os.close(fd)

    def entries(self) -> list[dict[str, Any]]:
        """All lines; what follows a torn one (power loss) is left out."""
        try:
            text = (self.directory / "journal.jsonl").read_text(errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return []
        found: list[dict[str, Any]] = []
        for line in text.split("\n"):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                break
            if not isinstance(entry, dict) or not isinstance(entry.get("state"), str):
                break
            found.append(entry)
        return found

    @property
    def plan(self) -> dict[str, Any]:
        """The first line: kind, machine_id, boot_id, kernel, items and what `create` was given besides."""
        return (self.entries() or [{}])[0]

    @property
    def items(self) -> tuple[Item, ...]:
        """What was planned, in its order. Raises CkptError when the journal makes no sense."""
        try:
            return tuple(
                Item(**{**row, "after": tuple(row.get("after", ())), "units": tuple(row.get("units", ())), "labels": dict(row.get("labels", {}))})
                for row in self.plan.get("items", [])
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise CkptError(f"the journal of hibernation {self.id} makes no sense: {error}", hint=f"look at {self.directory}") from error

    @property
    def state(self) -> str:
        """The newest state of the whole."""
        return next((str(entry["state"]) for entry in reversed(self.entries()) if "item" not in entry), "")

    def states(self) -> dict[str, ItemState]:
        """Where each planned workload stands, by target."""
        found = {item.target: ItemState() for item in self.items}
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
