"""Looks at a workload and at the store that several operations need: read only, bounded in time."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckpt import config
from ckpt.criu import swrk
from ckpt.host import procfs
from ckpt.host.procfs import GHOST_LIMIT_BYTES, OpenKinds
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


@dataclass(frozen=True, slots=True)
class CriuOptions:
    """Options of CRIU that are in effect for a dump and decide what it refuses (criu(8))."""

    ghost_limit_bytes: int = GHOST_LIMIT_BYTES
    link_remap: bool = False
    ext_unix_sk: bool = False
    skip_in_flight: bool = False


def criu_options(container: Container, *, root: Path = Path("/etc/criu")) -> CriuOptions:
    """The options for this container: what ckpt sets itself for process trees, else what the runtime's configuration files say."""
    if container.runtime == "criu":
        return CriuOptions(swrk.GHOST_LIMIT_BYTES, True, True, True)
    runtime = Path(container.runtime or "").name
    said: dict[str, str] = {}
    # crun reads runc's file when it has none of its own.
    of_runtime = "crun.conf" if runtime == "crun" and (root / "crun.conf").exists() else "runc.conf"
    for name in ("default.conf", of_runtime):
        said.update(_config_lines(root / name))
    limit = re.fullmatch(r"(\d+)([KMG]?)", said.get("ghost-limit", ""))
    return CriuOptions(
        int(limit[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[limit[2]] if limit else GHOST_LIMIT_BYTES,
        "link-remap" in said,
        "ext-unix-sk" in said,
        "skip-in-flight" in said,
    )


def _config_lines(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    words = [line.split("#")[0].split(None, 1) for line in lines]
    return {word[0].lstrip("-"): word[1].strip().strip('"') if len(word) > 1 else "" for word in words if word}


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
