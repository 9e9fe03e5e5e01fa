"""Attacks with CRIU images, which give back to a process what they say."""

from __future__ import annotations

import struct
from functools import partial
from typing import Any

from ckpt.criu.bindings import load
from tests.corpus.attack import INVALID, register
from tests.corpus.base import CAP_BITS, HONEST, Members, archive, core, ids, image, inventory, members, mounts, program, pstree, seccomp

KEPT, CRIU = "CVE-2026-92574/-95837 kept privileges", "CRIU images"


def _with(**changed: bytes | None) -> bytes:
    """An archive of ours with other images; all digests are right."""
    found: Members = members()
    for name, data in changed.items():
        member = "checkpoint/" + name.replace("__", "-").replace("_img", ".img")
        if data is None:
            del found[member]
        else:
            found[member] = data
    return archive(found)


def _core(**given: Any) -> bytes:
    return image("CORE", core(**given))


for _name, _build in (
    ("a capability more", lambda: _with(core__1_img=_core(caps=CAP_BITS | 1 << 21))),
    ("all capabilities", lambda: _with(core__1_img=_core(caps=(1 << 41) - 1))),
    ("a capability that has no name", lambda: _with(core__1_img=_core(caps=CAP_BITS | 1 << 60))),
    ("no seccomp filter", lambda: _with(core__1_img=_core(seccomp=0))),
    ("a filter that lets everything through", lambda: _with(seccomp_img=seccomp(program((0x06, 0, 0, 0x7FFF0000))))),
    ("a filter that logs", lambda: _with(seccomp_img=seccomp(program((0x06, 0, 0, 0x7FFC0000))))),
    ("a filter that asks a stranger", lambda: _with(seccomp_img=seccomp(program((0x06, 0, 0, 0x7FC00000))))),
    ("a filter with a door for one argument", lambda: _with(seccomp_img=seccomp(
        program((0x20, 0, 0, 56), (0x15, 0, 1, 0x1337), (0x06, 0, 0, 0x7FFF0000)) + HONEST))),
    ("a filter with a door for mount", lambda: _with(seccomp_img=seccomp(
        program((0x20, 0, 0, 0), (0x15, 0, 1, 165), (0x06, 0, 0, 0x7FFF0000)) + HONEST))),
    ("a filter with a door for x32", lambda: _with(seccomp_img=seccomp(
        program((0x20, 0, 0, 0), (0x35, 0, 1, 0x40000000), (0x06, 0, 0, 0x7FFF0000)) + HONEST))),
    ("a filter that calculates its answer", lambda: _with(seccomp_img=seccomp(
        program((0x20, 0, 0, 24), (0x44, 0, 0, 0x7FFF0000), (0x16, 0, 0, 0))))),
    ("a thread with more", lambda: _with(pstree_img=pstree((1, 0, [1, 7])), core__7_img=_core(caps=CAP_BITS | 1 << 21))),
    ("a child with more", lambda: _with(
        pstree_img=pstree((1, 0, [1]), (5, 1, [5])), core__5_img=_core(seccomp=0), ids__5_img=image("IDS", ids(200)))),
    ("the host's namespaces", lambda: _with(inventory_img=inventory(ids(200)))),
    ("a child in the host's namespaces", lambda: _with(
        pstree_img=pstree((1, 0, [1]), (5, 1, [5])), core__5_img=_core(), ids__5_img=image("IDS", ids(100)))),
    ("no namespaces", lambda: _with(ids__1_img=image("IDS", load_ids()))),
    ("a disk to be mounted", lambda: _with(mountpoints__13_img=mounts({"fstype": 16, "mountpoint": "/x", "source": "/dev/sda1", "fsname": "ext4"}))),
    ("an overlay of the host", lambda: _with(mountpoints__13_img=mounts({"fstype": 17, "mountpoint": "/x", "options": "lowerdir=/"}))),
    ("the devices of the host", lambda: _with(mountpoints__13_img=mounts({"fstype": 3, "mountpoint": "/dev", "source": "devtmpfs"}))),
    ("debugfs", lambda: _with(mountpoints__13_img=mounts({"fstype": 11, "mountpoint": "/d", "source": "debugfs"}))),
    ("a second table of mounts", lambda: _with(mountpoints__99_img=mounts({"fstype": 16, "mountpoint": "/x", "source": "/dev/sda1"}))),
):  # fmt: skip
    register(f"images with {_name}", KEPT if "moun" not in _name else CRIU, "restore", _build)


def load_ids() -> Any:
    """Kernel ids without a namespace."""
    empty = ids(0)
    for name in ("pid_ns_id", "net_ns_id", "ipc_ns_id", "uts_ns_id", "mnt_ns_id", "cgroup_ns_id"):
        setattr(empty, name, 0)
    return empty


def circle() -> bytes:
    """A filter that is below itself."""
    entry = load("images.seccomp_pb2").seccomp_entry()
    entry.seccomp_filters.add(filter=HONEST, prev=0)
    return image("SECCOMP", entry)


def _broken(name: str, data: bytes | None) -> bytes:
    return _with(**{name: data})


for _name, _member, _data in (
    ("a wrong magic", "core__1_img", b"\1\2\3\4\5\6\7\x08" + bytes(50)),
    ("the magic of another image", "core__1_img", image("IDS", ids(1))),
    ("a core image that is empty", "core__1_img", b""),
    ("an entry without end", "core__1_img", image("CORE") + struct.pack("<I", 0xFFFFFFFF) + b"x"),
    ("an entry that is cut", "core__1_img", image("CORE", core())[:-5]),
    ("an entry that is no protobuf", "core__1_img", image("CORE", b"\xff" * 64)),
    ("an entry of nested groups", "core__1_img", image("CORE", b"\x0b" * 5000)),
    ("no core image", "core__1_img", None),
    ("no ids, and none in the core", "ids__1_img", image("CORE", core())),
    ("a process that is not there", "pstree_img", pstree((1, 0, [1]), (9, 1, [9]))),
    ("a negative pid", "pstree_img", pstree((0xFFFFFFFF, 0, [0xFFFFFFFF]))),
    ("a process tree without processes", "pstree_img", image("PSTREE")),
    ("a process tree of garbage", "pstree_img", image("PSTREE", b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")),
    ("an inventory without entries", "inventory_img", image("INVENTORY", second=False)),
    ("an inventory of garbage", "inventory_img", image("INVENTORY", b"\xff" * 20, second=False)),
    ("a filter that is not there", "seccomp_img", seccomp()),
    ("filters in a circle", "seccomp_img", circle()),
    ("a filter that is no program", "seccomp_img", seccomp(b"abc")),
    ("a filter that is too long", "seccomp_img", seccomp(HONEST * 1000)),
    ("no filters", "seccomp_img", None),
    ("filters of garbage", "seccomp_img", image("SECCOMP", b"\xff" * 30)),
    ("mounts of garbage", "mountpoints__13_img", image("MNTS", b"\x80" * 40)),
):  # fmt: skip
    register(f"images with {_name}", CRIU, "restore", partial(_broken, _member, _data), INVALID)
