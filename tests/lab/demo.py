"""`make demo`: two hosts, two containers; save, restore, export, import, migrate, live on the terminal, and proof that nothing was lost."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

from tests.lab.harness import Host, Lab, LabUnavailable, Ticks, read_ticks
from tests.lab.harness.wheel import WheelError, build_wheel

TOP = Path(__file__).resolve().parents[2]
TICKS = "/data/ticks"
COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ


class DemoFailed(Exception):
    """Something did not go as the demo promises."""


def title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if COLOUR else f"\n== {text}", flush=True)


def show(host: Host, line: str) -> None:
    """Run a command line as a user would type it, its output straight on this terminal."""
    prompt = f"root@{host.name}:~# "
    print((f"\033[32m{prompt}\033[0m" if COLOUR else prompt) + line, flush=True)
    process = host.popen(shlex.split(line), stdout=None, stderr=None)
    try:
        status = process.wait(300)
    finally:
        process.kill_session()
    if status:
        raise DemoFailed(f"{line} ended with status {status}")


def wait_ticks(host: Host, name: str, count: int) -> Ticks:
    """Wait until the container has written `count` more ticks than now."""
    deadline = time.monotonic() + 60
    goal: int | None = None
    while time.monotonic() < deadline:
        if host.run(["podman", "exec", name, "test", "-e", TICKS], check=False).returncode == 0:
            ticks = read_ticks(host, TICKS, name)
            goal = ticks.last + count if goal is None else goal
            if ticks.last >= goal:
                return ticks
        time.sleep(0.05)
    raise DemoFailed(f"{name} on {host.name} does not count")


def proof(host: Host, name: str, since: int, *, moved: bool) -> None:
    """Show that the count went on after `since` without a reset, and how long it paused."""
    ticks = wait_ticks(host, name, 120)  # in 120 ticks memhog has checked all of its memory
    if ticks.numbers[0] != 0 or ticks.breaks:
        raise DemoFailed(f"{name} lost its count: {ticks.breaks[:5]}")
    gap = ticks.after(since).longest_gap_s
    where = f"now on {host.name}, " if moved else ""
    print(f"   {name}: {where}count {since} -> {ticks.last} without a reset, a loss or a repeat; its longest pause was {gap * 1000:.0f} ms")


def demo(lab: Lab, memory_mib: int) -> None:
    a, b = lab.a, lab.b
    title("Two containers on host a: web counts a hundred times a second, db changes 10 MB of its memory a second and checks all of it")
    a.load_image()
    show(a, f"podman run -d --name web localhost/busybox counter {TICKS}")
    show(a, f"podman run -d --name db localhost/busybox memhog {memory_mib} 10 {TICKS}")
    for name in ("web", "db"):
        wait_ticks(a, name, 20)

    title("Save web to the store: it ends. Bring it back: it goes on")
    show(a, "ckpt check web")
    before = read_ticks(a, TICKS, "web").last
    show(a, "ckpt checkpoint web")
    show(a, "ckpt list")
    show(a, "ckpt restore web")
    proof(a, "web", before, moved=False)

    title("As one file, to the store of another host")
    show(a, "ckpt export web -o web.tar.zst")
    show(a, "scp -q web.tar.zst b:")
    show(b, "ckpt import web.tar.zst")
    show(b, "ckpt list")

    title("Move both to host b. The source is held until its copy stands ready: never two running, never none")
    for name in ("web", "db"):
        before = read_ticks(a, TICKS, name).last
        show(a, f"ckpt migrate {name} root@b")
        proof(b, name, before, moved=True)

    title("What runs where")
    for host in lab:
        show(host, "podman ps --format '{{.Names}}  {{.Status}}'")
    if a.run(["podman", "ps", "-q"]).stdout:
        raise DemoFailed("something still runs on a")
    title("Done: all counts went on.")


def main() -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--memory-mib", type=int, default=256, help="memory of db (default %(default)s)")
    parser.add_argument("--runtime", choices=("crun", "runc"), default="crun")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as directory:
            wheel = build_wheel(TOP, Path(directory))
            started = time.monotonic()
            with Lab(wheel=wheel, runtime=options.runtime) as lab:
                title(f"Hosts a (10.77.0.1) and b (10.77.0.2), up in {time.monotonic() - started:.1f} s, with ckpt installed and ssh between them")
                demo(lab, options.memory_mib)
    except (DemoFailed, LabUnavailable, WheelError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
