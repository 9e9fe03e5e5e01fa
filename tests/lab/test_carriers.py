"""Archives over ssh, https (nginx) and pipes between two hosts, with the link cut and the server killed on the way."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from tests.lab.counting import assert_clean, assert_never_back, counts_on, start_counter, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host, HostProcess

BALLAST_MIB = 48
NGINX = """
daemon on; pid /run/nginx-lab.pid; worker_processes 1; error_log /root/nginx.log;
events {}
http {
  access_log off; client_body_temp_path /srv/in/tmp; client_max_body_size 200m;
  server {
    listen 8443 ssl; ssl_certificate /root/b.pem; ssl_certificate_key /root/b.key; root /srv;
    location /in/ { dav_methods PUT; }
  }
}
"""
QUICK_SSH = [word for option in ("ServerAliveInterval=1", "ServerAliveCountMax=2", "ConnectTimeout=1") for word in ("--ssh-option", option)]


def start_nginx(lab: Lab) -> None:
    make = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=b"]
    lab.b.run([*make, "-addext", "subjectAltName=DNS:b", "-keyout", "/root/b.key", "-out", "/root/b.pem"])
    lab.a.write_file("/root/b.pem", lab.b.read_file("/root/b.pem"))
    lab.b.write_file("/root/nginx.conf", NGINX)
    lab.b.run(["sh", "-c", "mkdir -p /srv/in/tmp && chmod -R 777 /srv"])
    lab.b.run(["nginx", "-c", "/root/nginx.conf"])


def workers(host: Host) -> list[str]:
    master = host.read_file("/run/nginx-lab.pid").decode().strip()
    return host.read_file(f"/proc/{master}/task/{master}/children").decode().split()


def begin(host: Host, argv: list[str], log: Path) -> HostProcess:
    with log.open("wb") as stderr:
        return host.popen(argv, stdout=subprocess.PIPE, stderr=stderr)


def finish(process: HostProcess, log: Path) -> str:
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, log.read_text()
    return out.decode()


def test_archives_are_carried_between_hosts(lab: Lab, tmp_path: Path) -> None:
    start_counter(lab.a, before=f"dd if=/dev/urandom of=/data/ballast bs=1M count={BALLAST_MIB} status=none")
    lab.a.run(["ckpt", "checkpoint", "-R", "web"])
    log = tmp_path / "log"
    lab.limit_rate(160)

    # ssh, to a host that needs no ckpt for it; the cable is pulled on the way.
    before = lab.received_bytes("b")
    sending = begin(lab.a, ["ckpt", "export", "--format", "json", "web@1", "root@b:web.tar.zst", *QUICK_SSH], log)
    wait_until(lambda: lab.received_bytes("b") - before > 10 << 20, "10 MiB are there")
    lab.cut_link("b")
    wait_until(lambda: "going on at byte" in log.read_text(), "the break is noticed")
    lab.restore_link("b")
    digest = json.loads(finish(sending, log))["results"][0]["stats"]["digest"]
    assert f"sha256:{lab.b.run(['sha256sum', '/root/web.tar.zst']).stdout.split()[0]}" == digest
    assert lab.received_bytes("b") - before < (BALLAST_MIB + 8 + 6) << 20  # at most one chunk twice
    assert [name for name in lab.b.run(["ls", "-A", "/root"]).stdout.split() if name.endswith(".part")] == []

    # https, to a plain web server, and back while it dies and comes again.
    start_nginx(lab)
    url = "https://b:8443/in/web.tar.zst"
    for argv, code, words in (
        (["ckpt", "export", "web@1", url], 43, "certificate is not trusted"),
        (["ckpt", "export", "web@1", "https://b:8443/no/web.tar.zst", "--ca", "/root/b.pem"], 43, "refused"),
        (["ckpt", "import", "https://b:8443/in/none", "--ca", "/root/b.pem"], 10, "no archive"),
        (["ckpt", "import", "https://b:9/x"], 40, "cannot connect"),
    ):
        bad = lab.a.run(argv, check=False)
        assert (bad.returncode, bad.stderr.count("error: ")) == (code, 1) and words in bad.stderr, bad.stderr
    sent = json.loads(lab.a.run(["ckpt", "export", "--format", "json", "web@1", url, "--ca", "/root/b.pem"]).stdout)["results"][0]["stats"]["digest"]
    before = lab.received_bytes("a")
    coming = begin(lab.a, ["ckpt", "import", "-n", "again", url, "--ca", "/root/b.pem", "--digest", sent], log)
    wait_until(lambda: lab.received_bytes("a") - before > 10 << 20, "10 MiB are there")
    lab.b.run(["kill", "-9", *workers(lab.b)])
    assert finish(coming, log) == "again@1\n"
    assert "going on at byte" in log.read_text()
    assert lab.received_bytes("a") - before < (BALLAST_MIB + 8 + 6) << 20
    lab.limit_rate(None)

    # A pipe, from the living container; it ends when the other host's store has it.
    lab.a.run(["bash", "-c", "set -o pipefail; ckpt export podman:web - | ssh b ckpt import -"])
    assert state(lab.a) == "exited"
    lab.b.load_image()
    lab.b.run(["ckpt", "restore", "web"])
    assert counts_on(lab.b)
    assert_never_back(lab.b, at_least=11)

    # And one that cannot get there goes on.
    lab.b.run(["ckpt", "checkpoint", "-R", "web"])
    failed = lab.b.run(["ckpt", "export", "podman:web", "ssh://root@a/root/no/web.tar"], check=False)
    assert failed.returncode == 43 and counts_on(lab.b), failed.stderr
    lab.b.run(["podman", "rm", "-f", "-t", "0", "web"])  # beside the original it would share that one's files: policy
    lab.b.run(["ckpt", "restore", "-i", "root@b:web.tar.zst", "-n", "copy"])
    assert counts_on(lab.b, "copy")
    assert_clean(lab.a, lab.b)
