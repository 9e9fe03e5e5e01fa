"""migrate --postcopy: it runs on the other host before its memory is there; every page arrives, over a link that may break and come back."""

from __future__ import annotations

import json
import signal
import subprocess

import pytest

from tests.lab.counting import assert_clean, assert_never_back, last_tick, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host

MIB = 64
RATE_MBIT = 60
GATE = "/tmp/gate"
MOVE = ["ckpt", "migrate", "--postcopy", "web", "root@b"]
RUNTIMES = pytest.mark.parametrize("lab_options", [{"runtime": "crun"}, {"runtime": "runc"}], ids=["crun", "runc"])


def start_hog(host: Host) -> int:
    host.run(["podman", "run", "-d", "--name", "web", host.load_image(), "memhog", str(MIB), "10", "/data/ticks"])
    wait_until(lambda: last_tick(host) > 10, "it counts")
    return last_tick(host)


def goes_on(host: Host, since: int) -> None:
    """memhog checks its memory, all of it within MIB / 5 ticks, and ends when a page is not as it wrote it."""
    wait_until(lambda: last_tick(host) > since + MIB, "it counts on with its memory whole")
    assert_never_back(host, at_least=since)


def waiting_job(lab: Lab) -> str:
    return lab.a.run(["ls", "/var/lib/ckpt/jobs"]).stdout.split()[0]


def no_guards(*hosts: Host) -> None:
    for host in hosts:
        wait_until(lambda host=host: not host.run(["pgrep", "-f", "guard_main"], check=False).stdout, "guards are through")  # type: ignore[misc]


@RUNTIMES
def test_there_and_back(lab: Lab) -> None:
    at = start_hog(lab.a)
    for source, destination in ((lab.a, lab.b), (lab.b, lab.a)):
        done = source.run(["ckpt", "migrate", "--postcopy", "web", f"root@{destination.name}", "--format", "json"])
        stats = json.loads(done.stdout)["results"][0]["stats"]
        assert (MIB << 20) <= stats["follow_bytes"] < (MIB << 20) * 1.2, "each page goes once"
        assert stats["sent_bytes"] < stats["follow_bytes"] + (8 << 20)
        at = max(at, last_tick(destination))
        goes_on(destination, at)
        assert state(source) == ""
    assert_clean(lab.a, lab.b)


@pytest.mark.parametrize("way", ["--postcopy", "--precopy", "--lazy"])
def test_a_process_tree(lab: Lab, way: str) -> None:
    script = f"echo 20000 > /proc/sys/kernel/ns_last_pid; setsid /opt/lab/bin/memhog {MIB} 10 /srv/ticks </dev/null >/dev/null 2>&1 & echo $!"
    pid = lab.a.run(["sh", "-c", f"mkdir -p /srv; {script}"]).stdout.strip()

    def tick(host: Host) -> int:
        lines = host.run(["tail", "-n", "2", "/srv/ticks"], check=False).stdout.rpartition("\n")[0].splitlines()
        return int(lines[-1].split()[0]) if lines else -1

    wait_until(lambda: tick(lab.a) > 10, "it counts")
    lab.b.run(["mkdir", "-p", "/srv"])
    lab.a.run(["ckpt", "migrate", way, f"pid:{pid}", "root@b"])
    at = tick(lab.b)
    wait_until(lambda: tick(lab.b) > at + MIB, "it counts on with its memory whole")
    assert not lab.a.exists(f"/proc/{pid}")
    assert_clean(lab.a, lab.b)


@pytest.mark.parametrize("way", ["--postcopy", "--precopy", "--lazy"])
@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_a_container_of_a_bare_runtime(lab: Lab, runtime: str, way: str) -> None:
    lab.a.run(["sh", "-c", "cd /srv && mkdir -p web/rootfs/bin web/rootfs/proc web/rootfs/dev web/rootfs/sys web/rootfs/data"])
    lab.a.run(["cp", "/opt/lab/bin/memhog", "/srv/web/rootfs/bin/"])
    lab.a.run([runtime, "spec"], cwd="/srv/web")
    spec = json.loads(lab.a.read_file("/srv/web/config.json"))
    spec["process"].update(terminal=False, args=["/bin/memhog", str(MIB), "10", "/data/ticks"])
    spec["root"]["readonly"] = False
    spec["linux"].pop("resources", None)
    lab.a.write_file("/srv/web/config.json", json.dumps(spec))
    lab.a.run(["sh", "-c", f"exec {runtime} run --detach --bundle /srv/web web </dev/null >/dev/null 2>&1"])

    def tick(host: Host) -> int:
        found = host.run([runtime, "state", "web"], check=False)
        if found.returncode:
            return -1
        lines = host.run(["tail", "-n", "2", json.loads(found.stdout)["bundle"] + "/rootfs/data/ticks"], check=False).stdout.splitlines()
        return int(lines[0].split()[0]) if len(lines) > 1 else -1

    wait_until(lambda: tick(lab.a) > 10, "it counts")
    lab.a.run(["ckpt", "migrate", way, f"{runtime}:web", "root@b"])
    at = tick(lab.b)
    wait_until(lambda: tick(lab.b) > at + MIB, "it counts on with its memory whole")
    assert tick(lab.a) == -1
    assert_clean(lab.a, lab.b)


@pytest.mark.parametrize("end", ["source", "peer", "link"])
def test_a_break_while_memory_follows(lab: Lab, end: str) -> None:
    """The memory that is not there yet waits in the frozen source; --continue brings it."""
    at = start_hog(lab.a)
    for host in lab:
        host.write_file("/etc/ckpt/ckpt.toml", "link_timeout_s = 3\n")
    lab.limit_rate(RATE_MBIT)  # so that the break comes in the middle
    moving = lab.a.popen([*MOVE, "--format", "jsonl"], stderr=subprocess.STDOUT)
    assert moving.stdout is not None
    for line in moving.stdout:
        if b"step_started" in line and b'"follow"' in line:
            break
    if end == "source":
        moving.send_signal(signal.SIGKILL)
    elif end == "peer":
        lab.b.run(["pkill", "-9", "-f", "ckpt peer"])
    else:
        lab.cut_link()
    said, _ = moving.communicate(timeout=60)
    if end != "source":
        assert moving.returncode == 51, said.decode()
        assert b"--continue" in said
    no_guards(lab.a)
    assert state(lab.a) == "running", "the source is frozen: podman knows nothing of it"
    frozen = last_tick_of_frozen(lab.a)
    if end == "link":
        lab.restore_link()
    lab.limit_rate(None)
    assert last_tick_of_frozen(lab.a) == frozen
    lab.a.run(["ckpt", "migrate", "--continue", waiting_job(lab)])
    goes_on(lab.b, max(at, last_tick(lab.b)))
    assert state(lab.a) == ""
    assert_clean(lab.a, lab.b)


def last_tick_of_frozen(host: Host) -> str:
    """The tick file as the host sees it: nothing can be executed in a frozen container."""
    mounted = host.run(["sh", "-c", "cat /var/lib/containers/storage/overlay/*/diff/data/ticks | tail -n 1"]).stdout
    assert mounted
    return mounted


def test_lost_memory_ends_it_everywhere(lab: Lab) -> None:
    """The lazy-pages daemon is killed: what ran there cannot go on, and what is frozen here must not, because its copy ran."""
    start_hog(lab.a)
    lab.limit_rate(RATE_MBIT)
    moving = lab.a.popen([*MOVE, "--format", "jsonl"], stderr=subprocess.STDOUT)
    assert moving.stdout is not None
    for line in moving.stdout:
        if b"step_started" in line and b'"follow"' in line:
            break
    lab.b.run(["pkill", "-9", "-f", "criu lazy-pages"])
    said, _ = moving.communicate(timeout=60)
    assert moving.returncode == 51, said.decode()
    lab.limit_rate(None)
    wait_until(lambda: state(lab.b) == "exited", "it was ended there")
    told = lab.a.run(["ckpt", "migrate", "--continue", waiting_job(lab)], check=False)
    assert told.returncode == 21, told
    assert "was lost" in told.stderr and "where:" in told.stderr
    assert state(lab.a) == "exited"
    assert_clean(lab.a, lab.b)


@pytest.mark.parametrize("way", [["--postcopy"], ["--precopy"]], ids=lambda way: way[0])
@RUNTIMES
def test_a_restore_that_fails_leaves_the_source_running(lab: Lab, way: list[str]) -> None:
    """Its memory was never dumped, so it must be let go as it is."""
    at = start_hog(lab.a)
    failed = lab.a.run(["ckpt", "migrate", *way, "web", "root@b"], env={"CKPT_FAULT": "migrate-commit:fail"}, check=False)
    assert failed.returncode == 50, failed
    assert "running here" in failed.stderr
    goes_on(lab.a, at)
    assert state(lab.b) == ""
    assert_clean(lab.a, lab.b)


@pytest.mark.parametrize(
    "flags", [["--postcopy", "--precopy"], ["--postcopy", "--no-lazy"], ["--postcopy", "--max-rounds", "2"]], ids=lambda flags: flags[-1]
)
def test_bad_values(lab: Lab, flags: list[str]) -> None:
    refused = lab.a.run(["ckpt", "migrate", *flags, "web", "root@b"], check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error:") and refused.stderr.count("error:") == 1
