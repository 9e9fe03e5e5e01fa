"""Texts, templates, progress."""

from __future__ import annotations

import io
import json

import pytest

from ckpt.cli.render import units
from ckpt.cli.render.live import LiveDisplay
from ckpt.cli.render.plain import PlainDisplay
from ckpt.cli.render.progress import Progress
from ckpt.cli.render.reporter import Reporter
from ckpt.cli.render.tables import migrated_line, short_host
from ckpt.cli.render.template import Template
from ckpt.errors import UsageError
from ckpt.events import BytesMoved, Frozen, Notice, StepDone, StepFailed, StepStarted, Thawed

GIB = 1 << 30


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.98 KiB"), (1024, "1 KiB"), (1.31 * GIB, "1.31 GiB"), (178 * 2**20, "178 MiB"), (2 * GIB, "2 GiB")],
)
def test_sizes(count: float, text: str) -> None:
    assert units.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 ms"),
        (0.212, "212 ms"),
        (0.9999, "1.0 s"),
        (7.4, "7.4 s"),
        (99.99, "1 min 40 s"),
        (200, "3 min 20 s"),
        (7200, "2 h 0 min"),
        (3e5, "3 days"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert units.duration(seconds) == text


def test_part_in_one_unit() -> None:
    assert units.part(int(1.3 * GIB), 2 * GIB) == "1.3 of 2.0 GiB"
    assert units.part(5, 10) == "5 of 10 B"
    assert units.part(5 * 2**20, None) == "5 MiB"


def test_clean_takes_what_terminals_obey() -> None:
    assert units.clean("a\x1b[31mb\nc\x9b\u202e") == "a\ufffd[31mb c\ufffd\ufffd"


@pytest.mark.parametrize(
    ("typed", "host"),
    [("root@b", "b"), ("b", "b"), ("b:2222", "b"), ("ssh://root@b:22/", "b"), ("root@[fe80::1]:22", "[fe80::1]:22"), ("fe80::1", "fe80::1")],
)
def test_short_host(typed: str, host: str) -> None:
    assert short_host(typed) == host


def test_closing_line_without_figures() -> None:
    assert migrated_line("web", "root@b", {}) == "migrated web -> b"
    assert migrated_line("web", "b", {"total_s": 2.0, "sent_bytes": 2 * GIB}) == "migrated web -> b: total 2.0 s, 2 GiB sent (1 GiB/s)"


def test_templates() -> None:
    row = {
        "name": "web",
        "container_id": "ab",
        "ok": True,
        "stats": {"total_s": 2},
        "warnings": ["a", "b"],
        "error": {"message": "broken"},
        "state": None,
    }
    fields = tuple(row)
    assert Template("{{.Name}} {{ .ContainerID }} {{.Ok}}", fields).render(row) == "web ab true"
    assert Template("{{.Stats.TotalS}}|{{.Stats.None}}|{{.State}}", fields).render(row) == "2||"
    assert Template('{{.Warnings}}{{"\\t"}}{{.Error}}', fields).render(row) == "a, b\tbroken"
    assert Template("{{json .Stats}}", fields).render(row) == '{"total_s":2}'
    assert Template("{{json .}}", ("name",)).render({"name": "é"}) == '{"name":"é"}'


@pytest.mark.parametrize("text", ["{{.Bogus}}", "{{range .}}", "{{.Name", "{{.Name}} }}", "{{}}", "{{.Name | upper}}"])
def test_wrong_templates(text: str) -> None:
    with pytest.raises(UsageError):
        Template(text, ("name",))


def moved(done: int, total: int | None = None, number: int | None = None, dirty: float | None = None) -> BytesMoved:
    return BytesMoved("web", "memory", done, total, number, dirty)


def test_progress_tells_rate_and_rest() -> None:
    progress = Progress()
    assert progress.text() == ""
    progress.moved(0.0, moved(0, 2 * GIB))
    progress.moved(1.0, moved(GIB, 2 * GIB))
    assert progress.text() == "1.0 of 2.0 GiB  1 GiB/s  1.0 s left"
    assert progress.figures() == {"rate_bytes_s": GIB, "left_s": 1.0}
    progress.moved(2.0, moved(10))  # a new round begins from nothing
    assert progress.rate is None and progress.text() == "10 B"


def test_progress_of_a_round() -> None:
    progress = Progress()
    progress.moved(0.0, moved(0, 2 * GIB, 1))
    progress.moved(2.0, moved(GIB, 2 * GIB, 1))
    assert progress.text() == "1.0 of 2.0 GiB  512 MiB/s  round 1  2.0 s left"
    progress.moved(3.0, moved(3 * GIB, 2 * GIB, 1))
    assert progress.text() == "3 GiB  1 GiB/s  round 1", "it was an estimate"
    progress.moved(4.0, moved(4 * GIB, None, 2, 18 * 2**20))
    assert progress.text() == "4 GiB  round 2  dirty 18 MiB/s"
    assert progress.figures() == {"rate_bytes_s": None, "left_s": None}


def test_progress_keeps_little_of_much() -> None:
    progress = Progress()
    for at in range(5000):
        progress.moved(at / 1000, moved(at << 20))
    assert len(progress._seen) < 250
    assert progress.rate == pytest.approx(1000 << 20, rel=0.02)


def test_lines_for_machines_are_few(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("ckpt.cli.render.reporter.time.monotonic", lambda: now[0])
    reporter = Reporter("migrate", "jsonl", ())
    reporter.emit(StepStarted("web", "memory"))
    for at in range(2001):
        now[0] = at / 1000
        reporter.emit(moved(at << 20, 4000 << 20, 1, 5.0))
    reporter.emit(StepDone("web", "memory"))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["event"] for row in rows] == ["step_started", *["bytes_moved"] * 9, "step_done"]
    assert rows[-2] == {
        **{"schema": 1, "event": "bytes_moved", "target": "web", "step": "memory", "done_bytes": 2000 << 20, "total_bytes": 4000 << 20},
        **{"round": 1, "dirty_bytes_s": 5.0, "rate_bytes_s": 1000 << 20, "left_s": 2.0},
    }


def test_a_log_gets_a_line_a_second_at_most() -> None:
    now = [0.0]
    out = io.StringIO()
    display = PlainDisplay(out, clock=lambda: now[0])
    display.show(StepStarted("web", "memory"))
    for tenth in range(31):
        now[0] = tenth / 10
        display.show(BytesMoved("web", "memory", tenth * 2**20, 31 * 2**20))
    display.show(StepDone("web", "memory", "31 MiB"))
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[-1] == "web: memory: ok, 31 MiB"
    assert lines[1].startswith("web: memory: 10.0 of 31.0 MiB  10 MiB/s")


def test_plain_lines() -> None:
    out = io.StringIO()
    display = PlainDisplay(out)
    for event in (
        Frozen("web", 1.0),
        Thawed("web", 0.2),
        StepFailed("web", "dump", "no"),
        Notice("", "hello"),
        Notice("web", "hm\x07", warning=True),
    ):
        display.show(event)
    assert out.getvalue().splitlines() == ["web: frozen 200 ms", "web: dump: failed, no", "hello", "warning: web: hm\ufffd"]


def test_live_display_on_a_dumb_stream() -> None:
    out = io.StringIO()
    display = LiveDisplay(out)
    display.show(Notice("web", "podman container -> b"))
    display.show(StepStarted("web", "check"))
    display.show(StepDone("web", "check", "CPU flags [bold]equal"))
    display.show(StepFailed("db", "dump", "no"))
    display.close()
    display.close()
    assert out.getvalue().splitlines()[:4] == [
        "web: podman container -> b",
        "  ok  check        CPU flags [bold]equal",
        "db:",
        "  --  dump         no",
    ]
