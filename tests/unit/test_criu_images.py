"""CRIU images written with pycriu's own classes, read by ours; damaged ones are refused."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest

from ckpt.criu import images, netlock
from ckpt.criu.bindings import load
from ckpt.errors import ArchiveInvalid, FeatureMissing

try:
    magics = load("images.magic").by_name
except FeatureMissing:
    pytest.skip("pycriu is not installed", allow_module_level=True)


def write(path: Path, magic: str, *entries: Any, second: bool = True) -> None:
    data = struct.pack("<I", magics["IMG_SERVICE" if magic == "STATS" else "IMG_COMMON"]) if second else b""
    data += struct.pack("<I", magics[magic])
    for entry in entries:
        body = entry.SerializePartialToString()
        data += struct.pack("<I", len(body)) + body
    path.write_bytes(data)


def pstree(folder: Path, *rows: tuple[int, int, int, list[int]]) -> None:
    kind = load("images.pstree_pb2").pstree_entry
    write(folder / "pstree.img", "PSTREE", *(kind(pid=pid, ppid=ppid, pgid=pid, sid=sid, threads=t) for pid, ppid, sid, t in rows))


def core(folder: Path, pid: int, comm: str) -> None:
    entry = load("images.core_pb2").core_entry(mtype=1)
    entry.tc.comm = comm
    for name in ("task_state", "exit_code", "personality", "flags", "blk_sigset"):
        setattr(entry.tc, name, 0)
    # Partial on purpose: x86's registers do not matter here.
    write(folder / f"core-{pid}.img", "CORE", entry)


def tcp(state: int, source: tuple[str, int], destination: tuple[str, int]) -> Any:
    entry = load("images.fdinfo_pb2").file_entry(type=4, id=1)
    isk = entry.isk
    for name in ("id", "ino", "type", "flags", "backlog"):
        setattr(isk, name, 1)
    isk.family, isk.proto, isk.state = 2, 6, state
    isk.src_port, isk.dst_port = source[1], destination[1]
    isk.src_addr.extend(struct.unpack("=I", socket.inet_aton(source[0])))
    isk.dst_addr.extend(struct.unpack("=I", socket.inet_aton(destination[0])))
    isk.fown.uid = isk.fown.euid = isk.fown.signum = isk.fown.pid_type = isk.fown.pid = 0
    isk.opts.so_sndbuf = isk.opts.so_rcvbuf = 1
    isk.opts.so_snd_tmo_sec = isk.opts.so_snd_tmo_usec = isk.opts.so_rcv_tmo_sec = isk.opts.so_rcv_tmo_usec = 0
    return entry


def test_process_tree(tmp_path: Path) -> None:
    pstree(tmp_path, (10, 0, 10, [10, 12]), (11, 10, 10, [11]))
    core(tmp_path, 10, "redis\x1b[31m")
    tree = images.process_tree(tmp_path)
    assert [(p.pid, p.ppid, p.threads) for p in tree] == [(10, 0, 2), (11, 10, 1)]
    assert tree[0].comm == "redis?[31m" and tree[1].comm == "?"
    assert images.all_ids(tmp_path) == {10, 11, 12}


def test_open_kinds(tmp_path: Path) -> None:
    pstree(tmp_path, (10, 0, 9, [10]))
    write(tmp_path / "files.img", "FILES", tcp(10, ("0.0.0.0", 80), ("0.0.0.0", 0)), tcp(7, ("0.0.0.0", 0), ("0.0.0.0", 0)))
    kinds = images.open_kinds(tmp_path)
    assert not kinds.tcp_established and kinds.listening_ports == (80,) and kinds.shell_job and not kinds.file_locks
    write(tmp_path / "files.img", "FILES", tcp(1, ("10.0.0.1", 80), ("10.0.0.2", 4711)))
    lock = load("images.file_lock_pb2").file_lock_entry(flag=1, type=1, pid=10, fd=3, start=0, len=0)
    write(tmp_path / "filelocks.img", "FILE_LOCKS", lock)
    kinds = images.open_kinds(tmp_path)
    assert kinds.tcp_established and kinds.file_locks
    assert kinds.connections == (images.Connection(2, "10.0.0.1", 80, "10.0.0.2", 4711),)


def test_stats_inventory_and_memory(tmp_path: Path) -> None:
    entry = load("images.stats_pb2").stats_entry()
    for number, name in enumerate(("freezing_time", "frozen_time", "memdump_time", "memwrite_time", "pages_scanned", "pages_written"), 1):
        setattr(entry.dump, name, number)
    entry.dump.pages_skipped_parent = entry.dump.pages_lazy = 0
    write(tmp_path / "stats-dump", "STATS", entry)
    found = images.stats(tmp_path / "stats-dump")
    assert (found.freezing_time_us, found.frozen_time_us, found.pages_written) == (1, 2, 6)
    inventory = load("images.inventory_pb2").inventory_entry
    write(tmp_path / "inventory.img", "INVENTORY", inventory(img_version=2, dump_criu_run_id="20b6facd-a4a7"), second=False)
    assert images.run_id(tmp_path) == "20b6facd-a4a7"
    write(tmp_path / "inventory.img", "INVENTORY", inventory(img_version=2, dump_criu_run_id="x; flush ruleset"), second=False)
    with pytest.raises(ArchiveInvalid):
        images.run_id(tmp_path)
    (tmp_path / "pages-1.img").write_bytes(bytes(8192))
    (tmp_path / "pages-2.img").symlink_to("/etc/passwd")
    assert images.memory_bytes(tmp_path) == 8192


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"garbage" * 9,
        lambda data: data[:-1],
        lambda data: data + b"\xff\xff\xff\x7f",
        lambda data: data + b"\x04",
        lambda data: data + struct.pack("<I", 4) + b"\xff\xff\xff\xff",
        lambda data: data[:8],
    ],
)
def test_damaged(tmp_path: Path, damage: Any) -> None:
    pstree(tmp_path, (10, 0, 10, [10]))
    path = tmp_path / "pstree.img"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ArchiveInvalid):
        images.process_tree(tmp_path)


def test_no_links_fifos_or_giants(tmp_path: Path) -> None:
    path = tmp_path / "pstree.img"
    with pytest.raises(ArchiveInvalid):
        images.process_tree(tmp_path)
    path.symlink_to("/etc/passwd")
    with pytest.raises(ArchiveInvalid):
        images.process_tree(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArchiveInvalid):
        images.process_tree(tmp_path)
    path.unlink()
    with open(path, "wb") as out:
        out.truncate(images.FILE_CAP_BYTES + 1)
    with pytest.raises(ArchiveInvalid):
        images.process_tree(tmp_path)
    with pytest.raises(ArchiveInvalid):
        images.memory_bytes(tmp_path / "nowhere")


def test_netlock_finds_only_the_rules_of_its_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = "/usr/sbin/iptables -A INPUT -s {}/32 -d {}/32 -p tcp -m mark ! --mark 0xc114 -m tcp --sport {} --dport {} -j DROP"
    mine = {rule.format("10.0.0.2", "10.0.0.1", 4711, 80), rule.format("10.0.0.1", "10.0.0.2", 80, 4711)}
    monkeypatch.setattr(netlock, "rules", lambda: frozenset(mine | {rule.format("10.0.0.3", "10.0.0.1", 4711, 80)}))
    monkeypatch.setattr(netlock, "tables", lambda: frozenset({"CRIU-abc", "CRIU-other"}))
    pstree(tmp_path, (10, 0, 10, [10]))
    write(tmp_path / "files.img", "FILES", tcp(1, ("10.0.0.1", 80), ("10.0.0.2", 4711)))
    inventory = load("images.inventory_pb2").inventory_entry
    write(tmp_path / "inventory.img", "INVENTORY", inventory(img_version=2, dump_criu_run_id="abc"), second=False)
    assert netlock.locks_of(tmp_path) == mine | {"CRIU-abc"}
