"""Results as lines of JSON, and what they come to: medians, ratios to podman's way, and the bars."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

from tests.bench.cases import COPIES, DIRTIED, GENERATIONS, HIBERNATE, HIBERNATED, OWN, SLOW_MBIT, Case, Sizes

MIB = 1 << 20
SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Record:
    """One measurement, good or failed."""

    case: Case
    way: str
    build: str
    at: str
    took_s: float
    error: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.error

    def line(self) -> str:
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True) + "\n"


def load(path: Path) -> list[Record]:
    """All whole lines of a results file; none when it is not there."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines(keepends=True):
        if line.endswith("\n"):  # the last one may have been cut
            row = json.loads(line)
            if row.pop("schema") == SCHEMA:
                records.append(Record(case=Case(**row.pop("case")), **row))
    return records


def append(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        data = path.read_bytes()
        os.truncate(path, data.rfind(b"\n") + 1)  # what a killed run left half written
    with path.open("a") as out:
        out.write(record.line())


def build_id(top: Path) -> str:
    """Names the code that is measured: figures of another one don't go into the same medians."""
    seen = hashlib.sha256()
    for path in sorted((top / "ckpt").rglob("*.py")):
        seen.update(str(path.relative_to(top)).encode() + b"\0" + path.read_bytes())
    return seen.hexdigest()[:12]


def of_build(records: Iterable[Record], build: str) -> list[Record]:
    """Those of one build, and podman's and CRIU's own, to which it makes no difference."""
    return [record for record in records if record.build == build or record.way in ("podman", "criu")]


class Medians:
    """Medians over the good measurements."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.records = list(records)
        self._good: dict[tuple[Case, str], list[Record]] = {}
        for record in self.records:
            if record.ok:
                self._good.setdefault((record.case, record.way), []).append(record)

    def keys(self) -> list[tuple[Case, str]]:
        order = {"podman": 0, "criu": 0, "ckpt": 1, "precopy": 2, "postcopy": 3}
        return sorted({(record.case, record.way) for record in self.records}, key=lambda key: (key[0], order.get(key[1], 9)))

    def runs(self, case: Case, way: str) -> int:
        return len(self._good.get((case, way), []))

    def failures(self, case: Case, way: str) -> list[str]:
        return [record.error for record in self.records if (record.case, record.way) == (case, way) and not record.ok]

    def figures(self, case: Case, way: str) -> dict[str, float]:
        good = self._good.get((case, way), [])
        keys = dict.fromkeys(key for record in good for key in record.figures)
        return {key: median(values) for key in keys if (values := [record.figures[key] for record in good if key in record.figures])}

    def get(self, case: Case, way: str, figure: str) -> float | None:
        return self.figures(case, way).get(figure)

    def ratio(self, case: Case, way: str, figure: str, base: str = "podman", base_figure: str | None = None) -> float | None:
        mine, theirs = self.get(case, way, figure), self.get(case, base, base_figure or figure)
        return mine / theirs if mine is not None and theirs else None

    def peaks(self, memory_mib: int) -> dict[str, int]:
        """The largest resident sets seen with that much memory, by way, verb and host."""
        found: dict[str, int] = {}
        for record in self.records:
            if record.case.memory_mib == memory_mib and record.way not in ("podman", "criu"):
                for role, peak in record.peak_bytes.items():
                    name = f"{record.case.kind} {record.way}: {role}"
                    found[name] = max(peak, found.get(name, 0))
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@dataclass(frozen=True, slots=True)
class Bar:
    """What is to be reached: `value` at most `limit`. `value` is None when nothing was measured."""

    text: str
    unit: str
    limit: float
    value: float | None
    runs: int

    @property
    def reached(self) -> bool | None:
        return None if self.value is None else self.value <= self.limit

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        if self.reached:
            return "reached"
        return f"missed, {self.value / self.limit:.2f} times the bar"


def bars(medians: Medians, sizes: Sizes) -> list[Bar]:
    """The bars, for each runtime that was measured."""
    found: list[Bar] = []
    for runtime in ("crun", "runc"):
        main, small = Case("migrate", runtime, sizes.main), Case("migrate", runtime, sizes.small)
        slow, store = Case("migrate", runtime, sizes.main, link_mbit=SLOW_MBIT), Case("store", runtime, sizes.store, 0)
        dedup, archive = Case("dedup", runtime, sizes.store), Case("archive", runtime, sizes.large, 0)
        clone = Case("clone", runtime, sizes.clone, 0)
        if not {main, slow, store, dedup, archive, clone} & {case for case, _ in medians.keys()}:
            continue

        def ratio(text: str, limit: float, case: Case, way: str, figure: str, base: str | None = None, runtime: str = runtime) -> Bar:
            value = medians.ratio(case, way, figure, base_figure=base)
            runs = min(medians.runs(case, way), medians.runs(case, "podman"))
            return Bar(f"{runtime}, {size(case.memory_mib)}: {text}", "of podman's", limit, value, runs)

        def times(text: str, unit: str, limit: float, case: Case, way: str, make: Callable[[], float | None], runtime: str = runtime) -> Bar:
            return Bar(f"{runtime}, {size(case.memory_mib)}: {text}", unit, limit, make(), medians.runs(case, way))

        def after_small(main: Case = main, small: Case = small) -> float | None:
            here, there = medians.get(main, "postcopy", "downtime_s"), medians.get(small, "postcopy", "downtime_s")
            return here / there if here is not None and there else None

        def of_memory(main: Case = main) -> float | None:
            sent = medians.get(main, "precopy", "sent_bytes")
            return sent / (main.memory_mib * MIB) if sent is not None else None

        def to_archive(dedup: Case = dedup) -> float | None:
            mine, others = medians.get(dedup, "ckpt", "first_s"), [medians.get(dedup, "ckpt", name) for name in ("archive_s", "podman_archive_s")]
            known = [other for other in others if other is not None]
            return mine / min(known) if mine is not None and known else None

        def growth(dedup: Case = dedup) -> float | None:
            return medians.get(dedup, "ckpt", "growth")

        def between(mine: str, other: str, archive: Case = archive) -> float | None:
            this, that = medians.get(archive, "ckpt", mine), medians.get(archive, "ckpt", other)
            return this / that if this is not None and that else None

        found += [
            ratio("stop-and-copy, downtime", 1 / 4, main, "ckpt", "downtime_s"),
            ratio("post-copy, downtime", 1 / 50, main, "postcopy", "downtime_s"),
            times("post-copy, downtime", f"of that with {size(sizes.small)}", 1.5, main, "postcopy", after_small),
            ratio("pre-copy, downtime", 1 / 15, main, "precopy", "downtime_s"),
            times("pre-copy, bytes sent", "of the memory", 1.3, main, "precopy", of_memory),
            ratio("pre-copy, total time", 1.0, main, "precopy", "total_s"),
            ratio(f"pre-copy over {SLOW_MBIT} Mbit/s, downtime", 1 / 20, slow, "precopy", "downtime_s"),
            ratio("checkpoint to the store, command", 1 / 2, store, "ckpt", "checkpoint_s"),
            ratio("restore, command", 1 / 2, store, "ckpt", "restore_s"),
            ratio("restore, first tick", 1 / 2, store, "ckpt", "back_s"),
            ratio("restore --lazy, command", 1 / 8, store, "ckpt", "lazy_s", "restore_s"),
            ratio("restore --lazy, first tick", 1 / 8, store, "ckpt", "lazy_back_s", "back_s"),
            times(f"{GENERATIONS} checkpoints, {DIRTIED:.0%} dirtied between them", "of the size after the first", 1.7, dedup, "ckpt", growth),
            times("checkpoint to the empty store, command", "of an archive's (podman's or ckpt's)", 1.3, dedup, "ckpt", to_archive),
            times("export, encrypted", "of one that is not", 1.3, archive, "ckpt", partial(between, "sealed_s", "export_s")),
            ratio(f"{COPIES} copies, all serving", 1 / 4, clone, "ckpt", "serving_s"),
            ratio(f"{COPIES} copies, their memory", 1 / 4, clone, "ckpt", "pss_bytes"),
            times("inspect of an archive", "of checkpointctl's", 1 / 20, archive, "ckpt", partial(between, "inspect_s", "checkpointctl_s")),
        ]
    if HIBERNATE in {case for case, _ in medians.keys()}:
        runs = min(medians.runs(HIBERNATE, "ckpt"), medians.runs(HIBERNATE, "podman"))
        what = f"{HIBERNATED} containers of {size(HIBERNATE.memory_mib)}"
        for text, figure in (("hibernate save", "save_s"), ("hibernate resume", "resume_s")):
            found.append(Bar(f"{what}: {text}", "of podman's, one after another", 1 / 2, medians.ratio(HIBERNATE, "ckpt", figure), runs))
    mine, theirs = medians.get(OWN, "ckpt", "checkpoint_s"), medians.get(OWN, "criu", "checkpoint_s")
    more_ms = (mine - theirs) * 1000 if mine is not None and theirs is not None else None
    found.append(Bar("checkpoint of a 1 MiB process", "ms more than criu dump", 250, more_ms, medians.runs(OWN, "ckpt")))
    peaks = medians.peaks(sizes.large)
    peak_mib = max(peaks.values()) / MIB if peaks else None
    runs = sum(record.ok and record.case.memory_mib == sizes.large and bool(record.peak_bytes) for record in medians.records)
    found.append(Bar(f"{size(sizes.large)}: largest ckpt process", "MiB", 150, peak_mib, runs))
    return found


def size(mib: int) -> str:
    return f"{mib // 1024} GiB" if mib >= 1024 and mib % 1024 == 0 else f"{mib} MiB"


def summary(medians: Medians, sizes: Sizes) -> dict[str, object]:
    """All of it as plain data."""
    ways = []
    for case, way in medians.keys():
        figures = medians.figures(case, way)
        ratios = {key: medians.ratio(case, way, key) for key in figures if not key.startswith("said_") and way != "podman"}
        ways.append(
            {
                "case": asdict(case),
                "way": way,
                "runs": medians.runs(case, way),
                "failures": medians.failures(case, way),
                "medians": {key: round(value, 4) for key, value in figures.items()},
                "to_podman": {key: round(value, 4) for key, value in ratios.items() if value is not None},
            }
        )
    judged = [{**asdict(bar), "reached": bar.reached} for bar in bars(medians, sizes)]
    builds = sorted({record.build for record in medians.records})
    return {"schema": SCHEMA, "builds": builds, "ways": ways, "bars": judged, "peak_bytes": medians.peaks(sizes.large)}
