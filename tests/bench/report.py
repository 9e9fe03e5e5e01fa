"""The results as tables, for a terminal and for Markdown, and as a plot."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from tests.bench.cases import COPIES, DIRTIED, GENERATIONS, HIBERNATED, Case, Sizes
from tests.bench.results import MIB, Medians, bars, size

Table = tuple[str, list[str], list[list[str]]]
"""Title, head, rows."""


def tables(medians: Medians, sizes: Sizes) -> list[Table]:
    stores = [_stores(medians), _dedups(medians), _archives(medians), _clones(medians), _hibernations(medians)]
    made = [_migrations(medians), *stores, _own(medians), _bars(medians, sizes), _peaks(medians, sizes)]
    return [table for table in made if table[2]]


def text(made: Iterable[Table]) -> Iterator[str]:
    """First column to the left, figures to the right."""
    for title, head, rows in made:
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        yield ""
        yield title
        for row in [head, *rows]:
            cells = [cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
            yield ("  " + "  ".join(cells)).rstrip()


def markdown(made: Iterable[Table]) -> Iterator[str]:
    for title, head, rows in made:
        yield from (f"## {title}", "", _line(head), _line(["---" if i < 2 else "---:" for i in range(len(head))]), *(_line(row) for row in rows), "")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _runs(medians: Medians, case: Case, way: str) -> str:
    failed = len(medians.failures(case, way))
    return f"{medians.runs(case, way)}" + (f", {failed} failed" if failed else "")


def _case(case: Case) -> str:
    link = f", {case.link_mbit} Mbit/s" if case.link_mbit else ""
    return f"{case.runtime}, {size(case.memory_mib)}, {case.dirty_mb_s} MB/s dirtied{link}"


def _migrations(medians: Medians) -> Table:
    rows = []
    for case, way in medians.keys():
        if case.kind == "migrate":
            found = medians.figures(case, way)
            sent = found.get("sent_bytes")
            rows.append(
                [
                    _case(case), way, _runs(medians, case, way), _seconds(found.get("downtime_s")), _ratio(medians.ratio(case, way, "downtime_s")),
                    _seconds(found.get("total_s")), _ratio(medians.ratio(case, way, "total_s")), "" if sent is None else f"{sent / MIB:.0f} MiB",
                    "" if sent is None else f"{sent / MIB / case.memory_mib:.2f}", _seconds(found.get("stalls_s")),
                ]
            )  # fmt: skip
    head = ["migration", "way", "runs", "downtime", "to podman's", "total", "to podman's", "sent", "of memory", "other stalls"]
    return "Migrations (medians; downtime is the longest gap between two ticks of the workload)", head, rows


def _stores(medians: Medians) -> Table:
    rows = []
    names = (
        ("checkpoint_s", "checkpoint, command", None), ("stopped_s", "checkpoint, last tick to its end", None),
        ("restore_s", "restore, command", None), ("back_s", "restore, first tick", None),
        ("lazy_s", "restore --lazy, command", "restore_s"), ("lazy_back_s", "restore --lazy, first tick", "back_s"),
    )  # fmt: skip
    for case, way in medians.keys():
        if case.kind == "store":
            for figure, name, base in names:
                value = medians.get(case, way, figure)
                if value is not None:
                    ratio = medians.ratio(case, way, figure, base_figure=base)
                    rows.append([f"{case.runtime}, {size(case.memory_mib)}, {name}", way, _runs(medians, case, way), _seconds(value), _ratio(ratio)])
            if not medians.runs(case, way):
                rows.append([f"{case.runtime}, {size(case.memory_mib)}", way, _runs(medians, case, way), "", ""])
    return "To the store and back, on one host (podman: checkpoint -e, restore -i)", ["what", "way", "runs", "time", "to podman's"], rows


def _dedups(medians: Medians) -> Table:
    rows = []
    for case, way in medians.keys():
        if case.kind == "dedup":
            found = medians.figures(case, way)
            times = [_seconds(found.get(key)) for key in ("podman_archive_s", "archive_s", "first_s", "later_s")]
            sizes = ["" if found.get(key) is None else f"{found[key] / MIB:.0f} MiB" for key in ("first_bytes", "last_bytes")]
            rows.append([_case(case), way, _runs(medians, case, way), *times, *sizes, _ratio(found.get("growth"))])
    head = ["container", "way", "runs", "podman's archive", "archive", "first checkpoint", "later ones", "store after one", "after all", "ratio"]
    return f"{GENERATIONS} checkpoints of a running container, {DIRTIED:.0%} of its memory dirtied between them", head, rows


def _archives(medians: Medians) -> Table:
    rows = []
    for case, way in medians.keys():
        if case.kind == "archive":
            found = medians.figures(case, way)
            times = [_seconds(found.get(key)) for key in ("export_s", "sealed_s", "inspect_s", "checkpointctl_s")]
            rows.append([f"{case.runtime}, {size(case.memory_mib)}", way, _runs(medians, case, way), *times])
    return "Archives of a checkpoint in the store", ["container", "way", "runs", "export", "encrypted", "inspect", "checkpointctl inspect"], rows


def _hibernations(medians: Medians) -> Table:
    rows = []
    for case, way in medians.keys():
        if case.kind == "hibernate":
            found = medians.figures(case, way)
            times = [text for key in ("save_s", "resume_s") for text in (_seconds(found.get(key)), _ratio(medians.ratio(case, way, key)))]
            rows.append([f"{HIBERNATED} containers, {case.runtime}, {size(case.memory_mib)}", way, _runs(medians, case, way), *times])
    return "A whole host saved and brought back", ["what", "way", "runs", "save", "to podman's", "resume", "to podman's"], rows


def _clones(medians: Medians) -> Table:
    rows = []
    for case, way in medians.keys():
        if case.kind == "clone":
            found = medians.figures(case, way)
            times = [_seconds(found.get(key)) for key in ("command_s", "serving_s")]
            sizes = ["" if found.get(key) is None else f"{found[key] / MIB:.0f} MiB" for key in ("pss_bytes", "helpers_bytes")]
            ratio = _ratio(medians.ratio(case, way, "serving_s"))
            rows.append([f"{case.runtime}, {size(case.memory_mib)}", way, _runs(medians, case, way), *times, ratio, *sizes])
    head = ["container", "way", "runs", "command", "all serve", "to podman's", "memory of the copies", "of their helpers"]
    return f"{COPIES} copies of a checkpoint (podman: restore -i -n, one after another)", head, rows


def _own(medians: Medians) -> Table:
    rows = []
    for case, way in medians.keys():
        if case.kind == "own":
            found = medians.figures(case, way)
            rows.append(
                [
                    f"process, {size(case.memory_mib)}",
                    way,
                    _runs(medians, case, way),
                    *(_seconds(found.get(key)) for key in ("checkpoint_s", "restore_s")),
                ]
            )
    return "A small process, beside criu alone", ["what", "way", "runs", "checkpoint", "restore"], rows


def _bars(medians: Medians, sizes: Sizes) -> Table:
    rows = []
    for bar in bars(medians, sizes):
        limit, value = (("" if figure is None else f"{figure:.3f}" if figure < 10 else f"{figure:.0f}") for figure in (bar.limit, bar.value))
        rows.append(
            [bar.text, bar.verdict + ("" if bar.value is None or bar.runs >= 5 else f" ({bar.runs} runs only)"), value, f"at most {limit}", bar.unit]
        )
    return "Bars", ["bar", "verdict", "measured", "bar", "unit"], rows


def _peaks(medians: Medians, sizes: Sizes) -> Table:
    rows = [[role, "", f"{peak / MIB:.0f} MiB"] for role, peak in medians.peaks(sizes.large).items()]
    return f"Peak of memory of each ckpt process, {size(sizes.large)}", ["process", "", "peak"], rows


# -- the plot -----------------------------------------------------------------------------------------------------------------------------

PLOTTED = {"podman": "podman checkpoint -e, scp, restore -i", "ckpt": "ckpt migrate", "precopy": "--precopy", "postcopy": "--postcopy"}


def plot(medians: Medians, into: Path, runtime: str = "crun") -> bool:
    """Downtime over memory size, both logarithmic, as SVG. The same results give the same file. False when there is too little to show."""
    pygal: Any = import_module("pygal")  # of the extra `bench`

    points: dict[str, list[tuple[int, float]]] = {}
    for case, way in medians.keys():
        downtime = medians.get(case, way, "downtime_s")
        if case.kind == "migrate" and case.runtime == runtime and not case.link_mbit and way in PLOTTED and downtime:
            points.setdefault(way, []).append((case.memory_mib, downtime))
    sizes = sorted({at for line in points.values() for at, _ in line})
    values = [value for line in points.values() for _, value in line]
    if len(sizes) < 2:
        return False
    scale = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
    low, high = (
        max((value for value in scale if value <= min(values)), default=scale[0]),
        min((value for value in scale if value >= max(values)), default=scale[-1]),
    )
    seconds = [value for value in scale if low <= value <= high]
    style = pygal.style.Style(
        background="white", plot_background="white", font_family="sans-serif", colors=("#777777", "#1f77b4", "#2ca02c", "#d62728"),
        title_font_size=18, label_font_size=13, major_label_font_size=13, legend_font_size=14, opacity="1", stroke_opacity="1",
    )  # fmt: skip
    layout = {"width": 860, "height": 500, "margin_right": 40, "margin_bottom": 30, "legend_at_bottom": True, "legend_at_bottom_columns": 2}
    chart = pygal.XY(
        logarithmic=True, js=[], style=style, truncate_legend=-1, dots_size=4, stroke_style={"width": 2.5}, range=(low, high), x_labels=sizes,
        y_labels=seconds, x_value_formatter=lambda mib: size(round(mib)), value_formatter=lambda value: f"{value:g} s",
        title="Downtime of a migration (20 MB/s dirtied)", x_title="memory", y_title="downtime", **layout,
    )  # fmt: skip
    chart.uuid = "ckpt-downtime"  # otherwise a random one
    for way, title in PLOTTED.items():
        if way in points:
            chart.add(title, sorted(points[way]))
    svg = chart.render().decode()
    into.parent.mkdir(parents=True, exist_ok=True)
    # Without the comment with the date and the script, which no page runs from an <img>.
    into.write_text(re.sub(r"<!--.*?-->|<script.*?</script>", "", svg, flags=re.DOTALL) + "\n")
    return True
