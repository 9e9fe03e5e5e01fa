"""Attacks with what engines read: config.dump, spec.dump, network.status, deleted.files; and with what a checkpoint asks for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.corpus.attack import INVALID, MISMATCH, POLICY, attack, register
from tests.corpus.base import CONTAINER, archive, config, foreign, members, spec

SCHEMA, DEPTH = "schema of the small members", "bombs in JSON"


def with_member(name: str, data: bytes) -> bytes:
    found = members()
    found[name] = data
    return foreign(found)


for _name, _member, _data in (
    ("an escape", "deleted.files", b'["../../../tmp/victim"]'), ("an absolute escape", "deleted.files", b'["/../../tmp/victim"]'),
    ("an escape in the middle", "deleted.files", b'["/a/../../b"]'), ("the root", "deleted.files", b'["/"]'), ("dots", "deleted.files", b'["/./."]'),
    ("a relative path", "deleted.files", b'["etc/motd"]'), ("an empty path", "deleted.files", b'[""]'), ("a NUL", "deleted.files", b'["/a\\u0000b"]'),
    ("numbers", "deleted.files", b"[1, 2]"), ("an object", "deleted.files", b'{"/x": 1}'), ("no JSON", "deleted.files", b"/etc/passwd\n"),
    ("a long path", "deleted.files", json.dumps(["/" + "x" * 5000]).encode()), ("many paths", "deleted.files", json.dumps(["/x"] * 200_001).encode()),
):  # fmt: skip
    register(f"{_member} with {_name}", "podman #27977", "import", partial(with_member, _member, _data))
for _name, _member, _data in (
    ("a list", "network.status", b"[1]"), ("no address", "network.status", b'{"n": {"interfaces": {"e": {"subnets": [{"ipnet": "; reboot"}]}}}}'),
    ("a path for an interface", "network.status", b'{"n": {"interfaces": {"../../x": {}}}}'),
    ("a list of interfaces", "network.status", b'{"n": {"interfaces": [1]}}'), ("a number for a MAC", "network.status",
                                                                                b'{"n": {"interfaces": {"e": {"mac_address": 7}}}}'),
    ("no JSON", "config.dump", b"nope"), ("a list", "config.dump", b"[]"), ("a key twice", "config.dump", b'{"id": "x", "id": "' + b"c" * 64 + b'"}'),
    ("a key twice in case", "config.dump", json.dumps({**config(), "ID": "x"}).encode()), ("NaN", "config.dump", b'{"id": NaN}'),
    ("a number for its id", "config.dump", b'{"id": 7}'), ("a path for its id", "config.dump", b'{"id": "../../x"}'),
    ("no id", "config.dump", b"{}"), ("UTF-16", "config.dump", '{"id": "x"}'.encode("utf-16")),
    ("a byte that is no UTF-8", "config.dump", b'{"id": "\xff"}'),
    ("depth", "config.dump", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ("depth of objects", "spec.dump", b'{"a":' * 5000 + b"1" + b"}" * 5000),
    ("a string without end", "spec.dump", b'{"a": "' + b'\\"' * 500_000), ("many values", "spec.dump", b'{"a": [' + b"1," * 600_000 + b"1]}"),
    ("a number without end", "spec.dump", b'{"a": ' + b"9" * 100_000 + b"}"), ("an infinite number", "spec.dump", b'{"a": 1e999}'),
    ("a list for its process", "spec.dump", b'{"process": []}'), ("text for its mounts", "spec.dump", b'{"mounts": "/:/"}'),
    ("a number for a mount's source", "spec.dump", b'{"mounts": [{"source": 1}]}'), ("an object for capabilities", "spec.dump",
                                                                                  b'{"process": {"capabilities": {"bounding": {"CAP_X": 1}}}}'),
    ("a key twice, deep", "spec.dump", b'{"process": {"noNewPrivileges": true, "noNewPrivileges": false}}'),
    ("a key twice in case, deep", "spec.dump", b'{"process": {"noNewPrivileges": true, "NoNewPrivileges": false}}'),
    ("a key twice by the Kelvin sign", "spec.dump", '{"hoo\u212as": {}, "hooks": {}}'.encode()), ("text for a number", "spec.dump",
                                                                                      b'{"process": {"user": {"uid": "0"}}}'),
):  # fmt: skip
    register(f"{_member} with {_name}", DEPTH if "depth" in _name or "end" in _name else SCHEMA, "import", partial(with_member, _member, _data))


# What it asks for


def asking(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> bytes:
    """An archive of ours whose configuration was changed, in both of its places; all digests are right."""
    configuration, runtime = copy.deepcopy(config()), copy.deepcopy(spec())
    change(configuration, runtime)
    if configuration["spec"] is not None:
        configuration["spec"] = runtime
    found = members()
    found["config.dump"], found["spec.dump"] = json.dumps(configuration).encode(), json.dumps(runtime).encode()
    return archive(found)


def _set(*path: str | int, to: Any, of: str = "spec") -> Callable[[dict[str, Any], dict[str, Any]], object]:
    def change(configuration: dict[str, Any], runtime: dict[str, Any]) -> None:
        at: Any = runtime if of == "spec" else configuration
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = to

    return change


def _add(*path: str, item: Any) -> Callable[[dict[str, Any], dict[str, Any]], object]:
    def change(configuration: dict[str, Any], runtime: dict[str, Any]) -> None:
        at: Any = runtime
        for step in path[:-1]:
            at = at[step]
        at.setdefault(path[-1], [])
        at[path[-1]] = [*at[path[-1]], item]

    return change


RUNTIME, KEPT, MOUNTS, CDI, TAGS = ("CVE-2026-94603 privileged by annotation or runtime", "CVE-2026-92574/-95837 kept privileges",
                                    "CVE-2024-8676 mounts of the archive", "CVE-2026-53492 devices smuggled", "CVE-2026-50195 tags")  # fmt: skip
BIND = {"destination": "/x", "type": "bind", "source": "/", "options": ["rbind"]}
for _name, _why, _change in (
    ("a capability", KEPT, _add("process", "capabilities", "bounding", item="CAP_SYS_ADMIN")),
    ("an ambient capability", KEPT, _set("process", "capabilities", "ambient", to=["CAP_NET_ADMIN"])),
    ("a capability in lower case", KEPT, _add("process", "capabilities", "effective", item="cap_sys_module")),
    ("a set of capabilities by another name", KEPT, _set("process", "capabilities", "Bounding2", to=["CAP_SYS_PTRACE"])),
    ("capabilities, in another case", KEPT,
     lambda c, s: s["process"].update(Capabilities=dict(bounding=["CAP_BPF"])) or s["process"].pop("capabilities")),
    ("no seccomp filter", KEPT, _set("linux", "seccomp", to=None)),
    ("a seccomp filter that lets all through", KEPT, _set("linux", "seccomp", "defaultAction", to="SCMP_ACT_ALLOW")),
    ("a seccomp filter that only logs", KEPT, _set("linux", "seccomp", "defaultAction", to="SCMP_ACT_LOG")),
    ("a system call more", KEPT, _add("linux", "seccomp", "syscalls", item={"names": ["kexec_load"], "action": "SCMP_ACT_ALLOW"})),
    ("a system call by its old field", KEPT, _add("linux", "seccomp", "syscalls", item={"name": "bpf", "action": "SCMP_ACT_TRACE"})),
    ("a seccomp listener", KEPT, _set("linux", "seccomp", "listenerPath", to="/run/x.sock")),
    ("privileged", RUNTIME, _set("privileged", to=True, of="config")),
    ("privileged, in another case", RUNTIME, lambda c, s: c.update(PRIVILEGED=True) or c.pop("privileged")),
    ("a runtime by its path", RUNTIME, _set("runtime", to="/tmp/evil", of="config")),
    ("another runtime", RUNTIME, _set("runtime", to="kata", of="config")),
    ("the annotation of a runtime", RUNTIME, _set("annotations", "io.podman.annotations.checkpoint.runtime.name", to="x")),
    ("the annotation of a handler", RUNTIME, _set("annotations", "run.oci.handler", to="krun")),
    ("the annotation of a hook", RUNTIME, _set("annotations", "run.oci.hooks.stdout", to="/etc/cron.d/x")),
    ("the annotation of CRIU's configuration", RUNTIME, _set("annotations", "org.criu.config", to="/tmp/x")),
    ("the annotation of a systemd property", RUNTIME, _set("annotations", "org.systemd.property.DeviceAllow", to="x")),
    ("the annotation of a file that is removed", RUNTIME, _set("annotations", "io.podman.annotations.cid-file", to="/etc/passwd")),
    ("a CDI annotation", CDI, _set("annotations", "cdi.k8s.io/x", to="vendor.com/gpu=all")),
    ("a CDI device", CDI, _set("cdiDevices", to=["vendor.com/gpu=all"], of="config")),
    ("a device", CDI, _add("linux", "devices", item={"path": "/dev/sda", "type": "b", "major": 8, "minor": 0})),
    ("a device of the host", CDI, _set("device_host_src", to=[{"path": "/dev/sda"}], of="config")),
    ("all devices", CDI, _set("mountAllDevices", to=True, of="config")),
    ("access to all devices", CDI, _add("linux", "resources", "devices", item={"allow": True, "access": "rwm"})),
    ("access to a disk", CDI, _add("linux", "resources", "devices", item={"allow": True, "type": "b", "major": 8, "minor": 0, "access": "rw"})),
    ("access to all of one kind", CDI, _add("linux", "resources", "devices", item={"allow": True, "type": "b", "major": -1, "access": "r"})),
    ("a network device", CDI, _set("linux", "netDevices", to={"eth0": {}})),
    ("the root of the host", MOUNTS, _add("mounts", item=BIND)),
    ("a bind mount by its option", MOUNTS, _add("mounts", item=BIND | {"type": "none"})),
    ("a bind mount in another case", MOUNTS, _add("mounts", item={"Destination": "/x", "Type": "BIND", "Source": "/etc", "Options": ["ro"]})),
    ("a disk", MOUNTS, _add("mounts", item={"destination": "/x", "type": "ext4", "source": "/dev/sda1"})),
    ("an overlay of the host", MOUNTS, _add("mounts", item={"destination": "/x", "type": "overlay", "source": "o", "options": ["lowerdir=/"]})),
    ("the files of another container", MOUNTS, _add("mounts", item=BIND | {"destination": "/etc/hosts",
     "source": f"/run/containers/storage/overlay-containers/{'e' * 64}/userdata/hosts"})),
    ("another file of its own directory", MOUNTS, _add("mounts", item=BIND | {"destination": "/etc/hosts",
     "source": f"/run/containers/storage/overlay-containers/{CONTAINER}/userdata/../../../../../../etc/shadow"})),
    ("a volume by a path that only looks like one", MOUNTS, lambda c, s: s["mounts"][3].update(source="/etc/volumes/data/../x/_data")),
    ("a volume of another name", MOUNTS, lambda c, s: s["mounts"][3].update(source="/var/lib/containers/storage/volumes/victim/_data")),
    ("a writable /sys", MOUNTS, lambda c, s: s["mounts"][1].update(options=["rw"])),
    ("a writable cgroup file system", MOUNTS, lambda c, s: s["mounts"][6].update(options=["rw"])),
    ("a root file system of the host", MOUNTS, _set("rootfs", to="/", of="config")),
    ("overlay volumes", MOUNTS, _set("overlayVolumes", to=[{"dest": "/x", "source": "/etc"}], of="config")),
    ("secrets", MOUNTS, _set("secrets", to=[{"name": "tls"}], of="config")),
    ("the host's processes", KEPT, _set("linux", "namespaces", to=[{"type": k} for k in ("ipc", "uts", "mount", "cgroup", "network")])),
    ("no namespace at all", KEPT, _set("linux", "namespaces", to=[])),
    ("the network of another process", KEPT, lambda c, s: s["linux"]["namespaces"][5].update(path="/proc/1/ns/net")),
    ("a mount namespace by its path", KEPT, lambda c, s: s["linux"]["namespaces"][3].update(path="/proc/1/ns/mnt")),
    ("the network of another container", KEPT, _set("netNsCtr", to="e" * 64, of="config")),
    ("a pod", KEPT, _set("pod", to="e" * 64, of="config")),
    ("nothing masked", KEPT, _set("linux", "maskedPaths", to=[])),
    ("/proc/kcore", KEPT, lambda c, s: s["linux"]["maskedPaths"].remove("/proc/kcore")),
    ("a writable /proc/sys", KEPT, lambda c, s: s["linux"]["readonlyPaths"].remove("/proc/sys")),
    ("a sysctl of the host", KEPT, _set("linux", "sysctl", "kernel.core_pattern", to="|/tmp/x")),
    ("a hook", RUNTIME, _set("hooks", to={"prestart": [{"path": "/bin/sh", "args": ["sh", "-c", "reboot"]}]})),
    ("a hook, in another case", RUNTIME, _set("Hooks", to={"createRuntime": [{"Path": "/bin/sh"}]})),
    ("a command at its end", RUNTIME, _set("exitCommand", to=["/bin/sh", "-c", "reboot"], of="config")),
    ("a log in /etc", RUNTIME, _set("logPath", to="/etc/cron.d/x", of="config")),
    ("a log of health checks in /etc", RUNTIME, _set("healthLogDestination", to="/etc/cron.d", of="config")),
    ("a pid file in /etc", RUNTIME, _set("conmonPidFile", to="/etc/ld.so.preload", of="config")),
    ("a directory of its own in /", RUNTIME, _set("staticDir", to="/", of="config")),
    ("a mount of its own in /", RUNTIME, _set("mounts", to=["/"], of="config")),
    ("a cgroup of the system", KEPT, _set("cgroupParent", to="/system.slice", of="config")),
    ("a cgroup outside", KEPT, _set("linux", "cgroupsPath", to="/../../x")),
    ("mounts that go to the host", MOUNTS, _set("linux", "rootfsPropagation", to="rshared")),
    ("a setting that nobody knows", RUNTIME, _set("linux", "memoryPolicy2", to={"x": 1})),
    ("a setting of podman that nobody knows", RUNTIME, _set("futureThing", to=["x"], of="config")),
    ("a virtual machine", RUNTIME, _set("vm", to={"hypervisor": {"path": "/tmp/x"}})),
    ("a socket of systemd", RUNTIME, _set("sdnotifySocket", to="/run/x", of="config")),
):  # fmt: skip
    register(f"asks for {_name}", _why, "restore", partial(asking, _change))

for _name, _change in (
    ("another container image than the manifest's", _set("rootfsImageID", to="e" * 64, of="config")),
    ("a container image by its name only", lambda c, s: c.pop("rootfsImageID")),
    ("a container image and no id", lambda c, s: c.update(rootfsImageID="", rootfsImageName="docker.io/library/evil:latest")),
):
    register(f"names {_name}", TAGS, "restore", partial(asking, _change), INVALID, MISMATCH)


@attack("asks only in the draft that is in config.dump", RUNTIME, "restore")
def only_inside() -> bytes:
    configuration = config()
    configuration["spec"]["mounts"].append(BIND)
    found = members()
    found["config.dump"] = json.dumps(configuration).encode()
    return archive(found)


@attack("asks for a volume that is here", MOUNTS, "restore", POLICY)
def volume_here() -> bytes:
    configuration = config()
    configuration["namedVolumes"].append({"volumeName": "victim", "dest": "/v", "options": []})
    found = members()
    found["config.dump"] = json.dumps(configuration).encode()
    return archive(found)


@attack("a process tree of the host itself", KEPT, "restore")
def process_tree() -> bytes:
    return archive(members(), engine="process")
