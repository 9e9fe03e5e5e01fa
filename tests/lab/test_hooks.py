"""Hooks inside of containers and on the hosts, and the labels that forbid: real podman, crun and runc."""

from __future__ import annotations

import pytest

from tests.lab.counting import assert_clean, assert_never_back, counts_on, last_tick, start_counter, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host

PHASES = ("pre-checkpoint", "post-checkpoint", "checkpoint-failed", "post-restore")
INSIDE = "sh -c 'echo {phase} >> /data/hooks; [ ! -e /data/{phase} ] || . /data/{phase}'"
"""What a hook does besides is in a file that the test may write."""
ON_HOST = '#!/bin/sh\necho "$1 $CKPT_NAME" >> /root/hooks\n[ "$1" != "$(cat /root/refuse 2>/dev/null)" ]\n'
LABELS = [f"--label=ckpt.hook.{phase}={INSIDE.format(phase=phase)}" for phase in PHASES] + ["--label=ckpt.hook.pre-checkpoint.timeout=5s"]
"""Long enough for a podman exec on a busy machine."""


def inside(host: Host, name: str = "web") -> list[str]:
    return host.run(["podman", "exec", name, "cat", "/data/hooks"]).stdout.split()


def then(host: Host, phase: str, script: str) -> None:
    """From now on the hook inside does this as well; and what was told is forgotten."""
    host.run(["podman", "exec", "web", "sh", "-c", f"rm -f /data/hooks; echo '{script}' > /data/{phase}"])


def on_host(host: Host) -> list[str]:
    return [line.split()[0] for line in host.read_file("/root/hooks").decode().splitlines()] if host.exists("/root/hooks") else []


def fails(host: Host, *argv: str, code: int, says: str) -> None:
    done = host.run(["ckpt", *argv], check=False)
    assert done.returncode == code and says in done.stderr, done


@pytest.mark.parametrize("lab_options", [{"runtime": "crun"}, {"runtime": "runc"}], ids=["crun", "runc"])
def test_hooks_around_checkpoint_restore_and_migration(lab: Lab, lab_options: dict[str, str]) -> None:
    a, b = lab.a, lab.b
    for host in (a, b):
        host.run(["mkdir", "-p", "/etc/ckpt/hooks.d"])
        host.write_file("/etc/ckpt/hooks.d/10-log", ON_HOST)
        host.run(["chmod", "755", "/etc/ckpt/hooks.d/10-log"])
    start_counter(a, "web", *LABELS)

    # What the hook wrote is in the checkpoint; in the running container its counterpart ran.
    a.run(["ckpt", "checkpoint", "-R", "web"])
    assert inside(a) == ["pre-checkpoint", "post-checkpoint"]
    assert on_host(a) == ["pre-checkpoint", "post-checkpoint"]
    a.run(["ckpt", "restore", "-n", "copy", "web"])
    assert inside(a, "copy") == ["pre-checkpoint", "post-restore"]
    a.run(["podman", "rm", "-f", "-t", "0", "copy"])

    # A hook that fails, and one that hangs with a child: the container runs on, nothing of them is left in it.
    then(a, "pre-checkpoint", "exit 7")
    fails(a, "checkpoint", "web", code=20, says="exit status 7")
    assert inside(a) == ["pre-checkpoint", "checkpoint-failed"]
    then(a, "pre-checkpoint", "setsid sleep 4321 & sleep 4321")
    fails(a, "checkpoint", "web", code=20, says="not over in 5 s")
    assert inside(a) == ["pre-checkpoint", "checkpoint-failed"]
    assert a.run(["pgrep", "-f", "sleep 4321"], check=False).stdout == ""
    assert state(a) == "running" and counts_on(a)

    # A child that outlives its hook for a moment is waited for: an exec session would be in the way of the dump.
    then(a, "pre-checkpoint", "sleep 0.3 &")
    at = last_tick(a)
    # Killed between the hook and the dump: the guard runs the counterpart.
    a.run(["ckpt", "checkpoint", "web"], env={"CKPT_FAULT": "hooked-pre-checkpoint:kill"}, check=False)
    wait_until(lambda: inside(a) == ["pre-checkpoint", "checkpoint-failed"], "the guard unfreezes it")
    assert_clean(a)

    if lab_options["runtime"] == "runc":
        return  # what follows is the same with both

    # To another host: before here, after there; the other host's own hooks have their say.
    then(a, "pre-checkpoint", "sleep 0.3 &")
    a.run(["rm", "/root/hooks"])
    b.write_file("/root/refuse", "pre-restore")
    fails(a, "migrate", "web", "root@b", code=50, says="10-log")
    assert on_host(a) == ["pre-migrate", "migrate-failed"]
    b.run(["rm", "-f", "/root/refuse", "/root/hooks"])
    a.run(["rm", "/root/hooks"])
    a.run(["ckpt", "migrate", "web", "root@b"])
    assert inside(b) == ["pre-checkpoint", "post-restore"]
    assert on_host(a) == ["pre-migrate", "pre-checkpoint", "post-checkpoint", "post-migrate"]
    assert on_host(b) == ["pre-restore", "post-restore"]
    assert counts_on(b)
    assert_never_back(b, at_least=at)
    assert_clean(a, b)

    # A label that forbids, read from podman; the others are the unit tests'.
    start_counter(a, "keep", "--label=ckpt.checkpoint=deny")
    fails(a, "migrate", "keep", "root@b", code=34, says="ckpt.checkpoint=deny")
    fails(a, "checkpoint", "-R", "keep", code=34, says="ckpt.checkpoint=deny")
    a.run(["ckpt", "checkpoint", "-R", "--override-label", "keep"])
    assert state(a, "keep") == "running"
