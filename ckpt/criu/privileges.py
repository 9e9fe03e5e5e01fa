"""What the processes in CRIU images are allowed to do. CRIU gives it back to them as it was, whatever the container's configuration says:
credentials and seccomp mode (core), the host's namespaces (ids, inventory), and mounts that CRIU makes itself (mountpoints).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ckpt.criu import images
from ckpt.criu.bindings import load
from ckpt.errors import ArchiveInvalid

CAPABILITIES: Final = (
    "CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP", "LINUX_IMMUTABLE", "NET_BIND_SERVICE",
    "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER", "SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT",
    "SYS_ADMIN", "SYS_BOOT", "SYS_NICE", "SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
    "MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF", "CHECKPOINT_RESTORE",
)  # fmt: skip
"""By their numbers (linux/capability.h)."""

_SPACES: Final = {"pid": "pid_ns_id", "network": "net_ns_id", "ipc": "ipc_ns_id", "uts": "uts_ns_id", "mount": "mnt_ns_id", "cgroup": "cgroup_ns_id"}
_VIRTUAL: Final = frozenset({"PROC", "SYSFS", "TMPFS", "DEVPTS", "CGROUP", "CGROUP2", "MQUEUE"})
_NO_SECCOMP, _FILTER = 0, 2
"""seccomp_mode (core.proto)."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """Of one thread. `capabilities`: the union of all its sets, names without CAP_."""

    pid: int
    uids: frozenset[int]
    capabilities: frozenset[str]
    no_new_privileges: bool
    seccomp: bool
    seccomp_filter: int | None
    """The number of its last filter in seccomp.img."""


@dataclass(frozen=True, slots=True)
class HostMount:
    """A mount of a kind that CRIU makes from a source of the host."""

    kind: str
    source: str
    mountpoint: str


def credentials(images_dir: Path) -> Iterator[Credentials]:
    """Of every thread in the images. Raises ArchiveInvalid; a process without its core image, too."""
    numbers = sorted(images.all_ids(images_dir))
    if not numbers:
        raise ArchiveInvalid("the CRIU images have no process in them (pstree.img)")
    for number in numbers:
        name = f"core-{number}.img"
        for entry in images._entries(images_dir / name, "CORE", "core_pb2", "core_entry"):
            if not entry.HasField("thread_core"):
                continue  # of a zombie
            thread = entry.thread_core
            creds = thread.creds
            mode = thread.seccomp_mode if thread.HasField("seccomp_mode") else entry.tc.old_seccomp_mode
            yield Credentials(
                number,
                frozenset({creds.uid, creds.euid, creds.suid, creds.fsuid}),
                frozenset().union(*(_names(getattr(creds, f"cap_{kind}")) for kind in ("inh", "prm", "eff", "bnd", "amb"))),
                bool(creds.no_new_privs),
                mode != _NO_SECCOMP,
                _filter(thread, entry.tc) if mode == _FILTER else None,
            )


def shared_namespaces(images_dir: Path) -> frozenset[str]:
    """Kinds of namespaces in which a process is not its own but where CRIU itself ran: the host's. Raises ArchiveInvalid."""
    inventory = next(images._entries(images_dir / "inventory.img", "INVENTORY", "inventory_pb2", "inventory_entry"), None)
    if inventory is None:
        raise ArchiveInvalid("inventory.img is empty")
    found: set[str] = set()
    for process in images._entries(images_dir / "pstree.img", "PSTREE", "pstree_pb2", "pstree_entry"):
        ids = _ids(images_dir, process.pid)
        if ids is None:
            continue
        for kind, key in _SPACES.items():
            if not inventory.HasField("root_ids") or getattr(ids, key) in (0, getattr(inventory.root_ids, key)):
                found.add(kind)
    return frozenset(found)


def host_mounts(images_dir: Path) -> list[HostMount]:
    """Mounts that CRIU itself would make of something of the host, other than the root and those that the runtime names. Raises ArchiveInvalid."""
    kinds = {value: name for name, value in load("images.mnt_pb2").fstype.items()}
    found = []
    for path in sorted(images_dir.glob("mountpoints-*.img")):
        for entry in images._entries(path, "MNTS", "mnt_pb2", "mnt_entry"):
            kind = kinds.get(entry.fstype, str(entry.fstype))
            # "/" and those with a key come from outside: from the root and the configuration that the runtime gives to CRIU.
            if kind in _VIRTUAL or entry.mountpoint in ("/", "./") or entry.ext_key or entry.ext_mount:
                continue
            found.append(HostMount(kind.lower(), entry.source, entry.mountpoint))
    return found


def _ids(images_dir: Path, pid: int) -> Any:
    for entry in images._entries(images_dir / f"ids-{pid}.img", "IDS", "core_pb2", "task_kobj_ids_entry", missing_ok=True):
        return entry
    for entry in images._entries(images_dir / f"core-{pid}.img", "CORE", "core_pb2", "core_entry"):
        return entry.ids if entry.HasField("ids") else None
    return None


def _filter(thread: Any, task: Any) -> int:
    return int(thread.seccomp_filter if thread.HasField("seccomp_filter") else task.old_seccomp_filter)


def _names(words: Any) -> frozenset[str]:
    bits = sum(word << (32 * place) for place, word in enumerate(list(words)[:4]))
    return frozenset(CAPABILITIES[n] if n < len(CAPABILITIES) else str(n) for n in range(128) if bits >> n & 1)
