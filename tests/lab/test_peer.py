"""The peer protocol over a real ssh between two hosts of the lab."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.harness import Host, Lab, LabUnavailable

pytestmark = pytest.mark.lab

PACKAGES = "/opt/peer-test"
SERVER = f"""#!/usr/bin/python3
import os, sys
from pathlib import Path
sys.path.insert(0, "{PACKAGES}")
from ckpt.peer.server import main
def stage(session, args):
    into = Path(args["into"])
    into.mkdir(mode=0o700)
    return {{"files": {{file.path: file.sha256 for file in session.receive_files(into, allow=lambda path: True)}}}}
def hold(session, args):
    Path(args["mark"]).unlink(missing_ok=True)
    session.on_lost(lambda: Path(args["mark"]).touch())
    return {{"host": os.uname().nodename, "source": session.source}}
print("motd of b")
sys.stdout.flush()
sys.exit(main({{"stage": stage, "hold": hold}}))
"""
CLIENT = f"""
import json, sys
sys.path.insert(0, "{PACKAGES}")
from pathlib import Path
from ckpt.errors import CkptError
from ckpt.model import Carriage, Compression
from ckpt.peer.client import connect
destination, step, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
answer = {{}}
options["carriage"] = Carriage(compress=Compression("zstd" if options.pop("compress", False) else "none"))
try:
    with connect(destination, command=options.pop("command", ["peer-test"]), **options) as peer:
        if step == "hold":
            answer = peer.call("hold", {{"mark": "/run/lost"}})
        elif step == "stage":
            with peer.upload("stage", {{"into": "/var/lib/ckpt/in"}}) as up:
                up.send_stage(Path("/var/lib/ckpt/out"), ["checkpoint", "sparse"])
            answer = {{"sent": up.digests, "got": up.result["files"], "bytes": peer.sent_bytes}}
        elif step == "endless":
            peer.call("hold", {{"mark": "/run/lost"}})
            with open("/dev/zero", "rb") as zero, peer.upload("stage", {{"into": "/var/lib/ckpt/endless"}}) as up:
                Path("/run/streaming").touch()
                up.send_stream("zero", zero)
except CkptError as error:
    answer = {{"error": type(error).__name__, "message": error.message, "hint": error.hint}}
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    try:
        with Lab(store_mib=256) as lab:
            package = Path(__file__).parents[2] / "ckpt"
            for host in (lab.a, lab.b):
                for path in package.rglob("*.py"):
                    if path.parts[len(package.parts)] in (
                        "__init__.py",
                        "archive",
                        "config.py",
                        "errors.py",
                        "events.py",
                        "model.py",
                        "peer",
                        "store",
                        "transports",
                        "host",
                    ):
                        host.write_file(f"{PACKAGES}/ckpt/{path.relative_to(package)}", path.read_bytes())
            lab.b.write_file("/usr/local/bin/peer-test", SERVER, mode=0o755)
            lab.a.write_file("/root/client.py", CLIENT)
            yield lab
    except LabUnavailable as error:
        pytest.skip(str(error))


def client(host: Host, destination: str, step: str = "hold", **options: Any) -> dict[str, Any]:
    done = host.run(["python3", "/root/client.py", destination, step, json.dumps(options)], timeout_s=90)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def wait_for(host: Host, path: str, seconds: float = 15) -> None:
    host.run(["timeout", str(seconds), "sh", "-c", f"until [ -e {path} ]; do sleep 0.05; done"], timeout_s=seconds + 5)


@pytest.mark.parametrize("destination", ["b", "root@b", "ssh://root@b:22", "root@10.77.0.2:22"])
def test_call(lab: Lab, destination: str) -> None:
    assert client(lab.a, destination) == {"host": "b", "source": "a"}


@pytest.mark.parametrize("compress", [False, True])
def test_files(lab: Lab, compress: bool) -> None:
    script = "rm -rf /var/lib/ckpt/out; mkdir -p /var/lib/ckpt/out/checkpoint; cd /var/lib/ckpt/out; "
    script += "head -c 50000000 /dev/urandom >checkpoint/pages-1.img; "
    lab.a.run(["sh", "-c", script + "truncate -s 1G sparse; printf x | dd of=sparse bs=1 seek=500000000 conv=notrunc"])
    lab.b.run(["rm", "-rf", "/var/lib/ckpt/in"])
    answer = client(lab.a, "b", "stage", compress=compress)
    assert answer["sent"] == answer["got"]
    for name, digest in answer["sent"].items():
        assert lab.b.run(["sha256sum", f"/var/lib/ckpt/in/{name}"]).stdout.split()[0] == digest
    assert 50_000_000 < answer["bytes"] < 51_000_000
    assert int(lab.b.run(["du", "-sk", "/var/lib/ckpt/in/sparse"]).stdout.split()[0]) < 1024


def test_no_space_names_the_host(lab: Lab) -> None:
    lab.b.run(["rm", "-rf", "/var/lib/ckpt/endless"])
    answer = client(lab.a, "b", "endless")
    assert answer["error"] == "NoSpace" and "on b" in answer["message"]
    assert lab.b.run(["ls", "/var/lib/ckpt/endless"]).stdout == ""


def test_unknown_and_changed_host_key(lab: Lab) -> None:
    known = lab.a.read_file("/root/.ssh/known_hosts")
    try:
        lab.a.write_file("/root/.ssh/known_hosts", "", mode=0o600)
        answer = client(lab.a, "b")
        assert answer["error"] == "CannotConnect" and "host key is unknown" in answer["message"] and "ssh b" in answer["hint"]
        key_of_a = lab.a.read_file("/etc/ssh/ssh_host_ed25519_key.pub").decode().split()
        lab.a.write_file("/root/.ssh/known_hosts", f"b {key_of_a[0]} {key_of_a[1]}\n", mode=0o600)
        answer = client(lab.a, "b")
        assert answer["error"] == "CannotConnect" and "host key has changed" in answer["message"] and "ssh-keygen -R b" in answer["hint"]
    finally:
        lab.a.write_file("/root/.ssh/known_hosts", known, mode=0o600)


def test_causes(lab: Lab) -> None:
    cases: list[tuple[str, dict[str, Any], str, str]] = [
        ("b:2222", {}, "CannotConnect", "refused"),
        ("nowhere", {}, "CannotConnect", "name is not known"),
        ("10.99.0.1", {"timeout_s": 5}, "CannotConnect", "no route|not answer|no answer"),
        ("nobody@b", {}, "CannotConnect", "permission denied"),
        ("b", {"command": ["no-such-ckpt", "peer"]}, "PeerMissing", "no-such-ckpt is not installed"),
        ("b", {"command": ["false"]}, "CannotConnect", "status 1"),
        ("b", {"command": ["cat", "/dev/zero"]}, "TransferFailed", "text instead"),
        ("b", {"command": ["sleep", "60"], "timeout_s": 1}, "CannotConnect", "no answer"),
    ]
    for destination, options, error, said in cases:
        answer = client(lab.a, destination, **options)
        assert answer["error"] == error, answer
        assert any(part in answer["message"] for part in said.split("|")), answer


@pytest.mark.parametrize("how", ["cable", "sshd"])
def test_cut_link(lab: Lab, how: str) -> None:
    lab.b.run(["rm", "-rf", "/var/lib/ckpt/endless", "/run/lost"])
    lab.b.run(["mount", "-t", "tmpfs", "-o", "size=2g", "endless", "/var/lib/ckpt"])
    lab.a.run(["rm", "-f", "/run/streaming"])
    lab.limit_rate(400)
    answers: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: answers.append(client(lab.a, "b", "endless", link_timeout_s=3)))
    try:
        thread.start()
        wait_for(lab.a, "/run/streaming")
        wait_for(lab.b, "/var/lib/ckpt/endless/zero")
        started_s = time.monotonic()
        if how == "cable":
            lab.cut_link("b")
        else:
            # The connection's own sshd, as when somebody ends it or the machine goes down.
            lab.b.run(["sh", "-c", "kill -9 $(ps -o ppid= -p $(pgrep -of peer-test))"])
        thread.join(20)
        assert answers and answers[0]["error"] == "TransferFailed", answers
        assert "lost the link to b" in answers[0]["message"]
        assert time.monotonic() - started_s < 12
        # b finds out by itself, undoes, and keeps nothing half.
        wait_for(lab.b, "/run/lost", 25)
        assert lab.b.run(["ls", "/var/lib/ckpt/endless"]).stdout == ""
    finally:
        lab.restore_link("b")
        lab.limit_rate(None)
        thread.join(30)
        lab.b.run(["umount", "-l", "/var/lib/ckpt"])
