"""What systemd is told and asked, with sockets and programs of our own in its place."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt.errors import EngineUnavailable, FeatureMissing
from ckpt.host import run, systemd


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[tuple[socket.socket, Path]]:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.bind(os.fspath(path))
        made.settimeout(5)
        yield made, path


def test_notify_speaks_sd_notify(listening: tuple[socket.socket, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    server, path = listening
    monkeypatch.setenv("NOTIFY_SOCKET", os.fspath(path))
    systemd.notify("3 of 10\nsaved", ready=True, extend_s=1.5)
    assert server.recv(4096) == b"READY=1\nSTATUS=3 of 10 saved\nEXTEND_TIMEOUT_USEC=1500000"


def test_notify_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(f"\0ckpt-test-{os.getpid()}")
        server.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@ckpt-test-{os.getpid()}")
        systemd.notify("there")
        assert server.recv(4096) == b"STATUS=there"


@pytest.mark.parametrize("address", ["", "/nowhere/at/all", "relative", "vsock:2:1"])
def test_notify_never_fails(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.notify("x", ready=True)


def test_journal_fields(listening: tuple[socket.socket, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    server, path = listening
    monkeypatch.setattr(systemd, "JOURNAL", path)
    systemd.journal("two\nlines", priority=4, CKPT_ID="a1", CKPT_FREEZE_USEC=212, CKPT_NONE=None, lower="dropped", _TRUSTED="dropped")
    assert server.recv(4096) == (
        b"MESSAGE\n" + struct.pack("<Q", 9) + b"two\nlines\nPRIORITY=4\nSYSLOG_IDENTIFIER=ckpt\nCKPT_ID=a1\nCKPT_FREEZE_USEC=212\n"
    )


def test_journal_cannot_be_forged_by_a_value(listening: tuple[socket.socket, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    server, path = listening
    monkeypatch.setattr(systemd, "JOURNAL", path)
    systemd.journal("m", CKPT_TARGET="x\nPRIORITY=0")
    assert b"CKPT_TARGET\n" + struct.pack("<Q", 12) + b"x\nPRIORITY=0\n" in server.recv(4096)


def test_journal_without_journald(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "JOURNAL", tmp_path / "none")
    systemd.journal("nobody hears it")


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("/system.slice/cron.service", "cron.service"),
        ("/machine.slice/libpod-1a2b.scope/container", "libpod-1a2b.scope"),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/x.service", "user@1000.service"),
        ("/init.scope", "init.scope"),
        ("/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service"),
        ("/", ""),
        ("/docker/abc", ""),
        ("/system.slice", ""),
    ],
)
def test_unit_of_a_cgroup(path: str, unit: str) -> None:
    assert systemd.unit_in(path) == unit


def test_unit_of_nobody() -> None:
    assert systemd.unit_of(0) == ""


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("web", "web"),
        ("podman:web", "podman:web"),
        ("a b", "a\\x20b"),
        ("a/b-c", "a-b\\x2dc"),
        (".x", "\\x2ex"),
        ("é", "\\xc3\\xa9"),
        ("pid:12", "pid:12"),
    ],
)
def test_escape(text: str, escaped: str) -> None:
    assert systemd.escape(text) == escaped
    assert systemd.unescape(escaped) == text


class Programs:
    """Stands in for busctl and systemctl."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.calls: list[tuple[str, ...]] = []
        self.answers: dict[str, tuple[int, str]] = {}
        (tmp_path / "system").mkdir()
        monkeypatch.setattr(systemd, "BOOTED", tmp_path / "system")
        monkeypatch.setattr(run, "run", self.run)

    def run(self, argv: tuple[str, ...], *, check: bool = True, timeout_s: float, **rest: Any) -> run.Result:
        self.calls.append(argv)
        code, text = next((answer for key, answer in self.answers.items() if key in argv), (0, ""))
        result = run.Result(argv, code, text.encode(), text.encode())
        if check and code:
            raise run.CommandFailed(result, text)
        return result


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Programs:
    return Programs(monkeypatch, tmp_path)


def test_scope(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "unit_of", lambda pid: "ckpt-sim.scope")
    systemd.scope("ckpt-sim", [20, 10], description="sim")
    words = programs.calls[0]
    assert words[:7] == ("busctl", "call", *systemd._MANAGER, "StartTransientUnit", "ssa(sv)a(sa(sv))")
    assert words[7:] == (
        "ckpt-sim.scope", "fail", "4", "Description", "s", "sim", "Slice", "s", "system.slice",
        "CollectMode", "s", "inactive-or-failed", "PIDs", "au", "2", "10", "20", "0",
    )  # fmt: skip


def test_scope_refused(programs: Programs) -> None:
    programs.answers["StartTransientUnit"] = (1, "Call failed: Transaction is destructive")
    with pytest.raises(EngineUnavailable, match="StartTransientUnit: Transaction is destructive"):
        systemd.scope("ckpt-sim", [1])


def test_scope_that_does_not_take(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "_MOVE_LIMIT_S", 0.0)
    with pytest.raises(EngineUnavailable, match=r"into ckpt-sim\.scope"):
        systemd.scope("ckpt-sim", [os.getpid()])


def test_without_systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "BOOTED", tmp_path / "none")
    assert not systemd.running()
    assert not systemd.going_down()
    with pytest.raises(FeatureMissing):
        systemd.scope("x", [1])
    with pytest.raises(FeatureMissing):
        systemd.reboot("reboot")


@pytest.mark.parametrize(
    ("state", "jobs", "down"),
    [
        ("running", "", False),
        ("stopping", "", True),
        ("degraded", "12 shutdown.target start waiting\n13 x.service stop running\n", True),
        ("running", "13 ckpt-hibernate.service restart running\n", False),
        ("running", "12 shutdown.target stop waiting\n", False),
    ],
)
def test_going_down(state: str, jobs: str, down: bool, programs: Programs) -> None:
    programs.answers = {"is-system-running": (1, state), "list-jobs": (0, jobs)}
    assert systemd.going_down() is down


def test_reboot(programs: Programs) -> None:
    systemd.reboot("kexec")
    assert programs.calls == [("systemctl", "--no-pager", "--no-ask-password", "--no-block", "kexec")]
