"""What an archive asks for beyond what a host gives to any container: its OCI runtime configuration against a host's profile.

Every setting is looked for by name; a setting that is not known here is asked for as well, for what it does nobody can tell. Sources of
the names: OCI runtime-spec (config.md, config-linux.md), crun(1), containers.conf(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from ckpt.archive.layout import SPEC
from ckpt.archive.strict_json import fields, flag, integer, items, text, texts

NAMESPACES: Final = frozenset({"pid", "network", "ipc", "uts", "mount", "cgroup"})
PODMAN_CAPABILITIES: Final = frozenset({
    "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "NET_BIND_SERVICE", "SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
})  # fmt: skip
"""containers.conf(5), default_capabilities."""
MASKED: Final = ("/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/scsi", "/sys/firmware")
READ_ONLY: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
"""What every version of podman, docker and containerd hides, or makes read-only."""

_PLAIN_TYPES: Final = frozenset({"proc", "tmpfs", "devpts", "mqueue"})
_TOP: Final = frozenset({"ociversion", "process", "root", "hostname", "domainname", "mounts", "hooks", "annotations", "linux"})
_PROCESS: Final = frozenset({
    "terminal", "consolesize", "user", "args", "env", "cwd", "capabilities", "rlimits", "nonewprivileges", "apparmorprofile", "oomscoreadj",
    "selinuxlabel",
})  # fmt: skip
_LINUX: Final = frozenset({
    "uidmappings", "gidmappings", "sysctl", "resources", "cgroupspath", "namespaces", "devices", "seccomp", "rootfspropagation", "maskedpaths",
    "readonlypaths", "mountlabel",
})  # fmt: skip
_ANNOTATIONS: Final = frozenset({
    "io.container.manager", "org.systemd.property.KillSignal", "org.systemd.property.TimeoutStopUSec",
    # Podman keeps in these what is in the configuration as well, for `podman inspect`.
    *(f"io.podman.annotations.{name}" for name in ("autoremove", "init", "privileged", "publish-all", "seccomp", "apparmor", "label")),
})  # fmt: skip
_OWN_SYSCTLS: Final = re.compile(r"net\.|kernel\.(?:shm|msg|sem)|fs\.mqueue\.")
_USUAL_DEVICES: Final = frozenset({(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (10, 200)})
_REFUSING: Final = frozenset({"SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS", "SCMP_ACT_KILL_THREAD", "SCMP_ACT_TRAP"})
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Want:
    """One thing that the checkpoint asks for: `kind:value` allows it. Both are shown, and come from outside: control characters are gone."""

    kind: str
    value: str
    asks: str
    """For a person: what it means."""
    default: str
    """What this host gives by itself."""

    @property
    def allow(self) -> str:
        """What `--allow` takes."""
        return f"{self.kind}:{self.value}"


@dataclass(frozen=True, slots=True)
class Seccomp:
    """System calls that a host's seccomp profile lets through: always, or only with certain arguments."""

    always: frozenset[str] = frozenset()
    sometimes: dict[str, frozenset[str]] = field(default_factory=dict)
    """By name, the conditions (see `rules`)."""
    with_capability: dict[str, frozenset[str]] = field(default_factory=dict)
    """By capability, what a container that has it may call as well."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What an engine on this host gives to a container that asks for nothing."""

    capabilities: frozenset[str] = PODMAN_CAPABILITIES
    seccomp: Seccomp | None = Seccomp()
    """None: containers here have no seccomp filter. Empty: one that is not known in detail."""
    no_new_privileges: bool = False
    apparmor: bool = False
    selinux: bool = False
    namespaces: frozenset[str] = NAMESPACES
    runtimes: frozenset[str] = frozenset({"crun", "runc"})
    sysctls: frozenset[tuple[str, str]] = frozenset({("net.ipv4.ping_group_range", "0 0")})
    masked: tuple[str, ...] = MASKED
    read_only: tuple[str, ...] = READ_ONLY


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount of the configuration, its options as they are."""

    destination: str
    kind: str
    source: str
    options: tuple[str, ...]

    @property
    def bind(self) -> bool:
        return self.kind == "bind" or bool({"bind", "rbind"} & set(self.options))


def want(kind: str, value: str, asks: str, default: str) -> Want:
    """A `Want` that can be shown on a terminal."""
    return Want(kind, _CONTROL.sub("?", value)[:400], _CONTROL.sub("?", asks)[:400], default)


def capability(name: str) -> str:
    """CAP_SYS_ADMIN -> SYS_ADMIN."""
    return name.upper().removeprefix("CAP_")


def of_spec(spec: dict[str, Any], profile: Profile, *, own_mounts: Iterable[Mount] = (), engine: str = "podman") -> list[Want]:
    """What an OCI runtime configuration asks for.

    Args:
        own_mounts: bind mounts that the engine itself makes, as the caller found out.

    Raises:
        ArchiveInvalid: something is not of the type that it has in a configuration.
    """
    top = fields(spec, SPEC)
    process = fields(top.get("process"), f"{SPEC}: process")
    linux = fields(top.get("linux"), f"{SPEC}: linux")
    found: list[Want] = []
    found += _process(process, profile)
    found += _namespaces(linux, profile)
    found += _seccomp(linux.get("seccomp"), profile, asked_capabilities(process))
    found += _mounts(mounts(top), set(own_mounts))
    found += _devices(linux)
    found += _paths(linux, profile)
    found += _sysctls(linux, profile)
    found += _hooks(top)
    found += _annotations(top)
    if propagation := text(linux.get("rootfspropagation"), f"{SPEC}: linux.rootfsPropagation"):
        if propagation not in ("private", "rprivate", "slave", "rslave"):
            found.append(want("setting", f"linux.rootfsPropagation={propagation}", f"mounts go to the host ({propagation})", "none do"))
    cgroup = text(linux.get("cgroupspath"), f"{SPEC}: linux.cgroupsPath")
    if ".." in cgroup.split("/") or (cgroup and not cgroup.strip("/")):
        found.append(want("cgroup", cgroup, f"the cgroup {cgroup}", "its own"))
    for known, there, where in ((_TOP, top, ""), (_PROCESS, process, "process."), (_LINUX, linux, "linux.")):
        found += [want("setting", where + key, f"{where}{key} is set", "not set") for key in sorted(there) if key not in known and there[key]]
    return found


def mounts(top: dict[str, Any]) -> list[Mount]:
    """The mounts of a configuration (its `fields`). Raises ArchiveInvalid."""
    found = []
    for item in items(top.get("mounts"), f"{SPEC}: mounts"):
        where = f"{SPEC}: a mount"
        mount = fields(item, where)
        options = tuple(option.lower() for option in texts(mount.get("options"), f"{where}'s options"))
        names = {key: text(mount.get(key), f"{where}'s {key}") for key in ("destination", "type", "source")}
        found.append(Mount(names["destination"], names["type"].lower(), names["source"], options))
        if mount.get("uidmappings") or mount.get("gidmappings"):
            found.append(Mount(names["destination"], "idmapped", names["source"], ()))
    return found


def asked_capabilities(process: dict[str, Any]) -> set[str]:
    """All that any of a configuration's sets of capabilities has, without CAP_. Raises ArchiveInvalid."""
    sets = fields(process.get("capabilities"), f"{SPEC}: process.capabilities")
    return {capability(name) for key, names in sets.items() for name in texts(names, f"{SPEC}: process.capabilities.{key}")}


def _process(process: dict[str, Any], profile: Profile) -> Iterator[Want]:
    yield from capabilities(asked_capabilities(process) - profile.capabilities)
    if profile.no_new_privileges and not flag(process.get("nonewprivileges"), f"{SPEC}: process.noNewPrivileges"):
        yield want("no_new_privs", "off", "processes may gain privileges (set-id programs)", "no_new_privs on")
    if profile.apparmor and text(process.get("apparmorprofile"), f"{SPEC}: process.apparmorProfile") in ("", "unconfined"):
        yield want("apparmor", "unconfined", "no AppArmor profile", "the engine's profile")
    if profile.selinux and not text(process.get("selinuxlabel"), f"{SPEC}: process.selinuxLabel"):
        yield want("label", "disable", "no SELinux label", "container_t")
    user = fields(process.get("user"), f"{SPEC}: process.user")
    for key in ("uid", "gid"):
        integer(user.get(key), f"{SPEC}: process.user.{key}")
    if integer(process.get("oomscoreadj"), f"{SPEC}: process.oomScoreAdj") <= -1000:
        yield want("setting", "process.oomscoreadj", "never ended when memory is short", "0")


def capabilities(names: Iterable[str], where: str = "") -> list[Want]:
    """A want for each capability."""
    return [want("cap", name, f"the capability {name}{where}", "dropped") for name in sorted(names)]


def _namespaces(linux: dict[str, Any], profile: Profile) -> Iterator[Want]:
    private: set[str] = set()
    for item in items(linux.get("namespaces"), f"{SPEC}: linux.namespaces"):
        space = fields(item, f"{SPEC}: a namespace")
        kind, path = (text(space.get(key), f"{SPEC}: a namespace's {key}") for key in ("type", "path"))
        private.add(kind.lower())
        if path and not (kind == "network" and re.fullmatch(r"/(?:var/)?run/netns/netns-[0-9a-f-]{36}", path)):
            yield want("namespace", f"{kind}={path}", f"the {kind} namespace {path}", "its own")
    for kind in sorted(profile.namespaces - private):
        yield want("namespace", kind, f"the host's {kind} namespace", "its own")
    for kind in sorted(private - NAMESPACES - {"user", "time"}):
        yield want("namespace", kind, f"a {kind} namespace, which is not known here", "none")


def _seccomp(value: object, profile: Profile, given: set[str]) -> Iterator[Want]:
    if profile.seccomp is None:
        return
    seccomp = fields(value, f"{SPEC}: linux.seccomp")
    if not seccomp:
        yield want("seccomp", "unconfined", "no seccomp filter", "the engine's filter")
        return
    if text(seccomp.get("listenerpath"), f"{SPEC}: linux.seccomp.listenerPath"):
        yield want("seccomp", "listener", "a process outside that decides about system calls", "none")
    more = _let_through(seccomp, profile.seccomp, given)
    if more:
        names = ", ".join(more[:5]) + (f" and {len(more) - 5} more" if len(more) > 5 else "")
        yield want("seccomp", "custom", f"a seccomp filter that lets through {names}", "the engine's filter")


def _let_through(seccomp: dict[str, Any], usual: Seccomp, given: set[str]) -> list[str]:
    """System calls that this filter lets through and the host's does not."""
    default = text(seccomp.get("defaultaction"), f"{SPEC}: linux.seccomp.defaultAction")
    if default not in _REFUSING:
        return ["everything"]
    more: set[str] = set()
    always = usual.always.union(*(usual.with_capability.get(name, frozenset()) for name in given))
    for names, conditions in rules(seccomp.get("syscalls"), f"{SPEC}: linux.seccomp.syscalls"):
        for name in names:
            if not usual.always:
                continue
            if name not in always and (not conditions or conditions not in usual.sometimes.get(name, frozenset())):
                more.add(name)
    return sorted(more)


def allowed_calls(linux: dict[str, Any]) -> frozenset[str]:
    """System calls that a configuration's filter (`fields` of its `linux`) lets through, with whatever arguments. Raises ArchiveInvalid."""
    seccomp = fields(linux.get("seccomp"), f"{SPEC}: linux.seccomp")
    return frozenset(name for names, _ in rules(seccomp.get("syscalls"), f"{SPEC}: linux.seccomp.syscalls") for name in names)


def rules(value: object, where: str) -> Iterator[tuple[list[str], str]]:
    """The rules of a seccomp profile that let through: names, and the conditions on arguments in one form ("" for none)."""
    for item in items(value, where):
        rule = fields(item, where)
        names = texts(rule.get("names"), where) + [name for name in [text(rule.get("name"), where)] if name]
        if text(rule.get("action"), where) in _REFUSING:
            continue
        conditions = []
        for argument in items(rule.get("args"), where):
            one = fields(argument, where)
            numbers = [integer(one.get(key), where) for key in ("index", "value", "valuetwo")]
            conditions.append(f"{numbers}{text(one.get('op'), where)}")
        yield names, " ".join(sorted(conditions))


def _mounts(found: list[Mount], own: set[Mount]) -> Iterator[Want]:
    for mount in found:
        if mount in own:
            continue
        if mount.kind == "sysfs" and not mount.bind:
            if "ro" not in mount.options:
                yield want("writable", "/sys", "/sys, writable", "read-only")
        elif mount.kind in ("cgroup", "cgroup2") and not mount.bind:
            if "ro" not in mount.options:
                yield want("writable", mount.destination, f"{mount.destination}, writable", "read-only")
        elif mount.bind or mount.kind not in _PLAIN_TYPES:
            what = mount.source if mount.source.startswith("/") else f"{mount.kind}:{mount.source}"
            how = "" if mount.bind else f", as {mount.kind} ({','.join(mount.options)})"
            yield want("mount", what, f"{mount.source} of this host at {mount.destination}{how}", "no files of the host")


def _devices(linux: dict[str, Any]) -> Iterator[Want]:
    declared: set[tuple[str, int, int]] = set()
    for item in items(linux.get("devices"), f"{SPEC}: linux.devices"):
        device = fields(item, f"{SPEC}: a device")
        path, kind = (text(device.get(key), f"{SPEC}: a device's {key}") for key in ("path", "type"))
        major, minor = (integer(device.get(key), f"{SPEC}: a device's {key}") for key in ("major", "minor"))
        if kind == "c" and (major, minor) in _USUAL_DEVICES and minor != 200:
            continue
        declared.add((kind, major, minor))
        yield want("device", path, f"the device {path} ({kind} {major}:{minor})", "none")
    resources = fields(linux.get("resources"), f"{SPEC}: linux.resources")
    for item in items(resources.get("devices"), f"{SPEC}: linux.resources.devices"):
        rule = fields(item, f"{SPEC}: a rule for devices")
        if not flag(rule.get("allow"), f"{SPEC}: a rule's allow"):
            continue
        kind, access = (text(rule.get(key), f"{SPEC}: a rule's {key}") for key in ("type", "access"))
        # -1, and none, is any.
        major, minor = (-1 if rule.get(key) is None else integer(rule[key], f"{SPEC}: a rule's {key}") for key in ("major", "minor"))
        if access == "m" or (kind == "c" and ((major, minor) in _USUAL_DEVICES or (major, minor) == (136, -1))):
            continue  # mknod without opening; terminals
        if (kind, major, minor) in declared:
            continue
        name = f"{kind or 'a'} {'*' if major < 0 else major}:{'*' if minor < 0 else minor}"
        yield want("device", name, f"access ({access or 'rwm'}) to devices {name}", "none")


def _paths(linux: dict[str, Any], profile: Profile) -> Iterator[Want]:
    hidden = ("maskedpaths", "unmask", profile.masked, "hidden")
    for key, kind, wanted, default in (hidden, ("readonlypaths", "writable", profile.read_only, "read-only")):
        there = set(texts(linux.get(key), f"{SPEC}: linux.{key}"))
        missing = [path for path in wanted if path not in there]
        if wanted and len(missing) == len(wanted):
            yield want(kind, "ALL", f"{', '.join(wanted[:3])} and others", default)
        else:
            yield from (want(kind, path, path, default) for path in missing)


def _sysctls(linux: dict[str, Any], profile: Profile) -> Iterator[Want]:
    private = {text(fields(item, f"{SPEC}: a namespace").get("type"), f"{SPEC}: a namespace") for item in linux.get("namespaces") or []}
    sysctls = linux.get("sysctl")
    if sysctls is None:
        return
    if not isinstance(sysctls, dict):
        fields(sysctls, f"{SPEC}: linux.sysctl")
        return
    for key, value in sysctls.items():
        given = text(value, f"{SPEC}: linux.sysctl.{key[:64]}")
        if (key, given) in profile.sysctls:
            continue
        own = "network" if key.startswith("net.") else "ipc"
        if _OWN_SYSCTLS.match(key) and own in private:
            continue
        yield want("sysctl", key, f"{key} = {given}", "as on this host")


def _hooks(top: dict[str, Any]) -> Iterator[Want]:
    for when, hooks in fields(top.get("hooks"), f"{SPEC}: hooks").items():
        for item in items(hooks, f"{SPEC}: hooks.{when}"):
            path = text(fields(item, f"{SPEC}: a hook").get("path"), f"{SPEC}: a hook's path")
            yield want("hook", path, f"{path} is run on this host ({when})", "none")


def _annotations(top: dict[str, Any]) -> Iterator[Want]:
    annotations = top.get("annotations")
    if annotations is not None and not isinstance(annotations, dict):
        fields(annotations, f"{SPEC}: annotations")
    for key, value in (annotations or {}).items():
        text(value, f"{SPEC}: the annotation {key[:64]}")
        if key not in _ANNOTATIONS and not key.startswith("org.opencontainers.image."):
            yield want("annotation", key, f"the annotation {key}={str(value)[:80]}", "not set")
