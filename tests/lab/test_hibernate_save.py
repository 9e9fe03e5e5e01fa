"""`ckpt hibernate save`: all side by side or nothing, killed and gone on with, and back without a boot between."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from tests.lab.counting import assert_clean, assert_never_back, counts_on, last_tick, start_counter, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host
from tests.lab.test_hibernate_resume import start_bare, ticks_of

TREE = "/root/tree-ticks"
TOML = '[[tree]]\nname = "sim"\npidfile = "/run/sim.pid"\nafter = ["db"]\n'


def ckpt(host: Host, *words: str, fault: str = "") -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, rows, what was said on stderr."""
    done = host.run(["ckpt", "hibernate", *words, "--format", "json"], env={"CKPT_FAULT": fault} if fault else {}, check=False, timeout_s=150)
    return done.returncode, json.loads(done.stdout)["results"] if done.stdout else [], done.stderr


def states(host: Host) -> dict[str, str]:
    return {row["name"]: row["state"] for row in ckpt(host, "status")[1]}


def grows(host: Host, path: str) -> bool:
    seen = ticks_of(host, path)
    wait_until(lambda: len(ticks_of(host, path)) > len(seen), f"{path} goes on")
    return True


def start_pair(host: Host) -> None:
    """A group, by its pod: a server, and a client that counts through a connection to it."""
    image = host.load_image()
    # Any program does for the infra container; podman's own is not in the lab.
    host.run(["podman", "pod", "create", "--name", "shop", "--infra-name", "infra", "--infra-image", image, "--infra-command", "echoserver 9999"])
    host.run(["podman", "run", "-d", "--pod", "shop", "--name", "server", image, "echoserver", "7000"])
    host.run(["podman", "run", "-d", "--pod", "shop", "--name", "client", image, "echoclient", "127.0.0.1", "7000", "/data/ticks"])
    wait_until(lambda: last_tick(host, "client") > 5, "they talk")


@pytest.mark.parametrize("lab_options", [{"hosts": ("a",)}])
def test_all_or_nothing_and_killed_in_the_middle(lab: Lab) -> None:
    host = lab.a
    start_counter(host, "db", "--restart", "always")
    start_counter(host, "web", "--label", "ckpt.after=db")
    start_counter(host, "cache", "--label", "ckpt.reboot=stop")
    start_counter(host, "log", "--label", "ckpt.reboot=ignore")
    bare = start_bare(host, "runc", "bare")
    host.write_file("/etc/ckpt/hibernate.toml", TOML)
    host.run(["sh", "-c", f"setsid /opt/lab/bin/counter {TREE} </dev/null >/dev/null 2>&1 & echo $! >/run/sim.pid"])
    wait_until(lambda: bool(ticks_of(host, bare) and ticks_of(host, TREE)), "all count")
    tree = "pid:" + host.run(["cat", "/run/sim.pid"]).stdout.strip()
    mine = {"podman:db", "podman:web", "runc:bare", tree}

    # One that cannot be saved stops it all, before anything is touched.
    start_counter(host, "tied", "--requires", "log")
    code, _, said = ckpt(host, "save")
    assert code == 20 and "podman:tied" in said and "nothing was touched" in said, said
    assert not host.exists("/var/lib/ckpt/checkpoints") or not host.run(["ls", "/var/lib/ckpt/checkpoints"]).stdout
    assert counts_on(host, "web") and counts_on(host, "db") and grows(host, TREE)
    host.run(["podman", "rm", "-f", "-t", "0", "tied"])

    # What breaks in the middle brings back what had ended.
    code, _, said = ckpt(host, "save", "db", "web", fault="hibernate-all:fail")
    assert code == 20 and "brought back" in said, said
    assert states(host) == {"podman:db": "restored", "podman:web": "restored"}
    assert counts_on(host, "web") and counts_on(host, "db")

    # Killed with one saved, and the next one while it is dumped: nothing twice, nothing lost.
    assert ckpt(host, "save", fault="hibernate-one-saved:kill")[0] in (-9, 137)
    assert ckpt(host, "status")[0] == 20
    assert ckpt(host, "save", fault="held:kill")[0] in (-9, 137)
    start_pair(host)
    mine |= {"podman:server", "podman:client"}
    code, _, said = ckpt(host, "save")
    assert code == 0, said
    assert states(host) == {**dict.fromkeys(mine, "saved"), "podman:cache": "stopped", "podman:log": "ignored"}
    assert [state(host, name) for name in ("db", "web", "cache", "log")] == ["exited", "exited", "exited", "running"]
    held = json.loads(host.run(["ckpt", "list", "--format", "json"]).stdout)["results"]
    made = Counter(row["name"] for row in held if "hibernate" in row["tags"])
    # Those of the first try are gone; one may have been just being stored when the save beside it was killed.
    assert len(made) == len(mine) and made.total() in (len(mine), len(mine) + 1), made
    at = last_tick(host, "log")
    assert ckpt(host, "save")[0] == 0 and state(host, "web") == "exited" and last_tick(host, "log") >= at  # nothing is left to do

    made_sets = host.run(["ls", "/var/lib/ckpt/groups"]).stdout
    assert made_sets.startswith("pod-") and made_sets.endswith("@1.json\n"), made_sets
    host.run(["podman", "stop", "-t", "0", "infra"])
    code, rows, said = ckpt(host, "resume", "--same-boot")
    assert code in (0, 100), said
    assert {row["name"]: row["how"] for row in rows if row["name"] in mine} == dict.fromkeys(mine, "restored")
    for name in ("db", "web", "client"):
        assert counts_on(host, name)
        assert_never_back(host, name)
    assert state(host, "server") == state(host, "infra") == "running"
    assert grows(host, TREE) and grows(host, bare)
    for path in (TREE, bare):
        seen = ticks_of(host, path)
        assert seen == list(range(seen[0], seen[0] + len(seen)))
    inspected = host.run(["podman", "container", "inspect", "--format", "{{.HostConfig.RestartPolicy.Name}}", "db"]).stdout.strip()
    assert inspected == "always"
    assert_clean(host)
