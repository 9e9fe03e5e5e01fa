"""The drop-ins that keep systemd from starting cold what is being brought back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ckpt.errors import EngineUnavailable
from ckpt.host import systemd
from ckpt.model import Container
from ckpt.ops.hibernate import guards


class Host:
    def __init__(self, top: Path) -> None:
        self.units = top / "etc"
        self.resumed = top / "run" / "resumed"
        self.transient = top / "transient"
        self.calls: list[tuple[str, ...]] = []
        self.refuses = False
        self.down = False
        self.units.mkdir()
        self.transient.mkdir()

    def control(self, *words: str) -> str:
        self.calls.append(words)
        if self.refuses and words[0] == "start":
            raise EngineUnavailable("Unit ckpt-unguard.service not found.")
        return ""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    made = Host(tmp_path)
    monkeypatch.setattr(guards, "UNITS", made.units)
    monkeypatch.setattr(guards, "RESUMED", made.resumed)
    monkeypatch.setattr(guards, "TRANSIENT", made.transient)
    monkeypatch.setattr(systemd, "going_down", lambda: made.down)
    monkeypatch.setattr(systemd, "running", lambda: True)
    monkeypatch.setattr(systemd, "control", made.control)
    return made


def test_guard_and_unguard_leave_nothing(host: Host) -> None:
    assert guards.guard_units(["web.service", "db@1.service", "web.service"]) == ()
    assert (host.units / "web.service.d/90-ckpt.conf").read_text().splitlines()[1:] == [
        "[Unit]",
        "After=ckpt-resume.service",
        f"ConditionPathExists=!{host.resumed}/web.service",
    ]
    assert guards.guarded() == ("db@1.service", "web.service")
    assert (host.transient / "web.service.d/91-ckpt.conf").read_text().endswith("[Service]\nRestart=no\n")
    assert host.calls == [("daemon-reload",)]  # it counts from now on
    host.calls.clear()
    guards.mark_resumed(["web.service"])
    assert (host.resumed / "web.service").exists()
    guards.unguard_units()
    assert list(host.units.iterdir()) == [] and list(host.resumed.iterdir()) == [] and list(host.transient.iterdir()) == []
    assert host.calls == [("daemon-reload",)]
    guards.unguard_units()
    assert host.calls == [("daemon-reload",)]


def test_at_a_shutdown_the_manager_is_left_alone(host: Host) -> None:
    host.down = True
    guards.guard_units(["web.service"])
    assert guards.guarded() == ("web.service",) and host.calls == []


def test_drop_ins_of_others_stay(host: Host) -> None:
    guards.guard_units(["web.service"])
    (host.units / "web.service.d/local.conf").write_text("[Service]\n")
    (host.units / "db.service.d").mkdir()
    (host.units / "db.service.d/90-ckpt.conf").write_text("# mine\n[Unit]\n")
    guards.unguard_units()
    assert sorted(path.name for path in host.units.rglob("*.conf")) == ["90-ckpt.conf", "local.conf"]


@pytest.mark.parametrize("unit", ["../../x.service", "web.target", "a/b.service", "web", "x.service\n"])
def test_what_is_no_service_is_a_warning(unit: str, host: Host) -> None:
    assert len(guards.guard_units([unit])) == 1
    assert list(host.units.iterdir()) == []


def test_full_disk_is_a_warning(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ckpt.store.durable.write_file", full)
    assert guards.guard_units(["web.service"]) == ("web.service may start cold after the boot: No space left on device",)


def test_over_waits_for_the_boot(host: Host) -> None:
    guards.resume_over()
    assert host.calls == []  # there is nothing to remove
    guards.guard_units(["web.service"])
    host.calls.clear()
    guards.resume_over()
    assert host.calls == [("start", "--no-block", "ckpt-unguard.service")]
    assert guards.guarded() == ("web.service",)


def test_over_without_our_units(host: Host) -> None:
    guards.guard_units(["web.service"])
    host.refuses = True
    guards.resume_over()
    assert guards.guarded() == ()


def test_only_units_that_really_own_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    homes = {os.getpid(): "libpod-1.scope", os.getppid(): "web.service"}
    monkeypatch.setattr(systemd, "unit_of", lambda pid: homes.get(pid, ""))
    container = Container("podman", "1", "web", "running", pid=os.getpid(), units=("web.service", "sshd.service"))
    assert guards.owned(container) == ("web.service",)


@pytest.mark.parametrize(
    ("command", "mine"),
    [
        ("run --name web --replace --rm busybox", True),  # Quadlet, `podman generate systemd --new`
        ("container run --name=web busybox", True),
        ("start web", True),
        ("run --name webs busybox web", False),
        ("run --name", False),
        ("", False),
    ],
)
def test_a_unit_owns_what_it_would_make_anew(host: Host, monkeypatch: pytest.MonkeyPatch, command: str, mine: bool) -> None:
    """What a resume has brought back is in no unit's cgroup, and is lost when the next boot but one starts it cold."""
    shown = f"{{ path=/usr/bin/podman ; argv[]=/usr/bin/podman {command} ; ignore_errors=no ; pid=0 ; code=(null) ; status=0/0 }}"
    monkeypatch.setattr(systemd, "unit_of", lambda pid: "libpod-1.scope")
    monkeypatch.setattr(systemd, "control", lambda *words: shown)
    container = Container("podman", "1", "web", "running", pid=os.getpid(), units=("web.service",))
    assert guards.owned(container) == (("web.service",) if mine else ())


def test_without_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "running", lambda: False)
    monkeypatch.setattr(guards, "UNITS", tmp_path)
    monkeypatch.setattr(guards, "TRANSIENT", tmp_path)
    assert guards.guard_units(["web.service"]) == ()
    guards.resume_over()
    assert list(tmp_path.iterdir()) == []


def test_the_unit_of_a_pod_is_held_in_this_boot_only(host: Host) -> None:
    assert guards.guard_units(["web.service"], ["shop-pod.service", "../x"]) == ("'../x' is no unit that can be kept from starting",)
    assert [path.name for path in host.units.iterdir()] == ["web.service.d"]  # at the boot it makes the pod
    assert (host.transient / "shop-pod.service.d/91-ckpt.conf").read_text().endswith("[Service]\nRestart=no\n")
    assert guards.guarded() == ("shop-pod.service", "web.service")
    guards.unguard_units(["web.service", "shop-pod.service"])
    assert guards.guarded() == () and not list(host.transient.iterdir())
