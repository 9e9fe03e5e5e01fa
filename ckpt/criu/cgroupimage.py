"""The state of the freezer in CRIU images.

CRIU takes a tree whose cgroup is frozen already, and writes that down: cgroup.img then says that the restored tree is to be frozen at
the end (criu/cgroup.c, restore_freezer_state), for which nobody would wake it. A freeze for the sake of a dump is no state of the workload.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from ckpt.criu import images

FILE: Final = "cgroup.img"
_AWAKE: Final = {("freezer.state", "FROZEN"): "THAWED", ("cgroup.freeze", "1"): "0", ("cgroup.freeze", "FROZEN"): "THAWED"}
"""(property, value) -> what the value is of a cgroup that is not frozen, of v1 and of v2."""
_HEAD_BYTES: Final = 8


def thaw(images_dir: Path) -> int:
    """Make the CRIU images those of a workload that was not frozen; returns how many properties were changed.

    Raises:
        ArchiveInvalid: the image makes no sense.
        OSError: it could not be written.
    """
    path = images_dir / FILE
    entries = list(images._entries(path, "CGROUP", "cgroup_pb2", "cgroup_entry", missing_ok=True))
    changed = sum(_thaw(controller.dirs) for entry in entries for controller in entry.controllers)
    if changed:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        part = path.with_name(FILE + ".part")
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as out:
            out.write(head)
            for entry in entries:
                body = entry.SerializeToString()
                out.write(struct.pack("<I", len(body)) + body)
        part.rename(path)
    return changed


def _thaw(directories: Iterable[Any]) -> int:
    changed = 0
    for directory in directories:
        for found in directory.properties:
            if (awake := _AWAKE.get((found.name, found.value.strip()))) is not None:
                found.value = awake
                changed += 1
        changed += _thaw(directory.children)
    return changed
