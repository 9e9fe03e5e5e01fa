"""Several dumps held at one instant, for what saves or moves a group (see group)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Final, Protocol

from ckpt.criu import tree
from ckpt.engines.registry import NamedEngine
from ckpt.errors import DumpFailed
from ckpt.host import freezer
from ckpt.host.cgroup import Knob, NotOwn
from ckpt.model import Container
from ckpt.ops import faults, knobs, together
from ckpt.store.job import Job

STOP_LIMIT_S: Final = 60.0
"""How long CRIU may take to freeze those members that have no cgroup of their own."""
_POLL_S: Final = 0.001


class Member(Protocol):
    """One that is about to be dumped."""

    @property
    def engine(self) -> NamedEngine: ...
    @property
    def container(self) -> Container: ...
    @property
    def journal(self) -> Job: ...

    def hold(self, *, stopped_at_s: float | None = None) -> None:
        """Dump it, held; `stopped_at_s`: its cgroup is frozen since then (time.monotonic())."""


def hold(name: str, members: Mapping[str, Member], do: Callable[[Mapping[str, Callable[[], None]]], None]) -> tuple[freezer.Moment, list[Knob]]:
    """Freeze all members of the group `name` at one instant and dump them, held.

    Those with a cgroup of their own, of engines that dump what is frozen, are stopped by it. The others are stopped by CRIU as it
    begins to dump them, so those begin first, and the cgroups are frozen as soon as they stand still.

    Args:
        do: runs works, by label, side by side, and raises when one failed.

    Returns:
        When that was, and the cgroups that are to be thawed when the members go on; the members' journals have them too.
    """
    cgroups: list[Knob] = []
    slow: dict[str, Member] = {}
    for label, member in members.items():
        knob = _knob(member)
        if knob is None:
            slow[label] = member
        else:
            knobs.journal(member.journal, knob)
            cgroups.append(knob)
    faults.point("group-freezing")
    stopped, over = threading.Event(), threading.Event()
    ended: set[str] = set()
    moments: list[freezer.Moment] = []

    def dump_slow(label: str, member: Member) -> None:
        try:
            member.hold()
        finally:
            ended.add(label)

    def conduct() -> None:
        try:
            times = _wait_stopped(slow, ended)
            frozen = freezer.freeze(cgroups) if cgroups else None
            first = min([*(before for before, _ in times), *([frozen.first_s] if frozen else [])])
            last = max([*(seen for _, seen in times), *([frozen.last_s] if frozen else [])])
            moments.append(freezer.Moment(first, last))
            stopped.set()
        except freezer.NotFrozen as error:
            raise DumpFailed(f"the group {name} cannot be frozen: {error}") from error
        finally:
            over.set()

    def dump_frozen(member: Member) -> None:
        over.wait(STOP_LIMIT_S + freezer.LIMIT_S)
        if not stopped.is_set():
            raise together.NotAlone("the group could not be frozen")
        member.hold(stopped_at_s=moments[0].first_s)

    works: dict[str, Callable[[], None]] = {label: partial(dump_slow, label, member) for label, member in slow.items()}
    works[""] = conduct
    works |= {label: partial(dump_frozen, member) for label, member in members.items() if label not in slow}
    do(works)
    return moments[0], cgroups


def _knob(member: Member) -> Knob | None:
    """What freezes a member by itself; None when that cannot be, and CRIU is to do it."""
    if not member.engine.probe().takes_frozen or not member.container.pid:
        return None
    try:
        return freezer.knob_of(tree.pids(member.container.pid))
    except (NotOwn, OSError):
        return None


def _wait_stopped(members: Mapping[str, Member], ended: Collection[str]) -> list[tuple[float, float]]:
    """Wait until CRIU has stopped these; of each, when it was last seen to run and first seen to stand still.

    Raises:
        freezer.NotFrozen: not within STOP_LIMIT_S, or its dump failed before.
    """
    ran = {label: time.monotonic() for label in members}
    still: dict[str, float] = {}
    deadline = time.monotonic() + STOP_LIMIT_S
    while len(still) < len(members):
        for label, member in members.items():
            if label in still:
                continue
            over = label in ended
            now = time.monotonic()
            if member.journal.held_path.exists() or tree.status(member.container.pid or 0).get("TracerPid", "0") != "0":
                still[label] = now
            elif over:
                raise freezer.NotFrozen(f"{label} could not be dumped")
            elif now > deadline:
                raise freezer.NotFrozen(f"{label} did not stop within {STOP_LIMIT_S:g} s")
            else:
                ran[label] = now
        time.sleep(_POLL_S)
    return [(ran[label], still[label]) for label in members]
