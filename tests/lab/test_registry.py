"""Checkpoints in a real registry (Debian's docker-registry, TLS and passwords): to and fro, with podman's own, and when it dies on the way."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.counting import assert_clean, assert_never_back, counts_on, last_tick, start_counter, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host, HostProcess

BALLAST_MIB = 24
NAME = "a:5000"
# "geheim"
PASSWORDS = "joe:$2b$10$018mH11ao8JrEtvYaqTi.e/BoTl8TbikNB8iMgdc7fl4.bOB0ufzW\n"
CONFIG = """version: 0.1
log: {level: error}
storage: {filesystem: {rootdirectory: /root/registry}, delete: {enabled: true}}
auth: {htpasswd: {realm: lab, path: /root/passwords}}
http: {addr: ":5000", tls: {certificate: /root/reg.pem, key: /root/reg.key}}
"""


def prepare_registry(lab: Lab) -> None:
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=a"]
    lab.a.run([*make, "-addext", "subjectAltName=DNS:a", "-keyout", "/root/reg.key", "-out", "/root/reg.pem"])
    lab.a.write_file("/root/passwords", PASSWORDS)
    lab.a.write_file("/root/reg.yml", CONFIG)
    for host in lab:
        host.write_file(f"/etc/containers/certs.d/{NAME}/ca.crt", lab.a.read_file("/root/reg.pem"))


def serve(host: Host) -> HostProcess:
    process = host.popen(["docker-registry", "serve", "/root/reg.yml"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: host.run(["bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/5000"], check=False).returncode == 0, "the registry listens")
    return process


@contextmanager
def a_registry(lab: Lab) -> Iterator[list[HostProcess]]:
    prepare_registry(lab)
    running = [serve(lab.a)]
    try:
        yield running
    finally:
        for process in running:
            process.kill_session()
            process.wait(10)


def remove(host: Host, *names: str) -> None:
    host.run(["podman", "rm", "-f", "-t", "0", *names])


def tags(host: Host) -> str:
    return host.run(["podman", "images", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.ID}}"]).stdout


def figures(text: str) -> dict[str, str]:
    found: dict[str, str] = json.loads(text)["results"][0]["stats"]
    return found


def begin_export(host: Host, tag: str, log: Path) -> HostProcess:
    with log.open("wb") as stderr:
        return host.popen(["ckpt", "export", "podman:web", f"oci://{NAME}/ns/web:{tag}", "-c", "none"], stderr=stderr)


def test_checkpoints_in_a_registry(lab: Lab, tmp_path: Path) -> None:
    here, log = f"oci://{NAME}/ns/web", tmp_path / "log"
    lab.b.load_image()
    start_counter(lab.a, before=f"dd if=/dev/urandom of=/data/ballast bs=1M count={BALLAST_MIB} status=none")
    with a_registry(lab) as running:
        # Nobody logged in: refused before anything is frozen.
        refused = lab.a.run(["ckpt", "export", "podman:web", f"{here}:1"], check=False)
        assert (refused.returncode, refused.stderr.count("error: ")) == (43, 1) and "podman login" in refused.stderr, refused.stderr
        assert state(lab.a) == "running"
        for host in lab:
            host.run(["podman", "login", "-u", "joe", "--password-stdin", NAME], input="geheim")

        # From the living container, as an artifact and as an image.
        artifact = figures(lab.a.run(["ckpt", "export", "--format", "json", "-R", "podman:web", f"{here}:artifact"]).stdout)
        lab.a.run(["ckpt", "export", "-R", "podman:web", f"{here}:image", "--as", "image"])
        at = last_tick(lab.a)
        raw = json.loads(lab.a.run(["skopeo", "inspect", "--raw", f"docker://{NAME}/ns/web:artifact"]).stdout)
        assert raw["artifactType"] == "application/vnd.ckpt.checkpoint.v1" and len(raw["layers"]) > 1
        shown = json.loads(lab.a.run(["skopeo", "inspect", f"docker://{NAME}/ns/web:image"]).stdout)
        assert shown["Architecture"] == "amd64" and len(shown["Layers"]) == 1

        # podman pulls and restores the image.
        lab.b.run(["podman", "pull", "-q", f"{NAME}/ns/web:image"])
        lab.b.run(["podman", "container", "restore", f"{NAME}/ns/web:image"])
        assert counts_on(lab.b)
        assert_never_back(lab.b, at_least=11)
        remove(lab.b, "web")
        images = tags(lab.b)

        # ckpt restores both, and what podman itself pushed.
        lab.a.run(["podman", "container", "checkpoint", "--create-image", f"{NAME}/ns/podman:1", "-R", "web"])
        lab.a.run(["podman", "push", "-q", f"{NAME}/ns/podman:1"])
        lab.b.run(["ckpt", "import", "-n", "podmans", f"oci://{NAME}/ns/podman:1"])
        lab.b.run(["ckpt", "restore", "podmans"])
        assert counts_on(lab.b)
        assert last_tick(lab.b) > at  # podman's own -R lets it run on before it saves the files: they may be ahead of the memory
        remove(lab.b, "web")
        lab.b.run(["ckpt", "restore", "-i", f"{here}:image"])
        assert counts_on(lab.b)
        remove(lab.b, "web")
        assert lab.b.run(["ckpt", "import", f"{here}:artifact", "--digest", artifact["digest"]]).stdout == "web@1\n"
        lab.b.run(["ckpt", "restore", "web"])
        assert counts_on(lab.b)
        assert_never_back(lab.b, at_least=11)
        assert tags(lab.b) == images
        lab.a.run(["podman", "push", "-q", lab.a.load_image(), f"docker://{NAME}/ns/plain:1"])
        plain = lab.b.run(["ckpt", "import", f"oci://{NAME}/ns/plain:1"], check=False)
        assert plain.returncode == 30 and "checkpoint" in plain.stderr, plain.stderr

        # The registry dies in the middle of an upload. Given up: the container goes on, nothing is there.
        lab.limit_rate(160)
        before = lab.received_bytes("a")
        sending = begin_export(lab.b, "dead", log)
        wait_until(lambda: lab.received_bytes("a") - before > 10 << 20, "10 MiB are there")
        running.pop().kill_session()
        wait_until(lambda: "again" in log.read_text(), "the break is noticed")
        sending.send_signal(signal.SIGINT)
        sending.communicate(timeout=60)
        assert sending.returncode == 130, log.read_text()
        assert state(lab.b) == "running" and counts_on(lab.b)
        running.append(serve(lab.a))
        assert lab.b.run(["ckpt", "import", f"{here}:dead"], check=False).returncode == 10

        # It comes back: what was under way is sent again, no more than that; then the container ends, its checkpoint is there.
        before = lab.received_bytes("a")
        sending = begin_export(lab.b, "back", log)
        wait_until(lambda: lab.received_bytes("a") - before > 10 << 20, "10 MiB are there")
        running.pop().kill_session()
        wait_until(lambda: "again" in log.read_text(), "the break is noticed")
        running.append(serve(lab.a))
        sending.communicate(timeout=90)
        assert sending.returncode == 0, log.read_text()
        assert lab.received_bytes("a") - before < (BALLAST_MIB + 8 + 8) << 20
        assert state(lab.b) == "exited"
        lab.limit_rate(None)
        remove(lab.b, "web")
        lab.b.run(["ckpt", "restore", "-i", f"{here}:back"])
        assert counts_on(lab.b)
        assert_never_back(lab.b, at_least=11)
    assert_clean(lab.a, lab.b)
