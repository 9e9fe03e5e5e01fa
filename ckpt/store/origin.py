"""Where an entry of the store comes from. It lies beside the members, not among them: no archive can bring it along, none takes it away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from ckpt.store import durable

NAME: Final = "origin.json"
SCHEMA: Final = 1
_MAX_BYTES: Final = 4096


def mark_made_here(stage: Path) -> None:
    """Note in a draft that its checkpoint was made on this machine, of a workload that ran here. Raises OSError."""
    durable.write_file(stage / NAME, json.dumps({"schema": SCHEMA, "made_on": _machine_id()}).encode() + b"\n")


def made_here(entry: Path) -> bool:
    """Whether the checkpoint in this directory was made on this very machine; False when nothing says so (it was imported)."""
    try:
        with (entry / NAME).open("rb") as file:
            told = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError):
        return False
    own = _machine_id()
    return isinstance(told, dict) and bool(own) and told.get("schema") == SCHEMA and told.get("made_on") == own


def _machine_id() -> str:
    """machine-id(5), else the boot's: a store may be on a disk that several machines have."""
    for path in ("/etc/machine-id", "/proc/sys/kernel/random/boot_id"):
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text and text != "uninitialized":
            return text
    return ""
