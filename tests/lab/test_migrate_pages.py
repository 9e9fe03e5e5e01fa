"""The memory of a migrating workload flows to the destination while it is dumped: it is never on the source's disk."""

from __future__ import annotations

import pytest

from tests.lab.counting import assert_clean, assert_never_back, last_tick, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host

MIB = 48
GATE = "/tmp/gate"
PAGES = "find / -xdev -name 'pages-*.img' -printf '%s\\n'; find /var/lib/ckpt /var/lib/containers /run /tmp -name 'pages-*.img' -printf '%s\\n'"


def page_bytes(host: Host) -> int:
    """Size of all CRIU images with memory pages on the host."""
    return sum(map(int, host.run(["sh", "-c", PAGES], check=False).stdout.split()))


def start_hog(host: Host, dirty_mb_s: int = 20) -> None:
    host.run(["podman", "run", "-d", "--name", "web", host.load_image(), "memhog", str(MIB), str(dirty_mb_s), "/data/ticks"])
    wait_until(lambda: last_tick(host) > 10, "it counts")


@pytest.mark.parametrize("lab_options", [{"runtime": "crun"}, {"runtime": "runc"}], ids=["crun", "runc"])
def test_no_page_is_written_on_the_source(lab: Lab) -> None:
    start_hog(lab.a)
    moving = lab.a.popen(["ckpt", "migrate", "web", "root@b"], env={"CKPT_FAULT": f"migrate-transfer:gate={GATE}"})
    wait_until(lambda: lab.a.exists(f"{GATE}.reached"), "the dump is held")
    assert page_bytes(lab.a) == 0
    assert page_bytes(lab.b) >= MIB << 20
    at = last_tick(lab.a)
    lab.a.write_file(GATE, "")
    moving.communicate(timeout=60)
    assert moving.returncode == 0
    # memhog checks its memory, all of it within MIB / 5 ticks, and ends when a page differs.
    wait_until(lambda: last_tick(lab.b) > at + MIB, "it counts on with its memory whole")
    assert_never_back(lab.b, at_least=at)
    assert_clean(lab.a, lab.b)


@pytest.mark.parametrize("where", ["source", "destination"])
def test_a_broken_stream_lets_the_source_go_on(lab: Lab, where: str) -> None:
    """No room for the pages over there; an error in the middle of the stream here."""
    start_hog(lab.a)
    at = last_tick(lab.a)
    if where == "destination":
        moving = lab.a.popen(["ckpt", "migrate", "web", "root@b"], env={"CKPT_FAULT": f"migrate-pages:gate={GATE}"})
        wait_until(lambda: lab.a.exists(f"{GATE}.reached"), "the pages come")
        lab.b.run(["sh", "-c", "dd if=/dev/zero of=/var/lib/ckpt/full bs=1M 2>/dev/null; true"])
        lab.a.write_file(GATE, "")
        _, said = moving.communicate(timeout=60)
        lab.b.run(["rm", "/var/lib/ckpt/full"])
        assert moving.returncode in (50, 60) and b"space" in said, said
    else:
        failed = lab.a.run(["ckpt", "migrate", "web", "root@b"], env={"CKPT_FAULT": "migrate-pages:fail"}, check=False)
        assert failed.returncode == 50 and "injected" in failed.stderr, failed
    wait_until(lambda: last_tick(lab.a) > at + MIB, "it goes on")
    assert state(lab.b) == ""
    assert_clean(lab.a, lab.b)
