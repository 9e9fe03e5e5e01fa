"""`python -m tests.vm.harness prepare` makes what the virtual machine is made of; `… shell` boots one and gives a shell in it."""

from __future__ import annotations

import subprocess
import sys
import time

from tests.lab.harness.cache import LabUnavailable

from .image import image_ready
from .machine import Vm, install_missing, prepare


def _prepare() -> int:
    """0 also when there can be no machine here: its tests say so themselves (and fail in CI)."""
    try:
        started = time.monotonic()
        install_missing()
        if not image_ready():
            print("building the virtual machine's disk, once (about a minute)", file=sys.stderr)
        prepare()
        if time.monotonic() - started > 5:
            print(f"done in {time.monotonic() - started:.0f} s", file=sys.stderr)
    except LabUnavailable as error:
        print(f"no virtual machine: {error}", file=sys.stderr)
    return 0


def _shell() -> int:
    print("booting (about a minute)", file=sys.stderr)
    with Vm() as vm:
        return subprocess.run([*vm.ssh("")[:-1], "-t"]).returncode


def main(argv: list[str]) -> int:
    match argv:
        case ["prepare"]:
            return _prepare()
        case ["shell"]:
            return _shell()
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
