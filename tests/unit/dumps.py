"""A small dump, made with pycriu's own classes: two processes, a connection, an open file, a pipe, memory."""

from __future__ import annotations

import json
import socket
import struct
from pathlib import Path
from typing import Any

from ckpt.archive import layout, manifest
from ckpt.criu.bindings import load
from ckpt.model import Manifest

PAGE = 4096
HEAP, STACK = 0x10000000, 0x7FFF00000000
CONTAINER = "c" * 64


def image(path: Path, magic: str, *entries: Any) -> None:
    magics = load("images.magic").by_name
    data = struct.pack("<II", magics["IMG_COMMON"], magics[magic]) if magic != "INVENTORY" else struct.pack("<I", magics[magic])
    for entry in entries:
        body = entry.SerializePartialToString()
        data += struct.pack("<I", len(body)) + body
    path.write_bytes(data)


def make(stage: Path, *, pages: dict[int, bytes] | None = None, comm: str = "redis", remote: str = "10.0.0.2", **more: Any) -> Path:
    """A stage with a manifest. `pages`: address -> content (whole pages) of process 1."""
    checkpoint = stage / "checkpoint"
    checkpoint.mkdir(parents=True)
    (stage / "artifacts").mkdir()
    pb = {name: load(f"images.{name}_pb2") for name in ("pstree", "core", "fdinfo", "mm", "pagemap", "fs", "mnt", "vma")}
    process = pb["pstree"].pstree_entry
    processes = (process(pid=1, ppid=0, pgid=1, sid=1, threads=[1, 3]), process(pid=2, ppid=1, pgid=1, sid=1, threads=[2]))
    image(checkpoint / "pstree.img", "PSTREE", *processes)
    image(checkpoint / "inventory.img", "INVENTORY")
    for pid, name in ((1, comm), (2, "child\x1b[31m")):
        core = pb["core"].core_entry(mtype=1)
        core.tc.comm, core.tc.task_state = name, 1 if pid == 1 else 2
        core.thread_core.creds.uid, core.thread_core.creds.gid = 999, 998
        core.ids.files_id = 1 if pid == 1 else 0
        image(checkpoint / f"core-{pid}.img", "CORE", core)
    files = []
    for number, name in ((1, "/bin/redis"), (2, "/data/dump.rdb"), (3, "/")):
        entry = pb["fdinfo"].file_entry(type=1, id=number)
        entry.reg.id, entry.reg.name, entry.reg.flags, entry.reg.pos = number, name, 0, 0
        files.append(entry)
    entry = pb["fdinfo"].file_entry(type=4, id=4)
    isk = entry.isk
    isk.id, isk.family, isk.proto, isk.state, isk.src_port, isk.dst_port, isk.type = 4, 2, 6, 1, 80, 4711, 1
    isk.src_addr.extend(struct.unpack("=I", socket.inet_aton("10.0.0.1")))
    isk.dst_addr.extend(struct.unpack("=I", socket.inet_aton(remote)))
    files.append(entry)
    image(checkpoint / "files.img", "FILES", *files)
    kinds = ((0, 1, 2), (3, 4, 4), (1, 1, 3))
    image(checkpoint / "fdinfo-1.img", "FDINFO", *(pb["fdinfo"].fdinfo_entry(id=number, flags=0, type=kind, fd=fd) for fd, kind, number in kinds))
    image(checkpoint / "fs-1.img", "FS", pb["fs"].fs_entry(cwd_id=3, root_id=3))
    mm = pb["mm"].mm_entry(exe_file_id=1, mm_start_stack=STACK + 100, mm_arg_start=STACK, mm_arg_end=STACK + 12)
    mm.mm_env_start, mm.mm_env_end = STACK + 12, STACK + 24
    mm.vmas.extend(
        pb["vma"].vma_entry(start=start, end=end, status=status, pgoff=0, shmid=0, prot=3, flags=2, fd=-1)
        for start, end, status in ((HEAP, HEAP + 64 * PAGE, 1 | 1 << 5 | 1 << 9), (STACK, STACK + 4 * PAGE, 1 | 1 << 9))
    )
    image(checkpoint / "mm-1.img", "MM", mm)
    if pages is None:
        pages = {HEAP: b"\0" * (PAGE - 3) + b"sec" + b"ret" + bytes(PAGE - 3), STACK: b"redis\0-p\x0080\0A=1\0TOKEN=x\0".ljust(PAGE, b"\0")}
    runs = [pb["pagemap"].pagemap_entry(vaddr=at, compat_nr_pages=1, nr_pages=len(data) // PAGE, flags=4) for at, data in sorted(pages.items())]
    image(checkpoint / "pagemap-1.img", "PAGEMAP", pb["pagemap"].pagemap_head(pages_id=1), *runs)
    (checkpoint / "pages-1.img").write_bytes(b"".join(data for _, data in sorted(pages.items())))
    image(checkpoint / "mountpoints-5.img", "MNTS", pb["mnt"].mnt_entry(fstype=5, mnt_id=1, root_dev=1, parent_mnt_id=0, flags=0, root="/",
                                                                       mountpoint="./data", source="tmpfs", options=""))  # fmt: skip
    config = {"id": CONTAINER, "name": "web", "rootfsImageID": "d" * 64, "rootfsImageName": "redis", "runtime": "crun"}
    (stage / "config.dump").write_text(json.dumps(config))
    spec = {"annotations": {"io.container.manager": "libpod"}, "process": {"env": ["A=1", f"B={comm}"]}}
    (stage / "spec.dump").write_text(json.dumps(spec))
    seal(stage, **more)
    return stage


def seal(stage: Path, **more: Any) -> Manifest:
    """Write the manifest of what is there."""
    made = Manifest("a" * 16, "web", "podman", CONTAINER, 1.5, generation=1, digests=layout.digest_members(stage), **more)
    (stage / layout.MANIFEST).write_bytes(manifest.dumps(made))
    return made
