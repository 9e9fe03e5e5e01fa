"""`make bench`: a container with memory moved between two hosts by podman alone (checkpoint -e, scp, restore -i) and by ckpt.

Downtime is read from the workload's own ticks; bytes are counted by the switch. Every way gets fresh hosts, and a result only counts when
the workload's memory was whole and its count unbroken afterwards.
"""

from __future__ import annotations

import argparse
import json
import mmap
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from tests.lab.harness import CommandError, Lab, LabUnavailable, Ticks, read_ticks
from tests.lab.harness.wheel import WheelError, build_wheel

TOP = Path(__file__).resolve().parents[2]
TICKS = "/data/ticks"
LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class Measured:
    way: str
    memory_mib: int
    dirty_mb_s: int
    runtime: str
    total_s: float
    downtime_s: float
    sent_bytes: int


def by_podman(lab: Lab) -> None:
    lab.a.run(["podman", "container", "checkpoint", "-e", "/root/hog.tar.zst", "hog"], timeout_s=LIMIT_S)
    lab.a.run(["scp", "-q", "/root/hog.tar.zst", "b:/root/"], timeout_s=LIMIT_S)
    lab.b.run(["podman", "container", "restore", "-i", "/root/hog.tar.zst"], timeout_s=LIMIT_S)


def by_ckpt(lab: Lab) -> None:
    lab.a.run(["ckpt", "migrate", "hog", "root@b"], timeout_s=LIMIT_S)


def by_precopy(lab: Lab) -> None:
    lab.a.run(["ckpt", "migrate", "--precopy", "hog", "root@b"], timeout_s=LIMIT_S)


WAYS: dict[str, Callable[[Lab], None]] = {"podman": by_podman, "ckpt": by_ckpt, "precopy": by_precopy}


def warm_up(size_mib: int) -> None:
    """Touch memory once: its first touch is slow in a freshly booted virtual machine, and who comes first would pay for all."""
    available = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    with mmap.mmap(-1, min(size_mib << 20, available << 9)) as memory:
        piece = b"x" * (1 << 20)
        for at in range(0, len(memory) - len(piece), len(piece)):
            memory[at : at + len(piece)] = piece


def table(results: list[Measured]) -> Iterator[str]:
    """Medians of every way and size, and their ratio to podman's way."""
    yield f"{'way':9}{'memory':>10}{'runs':>6}{'total':>10}{'downtime':>11}{'ratio':>8}{'sent':>13}{'ratio':>8}"
    for memory_mib in sorted({one.memory_mib for one in results}):
        mine = [one for one in results if one.memory_mib == memory_mib]
        base = [one for one in mine if one.way == "podman"]
        for way in dict.fromkeys(one.way for one in mine):
            runs = [one for one in mine if one.way == way]
            total_s, down_s, sent = (median(getattr(one, key) for one in runs) for key in ("total_s", "downtime_s", "sent_bytes"))
            ratios = [f"{down_s / median(one.downtime_s for one in base):.3f}", f"{sent / (memory_mib << 20):.2f}"] if base else ["", ""]
            yield (f"{way:9}{memory_mib:6} MiB{len(runs):6}{total_s:8.2f} s{down_s:9.2f} s{ratios[0]:>8}{sent / (1 << 20):9.1f} MiB{ratios[1]:>8}")


def wait_ticks(lab: Lab, host: str, count: int) -> Ticks:
    """Wait for `count` ticks more than there are now."""
    deadline = time.monotonic() + LIMIT_S
    goal: int | None = None
    while time.monotonic() < deadline:
        if lab.hosts[host].run(["podman", "exec", "hog", "test", "-e", TICKS], check=False).returncode == 0:
            ticks = read_ticks(lab.hosts[host], TICKS, "hog")
            goal = ticks.last + count if goal is None else goal
            if ticks.last >= goal:
                return ticks
        time.sleep(0.1)
    raise RuntimeError(f"hog does not count on {host}")


def measure(way: str, wheel: Path, memory_mib: int, dirty_mb_s: int, runtime: str) -> Measured:
    """Move one container once."""
    room = memory_mib * 3 + 1024
    with Lab(wheel=wheel, runtime="runc" if runtime == "runc" else "crun", containers_mib=room, store_mib=room, root_mib=room) as lab:
        lab.a.load_image()
        image = lab.b.load_image()  # podman's way needs it there
        lab.a.run(["podman", "run", "-d", "--name", "hog", image, "memhog", str(memory_mib), str(dirty_mb_s), TICKS])
        before = wait_ticks(lab, "a", 50).last
        sent, started = lab.received_bytes("b"), time.monotonic()
        WAYS[way](lab)
        total_s = time.monotonic() - started
        sent = lab.received_bytes("b") - sent
        # memhog checks at most 5 MiB of its memory a tick: wait until it has checked all of it on the destination.
        ticks = wait_ticks(lab, "b", max(100, memory_mib // 5 + 1))
        if ticks.breaks:
            raise RuntimeError(f"{way}: the count is broken: {ticks.breaks[:3]}")
        return Measured(way, memory_mib, dirty_mb_s, runtime, round(total_s, 2), round(ticks.after(before).longest_gap_s, 2), sent)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.migrate", description=__doc__)
    parser.add_argument("--memory-mib", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--dirty-mb-s", type=int, default=10)
    parser.add_argument("--runtime", choices=("crun", "runc"), default="crun")
    parser.add_argument("--ways", choices=sorted(WAYS), nargs="+", default=list(WAYS))
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--json", type=Path, help="append each result to this file as a line of JSON")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as directory:
            wheel = build_wheel(TOP, Path(directory))
            warm_up(max(options.memory_mib) * 6)
            results: list[Measured] = []
            print(f"{'way':9}{'memory':>10}{'total':>10}{'downtime':>11}{'sent':>12}", flush=True)
            for memory_mib in options.memory_mib:
                for way in options.ways * options.repeat:
                    one = measure(way, wheel, memory_mib, options.dirty_mb_s, options.runtime)
                    results.append(one)
                    sent = f"{one.sent_bytes / (1 << 20):.1f} MiB"
                    print(f"{way:9}{memory_mib:6} MiB{one.total_s:8.2f} s{one.downtime_s:9.2f} s{sent:>12}", flush=True)
                    if options.json:
                        with options.json.open("a") as out:
                            out.write(json.dumps(asdict(one)) + "\n")
            print("\nmedians; downtime as a ratio to podman's, sent as a ratio to the memory")
            print("\n".join(table(results)))
    except (CommandError, LabUnavailable, RuntimeError, WheelError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
