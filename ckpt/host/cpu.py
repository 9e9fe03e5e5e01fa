"""How busy the processors of this host are (/proc/stat, proc(5))."""

from __future__ import annotations

from pathlib import Path
from typing import Final

STAT: Final = Path("/proc/stat")


class IdleShare:
    """The idle part of all processors' time since it was asked last."""

    def __init__(self, stat: Path = STAT) -> None:
        self._stat = stat
        self._seen = self._read()

    def __call__(self) -> float:
        """0 (all busy) to 1 (all idle); 1 where the kernel does not tell, or too little time has passed."""
        idle, total = self._read()
        before_idle, before_total = self._seen
        self._seen = idle, total
        return (idle - before_idle) / (total - before_total) if total > before_total else 1.0

    def _read(self) -> tuple[int, int]:
        try:
            with self._stat.open() as file:
                fields = [int(field) for field in file.readline().split()[1:9]]
        except (OSError, ValueError):
            return 0, 0
        # user nice system idle iowait irq softirq steal; what waits for a disk is idle.
        return (fields[3] + fields[4], sum(fields)) if len(fields) >= 5 else (0, 0)
