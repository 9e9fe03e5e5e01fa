"""Groups of real containers with a connection among them: saved at one instant, restored together, all or none."""

from __future__ import annotations

import json

import pytest

from tests.lab.counting import assert_clean, assert_never_back, counts_on, last_tick, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host

CRUN = pytest.mark.parametrize("lab_options", [{"runtime": "crun", "hosts": ("a",)}], ids=["crun"])
RUNC = pytest.mark.parametrize("lab_options", [{"runtime": "runc", "hosts": ("a",)}], ids=["runc"])
MEMBERS = ("server", "client", "other")
SKEW_LIMIT_S = 1.0
"""Some milliseconds when the machine is idle."""
TRACE = "import ctypes, sys, time; print(ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), None, None)); time.sleep(60)"
"""PTRACE_SEIZE: CRIU cannot dump what another one traces, which it sees when all stand still."""


def start(host: Host) -> None:
    """A server, a client that counts through a connection to it, and a counter."""
    image = host.load_image()

    def run(name: str, *argv: str, options: tuple[str, ...] = ()) -> None:
        host.run(["podman", "run", "-d", "--name", name, "--label", "ckpt.group=shop", *options, image, *argv])

    run("server", "echoserver", "7000")
    address = host.run(["podman", "inspect", "--format", "{{.NetworkSettings.IPAddress}}", "server"]).stdout.strip()
    run("client", "echoclient", address, "7000", "/data/ticks")
    host.run(["mkdir", "/root/mounted"])
    run("other", "counter", "/data/ticks", options=("-v", "/root/mounted:/mounted"))
    wait_until(lambda: min(last_tick(host, name) for name in ("client", "other")) > 5, "they talk and count")


def all_on(host: Host, *, at_least: int = 0) -> None:
    """All run, their connection lives, no number was lost or came twice."""
    for name in ("client", "other"):
        wait_until(lambda name=name: counts_on(host, name, 1.0) or state(host, name) != "running", f"{name} goes on")  # type: ignore[misc]
        assert state(host, name) == "running", host.run(["podman", "logs", name])
        assert_never_back(host, name, at_least=at_least)


def states(host: Host) -> list[str]:
    return [state(host, name) for name in MEMBERS]


def groups(host: Host) -> list[str]:
    return host.run(["sh", "-c", "ls /var/lib/ckpt/groups 2>/dev/null"], check=False).stdout.split()


def stored(host: Host) -> int:
    return len(host.run(["sh", "-c", "ls /var/lib/ckpt/checkpoints 2>/dev/null"], check=False).stdout.split())


@RUNC
def test_all_at_one_instant_and_back(lab: Lab) -> None:
    host = lab.a
    start(host)
    said = json.loads(host.run(["ckpt", "checkpoint", "--format", "json", "--group", "shop"]).stdout)
    assert {row["name"] for row in said["results"]} == set(MEMBERS)
    for row in said["results"]:
        assert row["stats"]["group"] == "shop@1" and 0 < row["stats"]["group_skew_s"] < SKEW_LIMIT_S
    assert states(host) == ["exited"] * 3
    # One of them cannot come back: none does.
    host.run(["mv", "/root/mounted", "/root/away"])
    failed = host.run(["ckpt", "restore", "--group", "shop"], check=False)
    assert failed.returncode == 21, failed
    assert "running" not in states(host)
    assert_clean(host)
    host.run(["mv", "/root/away", "/root/mounted"])
    # Its owner dies with all of them held: none runs, and it can be tried again.
    host.run(["ckpt", "restore", "--group", "shop"], env={"CKPT_FAULT": "group-restored:kill"}, check=False)
    assert_clean(host)
    assert "running" not in states(host)
    host.run(["ckpt", "restore", "--group", "shop@1"])
    all_on(host)
    # And now it dies after the decision: its guards let them run.
    host.run(["ckpt", "checkpoint", "--group", "shop", *MEMBERS])
    assert states(host) == ["exited"] * 3
    host.run(["ckpt", "restore", "--group", "shop"], env={"CKPT_FAULT": "group-restore-commit:kill"}, check=False)
    assert_clean(host)
    all_on(host)


@CRUN
def test_all_or_none(lab: Lab) -> None:
    """Something goes wrong at some step: they go on as if nothing had been, or all are saved."""
    host = lab.a
    start(host)
    pid = host.run(["podman", "inspect", "--format", "{{.State.Pid}}", "other"]).stdout.strip()
    saving = host.popen(["ckpt", "checkpoint", "--group", "shop"], env={"CKPT_FAULT": "group-freezing:gate=/tmp/gate"})
    wait_until(lambda: host.exists("/tmp/gate.reached"), "all was looked at")
    tracer = host.popen(["python3", "-uc", TRACE, pid])
    try:
        assert tracer.stdout is not None and tracer.stdout.readline() == b"0\n"
        host.write_file("/tmp/gate", "")
        said = saving.communicate(timeout=60)[1].decode()
    finally:
        tracer.kill_session()
        tracer.communicate()
    assert saving.returncode == 20 and "other cannot be checkpointed" in said.split("error: ")[1], said
    all_on(host)
    assert (stored(host), groups(host)) == (0, [])
    for fault in ("held:kill", "stored:kill"):
        host.run(["ckpt", "checkpoint", "--group", "shop"], env={"CKPT_FAULT": fault}, check=False)
        assert_clean(host)
        assert states(host) == ["running"] * 3, fault
        all_on(host)
        assert (stored(host), groups(host)) == (0, []), fault
    host.run(["ckpt", "checkpoint", "-R", "--group", "shop"])
    all_on(host)
    # After the decision all end, and the set appears, whoever brings it about.
    host.run(["ckpt", "checkpoint", "--group", "shop"], env={"CKPT_FAULT": "group-commit:kill"}, check=False)
    assert_clean(host)
    assert states(host) == ["exited"] * 3
    assert len(groups(host)) == 2
    host.run(["ckpt", "restore", "--group", "shop"])
    all_on(host)


@CRUN
def test_a_pod(lab: Lab) -> None:
    """Its members share a network: their connection goes over its loopback. The infra container stays."""
    host, image = lab.a, lab.a.load_image()
    # Any program does for the infra container; podman's own is not in the lab.
    host.run(["podman", "pod", "create", "--name", "shop", "--infra-image", image, "--infra-command", "echoserver 9999"])
    host.run(["podman", "run", "-d", "--pod", "shop", "--name", "server", image, "echoserver", "7000"])
    host.run(["podman", "run", "-d", "--pod", "shop", "--name", "client", image, "echoclient", "127.0.0.1", "7000", "/data/ticks"])
    wait_until(lambda: last_tick(host, "client") > 5, "they talk")
    host.run(["ckpt", "checkpoint", "--pod", "shop"])
    assert [state(host, name) for name in ("server", "client")] == ["exited"] * 2
    host.run(["ckpt", "restore", "--group", "shop"])
    wait_until(lambda: counts_on(host, "client", 1.0) or state(host, "client") != "running", "they go on")
    assert_never_back(host, "client", at_least=6)
    assert "client" in host.run(["podman", "ps", "--filter", "pod=shop", "--format", "{{.Names}}"]).stdout
