"""Pre-copy on a kernel with soft-dirty marks and with cgroup2 in full: Debian's, which many test machines' kernels are not."""

from __future__ import annotations

import json
import re
import time

import pytest

from tests.vm.harness import Vm

MIB = 16
DIRTY_MB_S = "0.2"
MOST = (MIB << 20) // 2


def start_hog(vm: Vm, runtime: str, name: str, *options: str) -> int:
    """A container that rewrites random pages and checks all of them, without end; the pid of its first process."""
    hog = ["memhog", str(MIB), DIRTY_MB_S, "/data/ticks"]
    vm.run(["podman", "--runtime", runtime, "run", "-d", "--name", name, "--network", "none", *options, "localhost/busybox", *hog])
    pid = pid_of(vm, name)
    wait_for(vm, pid, 3)
    return pid


def pid_of(vm: Vm, name: str) -> int:
    return int(vm.run(["podman", "container", "inspect", "--format", "{{.State.Pid}}", name]))


def ticks(vm: Vm, pid: int) -> list[int]:
    """Read from outside: podman exec takes seconds here."""
    return [int(line.split()[0]) for line in vm.run(["cat", f"/proc/{pid}/root/data/ticks"]).split("\n")[:-1]]


def wait_for(vm: Vm, pid: int, tick: int, limit_s: float = 90.0) -> None:
    end = time.monotonic() + limit_s
    while (now := ticks(vm, pid)[-1:]) < [tick]:
        assert time.monotonic() < end, f"it is at {now} after {limit_s:g} s, not at {tick}"


def test_the_kernels_marks(vm: Vm) -> None:
    """What stands beside the simulated ones in the unit tests; moved page tables, forks, lost scans and all. And the freezer of cgroup2."""
    files = ["tests/unit/test_criu_softdirty.py", "tests/unit/test_host_cgroup.py"]
    said = vm.run(f"cd /ckpt && python3 -m pytest -q -p no:cacheprovider -k 'not simulated' {' '.join(files)}", timeout_s=200)
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) >= 20 and "no soft-dirty marks" not in said, said


@pytest.mark.parametrize("runtime", ["crun", "runc"])
def test_rounds_read_only_what_was_written(vm: Vm, runtime: str) -> None:
    name = f"rounds-{runtime}"
    pid = start_hog(vm, runtime, name)
    try:
        seen = json.loads(vm.run(f"cd /ckpt && python3 -m tests.vm.inside.rounds {pid} 0.5").splitlines()[-1])
        first, *others = seen["rounds"]
        assert first["read"] == first["sent"] >= MIB << 20
        for one in (*others, seen["last"]):
            assert one["reason"] == "" and one["sent"] <= one["read"] < MOST, seen
            assert one["settled"] > MOST, seen
        assert all(0 < one["stopped_s"] < 1 for one in seen["rounds"]), seen
        assert seen["wrong"] == [] and seen["pages"] * 4096 >= MIB << 20, seen
        wait_for(vm, pid, ticks(vm, pid)[-1] + 3)  # it goes on
    finally:
        vm.run(["podman", "rm", "-f", "-t", "0", name])


def test_a_container_goes_over(vm: Vm) -> None:
    """With soft-dirty rounds, slowed when they gain nothing any more, and with its own limit of processor time on the other side."""
    pid = start_hog(vm, "crun", "web", "--cpus", "1.5")
    limit = cpu_limit(vm, pid)
    assert limit == "150000 100000"
    before = ticks(vm, pid)[-1]
    flags = "--precopy --max-rounds 8 --max-downtime 1ms --auto-converge --lazy --format json"
    said = vm.run(f"ckpt migrate {flags} --name moved web root@there 2>/tmp/said || {{ cat /tmp/said; false; }}", timeout_s=250)
    stats = json.loads(said)["results"][0]["stats"]
    assert stats["memory_tracker"] == "soft-dirty" and stats["rounds"] == 8 and stats["slowed"] > 0, stats
    # The first round reads all of it, the others what was written since: never all of it again.
    assert (MIB << 20) <= stats["precopy_bytes"] <= stats["precopy_read_bytes"] < 2 * (MIB << 20), stats
    assert stats["pages_bytes"] <= stats["pages_read_bytes"] < MOST, stats  # while it is frozen
    pid = pid_of(vm, "moved")
    assert cpu_limit(vm, pid) == limit
    at = ticks(vm, pid)[-1]
    assert at >= before
    # memhog looks at all its memory within 100 ticks and ends when a page is not as it wrote it.
    wait_for(vm, pid, at + 101)
    numbers = ticks(vm, pid)
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    vm.run(["podman", "rm", "-f", "-t", "0", "moved"])


def cpu_limit(vm: Vm, pid: int) -> str:
    """Of the container's scope, within which crun has a cgroup for it."""
    path = vm.run(["cat", f"/proc/{pid}/cgroup"]).strip().removeprefix("0::").removesuffix("/container")
    return vm.run(["cat", f"/sys/fs/cgroup{path}/cpu.max"]).strip()
