"""An archive of a live container: every program that should reads it; inspect, search, diff and verify tell the truth about it."""

from __future__ import annotations

import json
from typing import Any

from tests.lab.counting import last_tick, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host

ARCHIVE = "/root/server.tar.zst"
SECRET = "tok-" + "4711" * 3


def told(host: Host, *argv: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(host.run(["ckpt", "--format", "json", *argv]).stdout)["results"][0]
    return found


def test_an_archive_and_what_is_in_it(lab: Lab) -> None:
    host, image = lab.a, lab.a.load_image()
    host.run(["podman", "run", "-d", "--name", "server", "-e", f"TOKEN={SECRET}", image, "sh", "-c", "exec 5>/data/open-file; exec echoserver 7000"])
    address = host.run(["podman", "inspect", "--format", "{{.NetworkSettings.IPAddress}}", "server"]).stdout.strip()
    host.run(["podman", "run", "-d", "--name", "client", image, "echoclient", address, "7000", "/data/ticks"])
    wait_until(lambda: last_tick(host, "client") > 5, "the client talks")
    host.run(["ckpt", "checkpoint", "-R", "server"])
    host.run(["podman", "exec", "server", "sh", "-c", "echo new > /data/new; rm /etc/hostname.none /etc/passwd 2>/dev/null; true"])
    host.run(["ckpt", "checkpoint", "server"])
    host.run(["ckpt", "export", "server@2", "-o", ARCHIVE])

    host.run(["zstd", "-q", "-t", ARCHIVE])
    names = host.run(["sh", "-c", f"zstd -dc {ARCHIVE} | tar t"]).stdout.split()
    assert "artifacts/ckpt.json" in names and "checkpoint/" in names
    shown = host.run(["checkpointctl", "show", ARCHIVE]).stdout
    assert "server" in shown and "Podman" in shown
    looked = host.run(["checkpointctl", "inspect", "--ps-tree", "--files", "--sockets", "--mounts", ARCHIVE]).stdout
    assert "echoserver" in looked and "/data/open-file" in looked

    for ref in (ARCHIVE, "server@2"):
        seen = told(host, "inspect", ref)
        (task,) = [task for task in seen["tasks"] if task["comm"] == "echoserver"]
        assert task["pid"] == 1 and task["exe"] == "/bin/echoserver" and task["memory"]["image_bytes"] > 0
        assert "/data/open-file" in [file["path"] for file in task["files"]]
        assert {("listen", "0.0.0.0:7000"), ("established", f"{address}:7000")} == {(one["state"], one["local"]) for one in task["sockets"]}
        assert "/proc" in [mount["mountpoint"] for mount in seen["mounts"]]
        assert SECRET not in json.dumps(seen)
        (found,) = [row for row in json.loads(host.run(["ckpt", "--format", "json", "inspect", ref, "--search", SECRET]).stdout)["results"]][:1]
        assert found["pid"] == 1 and SECRET.encode().hex() in found["context"]
    assert f"TOKEN={SECRET}" in told(host, "inspect", "--env", ARCHIVE)["tasks"][0]["environment"]

    differs = told(host, "diff", "server@1", ARCHIVE)
    files = {change["what"]: change["change"] for change in differs["files"]}
    assert files.get("/data/new") == "added" and files.get("/etc/passwd") == "removed", files
    (memory,) = [one for one in differs["memory"] if one["pid"] == 1]
    assert memory["same_pages"] > 0 and not differs["processes"]
    host.run(["ckpt", "verify", "--deep", ARCHIVE, "server@1", "server@2"])
    host.run(["ckpt", "verify", "--all"])

    # podman reads it, and its own archives are read.
    host.run(["podman", "rm", "-f", "-t", "0", "client", "server"])
    host.run(["podman", "container", "restore", "--tcp-established", "--import", ARCHIVE])
    assert state(host, "server") == "running"
    host.run(["podman", "container", "checkpoint", "--tcp-established", "-R", "-e", "/root/podman.tar.zst", "server"])
    seen = told(host, "inspect", "/root/podman.tar.zst")
    assert seen["foreign"] == "podman", "the manifest in it is of the checkpoint that podman restored"
    assert "echoserver" in [task["comm"] for task in seen["tasks"]]
    host.run(["ckpt", "verify", "--deep", "/root/podman.tar.zst"])
