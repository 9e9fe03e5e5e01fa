"""podman, with crun and with runc: checkpoint, restore, copies, export, import, migrate there and back; files and connections."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.lab.counting import assert_clean, assert_never_back, counts_on, last_tick, leftovers, start_counter, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host

RUNTIMES = pytest.mark.parametrize("lab_options", [{"runtime": "crun"}, {"runtime": "runc"}], ids=["crun", "runc"])
MODIFY = (
    "echo modified > /data/state; rm -r /data/gone; mkdir /data/new; echo added > /data/new/file; ln /data/new/file /data/new/twin;"
    " chmod 750 /data/new; chown 7:8 /data/new; echo volume > /vol/file; echo shared > /dev/shm/file; truncate -s 64M /data/sparse"
)
LOOK = (
    "cat /data/state /data/new/file /vol/file /dev/shm/file; ls /data/gone 2>&1 | tail -c 10; stat -c '%a %u %g' /data/new; stat -c %h /data/new/twin"
    "; stat -c '%s' /data/sparse; [ $(stat -c %b /data/sparse) -lt 1000 ] && echo holes; true"
)


def build_image(host: Host) -> str:
    """The workloads' container image with a directory that the container deletes."""
    host.run(["podman", "run", "--name", "made", host.load_image(), "sh", "-c", "mkdir /data/gone; echo x > /data/gone/x"])
    host.run(["podman", "commit", "-q", "made", "localhost/with-gone:latest"])
    host.run(["podman", "rm", "made"])
    return "localhost/with-gone:latest"


def start_modifier(host: Host) -> None:
    image = build_image(host)
    host.run(["podman", "run", "-d", "--name", "web", "-v", "vol1:/vol", image, "sh", "-c", f"{MODIFY}; exec counter /data/ticks"])
    wait_until(lambda: last_tick(host) > 10, "web counts")


def look(host: Host) -> list[str]:
    return host.run(["podman", "exec", "web", "sh", "-c", LOOK]).stdout.split("\n")


WANTED = ["modified", "added", "volume", "shared"]


def assert_files(host: Host) -> None:
    seen = look(host)
    assert seen[:4] == WANTED, seen
    assert "directory" in seen[4] or "ctory" in seen[4], seen
    assert seen[5:9] == ["750 7 8", "2", str(64 << 20), "holes"], seen


@RUNTIMES
def test_checkpoint_and_restore(lab: Lab) -> None:
    start_counter(lab.a)
    said = json.loads(lab.a.run(["ckpt", "checkpoint", "--format", "json", "web"]).stdout)
    assert said["schema"] == 1
    assert state(lab.a) == "exited"
    lab.a.run(["ckpt", "restore", "web"])
    assert counts_on(lab.a)
    assert_never_back(lab.a, at_least=11)
    assert_clean(lab.a)


@RUNTIMES
def test_leave_running_is_one_instant(lab: Lab) -> None:
    """The count in memory and the one in the file belong together, although the container ran on."""
    start_counter(lab.a)
    lab.a.run(["ckpt", "checkpoint", "-R", "web"])
    assert counts_on(lab.a)
    at = last_tick(lab.a)
    lab.a.run(["ckpt", "restore", "web", "-n", "copy"])
    assert counts_on(lab.a, "copy")
    assert_never_back(lab.a, "copy")
    assert_never_back(lab.a, at_least=at)


@RUNTIMES
def test_two_copies_side_by_side(lab: Lab) -> None:
    start_counter(lab.a)
    lab.a.run(["ckpt", "checkpoint", "web"])
    for name in ("one", "two"):
        lab.a.run(["ckpt", "restore", "web", "-n", name])
    for name in ("one", "two"):
        assert counts_on(lab.a, name)
        assert_never_back(lab.a, name, at_least=11)
    assert state(lab.a) == "exited"


@RUNTIMES
def test_a_copy_has_its_own_cgroup(lab: Lab) -> None:
    """Pausing the copy must not pause the original; and the copy can be saved and copied again."""
    start_counter(lab.a)
    lab.a.run(["ckpt", "checkpoint", "-R", "web"])
    lab.a.run(["ckpt", "restore", "web", "-n", "copy"])
    lab.a.run(["podman", "pause", "copy"])
    assert counts_on(lab.a)
    lab.a.run(["podman", "unpause", "copy"])
    assert counts_on(lab.a, "copy")
    lab.a.run(["ckpt", "checkpoint", "copy"])
    lab.a.run(["ckpt", "restore", "copy"])
    assert counts_on(lab.a, "copy")
    lab.a.run(["podman", "rm", "-f", "-t", "0", "copy"])
    assert counts_on(lab.a)


@RUNTIMES
def test_export_and_import_on_the_other_host(lab: Lab) -> None:
    start_modifier(lab.a)
    lab.a.run(["sh", "-c", "podman save localhost/with-gone:latest | ssh b podman load"])
    lab.a.run(["ckpt", "checkpoint", "web"])
    lab.a.run(["ckpt", "export", "web", "-o", "/root/web.tar.zst"])
    lab.a.run(["sh", "-c", "ssh b ckpt import --name web - < /root/web.tar.zst"])
    lab.b.run(["ckpt", "restore", "web"])
    assert counts_on(lab.b)
    assert_never_back(lab.b, at_least=11)
    assert_files(lab.b)
    assert_clean(lab.a, lab.b)


@RUNTIMES
def test_migrate_there_and_back(lab: Lab) -> None:
    start_modifier(lab.a)
    for source, destination in ((lab.a, lab.b), (lab.b, lab.a), (lab.a, lab.b)):
        at = last_tick(source)
        done = lab_migrate(source, destination)
        assert done["results"][0]["stats"]["downtime_s"] > 0
        assert state(source) == ""
        assert counts_on(destination)
        assert_never_back(destination, at_least=at)
        assert_files(destination)
    assert_clean(lab.a, lab.b)


def lab_migrate(source: Host, destination: Host) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(source.run(["ckpt", "migrate", "--format", "json", "web", f"root@{destination.name}"]).stdout)
    return found


@RUNTIMES
def test_podman_restores_our_archive(lab: Lab) -> None:
    start_modifier(lab.a)
    lab.a.run(["ckpt", "checkpoint", "web"])
    lab.a.run(["ckpt", "export", "web", "-o", "/root/web.tar.zst"])
    shown = lab.a.run(["checkpointctl", "show", "/root/web.tar.zst"]).stdout
    assert "web" in shown and "Podman" in shown
    assert "counter" in lab.a.run(["checkpointctl", "inspect", "--ps-tree", "--files", "/root/web.tar.zst"]).stdout
    lab.a.run(["podman", "rm", "-v", "web"])
    lab.a.run(["podman", "volume", "rm", "vol1"], check=False)
    lab.a.run(["podman", "container", "restore", "--import", "/root/web.tar.zst"])
    assert counts_on(lab.a)
    assert_never_back(lab.a, at_least=11)
    assert look(lab.a)[:4] == WANTED


@pytest.mark.parametrize("compress", ["none", "gzip", "zstd"])
def test_we_restore_podmans_archive(lab: Lab, compress: str) -> None:
    start_counter(lab.a)
    lab.a.run(["podman", "container", "checkpoint", "-e", "/root/web.tar", "-c", compress, "web"])
    lab.a.run(["podman", "rm", "web"])
    lab.a.run(["ckpt", "import", "/root/web.tar"])
    lab.a.run(["ckpt", "restore", "web"])
    assert counts_on(lab.a)
    assert_never_back(lab.a, at_least=11)
    lab.a.run(["ckpt", "restore", "-i", "/root/web.tar", "-n", "direct"])
    assert counts_on(lab.a, "direct")


def test_a_destination_without_ckpt_gets_the_plain_way(lab: Lab) -> None:
    start_modifier(lab.a)
    lab.b.run(["rm", "/usr/local/bin/ckpt"])
    at = last_tick(lab.a)
    result = lab.a.run(["ckpt", "migrate", "web", "root@b"])
    assert "plain way" in result.stderr
    assert state(lab.a) == ""
    assert counts_on(lab.b)
    assert_never_back(lab.b, at_least=at)
    assert look(lab.b)[:4] == WANTED
    assert_clean(lab.a)


@pytest.mark.parametrize("step", ["plain-commit", "plain-restored"])
def test_the_plain_way_killed_after_its_point_of_no_return(lab: Lab, step: str) -> None:
    start_modifier(lab.a)
    lab.b.run(["rm", "/usr/local/bin/ckpt"])
    at = last_tick(lab.a)
    lab.a.run(["ckpt", "migrate", "web", "root@b"], env={"CKPT_FAULT": f"{step}:kill"}, check=False)
    (job,) = lab.a.run(["ls", "/var/lib/ckpt/jobs"]).stdout.split()
    wait_until(lambda: not lab.a.run(["pgrep", "-f", "guard_main"], check=False).stdout, "the guard is through")
    lab.a.run(["ckpt", "migrate", "--continue", job])
    host, other = (lab.a, lab.b) if step == "plain-commit" else (lab.b, lab.a)
    assert state(other) == ""
    assert counts_on(host)
    assert_never_back(host, at_least=at)
    assert_clean(lab.a, lab.b)


@RUNTIMES
def test_an_established_connection_survives(lab: Lab) -> None:
    """A client in one container, a server in another on the same host; the server is saved and comes back."""
    image = lab.a.load_image()
    lab.a.run(["podman", "run", "-d", "--name", "server", image, "echoserver", "7000"])
    address = lab.a.run(["podman", "inspect", "--format", "{{.NetworkSettings.IPAddress}}", "server"]).stdout.strip()
    lab.a.run(["podman", "run", "-d", "--name", "client", image, "echoclient", address, "7000", "/data/ticks"])
    wait_until(lambda: last_tick(lab.a, "client") > 5, "the client talks")
    lab.a.run(["ckpt", "checkpoint", "server"])
    at = last_tick(lab.a, "client")
    lab.a.run(["ckpt", "restore", "server"])
    wait_until(lambda: last_tick(lab.a, "client") > at + 5 or state(lab.a, "client") != "running", "the client talks again", 40)
    assert state(lab.a, "client") == "running", lab.a.run(["podman", "logs", "client"])
    assert_never_back(lab.a, "client")


TALKER = """
import select, socket, sys, time
link = socket.create_connection((sys.argv[1], 7000))
link.setblocking(False)
sent = got = 0
while True:
    if sent - got < 4096:
        sent += link.send(bytes([sent % 251]))
    if select.select([link], [], [], 0.02)[0]:
        for byte in link.recv(4096):
            assert byte == got % 251, (byte, got)
            got += 1
    with open(sys.argv[2] + ".part", "w") as out:
        out.write(f"{sent} {got}")
    __import__("os").rename(sys.argv[2] + ".part", sys.argv[2])
"""
"""Sends without waiting for the echo: there is always something that its kernel has to send again."""


@RUNTIMES
@pytest.mark.parametrize("fault", ["", "restore-commit:kill"], ids=["", "killed"])
def test_a_packet_that_comes_too_early_breaks_no_connection(lab: Lab, fault: str) -> None:
    """podman gives the container its address long before CRIU makes its sockets: the client's packets of that time get no reset."""
    host, image = lab.a, lab.a.load_image()

    def inspect(name: str, field: str) -> str:
        return host.run(["podman", "inspect", "--format", f"{{{{.{field}}}}}", name]).stdout.strip()

    def echoed() -> int:
        return int(host.read_file("/tmp/said").split()[1]) if host.exists("/tmp/said") else 0

    host.run(["podman", "run", "-d", "--name", "server", image, "echoserver", "7000"])
    host.run(["podman", "run", "-d", "--name", "client", image, "sleep", "600"])
    pid = inspect("client", "State.Pid")
    argv = ["nsenter", "-t", pid, "-n", "python3", "-c", TALKER, inspect("server", "NetworkSettings.IPAddress"), "/tmp/said"]
    talker = host.popen(argv)

    def sent_again() -> int:
        names, values = [line.split() for line in host.run(["cat", f"/proc/{pid}/net/snmp"]).stdout.splitlines() if line.startswith("Tcp:")]
        return int(values[names.index("RetransSegs")])

    try:
        wait_until(lambda: echoed() > 5, "they talk")
        host.run(["ckpt", "checkpoint", "server"])
        before = echoed()
        back = host.popen(["ckpt", "restore", "server"], env={"CKPT_FAULT": f"filling:gate=/tmp/gate,{fault}"})
        wait_until(lambda: host.exists("/tmp/gate.reached"), "the network is up, the sockets are not")
        sent = sent_again()
        wait_until(lambda: talker.poll() is not None or sent_again() > sent, "the client sends again")
        host.write_file("/tmp/gate", "")
        back.communicate(timeout=60)
        wait_until(lambda: talker.poll() is not None or echoed() > before + 50, "they talk again")
        assert talker.poll() is None, talker.communicate()
        wait_until(lambda: not leftovers(host), "nothing is left")
    finally:
        talker.kill_session()
        talker.communicate()


def peak_rss_kib(host: Host, *argv: str) -> int:
    """The largest resident size of ckpt itself (its children counted one by one) during a command."""
    script = (
        "import resource, subprocess, sys\n"
        "subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
    )
    return int(host.run(["python3", "-c", script, *argv], timeout_s=120).stdout)


def test_memory_of_ckpt_does_not_grow_with_the_container(lab: Lab) -> None:
    image = lab.a.load_image()
    peaks = {}
    for name, mib in (("small", 16), ("large", 400)):
        lab.a.run(["podman", "run", "-d", "--name", name, image, "memhog", str(mib), "0", "/data/ticks"])
        wait_until(lambda name=name: last_tick(lab.a, name) > 3, "it counts")  # type: ignore[misc]
        at = last_tick(lab.a, name)
        save = peak_rss_kib(lab.a, "ckpt", "checkpoint", name)
        restore = peak_rss_kib(lab.a, "ckpt", "restore", name)
        wait_until(lambda name=name, at=at: last_tick(lab.a, name) > at + 100, "it counts on, its memory whole")  # type: ignore[misc]
        move = peak_rss_kib(lab.a, "ckpt", "migrate", name, "root@b")
        wait_until(lambda name=name, at=at: last_tick(lab.b, name) > at + 200, "it counts on there")  # type: ignore[misc]
        peaks[name] = (save, restore, move)
    for small, large in zip(peaks["small"], peaks["large"], strict=True):
        assert large < small + 65536, peaks
