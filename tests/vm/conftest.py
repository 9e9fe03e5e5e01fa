"""One virtual machine for all its tests. A missing prerequisite skips them, except in CI (environment variable CI), where it fails them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.harness import LabUnavailable, workloads
from tests.vm.harness import Vm, prepare

TOP = Path(__file__).resolve().parents[2]
LAUNCHER = b"#!/usr/bin/python3\nimport sys\nsys.path.insert(0, '/ckpt')\nfrom ckpt.cli.main import main\nsys.exit(main())\n"
SETUP = """
set -e
cat >/usr/local/bin/ckpt
chmod +x /usr/local/bin/ckpt
ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519
cat /root/.ssh/id_ed25519.pub >>/root/.ssh/authorized_keys
printf 'Host *\n StrictHostKeyChecking no\n LogLevel ERROR\n' >/root/.ssh/config
echo '127.0.0.1 there' >>/etc/hosts
podman load -q -i /opt/lab/busybox.tar
real=$(command -v criu)
mkdir -p /usr/local/lib/criu
mv "$real" /usr/local/lib/criu/criu
printf '#!/bin/sh\nCRIU_FAULT=130 exec /usr/local/lib/criu/criu "$@"\n' >"$real"
chmod +x "$real"
sync
"""
"""CRIU_FAULT=130 is FI_NO_BREAKPOINTS (criu/include/fault-injection.h): it steps by system calls instead. With hardware breakpoints of ptrace(2)
the guest's kernel panics now and then under QEMU's emulation (finish_task_switch, with DR0 set): twice in some thirty boots."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.vm)


@pytest.fixture(scope="module")
def vm() -> Iterator[Vm]:
    """The machine, with the checkout in /ckpt, `ckpt` on its path, root able to ssh to itself as `there`, and the workloads' container image."""
    try:
        layer = workloads.layer()
        prepare()
    except LabUnavailable as error:
        if os.environ.get("CI"):
            pytest.fail(f"the virtual machine is not available: {error}")
        pytest.skip(f"the virtual machine is not available: {error}")
    with Vm() as machine:
        machine.send(TOP, ["ckpt", "tests", "pyproject.toml"], "/ckpt")
        machine.send(layer, ["opt"], "/")
        machine.run(["sh", "-c", SETUP], input=LAUNCHER)
        yield machine
