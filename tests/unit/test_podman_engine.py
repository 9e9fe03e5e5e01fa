"""What the podman engine asks of podman and of an OCI runtime: nothing that ends or removes what is not its own. Both are doubles."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ckpt.engines import _leavings
from ckpt.engines.podman import Podman
from ckpt.errors import StateUnknown
from ckpt.model import Manifest, RestoreOptions
from ckpt.store.job import Job

IDENTITY = "c" * 64
# What it is asked goes to its log; what it answers is in a file named after the subcommand, a status before the words.
DOUBLE = """#!/bin/sh
echo "$*" >>"$0.log"
verb=$1; case $verb in container|image|volume|pod) verb=$1-$2;; esac
[ -e "$0.$verb" ] || exit 0
read -r status words <"$0.$verb"
[ "$status" = 0 ] && echo "$words" || echo "$words" >&2
exit "$status"
"""


class Programs:
    """podman and runc, which do nothing."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("podman", "runc"):
            (directory / name).write_text(DOUBLE)
            (directory / name).chmod(0o755)
        self.runtime = os.fspath(directory / "runc")

    def answer(self, program: str, verb: str, status: int, words: str = "") -> None:
        (self.directory / f"{program}.{verb}").write_text(f"{status} {words}\n")

    def asked(self, program: str) -> list[str]:
        log = self.directory / f"{program}.log"
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    return Programs(directory)


def status(word: str) -> str:
    return json.dumps({"ociVersion": "1.0.0", "id": IDENTITY, "pid": 77, "status": word})


@pytest.mark.parametrize("word", ["running", "paused", "creating", "unheard-of"])
def test_what_lives_is_left(programs: Programs, word: str) -> None:
    programs.answer("runc", "state", 0, status(word))
    with pytest.raises(StateUnknown, match=f"{word} container {IDENTITY[:12]} that its engine does not know") as caught:
        _leavings.forget(programs.runtime, IDENTITY, lambda: False)
    assert programs.asked("runc") == [f"state {IDENTITY}"]
    assert "not touched" in (caught.value.where or "") and f"runc delete --force {IDENTITY}" in (caught.value.hint or "")


@pytest.mark.parametrize("words", ["", "[]", "null", '{"status"', "{}"])
def test_what_makes_no_sense_is_left(programs: Programs, words: str) -> None:
    programs.answer("runc", "state", 0, words)
    with pytest.raises(StateUnknown, match="does not tell"):
        _leavings.forget(programs.runtime, IDENTITY, lambda: False)
    assert programs.asked("runc") == [f"state {IDENTITY}"]


def test_a_runtime_that_does_not_answer(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    (programs.directory / "runc").write_text('#!/bin/sh\necho "$*" >>"$0.log"; exec sleep 60\n')
    monkeypatch.setattr(_leavings, "LIMIT_S", 0.5)
    with pytest.raises(StateUnknown, match="no answer in"):
        _leavings.forget(programs.runtime, IDENTITY, lambda: False)
    assert programs.asked("runc") in ([], [f"state {IDENTITY}"])


@pytest.mark.parametrize(("word", "how"), [("stopped", "delete"), ("created", "delete --force")])
def test_leavings_go(programs: Programs, word: str, how: str) -> None:
    programs.answer("runc", "state", 0, status(word))
    _leavings.forget(programs.runtime, IDENTITY, lambda: False)
    assert programs.asked("runc") == [f"state {IDENTITY}", f"{how} {IDENTITY}"]


@pytest.mark.parametrize("words", ["container does not exist", f"error opening file `/run/crun/{IDENTITY}/status`: No such file or directory"])
def test_a_directory_without_a_state_goes(programs: Programs, words: str) -> None:
    programs.answer("runc", "state", 1, words)
    _leavings.forget(programs.runtime, IDENTITY, lambda: False)
    assert programs.asked("runc")[1:] == [f"delete --force {IDENTITY}"]


def test_a_state_that_cannot_be_read_ends_nothing(programs: Programs) -> None:
    programs.answer("runc", "state", 1, "cannot allocate memory")
    _leavings.forget(programs.runtime, IDENTITY, lambda: False)
    assert programs.asked("runc") == [f"state {IDENTITY}"]


@pytest.mark.parametrize("cold", [False, True])
def test_a_restore_refuses_before_podman_begins(programs: Programs, tmp_path: Path, cold: bool) -> None:
    """Podman would delete what is in its way, having failed."""
    programs.answer("podman", "container-exists", 1)
    programs.answer("runc", "state", 0, status("running"))
    job = Job.create(tmp_path, "restore")
    manifest = Manifest("a" * 16, "web", "podman", IDENTITY, 1.5, runtime="runc")
    try:
        with pytest.raises(StateUnknown):
            Podman().begin_restore(job.directory, manifest, RestoreOptions(cold=cold, checked=True), job, volume_ready=lambda name, path: None)
    finally:
        job.release()
    assert programs.asked("podman") == [f"container exists {IDENTITY}"] and programs.asked("runc") == [f"state {IDENTITY}"]


@pytest.mark.parametrize("answer", [0, 125])
def test_a_container_that_podman_knows_is_podmans(programs: Programs, answer: int) -> None:
    """125: podman itself failed, which says nothing about the container."""
    programs.answer("podman", "container-exists", answer)
    programs.answer("runc", "state", 0, status("stopped"))
    Podman()._forget_runtime(Manifest("a" * 16, "web", "podman", IDENTITY, 1.5, runtime="runc"))
    assert programs.asked("runc") == [f"state {IDENTITY}"]


def test_what_the_runtime_does_not_know_podman_is_not_asked_about(programs: Programs) -> None:
    """Each call of podman is pause."""
    programs.answer("runc", "state", 1, "container does not exist")
    Podman()._forget_runtime(Manifest("a" * 16, "web", "podman", IDENTITY, 1.5, runtime="runc"))
    assert programs.asked("podman") == []


def test_a_container_image_in_use_stays(programs: Programs) -> None:
    """What a migration brought and then undid: --force would end and remove the containers that use it by now."""
    programs.answer("podman", "image-rm", 2, "image used by 0123: image is in use by a container")
    Podman().remove_container_image("sha256:" + "9" * 64)
    assert programs.asked("podman") == [f"image rm sha256:{'9' * 64}"]


def test_a_rolled_back_job_removes_its_container_image_without_force(programs: Programs, tmp_path: Path) -> None:
    job = Job.create(tmp_path, "migrate-destination", loaded_image="9" * 64)
    Podman().rollback(job)
    job.release()
    assert [asked for asked in programs.asked("podman") if asked.startswith("image")] == [f"image rm {'9' * 64}"]
