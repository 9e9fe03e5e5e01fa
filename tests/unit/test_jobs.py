"""`ckpt jobs`: what the history keeps of jobs that are over, and how those that are not over stand."""

from __future__ import annotations

import errno
import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt.cli.main import main
from ckpt.engines import registry
from ckpt.errors import MigrationRolledBack, NeedsContinue, TargetNotFound, UsageError
from ckpt.events import BytesMoved, Event, Figures, Frozen, RoundDone, StepDone, StepStarted, Thawed
from ckpt.model import Container, JobRecord
from ckpt.ops import jobs, recover, statistics
from ckpt.ops.result import Outcome, failure
from ckpt.store import durable, history
from ckpt.store.job import Job, new_id

CONTAINER = Container("podman", "ab" * 32, "web", "running")


class Engine:
    name = "toy"
    prefixes = ("toy",)

    def rollback(self, job: Job) -> None:
        pass

    def describe(self, container: Container) -> Container:
        return container


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "engines", lambda: (Engine(),))
    monkeypatch.setattr("ckpt.cli.main._catch_signals", lambda: None)  # pytest's handlers stay


def begun(root: Path, kind: str, *states: str, **facts: Any) -> Job:
    job = Job.create(root, kind, engine="toy", container_id="c1", name="web", **facts)
    for state in states:
        job.write(state)
    return job


def dead(root: Path, kind: str, *states: str, **facts: Any) -> Job:
    job = begun(root, kind, *states, **facts)
    job.release()
    return job


def over(root: Path, number: int = 0, **facts: Any) -> JobRecord:
    record = JobRecord(f"20261121T120000-{number:08x}", "migrate", "done", "web", started_s=1e9 + number, ended_s=1e9 + number + 1)
    record = replace(record, **facts)
    history.keep(root, record)
    return record


def only(root: Path) -> JobRecord:
    (found,) = jobs.jobs(store_root=root)
    return found


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "states", "state"),
    [
        ("checkpoint", ["dumping", "held"], "rolled-back"),
        ("migrate-source", ["begun", "held"], "rolled-back"),
        ("migrate-destination", ["prepared"], "rolled-back"),
        ("migrate-source", ["commit", "failed", "done"], "rolled-back"),
        ("migrate-source", ["commit", "ended", "done"], "done"),
        ("checkpoint", ["held", "commit", "done"], "done"),
        ("restore", ["commit", "serving", "lost"], "lost"),
        ("migrate-source", ["commit", "lost", "done"], "lost"),
    ],
)
def test_a_dead_job_leaves_a_record(tmp_path: Path, kind: str, states: list[str], state: str) -> None:
    job = dead(tmp_path, kind, *states, destination="root@b")
    recover.sweep(tmp_path)
    assert not job.directory.exists()
    kept = only(tmp_path)
    assert (kept.id, kept.state, kept.name, kept.engine, kept.container_id) == (job.id, state, "web", "toy", "c1")
    assert kept.ended_s is not None and kept.ended_s >= kept.started_s > time.time() - 60
    file = tmp_path / "history" / f"{job.id}.json"
    assert file.stat().st_mode & 0o7777 == 0o600 and file.parent.stat().st_mode & 0o7777 == 0o700
    assert json.loads(file.read_text())["schema"] == 1


def test_what_the_guard_settled_says_so(tmp_path: Path) -> None:
    dead(tmp_path, "migrate-source", "begun", destination="root@b")
    recover.sweep(tmp_path)
    assert (only(tmp_path).settled_by, only(tmp_path).kind, only(tmp_path).destination) == ("guard", "migrate", "root@b")


def test_a_job_that_never_began_leaves_none(tmp_path: Path) -> None:
    job = dead(tmp_path, "checkpoint")
    (job.directory / "journal.jsonl").write_text('{"t":1,"sta')
    recover.sweep(tmp_path)
    assert jobs.jobs(store_root=tmp_path) == []


def test_a_full_disk_fails_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(durable, "write_file", full)
    job = dead(tmp_path, "checkpoint", "dumping")
    recover.sweep(tmp_path)
    assert not job.directory.exists() and not (tmp_path / "history").exists()


def test_number_and_age_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "KEPT_RECORDS", 3)
    for number in range(5):
        over(tmp_path, number)
    assert [record.id[-1] for record in history.records(tmp_path)] == ["2", "3", "4"]
    oldest = tmp_path / "history" / "20261121T120000-00000002.json"
    torn = tmp_path / "history" / "20261121T120000-00000003.json.part"
    torn.write_text("half")
    for path in (oldest, torn):
        os.utime(path, (1, 1))
    over(tmp_path, 5)
    assert sorted(path.name[23:] for path in (tmp_path / "history").iterdir()) == ["3.json", "4.json", "5.json"]


HOSTILE = {
    "empty": b"",
    "noise": os.urandom(64),
    "deep": b"[" * 100_000,
    "list": b"[]",
    "other id": json.dumps({"schema": 1, "id": "20200101T000000-00000000", "kind": "migrate", "state": "done"}).encode(),
    "large": b" " * (1 << 20) + b"{}",
}
ODD = {
    "started_s": 10**400,
    "ended_s": "soon",
    "name": ["web"],
    "error": {"message": 7},
    "statistics": {"rounds": [7, {"number": "x", "sent_bytes": -1}], "bytes": [], "steps": {"dump": "long"}, "total_s": 10**400, "downtime_s": -5},
    "destination": "\ud800\x1b[31m" + "x" * 10_000,
    "next": "\x9b0m",
}


def hostile(root: Path) -> None:
    place = root / "history"
    place.mkdir(parents=True)
    for number, content in enumerate(HOSTILE.values()):
        (place / f"20261121T110000-{number:08x}.json").write_bytes(content)
    odd = "20261121T110001-00000000"
    text = json.dumps({"schema": 7, "id": odd, "kind": "migrate", "state": "done", "later": 1, **ODD})
    (place / f"{odd}.json").write_text(text[:-1] + ', "reason": NaN}')
    os.mkfifo(place / "20261121T110001-00000001.json")
    (place / "20261121T110001-00000002.json").symlink_to("/dev/zero")
    (place / "20261121T110001-00000003.json").mkdir()
    (place / "note.txt").write_text("x")
    bad = root / "jobs" / "20261121T110002-00000000"
    bad.mkdir(parents=True)
    (bad / "journal.jsonl").write_bytes(b'{"t":"x","kind":"migrate-source","state":[]}\n{"state":7}\n[1]\n\xff\n')


@pytest.mark.parametrize("form", ["table", "json", "jsonl", "{{.ID}} {{.Destination}} {{json .}}"])
@pytest.mark.parametrize("words", [["--all"], ["show", "20261121T110001-00000000"], ["show", "20261121T110002"]], ids=["list", "odd", "journal"])
def test_hostile_records_harm_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, words: list[str]) -> None:
    hostile(tmp_path)
    good = over(tmp_path)
    assert main(["--store", str(tmp_path), "jobs", *words, "--format", form]) == 0
    out = capsys.readouterr().out
    out.encode()
    assert (good.id in out) == (words == ["--all"])
    assert form != "table" or "\x1b" not in out and "\x9b" not in out


# -- how they stand -----------------------------------------------------------------------------------------------------


def test_one_under_way(tmp_path: Path) -> None:
    job = begun(tmp_path, "migrate-source", "begun", destination="root@b")
    found = only(tmp_path)
    assert (found.state, found.ended_s, found.reason) == ("running", None, "at: begun")
    job.write("commit")
    assert only(tmp_path).state == "running"
    job.release()
    assert only(tmp_path).state == "waiting"
    assert only(tmp_path).next == f"ckpt migrate --continue {job.id}"


def test_looking_does_not_take_the_lock(tmp_path: Path) -> None:
    job = dead(tmp_path, "checkpoint", "held")
    assert only(tmp_path).state == "interrupted"
    assert job.acquire()
    job.release()


@pytest.mark.parametrize(
    ("kind", "states", "facts", "state"),
    [
        ("migrate-destination", ["commit", "running"], {"source": "a"}, "unconfirmed"),
        ("migrate-destination", ["prepared"], {"source": "a"}, "interrupted"),
        ("restore", ["commit", "serving"], {}, "interrupted"),
        ("restore", ["commit", "serving", "lost"], {"reason": "killed"}, "lost"),
        ("migrate-destination", ["commit", "running", "lost"], {"reason": "killed"}, "lost"),
        ("migrate-destination", ["commit", "running", "served"], {}, "unconfirmed"),
    ],
)
def test_the_dead(tmp_path: Path, kind: str, states: list[str], facts: dict[str, Any], state: str) -> None:
    dead(tmp_path, kind, *states, **facts)
    assert only(tmp_path).state == state


def test_a_lazy_restore_that_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dead(tmp_path, "restore", "commit", "serving")
    monkeypatch.setattr("ckpt.criu.lazy.running", lambda directory: True)
    assert only(tmp_path).state == "serving"


def test_filters(tmp_path: Path) -> None:
    old, new = over(tmp_path, 1), over(tmp_path, 2, name="db", ended_s=time.time())
    living = begun(tmp_path, "checkpoint", "held")
    found = jobs.jobs(store_root=tmp_path)
    assert [record.id for record in found] == [old.id, new.id, living.id]

    def ids(**how: Any) -> list[str]:
        return [record.id for record in jobs.selected(found, **how)]

    assert ids() == [new.id, living.id]
    assert ids(every=True) == [old.id, new.id, living.id]
    assert ids(running=True) == [living.id]
    assert ids(last=2) == [new.id, living.id]
    assert ids(filters=("name=web",)) == [old.id, living.id]
    assert ids(filters=("name=web", "state=done", "state=failed")) == [old.id]
    for wrong in ("web", "colour=red"):
        with pytest.raises(UsageError):
            ids(filters=(wrong,))
    living.release()


def test_find(tmp_path: Path) -> None:
    records = [JobRecord("20261121T120000-1a2b3c4d", "migrate", "done"), JobRecord("20261121T130000-1a000000", "migrate", "done")]
    assert jobs.find("20261121T12", records) is records[0]
    assert jobs.find("1a2b", records) is records[0]
    assert jobs.find(records[1].id, records) is records[1]
    for text in ("2026", "1a", "", "ff", "\x1b[0m"):
        with pytest.raises(TargetNotFound):
            jobs.find(text, records)


@pytest.mark.parametrize("words", [["list"], ["show"], ["show", "x", "--all"], ["--all", "--running"], ["-n", "0"], ["--filter", "x"]], ids=" ".join)
def test_bad_words(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--store", str(tmp_path), "jobs", *words]) == 2
    assert capsys.readouterr().err.count("error:") == 1


# -- a migration's figures ----------------------------------------------------------------------------------------------


EVENTS: tuple[Event, ...] = (
    StepStarted("web", "precopy"),
    BytesMoved("web", "precopy", 900),
    RoundDone("web", 0, 1000, 1000, 2.0),
    RoundDone("web", 1, 1000, 100, 0.5),
    StepDone("web", "precopy"),
    StepStarted("web", "dump"),
    BytesMoved("web", "pages", 60),
    Frozen("web", time.monotonic()),
    StepDone("web", "dump"),
    Figures("web", {"bytes": {"rootfs": 5}, "versions": {"source": {"criu": "4.2.1"}}}),
    BytesMoved("web", "transfer", 7),
    Thawed("web", 0.25),
)


def migration(root: Path, job: Job | None, destination: str = "root@b") -> statistics.Migration:
    seen: list[Event] = []
    book = statistics.Migration("podman:web", destination, "pre-copy", root, seen.append)
    book.begin(CONTAINER)
    for event in (*([Figures("web", {"job": job.id})] if job else []), *EVENTS):
        book(event)
    assert seen[-1] == EVENTS[-1]
    return book


def test_a_migration_leaves_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = begun(tmp_path, "migrate-source", "commit", "done", destination="root@b")
    book = migration(tmp_path, job)
    recover.close(job, None)
    outcome = book.close(Outcome("web", True, stats={"downtime_s": 0.2, "total_s": 3.0, "sent_bytes": 1170}))
    kept = only(tmp_path)
    assert kept == outcome.record
    assert (kept.id, kept.state, kept.name, kept.mode, kept.destination) == (job.id, "done", "web", "pre-copy", "root@b")
    figures = kept.statistics
    assert (figures["downtime_s"], figures["total_s"], figures["sent_bytes"], figures["memory_bytes"]) == (0.2, 3.0, 1170, 1000)
    assert figures["bytes"] == {"memory_ahead": 1100, "memory": 60, "rootfs": 5}
    assert [one["dirty_bytes_per_s"] for one in figures["rounds"]] == [None, 50]
    assert main(["--store", str(tmp_path), "jobs", "show", job.id[-8:]]) == 0
    out = capsys.readouterr().out
    for part in ("downtime           200 ms", "0.98 KiB in 2.0 s", "50 B/s written", "pre-copy", "CRIU 4.2.1", "memory, while it ran"):
        assert part in out, out
    assert main(["--store", str(tmp_path), "jobs", "--all", "--format", "{{.DowntimeS}} {{.Statistics.bytes.memory}}"]) == 0
    assert capsys.readouterr().out == "0.2 60\n"


def test_one_that_was_rolled_back_says_why(tmp_path: Path) -> None:
    job = begun(tmp_path, "migrate-source", "rolled-back", destination="root@b")
    book = migration(tmp_path, job)
    recover.close(job, None)
    outcome = book.close(failure("web", MigrationRolledBack("no room there", where="web is running here")))
    kept = only(tmp_path)
    assert kept == outcome.record and kept.state == "rolled-back"
    assert kept.error is not None and (kept.error["message"], kept.error["code"]) == ("no room there", "rolled-back")


def test_one_that_was_refused(tmp_path: Path) -> None:
    migration(tmp_path, None).close(failure("web", UsageError("no")))
    assert (only(tmp_path).state, only(tmp_path).kind) == ("refused", "migrate")


def test_one_that_was_broken_off(tmp_path: Path) -> None:
    job = begun(tmp_path, "migrate-source", "rolled-back")
    book = migration(tmp_path, job)
    recover.close(job, None)
    book.broken_off(KeyboardInterrupt("Terminated"))
    assert only(tmp_path).error is not None and only(tmp_path).error["message"] == "Terminated"  # type: ignore[index]


def test_one_that_waits_keeps_its_figures_for_its_end(tmp_path: Path) -> None:
    job = begun(tmp_path, "migrate-source", "commit", destination="root@b")
    job.release()
    migration(tmp_path, job).close(failure("web", NeedsContinue("no answer")))
    waiting = only(tmp_path)
    assert (waiting.state, waiting.next) == ("waiting", f"ckpt migrate --continue {job.id}")
    assert waiting.error is not None and waiting.statistics["memory_bytes"] == 1000
    job.write("ended")
    job.write("done")
    recover.remove(job)
    kept = only(tmp_path)
    assert (kept.state, kept.next, kept.error) == ("done", "", None)
    assert kept.statistics["memory_bytes"] == 1000 and new_id() != kept.id
