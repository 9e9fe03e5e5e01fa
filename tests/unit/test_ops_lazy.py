"""The keeper of a lazy restore, with a stand-in for CRIU's daemon: who goes on, who is ended, and what the next command finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt.archive import layout, manifest
from ckpt.criu import lazy as daemon
from ckpt.criu import tree
from ckpt.engines import registry
from ckpt.errors import BusyError, DigestMismatch, FeatureMissing, RestoreFailed
from ckpt.host import uffd
from ckpt.model import Checkpoint, Container, Manifest
from ckpt.ops import lazy, recover
from ckpt.store.catalog import Catalog
from ckpt.store.job import Job
from tests.contract.subject import wait_until

CRIU = """#!/bin/sh
[ "$1" = check ] && exit ${UFFD-0}
for last; do :; done
[ -e "$0.broken" ] && { echo "(00.1) Error (criu/uffd.c:1): no socket" >&2; exit 1; }
printf '\\0' >&"$last"
while [ ! -e "$0.through" ]; do sleep 0.01; done
exit $(cat "$0.through")
"""


@pytest.fixture
def criu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The stand-in: ends with the status that is written to `criu.through`, does not start while `criu.broken` is there."""
    program = tmp_path / "bin" / "criu"
    program.parent.mkdir()
    program.write_text(CRIU)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    yield program
    program.with_name("criu.through").write_text("0")  # for what a failed test left


@pytest.fixture
def workload() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


class Restore:
    """A restore of a checkpoint in a store, as far as its keeper."""

    def __init__(self, root: Path, *, draft: bool = False) -> None:
        self.root = root
        self.catalog = Catalog(root)
        made = self.catalog.begin("web")
        (made.stage / "checkpoint").mkdir()
        (made.stage / "checkpoint" / "pages-1.img").write_bytes(b"pages")
        (made.stage / "artifacts").mkdir()
        known = Manifest(id="", name="web", engine="toy", container_id="c1", created_s=0.0, digests=layout.digest_members(made.stage))
        self.job = Job.create(root, "restore", engine="toy", container_id="c1", name="web")
        if draft:
            self.stage = made.stage
            self.keeper = lazy.Keeper(self.job, made.stage, lease_fds=(made.fileno(),), draft=True)
            made.close()
            self.pid = int(self.job.facts["keeper_pid"])
            return
        self.checkpoint: Checkpoint = made.commit(known)
        self.stage = self.checkpoint.directory
        with self.catalog.lease_fd(self.checkpoint) as fd:
            self.keeper = lazy.Keeper(self.job, self.stage, lease_fds=(fd,), draft=False)
        self.pid = int(self.job.facts["keeper_pid"])

    def listen(self) -> None:
        daemon.wait_listening(self.job.directory, self.pid)

    def commit(self, workload: subprocess.Popen[bytes]) -> None:
        found = tree.stat(workload.pid)
        assert found is not None
        self.job.write("held", restored_pid=workload.pid, restored_ticks=found.start_ticks)
        self.job.write("commit")
        self.job.write("serving")

    @property
    def leased(self) -> bool:
        try:
            self.catalog.remove(self.checkpoint)
        except BusyError:
            return True
        return False

    def over(self) -> bool:
        """The keeper has ended (a zombie has)."""
        found = tree.stat(self.pid)
        return found is None or not found.alive


def test_it_serves_and_cleans_up(tmp_path: Path, criu: Path, workload: subprocess.Popen[bytes]) -> None:
    restore = Restore(tmp_path / "store")
    restore.listen()
    restore.commit(workload)
    restore.job.release()
    restore.keeper.serve()
    assert restore.leased and daemon.running(restore.job.directory)
    assert recover.sweep(restore.root) == [] and restore.job.state == "serving"
    assert [facts["name"] for facts in recover.served(restore.root)] == ["web"]
    criu.with_name("criu.through").write_text("0")
    assert wait_until(restore.over)
    assert not restore.job.directory.exists() and not restore.leased
    assert workload.poll() is None


def test_abort_ends_it(tmp_path: Path, criu: Path, workload: subprocess.Popen[bytes]) -> None:
    restore = Restore(tmp_path / "store")
    restore.listen()
    restore.keeper.abort()
    assert restore.over() and not daemon.running(restore.job.directory)
    assert not restore.leased and restore.job.directory.exists()


@pytest.mark.parametrize("committed", [False, True])
def test_without_a_word_the_journal_decides(tmp_path: Path, criu: Path, workload: subprocess.Popen[bytes], committed: bool) -> None:
    restore = Restore(tmp_path / "store")
    restore.listen()
    if committed:
        restore.commit(workload)
    (directory := restore.job.directory).rename(directory.with_name("moved"))  # a guard may have removed it before the keeper looks
    pipe = restore.keeper._process.stdin
    assert pipe is not None
    pipe.close()
    if committed:
        assert not wait_until(restore.over, 0.3) and restore.leased
        criu.with_name("criu.through").write_text("0")
    assert wait_until(restore.over)
    assert wait_until(lambda: not restore.leased)  # the stand-in's own child has the lock for a moment longer


@pytest.mark.parametrize("how", ["status", "signal"])
def test_a_failed_daemon_ends_the_workload(tmp_path: Path, criu: Path, workload: subprocess.Popen[bytes], how: str) -> None:
    restore = Restore(tmp_path / "store")
    restore.listen()
    restore.commit(workload)
    restore.job.release()
    restore.keeper.serve()
    if how == "status":
        criu.with_name("criu.through").write_text("1")
    else:
        os.kill(int(json.loads((restore.job.directory / daemon.READY).read_text())["pid"]), signal.SIGKILL)
    assert workload.wait(20) == -signal.SIGKILL
    assert wait_until(restore.over)
    assert restore.job.state == "lost"
    (said,) = recover.sweep(restore.root)
    assert "did not all arrive" in said and ("status 1" if how == "status" else "signal 9") in said
    assert recover.sweep(restore.root) == [] and not restore.job.directory.exists()
    assert not restore.leased


def test_a_daemon_that_fails_before_the_commit(tmp_path: Path, criu: Path, workload: subprocess.Popen[bytes]) -> None:
    restore = Restore(tmp_path / "store")
    restore.listen()
    restore.keeper.check()
    criu.with_name("criu.through").write_text("1")
    assert wait_until((restore.job.directory / daemon.FAILED).exists)
    with pytest.raises(RestoreFailed, match="failed: status 1"):
        restore.keeper.check()
    restore.keeper.abort()
    assert workload.poll() is None


def test_a_daemon_that_does_not_start(tmp_path: Path, criu: Path) -> None:
    criu.with_name("criu.broken").touch()
    restore = Restore(tmp_path / "store", draft=True)
    with pytest.raises(RestoreFailed, match="did not start"):
        restore.listen()
    restore.keeper.abort()
    assert "no socket" in (restore.job.directory / "keeper.log").read_text()
    assert not restore.stage.exists()


def test_damaged_chunks_are_named(tmp_path: Path, criu: Path, workload: subprocess.Popen[bytes]) -> None:
    restore = Restore(tmp_path / "store")
    restore.listen()
    restore.commit(workload)
    restore.job.release()
    restore.keeper.serve()
    (restore.job.directory / daemon.DAMAGE).write_text("checkpoint/pages-1.img was changed or damaged")
    criu.with_name("criu.through").write_text("1")  # the daemon, whose feeder is gone
    assert workload.wait(20) == -signal.SIGKILL
    assert wait_until(restore.over)
    assert "pages-1.img was changed or damaged" in recover.sweep(restore.root)[0]


def test_a_draft_goes_with_the_keeper(tmp_path: Path, criu: Path, workload: subprocess.Popen[bytes]) -> None:
    restore = Restore(tmp_path / "store", draft=True)
    restore.listen()
    restore.commit(workload)
    restore.job.release()
    restore.keeper.serve()
    restore.catalog.sweep()
    assert restore.stage.exists()
    criu.with_name("criu.through").write_text("0")
    assert wait_until(restore.over)
    assert not restore.stage.exists()


def test_the_lease_outlives_a_killed_keeper(tmp_path: Path, criu: Path, workload: subprocess.Popen[bytes]) -> None:
    restore = Restore(tmp_path / "store")
    restore.listen()
    restore.commit(workload)
    restore.job.release()
    os.kill(restore.pid, signal.SIGKILL)
    assert wait_until(restore.over)
    assert restore.leased and recover.sweep(restore.root) == [] and restore.job.directory.exists()
    criu.with_name("criu.through").write_text("0")
    assert wait_until(lambda: not daemon.running(restore.job.directory))
    recover.sweep(restore.root)
    assert not restore.job.directory.exists() and not restore.leased
    restore.keeper.serve()  # nobody hears it


def test_the_daemon_of_a_killed_keeper_goes_after_its_tree(tmp_path: Path, criu: Path, workload: subprocess.Popen[bytes]) -> None:
    """Not with the keeper: the tree would read zeros where its memory did not arrive. Such a daemon may never end by itself."""
    restore = Restore(tmp_path / "store")
    restore.listen()
    restore.commit(workload)
    restore.job.release()
    os.kill(restore.pid, signal.SIGKILL)
    assert wait_until(restore.over)
    assert recover.sweep(restore.root) == [] and daemon.running(restore.job.directory) and workload.poll() is None
    workload.kill()
    workload.wait()
    assert recover.sweep(restore.root) == []
    assert not daemon.running(restore.job.directory) and not restore.job.directory.exists()
    assert wait_until(lambda: not restore.leased)  # the stand-in's own child has it, too
    restore.keeper.serve()  # nobody hears it


def test_a_keeper_is_small() -> None:
    """There is one for each copy of a set: what only some of them need is not imported by all."""
    script = "import sys; sys.path.insert(0, sys.argv[1]); import ckpt.ops.lazy; print(*sys.modules)"
    parent = str(Path(lazy.__file__).resolve().parents[2])
    said = subprocess.run([sys.executable, "-I", "-c", script, parent], stdout=subprocess.PIPE, check=True, text=True, timeout=60).stdout.split()
    only_some = {"ckpt.ops.feeder", "ckpt.ops.recover", "ckpt.criu.pagefeed", "ckpt.store.catalog", "concurrent.futures", "google.protobuf", "numpy"}
    assert "ckpt.ops.lazy" in said and not only_some & set(said)


def test_a_dead_keeper_is_no_keeper(tmp_path: Path, criu: Path) -> None:
    restore = Restore(tmp_path / "store")
    restore.listen()
    os.kill(restore.pid, signal.SIGKILL)
    assert wait_until(restore.over)
    with pytest.raises(RestoreFailed, match="has ended"):
        restore.keeper.check()
    restore.keeper.abort()
    assert not daemon.running(restore.job.directory)


class Toy:
    name = "toy"
    prefixes = ("toy",)

    def find(self, name: str) -> list[Container]:
        return [self.describe(Container("toy", "c1", "web", "running"))]

    def describe(self, container: Container) -> Container:
        return Container("toy", "c1", "web", "running")


def test_the_guard_leaves_the_job_to_the_keeper(
    tmp_path: Path, criu: Path, workload: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ckpt died after the commit: the guard lets the tree run, and does not take the job's directory from under the daemon."""
    monkeypatch.setattr(registry, "engines", lambda: (Toy(),))
    restore = Restore(tmp_path / "store")
    restore.listen()
    restore.job.write("commit")
    restore.job.release()
    assert recover.sweep(restore.root) == ["an interrupted restore of web was finished"]
    assert restore.job.state == "serving" and restore.job.facts["by"] == "guard"
    criu.with_name("criu.through").write_text("0")
    restore.keeper.serve()
    assert wait_until(restore.over) and not restore.job.directory.exists()


def test_feature(criu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.require()
    criu.write_text(CRIU.replace("${UFFD-0}", "1"))
    with pytest.raises(FeatureMissing, match="userfaultfd"):
        daemon.require()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("ckpt.host.run.which", lambda program: None)
    with pytest.raises(FeatureMissing, match="not installed"):
        daemon.require()


def test_digests_of_some_members_only(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    for name in ("config.dump", "checkpoint/pages-1.img"):
        (tmp_path / name).write_text(name)
    known = manifest.loads(
        manifest.dumps(Manifest(id="1", name="web", engine="toy", container_id="c", created_s=0.0, digests=layout.digest_members(tmp_path)))
    )
    (tmp_path / "checkpoint/pages-1.img").write_text("damaged")
    layout.check_digests(tmp_path, known, only=lambda name: not layout.is_pages(name))
    with pytest.raises(DigestMismatch, match="pages-1"):
        layout.check_digests(tmp_path, known, only=layout.is_pages)
    (tmp_path / "checkpoint/pages-1.img").unlink()
    with pytest.raises(DigestMismatch, match="missing"):
        layout.check_digests(tmp_path, known, only=lambda name: not layout.is_pages(name))


def test_descriptors_of_other_processes() -> None:
    """A copy is the same open file; a process without descriptors is one that ends."""
    reader, writer = os.pipe()
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], pass_fds=(writer,)) as process:
        pidfd = os.pidfd_open(process.pid)
        os.close(writer)
        assert uffd.descriptors(process.pid) == []
        copied = uffd.copy(pidfd, writer)
        with pytest.raises(OSError):
            uffd.copy(pidfd, 999)
        process.kill()
        assert wait_until(lambda: uffd.descriptors(process.pid) is None)
        os.write(copied, b"x")
        assert os.read(reader, 1) == b"x"
        for fd in (reader, copied, pidfd):
            os.close(fd)
    assert not uffd.served(os.getpid())
