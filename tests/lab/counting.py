"""What the lab's tests share: a counter in a container, and where it lives."""

from __future__ import annotations

import time
from collections.abc import Callable

from tests.lab.harness import Lab
from tests.lab.harness.host import Host

TICKS = "/data/ticks"


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 60.0) -> None:
    """Wait for a condition; an AssertionError names `what` when it does not come."""
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not within {limit_s:g} s: {what}"
        time.sleep(0.02)


def start_counter(host: Host, name: str = "web", *podman_options: str, before: str = "") -> None:
    """Run a counter in a podman container, with `before` run by its shell first, and wait for its first ticks."""
    image = host.load_image()
    host.run(["podman", "run", "-d", "--name", name, *podman_options, image, "sh", "-c", f"{before or ':'}; exec counter {TICKS}"])
    wait_until(lambda: last_tick(host, name) > 10, f"{name} counts")


def last_tick(host: Host, name: str = "web") -> int:
    """The newest tick, -1 when there is none (or no such container)."""
    found = host.run(["podman", "exec", name, "tail", "-n", "2", TICKS], check=False).stdout.split("\n")
    whole = [line for line in found[:-1] if line]
    return int(whole[-1].split()[0]) if whole else -1


def state(host: Host, name: str = "web") -> str:
    """podman's word for it, "" when there is none."""
    return host.run(["podman", "container", "inspect", "--format", "{{.State.Status}}", name], check=False).stdout.strip()


def counts_on(host: Host, name: str = "web", limit_s: float = 10.0) -> bool:
    """Whether the counter moves."""
    first = last_tick(host, name)
    end = time.monotonic() + limit_s
    while first >= 0 and time.monotonic() < end:
        if last_tick(host, name) > first:
            return True
    return False


def assert_never_back(host: Host, name: str = "web", at_least: int = 0) -> None:
    """Every tick follows the one before: never back, never again from the start."""
    text = host.run(["podman", "exec", name, "cat", TICKS]).stdout
    ticks = [int(line.split()[0]) for line in text.split("\n")[:-1] if line]
    assert ticks == list(range(ticks[0], ticks[0] + len(ticks))), "the counter jumped"
    assert ticks[-1] >= at_least


def the_live_one(lab: Lab, name: str = "web") -> Host:
    """The one host where the counter runs and counts; fails for none or two."""
    living = [host for host in lab if state(host, name) == "running" and counts_on(host, name, 3.0)]
    assert len(living) == 1, f"live on {[host.name for host in living]}; " + str({h.name: state(h, name) for h in lab})
    return living[0]


def leftovers(host: Host) -> list[str]:
    """What an operation must not leave behind."""
    found = host.run(
        [
            "sh",
            "-c",
            "ls -d /var/lib/ckpt/jobs/* /var/lib/ckpt/tmp/* /var/tmp/ckpt-* 2>/dev/null; nft list tables | grep -E 'CRIU|ckpt'; pgrep -a criu",
        ],
        check=False,
    )
    return found.stdout.split("\n")[:-1]


def assert_clean(*hosts: Host, limit_s: float = 60.0) -> None:
    """Nothing is left on the hosts; guards are given a moment."""
    for host in hosts:
        wait_until(lambda host=host: not leftovers(host), f"{host.name} is clean, but {leftovers(host)}", limit_s)  # type: ignore[misc]
