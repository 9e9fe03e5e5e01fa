"""An honest checkpoint of a podman container, small and made without podman, and the tools to bend it."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from typing import Any

from ckpt.archive import layout, manifest
from ckpt.criu.bindings import load
from ckpt.model import ContainerImage, HostFacts, Manifest, Process

CONTAINER = "c" * 64
IMAGE = "d" * 64
USERDATA = f"/var/lib/containers/storage/overlay-containers/{CONTAINER}/userdata"
RUNDATA = f"/run/containers/storage/overlay-containers/{CONTAINER}/userdata"
CAPS = ("CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT")
CAP_BITS = 0x800405FB  # these, by their numbers

Members = dict[str, bytes]


def config() -> dict[str, Any]:
    """config.dump of podman 5.4, as far as it matters."""
    return {
        "spec": spec(), "id": CONTAINER, "name": "web", "lockID": 0, "rootfsImageID": IMAGE, "rootfsImageName": "localhost/app:latest",
        "ShmDir": f"{USERDATA}/shm", "shmSize": 65536000, "staticDir": USERDATA, "mounts": [f"{USERDATA}/shm"], "privileged": False,
        "namedVolumes": [{"volumeName": "data", "dest": "/data", "options": ["rw", "nosuid", "nodev", "rbind"]}],
        "secretsPath": f"{USERDATA}/secrets", "labelopts": ["disable"], "createNetNS": True, "newNetworks": {"podman": {"interface_name": "eth0"}},
        "networkMode": "bridge", "cgroupParent": "/libpod_parent", "logPath": f"{USERDATA}/ctr.log", "logDriver": "k8s-file",
        "conmonPidFile": f"{RUNDATA}/conmon.pid", "pid_file": f"{RUNDATA}/pidfile", "runtime": "crun", "healthLogDestination": "local",
        "createdTime": "2026-11-21T12:03:11.123456789+01:00",
    }  # fmt: skip


def spec() -> dict[str, Any]:
    """spec.dump of the same."""
    caps = [f"CAP_{name}" for name in CAPS]
    return {
        "ociVersion": "1.2.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["app"], "env": ["PATH=/bin"], "cwd": "/",
                    "capabilities": {"bounding": caps, "effective": caps, "permitted": caps}},
        "root": {"path": "/var/lib/containers/storage/overlay/x/merged"}, "hostname": "c",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid"]},
            {"destination": "/data", "type": "bind", "source": "/var/lib/containers/storage/volumes/data/_data", "options": ["rbind"]},
            {"destination": "/etc/hosts", "type": "bind", "source": f"{RUNDATA}/hosts", "options": ["bind"]},
            {"destination": "/dev/shm", "type": "bind", "source": f"{USERDATA}/shm", "options": ["bind"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro"]},
        ],
        "annotations": {"io.container.manager": "libpod", "org.opencontainers.image.stopSignal": "15"},
        "linux": {
            "sysctl": {"net.ipv4.ping_group_range": "0 0"}, "resources": {"devices": [{"allow": False, "access": "rwm"}]},
            "cgroupsPath": f"/libpod_parent/libpod-{CONTAINER}",
            "namespaces": [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "cgroup")]
                          + [{"type": "network", "path": "/run/netns/netns-6ef4d6a2-40e3-c53a-8c4e-271b1875c041"}],
            "seccomp": {"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read", "write"], "action": "SCMP_ACT_ALLOW"}]},
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/scsi", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
        },
    }  # fmt: skip


def image(magic: str, *entries: Any, second: bool = True) -> bytes:
    """A CRIU image of some entries (protobuf messages, or raw bytes)."""
    magics = load("images.magic").by_name
    data = struct.pack("<I", magics["IMG_COMMON"]) if second else b""
    data += struct.pack("<I", magics[magic])
    for entry in entries:
        body = entry if isinstance(entry, bytes) else entry.SerializePartialToString()
        data += struct.pack("<I", len(body)) + body
    return data


def core(*, caps: int = CAP_BITS, seccomp: int = 2, uid: int = 0, no_new_privs: int = 0) -> Any:
    """The entry of a core image."""
    entry = load("images.core_pb2").core_entry(mtype=1)
    creds = entry.thread_core.creds
    for name in ("uid", "gid", "euid", "egid", "suid", "sgid", "fsuid", "fsgid"):
        setattr(creds, name, uid if "uid" in name else 0)
    for name in ("cap_inh", "cap_prm", "cap_eff", "cap_bnd"):
        getattr(creds, name).extend([0, 0] if name == "cap_inh" else [caps & 0xFFFFFFFF, caps >> 32])
    creds.secbits = 0
    creds.no_new_privs = no_new_privs
    entry.thread_core.futex_rla = entry.thread_core.futex_rla_len = 0
    entry.thread_core.seccomp_mode = seccomp
    entry.thread_core.seccomp_filter = 0
    entry.tc.comm = "app"
    for name in ("task_state", "exit_code", "personality", "flags", "blk_sigset"):
        setattr(entry.tc, name, 1)
    return entry


def program(*rows: tuple[int, int, int, int]) -> bytes:
    """A classic BPF program."""
    return b"".join(struct.pack("<HBBI", *row) for row in rows)


HONEST = program((0x20, 0, 0, 0), (0x15, 1, 0, 0), (0x15, 0, 1, 1), (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x00050001))
"""read and write (0 and 1), nothing else."""


def seccomp(*filters: bytes, prev: int | None = None) -> bytes:
    """seccomp.img."""
    protos = load("images.seccomp_pb2")
    entry = protos.seccomp_entry()
    for number, code in enumerate(filters):
        one = entry.seccomp_filters.add(filter=code)
        if number and prev is not None:
            one.prev = prev
    return image("SECCOMP", entry)


def ids(first: int) -> Any:
    """Kernel object ids: `first` and those that follow, one for each kind."""
    kinds = load("images.core_pb2").task_kobj_ids_entry()
    for place, name in enumerate(("vm_id", "files_id", "fs_id", "sighand_id", "pid_ns_id", "net_ns_id", "ipc_ns_id", "uts_ns_id", "mnt_ns_id",
                                  "user_ns_id", "cgroup_ns_id")):  # fmt: skip
        setattr(kinds, name, first + place)
    return kinds


def inventory(root: Any = None) -> bytes:
    """inventory.img."""
    entry = load("images.inventory_pb2").inventory_entry(img_version=2, fdinfo_per_id=True)
    entry.root_ids.CopyFrom(root or ids(100))
    return image("INVENTORY", entry, second=False)


def pstree(*rows: tuple[int, int, list[int]]) -> bytes:
    """pstree.img of (pid, parent, threads)."""
    kind = load("images.pstree_pb2").pstree_entry
    return image("PSTREE", *(kind(pid=pid, ppid=ppid, pgid=pid, sid=pid, threads=threads) for pid, ppid, threads in rows))


def mounts(*rows: dict[str, Any]) -> bytes:
    """mountpoints-13.img."""
    kind = load("images.mnt_pb2").mnt_entry
    plain: dict[str, Any] = {"mnt_id": 1, "root_dev": 1, "parent_mnt_id": 1, "flags": 0, "root": "/", "options": "", "source": "x"}
    return image("MNTS", *(kind(**(plain | row)) for row in rows))


def pagemap(*rows: dict[str, int]) -> bytes:
    """pagemap-1.img: the number of its pages image, then its entries."""
    protos = load("images.pagemap_pb2")
    return image("PAGEMAP", protos.pagemap_head(pages_id=1), *(protos.pagemap_entry(**row) for row in rows))


def members() -> Members:
    """Of the honest checkpoint, without a manifest, in the archive's order."""
    diff = io.BytesIO()
    with tarfile.open(fileobj=diff, mode="w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("app.state"), io.BytesIO())
    return {
        "config.dump": json.dumps(config()).encode(),
        "spec.dump": json.dumps(spec()).encode(),
        "network.status": b'{"podman": {"interfaces": {"eth0": {"subnets": [{"ipnet": "10.88.0.9/16"}], "mac_address": "aa:bb:cc:dd:ee:ff"}}}}',
        "checkpoint/core-1.img": image("CORE", core()),
        "checkpoint/ids-1.img": image("IDS", ids(200)),
        "checkpoint/inventory.img": inventory(),
        "checkpoint/mountpoints-13.img": mounts({"fstype": 17, "mountpoint": "/"}, {"fstype": 1, "mountpoint": "/proc"}),
        "checkpoint/pagemap-1.img": pagemap({"vaddr": 0x1000, "nr_pages": 2, "flags": 4}),
        "checkpoint/pages-1.img": bytes(range(256)) * 32,
        "checkpoint/pstree.img": pstree((1, 0, [1])),
        "checkpoint/seccomp.img": seccomp(HONEST),
        "rootfs-diff.tar": diff.getvalue(),
        "deleted.files": b'["/etc/motd"]',
        "volumes/data.tar": diff.getvalue(),
    }


def a_manifest(found: Members, **changes: Any) -> bytes:
    """Ours, with the right digests unless `changes` has others."""
    import hashlib

    digests = {name: "sha256:" + hashlib.sha256(data).hexdigest() for name, data in found.items() if name != layout.MANIFEST}
    plain: dict[str, Any] = {
        "id": "a" * 16, "name": "web", "engine": "podman", "container_id": CONTAINER, "created_s": 1.5, "runtime": "crun", "digests": digests,
        "container_image": ContainerImage(IMAGE, "localhost/app:latest"), "processes": (Process(1, 0, "app"),), "volumes": (("data", "/data"),),
        "host": HostFacts(hostname="elsewhere"),
    }  # fmt: skip
    return manifest.dumps(Manifest(**(plain | changes)))


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> tarfile.TarInfo:
    """A tar header; `__` in the names of pax records stands for a dot."""
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.pax_headers = kind, link, {key.replace("__", "."): value for key, value in pax.items()}
    return found


def pack(*parts: tuple[str | tarfile.TarInfo, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of members as they are given."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for head, data in parts:
            member = info(head, tarfile.DIRTYPE if head.endswith("/") else tarfile.REGTYPE) if isinstance(head, str) else head
            if member.isreg() or data:
                member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def archive(found: Members, **changes: Any) -> bytes:
    """An archive of ours with these members, its manifest first."""
    return pack((layout.MANIFEST, a_manifest(found, **changes)), *found.items())


def foreign(found: Members) -> bytes:
    """An archive of podman with these members: no manifest."""
    return pack(*found.items())
