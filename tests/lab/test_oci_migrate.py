"""A container of runc or crun used directly on the move, with its bundle."""

from __future__ import annotations

import json

import pytest

from tests.lab.counting import assert_clean, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host


def start(host: Host, runtime: str) -> None:
    host.run(["sh", "-c", "mkdir -p /srv/web/rootfs/bin /srv/web/rootfs/proc /srv/web/rootfs/dev /srv/web/rootfs/sys /srv/web/rootfs/data"])
    host.run(["cp", "/opt/lab/bin/counter", "/srv/web/rootfs/bin/"])
    host.run([runtime, "spec"], cwd="/srv/web")
    spec = json.loads(host.read_file("/srv/web/config.json"))
    spec["process"].update(terminal=False, args=["/bin/counter", "/data/ticks"])
    spec["root"]["readonly"] = False
    spec["linux"].pop("resources", None)
    host.write_file("/srv/web/config.json", json.dumps(spec))
    host.run(["sh", "-c", f"exec {runtime} run --detach --bundle /srv/web web </dev/null >/dev/null 2>&1"])
    wait_until(lambda: len(ticks(host, runtime)) > 5, "it counts")


def ticks(host: Host, runtime: str) -> list[int]:
    """The tick file of the container's root, wherever its bundle is on that host."""
    state = host.run([runtime, "state", "web"], check=False)
    if state.returncode:
        return []
    text = host.run(["cat", json.loads(state.stdout)["bundle"] + "/rootfs/data/ticks"], check=False).stdout
    return [int(line.split()[0]) for line in text.split("\n")[:-1] if line]


@pytest.mark.parametrize("runtime", ["runc", "crun"])
def test_migrate_there_and_back(lab: Lab, runtime: str) -> None:
    start(lab.a, runtime)
    for source, destination in ((lab.a, lab.b), (lab.b, lab.a)):
        at = ticks(source, runtime)[-1]
        source.run(["ckpt", "migrate", f"{runtime}:web", f"root@{destination.name}"])
        assert not ticks(source, runtime)
        wait_until(lambda destination=destination, at=at: (ticks(destination, runtime) or [0])[-1] > at, "it counts there")  # type: ignore[misc]
        found = ticks(destination, runtime)
        assert found == list(range(found[0], found[0] + len(found)))
    assert_clean(lab.a, lab.b)
