"""What ckpt leaves in systemd's journal, read from a socket in journald's place."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt.errors import DumpFailed
from ckpt.host import systemd
from ckpt.model import Container, JobRecord
from ckpt.ops import journald, recover, statistics
from ckpt.ops.result import failure
from ckpt.store.job import Job


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(os.fspath(tmp_path / "journal"))
        made.settimeout(5)
        monkeypatch.setattr(systemd, "JOURNAL", tmp_path / "journal")
        yield made


def entry(journal: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in journal.recv(65536).decode().splitlines())


def test_a_checkpoint_that_is_done(tmp_path: Path, journal: socket.socket) -> None:
    job = Job.create(tmp_path / "store", "checkpoint", engine="podman", container_id="ab" * 32, name="web")
    job.write("commit", checkpoint_id="cd" * 16, freeze_s=0.2125)
    job.write("done")
    recover.remove(job)
    found = entry(journal)
    assert found["CKPT_ID"] == job.id and found["CKPT_TARGET"] == "web" and found["CKPT_CHECKPOINT"] == "cd" * 16
    assert (found["CKPT_PHASE"], found["CKPT_RESULT"], found["CKPT_FREEZE_USEC"], found["PRIORITY"]) == ("checkpoint", "done", "212500", "6")
    assert int(found["CKPT_TOTAL_USEC"]) >= 0 and found["SYSLOG_IDENTIFIER"] == "ckpt"
    assert found["MESSAGE"].startswith("checkpoint of web: done, frozen 0.2")
    job.release()


def test_a_restore_that_was_undone_by_the_guard(tmp_path: Path, journal: socket.socket) -> None:
    job = Job.create(tmp_path / "store", "restore", engine="podman", name="web")
    job.write("rolled-back", by="guard", error="CRIU failed")
    recover.remove(job)
    found = entry(journal)
    assert (found["CKPT_PHASE"], found["CKPT_RESULT"], found["PRIORITY"]) == ("restore", "rolled-back", "4")
    assert found["CKPT_ERROR"] == "CRIU failed" and "(by ckpt's guard): CRIU failed" in found["MESSAGE"]
    job.release()


def test_a_migration_is_told_of_once(tmp_path: Path, journal: socket.socket) -> None:
    told = statistics.Migration("web", "root@b", "stop", tmp_path / "store", lambda event: None)
    told.begin(Container("podman", "ab" * 32, "web", "running"))
    told.close(failure("web", DumpFailed("no")))
    found = entry(journal)
    assert (found["CKPT_PHASE"], found["CKPT_RESULT"], found["CKPT_ERROR"]) == ("migrate", "refused", "no")
    assert found["MESSAGE"].startswith("migration of web to root@b: refused")
    job = Job.create(tmp_path / "store", "migrate-source", name="web")
    job.write("done")
    recover.remove(job)  # its command has told
    journal.setblocking(False)
    with pytest.raises(BlockingIOError):
        journal.recv(1)
    job.release()


def test_states_and_missing_figures(journal: socket.socket) -> None:
    one = JobRecord("20261121T120000-00000000", "restore", "lost", "web")
    journald.record(one)
    found = entry(journal)
    assert found["PRIORITY"] == "3" and "CKPT_FREEZE_USEC" not in found and "CKPT_ERROR" not in found
    journald.record(replace(one, statistics={"freeze_s": "x", "total_s": True}))
    assert "CKPT_TOTAL_USEC" not in entry(journal)
