"""Bad input: one clear message, its exit code, and everything as it was."""

from __future__ import annotations

import re

import pytest

from tests.lab.counting import assert_clean, counts_on, last_tick, start_counter, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host, HostResult


def refused(host: Host, code: int, words: str, *argv: str, env: dict[str, str] | None = None) -> HostResult:
    """Run ckpt, which must say one `error:` with these words and end with this code."""
    result = host.run(["ckpt", *argv], check=False, env=env)
    assert result.returncode == code, result
    assert len(re.findall(r"^error: ", result.stderr, re.M)) == 1, result
    assert re.search(words, result.stderr), result
    assert "Traceback" not in result.stderr + result.stdout
    return result


def test_names(lab: Lab) -> None:
    start_counter(lab.a)
    for verb in (("checkpoint", "nobody"), ("migrate", "nobody", "root@b"), ("check", "nobody"), ("restore", "nobody"), ("inspect", "nobody")):
        refused(lab.a, 10, "nobody", *verb)
    image = lab.a.load_image()
    lab.a.run(["podman", "run", "-d", "--name", "other", image, "counter", "/data/ticks"])
    ids = [lab.a.run(["podman", "inspect", "--format", "{{.Id}}", name]).stdout.strip() for name in ("web", "other")]
    if ids[0][:2] == ids[1][:2]:
        refused(lab.a, 10, "ambiguous|several", "checkpoint", ids[0][:2])
    assert counts_on(lab.a)
    assert_clean(lab.a)


def test_states(lab: Lab) -> None:
    start_counter(lab.a)
    lab.a.run(["podman", "pause", "web"])
    refused(lab.a, 11, "paused", "checkpoint", "web")
    refused(lab.a, 11, "paused", "migrate", "web", "root@b")
    assert state(lab.a) == "paused"
    lab.a.run(["podman", "unpause", "web"])
    lab.a.run(["podman", "stop", "-t", "0", "web"])
    refused(lab.a, 11, "exited", "checkpoint", "web")
    refused(lab.a, 11, "exited", "migrate", "web", "root@b")
    assert_clean(lab.a)


def test_not_root(lab: Lab) -> None:
    start_counter(lab.a)
    result = lab.a.run(["setpriv", "--reuid", "65534", "--clear-groups", "ckpt", "checkpoint", "web"], check=False, env={"HOME": "/tmp"})
    assert result.returncode == 14, result
    assert "root" in result.stderr


def test_criu_missing(lab: Lab) -> None:
    start_counter(lab.a)
    lab.a.run(["mv", "/usr/sbin/criu", "/usr/sbin/criu.away"])
    refused(lab.a, 13, "CRIU", "checkpoint", "web")
    assert counts_on(lab.a)


def test_criu_that_does_not_work_on_the_kernel(lab: Lab) -> None:
    start_counter(lab.a)
    lab.a.run(["mv", "/usr/sbin/criu", "/usr/sbin/criu.away"])
    script = (
        '#!/bin/sh\ncase "$*" in *--version*|*-V*) echo "Version: 3.17.1"; exit 0;; esac\n'
        'echo "Error (criu/vdso.c:1): Unexpected rt vDSO area bounds" >&2; exit 1\n'
    )
    lab.a.write_file("/usr/sbin/criu", script, mode=0o755)
    refused(lab.a, 13, "CRIU", "checkpoint", "web")
    assert counts_on(lab.a)


def test_crun_without_criu(lab: Lab) -> None:
    start_counter(lab.a)
    lab.a.run(["mv", "/usr/bin/crun", "/usr/bin/crun.real"])
    script = (
        '#!/bin/sh\ncase "$*" in *checkpoint*) echo "unknown command" >&2; exit 1;; *--version*) echo "crun version 1.8.1"; exit 0;; esac\n'
        'exec crun.real "$@"\n'
    )
    lab.a.write_file("/usr/bin/crun", script, mode=0o755)
    refused(lab.a, 13, "without CRIU", "checkpoint", "web")
    assert counts_on(lab.a)


def test_hosts(lab: Lab) -> None:
    start_counter(lab.a)
    refused(lab.a, 40, "no route|timed out|unreachable|answer", "migrate", "web", "root@10.77.0.99")
    refused(lab.a, 40, "name is not known", "migrate", "web", "root@nowhere.invalid")
    lab.a.run(["sh", "-c", "rm -f /root/.ssh/known_hosts* /etc/ssh/ssh_known_hosts"])
    refused(lab.a, 40, "host key is unknown", "migrate", "web", "root@b")
    assert counts_on(lab.a)
    assert_clean(lab.a)


def test_a_taken_name_and_port(lab: Lab) -> None:
    start_counter(lab.a, "web", "-p", "8080:80")
    lab.b.run(["podman", "run", "-d", "--name", "web", lab.b.load_image(), "counter", "/data/ticks"])
    wait_until(lambda: last_tick(lab.b) > 3, "b's own counts")
    refused(lab.a, 11, "web.* taken", "migrate", "web", "root@b")
    lab.b.run(["podman", "rm", "-f", "-t", "0", "web"])
    server = lab.b.popen(["socat", "TCP-LISTEN:8080,fork", "/dev/null"])
    try:
        wait_until(lambda: ":8080" in lab.b.run(["ss", "-ltn"]).stdout, "the port is taken")
        refused(lab.a, 11, "8080", "migrate", "web", "root@b")
    finally:
        server.kill_session()
    assert counts_on(lab.a)
    assert_clean(lab.a, lab.b)


@pytest.fixture
def archive(lab: Lab) -> bytes:
    start_counter(lab.a)
    lab.a.run(["ckpt", "checkpoint", "-R", "web"])
    lab.a.run(["ckpt", "export", "web", "-o", "/root/web.tar.zst"])
    lab.a.run(["ckpt", "rm", "web"])
    return lab.a.read_file("/root/web.tar.zst")


def test_archives(lab: Lab, archive: bytes) -> None:
    middle = len(archive) // 2
    bad = {
        "empty": b"",
        "not-a-tar": b"this is no archive\n" * 1000,
        "half": archive[:middle],
        "flipped": archive[:middle] + bytes([archive[middle] ^ 0x55]) + archive[middle + 1 :],
    }
    for name, content in bad.items():
        lab.a.write_file(f"/root/{name}", content)
        result = lab.a.run(["ckpt", "import", f"/root/{name}"], check=False)
        assert result.returncode in (30, 31), (name, result)
        assert len(re.findall(r"^error: ", result.stderr, re.M)) == 1
        result = lab.a.run(["ckpt", "restore", "-i", f"/root/{name}", "-n", "copy"], check=False)
        assert result.returncode in (30, 31), (name, result)
    script = (
        "import io, sys, tarfile\n"
        "with tarfile.open('/root/escape', 'w') as tar:\n"
        "    for name in ('config.dump', '../../../../root/escaped'):\n"
        "        info = tarfile.TarInfo(name); info.size = 2; tar.addfile(info, io.BytesIO(b'{}'))\n"
    )
    lab.a.run(["python3", "-c", script])
    refused(lab.a, 30, "escape|\\.\\.|path", "import", "/root/escape")
    assert not lab.a.exists("/root/escaped")
    lab.a.run(["sh", "-c", "truncate -s 8T /root/huge"])
    refused(lab.a, 30, "", "import", "/root/huge")
    refused(lab.a, 10, "missing", "import", "/root/missing")
    assert lab.a.run(["ckpt", "list", "-q"]).stdout == ""
    assert counts_on(lab.a)
    assert_clean(lab.a)


@pytest.mark.parametrize("left_kib", [0, 40, 150])
def test_checkpoint_with_a_full_disk(lab: Lab, left_kib: int) -> None:
    """However much room is left, it is not enough: the container runs, the store is as before."""
    start_counter(lab.a)
    before = last_tick(lab.a)
    saving = lab.a.popen(["ckpt", "checkpoint", "web"], env={"CKPT_FAULT": "dumping:gate=/tmp/gate"})
    wait_until(lambda: lab.a.exists("/tmp/gate.reached"), "the check has been passed")
    lab.a.run(["sh", "-c", "dd if=/dev/zero of=/var/lib/ckpt/full bs=4k 2>/dev/null; true"])
    lab.a.run(["truncate", "-s", f"-{left_kib}K", "/var/lib/ckpt/full"])
    lab.a.write_file("/tmp/gate", "")
    _, said = saving.communicate(timeout=60)
    assert saving.returncode in (20, 60), said.decode()
    assert "space" in said.decode() and "Traceback" not in said.decode()
    lab.a.run(["rm", "/var/lib/ckpt/full"])
    assert counts_on(lab.a)
    assert last_tick(lab.a) > before
    assert lab.a.run(["ckpt", "list", "-q"]).stdout == ""
    assert_clean(lab.a)
