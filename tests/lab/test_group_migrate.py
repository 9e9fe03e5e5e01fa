"""A group moves with the connection among its members: all or none, whatever breaks."""

from __future__ import annotations

import json
import shlex

import pytest

from tests.lab.counting import assert_clean, assert_never_back, counts_on, last_tick, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host, HostResult

MEMBERS = ("server", "client")
SERVER, CLIENT = "10.99.0.2", "10.99.0.3"
MIGRATE = ["ckpt", "migrate", "--group", "shop", "root@b"]


def start(lab: Lab) -> None:
    """On a network that both hosts have: a server, and a client that counts through a connection to it and comes after it."""
    for host in (lab.a, lab.b):
        host.run(["podman", "network", "create", "--subnet", "10.99.0.0/24", "--disable-dns", "shop"])
    image = lab.a.load_image()
    run = ["podman", "run", "-d", "--label", "ckpt.group=shop"]
    lab.a.run([*run, "--name", "server", "--network", f"shop:ip={SERVER}", image, "echoserver", "7000"])
    after = ["--label", "ckpt.after=server"]
    lab.a.run([*run, *after, "--name", "client", "--network", f"shop:ip={CLIENT}", image, "echoclient", SERVER, "7000", "/data/ticks"])
    wait_until(lambda: last_tick(lab.a, "client") > 5, "they talk")


def states(host: Host) -> list[str]:
    return [state(host, name) for name in MEMBERS]


def all_on(lab: Lab, host: Host, *, at_least: int) -> None:
    """Both run there and nowhere else, the connection lives, no number was lost or came twice."""
    assert states(host) == ["running"] * 2
    other = lab.b if host is lab.a else lab.a
    assert "running" not in states(other) and "paused" not in states(other)
    wait_until(lambda: counts_on(host, "client", 1.0) or state(host, "client") != "running", "they go on")
    assert_never_back(host, "client", at_least=at_least)


def fault_on_b(lab: Lab, fault: str) -> None:
    """Every ckpt on b, so also the peers, meets the fault; "" ends that."""
    lab.b.run(["sh", "-c", "[ -e /usr/local/bin/ckpt.real ] || mv /usr/local/bin/ckpt /usr/local/bin/ckpt.real"])
    quoted = shlex.quote(fault)
    lab.b.write_file("/usr/local/bin/ckpt", f'#!/bin/sh\nCKPT_FAULT={quoted} exec /usr/local/bin/ckpt.real "$@"\n', mode=0o755)


def moved(lab: Lab, fault: str = "") -> HostResult:
    return lab.a.run(MIGRATE, check=False, timeout_s=120, env={"CKPT_FAULT": fault} if fault else {})


def through(*hosts: Host) -> None:
    for host in hosts:
        wait_until(lambda host=host: not host.run(["pgrep", "-f", "guard_main"], check=False).stdout, f"{host.name}'s guards are through")  # type: ignore[misc]


def moves(host: Host, name: str) -> bool:
    """Whether its first process is not held by CRIU: podman calls it running then, too."""
    pid = host.run(["podman", "container", "inspect", "--format", "{{.State.Pid}}", name], check=False).stdout.strip() or "0"
    stat = host.run(["cat", f"/proc/{pid}/stat"], check=False).stdout
    return bool(stat) and stat.rpartition(")")[2].split()[0] not in "tTZX"


def waiting(host: Host) -> str:
    """The id of the group's job that waits for --continue."""
    rows = json.loads(host.run(["ckpt", "jobs", "--format", "json"]).stdout)["results"]
    found = [row["id"] for row in rows if row["kind"] == "migrate-group" and row["state"] == "waiting"]
    return str(found[0]) if found else ""


@pytest.mark.parametrize("lab_options", [{"runtime": "crun"}], ids=["crun"])
def test_both_or_none(lab: Lab) -> None:
    start(lab)
    # One cannot be restored there; then their owner dies with all held there: both go on here.
    fault_on_b(lab, "destination-prepared:fail")
    failed = moved(lab)
    assert failed.returncode == 50, failed
    fault_on_b(lab, "")
    all_on(lab, lab.a, at_least=5)
    assert_clean(lab.a, lab.b)
    for fault in ("migrate-group-held:kill", "migrate-group-restored:kill"):
        before = last_tick(lab.a, "client")
        moved(lab, fault)
        assert_clean(lab.a, lab.b)
        assert states(lab.b) == ["", ""]
        all_on(lab, lab.a, at_least=before)
    # And one name is taken there.
    lab.b.run(["podman", "create", "--name", "client", lab.b.load_image(), "true"])
    failed = moved(lab)
    assert failed.returncode != 0 and "client" in failed.stderr, failed
    lab.b.run(["podman", "rm", "client"])
    before = last_tick(lab.a, "client")
    said = json.loads(lab.a.run([*MIGRATE, "--format", "json"]).stdout)
    assert {row["name"]: row["ok"] for row in said["results"]} == {"server": True, "client": True}
    all_on(lab, lab.b, at_least=before)
    assert states(lab.a) == ["", ""]
    assert_clean(lab.a, lab.b)


@pytest.mark.parametrize("lab_options", [{"runtime": "runc"}], ids=["runc"])
@pytest.mark.parametrize("fault", ["migrate-group-committed", "migrate-resume"])
def test_killed_after_the_decision(lab: Lab, fault: str) -> None:
    """Between the two lines the destination drops all; after the second all are there. --continue says so here; nobody runs before it."""
    start(lab)
    before = last_tick(lab.a, "client")
    moved(lab, f"{fault}:kill")
    through(lab.a, lab.b)
    assert not any(moves(lab.a, name) for name in MEMBERS), "a source went on by itself"
    job = waiting(lab.a)
    assert job, lab.a.run(["ckpt", "jobs"]).stdout
    lab.a.run(["ckpt", "migrate", "--continue", job])
    all_on(lab, lab.a if fault == "migrate-group-committed" else lab.b, at_least=before)
    assert_clean(lab.a, lab.b)


@pytest.mark.parametrize("lab_options", [{"runtime": "crun"}], ids=["crun"])
@pytest.mark.parametrize("fault", ["destination-group-commit", "destination-committed"])
def test_the_peer_is_killed(lab: Lab, fault: str) -> None:
    """A peer of a member, or of the one that decides: both run at one end."""
    start(lab)
    before = last_tick(lab.a, "client")
    fault_on_b(lab, f"{fault}:kill")
    result = moved(lab)
    fault_on_b(lab, "")
    through(lab.a, lab.b)
    if result.returncode == 51:
        lab.a.run(["ckpt", "migrate", "--continue", waiting(lab.a)])
    else:
        assert result.returncode == (0 if "committed" in fault else 50), result
    all_on(lab, lab.b if "committed" in fault else lab.a, at_least=before)
    assert_clean(lab.a, lab.b)
