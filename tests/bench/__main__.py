"""`make bench`: podman's way and every way of ckpt, in turn, on the same kind of container; medians, ratios, and the bars beside them.

Every measurement gets fresh hosts, and counts only when the workload's memory was whole and its count unbroken afterwards. A failed one is
reported and the others go on. With --json FILE each result is kept at once, and a run with the same file goes on where the last one ended.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from tests.bench import report
from tests.bench.cases import PLANS, Case, Plan, plan
from tests.bench.measure import Skipped, measure
from tests.bench.results import Medians, Record, append, build_id, load, of_build, summary
from tests.bench.workload import WorkloadError
from tests.lab.harness import CommandError, LabUnavailable
from tests.lab.harness.wheel import WheelError, build_wheel

TOP = Path(__file__).resolve().parents[2]
MIB = 1 << 20
FAILURES_MAX = 2
"""A way that failed so often for a case is not tried again in that case."""


def warm_up(need_mib: int) -> float:
    """Touch memory once: its first touch is slow in a freshly booted virtual machine, and who comes first would pay for all. Seconds."""
    began_s = time.monotonic()
    available = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    with mmap.mmap(-1, min(need_mib * MIB, available * 1024 * 3 // 4), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        piece = b"x" * MIB
        for at in range(0, len(memory) - MIB, MIB):
            memory[at : at + MIB] = piece
    return time.monotonic() - began_s


class Bench:
    """A plan on its way: what is there already, what comes next, when to stop."""

    def __init__(
        self, chosen: Plan, records: list[Record], *, build: str, out: Path | None, minutes: float | None, ways: Iterable[str] | None
    ) -> None:
        self._plan, self._build, self._out = chosen, build, out
        self.records = records
        self._ways = set(ways) if ways else None
        self._end_s = time.monotonic() + minutes * 60 if minutes else float("inf")
        self._skipped: set[tuple[Case, str]] = set()
        self.left_out = 0

    def _known(self, case: Case, way: str) -> list[Record]:
        return [record for record in self.records if (record.case, record.way) == (case, way)]

    def _expected_s(self, case: Case, way: str) -> float:
        """By what it took before; without that by its size (as an idle machine of two cores needs)."""
        took = [record.took_s for record in self.records if (record.case, record.way) == (case, way)]
        per_gib = {"podman": 26.0}.get(way, 12.0) * (2.5 if case.link_mbit else 1.0)
        per_gib *= {"store": 1.5, "dedup": 8.0, "archive": 4.0, "hibernate": 40.0}.get(case.kind, 1.0)
        return max(took) if took else 8.0 + per_gib * case.memory_mib / 1024

    def todo(self) -> list[tuple[int, Case, str]]:
        """What is still to do, in order. The order of the ways turns from round to round: who comes first is not always the same."""
        found = []
        for number, entry in self._plan.rounds():
            ways = [way for way in entry.ways if self._ways is None or way in self._ways]
            turn = number % len(ways) if ways else 0
            found += [(number, entry.case, way) for way in (*ways[turn:], *ways[:turn])]
        once = dict.fromkeys(found)
        return [(number, case, way) for number, case, way in once if sum(record.ok for record in self._known(case, way)) <= number]

    def expected_s(self) -> float:
        return sum(self._expected_s(case, way) for _, case, way in self.todo())

    def run(self, wheel: Path) -> None:
        for _, case, way in self.todo():
            failed = sum(not record.ok for record in self._known(case, way))
            if (case, way) in self._skipped or failed >= FAILURES_MAX:
                continue
            if time.monotonic() + self._expected_s(case, way) > self._end_s:
                self.left_out += 1
                continue
            self._one(case, way, wheel)

    def _one(self, case: Case, way: str, wheel: Path) -> None:
        at, began_s = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), time.monotonic()
        figures: dict[str, float] = {}
        peaks: dict[str, int] = {}
        error = ""
        try:
            figures, peaks = measure(case, way, wheel)
        except Skipped as why:
            self._skipped.add((case, way))
            print(f"  {case.name} {way}: left out: {why}", flush=True)
            return
        except (CommandError, LabUnavailable, WorkloadError, WheelError, OSError, ValueError, LookupError) as failed:
            error = str(failed)[:4000] or type(failed).__name__
        record = Record(case, way, self._build, at, round(time.monotonic() - began_s, 1), error, figures, peaks)
        self.records.append(record)
        if self._out:
            append(self._out, record)
        shown = "  ".join(
            f"{key.removesuffix('_s')} {value:.2f} s" for key, value in figures.items() if key.endswith("_s") and not key.startswith("said_")
        )
        if peaks:
            shown += f"  peak {max(peaks.values()) / MIB:.0f} MiB"
        print(f"  {case.name} {way}: {shown if record.ok else 'FAILED: ' + error}  ({record.took_s:.0f} s)", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="quick", help="quick: most bars, crun; full: all bars and the plot; trial; hibernate")
    parser.add_argument("--minutes", type=float, metavar="N", help="begin nothing that would end later than this")
    parser.add_argument("--ways", nargs="+", metavar="WAY", help="only these of podman, ckpt, precopy, postcopy, criu")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only these cases, or those with one of these in their name (--list shows them)")
    parser.add_argument("--repeat", type=int, metavar="N", help="so many of each instead of what the plan says")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep each result there as a line of JSON, and go on from what it holds")
    parser.add_argument("--summary", type=Path, metavar="FILE", help="write medians, ratios and bars as JSON there")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write results.md, summary.json and downtime.svg there")
    parser.add_argument("--report", action="store_true", help="measure nothing, show what --json FILE holds")
    parser.add_argument("--any-build", action="store_true", help="take results of other states of the code too")
    parser.add_argument("--list", action="store_true", help="say what would be measured, and how long that may take")
    return parser.parse_args()


def chosen_plan(options: argparse.Namespace) -> Plan:
    found = plan(options.plan)
    names = {entry.case.name for entry in found.entries}
    asked = {name for part in options.only or [""] for name in names if name == part or (part not in names and part in name)}
    entries = [entry for entry in found.entries if entry.case.name in asked]
    if options.repeat:
        entries = [type(entry)(entry.case, entry.ways, options.repeat) for entry in entries]
    return Plan(found.name, tuple(entries), found.sizes)


def show(records: list[Record], chosen: Plan, options: argparse.Namespace) -> None:
    medians = Medians(records)
    tables = report.tables(medians, chosen.sizes)
    print("\n".join(report.text(tables)))
    document = json.dumps(summary(medians, chosen.sizes), indent=1, sort_keys=True) + "\n"
    if options.summary:
        options.summary.write_text(document)
    if options.docs:
        options.docs.mkdir(parents=True, exist_ok=True)
        (options.docs / "summary.json").write_text(document)
        if report.plot(medians, options.docs / "downtime.svg"):
            print(f"\nplot: {options.docs / 'downtime.svg'}")
        (options.docs / "results.md").write_text("\n".join(["# What `make bench` measured", "", *report.markdown(tables)]))


def main() -> int:
    options = arguments()
    chosen = chosen_plan(options)
    build = build_id(TOP)
    known = load(options.json) if options.json else []
    if options.report and known:
        build = known[-1].build
    usable = known if options.any_build else of_build(known, build)
    bench = Bench(chosen, usable, build=build, out=options.json, minutes=options.minutes, ways=options.ways)
    if options.list:
        print("\n".join(f"{case.name} {way}" for _, case, way in bench.todo()))
        print(f"about {bench.expected_s() / 60:.0f} minutes", file=sys.stderr)
        return 0
    status = 0
    if not options.report:
        if os.geteuid() != 0:
            print("bench: the lab needs root", file=sys.stderr)
            return 1
        print(f"plan {chosen.name}: {len(bench.todo())} measurements, about {bench.expected_s() / 60:.0f} minutes", flush=True)
        try:
            need = max((entry.case.memory_mib for entry in chosen.entries), default=0) * 6
            print(f"memory warm after {warm_up(need):.0f} s", flush=True)
            with tempfile.TemporaryDirectory() as directory:
                bench.run(build_wheel(TOP, Path(directory)))
        except WheelError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nbench: stopped; this is what there is", file=sys.stderr)
            status = 130
        if bench.left_out:
            print(f"{bench.left_out} measurements left out for want of time", flush=True)
    show(bench.records, chosen, options)
    return status or (1 if any(not record.ok for record in bench.records) else 0)


if __name__ == "__main__":
    sys.exit(main())
