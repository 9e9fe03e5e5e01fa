"""The locks that CRIU puts on TCP connections while it dumps, and leaves behind after a kill and after a failure.

Sources: criu/netfilter.c. With nftables a table `inet CRIU-<run id of the dump>` (before CRIU 4.1: the root's pid); with iptables
one DROP rule for each direction of each connection, recognizable by its mark 0xC114 (SOCCR_MARK).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Final

from ckpt.criu import images
from ckpt.errors import ArchiveInvalid
from ckpt.host import run

_TABLE: Final = re.compile(r"^table inet (CRIU-[0-9A-Za-z-]+)$", re.M)
_MARK: Final = re.compile(r"0x0*c114\b", re.I)
_LIMIT_S: Final = 10.0


def tables() -> frozenset[str]:
    """Names of CRIU's nftables tables in this network namespace (empty without nft)."""
    nft = run.which("nft")
    if nft is None:
        return frozenset()
    try:
        return frozenset(_TABLE.findall(run.run([nft, "list", "tables", "inet"], timeout_s=_LIMIT_S).text))
    except run.CommandFailed:
        return frozenset()


def rules() -> frozenset[str]:
    """CRIU's iptables rules (IPv4 and IPv6) as `PROGRAM -A CHAIN ...` lines."""
    found: set[str] = set()
    for name in ("iptables", "ip6tables"):
        program = run.which(name)
        if program is None:
            continue
        try:
            text = run.run([program, "-w", "-S"], timeout_s=_LIMIT_S).text
        except run.CommandFailed:
            continue
        found.update(f"{program} {line}" for line in text.splitlines() if line.startswith("-A ") and _MARK.search(line))
    return frozenset(found)


def snapshot() -> frozenset[str]:
    """Every lock that is there now, to tell later which ones are new."""
    return tables() | rules()


def remove(locks: Iterable[str]) -> list[str]:
    """Remove these locks; returns what was removed. Never raises for what is gone already."""
    done = []
    for lock in locks:
        if lock.startswith("CRIU-"):
            argv = [run.which("nft") or "nft", "delete", "table", "inet", lock]
        else:
            program, _add, *rest = shlex.split(lock)
            argv = [program, "-w", "-D", *rest]
        try:
            if run.run(argv, timeout_s=_LIMIT_S, check=False).ok:
                done.append(lock)
        except run.CommandFailed:
            continue
    return done


def locks_of(images_dir: Path, root_pid: int | None = None) -> frozenset[str]:
    """The locks that are there now and belong to the dump in `images_dir` (empty when its images do not tell)."""
    names: set[str] = set()
    connections: tuple[images.Connection, ...] = ()
    try:
        if name := images.run_id(images_dir):
            names.add(f"CRIU-{name}")
        connections = images.open_kinds(images_dir).connections
    except ArchiveInvalid:
        pass
    if root_pid is not None:
        names.add(f"CRIU-{root_pid}")
    return frozenset(tables() & names) | (_of(connections, rules()) if connections else frozenset())


def unlock(images_dir: Path, root_pid: int | None = None) -> list[str]:
    """Remove the network locks of a dump: after a migration on the source, or before a cold start."""
    return remove(locks_of(images_dir, root_pid))


def _of(connections: Iterable[images.Connection], found: Set[str]) -> frozenset[str]:
    wanted = set()
    for c in connections:
        a, b = (_plain(c.source), c.source_port), (_plain(c.destination), c.destination_port)
        wanted.update({(a, b), (b, a)})
    mine = set()
    for line in found:
        words = shlex.split(line)
        value = {words[i]: words[i + 1] for i in range(len(words) - 1) if words[i].startswith("-")}
        try:
            ends = tuple((value[ip].split("/")[0], int(value[port])) for ip, port in (("-s", "--sport"), ("-d", "--dport")))
        except (KeyError, ValueError):
            continue
        if ends in wanted:
            mine.add(line)
    return frozenset(mine)


def _plain(address: str) -> str:
    return address.removeprefix("::ffff:") if "." in address else address
