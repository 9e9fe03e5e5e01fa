"""Evidence: a signed chain of snapshots of a running container with clients, and a copy of one without network."""

from __future__ import annotations

import json
from typing import Any

from tests.lab.counting import assert_clean, assert_never_back, counts_on, last_tick, start_counter, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host


def cards(host: Host) -> list[str]:
    return sorted(host.run(["ls", "/sys/class/net"]).stdout.split())


def snap(host: Host, *options: str) -> dict[str, Any]:
    said = host.run(["ckpt", "snapshot", "web", "--reason", "INC-123", "--sign", "/root/key", "--format", "json", *options]).stdout
    found: dict[str, Any] = json.loads(said)["results"][0]
    return found


def test_a_chain_of_snapshots_and_an_isolated_copy(lab: Lab) -> None:
    host = lab.a
    host.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/root/key"])
    host.run(["sh", "-c", "echo examiner $(cat /root/key.pub) > /root/signers"])
    start_counter(host, "web", "-v", "vol1:/vol", "-p", "8080:7000", before="echo original > /vol/file; (echoserver 7000 &)")
    address = host.run(["podman", "inspect", "--format", "{{.NetworkSettings.IPAddress}}", "web"]).stdout.strip()
    host.run(["podman", "run", "-d", "--name", "client", host.load_image(), "echoclient", address, "7000", "/data/ticks"])
    wait_until(lambda: last_tick(host, "client") > 5, "the client talks")
    taken = [snap(host) for _ in range(3)]
    assert [one["stats"]["number"] for one in taken] == [1, 2, 3]
    assert all(0 < one["freeze_s"] < 10 for one in taken)
    whole = host.run(["ckpt", "verify", "--chain", "web", "--verify-with", "/root/signers"]).stdout
    assert "3 snapshots, signed by examiner" in whole and taken[2]["stats"]["digest"] in whole
    assert host.run(["ckpt", "rm", "web@2"], check=False).returncode == 11  # pinned

    # Killed on the way there: nothing of the copy is left.
    host.run(["ckpt", "restore", "--isolated", "web@2"], env={"CKPT_FAULT": "restored:kill"}, check=False)
    assert_clean(host)
    left = "ls /run/netns | grep ckpt; podman volume ls -q | grep isolated; podman ps -aq --filter name=isolated"
    assert not host.run(["sh", "-c", left], check=False).stdout

    # The copy runs on from where the evidence is; nothing of it can leave, and the original does not notice.
    before = cards(host)
    host.run(["ckpt", "restore", "--isolated", "web@2"])
    assert cards(host) == before
    assert counts_on(host, "web-isolated") and counts_on(host)
    assert_never_back(host, "web-isolated", at_least=11)
    inside = "ls /sys/class/net; tail -n +2 /proc/net/route | wc -l; cat /vol/file; echo changed > /vol/file"
    assert host.run(["podman", "exec", "web-isolated", "sh", "-c", inside]).stdout.split() == ["lo", "0", "original"]
    assert host.run(["podman", "exec", "web", "cat", "/vol/file"]).stdout.strip() == "original"
    at = last_tick(host, "client")
    wait_until(lambda: last_tick(host, "client") > at + 5 or state(host, "client") != "running", "the client talks on, to the original")
    assert state(host, "client") == "running"
    assert not host.run(["sh", "-c", "ls /run/netns | grep ckpt"], check=False).stdout
    host.run(["podman", "rm", "-f", "-t", "0", "web-isolated"])
    host.run(["podman", "volume", "rm", "web-isolated-vol1"])
    assert_clean(host)

    # What is taken away or changed is found.
    host.run(["ckpt", "verify", "--chain", "web"])
    host.run(["ckpt", "pin", "--remove", "web@2"])
    host.run(["ckpt", "rm", "web@2"])
    done = host.run(["ckpt", "verify", "--chain", "web"], check=False)
    assert done.returncode == 31 and "number 2" in done.stderr and "is missing" in done.stderr
