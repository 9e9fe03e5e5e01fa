"""Proof that a restored tree is the dumped one, and not a fresh start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ckpt.engines.base import HeldRestore
from ckpt.errors import RestoreFailed
from ckpt.host import procfs
from ckpt.model import Manifest, Process


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


def check(held: HeldRestore, manifest: Manifest) -> None:
    """Compare a held tree with the manifest; a tree that cannot be told (no pid yet) is not judged.

    Raises:
        RestoreFailed: it is another one.
    """
    if held.init_pid and manifest.processes:
        compare(manifest.processes, tree(held.init_pid), manifest.name)
