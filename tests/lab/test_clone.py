"""Quick start and copies: `ckpt run --warm`, `ckpt clone`. The workload `warm` starts slowly, counts its answers, and ends at a wrong page."""

from __future__ import annotations

import json
from typing import Any

from tests.lab.counting import assert_clean, leftovers, state, wait_until
from tests.lab.harness import Host, Lab
from tests.lab.harness.host import HostResult

PORT = "7000"
MIB = 48
FACTS = """for job in /var/lib/ckpt/jobs/*; do
    python3 -c 'import json, sys; facts = {}
for line in open(sys.argv[1] + "/journal.jsonl"): facts.update(json.loads(line))
print(json.dumps({**facts, **json.load(open(sys.argv[1] + "/lazy.json"))}))' $job
done"""
"""What the journals of the restores say, and which daemon is whose."""


def inspect(host: Host, name: str, form: str) -> str:
    return host.run(["podman", "container", "inspect", "--format", form, name], check=False).stdout.strip()


def answer(host: Host, name: str) -> int:
    """What it answers to a connection: how often it was asked. -1 for no answer."""
    pid = inspect(host, name, "{{.State.Pid}}")
    script = f"exec 3<>/dev/tcp/127.0.0.1/{PORT} && cat <&3"
    said = host.run(["nsenter", "-t", pid or "0", "-n", "timeout", "5", "bash", "-c", script], check=False).stdout.strip()
    return int(said) if said.isdigit() else -1


def starts(host: Host) -> int:
    """How often any of them was started from nothing."""
    return len(host.run(["cat", "/srv/starts/log"], check=False).stdout.splitlines())


def resident_kib(host: Host, name: str) -> int:
    rollup = host.run(["cat", f"/proc/{inspect(host, name, '{{.State.Pid}}')}/smaps_rollup"]).stdout
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Rss:"))


def rows(result: HostResult) -> list[dict[str, Any]]:
    return list(json.loads(result.stdout)["results"])


def run_warm(host: Host, *options: str, mib: int = MIB, code: int = 0, fault: str = "") -> HostResult:
    argv = ["ckpt", "--format", "json", "run", "--warm", "web", *options, "--", "-v", "/srv/starts:/starts", host.load_image()]
    done = host.run([*argv, "warm", str(mib), PORT, "300", "/starts/log"], env={"CKPT_FAULT": fault} if fault else {}, check=False, timeout_s=120)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_a_service_is_started_once_and_copied(lab: Lab) -> None:
    host = lab.a
    host.run(["mkdir", "-p", "/srv/starts"])
    said = run_warm(host, "--ready-port", "7001", "--ready-timeout", "5s", code=1).stderr
    assert "not ready within 5 s" in said and f"serving on port {PORT}" in said and state(host) == ""
    assert host.run(["ckpt", "list", "-q"]).stdout == "" and starts(host) == 1

    # Killed while it waits: the same command takes up what runs.
    run_warm(host, "--ready-port", PORT, code=-9, fault="warm-started:kill")
    assert state(host) == "running"
    run_warm(host, "--ready-http", f"http://localhost:{PORT}/", "--ready-timeout", "1s", code=1)
    assert state(host) == "running", "what it did not start it does not remove"
    run_warm(host, "-R", "--ready-log", "serving on port")
    assert starts(host) == 2 and answer(host, "web") >= 1

    # Three copies, each with an address of its own; one name is taken.
    host.run(["podman", "create", "--name", "web-4", host.load_image(), "true"])
    made = host.run(["ckpt", "--format", "json", "clone", "web", "-n", "web-{1..4}", "-p", "8101-8104:7000"], check=False, timeout_s=120)
    assert made.returncode == 11, made.stderr
    assert [row["ok"] for row in rows(made)] == [True, True, True, False]
    copies = ["web-1", "web-2", "web-3"]
    counted = answer(host, "web")
    assert all(answer(host, name) == counted for name in copies)
    assert [answer(host, name) for name in copies] == [counted + 1] * 3 and answer(host, "web") == counted + 1
    addresses = [inspect(host, name, "{{.NetworkSettings.IPAddress}}") for name in ("web", *copies)]
    assert len(set(addresses)) == 4
    assert inspect(host, "web-2", "{{json .HostConfig.PortBindings}}").count("8102") == 1
    assert starts(host) == 2, "nothing was started anew"
    assert max(resident_kib(host, name) for name in copies) < MIB * 1024 // 4, "a copy has what it touched"
    assert len({inspect(host, name, "{{.Config.Hostname}}") for name in ("web", "web-1")}) == 1

    # A copy can be saved: all of its memory is brought first.
    host.run(["ckpt", "checkpoint", "web-1"], timeout_s=120)
    host.run(["ckpt", "restore", "web-1"], timeout_s=120)
    assert answer(host, "web-1") == counted + 2
    host.run(["podman", "rm", "-f", "-t", "0", "web-1", "web-2", "web-3", "web-4"])
    wait_until(lambda: not leftovers(host), "the copies are gone, and all that served them")

    # The same start again: restored, beside the one that runs or in its place.
    (row,) = rows(run_warm(host))
    assert row["container_name"] == "web-2" and answer(host, "web-2") >= 1
    host.run(["podman", "rm", "-f", "-t", "0", "web", "web-2"])
    run_warm(host)
    assert answer(host, "web") >= 1 and starts(host) == 2
    # Other arguments: cold, and the old one is replaced.
    host.run(["podman", "rm", "-f", "-t", "0", "web"])
    assert "other arguments" in run_warm(host, "--ready-cmd", "test -s /starts/log && sleep 0.5", mib=1).stderr
    assert starts(host) == 3 and state(host) == ""
    tagged = json.loads(host.run(["ckpt", "--format", "json", "list"]).stdout)["results"]
    assert len([row for row in tagged if "warm" in row["tags"]]) == 1
    assert_clean(host)


def test_a_clone_that_is_killed_leaves_whole_copies_or_none(lab: Lab) -> None:
    host = lab.a
    host.run(["podman", "run", "-d", "--name", "web", host.load_image(), "warm", "8", PORT, "0", "/data/log"])
    wait_until(lambda: answer(host, "web") > 0, "it serves")
    host.run(["ckpt", "checkpoint", "-R", "--tag", "warm", "web"])
    argv = ["ckpt", "clone", "web@warm", "--count", "3", "--parallel", "1"]
    assert host.run(argv, env={"CKPT_FAULT": "restored:kill"}, check=False).returncode == -9
    wait_until(lambda: not leftovers(host), "the half-made one is undone")
    assert [state(host, f"web-{number}") for number in (1, 2, 3)] == ["", "", ""]
    assert host.run(argv, check=False).returncode == 0
    assert [answer(host, f"web-{number}") > 0 for number in (1, 2, 3)] == [True] * 3
    # Whose keeper is killed serves on; whose daemon is ends, rather than go on with wrong memory.
    jobs = [json.loads(text) for text in host.run(["sh", "-c", FACTS]).stdout.splitlines()]
    of = {job["name"]: job for job in jobs}
    host.run(["kill", "-9", str(of["web-1"]["keeper_pid"])])
    host.run(["kill", "-9", str(of["web-2"]["pid"])])
    wait_until(lambda: state(host, "web-2") == "exited", "web-2 has ended")
    assert [answer(host, "web-1") for _ in range(3)] == [answer(host, "web-3") for _ in range(3)]
    orphan = host.run(["ckpt", "checkpoint", "web-1"], check=False)
    assert orphan.returncode == 11 and "is gone" in orphan.stderr
    again = host.run(argv, check=False)
    assert again.returncode == 11 and "web-1, web-2, web-3" in again.stderr
    # A program that listens on the original's own address alone.
    host.run(["podman", "run", "-d", "--name", "own", "--ip", "10.88.0.77", host.load_image(), "warm", "1", PORT, "0", "/data/log", "10.88.0.77"])
    wait_until(lambda: "7000" in host.run(["nsenter", "-t", inspect(host, "own", "{{.State.Pid}}"), "-n", "ss", "-lnt"]).stdout, "it listens")
    bound = host.run(["ckpt", "clone", "own", "--count", "1"], check=False)
    assert bound.returncode == 21 and "address" in bound.stderr and "0.0.0.0" in bound.stderr and state(host, "own-1") == "", bound.stderr
    host.run(["podman", "rm", "-f", "-t", "0", "web-1", "web-2", "web-3", "own"])
    assert host.run(["ckpt", "restore", "nothing"], check=False).returncode == 10  # any next command ends the daemon of a killed keeper
    assert_clean(host)
