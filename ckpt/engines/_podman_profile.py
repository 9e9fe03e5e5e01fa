"""What podman on this host gives to a container that asks for nothing: containers.conf(5), seccomp.json(5), the host's LSM."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Final

from ckpt.archive import wants
from ckpt.archive.wants import Profile, Seccomp

_CONF: Final = ("/usr/share/containers/containers.conf", "/etc/containers/containers.conf")
_SECCOMP: Final = ("/etc/containers/seccomp.json", "/usr/share/containers/seccomp.json")
_NAMESPACES: Final = {"pidns": "pid", "netns": "network", "ipcns": "ipc", "utsns": "uts", "cgroupns": "cgroup"}


def profile(root: Path = Path("/")) -> Profile:
    """Podman's defaults, as the configuration below `root` changes them; a file that cannot be read changes nothing."""
    containers, engine = _settings(root)
    named = containers.get("default_capabilities")
    capabilities = frozenset(wants.capability(str(name)) for name in named) if isinstance(named, list) else wants.PODMAN_CAPABILITIES
    sysctls = containers.get("default_sysctls", ["net.ipv4.ping_group_range=0 0"])
    runtimes = engine.get("runtimes")
    return Profile(
        capabilities=capabilities,
        seccomp=_seccomp(root, str(containers.get("seccomp_profile") or ""), capabilities),
        no_new_privileges=containers.get("no_new_privileges") is True,
        apparmor=containers.get("apparmor_profile") != "unconfined" and _text(root / "sys/module/apparmor/parameters/enabled").startswith("Y"),
        selinux=containers.get("label") is not False and (root / "sys/fs/selinux/enforce").exists(),
        namespaces=wants.NAMESPACES - {kind for key, kind in _NAMESPACES.items() if containers.get(key) == "host"},
        runtimes=Profile().runtimes | (set(runtimes) if isinstance(runtimes, dict) else set()),
        sysctls=frozenset((key, value) for key, _, value in (str(item).partition("=") for item in sysctls if isinstance(item, str))),
    )


def _settings(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    containers: dict[str, Any] = {}
    engine: dict[str, Any] = {}
    for name in _CONF:
        path = root / name.lstrip("/")
        for one in (path, *sorted(path.with_name(path.name + ".d").glob("*.conf"))):
            try:
                found = tomllib.loads(_text(one))
            except ValueError:
                continue
            for into, section in ((containers, "containers"), (engine, "engine")):
                if isinstance(found.get(section), dict):
                    into |= found[section]
    return containers, engine


def _seccomp(root: Path, named: str, capabilities: frozenset[str]) -> Seccomp | None:
    """The profile's rules. containers-common: `includes` and `excludes` say for which capabilities a rule is there."""
    if named == "unconfined":
        return None
    for name in (named, *_SECCOMP):
        text = _text(root / name.lstrip("/")) if name else ""
        if text:
            break
    else:
        return Seccomp()
    always: set[str] = set()
    sometimes: dict[str, set[str]] = {}
    with_capability: dict[str, set[str]] = {}
    try:
        for rule in json.loads(text)["syscalls"]:
            needed = {wants.capability(name) for name in (rule.get("includes") or {}).get("caps") or ()}
            for names, conditions in wants.rules([rule], "seccomp.json"):
                for name in names:
                    if not needed <= capabilities:
                        for one in needed - capabilities:
                            with_capability.setdefault(one, set()).add(name)
                    elif conditions:
                        sometimes.setdefault(name, set()).add(conditions)
                    else:
                        always.add(name)
    except (ValueError, KeyError, TypeError, AttributeError):
        return Seccomp()
    return Seccomp(
        frozenset(always),
        {name: frozenset(found) for name, found in sometimes.items()},
        {name: frozenset(found) for name, found in with_capability.items()},
    )


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return ""
