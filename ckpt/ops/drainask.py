"""What the other hosts say of what a drain moved to them: the journal and the jobs tell only how it went there.

One call for all of a host. Process trees have other ids there, of which nobody here knows: they are not asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from ckpt.errors import CkptError, EngineUnavailable, PeerVersion
from ckpt.ops import parallel
from ckpt.ops.draining import DrainRequest
from ckpt.peer import client
from ckpt.store.drains import Drain, DrainItem
from ckpt.transports.https_peer import Access

_WIDTH: Final = 8


@dataclass(frozen=True, slots=True)
class Said:
    """`there`, as it came; `changed`: it is not, or has another name; `unknown`: nobody could be asked. And why, or what else is to be said."""

    state: Literal["there", "changed", "unknown"]
    reason: str = ""
    error: CkptError | None = None
    """Why nobody could be asked."""


@dataclass(frozen=True, slots=True)
class Sent:
    """What was moved: as it was planned, where it is, and its id there."""

    item: DrainItem
    destination: str
    container_id: str


def sent(journal: Drain, states: Sequence[str] = ("moved",)) -> list[Sent]:
    """What is away by the journal."""
    found = journal.states()
    return [
        Sent(item, str(facts.get("destination") or item.destination), str(facts.get("container_id") or item.container_id))
        for item in journal.items
        if found[item.target].state in states and (facts := found[item.target].facts) is not None
    ]


def ask(sent: Sequence[Sent], *, ssh_options: Sequence[str] = (), access: DrainRequest | None = None) -> dict[str, Said]:
    """Ask all hosts at once; by target. Never raises for a host's sake.

    Args:
        access: the drain's request: how those behind `https://` are reached.
    """
    hosts: dict[str, list[Sent]] = {}
    for one in sent:
        hosts.setdefault(one.destination, []).append(one)

    def one_host(destination: str, there: list[Sent]) -> dict[str, Said]:
        return _ask(destination, there, ssh_options, access.access_to(destination) if access is not None else None)

    works = {destination: lambda name=destination: one_host(name, hosts[name]) for destination in hosts}
    found: dict[str, Said] = {}
    for destination, result in parallel.run_all(works, width=_WIDTH).items():
        if isinstance(result, CkptError):
            said = Said("unknown", f"{destination} could not be asked: {result.message}", result)
            found.update({one.item.target: said for one in hosts[destination]})
        elif isinstance(result, BaseException):
            raise result
        else:
            found.update(result)
    return found


def _ask(destination: str, there: list[Sent], ssh_options: Sequence[str], access: Access | None) -> dict[str, Said]:
    asked = [one for one in there if one.item.engine != "process"]
    found = {one.item.target: Said("there", "a process tree, which is not asked for") for one in there if one.item.engine == "process"}
    if not asked:
        return found
    words = [{"engine": one.item.engine, "id": one.container_id, "name": one.item.name} for one in asked]
    with client.connect(destination, ssh_options=ssh_options, access=access, purpose="check") as peer:
        answers = peer.call("facts", {"workloads": words}).get("workloads")
        host = peer.hostname
    if not isinstance(answers, list) or len(answers) != len(asked):
        raise PeerVersion("its ckpt is too old to say", hint="install the same version of ckpt on both hosts")
    return {**found, **{one.item.target: _said(one, answer, host) for one, answer in zip(asked, answers, strict=True)}}


def _said(one: Sent, answer: Any, host: str) -> Said:
    if not isinstance(answer, dict) or not isinstance(answer.get("state"), str):
        error = EngineUnavailable(f"{one.item.engine} on {host} cannot be used")
        return Said("unknown", f"{host} could not say: {error.message}", error)
    if not answer["state"]:
        more = f"; another one is called {one.item.name} there" if answer.get("name_taken") else ""
        return Said("changed", f"it is not on {host} any more{more}")
    if answer.get("name") != one.item.name:
        how = f"to bring it back all the same, run there: ckpt migrate {one.container_id[:12]} HOST"
        return Said("changed", f"it has another name on {host}: {how}")
    running = answer["state"] in ("running", "paused")
    return Said("there", "" if running else f"it is {answer['state'][:40]} on {host}")
