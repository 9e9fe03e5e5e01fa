"""Keeps packets for a container away until its sockets are there again.

An engine gives a restored container its address before CRIU begins. A packet of an open connection that comes in between finds
no socket, and the kernel answers with a reset (RFC 9293, 3.10.7.1): the peer gives the connection up. So the host drops what is
for those addresses, also between the ports of its bridges, until CRIU's own lock is there; the peer sends it again.

A container with a macvlan or ipvlan takes its packets from the network card before the host's own rules see them: for those the cards'
ingress is watched. There ARP for the addresses is dropped too, and their announcements on the cards' egress (the kernel announces an
interface that comes up): until it is let run, the address of a container that moves is at home on the other host.

It needs nft (nftables 0.9 or later; for the egress 1.0.1 and Linux 5.16). Without it nothing is blocked and the short gap stays.
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
_ARPHRD_ETHER: Final = "1"
_CARDS_CAP: Final = 64
_CLASS_NET: Final = Path("/sys/class/net")


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
    tables = []
    for family, hooks in _CHAINS.items():
        chains = "".join(f"chain {hook} {{ type filter hook {hook} priority -350; {'; '.join(rules)}; }}\n" for hook in hooks)
        tables.append(f"table {family} {_table(job_dir)} {{\n{chains}}}\n")
    arps = [f"arp daddr ip {address} drop" for address in parsed if address.version == 4]
    announced = [f"arp saddr ip {address} drop" for address in parsed if address.version == 4]
    for hook, wanted in (("ingress", [*rules, *arps]), ("egress", announced)):
        if wanted:
            tables.append(f"table netdev {_table(job_dir)}-{hook} {{\n{_on_cards(hook, wanted)}}}\n")
    return _load(nft, tables)


def unblock(job_dir: Path) -> None:
    """Undo `block`. Idempotent; never raises."""
    marker = job_dir / MARKER
    if not marker.exists():
        return
    name = _table(job_dir)
    tables = [*(f"{family} {name}" for family in _CHAINS), f"netdev {name}-ingress", f"netdev {name}-egress"]
    # One that is not there must not keep the others: made, if need be, and deleted.
    _load(which("nft") or "nft", [f"add table {table}\ndelete table {table}\n" for table in tables])
    marker.unlink(missing_ok=True)


def _load(nft: str, texts: list[str]) -> bool:
    """Load all at once, which is quick, or those that this kernel takes; whether any was taken."""
    try:
        if run([nft, "-f", "-"], input="".join(texts).encode(), timeout_s=_LIMIT_S, check=False).ok:
            return True
        return len(texts) > 1 and any([_load(nft, [text]) for text in texts])
    except CommandFailed:
        return False


def _on_cards(hook: str, rules: list[str]) -> str:
    """A chain for every Ethernet interface of this network namespace."""
    names = [entry.name for entry in sorted(_CLASS_NET.iterdir()) if _is_card(entry)][:_CARDS_CAP]
    return "".join(
        f'chain {hook}{number} {{ type filter hook {hook} device "{name}" priority -350; {"; ".join(rules)}; }}\n'
        for number, name in enumerate(names)
    )


def _is_card(entry: Path) -> bool:
    try:
        return (entry / "type").read_text().strip() == _ARPHRD_ETHER and '"' not in entry.name
    except OSError:
        return False


def _table(job_dir: Path) -> str:
    return f"ckpt-{job_dir.name}"
