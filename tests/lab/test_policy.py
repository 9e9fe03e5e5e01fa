"""What comes from elsewhere gets what this host gives: all else is listed, refused, and allowed one by one. podman for real."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.lab.counting import assert_clean, counts_on, start_counter, state
from tests.lab.harness import Lab
from tests.lab.harness.host import Host

ASKING = ("--cap-add", "SYS_ADMIN", "--security-opt", "seccomp=unconfined", "-v", "/srv:/srv", "--device", "/dev/fuse")


def export(host: Host, file: str, *options: str) -> None:
    """A counter, dumped to an archive, and forgotten."""
    start_counter(host, "web", *options)
    host.run(["ckpt", "checkpoint", "web"])
    host.run(["ckpt", "restore", "web"])  # its own, in its place: nobody asks
    assert counts_on(host)
    host.run(["ckpt", "export", "web@1", "-o", file])
    host.run(["podman", "rm", "-f", "-t", "0", "web"])


def everything(host: Host) -> str:
    """Containers, container images with all names and digests, volumes, networks, mounts; and what the store and /srv hold."""
    return host.run(
        [
            "sh",
            "-c",
            "podman ps -a --no-trunc --format '{{.ID}} {{.Names}} {{.Status}}'; podman images -a --digests --no-trunc --format "
            "'{{.Repository}}:{{.Tag}} {{.Digest}} {{.Id}}'; podman volume ls -q; podman network ls -q; wc -l </proc/self/mountinfo;"
            "find /srv /var/lib/ckpt -not -path '*/jobs*' -not -path '*/history*' -not -path '*/locks/*' | sort",
        ]
    ).stdout


def refusal(host: Host, *argv: str) -> list[dict[str, Any]]:
    """The table of a restore that is refused; nothing is as it was not before."""
    before = everything(host)
    result = host.run(["ckpt", "restore", *argv, "--format", "json"], check=False)
    assert result.returncode == 34, result
    assert len(re.findall(r"^error: ", result.stderr, re.M)) == 1, result
    assert everything(host) == before
    assert_clean(host)
    wants = json.loads(result.stdout)["results"][0]["error"]["wants"]
    for row in wants:
        assert row["what"] in result.stderr and row["allow"] in result.stderr, result
    return list(wants)


def test_each_thing_is_refused_until_it_is_allowed(lab: Lab) -> None:
    host = lab.a
    host.run(["mkdir", "-p", "/srv/below"])
    export(host, "/tmp/asks.tar.zst", *ASKING)
    wants = refusal(host, "-i", "/tmp/asks.tar.zst")
    assert sorted(row["what"] for row in wants) == ["cap:SYS_ADMIN", "device:/dev/fuse", "mount:/srv", "seccomp:unconfined"]
    allow = [word for row in wants for word in row["allow"].split()]
    assert len(refusal(host, "-i", "/tmp/asks.tar.zst", *allow[:-2])) == 1
    host.run(["ckpt", "import", "/tmp/asks.tar.zst", "-n", "again"])
    assert len(refusal(host, "again")) == 4
    host.run(["ckpt", "restore", "again", *allow])
    assert counts_on(host)
    host.run(["podman", "rm", "-f", "-t", "0", "web"])
    assert_clean(host)


def test_privileged_is_one_thing(lab: Lab) -> None:
    export(lab.a, "/tmp/privileged.tar.zst", "--privileged")
    assert [row["what"] for row in refusal(lab.a, "-i", "/tmp/privileged.tar.zst")] == ["privileged:on"]
    lab.a.run(["ckpt", "restore", "-i", "/tmp/privileged.tar.zst", "--allow", "privileged:on"])
    assert counts_on(lab.a)
    assert state(lab.a) == "running"


def test_no_name_of_a_container_image_is_moved_and_nothing_is_pulled(lab: Lab) -> None:
    """The archive names its container image by a name that is not here, and by one that means another: its id is what counts."""
    host = lab.a
    export(host, "/tmp/web.tar", "--cap-drop", "KILL")
    host.run(["sh", "-c", "printf 'FROM scratch\\nLABEL a=b\\n' | podman build -q -t localhost/other:latest -"])
    script = (
        "import io, json, sys, tarfile, zstandard\n"
        "reader = zstandard.ZstdDecompressor().stream_reader(open('/tmp/web.tar', 'rb'), read_across_frames=True)\n"
        "tar = tarfile.open(fileobj=io.BytesIO(reader.read()))\n"
        "out = tarfile.open('/tmp/lie.tar', 'w')\n"
        "for m in tar:\n"
        "    data = tar.extractfile(m).read() if m.isreg() else b''\n"
        "    if m.name == 'artifacts/ckpt.json': continue\n"
        "    if m.name == 'config.dump': data = json.dumps(json.loads(data) | {'rootfsImageName': sys.argv[1]}).encode(); m.size = len(data)\n"
        "    out.addfile(m, io.BytesIO(data))\n"
        "out.close()\n"
    )
    tags = ["podman", "images", "-a", "--digests", "--no-trunc", "--format", "{{.Repository}}:{{.Tag}} {{.Digest}} {{.Id}}"]
    before = host.run(tags).stdout
    for name in ("localhost/nowhere:latest", "localhost/other:latest"):
        host.run(["python3", "-c", script, name])
        host.run(["ckpt", "restore", "-i", "/tmp/lie.tar"])
        assert counts_on(host)
        host.run(["podman", "rm", "-f", "-t", "0", "web"])
        assert host.run(tags).stdout == before
    assert_clean(host)
