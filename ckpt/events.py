"""What happens during an operation, as frozen events. Layers below `cli/` emit, only `cli/render/` shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StepStarted:
    """A named step of a plan begins (`check`, `container image`, `volumes`, `dump`, `switchover`)."""

    target: str
    step: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class StepDone:
    """The step ended well; `detail` is what a person wants to know of it ("120 MiB, already there")."""

    target: str
    step: str
    detail: str = ""
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The step failed; the error itself is raised."""

    target: str
    step: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class BytesMoved:
    """Progress of a transfer: bytes so far and, when known, in all; of a round (from 1) of pre-copy also how fast the workload writes."""

    target: str
    step: str
    done_bytes: int
    total_bytes: int | None = None
    round: int | None = None
    dirty_bytes_s: float | None = None


@dataclass(frozen=True, slots=True)
class Frozen:
    """The workload stopped running (CLOCK_MONOTONIC, seconds)."""

    target: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Thawed:
    """The workload runs again, here or on the destination; `frozen_s` is the length of the pause."""

    target: str
    frozen_s: float


@dataclass(frozen=True, slots=True)
class Notice:
    """Something worth a line that is no failure: a chosen option, a lesser guarantee, a cleaned leftover."""

    target: str
    text: str
    warning: bool = False


@dataclass(frozen=True, slots=True)
class RoundDone:
    """A round of pre-copy: what was read of the memory, what of it had changed and was sent, in which time."""

    target: str
    number: int
    scanned_bytes: int
    sent_bytes: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class Figures:
    """What the job's record keeps, by name, units in the names: its id (`job`), versions, bytes by kind."""

    target: str
    values: dict[str, Any]


Event = StepStarted | StepDone | StepFailed | BytesMoved | Frozen | Thawed | Notice | RoundDone | Figures
Emit = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An `Emit` that drops everything."""
