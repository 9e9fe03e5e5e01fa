"""Which checkpoints are kept: rules in the manner of borg's and restic's `prune`, decided without touching anything."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from ckpt.model import Checkpoint


@dataclass(frozen=True, slots=True)
class Rules:
    """What to keep, of each name for itself. A rule that is 0, None or empty keeps nothing; several rules keep what any of them keeps.

    `keep_hourly=3` keeps the newest checkpoint of each of the three latest hours that have one (daily, weekly, monthly likewise; local time).
    """

    keep_last: int = 0
    keep_hourly: int = 0
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0
    keep_within_s: float | None = None
    keep_tags: tuple[str, ...] = ()
    max_size_bytes: int | None = None
    """Then, of the whole store, the oldest go until it is no larger."""

    @property
    def selects(self) -> bool:
        """Whether there is a rule that says what to keep; `max_size_bytes` alone starts from everything."""
        return any((self.keep_last, self.keep_hourly, self.keep_daily, self.keep_weekly, self.keep_monthly, self.keep_tags)) or (
            self.keep_within_s is not None
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one checkpoint, and why."""

    checkpoint: Checkpoint
    keep: bool
    reasons: tuple[str, ...]


_PERIODS: Final[tuple[tuple[str, str], ...]] = (("hourly", "%Y-%m-%d %H:00"), ("daily", "%Y-%m-%d"), ("weekly", "%G week %V"), ("monthly", "%Y-%m"))

Footprint = Callable[[Sequence[Checkpoint]], int]
"""How many bytes of the disk these checkpoints need together; what they share counts once."""


def when_s(checkpoint: Checkpoint) -> float:
    """When the workload was frozen; for one that does not say, when it came into the store."""
    return checkpoint.manifest.created_s or checkpoint.entry.stored_s


def decide(
    checkpoints: Iterable[Checkpoint], rules: Rules, *, now_s: float, footprint: Footprint, judged: Callable[[Checkpoint], bool]
) -> list[Verdict]:
    """Judge every checkpoint, oldest first within a name.

    The newest of each name and what is pinned is always kept: often it is the only copy of what a container was.

    Args:
        judged: whether the rules are asked for at all; others stay. Their size counts.
    """
    by_name: dict[str, list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        by_name.setdefault(checkpoint.manifest.name, []).append(checkpoint)
    verdicts: list[Verdict] = []
    for _, group in sorted(by_name.items()):
        group.sort(key=lambda c: (when_s(c), c.manifest.generation))
        verdicts += _by_rules(group, rules, now_s) if judged(group[0]) else [Verdict(c, True, ("not asked for",)) for c in group]
    return verdicts if rules.max_size_bytes is None else _by_size(verdicts, rules.max_size_bytes, footprint, judged)


def _by_rules(group: Sequence[Checkpoint], rules: Rules, now_s: float) -> list[Verdict]:
    reasons: dict[str, list[str]] = {c.manifest.id: [] for c in group}
    newest_first = list(reversed(group))
    reasons[newest_first[0].manifest.id].append("the newest")
    for checkpoint in newest_first[: rules.keep_last]:
        reasons[checkpoint.manifest.id].append(f"one of the last {rules.keep_last}")
    for period, form in _PERIODS:
        seen: list[str] = []
        wanted: int = getattr(rules, f"keep_{period}")
        for checkpoint in newest_first if wanted else ():
            bucket = time.strftime(form, time.localtime(when_s(checkpoint)))
            if bucket not in seen:
                if len(seen) == wanted:
                    break
                seen.append(bucket)
                reasons[checkpoint.manifest.id].append(f"{period}: {bucket}")
    for checkpoint in group:
        why = reasons[checkpoint.manifest.id]
        if checkpoint.entry.pinned:
            why.append("pinned")
        if rules.keep_within_s is not None and now_s - when_s(checkpoint) <= rules.keep_within_s:
            why.append("new enough")
        why += [f"tag {tag}" for tag in rules.keep_tags if tag in checkpoint.entry.tags]
    if not rules.selects:
        return [Verdict(c, True, tuple(reasons[c.manifest.id])) for c in group]
    return [Verdict(c, bool(reasons[c.manifest.id]), tuple(reasons[c.manifest.id]) or ("no rule keeps it",)) for c in group]


def _by_size(verdicts: list[Verdict], limit_bytes: int, footprint: Footprint, judged: Callable[[Checkpoint], bool]) -> list[Verdict]:
    """Let the oldest go until the rest is no larger than the limit; the newest of a name and what is pinned stay even so."""
    newest = {v.checkpoint.manifest.name: v.checkpoint.manifest.id for v in verdicts}
    kept = [v.checkpoint for v in verdicts if v.keep]
    gone: set[str] = set()
    for checkpoint in sorted(kept, key=when_s):
        left = [c for c in kept if c.manifest.id not in gone]
        if footprint(left) <= limit_bytes:
            break
        if not checkpoint.entry.pinned and newest[checkpoint.manifest.name] != checkpoint.manifest.id and judged(checkpoint):
            gone.add(checkpoint.manifest.id)
    return [Verdict(v.checkpoint, False, ("the store is over --max-size",)) if v.checkpoint.manifest.id in gone else v for v in verdicts]
