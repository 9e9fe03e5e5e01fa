"""Facts of this host that decide whether a checkpoint can run on it."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import ckpt
from ckpt.host.run import CommandFailed, run, which
from ckpt.model import HostFacts

_CRIU_TIMEOUT_S = 10.0


def gather(store_root: Path) -> HostFacts:
    """All facts of this host; what cannot be found out is "" or 0. `store_root` need not exist yet."""
    machine = os.uname()
    return HostFacts(
        hostname=socket.gethostname(),
        arch=machine.machine,
        kernel=machine.release,
        criu_version=criu_version(),
        ckpt_version=ckpt.__version__,
        cpu_flags=cpu_flags(),
        cpus=os.cpu_count() or 0,
        memory_available_bytes=memory_available_bytes(),
        store_free_bytes=free_bytes(store_root),
        boot_id=_text("/proc/sys/kernel/random/boot_id").strip(),
    )


def criu_version() -> str:
    """The version that `criu --version` prints ("4.2.1"), "" without CRIU."""
    program = which("criu")
    if program is None:
        return ""
    try:
        said = run([program, "--version"], timeout_s=_CRIU_TIMEOUT_S, check=False).text
    except CommandFailed:
        return ""
    found = re.search(r"^Version:\s*v?(\d[\w.-]*)", said, re.MULTILINE)
    return found[1] if found else ""


def cpu_flags() -> tuple[str, ...]:
    """The flags that all processors have, sorted: x86 `flags`, arm64 `Features`, s390x `features`, riscv `isa`."""
    lines = {line for line in _text("/proc/cpuinfo").splitlines() if re.match(r"(flags|Features|features|isa)\s*:", line)}
    sets = [set(line.partition(":")[2].split()) for line in lines]
    return tuple(sorted(set.intersection(*sets))) if sets else ()


def memory_available_bytes() -> int:
    """MemAvailable of /proc/meminfo, 0 when it is not told."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _text("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def free_bytes(path: Path) -> int:
    """Free space at `path`, or at its nearest parent that exists; 0 when it is not told."""
    for place in (path, *path.parents):
        try:
            space = os.statvfs(place)
        except FileNotFoundError:
            continue
        except OSError:
            return 0
        return space.f_bavail * space.f_frsize
    return 0


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
