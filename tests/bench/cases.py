"""What is measured: cases, the ways to do each, and the plans that `make bench` runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["migrate", "store", "dedup", "archive", "own", "clone", "hibernate"]

MIGRATE_FLAGS: dict[str, tuple[str, ...]] = {"ckpt": (), "precopy": ("--precopy",), "postcopy": ("--postcopy",)}
"""Our ways to migrate, and their flags. One whose flag this ckpt does not know is skipped."""
WAYS: dict[Kind, tuple[str, ...]] = {
    "migrate": ("podman", *MIGRATE_FLAGS), "store": ("podman", "ckpt"), "dedup": ("ckpt",), "archive": ("ckpt",), "own": ("criu", "ckpt"),
    "hibernate": ("podman", "ckpt"), "clone": ("podman", "ckpt"),
}  # fmt: skip
GENERATIONS = 10
HIBERNATED = 20
DIRTIED = 0.05
"""Of the memory, between two checkpoints of a "dedup" case."""
SLOW_MBIT = 200
COPIES = 8


@dataclass(frozen=True, slots=True, order=True)
class Case:
    """One kind of workload and what is done with it.

    Args:
        kind: "migrate": to the other host; "store": checkpoint and restore on one host; "dedup": an archive of each kind, then checkpoint after
            checkpoint; "archive": archives written and looked into; "own": checkpoint and restore of a process of 1 MiB, beside criu alone;
            "clone": `COPIES` copies of a service (warm) that touches little of its memory; "hibernate": `HIBERNATED` containers saved and brought
            back together, podman's way one after another.
        runtime: podman's OCI runtime, or "process" for a process tree without a container.
        memory_mib: of the workload (memhog: half of it incompressible).
        dirty_mb_s: megabytes that it rewrites a second.
        link_mbit: limit of the link, in both directions; 0 for none.
    """

    kind: Kind
    runtime: Literal["crun", "runc", "process"]
    memory_mib: int
    dirty_mb_s: int = 20
    link_mbit: int = 0

    @property
    def name(self) -> str:
        link = f"-{self.link_mbit}mbit" if self.link_mbit else ""
        return f"{self.kind}-{self.runtime}-{self.memory_mib}mib-{self.dirty_mb_s}mbs{link}"


@dataclass(frozen=True, slots=True)
class Entry:
    """A case in a plan: `repeat` times each of `ways`."""

    case: Case
    ways: tuple[str, ...]
    repeat: int = 5


@dataclass(frozen=True, slots=True)
class Sizes:
    """The memory that the bars speak of, in MiB."""

    small: int = 64
    main: int = 2048
    store: int = 1024
    large: int = 4096
    clone: int = 512


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    entries: tuple[Entry, ...]
    sizes: Sizes = field(default_factory=Sizes)

    def rounds(self) -> Iterator[tuple[int, Entry]]:
        """Everything once, then everything a second time, and so on: what drifts on the machine hits all alike."""
        for number in range(max((entry.repeat for entry in self.entries), default=0)):
            for entry in self.entries:
                if number < entry.repeat:
                    yield number, entry


OWN = Case("own", "process", 1, 0)
ALL = WAYS["migrate"]
OURS = tuple(MIGRATE_FLAGS)


def quick(sizes: Sizes, name: str = "quick", repeat: tuple[int, int] = (3, 1)) -> Plan:
    """What most bars need, the dear ones once."""
    some, once = repeat
    main = Case("migrate", "crun", sizes.main)
    return Plan(
        name,
        (
            Entry(main, ALL, some),
            Entry(OWN, WAYS["own"], some),
            Entry(Case("migrate", "crun", sizes.small), ("postcopy", "precopy"), some),
            Entry(Case("migrate", "crun", sizes.main, link_mbit=SLOW_MBIT), ("podman", "precopy"), once),
            Entry(Case("store", "crun", sizes.store, 0), WAYS["store"], some),
            Entry(Case("dedup", "crun", sizes.store), WAYS["dedup"], once),
            Entry(Case("archive", "crun", sizes.large, 0), WAYS["archive"], once),
            Entry(Case("clone", "crun", sizes.clone, 0), WAYS["clone"], some),
            Entry(Case("migrate", "crun", sizes.large), OURS, once),
        ),
        sizes,
    )


def full(sizes: Sizes, repeat: int = 5) -> Plan:
    """Every bar with both runtimes, process trees, and all sizes of the plot."""
    entries: list[Entry] = []
    for runtime in ("crun", "runc"):
        entries += [
            Entry(Case("migrate", runtime, sizes.main), ALL, repeat),
            Entry(Case("migrate", runtime, sizes.small), ALL, repeat),
            Entry(
                Case("migrate", runtime, sizes.main, link_mbit=SLOW_MBIT),
                ("podman", "precopy", "postcopy") if runtime == "crun" else ("podman", "precopy"),
                repeat,
            ),
            Entry(Case("store", runtime, sizes.store, 0), WAYS["store"], repeat),
            Entry(Case("dedup", runtime, sizes.store), WAYS["dedup"], repeat),
            Entry(Case("archive", runtime, sizes.large, 0), WAYS["archive"], 1),
            Entry(Case("clone", runtime, sizes.clone, 0), WAYS["clone"], repeat),
        ]
    entries.append(Entry(OWN, WAYS["own"], repeat))
    entries += [Entry(Case("migrate", "crun", size), ALL, repeat) for size in (256, 512, 1024, sizes.large)]
    entries.append(Entry(Case("migrate", "process", sizes.main), OURS, repeat))
    entries.append(Entry(Case("store", "crun", sizes.large, 0), ("ckpt",), 1))  # for the peak of memory
    return Plan("full", tuple(entries), sizes)


HIBERNATE = Case("hibernate", "crun", 64, 0)
TRIAL_SIZES = Sizes(small=64, main=256, store=256, large=256, clone=64)


def plan(name: str) -> Plan:
    match name:
        case "full":
            return full(Sizes())
        case "hibernate":
            return Plan("hibernate", (Entry(HIBERNATE, WAYS["hibernate"], 3),), Sizes())
        case "trial":
            trial = quick(TRIAL_SIZES, "trial", (1, 1))
            more = (
                Entry(Case("migrate", "runc", 64), ALL, 1),
                Entry(Case("migrate", "process", 64), OURS, 1),
                Entry(Case("store", "runc", 64, 0), WAYS["store"], 1),
                Entry(Case("dedup", "runc", 64), WAYS["dedup"], 1),
            )
            return Plan("trial", trial.entries + more, TRIAL_SIZES)
        case _:
            return quick(Sizes())


PLANS = ("quick", "full", "trial", "hibernate")
