"""The arithmetic of the bench: medians, ratios, bars, and going on from a file."""

from __future__ import annotations

from pathlib import Path

from tests.bench.__main__ import Bench
from tests.bench.cases import PLANS, Case, Entry, Plan, Sizes, plan
from tests.bench.results import Medians, Record, append, bars, load, of_build, summary

MAIN = Case("migrate", "crun", 2048)
SIZES = Sizes()


def record(way: str, downtime_s: float, *, error: str = "", build: str = "one", peaks: dict[str, int] | None = None, case: Case = MAIN) -> Record:
    figures = {} if error else {"downtime_s": downtime_s, "total_s": downtime_s + 1, "sent_bytes": 1 << 30}
    return Record(case, way, build, "2026-11-21T12:00:00Z", 30.0, error, figures, peaks or {})


def test_medians_leave_out_what_failed() -> None:
    medians = Medians([record("podman", 40), record("podman", 44), record("podman", 42), record("ckpt", 4.2), record("ckpt", 0, error="no")])
    assert medians.get(MAIN, "podman", "downtime_s") == 42
    assert medians.ratio(MAIN, "ckpt", "downtime_s") == 0.1
    assert (medians.runs(MAIN, "ckpt"), medians.failures(MAIN, "ckpt")) == (1, ["no"])


def test_bars() -> None:
    medians = Medians([record("podman", 40), record("ckpt", 20), record("postcopy", 0.5), record("precopy", 1, peaks={"migrate@a": 1})])
    found = {(bar.text, bar.unit): bar for bar in bars(medians, SIZES)}
    assert found["crun, 2 GiB: stop-and-copy, downtime", "of podman's"].verdict == "missed, 2.00 times the bar"
    assert found["crun, 2 GiB: post-copy, downtime", "of podman's"].reached
    assert found["crun, 2 GiB: pre-copy, bytes sent", "of the memory"].value == 0.5
    assert found["4 GiB: largest ckpt process", "MiB"].reached is None  # this was another size
    assert summary(medians, SIZES)["builds"] == ["one"]


def test_a_file_that_was_cut_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "results"
    append(out, record("podman", 40))
    append(out, record("ckpt", 4))
    out.write_text(out.read_text()[:-40])
    assert [one.way for one in load(out)] == ["podman"]
    append(out, record("precopy", 1))
    assert [one.way for one in load(out)] == ["podman", "precopy"]


def test_what_is_there_is_not_measured_again() -> None:
    chosen = Plan("p", (Entry(MAIN, ("podman", "ckpt"), 2),), SIZES)
    records = [record("podman", 40, build="old"), record("ckpt", 4, build="old"), record("ckpt", 4, error="no")]
    bench = Bench(chosen, of_build(records, "one"), build="one", out=None, minutes=None, ways=None)
    assert [(number, way) for number, _, way in bench.todo()] == [(0, "ckpt"), (1, "ckpt"), (1, "podman")]


def test_plans_have_what_the_bars_need() -> None:
    for name in PLANS:
        if name == "hibernate":
            continue  # a plan of its own, for its two bars
        chosen = plan(name)
        measured = {(entry.case, way) for entry in chosen.entries for way in entry.ways}
        made = [record(way, 1, case=case, peaks={"migrate@a": 1}) for case, way in measured]
        wanted = [bar for bar in bars(Medians(made), chosen.sizes) if bar.value is None]
        assert not [bar.text for bar in wanted if not any(word in bar.text for word in ("restore", "checkpoint", "export", "inspect", "copies"))]
