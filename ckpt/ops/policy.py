"""The destination's policy wins: what a checkpoint from elsewhere asks for beyond this host's defaults is refused, unless allowed one by one."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ckpt.archive import wants_podman
from ckpt.archive.layout import CONFIG, SPEC
from ckpt.archive.manifest import MAX_BYTES, json_object
from ckpt.archive.strict_json import fields, integer, text
from ckpt.archive.wants import Profile, Want, allowed_calls, asked_capabilities, capability, of_spec, want
from ckpt.criu import privileges, seccomp
from ckpt.engines import registry
from ckpt.engines.base import HasProfile
from ckpt.engines.registry import NamedEngine
from ckpt.errors import ArchiveInvalid, CkptError, EngineUnavailable, PolicyRefused, UsageError
from ckpt.model import Manifest, RestoreOptions

KINDS: Final = frozenset({
    "annotation", "apparmor", "cap", "cgroup", "device", "hook", "label", "mount", "namespace", "no_new_privs", "path", "privileged", "process",
    "rootfs", "runtime", "seccomp", "setting", "sysctl", "unmask", "user", "volume", "writable",
})  # fmt: skip
_PRIVILEGED: Final = frozenset({"apparmor", "cap", "device", "label", "no_new_privs", "seccomp", "unmask", "writable"})
"""What podman's --privileged brings along: allowed with it, and not shown one by one."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the user allows: from `--allow` and the configuration."""

    rules: frozenset[tuple[str, str]] = frozenset()
    paths: tuple[str, ...] = field(default=())
    """Real paths of this host below which everything may be mounted."""

    @classmethod
    def parse(cls, given: Iterable[str]) -> Allowed:
        """Read KIND:VALUE.

        Raises:
            UsageError: it is not of that form; everything at once cannot be allowed.
        """
        rules: set[tuple[str, str]] = set()
        paths: list[str] = []
        for one in given:
            kind, colon, value = one.partition(":")
            if kind not in KINDS or not colon or not value:
                kinds = ", ".join(sorted(KINDS))
                raise UsageError(f"--allow: {one!r} is not KIND:VALUE", hint=f"cap:SYS_ADMIN, mount:/srv; the kinds are {kinds}")
            if kind == "mount" and value.startswith("/"):
                paths.append(os.path.realpath(value))
            rules.add((kind, capability(value) if kind == "cap" else value))
        return cls(frozenset(rules), tuple(paths))

    def covers(self, asked: Want) -> bool:
        """Whether this is allowed. A mount: also one below an allowed directory, wherever links lead."""
        if asked.kind == "mount" and asked.value.startswith("/"):
            real = os.path.realpath(asked.value)
            return any(real == path or real.startswith(path.rstrip("/") + "/") for path in self.paths)
        return (asked.kind, asked.value) in self.rules


def asked_for(stage: Path, manifest: Manifest, engine: NamedEngine, options: RestoreOptions) -> list[Want]:
    """What the checkpoint in `stage` asks for beyond this host's defaults. The stage may be without memory and files.

    Raises:
        ArchiveInvalid: its members contradict each other, or are not what they should be.
    """
    config, spec = (json_object(_read(stage / name), name) for name in (CONFIG, SPEC))
    checkpoint = stage / "checkpoint"
    if manifest.engine == "process":
        return _of_process(checkpoint)
    profile = engine.profile() if isinstance(engine, HasProfile) else Profile()
    found: list[Want] = []
    if manifest.engine == "podman":
        _same_container_image(manifest, config)
        taken = bool(options.name) and _is_anothers(manifest, engine)
        found += wants_podman.of_podman(config, spec, profile, taken=taken)
        found += _volumes(config, manifest, engine, options)
    else:
        found += of_spec(spec, profile)
        found += _standard_files(config)
    if engine.probe().criu and (checkpoint / "pstree.img").exists():  # a restore may begin with a sketch, which has no CRIU images yet
        found += _of_images(checkpoint, spec, profile)
    return _distinct(found)


def _is_anothers(manifest: Manifest, engine: NamedEngine) -> bool:
    """Whether a container with the checkpoint's id is here that is not the one that was saved: then its directories are not the checkpoint's own.

    Who knows the id (256 random bits), the name and the container image of a container here is taken for one who saved it.
    """
    for container in engine.find(manifest.container_id):
        if container.id == manifest.container_id:
            known = engine.describe(container).container_image
            same_image = known is not None and manifest.container_image is not None and known.id == manifest.container_image.id
            return not (container.name == manifest.name and same_image)
    return False


def require(stage: Path, manifest: Manifest, engine: NamedEngine, options: RestoreOptions, label: str, *, where: str) -> None:
    """Refuse what is not allowed.

    Raises:
        PolicyRefused: with a row for each thing that is asked for; nothing was touched.
        ArchiveInvalid: as `asked_for`.
        UsageError: `options.allow` is wrong.
    """
    allowed = Allowed.parse(options.allow)
    refused = [one for one in asked_for(stage, manifest, engine, options) if not allowed.covers(one)]
    if not refused:
        return
    number = f"{len(refused)} thing{'' if len(refused) == 1 else 's'}"
    raise PolicyRefused(
        f"{label} comes from elsewhere and asks for {number} that this host does not give to a container",
        where=where,
        hint=f"allow what you trust it with, one by one: {' '.join(_option(one) for one in refused[:4])}{' ...' if len(refused) > 4 else ''}",
        wants=tuple({"what": one.allow, "asks": one.asks, "default": one.default, "allow": _option(one)} for one in refused),
    )


def notice(stage: Path, manifest: Manifest) -> str:
    """What an import tells: what the checkpoint will ask for when it is restored here; "" for nothing, or when nobody can tell."""
    try:
        asked = asked_for(stage, manifest, registry.by_name(manifest.engine), RestoreOptions())
    except EngineUnavailable:
        return ""
    except (CkptError, OSError) as error:
        return f"it cannot be restored here: {error}"
    named = ", ".join(one.allow for one in asked[:6]) + (f" and {len(asked) - 6} more" if len(asked) > 6 else "")
    return f"it asks for more than this host gives to a container, restore will want --allow: {named}" if asked else ""


def _option(asked: Want) -> str:
    import shlex

    return f"--allow {shlex.quote(asked.allow)}"


def _distinct(found: Sequence[Want]) -> list[Want]:
    """Each thing once; what comes along with --privileged is told by its one row."""
    by_name: dict[str, Want] = {}
    for one in found:
        by_name.setdefault(one.allow, one)
    privileged = by_name.get("privileged:on")
    if privileged is None:
        return list(by_name.values())
    kept = [one for one in by_name.values() if one.kind not in _PRIVILEGED and one is not privileged]
    return [dataclasses.replace(privileged, asks="a privileged container: every capability and device, no seccomp filter, nothing hidden"), *kept]


def _same_container_image(manifest: Manifest, config: dict[str, Any]) -> None:
    """Podman goes by config.dump, all checks by the manifest: they must mean the same container image, by its id and not by a name."""
    top = fields(config, CONFIG)
    identity = text(top.get("rootfsimageid"), f"{CONFIG}: rootfsImageID")
    known = manifest.container_image.id if manifest.container_image else ""
    if identity.removeprefix("sha256:") != known.removeprefix("sha256:"):
        raise ArchiveInvalid(f"{CONFIG} names another container image than the manifest")
    if known and not re.fullmatch(r"(?:sha256:)?[0-9a-f]{12,64}", known):
        raise ArchiveInvalid(f"{known[:64]!r} is no id of a container image")
    if not identity and not top.get("rootfs"):
        raise ArchiveInvalid(f"{CONFIG} names no container image by its id")
    if text(top.get("name"), f"{CONFIG}: name").startswith("-"):
        raise ArchiveInvalid(f"{CONFIG} has no valid name")


def _volumes(config: dict[str, Any], manifest: Manifest, engine: NamedEngine, options: RestoreOptions) -> list[Want]:
    """Named volumes of this host that the container would get as they are: those of a copy, and those whose content is not in the checkpoint."""
    names = wants_podman.volume_names(config)
    own = {name for name, _ in manifest.volumes}
    if not names:
        return []
    here = set(getattr(engine, "volume_names", list)())
    shared = [name for name in names if name in here and (options.name or options.ignore_volumes or name not in own)]
    return [want("volume", name, f"the volume {name} of this host, with what is in it", "volumes of its own") for name in shared]


def _standard_files(config: dict[str, Any]) -> list[Want]:
    """Files of the host that an OCI bundle's container has as its standard input and output."""
    found = []
    for entry in config.get("stdio") or []:
        path = str(entry.get("path") or "") if isinstance(entry, dict) else ""
        if path and path != os.devnull:
            found.append(want("path", path, f"{path} of this host as its standard input or output", "none"))
    return found


def _of_process(checkpoint: Path) -> list[Want]:
    who = sorted({uid for one in privileges.credentials(checkpoint) for uid in one.uids})
    users = ", ".join(map(str, who[:5]))
    return [want("process", "host", f"a process tree of this host itself, outside of any container, as user {users}", "containers only")]


def _of_images(checkpoint: Path, spec: dict[str, Any], profile: Profile) -> list[Want]:
    """What the processes were allowed, against what their own configuration says."""
    process = fields(fields(spec, SPEC).get("process"), f"{SPEC}: process")
    linux = fields(fields(spec, SPEC).get("linux"), f"{SPEC}: linux")
    given = asked_capabilities(process)
    quiet = process.get("nonewprivileges") is True
    filtered = bool(linux.get("seccomp"))
    user = integer(fields(process.get("user"), f"{SPEC}: process.user").get("uid"), f"{SPEC}: process.user.uid")
    found: list[Want] = []
    filters: set[int] = set()
    for one in privileges.credentials(checkpoint):
        if one.seccomp_filter is not None:
            filters.add(one.seccomp_filter)
        who = f"(process {one.pid}, against its own configuration)"
        found += [want("cap", name, f"the capability {name} {who}", "dropped") for name in sorted(one.capabilities - given)]
        if filtered and not one.seccomp:
            found.append(want("seccomp", "unconfined", f"no seccomp filter {who}", "the engine's filter"))
        if quiet and not one.no_new_privileges:
            found.append(want("no_new_privs", "off", f"may gain privileges {who}", "no_new_privs on"))
        if user and 0 in one.uids and not linux.get("uidmappings"):
            found.append(want("user", "0", f"runs as root {who}", f"user {user}"))
    if filtered and (more := seccomp.let_through(checkpoint, filters, allowed_calls(linux))):
        asks = f"seccomp filters that let through {', '.join(more[:5])}{' and more' if len(more) > 5 else ''}, against its own configuration"
        found.append(want("seccomp", "custom", asks, "the engine's filter"))
    for kind in sorted(privileges.shared_namespaces(checkpoint) & profile.namespaces):
        found.append(want("namespace", kind, f"the host's {kind} namespace", "its own"))
    for mount in privileges.host_mounts(checkpoint):
        what = mount.source if mount.source.startswith("/") else f"{mount.kind}:{mount.source}"
        found.append(want("mount", what, f"{mount.source} of this host at {mount.mountpoint}, as {mount.kind}", "no files of the host"))
    return found


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)
