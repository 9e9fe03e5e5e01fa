"""The launcher of CRIU's action-script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt.criu import action, hold


def launched(job: Path, what: str) -> int:
    return subprocess.run([job / "hold"], env={"CRTOOLS_SCRIPT_ACTION": what, "CRTOOLS_INIT_PID": "7"}, timeout=20).returncode


def test_python_starts_only_where_there_is_something_to_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    hold.prepare(tmp_path)
    assert {what: launched(tmp_path, what) for what in ("pre-dump", "network-lock", "setup-namespaces", "pre-resume", "post-resume", "")} == {
        "pre-dump": 0, "network-lock": 0, "setup-namespaces": 0, "pre-resume": 0, "post-resume": 0, "": 0,
    }  # fmt: skip
    assert {launched(tmp_path, what) for what in action.HOLD} == {1}


@pytest.mark.parametrize(("verdict", "status"), [(b"0\n", 0), (b"1\n", 1)])
def test_it_says_who_is_held_and_takes_the_verdict(tmp_path: Path, verdict: bytes, status: int) -> None:
    hold.prepare(tmp_path)
    os.mkfifo(tmp_path / "verdict")
    owner = os.open(tmp_path / "verdict", os.O_RDWR)
    os.write(owner, verdict)
    assert launched(tmp_path, "post-dump") == status
    os.close(owner)
    held = json.loads((tmp_path / "held").read_text())
    assert (held["action"], held["init_pid"], held["criu_pid"]) == ("post-dump", "7", os.getpid())
