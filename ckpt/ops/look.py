"""Looks at a workload and at the store that several operations need: read only, bounded in time."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ckpt import config
from ckpt.host import procfs
from ckpt.host.procfs import OpenKinds
from ckpt.model import Container, DumpOptions

SIZE_LIMIT_S: Final = 5.0
"""Sizes on disk are counted for so long; what is found by then is the least it can be."""


def open_kinds(container: Container) -> OpenKinds | None:
    """What the container's processes hold; None when it does not run, or ended meanwhile."""
    if container.pid is None or container.state != "running":
        return None
    kinds = procfs.open_kinds(container.pid)
    return kinds if kinds.pids else None


def disk_bytes(container: Container, options: DumpOptions) -> int:
    """What the container wrote on disk and its checkpoint takes along."""
    until = time.monotonic() + SIZE_LIMIT_S
    places = [] if options.ignore_rootfs or container.rootfs.upper_dir is None else [container.rootfs.upper_dir]
    places += [] if options.ignore_volumes else [volume.source_dir for volume in container.volumes]
    return sum(size for place in places for size in _sizes(place, until))


def store_root() -> Path:
    """The store's directory, as configured."""
    return config.load().store


def _sizes(place: Path, until: float) -> Iterator[int]:
    waiting = [os.fspath(place)]
    while waiting and time.monotonic() < until:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        yield entry.stat(follow_symlinks=False).st_blocks * 512
        except OSError:
            continue
