"""Containers and pods that systemd units make: Quadlet's (podman-systemd.unit(5)) and those of `podman generate systemd --new`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

POD_ID_FILE: Final = "--pod-id-file"
"""What the unit of a pod writes its id to, and those of its containers read it from: `%t/%N.pod-id`, %N of the pod's unit."""
_SUFFIX: Final = ".pod-id"
_MAX_BYTES: Final = 256


def pod_file(command: Sequence[str]) -> Path | None:
    """The file that names the pod of a container made by this command line; None when none does."""
    for at, word in enumerate(command):
        name, equals, value = word.partition("=")
        if name == POD_ID_FILE:
            found = value if equals else "".join(command[at + 1 : at + 2])
            return Path(found) if found.startswith("/") else None
    return None


def pod_unit(command: Sequence[str]) -> str:
    """The unit that makes its pod, "" for none."""
    path = pod_file(command)
    return f"{path.name.removesuffix(_SUFFIX)}.service" if path is not None and path.name.endswith(_SUFFIX) else ""


def pod_id(command: Sequence[str]) -> str:
    """What the file says, "" when it is not there or says nothing that is an id."""
    path = pod_file(command)
    try:
        with path.open("rb") if path is not None else open("/dev/null", "rb") as source:
            text = source.read(_MAX_BYTES).decode("ascii", "replace").strip()
    except OSError:
        return ""
    return text if text and all(char in "0123456789abcdef" for char in text) else ""


def out_of_unit(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """config.dump for a container that was in the cgroup of its unit (`--cgroups=split`): podman gives it one of its own; None for others.

    It would be put below whatever unit ckpt runs in, a login session, say; and in a pod podman refuses it: its configuration names the
    pod's cgroup as well.
    """
    if config.get("cgroupsMode") != "split":
        return None
    return {key: value for key, value in config.items() if key not in ("cgroupsMode", "cgroupParent")}
