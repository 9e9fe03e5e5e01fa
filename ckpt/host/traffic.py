"""Keeps packets for a container away until its sockets are there again.

An engine gives a restored container its address before CRIU begins. A packet of an open connection that comes in between finds
no socket, and the kernel answers with a reset (RFC 9293, 3.10.7.1): the peer gives the connection up. So the host drops what is
for those addresses, also between the ports of its bridges, until CRIU's own lock is there; the peer sends it again.

It needs nft (nftables 0.9 or later). Without it nothing is blocked and the short gap stays.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ckpt.host.run import CommandFailed, run, which

MARKER: Final = "traffic"
_CHAINS: Final = {"inet": ("forward", "output"), "bridge": ("forward", "output")}
_LIMIT_S: Final = 10.0


def block(job_dir: Path, addresses: Iterable[str]) -> bool:
    """Drop packets for these addresses until `unblock(job_dir)`; the marker file in `job_dir` says that there is something to undo.

    Returns:
        Whether something is blocked now.
    """
    parsed = [ipaddress.ip_address(address) for address in addresses]
    rules = [f"ip{'6' if address.version == 6 else ''} daddr {address} drop" for address in parsed]
    nft = which("nft")
    if not rules or nft is None:
        return False
    (job_dir / MARKER).touch()
    done = False
    for family, hooks in _CHAINS.items():
        chains = "".join(f"chain {hook} {{ type filter hook {hook} priority -350; {'; '.join(rules)}; }}\n" for hook in hooks)
        text = f"table {family} {_table(job_dir)} {{\n{chains}}}\n"
        try:
            done = run([nft, "-f", "-"], input=text.encode(), timeout_s=_LIMIT_S, check=False).ok or done
        except CommandFailed:
            continue
    return done


def unblock(job_dir: Path) -> None:
    """Undo `block`. Idempotent; never raises."""
    marker = job_dir / MARKER
    if not marker.exists():
        return
    for family in _CHAINS:
        try:
            run([which("nft") or "nft", "delete", "table", family, _table(job_dir)], timeout_s=_LIMIT_S, check=False)
        except CommandFailed:
            continue
    marker.unlink(missing_ok=True)


def _table(job_dir: Path) -> str:
    return f"ckpt-{job_dir.name}"
