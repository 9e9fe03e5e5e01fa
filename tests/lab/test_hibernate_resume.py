"""`ckpt hibernate resume`, as after a boot: another boot id, and engines that have forgotten what they keep in /run."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.lab.counting import assert_clean, assert_never_back, counts_on, last_tick, start_counter, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host

# As ckpt hibernate save does it: every workload an ordinary checkpoint, the journal beside.
SAVE = """
import sys
from pathlib import Path
from ckpt.model import DumpOptions, Target
from ckpt.ops import mark, resolve
from ckpt.ops.checkpoint import checkpoint
from ckpt.store.hibernation import Hibernation, Item
root, items = Path("/var/lib/ckpt"), []
for target in sys.argv[1:]:
    engine, container = resolve.resolve(Target.parse(target))
    items.append(Item(target, engine.name, container.id, container.name, "save"))
made = Hibernation.create(root, "reboot", items, kernel="another one")  # so that the canary sings
for item in items:
    (done,) = checkpoint([Target.parse(item.target)], options=DumpOptions(), store_root=root, emit=lambda event: None)
    if done.error:
        raise done.error
    mark.tag([done.checkpoint.manifest.id], ["hibernate"], [], store_root=root)
    made.write("saved", item=item.target, checkpoint_id=done.checkpoint.manifest.id, ref=done.checkpoint.ref)
made.write("saved")
print(made.directory)
"""
BOOT = """
set -e
cat /proc/sys/kernel/random/uuid >/root/boot_id
mount --bind /root/boot_id /proc/sys/kernel/random/boot_id
podman ps -q | while read id; do exit 9; done
rm -rf /run/libpod /run/containers /run/crun /run/runc /run/netns/*
"""


def python(host: Host, script: str, *args: str) -> str:
    host.write_file("/root/script.py", script)
    interpreter = host.run(["sh", "-c", "head -n 1 $(command -v ckpt) | cut -c 3-"]).stdout.split()
    return host.run([*interpreter, "/root/script.py", *args]).stdout


def resume(host: Host, *options: str, fault: str = "") -> tuple[int, dict[str, dict[str, Any]], str]:
    """Exit code, rows by target, what was said on stderr."""
    done = host.run(["ckpt", "hibernate", "resume", "--format", "json", *options], env={"CKPT_FAULT": fault} if fault else {}, check=False)
    rows = json.loads(done.stdout)["results"] if done.stdout else []
    return done.returncode, {row["name"]: row for row in rows}, done.stderr


def start_bare(host: Host, runtime: str, name: str) -> str:
    """A bare container; returns where it ticks."""
    script = (
        'set -e; mkdir -p "$1/rootfs/bin" "$1/rootfs/proc" "$1/rootfs/dev" "$1/rootfs/sys" "$1/rootfs/data"; cd "$1"\n'
        'cp /opt/lab/bin/counter rootfs/bin/; "$2" spec\n'
        'python3 -c \'import json; s = json.load(open("config.json")); s["process"].update(terminal=False, args=["/bin/counter", "/data/ticks"]);'
        ' s["root"]["readonly"] = False; s["linux"].pop("resources", None); json.dump(s, open("config.json", "w"))\'\n'
        '"$2" run --detach --bundle "$1" "$3" </dev/null >/dev/null 2>&1\n'
    )
    bundle = f"/var/lib/bundles/{name}"
    host.run(["sh", "-c", script, "sh", bundle, runtime, name])
    return f"{bundle}/rootfs/data/ticks"


def ticks_of(host: Host, path: str) -> list[int]:
    text = host.run(["cat", path], check=False).stdout
    return [int(line.split()[0]) for line in text.split("\n")[:-1] if line]


def connections(host: Host) -> str:
    return host.run(["podman", "exec", "web", "netstat", "-tn"]).stdout


@pytest.mark.parametrize("lab_options", [{"hosts": ("a",)}])
def test_all_come_back_after_a_boot(lab: Lab) -> None:
    """Of every kind one, one whose restore fails, killed again and again; nothing runs twice, nothing is lost."""
    host = lab.a
    connected = "echoserver 77 & (until netstat -tln | grep -q :77; do sleep 0.1; done; exec echoclient 127.0.0.1 77 /data/echoed) & true"
    start_counter(host, "web", "-v", "vol1:/vol", before=f"echo kept > /data/state; echo volume > /vol/file; {connected}")
    host.run(["mkdir", "/root/mnt"])
    host.write_file("/root/mnt/open", "x")
    bad = "echo kept > /data/state; rm /etc/gone 2>/dev/null; [ -e /mnt/open ] && exec 3</mnt/open"
    start_counter(host, "bad", "--runtime", "runc", "-v", "/root/mnt:/mnt", before=bad)
    bare = start_bare(host, "crun", "bare")
    tree = "/root/tree-ticks"
    pid = int(host.run(["sh", "-c", f"setsid /opt/lab/bin/counter {tree} </dev/null >/dev/null 2>&1 & echo $!"]).stdout)
    wait_until(lambda: bool(ticks_of(host, bare) and ticks_of(host, tree)), "all count")
    targets = ("podman:web", "podman:bad", "crun:bare", f"pid:{pid}")
    at = last_tick(host, "web")
    directory = python(host, SAVE, *targets).strip()
    code, rows, said = resume(host)
    assert (code, rows) == (0, {}) and "not been started anew" in said, said
    host.run(["rm", "/root/mnt/open"])
    host.run(["sh", "-c", BOOT])
    for fault in ("hibernate-climbed:kill", "restored:kill", "hibernate-rung-cold:kill"):
        code, _, said = resume(host, fault=fault)
        assert code in (-9, 137), said
    code, rows, said = resume(host)
    assert code == 23, said
    assert {target: rows[target]["how"] for target in targets} == {**dict.fromkeys(targets, "restored"), "podman:bad": "cold"}, rows
    assert [(one["rung"], one["ok"]) for one in rows["podman:bad"]["rungs"]] == [("restore", False), ("restore-closed", False), ("cold", True)]
    assert counts_on(host, "web") and counts_on(host, "bad")
    assert_never_back(host, "web", at_least=at)
    for name in ("web", "bad"):
        assert host.run(["podman", "exec", name, "cat", "/data/state"]).stdout == "kept\n"
    assert host.run(["podman", "exec", "web", "cat", "/vol/file"]).stdout == "volume\n"
    for path in (bare, tree):
        seen = ticks_of(host, path)
        assert seen == list(range(seen[0], seen[0] + len(seen)))
        wait_until(lambda path=path, seen=seen: len(ticks_of(host, path)) > len(seen), f"{path} goes on")  # type: ignore[misc]
    assert host.run(["pgrep", "-fc", tree]).stdout.strip() == "1"
    code, rows, said = resume(host)
    assert (code, rows) == (0, {}) and "is over" in said, said
    journal = [json.loads(line) for line in host.run(["cat", f"{directory}/journal.jsonl"]).stdout.splitlines()]
    assert journal[-1]["state"] == "resumed"
    assert state(host, "bad") == "running"
    assert next(entry for entry in journal if entry.get("canary"))["canary"]["ok"]
    # With its connections closed: nobody is left behind them.
    wait_until(lambda: " ESTABLISHED" in connections(host), "it has a connection")
    at = last_tick(host, "web")
    python(host, SAVE, "podman:web")
    code, rows, said = resume(host, "--same-boot", fault="hibernate-rung-restore:fail")
    assert (code, rows["podman:web"]["how"]) == (0, "restored-closed"), said
    assert counts_on(host, "web") and " ESTABLISHED" not in connections(host)
    assert_never_back(host, "web", at_least=at)
    # The runtime has a live container of that id which podman does not know: no rung may end it, and none gets past it.
    identity = host.run(["podman", "inspect", "--format", "{{.Id}}", "bad"]).stdout.strip()
    python(host, SAVE, "podman:bad")
    other = start_bare(host, "runc", identity)
    code, rows, said = resume(host, "--same-boot")
    assert (code, rows["podman:bad"]["how"]) == (21, "failed"), said
    assert "that its engine does not know" in rows["podman:bad"]["error"]["message"], rows
    seen = ticks_of(host, other)
    wait_until(lambda: len(ticks_of(host, other)) > len(seen), "the other one goes on")
    host.run(["runc", "delete", "--force", identity])
    host.run(["ckpt", "restore", "bad"])
    assert counts_on(host, "bad")
    assert_clean(host)
    host.run(["umount", "/proc/sys/kernel/random/boot_id"])
