"""The lab: two (or more) hosts on one machine, as namespaces over a cached Debian root, linked by a switch that can be cut or slowed.

    with Lab(source=Path(".")) as lab:
        lab.a.run(["ckpt", "list"])
"""

from __future__ import annotations

from .cache import LabUnavailable
from .host import CommandError, Host, HostProcess, HostResult
from .lab import Lab
from .ticks import Ticks, read_ticks

__all__ = ["CommandError", "Host", "HostProcess", "HostResult", "Lab", "LabUnavailable", "Ticks", "read_ticks"]
