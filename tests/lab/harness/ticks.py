"""What a workload's tick file tells: did it go on without a reset, and how long was the longest gap."""

from __future__ import annotations

from dataclasses import dataclass

from .host import Host


@dataclass(frozen=True, slots=True)
class Ticks:
    """The lines "tick wallclock_ns" that counter, memhog and echoclient write."""

    numbers: tuple[int, ...]
    times_ns: tuple[int, ...]

    @classmethod
    def parse(cls, data: bytes) -> Ticks:
        """Read whole lines; a last line that is still being written is left out."""
        rows = [line.split() for line in data[: data.rfind(b"\n") + 1].splitlines()]
        return cls(tuple(int(row[0]) for row in rows), tuple(int(row[1]) for row in rows))

    @property
    def last(self) -> int:
        return self.numbers[-1] if self.numbers else -1

    def after(self, tick: int) -> Ticks:
        """From `tick` on (the first time that it was written)."""
        start = self.numbers.index(tick)
        return Ticks(self.numbers[start:], self.times_ns[start:])

    @property
    def longest_gap_s(self) -> float:
        """The longest time between two neighbouring ticks: downtime as the workload saw it."""
        return max((later - earlier for earlier, later in zip(self.times_ns, self.times_ns[1:], strict=False)), default=0) / 1e9

    @property
    def breaks(self) -> list[tuple[int, int]]:
        """Neighbours that are not one apart: resets, repeats (two living copies), losses. Empty when all is well."""
        pairs = zip(self.numbers, self.numbers[1:], strict=False)
        return [(earlier, later) for earlier, later in pairs if later != earlier + 1]


def read_ticks(host: Host, path: str, container: str | None = None) -> Ticks:
    """The ticks of a file of the host, or of a (running) podman container."""
    if container is None:
        return Ticks.parse(host.read_file(path))
    return Ticks.parse(host.run(["podman", "exec", container, "cat", path]).stdout.encode())
