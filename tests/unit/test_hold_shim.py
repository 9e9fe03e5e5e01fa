"""The program that stands in for an OCI runtime."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from ckpt.engines import _hold, _podman_held
from ckpt.host.run import CommandFailed, Result
from ckpt.model import Manifest, RestoreOptions
from ckpt.store.job import Job


def test_several_at_once_write_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores in several threads begin on a host that has none yet."""
    both, chmod = threading.Barrier(2), Path.chmod

    def meet(path: Path, mode: int) -> None:
        both.wait(10)
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", meet)
    with ThreadPoolExecutor(2) as pool:
        made = [one.result(30) for one in [pool.submit(_hold.shim_script, "crun", tmp_path / "shim") for _ in range(2)]]
    assert made[0] == made[1] and os.access(made[0], os.X_OK) and os.listdir(tmp_path / "shim") == ["crun"]


def test_several_at_once_tell_podman_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both, rename = threading.Barrier(2), Path.rename

    def meet(path: Path, target: Path) -> Path:
        both.wait(10)
        return rename(path, target)

    jobs = [Job.create(tmp_path, "restore") for _ in range(2)]
    (tmp_path / "shim").mkdir()
    monkeypatch.setattr(_hold, "SHIM_DIR", tmp_path / "shim")
    monkeypatch.setattr(_podman_held, "_RUNTIMES", ())
    monkeypatch.setattr(Path, "rename", meet)
    with ThreadPoolExecutor(2) as pool:
        made = [one.result(30) for one in [pool.submit(_podman_held.conf_override, job, dump=False) for job in jobs]]
    assert {one["CONTAINERS_CONF_OVERRIDE"] for one in made} == {str(tmp_path / "shim" / "containers.conf")}
    assert os.listdir(tmp_path / "shim") == ["containers.conf"]
    for job in jobs:
        job.release()


def test_several_at_once_need_a_volume_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One makes and fills it; none goes on before it is filled."""
    both, there, filled, lock = threading.Barrier(2), set[str](), list[str](), threading.Lock()

    def podman(argv: list[str], check: bool = True, **rest: object) -> Result:
        match argv[1:3]:
            case ["volume", "exists"]:
                known = argv[3] in there
                with suppress(threading.BrokenBarrierError):
                    both.wait(0.3)  # both ask before one has made it, if they can
                return Result(tuple(argv), int(not known), b"", b"")
            case ["volume", "create"]:
                with lock:
                    if argv[3] in there:
                        raise CommandFailed(Result(tuple(argv), 125, b"", b""), "it exists already")
                    there.add(argv[3])
        return Result(tuple(argv), 0, str(tmp_path).encode(), b"")

    monkeypatch.setattr(_podman_held, "run", podman)
    manifest = Manifest("a" * 16, "web", "podman", "c" * 64, 1.5, volumes=(("data", "/data"),))
    jobs = [Job.create(tmp_path, "restore") for _ in range(2)]

    def make(job: Job) -> list[str]:
        attempt = _podman_held.PodmanRestore(job, manifest, RestoreOptions(existing_volumes="keep"))
        attempt.make_volumes(lambda name, directory: filled.append(name))
        return list(filled)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(make, jobs)) == [["data"], ["data"]] and filled == ["data"]
    for job in jobs:
        job.release()
