"""migrate --precopy: memory goes over while the workload runs; what is restored is exactly what was frozen."""

from __future__ import annotations

import json

import pytest

from tests.lab.counting import assert_clean, assert_never_back, last_tick, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host

MIB = 64
GATE = "/tmp/gate"
MOVE = ["ckpt", "migrate", "--precopy", "web", "root@b"]
RUNTIMES = pytest.mark.parametrize("lab_options", [{"runtime": "crun"}, {"runtime": "runc"}], ids=["crun", "runc"])


def start_hog(host: Host, dirty_mb_s: int = 10) -> int:
    host.run(["podman", "run", "-d", "--name", "web", host.load_image(), "memhog", str(MIB), str(dirty_mb_s), "/data/ticks"])
    wait_until(lambda: last_tick(host) > 10, "it counts")
    return last_tick(host)


def goes_on(host: Host, since: int) -> None:
    """memhog checks its memory, all of it within MIB / 5 ticks, and ends when a page is not as it wrote it."""
    wait_until(lambda: last_tick(host) > since + MIB, "it counts on with its memory whole")
    assert_never_back(host, at_least=since)


@RUNTIMES
def test_there_and_back(lab: Lab) -> None:
    at = start_hog(lab.a)
    for source, destination in ((lab.a, lab.b), (lab.b, lab.a)):
        done = source.run(["ckpt", "migrate", "--precopy", "web", f"root@{destination.name}", "--format", "json"])
        stats = json.loads(done.stdout)["results"][0]["stats"]
        assert stats["rounds"] >= 2
        assert stats["precopy_bytes"] >= MIB << 20
        # It writes 10 MB/s; the pause's pages are few, however slow the machine is.
        assert stats["pages_bytes"] < (MIB << 20) // 2, stats
        at = max(at, last_tick(destination))
        goes_on(destination, at)
    assert_clean(lab.a, lab.b)


def test_a_process_tree(lab: Lab) -> None:
    script = f"echo 20000 > /proc/sys/kernel/ns_last_pid; setsid /opt/lab/bin/memhog {MIB} 10 /srv/ticks </dev/null >/dev/null 2>&1 & echo $!"
    pid = lab.a.run(["sh", "-c", f"mkdir -p /srv; {script}"]).stdout.strip()

    def tick(host: Host) -> int:
        lines = host.run(["tail", "-n", "2", "/srv/ticks"], check=False).stdout.rpartition("\n")[0].splitlines()
        return int(lines[-1].split()[0]) if lines else -1

    wait_until(lambda: tick(lab.a) > 10, "it counts")
    lab.b.run(["mkdir", "-p", "/srv"])
    lab.a.run(["ckpt", "migrate", "--precopy", f"pid:{pid}", "root@b"])
    at = tick(lab.b)
    wait_until(lambda: tick(lab.b) > at + MIB, "it counts on with its memory whole")
    assert not lab.a.exists(f"/proc/{pid}")
    assert_clean(lab.a, lab.b)


@pytest.mark.parametrize("end", ["kill", "fail", "enospc"])
@pytest.mark.parametrize("number", [0, 1])
def test_an_end_in_a_round_touches_nothing(lab: Lab, number: int, end: str) -> None:
    at = start_hog(lab.a)
    failed = lab.a.run(MOVE, env={"CKPT_FAULT": f"migrate-round-{number}:{end}"}, check=False)
    assert failed.returncode != 0
    goes_on(lab.a, at)
    wait_until(lambda: not lab.a.run(["pgrep", "-f", "guard_main"], check=False).stdout, "the guard is through")
    wait_until(lambda: not lab.b.run(["pgrep", "-f", "guard_main"], check=False).stdout, "the guard is through")
    assert state(lab.b) == ""
    assert_clean(lab.a, lab.b)


def test_no_room_for_a_round(lab: Lab) -> None:
    at = start_hog(lab.a)
    moving = lab.a.popen(MOVE, env={"CKPT_FAULT": f"migrate-round-1:gate={GATE}"})
    wait_until(lambda: lab.a.exists(f"{GATE}.reached"), "the first round is over")
    lab.b.run(["sh", "-c", "dd if=/dev/zero of=/var/lib/ckpt/full bs=1M 2>/dev/null; true"])
    lab.a.write_file(GATE, "")
    _, said = moving.communicate(timeout=60)
    lab.b.run(["rm", "/var/lib/ckpt/full"])
    assert moving.returncode in (50, 60) and b"space" in said, said
    goes_on(lab.a, at)
    assert_clean(lab.a, lab.b)


def test_more_downtime_than_allowed(lab: Lab) -> None:
    at = start_hog(lab.a, dirty_mb_s=40)
    refused = lab.a.run([*MOVE, "--max-downtime", "1ms", "--max-rounds", "2", "--on-exceed", "abort"], check=False)
    assert refused.returncode == 50, refused
    assert "downtime" in refused.stderr and "running here" in refused.stderr
    assert state(lab.b) == ""
    # Hosts of a machine whose cpu controller is not in cgroup2. Where it is, slowing is what would happen: tests/vm shows it.
    if b"cpu" not in lab.a.read_file("/sys/fs/cgroup/cgroup.controllers").split():
        refused = lab.a.run([*MOVE, "--auto-converge"], check=False)
        assert refused.returncode == 13, refused
        assert "web cannot be slowed" in refused.stderr and "cpu.max" in refused.stderr and "untouched" in refused.stderr
    goes_on(lab.a, at)
    assert_clean(lab.a, lab.b)


@pytest.mark.parametrize(
    "flags",
    [
        ["--auto-converge", "--keep-source"],
        ["--precopy", "--max-downtime", "soon"],
        ["--precopy", "--max-rounds", "0"],
        ["--max-downtime", "1s"],
        ["--precopy", "--on-exceed", "panic"],
    ],
    ids=lambda flags: flags[-2],
)
def test_bad_values(lab: Lab, flags: list[str]) -> None:
    refused = lab.a.run(["ckpt", "migrate", *flags, "web", "root@b"], check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error:") and refused.stderr.count("error:") == 1
