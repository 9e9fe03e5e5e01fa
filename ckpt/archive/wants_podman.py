"""What the `config.dump` of a podman container asks for, beside its OCI runtime configuration.

Podman takes this configuration as its own when it restores: paths that it writes on the host, commands that it runs there, namespaces
of other containers. Source of the names: podman libpod/container_config.go (4.x to 6.x).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

from ckpt.archive.layout import CONFIG
from ckpt.archive.strict_json import fields, flag, items, text, texts
from ckpt.archive.wants import Mount, Profile, Want, mounts, of_spec, want
from ckpt.errors import ArchiveInvalid

_HARMLESS: Final = frozenset("""
    spec id name lockid createcommand rawimagename namespace rootfsimageid rootfsimagename shmsize shmsizesystemd namedvolumes createworkingdir
    volatile passwd user groups groupentry passwdentry addcurrentuserpasswdentry hostusers label_nested processlabel mountlabel createnetns
    staticip staticmac portmappings newportmappings exposedports useimageresolvconf dnsserver dnssearch dnsoption useimagehosts useimagehostname
    hostsadd networks newnetworks orderednetworks network_options networkaliases network_alises uservolumes entrypoint command stdin labels stopsignal
    stoptimeout timeout createdtime cgroupmanager cgroupsmode kubeexitcodepropagation logtag logsize postconfigurenetns restart_policy
    restart_retries isinfra isservice systemd healthcheck startuphealthcheck healthcheck_on_failure_action healthmaxlogcount healthmaxlogsize
    sdnotifymode timezone umask readwritetmpfs autoremove autoremoveimage pause cgroupns image_volume_type
    checkpointedtime restoredtime restored rootfsimage rootfsimageref runtime stubid engine
""".split())  # fmt: skip
"""Settings that stay within the container, or that podman sets anew at a restore."""

_OWN_PATHS: Final = {
    "staticdir": "", "shmdir": "shm", "secretspath": "secrets", "logpath": "ctr.log", "conmonpidfile": "conmon.pid", "pid_file": "pidfile",
}  # fmt: skip
_OWN_MOUNTS: Final = {
    "/etc/resolv.conf": "resolv.conf", "/etc/hosts": "hosts", "/etc/hostname": "hostname", "/run/.containerenv": ".containerenv", "/dev/shm": "shm",
    "/etc/passwd": "passwd", "/etc/group": "group", "/run/secrets": "run/secrets", "/var/run/.containerenv": ".containerenv",
}  # fmt: skip
_ID: Final = re.compile(r"[0-9a-f]{64}\Z")
_LOG_DRIVERS: Final = ("", "k8s-file", "json-file", "journald", "none", "passthrough")
_MODES: Final = ("", "bridge", "private", "default", "none", "pasta", "slirp4netns", "pod")
_PARENTS: Final = ("", "/libpod_parent", "libpod_parent", "machine.slice", "/machine.slice", "user.slice", "/user.slice")


def of_podman(config: dict[str, Any], spec: dict[str, Any], profile: Profile, *, taken: bool = False) -> list[Want]:
    """What a podman checkpoint asks for: `spec.dump`, `config.dump`, and the configuration that is in the latter.

    Args:
        taken: a container of this id is here already, so that files below its directory are not the checkpoint's own.

    Raises:
        ArchiveInvalid: something is not of the type that it has in a configuration.
    """
    top = fields(config, CONFIG)
    identity = text(top.get("id"), f"{CONFIG}: id")
    if not _ID.match(identity):
        raise ArchiveInvalid(f"{CONFIG} has no valid container id")
    own = _Own("" if taken else identity, top)
    found: dict[tuple[str, str], Want] = {}
    inner = fields(top.get("spec"), f"{CONFIG}: spec")
    # The one in config.dump is podman's own draft: its namespaces and masks are the same, sources of its mounts may be missing there.
    for one in (spec, inner) if inner else (spec,):
        mine = [mount for mount in mounts(fields(one, "spec.dump")) if own.mount(mount)]
        for item in of_spec(one, profile, own_mounts=mine):
            found.setdefault((item.kind, item.value), item)
    for item in _settings(top, own, profile):
        found.setdefault((item.kind, item.value), item)
    return list(found.values())


class _Own:
    """Paths that podman makes for this one container, wherever its storage is."""

    def __init__(self, identity: str, top: dict[str, Any]) -> None:
        self._below = re.compile(rf"/(?:[\w.@+-]+/)*overlay-containers/{identity}/userdata(?:/(.*))?") if identity else None
        self._volumes: dict[str, str] = {}
        for item in items(top.get("namedvolumes"), f"{CONFIG}: namedVolumes"):
            volume = fields(item, f"{CONFIG}: a volume")
            texts(volume.get("options"), f"{CONFIG}: a volume's options")
            self._volumes[text(volume.get("dest"), f"{CONFIG}: a volume's dest")] = text(volume.get("volumename"), f"{CONFIG}: a volume's name")

    def path(self, path: str, leaf: str) -> bool:
        """Whether this is the container's own file `leaf` ("" its directory)."""
        match = self._below.fullmatch(path) if self._below and "/../" not in path and "/./" not in path else None
        return bool(match) and (match[1] or "") == leaf if match else False

    def mount(self, mount: Mount) -> bool:
        """Whether podman makes this mount, and at a restore from its own directories."""
        if not mount.bind:
            return False
        leaf = _OWN_MOUNTS.get(mount.destination)
        if leaf is not None and self.path(mount.source, leaf):
            return True
        name = self._volumes.get(mount.destination, "")
        own = re.fullmatch(rf"/(?:[\w.@+-]+/)*volumes/{re.escape(name)}/_data", mount.source)
        return bool(name) and own is not None and "/../" not in mount.source


def _settings(top: dict[str, Any], own: _Own, profile: Profile) -> Iterator[Want]:
    if flag(top.get("privileged"), f"{CONFIG}: privileged"):
        yield want("privileged", "on", "a privileged container", "not privileged")
    if flag(top.get("mountalldevices"), f"{CONFIG}: mountAllDevices"):
        yield want("device", "ALL", "all devices of this host", "none")
    if rootfs := text(top.get("rootfs"), f"{CONFIG}: rootfs"):
        yield want("rootfs", rootfs, f"{rootfs} of this host as its root file system", "a container image")
    runtime = text(top.get("runtime"), f"{CONFIG}: runtime")
    if runtime and runtime not in profile.runtimes:
        yield want("runtime", runtime, f"the runtime {runtime}", ", ".join(sorted(profile.runtimes)))
    for key, leaf in _OWN_PATHS.items():
        path = text(top.get(key), f"{CONFIG}: {key}")
        if path and not own.path(path, leaf):
            yield want("path", f"{key}={path}", f"{path} of this host ({key})", "its own directory")
    for path in texts(top.get("mounts"), f"{CONFIG}: mounts"):
        if not own.path(path, "shm"):
            yield want("path", f"mounts={path}", f"{path} of this host, unmounted at its end", "its own directory")
    for key in ("ipcnsctr", "mountnsctr", "netnsctr", "pidnsctr", "usernsctr", "utsnsctr", "cgroupnsctr", "pod"):
        if other := text(top.get(key), f"{CONFIG}: {key}"):
            owner = "the pod" if key == "pod" else "the container"
            yield want("namespace", f"{key}={other[:12]}", f"what belongs to {owner} {other[:12]}", "its own")
    mode = text(top.get("networkmode"), f"{CONFIG}: networkMode")
    if mode.partition(":")[0] not in _MODES and mode != "host":  # for "host" there is no namespace in the configuration
        yield want("namespace", f"network={mode}", f"the network {mode}", "its own")
    driver = text(top.get("logdriver"), f"{CONFIG}: logDriver")
    if driver not in _LOG_DRIVERS:
        yield want("setting", f"logDriver={driver}", f"the log driver {driver}", "this host's")
    if (health := text(top.get("healthlogdestination"), f"{CONFIG}: healthLogDestination")) not in ("", "local", "events_logger"):
        yield want("path", f"healthlogdestination={health}", f"{health} of this host, for the log of its health checks", "its own directory")
    parent = text(top.get("cgroupparent"), f"{CONFIG}: cgroupParent")
    if parent not in _PARENTS:
        yield want("cgroup", parent, f"the cgroup {parent}", "podman's")
    mappings = fields(top.get("idmappingsoptions"), f"{CONFIG}: idMappingsOptions")
    for key in ("uidmap", "gidmap"):
        items(mappings.get(key), f"{CONFIG}: {key}")
    labels = texts(top.get("labelopts"), f"{CONFIG}: labelopts")
    if profile.selinux and "disable" in labels:
        yield want("label", "disable", "no SELinux label", "container_t")
    for key, kind, what in (("overlayvolumes", "mount", "source"), ("cdidevices", "device", ""), ("device_host_src", "device", "path")):
        for item in items(top.get(key), f"{CONFIG}: {key}"):
            value = item if isinstance(item, str) else text(fields(item, f"{CONFIG}: {key}").get(what), f"{CONFIG}: {key}")
            yield want(kind, value, f"{value} of this host ({key})", "none")
    special = {
        "rootfs", "privileged", "mountalldevices", "mounts", "networkmode", "logdriver", "healthlogdestination", "cgroupparent", "idmappingsoptions",
        "labelopts", "overlayvolumes", "cdidevices", "device_host_src", "pod", *_OWN_PATHS,
        "ipcnsctr", "mountnsctr", "netnsctr", "pidnsctr", "usernsctr", "utsnsctr", "cgroupnsctr",
    }  # fmt: skip
    for key, value in sorted(top.items()):
        if value and key not in _HARMLESS and key not in special:
            yield want("setting", key, f"podman's setting {key}", "not set")


def volume_names(config: dict[str, Any]) -> list[str]:
    """The named volumes that podman will mount. Raises ArchiveInvalid."""
    found = []
    for item in items(fields(config, CONFIG).get("namedvolumes"), f"{CONFIG}: namedVolumes"):
        if name := text(fields(item, f"{CONFIG}: a volume").get("volumename"), f"{CONFIG}: a volume's name"):
            found.append(name)
    return found
