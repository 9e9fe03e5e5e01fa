"""`python -m tests.lab.harness prepare` builds what the lab is made of; `… shell` gives a shell on host a."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from pathlib import Path

from .cache import LabUnavailable
from .lab import Lab, install_missing, prepare
from .rootfs import rootfs_ready
from .wheel import WheelError, build_wheel

TOP = Path(__file__).resolve().parents[3]


def _prepare() -> int:
    """0 also when there can be no lab here: its tests say so themselves (and fail in CI)."""
    try:
        if os.geteuid() == 0 and not rootfs_ready():
            print("building the lab's root file system, once (about two minutes)", file=sys.stderr)
        started = time.monotonic()
        install_missing()
        prepare()
        if time.monotonic() - started > 5:
            print(f"done in {time.monotonic() - started:.0f} s", file=sys.stderr)
    except LabUnavailable as error:
        print(f"no lab: {error}", file=sys.stderr)
    return 0


def _shell() -> int:
    with tempfile.TemporaryDirectory() as directory, Lab(wheel=build_wheel(TOP, Path(directory))) as lab:
        lab.a.load_image()
        print("host a (10.77.0.1); host b is 10.77.0.2: ssh b. Container image: localhost/busybox, with counter, memhog, echoserver.")
        print("Try: podman run -d --name web localhost/busybox counter /data/ticks; ckpt migrate web root@b. Leave with exit.")
        lab.a.shell()
    return 0


def main(argv: list[str]) -> int:
    match argv:
        case ["prepare"]:
            return _prepare()
        case ["shell"]:
            try:
                return _shell()
            except (LabUnavailable, WheelError) as error:
                print(error, file=sys.stderr)
                return 1
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
