"""Keeps systemd from starting cold at the boot what `ckpt hibernate resume` brings back: drop-ins for the units that own the containers.

A pod that a unit makes anew each time it starts (Quadlet) ends with its containers: its unit must not start again before the boot, but at the
boot it must, and the containers come back into the new one.

A drop-in is written when its container is saved, `/etc/systemd/system/UNIT.d/90-ckpt.conf`: the unit waits for ckpt-resume.service, and is
skipped when that has left `/run/ckpt/resumed/UNIT`. Another one, in /run, until the boot: the unit does not start its container anew when that
was saved and ended (Restart=). What it says counts until the manager reads its files anew, so the drop-ins go when
the boot is over (ckpt-unguard.service), not at the end of the resume.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from ckpt.errors import CkptError
from ckpt.host import procread, systemd
from ckpt.model import Container
from ckpt.store import durable

UNITS: Final = Path("/etc/systemd/system")
TRANSIENT: Final = Path("/run/systemd/system")
RESUMED: Final = Path("/run/ckpt/resumed")
DROP_IN: Final = "90-ckpt.conf"
HOLD: Final = "91-ckpt.conf"
"""A name of its own: one of /etc would hide it."""
HEADER: Final = "# made by ckpt hibernate"
OVER: Final = "ckpt-unguard.service"
_SERVICE: Final = re.compile(r"[A-Za-z0-9:_.\\@-]{1,240}\.service")


def owned(container: Container) -> tuple[str, ...]:
    """The units of a running container that really own it: it, or the process above it (conmon), is in the unit's cgroup.

    Or that would make it anew in its place: what a resume has brought back is in no unit any more, and must not be lost at the boot after that.
    The names come from a label, which a container image can have as well: it must not say which units of the host are skipped.
    """
    if not container.pid or not systemd.running():
        return ()
    homes = {systemd.unit_of(container.pid), systemd.unit_of(_parent(container.pid))}
    named = [unit for unit in container.units if _SERVICE.fullmatch(unit)]
    return tuple(unit for unit in named if unit in homes or _makes(unit, container.name))


def _makes(unit: str, name: str) -> bool:
    """Whether a unit's command line starts or makes a container of this name."""
    try:
        words = systemd.control("show", "--property=ExecStart", "--value", "--", unit).split()
    except CkptError:
        return False
    following = words[words.index("--name") + 1 :][:1] if "--name" in words else []
    return bool(name) and (name in following or f"--name={name}" in words or ("start" in words and name in words[words.index("start") :]))


def guard_units(units: Iterable[str], pods: Iterable[str] = ()) -> tuple[str, ...]:
    """Write the drop-ins, on the disk when this returns. Without systemd nothing is done.

    Args:
        units: of the containers.
        pods: units that make their pods; they must not do so again in this boot.

    Returns:
        Warnings: units that could not be guarded, and would start cold.
    """
    if not systemd.running():
        return ()
    failed = []
    written = 0
    making = frozenset(pods)
    for unit in dict.fromkeys([*units, *sorted(making)]):
        if not _SERVICE.fullmatch(unit):
            failed.append(f"{unit[:64]!r} is no unit that can be kept from starting")
            continue
        try:
            if unit not in making:
                _write(UNITS / f"{unit}.d" / DROP_IN, text(unit))
            if TRANSIENT.is_dir():  # its presence is what says that systemd runs: never made here
                _write(TRANSIENT / f"{unit}.d" / HOLD, f"{HEADER}\n[Service]\nRestart=no\n")
            written += 1
        except OSError as error:
            failed.append(f"{unit} may start cold after the boot: {error.strerror}")
    if written and not systemd.going_down():  # then nothing is started anew anyhow
        try:
            systemd.control("daemon-reload")
        except CkptError as error:
            failed.append(f"units may start their containers anew once they are saved: {error.message}")
    return tuple(failed)


def text(unit: str) -> str:
    """The drop-in of one unit."""
    name = unit.replace("%", "%%")
    return f"{HEADER}\n[Unit]\nAfter=ckpt-resume.service\nConditionPathExists=!{RESUMED}/{name}\n"


def mark_resumed(units: Iterable[str]) -> None:
    """These run again (their containers do): systemd shall not start them in this boot.

    Raises:
        OSError: /run cannot be written to.
    """
    RESUMED.mkdir(mode=0o755, parents=True, exist_ok=True)
    for unit in units:
        if _SERVICE.fullmatch(unit):
            (RESUMED / unit).touch(mode=0o644)


def resume_over() -> None:
    """The resume is over: the drop-ins go as soon as the boot is. Never raises; what is left is removed by the next one."""
    if not systemd.running() or not guarded():
        return
    try:
        systemd.control("start", "--no-block", OVER)
    except CkptError:  # the units are not installed: then nothing of this boot waits for us
        unguard_units()


def guarded() -> tuple[str, ...]:
    """The units that have a drop-in of ours."""
    found = set()
    for path in (*UNITS.glob(f"*.service.d/{DROP_IN}"), *TRANSIENT.glob(f"*.service.d/{HOLD}")):
        with suppress(OSError):
            if path.read_text(errors="replace").startswith(HEADER):
                found.add(path.parent.name.removesuffix(".d"))
    return tuple(sorted(found))


def unguard_units(units: Iterable[str] | None = None) -> None:
    """Remove the drop-ins (none named: all) and the marks, and let the manager know. Never raises for what is gone already."""
    mine = guarded()
    chosen = [unit for unit in (mine if units is None else dict.fromkeys(units)) if unit in mine]
    for unit in chosen:
        for drop_in in (UNITS / f"{unit}.d" / DROP_IN, TRANSIENT / f"{unit}.d" / HOLD):
            with suppress(OSError):
                drop_in.unlink()
                drop_in.parent.rmdir()  # only when nothing else is in it
    for unit in chosen:
        with suppress(OSError):
            (RESUMED / unit).unlink()
    if chosen and systemd.running():
        with suppress(CkptError):
            systemd.control("daemon-reload")


def _write(path: Path, content: str) -> None:
    made = not path.parent.is_dir()
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    durable.write_file(path, content.encode(), 0o644)
    if made:
        durable.sync_directory(path.parent.parent)


def _parent(pid: int) -> int:
    """The parent of a process (proc_pid_stat(5), field 4), 0 when it is gone."""
    fields = procread.stat_fields(pid)
    return int(fields[1]) if len(fields) > 1 else 0
