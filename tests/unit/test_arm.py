"""Periodic checkpoints: arming, disarming, what a run does, what it lets go."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckpt.cli.main import main
from ckpt.engines import registry
from ckpt.errors import BusyError, DumpFailed, EngineUnavailable, FeatureMissing, TargetNotFound, UsageError
from ckpt.events import ignore
from ckpt.host import systemd
from ckpt.model import Capabilities, Container, DumpOptions
from ckpt.ops import arm, install_units
from ckpt.ops.result import Outcome, failure
from ckpt.store.job import Job

WEB = Container("toy", "ab" * 32, "web", "running")


class Engine:
    name = "toy"
    prefixes = ("toy",)

    def __init__(self) -> None:
        self.there = {"web": WEB}

    def probe(self) -> Capabilities:
        return Capabilities(True)

    def containers(self) -> list[Container]:
        return list(self.there.values())

    def find(self, name: str) -> list[Container]:
        return [one for one in self.there.values() if one.name == name]

    def describe(self, container: Container) -> Container:
        return container


class Bench:
    def __init__(self, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self.units = top / "store", top / "units"
        self.engine = Engine()
        self.calls: list[tuple[str, ...]] = []
        self.refuses: tuple[str, ...] = ("never",)
        self.status: list[str] = []
        monkeypatch.setattr(registry, "engines", lambda: (self.engine,))
        monkeypatch.setattr(systemd, "running", lambda: True)
        monkeypatch.setattr(systemd, "control", self.control)
        monkeypatch.setattr(systemd, "notify", lambda text, **rest: self.status.append(text))
        monkeypatch.setattr(install_units, "LOCAL", self.units)
        monkeypatch.setattr(arm, "PACKAGED", top / "none")
        monkeypatch.setenv("CKPT_STORE", str(self.store))
        monkeypatch.setattr("ckpt.cli.main._catch_signals", lambda: None)  # pytest's handlers stay

    def control(self, *words: str) -> str:
        self.calls.append(words)
        if words[0] in self.refuses:
            raise EngineUnavailable("no")
        return ""

    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.units)) for path in self.units.rglob("*") if path.is_file())

    def arm(self, every_s: float = 900.0, keep_last: int = 8) -> list[arm.Armed]:
        return arm.arm(["web"], every_s=every_s, keep_last=keep_last, store_root=self.store, emit=ignore)


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_arm_and_disarm(bench: Bench) -> None:
    bench.arm()
    assert json.loads((bench.store / "armed.json").read_text()) == {
        "toy:web": {"every_s": 900.0, "keep_last": 8, "engine": "toy", "container_id": "ab" * 32, "name": "web"}
    }
    assert (bench.store / "armed.json").stat().st_mode & 0o777 == 0o600
    assert bench.files() == ["ckpt-arm@.service", "ckpt-arm@.timer", "ckpt-arm@toy:web.timer.d/10-ckpt.conf"]
    assert "OnUnitActiveSec=900s\n" in (bench.units / "ckpt-arm@toy:web.timer.d/10-ckpt.conf").read_text()
    assert bench.calls == [("daemon-reload",), ("enable", "ckpt-arm@toy:web.timer"), ("restart", "ckpt-arm@toy:web.timer")]
    bench.arm(every_s=60.0, keep_last=2)
    assert arm.load(bench.store)["toy:web"].keep_last == 2
    assert "OnUnitActiveSec=60s\n" in (bench.units / "ckpt-arm@toy:web.timer.d/10-ckpt.conf").read_text()
    arm.disarm(["web"], store_root=bench.store)
    assert arm.load(bench.store) == {} and bench.files() == ["ckpt-arm@.service", "ckpt-arm@.timer"]
    assert ("disable", "--now", "ckpt-arm@toy:web.timer") in bench.calls
    install_units.uninstall(install_units.Place())
    assert bench.files() == []


def test_disarm_what_is_gone_and_what_is_not_armed(bench: Bench) -> None:
    bench.arm()
    bench.engine.there.clear()
    with pytest.raises(TargetNotFound, match="'db' is not armed"):
        arm.disarm(["web", "db"], store_root=bench.store)
    assert "toy:web" in arm.load(bench.store)
    arm.disarm(["web"], store_root=bench.store)
    assert arm.load(bench.store) == {}


def test_systemd_refuses(bench: Bench) -> None:
    bench.refuses = ("restart",)
    with pytest.raises(EngineUnavailable):
        bench.arm()
    assert bench.files() == [] and arm.load(bench.store) == {}
    bench.refuses = ()
    bench.arm()
    before = (bench.files(), arm.load(bench.store), (bench.units / "ckpt-arm@toy:web.timer.d/10-ckpt.conf").read_text())
    bench.refuses = ("enable",)
    with pytest.raises(EngineUnavailable):
        bench.arm(every_s=20)
    assert (bench.files(), arm.load(bench.store), (bench.units / "ckpt-arm@toy:web.timer.d/10-ckpt.conf").read_text()) == before


def test_a_file_that_is_not_ours(bench: Bench) -> None:
    (bench.units / "ckpt-arm@toy:web.timer.d").mkdir(parents=True)
    (bench.units / "ckpt-arm@toy:web.timer.d/10-ckpt.conf").write_text("[Timer]\n")
    with pytest.raises(BusyError):
        bench.arm()
    assert bench.files() == ["ckpt-arm@toy:web.timer.d/10-ckpt.conf"] and arm.load(bench.store) == {} and bench.calls == []


def test_without_systemd(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "running", lambda: False)
    with pytest.raises(FeatureMissing):
        bench.arm()
    assert not bench.store.exists() and not bench.units.exists()


def test_unknown_target_changes_nothing(bench: Bench) -> None:
    with pytest.raises(TargetNotFound):
        arm.arm(["web", "nobody"], every_s=60, keep_last=1, store_root=bench.store, emit=ignore)
    assert not bench.store.exists() and not bench.units.exists()


@pytest.mark.parametrize(("text", "seconds"), [("15m", 900), ("30s", 30), ("2h", 7200), ("1d", 86400), ("1h30m", 5400), ("90", 90)])
def test_every(text: str, seconds: float) -> None:
    assert arm.seconds(text) == seconds


@pytest.mark.parametrize("text", ["9s", "0", "-5m", "often", "", "1.5h", "15 minutes", "999d", "٣٠s"])
def test_every_that_is_none(text: str, bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--every"):
        arm.seconds(text)
    assert main(["arm", "web", f"--every={text}"]) == 2
    assert len([line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]) == 1
    assert arm.load(bench.store) == {}


def test_command_line(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["arm"]) == 0 and capsys.readouterr().out == ""
    assert main(["arm", "web"]) == 2
    assert main(["arm", "--every", "15m"]) == 2
    assert main(["arm", "web", "--every", "15m", "--keep-last", "0"]) == 2
    capsys.readouterr()
    assert main(["arm", "web", "--every", "15m", "--keep-last", "3"]) == 0
    assert capsys.readouterr().out == "web\n"
    assert main(["arm", "--format", "json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["results"]
    assert (row["target"], row["every_s"], row["keep_last"], row["newest"]) == ("toy:web", 900.0, 3, None)
    assert main(["disarm", "nobody"]) == 10
    assert main(["disarm", "-a"]) == 0
    assert arm.load(bench.store) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"toy:web": 3}', '{"toy:web": {"every_s": "x"}}', "[" * 100_000])
def test_a_file_that_makes_no_sense(text: str, bench: Bench) -> None:
    bench.store.mkdir()
    (bench.store / "armed.json").write_text(text)
    assert arm.load(bench.store) == {}


def run(bench: Bench) -> Outcome | None:
    return arm.run("toy:web", options=DumpOptions(), store_root=bench.store, emit=ignore)


@pytest.fixture
def saved(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What checkpoint() was called with; `answer` is what it gives."""
    calls: list[Any] = []

    def checkpoint(targets: Any, *, options: DumpOptions, tags: Any, **rest: Any) -> list[Outcome]:
        calls.append((targets, options, tags))
        return [bench_answer[0]]

    bench_answer: list[Outcome] = [failure("toy:web", DumpFailed("x"))]
    monkeypatch.setattr("ckpt.ops.checkpoint.checkpoint", checkpoint)
    bench.answer = bench_answer  # type: ignore[attr-defined]
    return calls


def test_runs_with_nothing_to_do(bench: Bench, saved: list[Any]) -> None:
    assert run(bench) is None  # not armed
    bench.arm()
    bench.engine.there["web"] = replace(WEB, state="exited")
    assert run(bench) is None
    bench.engine.there.clear()
    assert run(bench) is None
    bench.engine.there["web"] = WEB
    job = Job.create(bench.store, "migrate-source", container_id=WEB.id)
    assert run(bench) is None
    job.release()
    assert saved == []
    assert len(bench.status) == 4 and all(text.startswith("skipped: toy:web") for text in bench.status)


def test_busy_is_a_quiet_success_and_a_failure_is_one(bench: Bench, saved: list[Any]) -> None:
    bench.arm()
    bench.answer[0] = failure("toy:web", BusyError("web is paused"))  # type: ignore[attr-defined]
    assert run(bench) is None
    bench.answer[0] = failure("toy:web", DumpFailed("CRIU"))  # type: ignore[attr-defined]
    with pytest.raises(DumpFailed):
        run(bench)
    assert [(options.leave_running, tags) for _, options, tags in saved] == [(True, ("armed",))] * 2


def one(number: int, *, tags: tuple[str, ...] = ("armed",), pinned: bool = False, note: str = "", name: str = "web", engine: str = "toy") -> Any:
    manifest = SimpleNamespace(id=f"{number:032x}", name=name, engine=engine, created_s=float(number), generation=number)
    return SimpleNamespace(manifest=manifest, entry=SimpleNamespace(tags=tags, pinned=pinned, note=note, stored_s=0.0), ref=f"{name}@{number}")


def test_only_the_oldest_armed_ones_go(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    there = [
        one(1, tags=()), one(2), one(3, pinned=True), one(4), one(5, tags=("armed", "good")), one(6, note="before the update"), one(7),
        one(8, name="db"), one(9, engine="other"), one(10), one(11, tags=("hibernate",)),
    ]  # fmt: skip
    removed: list[str] = []

    class Catalog:
        def __init__(self, root: Path) -> None:
            pass

        def all(self) -> list[Any]:
            return list(reversed(there))

        def remove(self, checkpoint: Any) -> None:
            if checkpoint.ref == "web@2":
                raise BusyError("it is being restored")
            removed.append(checkpoint.ref)

    monkeypatch.setattr(arm, "Catalog", Catalog)
    (armed,) = bench.arm(keep_last=2)
    assert arm.thin(armed, store_root=bench.store, emit=ignore) == 1
    assert removed == ["web@4"]
