"""What makes a group one instant: the cgroups' files, and what the shim takes for a restore."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ckpt.engines import _shim
from ckpt.host import freezer
from ckpt.host.cgroup import Knob


def cgroups(directory: Path, *names: str, stops: bool = True) -> list[Knob]:
    """Directories that look like cgroups; `stops`: they say that they are frozen."""
    made = []
    for name in names:
        (directory / name).mkdir()
        (directory / name / "cgroup.freeze").write_text("0")
        (directory / name / "cgroup.events").write_text(f"populated 1\nfrozen {int(stops)}\n")
        made.append(Knob(directory / name / "cgroup.freeze", "0"))
    return made


def test_all_are_told_before_one_is_waited_for(tmp_path: Path) -> None:
    late, other = cgroups(tmp_path, "late", "other", stops=False)

    def stop() -> None:
        while other.path.read_text() != "10":  # written over the "0" by a kernel that is none
            pass
        for knob in (late, other):
            knob.path.with_name("cgroup.events").write_text("populated 1\nfrozen 1\n")

    other.path.write_text("00")
    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    moment = freezer.freeze([late, other])
    thread.join(5)
    assert not thread.is_alive() and 0 <= moment.skew_s < freezer.LIMIT_S
    freezer.thaw([late, other])
    assert {knob.path.read_text() for knob in (late, other)} == {"0"}


def test_one_that_does_not_stop_lets_all_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(freezer, "LIMIT_S", 0.05)
    good, bad = (*cgroups(tmp_path, "good"), *cgroups(tmp_path, "bad", stops=False))
    with pytest.raises(freezer.NotFrozen, match="bad did not stop"):
        freezer.freeze([good, bad])
    assert {knob.path.read_text() for knob in (good, bad)} == {"0"}
    bad.path.unlink()
    with pytest.raises(freezer.NotFrozen):
        freezer.freeze([good, bad])
    assert good.path.read_text() == "0"


def test_a_question_about_restore_is_none(tmp_path: Path) -> None:
    """podman asks the runtime so before it restores into a pod; the shim must not take that for the restore that it waits for."""
    runtime = tmp_path / "crun"
    runtime.write_text("#!/bin/sh\necho real $*\n")
    runtime.chmod(0o755)
    (tmp_path / _shim.PLAN).write_bytes(_shim.plan_dumps({"verb": "restore"}))
    argv = [sys.executable, "-I", "-S", _shim.__file__, str(runtime), "restore", "--lsm-mount-context"]
    done = subprocess.run(argv, env={"CKPT_SHIM_JOB": str(tmp_path)}, capture_output=True, text=True, timeout=20)
    assert done.stdout == "real restore --lsm-mount-context\n"
    assert not (tmp_path / "bundle").exists()
