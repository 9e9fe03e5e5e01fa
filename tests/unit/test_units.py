"""ckpt's systemd units: their texts, installing them, taking them away again."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from ckpt.cli.main import main
from ckpt.errors import BusyError, EngineUnavailable, FeatureMissing, PermissionDenied
from ckpt.events import Event, ignore
from ckpt.host import systemd
from ckpt.ops import install_units, units
from ckpt.ops.hibernate import guards
from ckpt.ops.hibernate.settings import HibernateSettings
from ckpt.store import durable

STORE = Path("/var/lib/ckpt")
ARGV = ["/usr/bin/ckpt"]
DEFAULTS = HibernateSettings()


@pytest.fixture(autouse=True)
def defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.ops.hibernate.settings.load", lambda: DEFAULTS)
    monkeypatch.setattr("ckpt.cli.main._catch_signals", lambda: None)  # pytest's handlers stay


def keys(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        key, equals, value = line.partition("=")
        if equals:
            found.setdefault(key, []).append(value)
    return found


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() or path.is_symlink())


def test_the_save_comes_before_the_stops() -> None:
    text = units.hibernate(ARGV, "", DEFAULTS, [STORE])
    found = keys(text)
    after = " ".join(found["After"]).split()
    assert {"ckpt-resume.service", "podman-restart.service", "podman.service", "local-fs.target", "network.target"} <= set(after)
    assert found["ExecStop"] == ["/usr/bin/ckpt hibernate save --at-shutdown"] and "ExecStart" not in found
    assert found["Type"] == ["oneshot"] and found["RemainAfterExit"] == ["yes"] and found["KillMode"] == ["process"]
    assert keys(units.stopped_later())["Before"] == ["ckpt-hibernate.service"]


def test_resume_comes_before_what_starts_cold() -> None:
    found = keys(units.resume(ARGV, "", DEFAULTS, [STORE]))
    before = " ".join(found["Before"]).split()
    assert {"podman-restart.service", "podman.service"} <= set(before) and "podman.socket" not in before
    assert found["KillMode"] == ["process"]  # what it restored stays when it fails
    assert float(found["TimeoutStartSec"][0]) > 0
    assert not set(before) & set(" ".join(found["After"]).split())


def test_time_limit_follows_the_settings() -> None:
    short, long = HibernateSettings(shutdown_timeout_s=10, stop_timeout_s=5), HibernateSettings(shutdown_timeout_s=900)
    assert keys(units.hibernate(ARGV, "", short, [STORE]))["TimeoutStopSec"] == ["75"]
    assert keys(units.hibernate(ARGV, "", long, [STORE]))["TimeoutStopSec"] == ["990"]


def test_warnings() -> None:
    assert install_units.warnings(DEFAULTS, 1 << 30) == []
    (text,) = install_units.warnings(DEFAULTS, 40 << 30)
    assert "40.0 GiB" in text and "shutdown_timeout_s = 300" in text
    (text,) = install_units.warnings(HibernateSettings(shutdown_timeout_s=1790), 0)
    assert "forces the machine down" in text


@pytest.mark.parametrize(
    ("word", "text"),
    [("/usr/bin/ckpt", "/usr/bin/ckpt"), ("/a b/ckpt", '"/a b/ckpt"'), ("/100%/$x", "/100%%/$$x"), ('/a"b', '"/a\\"b"'), ("", '""')],
)
def test_quoted(word: str, text: str) -> None:
    assert units.quoted(word) == text


def test_command_of_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "ckpt"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script), "install-units"])
    assert install_units.ckpt_command() == [str(script)]


def test_install_twice_and_uninstall_leaves_nothing(tmp_path: Path) -> None:
    place = install_units.Place(tmp_path)
    first = install_units.install(place, STORE, enable=True, emit=ignore)
    assert set(first.changed) == set(first.paths) and first.enabled
    assert {
        "etc/systemd/system/ckpt-hibernate.service",
        "etc/systemd/system/ckpt-resume.service",
        "etc/systemd/system/ckpt-arm@.timer",
        "etc/systemd/system/libpod-.scope.d/10-ckpt.conf",
        "etc/systemd/system/multi-user.target.wants/ckpt-resume.service",
        "etc/containers/systemd/container.d/10-ckpt.conf",
        "etc/containers/systemd/pod.d/10-ckpt.conf",
    } <= set(files(tmp_path))
    assert os.readlink(tmp_path / "etc/systemd/system/multi-user.target.wants/ckpt-hibernate.service") == "/etc/systemd/system/ckpt-hibernate.service"
    assert all(path.stat().st_mode & 0o777 == 0o644 and path.read_text().startswith(units.HEADER) for path in first.paths)
    again = install_units.install(place, STORE, emit=ignore)
    assert again.changed == () and again.paths == first.paths
    gone = install_units.uninstall(place)
    assert set(gone.paths) == set(first.paths)
    assert files(tmp_path) == []
    assert [path.name for path in tmp_path.rglob("*.d")] == []
    assert install_units.uninstall(place).paths == ()


def test_prefix_is_for_packages(tmp_path: Path) -> None:
    place = install_units.Place(tmp_path, Path("/usr"))
    install_units.install(place, STORE, emit=ignore)
    assert "usr/lib/systemd/system/ckpt-hibernate.service" in files(tmp_path)
    assert "usr/share/containers/systemd/container.d/10-ckpt.conf" in files(tmp_path)
    assert not (tmp_path / "etc").exists()


@pytest.mark.parametrize("how", ["file", "link", "masked"])
def test_what_is_not_ours_stays(tmp_path: Path, how: str) -> None:
    place = install_units.Place(tmp_path)
    mine = place.directory / units.ARM_TIMER  # not the first one to be written
    mine.parent.mkdir(parents=True)
    if how == "file":
        mine.write_text("[Timer]\n# made by ckpt install-units\n")
    else:
        mine.symlink_to("/dev/null" if how == "masked" else "elsewhere")
    before = files(tmp_path)
    with pytest.raises(BusyError, match="not made by ckpt"):
        install_units.install(place, STORE, emit=ignore)
    assert files(tmp_path) == before
    assert install_units.uninstall(place).paths == () and files(tmp_path) == before


def test_full_disk_takes_all_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = install_units.Place(tmp_path)
    real, count = durable.write_file, [0]

    def write(path: Path, content: bytes, mode: int = 0o600) -> None:
        count[0] += 1
        if count[0] == 5:
            raise OSError(13, "Permission denied", str(path))
        real(path, content, mode)

    monkeypatch.setattr(durable, "write_file", write)
    with pytest.raises(PermissionDenied):
        install_units.install(place, STORE, emit=ignore)
    assert files(tmp_path) == []


def test_another_store_is_told_to_the_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_units, "ckpt_command", lambda: ARGV)
    text = install_units.files(install_units.Place(tmp_path), Path("/srv/a b"))[tmp_path / "etc/systemd/system" / units.RESUME]
    assert 'Environment="CKPT_STORE=/srv/a b"\n' in text
    assert 'RequiresMountsFor="/srv/a b" /var/lib/ckpt /var/lib/containers' in text


class Manager:
    """Stands in for systemctl."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.refuses: tuple[str, ...] = ()
        monkeypatch.setattr(systemd, "running", lambda: True)
        monkeypatch.setattr(systemd, "control", self.control)
        monkeypatch.setattr(install_units, "LOCAL", root / "etc/systemd/system")
        monkeypatch.setattr(units, "QUADLET", root / "etc/containers/systemd")
        monkeypatch.setattr(guards, "UNITS", root / "etc/systemd/system")
        monkeypatch.setattr(guards, "TRANSIENT", root / "run/systemd/system")

    def control(self, *words: str) -> str:
        self.calls.append(words)
        if self.refuses and words[: len(self.refuses)] == self.refuses:
            raise EngineUnavailable("no")
        return ""


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manager:
    return Manager(monkeypatch, tmp_path)


def test_on_this_host(tmp_path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_units, "running_owners", lambda: (("web.service",), 100 << 30))
    told: list[Event] = []
    place = install_units.Place()
    install_units.install(place, STORE, enable=True, emit=told.append)
    assert manager.calls == [
        ("daemon-reload",),
        ("enable", "ckpt-hibernate.service", "ckpt-resume.service"),
        ("start", "--no-block", "ckpt-hibernate.service"),
    ]
    assert "etc/systemd/system/web.service.d/10-ckpt.conf" in files(tmp_path)
    assert len(told) == 1  # so much memory takes longer
    guards.guard_units(["db.service"])
    manager.calls.clear()
    install_units.uninstall(place)
    assert manager.calls[0] == ("disable", "--now", "ckpt-hibernate.service", "ckpt-resume.service")
    assert files(tmp_path) == []


def test_uninstall_refused_by_systemd_removes_nothing(tmp_path: Path, manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install_units, "running_owners", lambda: ((), 0))
    install_units.install(install_units.Place(), STORE, emit=ignore)
    before = files(tmp_path)
    manager.refuses = ("disable",)
    with pytest.raises(EngineUnavailable):
        install_units.uninstall(install_units.Place())
    assert files(tmp_path) == before


def test_without_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "running", lambda: False)
    monkeypatch.setattr(install_units, "LOCAL", tmp_path / "etc")
    with pytest.raises(FeatureMissing):
        install_units.install(install_units.Place(), STORE, emit=ignore)
    assert files(tmp_path) == []


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["install-units", "--print", "--root", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"# {tmp_path}/etc/systemd/system/ckpt-hibernate.service\n{units.HEADER}\n[Unit]" in shown
    assert files(tmp_path) == []
    assert main(["install-units", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in _order(tmp_path)]
    assert main(["install-units", "--root", str(tmp_path), "--uninstall", "--print"]) == 2
    assert main(["install-units", "--root", str(tmp_path / "none")]) == 2
    assert main(["install-units", "--root", str(tmp_path), "--prefix", "usr"]) == 2
    assert main(["install-units", "--root", str(tmp_path), "--uninstall"]) == 0
    assert files(tmp_path) == []


def _order(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in install_units.files(install_units.Place(root), STORE)]
