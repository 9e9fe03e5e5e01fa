"""A virtual machine under emulation, for what namespaces on this machine's kernel cannot show: another kernel, a real init, a real boot.

with Vm() as vm:
    vm.run(["podman", "info"])
"""

from __future__ import annotations

from .machine import Vm, VmError, prepare

__all__ = ["Vm", "VmError", "prepare"]
