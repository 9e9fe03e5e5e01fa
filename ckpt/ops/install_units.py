"""Install ckpt's systemd units and drop-ins, and take them away again. Everything is looked at before the first file is written."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import ckpt
from ckpt import config
from ckpt.criu import tree
from ckpt.errors import BusyError, CkptError, NoSpace, PermissionDenied
from ckpt.events import Emit, Notice
from ckpt.host import procread, run, systemd
from ckpt.ops import resolve, units
from ckpt.ops.hibernate import guards, settings
from ckpt.store import durable
from ckpt.store.place import DEFAULT_ROOT

LOCAL: Final = Path("etc/systemd/system")
RATE_BYTES_S: Final = 100 << 20
"""What one save writes a second, on a slow disk; only to warn."""
_MAIN: Final = (units.HIBERNATE, units.RESUME)
_CONTAINERS: Final = Path("var/lib/containers")


@dataclass(frozen=True, slots=True)
class Place:
    """Where units go: below `root`, in `prefix`/lib/systemd/system, or without a prefix in /etc/systemd/system."""

    root: Path = Path("/")
    prefix: Path | None = None

    @property
    def directory(self) -> Path:
        return self.root / LOCAL if self.prefix is None else self.root / str(self.prefix / "lib/systemd/system").lstrip("/")

    @property
    def quadlet(self) -> dict[Path, str]:
        """The drop-ins for Quadlet, with their texts."""
        above = self.root / (units.QUADLET if self.prefix is None else "usr/share/containers/systemd")
        # A pod ends no later than its containers, and its unit may start before them.
        return {above / "container.d" / units.DROP_IN: units.quadlet(), above / "pod.d" / units.DROP_IN: units.stopped_later()}

    @property
    def live(self) -> bool:
        """Whether these are this host's own: its manager is told, what runs is looked at."""
        return self.root == Path("/") and self.prefix is None


@dataclass(frozen=True, slots=True)
class Installed:
    """What `install` or `uninstall` did.

    Attributes:
        paths: files written (or that would be), or removed; those that were there in the same words are left out of `changed`.
        enabled: whether the units are enabled and the safety net is up.
    """

    paths: tuple[Path, ...]
    changed: tuple[Path, ...]
    enabled: bool = False


def ckpt_command() -> list[str]:
    """How a unit runs this very ckpt: the script that was started, or this Python with `-m ckpt`."""
    script = Path(sys.argv[0] or ".")
    if script.name == "ckpt" and script.is_file() and os.access(script, os.X_OK):
        return [os.path.abspath(script)]
    if found := run.which("ckpt"):
        return [os.path.abspath(found)]
    return [sys.executable, "-m", "ckpt"]


def _environment(argv: Sequence[str], store_root: Path) -> str:
    """The `Environment=` lines: a store that the system's settings do not name, a ckpt that is not installed."""
    lines = []
    if store_root != config.load({}).store:
        lines.append(f"Environment={units.quoted(f'CKPT_STORE={store_root}')}\n")
    if len(argv) > 1:
        lines.append(f"Environment={units.quoted(f'PYTHONPATH={Path(ckpt.__file__).resolve().parent.parent}')}\n")
    return "".join(lines)


def arm_files(place: Place, store_root: Path) -> dict[Path, str]:
    """The templates of periodic checkpoints."""
    argv = ckpt_command()
    return {
        place.directory / units.ARM_SERVICE: units.arm_service(argv, _environment(argv, store_root)),
        place.directory / units.ARM_TIMER: units.arm_timer(),
    }


def files(place: Place, store_root: Path, *, owners: Sequence[str] = ()) -> dict[Path, str]:
    """Every file with its text.

    Args:
        owners: units that own workloads, and are to be stopped after the save.

    Raises:
        ConfigError: hibernate.toml is wrong.
    """
    chosen = settings.load()
    argv = ckpt_command()
    environment = _environment(argv, store_root)
    mounts = [store_root, *([DEFAULT_ROOT] if store_root != DEFAULT_ROOT else []), Path("/") / _CONTAINERS]
    above = place.directory
    found = {
        above / units.HIBERNATE: units.hibernate(argv, environment, chosen, mounts),
        above / units.RESUME: units.resume(argv, environment, chosen, mounts),
        above / units.UNGUARD: units.unguard(argv, environment),
        **arm_files(place, store_root),
    }
    drop_ins = [f"{prefix}.scope" for prefix in units.SCOPES] + [f"{prefix}.service" for prefix in units.SERVICES]
    for name in dict.fromkeys([*drop_ins, *owners]):
        found[above / f"{name}.d" / units.DROP_IN] = units.stopped_later()
    found |= place.quadlet
    return found


def running_owners() -> tuple[tuple[str, ...], int]:
    """The units that own what runs now, or a process tree of hibernate.toml, and how many bytes of memory what runs has.

    Raises:
        ConfigError: hibernate.toml is wrong.
    """
    owners: list[str] = []
    memory = 0
    with suppress(CkptError):  # no engine at all: then there is nothing
        for _, container in resolve.all_running():
            owners += guards.owned(container)
            memory += _memory_bytes(container.pid or 0)
    for one in settings.load().trees:
        pid = one.pid or 0
        if one.pidfile is not None:
            with suppress(OSError, ValueError):
                pid = int(one.pidfile.read_text())
        unit = one.unit or systemd.unit_of(pid)
        if unit.endswith((".service", ".scope")):
            owners.append(unit)
        memory += _memory_bytes(pid)
    return tuple(dict.fromkeys(owners)), memory


def _memory_bytes(pid: int) -> int:
    """What a dump of the tree writes: memory that no file is behind (proc_pid_status(5))."""
    if pid <= 0:
        return 0
    total = 0
    for one in tree.pids(pid):
        status = procread.status_of(one)
        total += sum(int(status.get(key, "0 kB").split()[0]) << 10 for key in ("RssAnon", "RssShmem", "VmSwap"))
    return total


def install(place: Place, store_root: Path, *, enable: bool = False, emit: Emit) -> Installed:
    """Write the units; what is there already in the same words is left as it is.

    Args:
        enable: also enable them and let the safety net begin now.

    Raises:
        FeatureMissing: systemd does not run, and they are for this host.
        BusyError: one of the files is there and not ours; nothing was changed.
        PermissionDenied, NoSpace, ConfigError, EngineUnavailable.
    """
    if place.live:
        systemd.need()
    owners, memory = running_owners() if place.live else ((), 0)
    wanted = files(place, store_root, owners=owners)
    changed = write(wanted)
    chosen = settings.load()
    for text in warnings(chosen, memory):
        emit(Notice("", text, warning=True))
    if place.live:
        systemd.control("daemon-reload")  # also when nothing changed: an earlier run may have been broken off before it
        if enable:
            systemd.control("enable", *_MAIN)
            systemd.control("start", "--no-block", units.HIBERNATE)
    elif enable:
        systemd_enable_offline(place)
    return Installed(tuple(wanted), changed, enable)


def systemd_enable_offline(place: Place) -> None:
    """What `systemctl enable` does, for a tree that is not this host's own."""
    wants = place.root / LOCAL / "multi-user.target.wants"
    wants.mkdir(mode=0o755, parents=True, exist_ok=True)
    for unit in _MAIN:
        link = wants / unit
        with suppress(FileNotFoundError):
            link.unlink()
        link.symlink_to("/" + str((place.directory / unit).relative_to(place.root)))


def warnings(chosen: settings.HibernateSettings, memory_bytes: int) -> list[str]:
    """What about the time limits should be known before it matters."""
    found = []
    needed_s = memory_bytes / RATE_BYTES_S
    if needed_s > chosen.shutdown_timeout_s:
        found.append(
            f"what runs now has {memory_bytes / (1 << 30):.1f} GiB of memory: saving it may take {needed_s:.0f} s, "
            f"more than shutdown_timeout_s = {chosen.shutdown_timeout_s:g} in {settings.FILE}"
        )
    if units.stop_limit_s(chosen) > units.JOB_LIMIT_S:
        found.append(f"systemd forces the machine down after {units.JOB_LIMIT_S:.0f} s (JobTimeoutSec= of reboot.target), before ckpt's time is over")
    return found


def write(wanted: Mapping[Path, str]) -> tuple[Path, ...]:
    """Write the files that are not there in the same words; all are checked first.

    Raises:
        BusyError: one is there and not ours; nothing was changed.
        PermissionDenied, NoSpace: what had been written is taken back.
    """
    old: dict[Path, str | None] = {}
    for path in wanted:
        old[path] = _read(path)
        text = old[path]
        if text is not None and not ours(text):
            raise BusyError(
                f"{path} is there and not made by ckpt", where="nothing was changed", hint="remove it, or rename it, if you do not need it"
            )
    done: list[Path] = []
    try:
        for path, text in wanted.items():
            if old[path] != text:
                done.append(path)
                made = next((above for above in reversed(path.parents) if not above.exists()), None)
                path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
                durable.write_file(path, text.encode(errors="surrogateescape"), 0o644)
                if made is not None:
                    durable.sync_directory(made.parent)
    except OSError as error:
        for path in done:
            _take_back(path, old[path])
        kind = PermissionDenied if isinstance(error, PermissionError) else NoSpace if error.errno in (28, 122) else CkptError
        raise kind(f"{error.filename or done[-1]} cannot be written: {error.strerror}", where="nothing was changed") from error
    return tuple(done)


def _read(path: Path) -> str | None:
    try:
        if path.is_symlink():
            return ""  # masked, or somebody's own: not ours
        return path.read_text(errors="surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise PermissionDenied(f"{path} cannot be read: {error.strerror}", where="nothing was changed") from error


def _take_back(path: Path, text: str | None) -> None:
    with suppress(OSError):
        path.with_name(path.name + ".part").unlink(missing_ok=True)
        if text is None:
            remove_file(path)
        else:
            path.write_text(text, errors="surrogateescape")


def ours(text: str) -> bool:
    """Whether a unit's text is one of `install`."""
    return text.split("\n", 1)[0].strip() == units.HEADER


def found(place: Place) -> list[Path]:
    """All files of ours that are there."""
    names = ("ckpt-*.service", "ckpt-*.timer", f"*.d/{units.DROP_IN}")
    candidates = [path for name in names for path in sorted(place.directory.glob(name))] + list(place.quadlet)
    mine = []
    for path in candidates:
        with suppress(CkptError):
            if ours(_read(path) or ""):
                mine.append(path)
    return mine


def uninstall(place: Place) -> Installed:
    """Stop, disable and remove all that `install` made (and left drop-ins); what is not ours stays. Nothing there: nothing is done.

    Raises:
        EngineUnavailable: systemd refused; the files are still there.
        PermissionDenied: a file cannot be removed.
    """
    paths = found(place)
    if place.live and systemd.running():
        here = [name for name in _MAIN if place.directory / name in paths]
        if here:
            # Stopping the safety net saves nothing: the host is not going down.
            systemd.control("disable", "--now", *here)
    for unit in _MAIN:
        link = place.root / LOCAL / "multi-user.target.wants" / unit
        with suppress(OSError):
            if link.is_symlink():
                remove_file(link)
    for path in paths:
        try:
            remove_file(path)
        except OSError as error:
            raise PermissionDenied(f"{path} cannot be removed: {error.strerror}") from error
    if place.live and systemd.running():
        guards.unguard_units()
        if paths:
            systemd.control("daemon-reload")
    return Installed(tuple(paths), tuple(paths))


def remove_file(path: Path) -> None:
    """Remove a file, and its directory when it is a drop-ins' one and nothing else is in it. Raises OSError."""
    path.unlink(missing_ok=True)
    if path.parent.name.endswith((".d", ".wants")):
        with suppress(OSError):
            path.parent.rmdir()
