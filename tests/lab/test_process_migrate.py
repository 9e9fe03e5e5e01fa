"""A process tree on the move: its count goes on, and the file that it writes travels with it."""

from __future__ import annotations

from tests.lab.counting import assert_clean, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host

TICKS = "/srv/ticks"


def ticks(host: Host) -> list[int]:
    text = host.run(["cat", TICKS], check=False).stdout
    return [int(line.split()[0]) for line in text.split("\n")[:-1] if line]


def start(host: Host) -> str:
    host.run(["mkdir", "-p", "/srv"])
    # A high pid: it must be free on the other host too.
    script = f"echo 20000 > /proc/sys/kernel/ns_last_pid; setsid /opt/lab/bin/counter {TICKS} < /dev/null > /dev/null 2>&1 & echo $!"
    pid = host.run(["sh", "-c", script]).stdout.strip()
    wait_until(lambda: len(ticks(host)) > 10, "it counts")
    return pid


def whole(host: Host) -> list[int]:
    found = ticks(host)
    assert found == list(range(found[0], found[0] + len(found))), "the counter jumped"
    return found


def test_migrate_there_and_back(lab: Lab) -> None:
    pid = start(lab.a)
    for source, destination in ((lab.a, lab.b), (lab.b, lab.a)):
        at = ticks(source)[-1]
        source.run(["ckpt", "migrate", f"pid:{pid}", f"root@{destination.name}"])
        assert not source.exists(f"/proc/{pid}")
        wait_until(lambda destination=destination, at=at: ticks(destination)[-1] > at, "it counts there")  # type: ignore[misc]
        assert whole(destination)[0] == 1 or whole(destination)[0] == 0
    assert_clean(lab.a, lab.b)


def test_export_and_import_on_the_other_host(lab: Lab) -> None:
    pid = start(lab.a)
    lab.a.run(["ckpt", "checkpoint", f"pid:{pid}"])
    lab.a.run(["sh", "-c", f"ckpt export counter-{pid} -o - | ssh b ckpt import -"])
    at = ticks(lab.a)[-1]
    # A process tree is in no container: from elsewhere it is let in by name only.
    refused = lab.b.run(["ckpt", "restore", f"counter-{pid}"], check=False)
    assert refused.returncode == 34 and "--allow process:host" in refused.stderr
    lab.b.run(["ckpt", "restore", "--allow", "process:host", f"counter-{pid}"])
    wait_until(lambda: ticks(lab.b)[-1] > at, "it counts there")
    whole(lab.b)


def test_what_was_there_is_kept(lab: Lab) -> None:
    """Another file of that name on the destination is moved aside, and comes back when the migration fails."""
    pid = start(lab.a)
    lab.b.write_file(TICKS, "somebody's\n")
    failed = lab.a.run(["ckpt", "migrate", f"pid:{pid}", "root@b"], env={"CKPT_FAULT": "migrate-commit:fail"}, check=False)
    assert failed.returncode == 50
    assert lab.b.read_file(TICKS) == b"somebody's\n"
    lab.a.run(["ckpt", "migrate", f"pid:{pid}", "root@b"])
    assert lab.b.run(["sh", "-c", f"cat {TICKS}.ckpt-before-*"]).stdout == "somebody's\n"
