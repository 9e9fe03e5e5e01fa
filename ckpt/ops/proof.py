"""Proof that a restored tree is the dumped one, and not a fresh start."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence

from ckpt.errors import RestoreFailed
from ckpt.host import procfs
from ckpt.model import Manifest, Process
from ckpt.store.job import Job


def held_pid(job: Job) -> int | None:
    """The first process of the tree that CRIU's action-script holds, as this host numbers it; None where it cannot be told."""
    try:
        text = json.loads(job.held_path.read_text()).get("init_pid")
        return int(text) if text else None
    except (OSError, ValueError):
        return None


def tree(pid: int) -> list[tuple[str, int]]:
    """(name, pid inside its pid namespace) of every process of a tree."""
    return [(comm, inner) for inner, comm in procfs.process_names(pid)]


def compare(wanted: Sequence[Process], found: Sequence[tuple[str, int]], label: str) -> None:
    """Compare what is there with what was dumped.

    Raises:
        RestoreFailed: processes are missing, or other ones are there.
    """
    there = Counter(comm for comm, _ in found)
    dumped = Counter(process.comm for process in wanted)
    if there != dumped:
        missing = ", ".join((dumped - there).elements()) or "none"
        extra = ", ".join((there - dumped).elements()) or "none"
        raise RestoreFailed(f"{label} came back as another process tree: missing {missing}; not in the checkpoint {extra}")


def check(job: Job, manifest: Manifest) -> None:
    """Compare the held tree of a job with the manifest; a tree that cannot be told is not judged.

    Raises:
        RestoreFailed: it is another one.
    """
    pid = held_pid(job)
    if pid is not None and manifest.processes:
        compare(manifest.processes, tree(pid), manifest.name)
