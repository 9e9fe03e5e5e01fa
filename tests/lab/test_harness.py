"""The lab itself: hosts that behave, and nothing left when they are gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.harness import CommandError, Lab, Ticks, keeper, read_ticks

TOP = Path(__file__).resolve().parents[2]


def wait_for(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def leftovers(lab_id: str) -> list[str]:
    """What a lab left on the machine: directories, cgroups, mounts."""
    v1, v2 = keeper.cgroup_mounts()
    groups = [str(group) for root in [*v1, *([v2] if v2 else [])] for group in root.glob(f"{keeper.PREFIX}{lab_id}-*")]
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines() if lab_id in line]
    return [str(path) for path in keeper.RUN.glob(lab_id)] + groups + mounts


# -- the hosts ---------------------------------------------------------------------------------------------------------------------


def test_hosts_know_each_other(lab_ready: None) -> None:
    with Lab() as lab:
        assert [host.run(["hostname"]).stdout for host in lab] == ["a\n", "b\n"]
        assert lab.a.run(["ssh", "b", "hostname"]).stdout == "b\n"
        assert lab.b.run(["ssh", "root@10.77.0.1", "hostname"]).stdout == "a\n"
        assert lab.a.run(["criu", "--version"]).stdout.startswith("Version: 4.2")


def test_an_unknown_host_key_is_refused(bare_lab: Lab) -> None:
    bare_lab.a.write_file("/root/.ssh/known_hosts", "")
    refused = bare_lab.a.run(["ssh", "b", "true"], check=False)
    assert refused.returncode == 255
    assert "Host key verification failed" in refused.stderr


def test_labs_stand_side_by_side(bare_lab: Lab) -> None:
    with Lab() as other:
        other.a.write_file("/tmp/mark", "other")
        other.b.run(["ping", "-c", "1", "-W", "5", "10.77.0.1"])
        assert not bare_lab.a.exists("/tmp/mark")
    bare_lab.a.run(["ssh", "b", "true"])


def test_files_go_in_and_out(bare_lab: Lab) -> None:
    data = os.urandom(1 << 20)
    bare_lab.a.write_file("/var/run/deep/er/file", data, mode=0o600)  # /var/run is an absolute symlink
    assert bare_lab.a.read_file("/run/deep/er/file") == data
    assert bare_lab.a.run(["stat", "-c", "%a", "/run/deep/er/file"]).stdout == "600\n"
    with pytest.raises(CommandError, match="No such file"):
        bare_lab.a.read_file("/nothing/here")


def test_a_program_over_its_time_is_ended_inside_the_host(bare_lab: Lab) -> None:
    with pytest.raises(CommandError, match="no end after"):
        bare_lab.a.run(["sh", "-c", "sleep 4711 & sleep 4711"], timeout_s=0.3)
    wait_for(lambda: bare_lab.a.run(["pgrep", "-f", "sleep 4711"], check=False).returncode == 1)


def test_signals_and_status_are_the_programs_own(bare_lab: Lab) -> None:
    process = bare_lab.a.popen(["sh", "-c", "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done"])
    assert process.stdout is not None and process.stdout.readline() == b"up\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 7
    process = bare_lab.a.popen(["sleep", "4712"])
    wait_for(lambda: process.inner_pid is not None and bare_lab.a.run(["pgrep", "-xf", "sleep 4712"], check=False).returncode == 0)
    process.kill()
    assert process.wait(10) == -signal.SIGKILL
    assert bare_lab.a.run(["pgrep", "-xf", "sleep 4712"], check=False).returncode == 1


def test_nothing_is_ignored_and_orphans_are_reaped(bare_lab: Lab) -> None:
    sshd = bare_lab.a.run(["sh", "-c", "grep SigIgn /proc/$(pgrep -o sshd)/status"]).stdout.split()[1]
    assert int(sshd, 16) & ((1 << signal.SIGINT - 1) | (1 << signal.SIGTERM - 1)) == 0
    bare_lab.a.run(["sh", "-c", "sleep 0.05 & exit"])
    wait_for(lambda: "Z" not in bare_lab.a.run(["ps", "axo", "stat="]).stdout)


@pytest.mark.parametrize("lab_options", [{"store_mib": 8}])
def test_the_store_can_be_filled(bare_lab: Lab) -> None:
    full = bare_lab.a.run(["dd", "if=/dev/zero", "of=/var/lib/ckpt/full", "bs=1M", "count=16"], check=False)
    assert full.returncode == 1 and "No space left on device" in full.stderr
    bare_lab.a.write_file("/root/elsewhere", "fits")


# -- the link ----------------------------------------------------------------------------------------------------------------------


def test_a_cut_link_is_silent_and_tcp_survives_it(bare_lab: Lab) -> None:
    server = bare_lab.b.popen(["/opt/lab/bin/echoserver", "7000"])
    wait_for(lambda: "7000" in bare_lab.b.run(["ss", "-ltn"]).stdout)
    client = bare_lab.a.popen(["/opt/lab/bin/echoclient", "10.77.0.2", "7000", "/tmp/echo"])
    wait_for(lambda: bare_lab.a.exists("/tmp/echo") and read_ticks(bare_lab.a, "/tmp/echo").last > 5)
    bare_lab.cut_link()
    assert bare_lab.a.run(["ping", "-c", "1", "-W", "1", "10.77.0.2"], check=False).returncode == 1
    assert client.poll() is None
    stopped = read_ticks(bare_lab.a, "/tmp/echo").last
    bare_lab.restore_link()
    wait_for(lambda: read_ticks(bare_lab.a, "/tmp/echo").last > stopped + 5, timeout_s=30)
    ticks = read_ticks(bare_lab.a, "/tmp/echo")
    assert ticks.breaks == []
    assert ticks.longest_gap_s > 0.9
    server.kill()
    assert client.wait(10) == 1  # and the client notices when the server is gone
    server.wait(10)


def test_the_rate_is_limited(bare_lab: Lab) -> None:
    def seconds() -> float:
        started = time.monotonic()
        bare_lab.a.run(["sh", "-c", "head -c 4000000 /dev/zero | ssh -o Compression=no b 'cat >/dev/null'"])
        return time.monotonic() - started

    bare_lab.limit_rate(20)
    before = bare_lab.received_bytes("b")
    assert seconds() > 1.3  # 32 Mbit at 20 Mbit/s: 1.6 s
    assert 4_000_000 < bare_lab.received_bytes("b") - before < 5_000_000
    bare_lab.limit_rate(None)
    assert seconds() < 1.3


# -- podman and the workloads ------------------------------------------------------------------------------------------------------


def test_the_container_image_is_where_it_was_loaded(bare_lab: Lab) -> None:
    ids = ["podman", "images", "--no-trunc", "--format", "{{.ID}}"]
    bare_lab.a.load_image()
    assert bare_lab.b.run(ids).stdout == ""
    bare_lab.b.load_image()
    assert bare_lab.a.run(ids).stdout == bare_lab.b.run(ids).stdout != ""


@pytest.mark.parametrize("lab_options", [{"runtime": "crun"}, {"runtime": "runc"}], ids=["crun", "runc"])
def test_podman_moves_a_counter_between_hosts(bare_lab: Lab) -> None:
    a, b = bare_lab.a, bare_lab.b
    a.load_image()
    a.run(["podman", "run", "-d", "--name", "web", b.load_image(), "counter", "/data/ticks"])
    wait_for(lambda: read_ticks(a, "/data/ticks", "web").last > 10)
    a.run(["podman", "container", "checkpoint", "-e", "/tmp/web.tar", "web"])
    a.run(["scp", "/tmp/web.tar", "b:/tmp/web.tar"])
    b.run(["podman", "container", "restore", "-i", "/tmp/web.tar"])
    before = read_ticks(b, "/data/ticks", "web").last
    wait_for(lambda: read_ticks(b, "/data/ticks", "web").last > before + 10)
    ticks = read_ticks(b, "/data/ticks", "web")
    assert ticks.breaks == [] and ticks.numbers[0] == 0
    assert ticks.longest_gap_s > 0.05


def test_memhog_writes_ticks_and_notices_changed_memory(bare_lab: Lab) -> None:
    hog = bare_lab.a.popen(["/opt/lab/bin/memhog", "32", "10", "/tmp/hog"])
    wait_for(lambda: bare_lab.a.exists("/tmp/hog") and read_ticks(bare_lab.a, "/tmp/hog").last > 150, timeout_s=30)
    assert hog.poll() is None  # every page was checked once at least, and found well
    pid = hog.inner_pid
    maps = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    start, end = max(([int(x, 16) for x in row[0].split("-")] for row in maps if len(row) < 6), key=lambda span: span[1] - span[0])
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        for offset in range(0, end - start, 1 << 20):  # several: a page may be rewritten before it is checked
            memory.seek(start + offset)
            memory.write(b"\xff" * 8)
    assert hog.wait(10) == 3
    assert hog.stderr is not None and b"is wrong" in hog.stderr.read()


def test_ticks_tell_gaps_and_breaks() -> None:
    well = Ticks.parse(b"0 1000000000\n1 1010000000\n2 3010000000\n3 30")
    assert (well.last, well.longest_gap_s, well.breaks) == (2, 2.0, [])
    assert Ticks.parse(b"0 1\n1 2\n1 3\n0 4\n").breaks == [(1, 1), (1, 0)]


# -- ckpt in the hosts -------------------------------------------------------------------------------------------------------------


def test_the_wheel_is_installed(lab: Lab) -> None:
    for host in lab:
        assert "ckpt" in host.run(["ckpt", "--version"]).stdout


# -- nothing is left ---------------------------------------------------------------------------------------------------------------

OWNER = """
import sys, time
from tests.lab.harness import Lab
with Lab() as lab:
    lab.a.load_image()
    lab.a.run(["podman", "run", "-d", "localhost/busybox", "counter", "/data/ticks"])
    busy = lab.a.popen(["sleep", "4713"])
    print(lab.id, lab._keeper.pid, *(host.pid for host in lab), flush=True)
    if sys.argv[1] == "raise":
        raise RuntimeError("on purpose")
    if sys.argv[1] == "wait":
        time.sleep(600)
"""


@pytest.fixture
def owner(lab_ready: None) -> Iterator[Callable[[str], tuple[subprocess.Popen[str], str, list[int]]]]:
    started = []

    def start(ending: str) -> tuple[subprocess.Popen[str], str, list[int]]:
        argv = [sys.executable, "-c", OWNER, ending]
        process = subprocess.Popen(argv, cwd=TOP, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        started.append(process)
        assert process.stdout is not None
        lab_id, *pids = process.stdout.readline().split()
        assert len(leftovers(lab_id)) > 1  # so the check below sees something
        return process, lab_id, [int(pid) for pid in pids]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("ending", ["return", "raise", "SIGKILL", "SIGINT", "SIGTERM"])
def test_nothing_is_left_behind(owner: Callable[[str], tuple[subprocess.Popen[str], str, list[int]]], ending: str) -> None:
    process, lab_id, pids = owner(ending if ending in ("return", "raise") else "wait")
    if ending.startswith("SIG"):
        process.send_signal(signal.Signals[ending])
    process.wait(30)
    wait_for(lambda: not any(map(alive, pids)))
    wait_for(lambda: not leftovers(lab_id))


def test_a_killed_keeper_takes_the_hosts_along_and_the_next_lab_sweeps(
    owner: Callable[[str], tuple[subprocess.Popen[str], str, list[int]]],
) -> None:
    _, lab_id, (keeper_pid, *hosts) = owner("wait")
    os.kill(keeper_pid, signal.SIGKILL)
    wait_for(lambda: not any(map(alive, hosts)))
    with Lab():
        assert leftovers(lab_id) == []
