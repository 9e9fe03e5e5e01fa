"""Real reboots: what runs is saved, the machine goes down and boots, and everything counts on where it stood."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.vm.harness import Vm

pytestmark = pytest.mark.timeout(1500)

TICKS = "/data/ticks"
STEP_MS = 200
"""Ten counters at once must leave the emulated processors something to do."""
LIMITS = "shutdown_timeout_s = 900\nsave_timeout_s = 400\nrestore_timeout_s = 400\ncold_timeout_s = 300\n"
"""Everything is slow here, and the tests of the lab run beside."""
CONFIG = f"""{LIMITS}
[[tree]]
name = "sim"
unit = "sim.service"

[[tree]]
name = "job"
pidfile = "/srv/job.pid"
"""
# A program of its own unit, and one that daemonized in a scope. Neither talks to the journal: CRIU cannot save that socket.
TREES = f"""
set -e
cd /
mkdir -p /etc/ckpt /srv
cat >/etc/systemd/system/sim.service <<'END'
[Service]
ExecStart=/opt/lab/bin/counter /srv/sim {STEP_MS}
StandardOutput=null
StandardError=null
[Install]
WantedBy=multi-user.target
END
systemctl daemon-reload
# Numbers that no process of the boot will have: a restored tree has the pids that it had.
echo 20000 >/proc/sys/kernel/ns_last_pid
systemctl -q enable --now sim.service
systemd-run -q --scope --unit=job setsid -f sh -c 'echo $$ >/srv/job.pid; exec /opt/lab/bin/counter /srv/job {STEP_MS} </dev/null >/dev/null 2>&1'
"""
BARE = f"""
set -e
for runtime in runc crun; do
    bundle=/srv/bare-$runtime
    mkdir -p $bundle/rootfs/bin $bundle/rootfs/data $bundle/rootfs/proc $bundle/rootfs/dev $bundle/rootfs/sys
    cp /opt/lab/bin/counter $bundle/rootfs/bin/
    cd $bundle
    rm -f config.json
    $runtime spec
    python3 - <<'END'
import json
spec = json.load(open("config.json"))
spec["process"].update(terminal=False, args=["/bin/counter", "{TICKS}", "{STEP_MS}"])
spec["root"]["readonly"] = False
json.dump(spec, open("config.json", "w"))
END
    $runtime run --detach bare-$runtime </dev/null >/dev/null 2>&1
done
"""
# A pod of two that talk over its loopback, and one alone. Any program does for the infra container: podman's own is not here.
QUADLET = f"""
set -e
mkdir -p /etc/containers/systemd /etc/containers/containers.conf.d
printf '[engine]\nstop_timeout = 1\n' >/etc/containers/containers.conf.d/quick.conf
cd /etc/containers/systemd
printf '[Pod]\nPodName=shop\nPodmanArgs=--infra-image localhost/busybox --infra-command "echoserver 9999"\n' >shop.pod
container() {{
    printf '[Unit]\nAfter=%s\n[Container]\nImage=localhost/busybox\nContainerName=%s\nExec=%s\n%s\n[Service]\nRestart=always\n' "$2" $1 "$3" $4
    printf '[Install]\nWantedBy=multi-user.target\n'
}}
container server shop-pod.service "echoserver 7000" Pod=shop.pod >server.container
container client server.service "echoclient 127.0.0.1 7000 {TICKS}" Pod=shop.pod >client.container
container alone network.target "counter {TICKS} {STEP_MS}" Network=none >alone.container
systemctl daemon-reload
systemctl start server.service client.service alone.service
"""
SILENT = ("server", "shop-infra")
"""Containers that do not count."""
CLEAN = """
rm -rf /etc/containers/systemd/*.pod /etc/containers/systemd/*.container /etc/containers/containers.conf.d/quick.conf
systemctl -q stop shop-pod.service server.service client.service alone.service
podman pod rm -f -a -t 0
systemctl -q disable --now sim.service
systemctl -q stop job.scope 'ckpt-*.scope' 'ckpt-arm@*.timer'
pkill -KILL -x counter
podman rm -f -a -t 0
for runtime in runc crun; do $runtime delete -f bare-$runtime; done
ckpt install-units --uninstall
rm -rf /srv/* /etc/ckpt /etc/tmpfiles.d/spoil.conf /var/lib/ckpt /etc/systemd/system/sim.service
systemctl daemon-reload
systemctl reset-failed
true
"""


@dataclass
class Farm:
    """What runs in the machine, and where it stood when last looked at."""

    vm: Vm
    trees: tuple[str, ...] = ()
    before: dict[str, dict[str, Any]] = field(default_factory=dict)

    def podman(self, *runs: tuple[str, str, str]) -> None:
        """Start containers (name, runtime, the rest of the command line), two at a time."""
        lines = [f"podman --runtime {runtime} run -d --name {name} {rest}" for name, runtime, rest in runs]
        self.vm.run("printf '%s\\n' " + shlex.join(lines) + " | xargs -d '\\n' -P 2 -I{} sh -c '{} >/dev/null'", timeout_s=300)

    def now(self) -> dict[str, dict[str, Any]]:
        """All counters."""
        trees = [f"{name}=/srv/{name}" for name in self.trees]
        said = self.vm.run(f"cd /ckpt && python3 -m tests.vm.inside.counters {shlex.join(trees)}")
        return dict(json.loads(said.splitlines()[-1]))

    def remember(self, limit_s: float = 120.0) -> dict[str, dict[str, Any]]:
        """Wait until all that count do, and keep where they stand."""
        end = time.monotonic() + limit_s
        while any(one["last"] < 5 for name, one in self.before.items() if name not in SILENT) or not self.before:
            assert time.monotonic() < end, self.before
            self.before = self.now()
        return self.before

    def counted_on(self, names: set[str], limit_s: float = 120.0) -> None:
        """All of `names` run, never began anew, lost no tick, and are beyond where they stood when last looked at."""
        end = time.monotonic() + limit_s
        while True:
            seen = self.now()
            behind = [name for name in names if seen.get(name, {}).get("last", -1) <= self.before[name]["last"]]
            if not behind or time.monotonic() > end:
                break
        wrong = {name: seen.get(name) for name in names if name in behind or not (seen[name]["whole"] and seen[name]["starts"] == 1)}
        assert not wrong, (wrong, {name: self.before[name] for name in wrong})
        assert all(seen[name]["state"] == "running" for name in names), seen

    def journal(self) -> dict[str, dict[str, Any]]:
        """The newest hibernation as `ckpt hibernate status` has it, by name of the workload."""
        said = self.vm.run(["ckpt", "hibernate", "status", "--format", "json"], check=False)  # its exit status tells of the worst one
        rows = json.loads(said[: said.rindex("\n}") + 2])["results"]
        return {row["tree"] or row["name"].partition(":")[2]: row for row in rows}


@pytest.fixture
def farm(vm: Vm) -> Iterator[Farm]:
    vm.run(["sh", "-c", CLEAN])
    yield Farm(vm)
    vm.run(["sh", "-c", CLEAN], timeout_s=200)


def counter(*options: str) -> str:
    return shlex.join([*options, "localhost/busybox", "counter", TICKS, str(STEP_MS)])


def nothing_left(vm: Vm) -> None:
    """What a resume must not leave behind, whatever it met."""
    left = vm.run(
        "ls -d /var/lib/ckpt/tmp/* /var/tmp/ckpt-* /etc/systemd/system/*.d/90-ckpt.conf 2>/dev/null; nft list tables | grep -E 'CRIU|ckpt'; "
        "pgrep -a criu; grep -l 1 $(find /sys/fs/cgroup -name cgroup.freeze) /dev/null",
        check=False,
    )
    assert left == "", left


def test_a_reboot(farm: Farm) -> None:
    """Ten containers and two process trees; beside them one that cannot be dumped, and one whose restore fails."""
    vm = farm.vm
    vm.run(["sh", "-c", TREES])
    vm.run("cat >/etc/ckpt/hibernate.toml", input=CONFIG.encode())
    farm.trees = ("sim", "job")
    none = "--network=none"
    # A file that it has open is another one after the boot: it cannot be restored.
    vm.run("mkdir /srv/spoil && echo original text >/srv/spoil/file && echo 'f+ /srv/spoil/file 0644 root root - other' >/etc/tmpfiles.d/spoil.conf")
    spoiled = f"-v /srv/spoil:/spoil {none} localhost/busybox sh -c 'exec 3</spoil/file; exec counter {TICKS} {STEP_MS}'"
    farm.podman(
        ("server", "crun", "localhost/busybox echoserver 7000"),
        *((name, runtime, counter(none)) for name, runtime in (("c1", "crun"), ("c2", "runc"), ("c3", "crun"), ("c4", "runc"), ("c5", "crun"))),
        ("web", "runc", counter("-p", "127.0.0.1:8080:80")),
        ("device", "crun", f"--device /dev/fuse {none} localhost/busybox sh -c 'exec 3<>/dev/fuse; exec counter {TICKS} {STEP_MS}'"),
        ("spoiled", "crun", spoiled),
    )
    address = vm.run(["podman", "inspect", "--format", "{{.NetworkSettings.IPAddress}}", "server"]).strip()
    farm.podman(("client", "runc", f"localhost/busybox echoclient {address} 7000 {TICKS}"))
    vm.run(["sh", "-c", BARE])
    vm.run(["ckpt", "install-units", "--enable"], timeout_s=300)
    farm.remember()

    vm.reboot("ckpt reboot --best-effort", timeout_s=500)
    assert vm.wait_for_units(600) in ("running", "degraded")

    back = {"c1", "c2", "c3", "c4", "c5", "web", "client", "bare-runc", "bare-crun", "sim", "job"}
    farm.counted_on(back)
    seen = farm.now()
    assert seen["server"]["state"] == "running"
    assert seen["spoiled"]["state"] == seen["device"]["state"] == "running", seen
    assert seen["sim"]["pid"] == farm.before["sim"]["pid"] and "ckpt-resume" not in seen["sim"]["cgroup"] + seen["job"]["cgroup"], seen
    journal = farm.journal()
    expected = dict.fromkeys((*back, "server"), "restored") | dict.fromkeys(("spoiled", "device"), "cold")
    assert {name: row["state"] for name, row in journal.items()} == expected, journal
    nothing_left(vm)
    again = vm.run(["ckpt", "hibernate", "resume"])
    assert {name: row["pid"] for name, row in seen.items() if "pid" in row} == {n: r["pid"] for n, r in farm.now().items() if "pid" in r}, again


def test_a_bare_reboot(farm: Farm) -> None:
    """The units alone: what runs is saved while the machine goes down. Quadlet's units would start theirs cold, and make another pod."""
    vm = farm.vm
    vm.run(["sh", "-c", TREES])
    vm.run("cat >/etc/ckpt/hibernate.toml", input=CONFIG.encode())
    farm.trees = ("sim", "job")
    farm.podman(("web", "crun", counter()), ("db", "runc", counter("--network=none")))
    vm.run(["sh", "-c", BARE])
    vm.run(["sh", "-c", QUADLET])
    pod = vm.run("podman pod inspect --format '{{.ID}}' shop")
    vm.run(["ckpt", "install-units", "--enable"], timeout_s=300)
    verified = vm.run("systemd-analyze verify --man=no /etc/systemd/system/ckpt-*.service", timeout_s=60)
    assert verified == "", verified
    farm.remember()
    vm.reboot(timeout_s=300)
    assert vm.wait_for_units(600) == "running"
    farm.counted_on({"web", "db", "bare-runc", "bare-crun", "sim", "job", "client", "alone"})
    journal = farm.journal()
    assert {row["state"] for row in journal.values()} == {"restored"} and len(journal) == 9, journal
    assert vm.run("podman pod inspect --format '{{.ID}}' shop") != pod
    assert vm.run("systemctl is-active shop-pod server client alone", check=False).split() == ["active", *["inactive"] * 3]
    cgroups = vm.run("podman inspect --format '{{.State.CgroupPath}}' server client alone").split()
    assert all(path.startswith("/machine.slice/") for path in cgroups), cgroups
    # They are in their units' cgroups no more: at the next boot these would start them cold.
    plan = vm.run(["ckpt", "reboot", "--dry-run"])
    assert all(f"{name}.service" in plan for name in ("server", "client", "alone")), plan
    nothing_left(vm)


def test_power_is_cut_during_the_save(farm: Farm) -> None:
    """One that is armed comes back from its last checkpoint, the other begins anew, and the journal says so."""
    vm = farm.vm
    vm.run("mkdir -p /etc/ckpt && cat >/etc/ckpt/hibernate.toml", input=LIMITS.encode())
    farm.podman(("web", "crun", counter()), ("plain", "runc", counter("--network=none")))
    vm.run(["ckpt", "install-units", "--enable"], timeout_s=300)
    farm.remember()
    vm.run(["ckpt", "arm", "web", "--every", "1h"], timeout_s=120)
    newest = "while ! ckpt list --format json web | grep -q '\"armed\"'; do sleep 1; done"
    vm.run(newest, timeout_s=200)
    farm.before["web"]["last"] = 0  # it comes back as it was when that was made
    gate = "CKPT_FAULT=hibernate-saving:gate=/run/gate"
    vm.run(f"{gate} nohup ckpt hibernate save >/root/said 2>&1 </dev/null & while ! [ -e /run/gate.reached ]; do sleep 0.1; done", timeout_s=200)
    vm.power_cut()
    vm.power_on()
    assert vm.wait_for_units(600) in ("running", "degraded")
    journal = farm.journal()
    assert (journal["web"]["state"], journal["plain"]["state"]) == ("restored", "cold"), journal
    farm.counted_on({"web"})
    seen = farm.now()
    assert seen["plain"]["state"] == "running" and seen["plain"]["last"] >= 0, seen
    nothing_left(vm)
