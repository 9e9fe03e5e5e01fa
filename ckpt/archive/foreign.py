"""A manifest for an archive that ckpt did not write, made up from what podman, CRI-O or containerd left in it."""

from __future__ import annotations

import calendar
import dataclasses
import hashlib
import re
import time
from pathlib import Path
from typing import Any, Final

from ckpt.archive.layout import CONFIG, INVENTORY, NETWORK_STATUS, SPEC, stage_members
from ckpt.archive.manifest import MAX_BYTES, is_volume_name, json_object
from ckpt.errors import ArchiveInvalid
from ckpt.model import ContainerImage, HostMount, Manifest, PortMapping

_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,254}\Z")
_TIME: Final = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(\.\d+)?(Z|([+-])(\d\d):(\d\d))\Z")


def foreign_manifest(stage: Path, *, bulk: dict[str, int] | None = None) -> Manifest:
    """Make up the manifest of an unpacked archive without one of ours. What podman does not tell stays at its default.

    Args:
        bulk: sizes of members that are elsewhere.

    Raises:
        ArchiveInvalid: config.dump or spec.dump is missing, not JSON, or names no container.
    """
    members = [name for name in stage_members(stage) if not name.endswith("/")]
    size_bytes = sum((stage / name).stat().st_size for name in members) + sum((bulk or {}).values())
    members += bulk or {}
    inventory = stage / INVENTORY
    when_s = inventory.stat().st_mtime if inventory.exists() else 0.0
    config, network, spec = (_read(stage / name) for name in (CONFIG, NETWORK_STATUS, SPEC))
    manifest = made_up(config, network, spec, size_bytes=size_bytes, members=tuple(members), unique=_read(inventory))
    return manifest if manifest.created_s else dataclasses.replace(manifest, created_s=when_s)


def made_up(
    config_data: bytes, network_data: bytes, spec_data: bytes, *, size_bytes: int, members: tuple[str, ...] = (), unique: bytes = b""
) -> Manifest:
    """`foreign_manifest` from the members' bytes. `unique` (the inventory) makes the id of one dump differ from the next."""
    config, spec = json_object(config_data, CONFIG), json_object(spec_data, SPEC)
    container_id, name = _text(config.get("id")), _text(config.get("name"))
    annotations = _dict(spec.get("annotations"))
    writer = {"libpod": "podman", "cri-o": "cri-o"}.get(_text(annotations.get("io.container.manager")))
    if writer is None:
        writer = "podman" if "rootfsImageID" in config or "newNetworks" in config else "containerd"
    if not _NAME.match(container_id):
        raise ArchiveInvalid(f"{CONFIG} has no valid container id")
    if not _NAME.match(name):
        name = container_id[:12]
    image_id = _text(config.get("rootfsImageID")) or _text(config.get("rootfsImageRef")).rpartition("@")[2]
    image_name = _text(config.get("rootfsImageName"))
    process = _dict(spec.get("process"))
    addresses = _addresses(network_data)
    return Manifest(
        id=hashlib.sha256(config_data + b"\0" + unique).hexdigest(),
        name=name,
        engine="podman" if writer == "podman" else "cri",
        container_id=container_id,
        created_s=_seconds(config.get("checkpointedTime")),
        runtime=_text(config.get("runtime")) or None,
        container_image=ContainerImage(image_id.removeprefix("sha256:"), image_name) if image_id or image_name else None,
        shell_job=process.get("terminal") is True,
        volumes=_volumes(config, members),
        networks=_networks(config),
        addresses=addresses,
        ports=_ports(config),
        host_mounts=_host_mounts(config, spec),
        size_bytes=size_bytes,
        foreign=writer,
    )


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError:
        return b""


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 4096 or any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in value):
        return ""
    return value


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)][:10_000] if isinstance(value, list) else []


def _number(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 65535 else 0


def _seconds(value: Any) -> float:
    match = _TIME.match(_text(value))
    if not match:
        return 0.0
    try:
        seconds = float(calendar.timegm(time.strptime(match[1], "%Y-%m-%dT%H:%M:%S")))
    except ValueError:
        return 0.0
    shift = (int(match[5]) * 3600 + int(match[6]) * 60) * (-1 if match[4] == "-" else 1) if match[4] else 0
    return max(0.0, seconds - shift + float((match[2] or ".0")[:10]))


def _volumes(config: dict[str, Any], members: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    found = []
    for item in _dicts(config.get("namedVolumes")):
        name, destination = _text(item.get("volumeName")), _text(item.get("dest"))
        if is_volume_name(name) and f"volumes/{name}.tar" in members:
            found.append((name, destination))
    return tuple(found)


def _networks(config: dict[str, Any]) -> tuple[str, ...]:
    """Podman 6 has `orderedNetworks` (a list), 4 and 5 `newNetworks` (an object), older ones `networks` (a list of names)."""
    names: list[str] = []
    for item in _dicts(config.get("orderedNetworks")):
        names.append(_text(item.get("name")) or _text(item.get("networkName")) or _text(item.get("Name")))
    names += [_text(name) for name in _dict(config.get("newNetworks"))]
    if isinstance(old := config.get("networks"), list):
        names += [_text(name) for name in old]
    return tuple(name for name in dict.fromkeys(names) if _NAME.match(name))


def _ports(config: dict[str, Any]) -> tuple[PortMapping, ...]:
    found = []
    for item in _dicts(config.get("newPortMappings")) + _dicts(config.get("portMappings")):
        container, host = (_number(item.get(a) or item.get(b)) for a, b in (("container_port", "containerPort"), ("host_port", "hostPort")))
        address = _text(item.get("host_ip") or item.get("hostIP"))
        span = max(1, min(_number(item.get("range")) or 1, 65536 - max(container, host)))
        for protocol in (_text(item.get("protocol")) or "tcp").split(","):
            found += [PortMapping(address, host + n if host else 0, container + n, protocol) for n in range(span if container else 0)]
    return tuple(found[:65536])


def _host_mounts(config: dict[str, Any], spec: dict[str, Any]) -> tuple[HostMount, ...]:
    """Bind mounts that the user asked for: podman's own (resolv.conf, hosts, shm, ...) lie in the container's own directories."""
    own = {_text(value) for key in ("staticDir", "ShmDir") if (value := config.get(key))} | {"/etc/resolv.conf", "/etc/hosts", "/etc/hostname"}
    wanted = config.get("userVolumes")
    named = {_text(item.get("dest")) for item in _dicts(config.get("namedVolumes"))}
    found = []
    for mount in _dicts(spec.get("mounts")):
        source, destination = _text(mount.get("source")), _text(mount.get("destination"))
        if mount.get("type") != "bind" or not source.startswith("/") or not destination or destination in named or destination in own:
            continue
        if isinstance(wanted, list) and destination not in wanted:
            continue
        if any(source == path or source.startswith(path.rstrip("/") + "/") for path in own if path):
            continue
        if not isinstance(wanted, list) and _text(config.get("id")) and _text(config.get("id")) in source:
            continue
        found.append(HostMount(source, destination))
    return tuple(found)


def _addresses(network_data: bytes) -> tuple[str, ...]:
    """Container addresses of network.status: {"NET": {"interfaces": {"eth0": {"subnets": [{"ipnet": "10.88.0.9/16"}]}}}}."""
    if network_data.strip() in (b"", b"null"):
        return ()
    found = []
    for network in json_object(network_data, NETWORK_STATUS).values():
        for interface in _dict(_dict(network).get("interfaces")).values():
            for subnet in _dicts(_dict(interface).get("subnets")):
                if address := _text(subnet.get("ipnet")).partition("/")[0]:
                    found.append(address)
    return tuple(found)
