"""`check` on real hosts: what it says is what CRIU does, and nothing is touched."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.harness import Host, Lab, LabUnavailable

pytestmark = pytest.mark.lab

SOURCE = Path(__file__).resolve().parents[2]
CHECK = """
import json, sys
from dataclasses import asdict
from ckpt.errors import CkptError
from ckpt.model import DumpOptions, Target
from ckpt.ops import check, resolve
names, to = sys.argv[1].split(","), sys.argv[2] or None
targets = [Target.parse(name) for name in names if name]
reports = check.check(targets, all=not targets, to=to)
engine, container = resolve.resolve(targets[0]) if targets else (None, None)
options = asdict(check.decide(engine, container, DumpOptions())) if engine else {}
print(json.dumps({"options": options, "reports": {r.target: [asdict(f) for f in r.findings] for r in reports}}))
"""
# What CRIU refuses, and by which check it is to be foretold.
REFUSED = {
    "io_uring": "import ctypes; assert ctypes.CDLL(None).syscall(425, 4, ctypes.create_string_buffer(120)) > 0",
    "special files": "import ctypes; assert ctypes.CDLL(None).syscall(323, 1) > 0",
    "sockets": "import socket; kept = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)",
    "devices": "import os; os.open('/dev/fuse', os.O_RDWR)",
    "namespaces": "import ctypes, os\nif os.fork() == 0: ctypes.CDLL(None).unshare(0x04000000)",
    "unix sockets": "import socket; kept = socket.socket(socket.AF_UNIX); kept.connect('/run/outside')",
}
OUTSIDE = """
import socket
server = socket.create_server('/run/outside', family=socket.AF_UNIX)
kept = []
while True: kept.append(server.accept())
"""
SAVED = {
    "nothing": "",
    "memfd": "import os; os.write(os.memfd_create('m'), bytes(3 << 20))",
    "tcp": "import socket; s = socket.create_server(('127.0.0.1', 0)); c = socket.create_connection(s.getsockname()); d, _ = s.accept()",
    "locks": "import fcntl; f = open('/root/locked', 'w'); fcntl.flock(f, fcntl.LOCK_EX)",
    "inotify": "import ctypes; l = ctypes.CDLL(None); assert l.inotify_add_watch(l.inotify_init1(0), b'/dev/shm', 2) > 0",
    "packet": "import socket; kept = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)",
    "terminal pair": "import pty; pair = pty.openpty()",
}


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    try:
        made = Lab(source=SOURCE)
    except LabUnavailable as error:
        pytest.skip(str(error))
    with made as running:
        for host in running.hosts.values():
            host.write_file("/opt/check.py", CHECK.encode())
        image = running.a.load_image()
        running.a.run(["podman", "run", "-d", "--name", "web", "-p", "8080:80", "-v", "data:/data", image, "counter", "/data/ticks"])
        yield running


def check(host: Host, *names: str, to: str = "") -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(host.run(["python3", "/opt/check.py", ",".join(names), to]).stdout)
    return answer


def table(host: Host, name: str, to: str = "") -> dict[str, tuple[str, str]]:
    return {f["check"]: (f["severity"], f["detail"]) for f in check(host, name, to=to)["reports"][name]}


def errors(found: dict[str, tuple[str, str]]) -> set[str]:
    return {check for check, (severity, _) in found.items() if severity == "error"}


def start(host: Host, code: str) -> str:
    """A Python process in a session of its own that has run `code`; its pid inside the host."""
    host.write_file("/opt/work.py", f"{code}\nopen('/run/ready', 'a').close()\nimport time\nwhile True: time.sleep(1)\n".encode())
    pid = host.run(["sh", "-c", "rm -f /run/ready; setsid python3 /opt/work.py </dev/null >/run/said 2>&1 & echo $!"]).stdout.strip()
    until = time.monotonic() + 20
    while not host.exists("/run/ready"):
        assert time.monotonic() < until and host.exists(f"/proc/{pid}"), host.read_file("/run/said")
        time.sleep(0.02)
    return pid


def dumps(host: Host, pid: str) -> bool:
    """Whether CRIU itself can dump the tree."""
    argv = ["criu", "dump", "-t", pid, "-D", "/run/images", "--leave-running", "--tcp-established", "--file-locks"]
    return host.run(["sh", "-c", 'rm -rf /run/images; mkdir /run/images; exec "$@"', "sh", *argv], check=False).returncode == 0


@pytest.mark.parametrize("expected", REFUSED)
def test_what_criu_refuses_is_foretold(lab: Lab, expected: str) -> None:
    outside = lab.a.popen(["python3", "-c", OUTSIDE])
    pid = ""
    try:
        until = time.monotonic() + 20
        while not lab.a.exists("/run/outside") and time.monotonic() < until:
            time.sleep(0.02)
        pid = start(lab.a, REFUSED[expected])
        assert errors(table(lab.a, f"pid:{pid}")) == {expected}
        assert not dumps(lab.a, pid)
    finally:
        outside.kill_session()
        outside.wait()
        lab.a.run(["sh", "-c", f"rm -f /run/outside; kill -9 -{pid}"], check=False)


@pytest.mark.parametrize("what", SAVED)
def test_what_criu_saves_is_not_refused(lab: Lab, what: str) -> None:
    pid = start(lab.a, SAVED[what])
    try:
        answer = check(lab.a, f"pid:{pid}")
        assert [f for f in answer["reports"][f"pid:{pid}"] if f["severity"] == "error"] == []
        assert (answer["options"]["tcp_established"], answer["options"]["file_locks"]) == (what == "tcp", what == "locks")
        assert answer["options"]["shell_job"] is False
        assert dumps(lab.a, pid)
    finally:
        lab.a.run(["kill", "-9", pid])


def test_a_container_and_its_destination(lab: Lab) -> None:
    before = (
        lab.b.run(["podman", "ps", "-aq"]).stdout,
        lab.b.run(["podman", "images", "-q"]).stdout,
        lab.b.run(["podman", "volume", "ls", "-q"]).stdout,
    )
    found = table(lab.a, "web", to="root@b")
    assert errors(found) == set()
    assert found["container image"] == ("ok", "localhost/busybox:latest is not there: copied first")
    assert {"architecture", "CPU", "CRIU version", "kernel", "memory", "disk space", "engine there", "name", "ports"} <= set(found)
    assert lab.a.run(["podman", "ps", "--format", "{{.Names}} {{.State}}"]).stdout == "web running\n"
    after = (
        lab.b.run(["podman", "ps", "-aq"]).stdout,
        lab.b.run(["podman", "images", "-q"]).stdout,
        lab.b.run(["podman", "volume", "ls", "-q"]).stdout,
    )
    assert before == after == ("", "", "")


def test_a_destination_where_name_and_port_are_taken(lab: Lab) -> None:
    image = lab.b.load_image()
    lab.b.run(["podman", "run", "-d", "--name", "web", "-p", "8080:80", image, "counter", "/data/ticks"])
    try:
        found = table(lab.a, "web", to="root@b")
        assert {"name", "ports"} <= errors(found) <= {"name", "ports", "addresses", "volumes"}
        assert found["container image"] == ("ok", "localhost/busybox:latest is there")
    finally:
        lab.b.run(["podman", "rm", "-f", "-t", "0", "web"])
        lab.b.run(["podman", "rmi", image])


def test_a_destination_without_criu(lab: Lab) -> None:
    lab.b.run(["mv", "/usr/sbin/criu", "/usr/sbin/criu.away"])
    try:
        assert {"CRIU version"} <= errors(table(lab.a, "web", to="root@b"))
    finally:
        lab.b.run(["mv", "/usr/sbin/criu.away", "/usr/sbin/criu"])


def test_an_exec_session_is_a_warning_and_a_terminal_none(lab: Lab) -> None:
    image = lab.a.load_image()
    lab.a.run(["podman", "run", "-dt", "--name", "terminal", image, "sh"])
    try:
        lab.a.run(["podman", "exec", "-d", "terminal", "sleep", "1000"])
        found = table(lab.a, "terminal")
        assert found["exec sessions"][0] == "warning" and "(sleep)" in found["exec sessions"][1]
        assert found["terminal"][0] == "ok"
        assert errors(found) == set()
    finally:
        lab.a.run(["podman", "rm", "-f", "-t", "0", "terminal"])


def test_connections_of_a_container(lab: Lab) -> None:
    image = lab.a.load_image()
    lab.a.run(["podman", "run", "-d", "--name", "echo", image, "echoserver", "7777"])
    address = lab.a.run(["podman", "inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", "echo"]).stdout.strip()
    client = lab.a.popen(["/opt/lab/bin/echoclient", address, "7777", "/run/echoed"])
    try:
        until = time.monotonic() + 20
        while not lab.a.exists("/run/echoed") or not lab.a.read_file("/run/echoed"):
            assert time.monotonic() < until
            time.sleep(0.02)
        answer = check(lab.a, "echo", to="root@b")
        found = {f["check"]: f for f in answer["reports"]["echo"]}
        assert found["TCP"]["detail"].startswith("1 open connection")
        assert found["addresses"]["severity"] == "warning" and address in found["addresses"]["detail"]
        assert answer["options"]["tcp_established"] is True
    finally:
        client.kill_session()
        client.wait()
        lab.a.run(["podman", "rm", "-f", "-t", "0", "echo"])


def test_all_means_every_running_container(lab: Lab) -> None:
    assert set(check(lab.a)["reports"]) == {"web"}


def test_a_paused_container_blocks(lab: Lab) -> None:
    lab.a.run(["podman", "pause", "web"])
    try:
        assert table(lab.a, "web")["state"] == ("error", "it is paused, not running")
    finally:
        lab.a.run(["podman", "unpause", "web"])
