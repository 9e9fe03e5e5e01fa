"""systemd: is it there, what it is told (sd_notify), units for processes, the journal, going down.

Nothing here needs systemd's libraries: the notification and journal sockets are spoken natively, the manager is asked with `busctl` and
`systemctl`.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final, Literal

from ckpt.errors import CkptError, EngineUnavailable, FeatureMissing
from ckpt.host import run

BOOTED: Final = Path("/run/systemd/system")
"""A directory there means that systemd is the init (sd_booted(3))."""
JOURNAL: Final = Path("/run/systemd/journal/socket")
_MANAGER: Final = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
_SEND_LIMIT_S: Final = 0.5
_CALL_LIMIT_S: Final = 25.0
"""As long as D-Bus itself waits for an answer by default (sd_bus_call(3))."""
_CONTROL_LIMIT_S: Final = 180.0
"""As long as systemctl itself waits for daemon-reload: on a busy host the manager and its generators take their time."""
_MOVE_LIMIT_S: Final = 5.0
_MAX_VALUE_BYTES: Final = 16 << 10
_FIELD: Final = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_UNIT: Final = re.compile(r"[A-Za-z0-9:_.\\@-]{1,249}\.(?:service|scope|socket|mount|swap)")
Kind = Literal["reboot", "kexec", "poweroff"]


def running() -> bool:
    """Whether this host was booted with systemd (sd_booted(3))."""
    return BOOTED.is_dir() and not BOOTED.is_symlink()


def need() -> None:
    """Raises FeatureMissing on a host without systemd."""
    if not running():
        raise FeatureMissing("systemd does not run here", where="nothing was changed", hint="run ckpt from this host's own init system or by hand")


def notify(status: str = "", *, ready: bool = False, stopping: bool = False, extend_s: float | None = None) -> None:
    """Tell the service manager how far we are (sd_notify(3)); nothing outside of a unit. Never raises.

    Args:
        status: the line of `systemctl status`.
        ready: the service is up.
        stopping: it is about to end.
        extend_s: it may take so long from now, whatever the unit's time limit says (EXTEND_TIMEOUT_USEC=).
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    lines = []
    if ready:
        lines.append("READY=1")
    if stopping:
        lines.append("STOPPING=1")
    if status:
        lines.append("STATUS=" + " ".join(status.split())[:1024])
    if extend_s is not None:
        lines.append(f"EXTEND_TIMEOUT_USEC={max(0, round(extend_s * 1e6))}")
    if lines and address[:1] in ("/", "@"):
        _send("\0" + address[1:] if address[0] == "@" else address, "\n".join(lines).encode())


def journal(message: str, *, priority: int = 6, **fields: str | int | float | None) -> None:
    """Write an entry with fields into systemd's journal; nothing where there is none. Never raises.

    Args:
        priority: as syslog(3) has it, 3 error, 4 warning, 6 information.
        fields: names in capitals (`CKPT_ID`); None is left out.

    The format is https://systemd.io/JOURNAL_NATIVE_PROTOCOL.
    """
    if not JOURNAL.exists():
        return
    entry = [_field("MESSAGE", message), _field("PRIORITY", str(priority)), _field("SYSLOG_IDENTIFIER", "ckpt")]
    entry += [_field(key, str(value)) for key, value in fields.items() if value is not None and _FIELD.fullmatch(key)]
    _send(os.fspath(JOURNAL), b"".join(entry))


def _field(key: str, text: str) -> bytes:
    value = text.encode(errors="surrogateescape")[:_MAX_VALUE_BYTES]
    if b"\n" in value:
        return key.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n"
    return key.encode() + b"=" + value + b"\n"


def _send(address: str, data: bytes) -> None:
    with contextlib.suppress(OSError, ValueError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as out:
        out.settimeout(_SEND_LIMIT_S)
        out.sendto(data, address)


def unit_of(pid: int) -> str:
    """The system unit that a process belongs to, "" for none (as sd_pid_get_unit(3): by its cgroup)."""
    try:
        text = Path(f"/proc/{pid}/cgroup").read_text(errors="replace")
    except OSError:
        return ""
    paths = {}
    for line in text.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or controllers == "name=systemd":
            paths[controllers] = path
    return unit_in(paths.get("name=systemd") or paths.get("") or "")


def unit_in(path: str) -> str:
    """The system unit of a cgroup's path, "" for none."""
    for part in path.split("/"):
        name = part.removeprefix("_")  # systemd's escape of names that look like the kernel's files
        if _UNIT.fullmatch(name):
            return name
    return ""


def scope(name: str, pids: Collection[int], *, slice: str = "system.slice", description: str = "") -> None:
    """Put processes that run already into a scope of their own, out of the unit that we run in.

    Args:
        name: of the scope, without ".scope".
        pids: all of them, not their threads.

    Raises:
        FeatureMissing: there is no systemd.
        EngineUnavailable: it refused (the host is going down, or the scope is there already), or the processes are not there in 5 s.
    """
    need()
    unit = f"{name}.scope"
    properties = (
        ("Description", "s", description or f"restored by ckpt: {name}"),
        ("Slice", "s", slice),
        ("CollectMode", "s", "inactive-or-failed"),
        ("PIDs", "au", str(len(pids)), *(str(pid) for pid in sorted(pids))),
    )
    call("StartTransientUnit", "ssa(sv)a(sa(sv))", unit, "fail", str(len(properties)), *(word for row in properties for word in row), "0")
    deadline = time.monotonic() + _MOVE_LIMIT_S
    while left := [pid for pid in sorted(pids) if unit_of(pid) != unit and Path(f"/proc/{pid}").exists()]:
        if time.monotonic() > deadline:
            raise EngineUnavailable(f"systemd did not put process {left[0]} into {unit}", hint=f"systemctl status {unit}")
        time.sleep(0.01)  # the manager tells of a job's end only those who listen on the bus


def call(method: str, signature: str = "", *words: str) -> str:
    """Call a method of the service manager and return what busctl(1) prints.

    Raises:
        EngineUnavailable: it refused, or did not answer.
    """
    try:
        return run.run(("busctl", "call", *_MANAGER, method, *((signature, *words) if signature else ())), timeout_s=_CALL_LIMIT_S).text
    except run.CommandFailed as error:
        raise EngineUnavailable(f"systemd refused {method}: {error.reason.removeprefix('Call failed: ')}") from error


def control(*words: str, timeout_s: float = _CONTROL_LIMIT_S) -> str:
    """Run `systemctl` and return what it prints.

    Raises:
        EngineUnavailable: it failed, or took longer.
    """
    try:
        return run.run(("systemctl", "--no-pager", "--no-ask-password", *words), timeout_s=timeout_s).text
    except run.CommandFailed as error:
        raise EngineUnavailable(f"systemctl {' '.join(words)}: {error.reason}") from error


def reboot(kind: Kind) -> None:
    """Let the host go down: units are stopped in order first. Returns as soon as that has begun.

    Raises:
        FeatureMissing: there is no systemd.
        EngineUnavailable: systemctl refused.
        CkptError: not one of reboot, kexec and poweroff.
    """
    if kind not in ("reboot", "kexec", "poweroff"):
        raise CkptError(f"{kind!r} is no way to go down")
    need()
    control("--no-block", kind)


def going_down() -> bool:
    """Whether the whole host is being stopped, not only one of its units: a job to start shutdown.target is there (or final state reached)."""
    if not running():
        return False
    try:
        state = run.run(("systemctl", "is-system-running"), timeout_s=_CALL_LIMIT_S, check=False).text.strip()
        if state == "stopping":
            return True
        jobs = run.run(("systemctl", "--no-pager", "--no-legend", "list-jobs"), timeout_s=_CALL_LIMIT_S).text
    except run.CommandFailed:
        return False
    return any(fields[1:3] == ["shutdown.target", "start"] for line in jobs.splitlines() if (fields := line.split()))


def escape(name: str) -> str:
    """A text as a unit's name has it (systemd-escape(1)): "/" is "-", all but letters, digits, ":", "_" and "." is "\\xNN"."""
    made = []
    for index, byte in enumerate(name.encode(errors="surrogateescape")):
        char = chr(byte)
        if char == "/":
            made.append("-")
        elif (char.isascii() and char.isalnum()) or char in ":_" or (char == "." and index):
            made.append(char)
        else:
            made.append(f"\\x{byte:02x}")
    return "".join(made)


def unescape(name: str) -> str:
    """What `escape` made."""
    raw = re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes([int(found[1], 16)]), name.replace("-", "/").encode(errors="surrogateescape"))
    return raw.decode(errors="surrogateescape")
