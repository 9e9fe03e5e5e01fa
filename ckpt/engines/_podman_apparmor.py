"""AppArmor profiles of podman's containers. After a boot podman's own is loaded by the first container that it makes, not by a restore.

CRIU then fails with "can't write lsm profile -2" (podman issue 12437). Source of the paths: Linux Documentation/admin-guide/LSM/apparmor.rst.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from ckpt.archive.manifest import json_object
from ckpt.errors import RestoreFailed

ENABLED: Final = Path("/sys/module/apparmor/parameters/enabled")
PROFILES: Final = Path("/sys/kernel/security/apparmor/profiles")
OWN: Final = "containers-default-"
"""What the profiles that podman itself makes are called (containers/common, pkg/apparmor)."""
_lock = threading.Lock()


def ensure(spec_path: Path, load: Callable[[], object]) -> None:
    """Have the profile that a container's spec names loaded; nothing on a host without AppArmor, or when it is.

    Args:
        load: makes podman load its own.

    Raises:
        RestoreFailed: it is not podman's own, and not loaded.
    """
    if not _enabled():
        return
    process = json_object(spec_path.read_bytes(), spec_path.name).get("process")
    profile = str(process.get("apparmorProfile") or "") if isinstance(process, dict) else ""
    if profile in ("", "unconfined"):
        return
    with _lock:
        if profile in loaded():
            return
        if profile.startswith(OWN):
            load()
        if profile not in loaded():
            hint = "apparmor_parser -r the file it is in"
            raise RestoreFailed(f"the AppArmor profile {profile} is not loaded", where="nothing was touched", hint=hint)


def _enabled() -> bool:
    try:
        return ENABLED.read_text().strip() == "Y" and PROFILES.exists()
    except OSError:
        return False


def loaded() -> frozenset[str]:
    """Names of the profiles that the kernel has; each line is `NAME (MODE)`."""
    try:
        return frozenset(line.rpartition(" (")[0] for line in PROFILES.read_text().splitlines())
    except OSError:
        return frozenset()
