"""What prune keeps, and why."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from ckpt.errors import UsageError
from ckpt.model import Checkpoint, Entry, Manifest
from ckpt.ops.rewind import parse_time
from ckpt.store.retention import Rules, decide

HOUR, DAY = 3600.0, 86400.0
NOON = time.mktime((2026, 11, 20, 12, 30, 0, 0, 0, -1))


def made(number: int, age_s: float, name: str = "web", *, pinned: bool = False, tags: tuple[str, ...] = (), size: int = 10) -> Checkpoint:
    manifest = Manifest(id=f"{name}{number}", name=name, engine="fake", container_id="c", created_s=NOON - age_s, generation=number, size_bytes=size)
    return Checkpoint(manifest, Path("/nowhere"), Entry(name, number, size, pinned=pinned, tags=tags))


def kept(checkpoints: list[Checkpoint], *, only: str | None = None, **rules: object) -> list[str]:
    verdicts = decide(
        checkpoints,
        Rules(**rules),  # type: ignore[arg-type]
        now_s=NOON,
        footprint=lambda some: sum(c.manifest.size_bytes for c in some),
        judged=lambda c: only is None or c.manifest.name == only,
    )
    assert all(v.reasons for v in verdicts if not v.keep)
    return [v.checkpoint.ref for v in verdicts if v.keep]


def test_the_last_of_each_name() -> None:
    many = [made(n, DAY * (9 - n)) for n in range(1, 9)] + [made(1, 0, "db")]
    assert kept(many, keep_last=3) == ["db@1", "web@6", "web@7", "web@8"]
    assert kept(many, keep_last=3, only="db") == ["db@1", *(f"web@{n}" for n in range(1, 9))]


def test_periods_keep_the_newest_of_each() -> None:
    many = [made(n, HOUR / 4 * (40 - n)) for n in range(1, 41)]  # four an hour; the last one now, at half past
    hourly = kept(many, keep_hourly=3)
    assert hourly == ["web@33", "web@37", "web@40"]  # 10:45, 11:45, 12:30
    assert kept(many, keep_daily=2) == ["web@40"]
    days = [made(n, DAY * (20 - n)) for n in range(1, 21)]
    assert kept(days, keep_daily=2) == ["web@19", "web@20"]
    assert kept(days, keep_weekly=2) == ["web@15", "web@20"]  # the 20th of November 2026 is a Friday; the week before ended on the 15th
    assert kept(days, keep_monthly=2) == ["web@20"]
    assert kept(days, keep_daily=2, keep_last=3) == ["web@18", "web@19", "web@20"]


def test_pins_tags_age_and_the_newest_stay() -> None:
    many = [made(1, 9 * DAY, pinned=True), made(2, 8 * DAY, tags=("good",)), made(3, 3 * DAY), made(4, 2.5 * DAY)]
    assert kept(many, keep_within_s=DAY) == ["web@1", "web@4"]
    assert kept(many, keep_within_s=2.7 * DAY, keep_tags=("good",)) == ["web@1", "web@2", "web@4"]


def test_the_size_takes_the_oldest_but_never_the_last() -> None:
    many = [made(1, 5 * DAY, pinned=True), made(2, 4 * DAY), made(3, 3 * DAY), made(1, 9 * DAY, "db"), made(2, 1 * DAY, "db")]
    assert kept(many, max_size_bytes=50) == ["db@1", "db@2", "web@1", "web@2", "web@3"]
    assert kept(many, max_size_bytes=45) == ["db@2", "web@1", "web@2", "web@3"]
    assert kept(many, max_size_bytes=30) == ["db@2", "web@1", "web@3"]
    assert kept(many, max_size_bytes=0) == ["db@2", "web@1", "web@3"]


def test_without_a_rule_nothing_goes() -> None:
    many = [made(n, DAY * n) for n in range(1, 4)]
    assert len(kept(many)) == 3


@pytest.mark.parametrize(
    ("text", "back_s"),
    [("12:00", 30 * 60), ("13:00", 23.5 * HOUR), ("2026-11-20 12:29:30", 30), ("2026-11-20T12:29", 60), ("20m ago", 1200), ("2d", 2 * DAY)],
)
def test_times(text: str, back_s: float) -> None:
    assert parse_time(text, NOON) == NOON - back_s


@pytest.mark.parametrize("text", ["", "25:00", "12:61", "tomorrow", "2026-13-01", "2030-01-01", "-5m", "12:00 ago", "99999999999s"])
def test_bad_times(text: str) -> None:
    with pytest.raises(UsageError):
        parse_time(text, NOON)
