"""Single facts of single processes from /proc, "" or empty where the process is gone (proc(5), cgroups(7))."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")


def text(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:
        return ""


def comm_of(pid: int) -> str:
    return text(PROC / str(pid) / "comm").removesuffix("\n")


def status_of(pid: int) -> dict[str, str]:
    lines = text(PROC / str(pid) / "status").splitlines()
    return {key: value.strip() for key, colon, value in (line.partition(":") for line in lines) if colon}


def nspids(pid: int) -> list[int]:
    status = status_of(pid)
    return [int(p) for p in status.get("NSpid", status.get("Pid", "")).split()]


def stat_fields(pid: int | str) -> list[str]:
    """The fields of /proc/PID/stat from the state on: comm, before them, may hold blanks and parentheses."""
    return text(PROC / str(pid) / "stat").rpartition(")")[2].split()


def state_of(pid: int) -> str:
    fields = stat_fields(pid)
    return fields[0] if fields else ""


def session_of(pid: int) -> int:
    fields = stat_fields(pid)
    return int(fields[3]) if len(fields) > 3 else pid


def controlling_terminal(pid: int) -> int:
    fields = stat_fields(pid)
    return int(fields[4]) & 0xFFFFFFFF if len(fields) > 4 else 0


def stopped(pid: int) -> bool:
    try:
        threads = os.listdir(PROC / str(pid) / "task")
    except OSError:
        return True
    return all(stat_fields(f"{pid}/task/{tid}")[:1] in ([], ["T"], ["t"], ["Z"], ["X"]) for tid in threads)


def namespace(pid: int | str, kind: str) -> str:
    try:
        return os.readlink(PROC / str(pid) / "ns" / kind)
    except OSError:
        return ""


def all_pids() -> Iterator[int]:
    return (int(name) for name in os.listdir(PROC) if name.isdigit())


def children(pid: int) -> list[int]:
    try:
        threads = os.listdir(PROC / str(pid) / "task")
    except OSError:
        return []
    lists = [PROC / str(pid) / "task" / tid / "children" for tid in threads]
    if lists and not (PROC / "self/task" / str(os.getpid()) / "children").exists():  # a kernel without CONFIG_PROC_CHILDREN
        return [other for other in all_pids() if stat_fields(other)[1:2] == [str(pid)]]
    return [int(child) for path in lists for child in text(path).split()]


def lock_fields(line: str) -> tuple[str, ...] | None:
    """A line of /proc/locks or a `lock:` line of fdinfo, as its fields; None for one that waits or is none."""
    fields = tuple(line.split())
    return fields if len(fields) >= 8 and fields[1] != "->" else None


def overlay_devices(pid: int) -> set[int]:
    """The device numbers (as in fdinfo: major << 20 | minor) of the overlay file systems that the process sees."""
    found = set()
    for line in text(PROC / str(pid) / "mountinfo").splitlines():
        head, _, tail = line.partition(" - ")
        if tail.startswith("overlay "):
            major, _, minor = head.split()[2].partition(":")
            found.add(int(major) << 20 | int(minor))
    return found


def cgroup_frozen(pid: int) -> bool:
    for line in text(PROC / str(pid) / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and "frozen 1" in text(cgroup_file("cgroup2", "", path, "cgroup.events")).splitlines():
            return True
        if "freezer" in controllers.split(",") and text(cgroup_file("cgroup", "freezer", path, "freezer.state")).strip() == "FROZEN":
            return True
    return False


def cgroup_file(kind: str, option: str, path: str, name: str) -> Path:
    """A file of the cgroup `path` (of /proc/PID/cgroup) in the hierarchy of a kind ("cgroup2", "cgroup") and controller, as it is mounted here."""
    for line in text(PROC / "self/mountinfo").splitlines():
        head, _, tail = line.partition(" - ")
        if tail.split()[:1] == [kind] and (not option or option in tail.split()[-1].split(",")):
            _, _, _, root, point = head.split()[:5]
            return Path(point) / os.path.relpath(path, root) / name
    return Path("/nonexistent")
