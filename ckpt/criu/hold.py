"""Makes CRIU call our action-script (`action.py`), which holds a dump or a restore until the job's owner decides.

CRIU executes an action-script directly (no shell, no arguments), and takes its path only from a configuration file. Since
CRIU 3.19 such scripts also run in RPC mode, after the RPC notification of the same name.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Final

from ckpt.criu import action

MARKER_BYTES: Final = 1024
NOWHERE: Final = "nowhere"
"""Where the page server of a lazy dump listens: no address. CRIU would serve the memory itself after the verdict, to anybody who comes
(cr_lazy_mem_dump); this way that fails at once and CRIU lets go of the tree, which must be dead by then if it is to end (`engines._hold`)."""


def prepare(job_dir: Path, *, page_server_port: int | None = None, lazy: bool = False, memory_stays: bool = False, tcp_close: bool = False) -> Path:
    """Write the launcher and the CRIU configuration file into the job's directory, forget what an earlier hold left.

    Args:
        page_server_port: a dump sends its memory pages there (see `pageserver.py`).
        lazy: a restore leaves memory to the lazy-pages daemon (see `lazy.py`).
        memory_stays: a dump leaves private memory in the frozen tree (see `NOWHERE`).
        tcp_close: a restore closes established TCP connections (criu(8), --tcp-close).

    Returns:
        The configuration file (for `CRIU_CONFIG_FILE` or the RPC option `config_file`).
    """
    job_dir = job_dir.absolute()
    set_aside(job_dir, "held")
    launcher = job_dir / "hold"
    words = [sys.executable or "/usr/bin/python3", "-I", "-S", os.path.abspath(action.__file__), str(job_dir)]
    # CRIU calls it at every step, most of them while the workload stands still: Python starts only where there is something to hold.
    script = f'#!/bin/sh\ncase "$CRTOOLS_SCRIPT_ACTION" in\n{"|".join(action.HOLD)}) exec {shlex.join(words)} ;;\nesac\n'
    _write(launcher, script, 0o700)
    config = job_dir / "criu.conf"
    lines = [f'action-script "{launcher}"']
    if page_server_port is not None:
        from ckpt.criu.pageserver import config_lines

        lines += config_lines(page_server_port)
    if lazy or memory_stays:
        lines.append("lazy-pages")
    if memory_stays:
        lines.append(f"address {NOWHERE}")
    if tcp_close:
        lines.append("tcp-close")
    _write(config, "\n".join(lines) + "\n", 0o600)
    return config


def set_aside(job_dir: Path, *markers: str) -> None:
    """Forget what these marker files said, and allocate a block for each, so that it can be written on a full disk.

    A reader strips the white space that follows the marker's text.

    Raises:
        OSError: no space.
    """
    for name in markers:
        (job_dir / name).unlink(missing_ok=True)
        _write(job_dir / f"{name}.part", " " * MARKER_BYTES, 0o600)


def _write(path: Path, text: str, mode: int) -> None:
    path.unlink(missing_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    with os.fdopen(fd, "w") as out:
        out.write(text)
