"""Numbers and texts as people read them."""

from __future__ import annotations

import time

_STEPS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def size(count_bytes: float) -> str:
    """`1.31 GiB`, `178 MiB`: three digits that matter."""
    value, unit = scaled(count_bytes)
    return f"{value} {unit}"


def scaled(count_bytes: float, *, unit: str | None = None) -> tuple[str, str]:
    """A size as (number, unit); with `unit` given in that unit."""
    value = float(count_bytes)
    step = 0
    while (value >= 1000 and unit is None or unit is not None and _STEPS[step] != unit) and step < len(_STEPS) - 1:
        value /= 1024
        step += 1
    if step == 0:
        return str(round(value)), _STEPS[0]
    digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text), _STEPS[step]


def part(done_bytes: int, total_bytes: int | None) -> str:
    """`1.3 of 2.0 GiB`, both in the same unit."""
    if total_bytes is None:
        return size(done_bytes)
    _, unit = scaled(total_bytes)
    if unit == "B":
        return f"{done_bytes} of {total_bytes} B"
    factor = 1024.0 ** _STEPS.index(unit)
    return f"{done_bytes / factor:.1f} of {total_bytes / factor:.1f} {unit}"


def duration(seconds: float) -> str:
    """`212 ms`, `7.4 s`, `3 min 20 s`."""
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} days"


def when(seconds: float) -> str:
    """A time of the clock, local, to the second; empty for an unknown one."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds > 0 else ""


def clean(text: str) -> str:
    """One line without control characters: names and logs come from containers and archives, terminals obey escapes."""
    return "".join(c if c.isprintable() else " " if c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
