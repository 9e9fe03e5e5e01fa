"""What an operation says when it is over."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckpt.errors import CkptError
from ckpt.model import Checkpoint, Container, JobRecord


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went with one target. Exactly one of `ok` and `error` holds.

    Attributes:
        target: what the user typed.
        checkpoint: what was made, used or removed.
        container: the container as it is now, where that is known.
        warnings: what went another way than asked, without failing.
        stats: figures by name, units in the names (`freeze_s`, `size_bytes`, `pages_written`, ...).
        record: what the history keeps of it (migrations).
    """

    target: str
    ok: bool
    checkpoint: Checkpoint | None = None
    container: Container | None = None
    error: CkptError | None = None
    warnings: tuple[str, ...] = ()
    stats: dict[str, float | int | str] = field(default_factory=dict)
    record: JobRecord | None = None


def failure(target: str, error: CkptError) -> Outcome:
    """The outcome of a target that failed."""
    return Outcome(target, False, error=error)
