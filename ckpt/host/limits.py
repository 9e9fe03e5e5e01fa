"""What the kernel lets a process of ours have (getrlimit(2), pipe(7), capabilities(7))."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import Final

_CAP_SYS_RESOURCE: Final = 24
_LARGE_PIPE_BYTES: Final = 4 << 20
"""CRIU's own limit of a pipe, rounded up by the kernel (PIPE_MAX_SIZE in criu/include/page-pipe.h: 819 pages)."""
_SPARE: Final = 0.8


def may_exceed() -> bool:
    """Whether limits of this kind are none for us (CAP_SYS_RESOURCE)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> _CAP_SYS_RESOURCE & 1)
    return False


def pipe_bytes() -> int:
    """How large CRIU's pipes can become."""
    largest = int(Path("/proc/sys/fs/pipe-max-size").read_text())
    return _LARGE_PIPE_BYTES if may_exceed() or largest >= _LARGE_PIPE_BYTES else largest


def descriptors() -> int:
    """How many descriptors CRIU can have."""
    if may_exceed():
        return int(Path("/proc/sys/fs/nr_open").read_text())
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return os.sysconf("SC_OPEN_MAX") if hard == resource.RLIM_INFINITY else hard


def piped_memory_bytes() -> int:
    """How much memory of a frozen tree CRIU can keep in pipes, as it does for a dump whose memory stays: two descriptors a pipe."""
    return int(descriptors() / 2 * _SPARE) * pipe_bytes()
