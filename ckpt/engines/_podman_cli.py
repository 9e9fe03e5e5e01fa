"""podman's command line."""

from __future__ import annotations

import os
from typing import Final

from ckpt.errors import EngineUnavailable
from ckpt.host.run import Result, run, which

QUERY_TIMEOUT_S: Final = 60.0


def podman(*args: str | os.PathLike[str], check: bool = True, timeout_s: float = QUERY_TIMEOUT_S) -> Result:
    """Run a podman command. Raises EngineUnavailable when there is no podman, CommandFailed when it fails."""
    program = which("podman")
    if program is None:
        raise EngineUnavailable("podman is not installed", hint="apt install podman")
    return run([program, *args], check=check, timeout_s=timeout_s)
