"""What a failed restore may leave behind although its job was undone, and what would stand in the way of a cold start."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from ckpt.criu import netlock
from ckpt.model import Checkpoint

CGROUPS: Final = Path("/sys/fs/cgroup")
_DEPTH: Final = 3
"""Engines put containers at the root, into a slice, or into a directory of their own in one; cgroup v1 has the controller's above that."""


def clear(checkpoint: Checkpoint) -> list[str]:
    """Remove CRIU's network locks of this checkpoint and empty cgroups of its container; returns what was removed. Never raises for what is gone."""
    done = netlock.unlock(checkpoint.directory / "checkpoint")
    identity = checkpoint.manifest.container_id
    if checkpoint.manifest.engine != "process" and identity:
        done += _remove_cgroups(CGROUPS, identity, _DEPTH)
    return done


def _remove_cgroups(top: Path, identity: str, depth: int) -> list[str]:
    done: list[str] = []
    with suppress(OSError):
        for entry in [entry for entry in os.scandir(top) if entry.is_dir(follow_symlinks=False)]:
            name = entry.name.removesuffix(".scope")
            if name in (identity, f"libpod-{identity}", f"crun-{identity}", f"runc-{identity}"):
                done += _remove(Path(entry.path))
            elif depth > 1:
                done += _remove_cgroups(Path(entry.path), identity, depth - 1)
    return done


def _remove(top: Path) -> list[str]:
    """One that still has processes stays: the kernel removes no such cgroup."""
    done: list[str] = []
    for directory, _, _ in os.walk(top, topdown=False):
        with suppress(OSError):
            os.rmdir(directory)
            done.append(directory)
    return done
