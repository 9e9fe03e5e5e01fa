"""What a person has in hand while a migration runs: its rate, its compression, its progress, and Ctrl-C."""

from __future__ import annotations

import json
import signal
import time
from typing import Any

import pytest

from tests.lab.counting import assert_clean, assert_never_back, last_tick, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host

MIB = 64
SAID = "/tmp/said"


def start_hog(host: Host, mib: int = MIB, dirty_mb_s: int = 1) -> int:
    host.run(["podman", "run", "-d", "--name", "web", host.load_image(), "memhog", str(mib), str(dirty_mb_s), "/data/ticks"])
    wait_until(lambda: last_tick(host) > 10, "it counts")
    return last_tick(host)


def goes_on(host: Host, since: int, mib: int = MIB) -> None:
    """memhog checks its memory, all of it within MIB / 5 ticks, and ends when a page is not as it wrote it."""
    wait_until(lambda: last_tick(host) > since + mib, "it counts on with its memory whole")
    assert_never_back(host, at_least=since)


@pytest.mark.parametrize("flags", [["--precopy"], []], ids=["round", "frozen"])
def test_ctrl_c_while_memory_goes_over(lab: Lab, flags: list[str]) -> None:
    at = start_hog(lab.a)
    words = ["ckpt", "migrate", *flags, "--bwlimit", "4M", "--compress", "none", "web", "root@b"]
    moving = lab.a.popen(["sh", "-c", f"exec {' '.join(words)} 2>{SAID}"])
    step = "precopy" if flags else "pages"

    def told() -> list[str]:
        lines = lab.a.run(["cat", SAID], check=False).stdout.splitlines()
        return [line for line in lines if line.startswith(f"web: {step}: ") and "iB/s" in line]

    wait_until(lambda: len(told()) >= 2, "its rate is told")
    asked_s = time.monotonic()
    moving.send_signal(signal.SIGINT)
    moving.communicate(timeout=30)
    assert moving.returncode == 130
    assert time.monotonic() - asked_s < 8, "it does not wait for what is queued"
    said = lab.a.run(["cat", SAID]).stdout
    assert "web: stopped; web is running here, nothing is left on root@b" in said
    lines = told()
    assert " of " in lines[-1] and " left" in lines[-1] and ("round 1" in lines[-1]) == bool(flags), lines
    goes_on(lab.a, at)
    assert state(lab.b) == ""
    assert_clean(lab.a, lab.b)


def migrate(lab: Lab, *flags: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The statistics and all events."""
    done = lab.a.run(["ckpt", "migrate", *flags, "web", "root@b", "--format", "jsonl"], timeout_s=120)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows[-1]["event"] == "result"
    return rows[-1]["stats"], rows


def test_compression_is_found_to_pay_on_a_slow_link(lab: Lab) -> None:
    mib = 160
    at = start_hog(lab.a, mib)
    lab.limit_rate(200)
    before = lab.received_bytes("b")
    stats, rows = migrate(lab, "--precopy")
    carried = lab.received_bytes("b") - before
    lab.limit_rate(None)
    goes_on(lab.b, at, mib)
    assert stats["compress"].startswith("auto: zstd:1"), stats
    # Half of the memory is incompressible; what went before the decision and the frames of ssh are on top.
    assert stats["precopy_wire_bytes"] < 0.8 * stats["precopy_raw_bytes"], stats
    assert carried < 0.85 * stats["precopy_raw_bytes"], (carried, stats)
    moved = [row for row in rows if row["event"] == "bytes_moved" and row["step"] == "precopy"]
    assert moved[0]["round"] == 1 and any(row["round"] == 2 for row in moved)
    assert any(row["rate_bytes_s"] and row["left_s"] for row in moved)
    assert_clean(lab.a, lab.b)


def test_the_limit_of_the_rate(lab: Lab) -> None:
    """20 MiB/s on a fast link, everything included; `none` compresses nothing."""
    at = start_hog(lab.a)
    before, began_s = lab.received_bytes("b"), time.monotonic()
    stats, _ = migrate(lab, "--bwlimit", "20M", "--compress", "none")
    rate = (lab.received_bytes("b") - before) / (time.monotonic() - began_s)
    goes_on(lab.b, at)
    assert stats["compress"] == "none" and stats["compress_ratio"] >= 1
    assert stats["pages_raw_bytes"] >= MIB << 20
    assert stats["total_s"] > stats["sent_bytes"] / (20 << 20)
    assert rate < 20 << 20
    assert_clean(lab.a, lab.b)


@pytest.mark.parametrize("flags", [["--streams", "3"], ["--direct", "--streams", "2"]], ids=["ssh", "direct"])
def test_further_connections(lab: Lab, flags: list[str]) -> None:
    """Memory takes them, before and in the pause; nothing of them is left."""
    at = start_hog(lab.a)
    stats, _ = migrate(lab, "--precopy", *flags, "--compress", "none")
    goes_on(lab.b, at)
    assert stats["streams"] == int(flags[-1])
    assert stats["carrier"] == ("tls" if "--direct" in flags else "ssh")
    assert stats["sent_bytes"] > MIB << 20
    assert_clean(lab.a, lab.b)
    left = "ls -d /tmp/ckpt-streams-* 2>/dev/null; pgrep -a -f '[c]kpt peer'"
    assert not lab.b.run(["sh", "-c", left], check=False).stdout


def test_direct_through_a_firewall(lab: Lab) -> None:
    at = start_hog(lab.a)
    wall = "add table inet wall; add chain inet wall in { type filter hook input priority 0; }; "
    lab.b.run(["nft", wall + "add rule inet wall in tcp dport 49152-49215 reject"])
    refused = lab.a.run(["ckpt", "migrate", "--direct", "web", "root@b"], check=False)
    assert refused.returncode == 40, refused
    assert "directly" in refused.stderr and "web is running, untouched" in refused.stderr and "49152 to 49215" in refused.stderr
    goes_on(lab.a, at)
    assert_clean(lab.a, lab.b)
