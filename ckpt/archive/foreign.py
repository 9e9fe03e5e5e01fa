"""A manifest for an archive that ckpt did not write, made up from what podman, CRI-O or containerd left in it."""

from __future__ import annotations

import calendar
import dataclasses
import hashlib
import json
import os
import re
import tarfile
import time
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from ckpt.archive.codec import Stream, open_stream
from ckpt.archive.layout import CONFIG, DELETED_FILES, INVENTORY, NETWORK_STATUS, ROOTFS_DIFF, SPEC, stage_members
from ckpt.archive.manifest import MAX_BYTES, is_volume_name, json_object
from ckpt.errors import ArchiveInvalid
from ckpt.model import ContainerImage, HostMount, Manifest, PortMapping

_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]{0,254}\Z")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
_WHITEOUT: Final = ".wh."
_OPAQUE: Final = ".wh..wh..opq"
_FILES_CAP: Final = 5_000_000
_RATIO_CAP, _RATIO_FLOOR_BYTES = 1000, 32 << 30
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
    image_name, container_image = _text(config.get("rootfsImageName")), None
    digest = _text(config.get("rootfsImageRef")).rpartition("@")[2]
    if image_id or image_name:
        container_image = ContainerImage(image_id.removeprefix("sha256:"), image_name, digest if _DIGEST.match(digest) else "")
    process = _dict(spec.get("process"))
    addresses = _addresses(network_data)
    return Manifest(
        id=hashlib.sha256(config_data + b"\0" + unique).hexdigest(),
        name=name,
        engine="podman" if writer == "podman" else "cri",
        container_id=container_id,
        created_s=_seconds(config.get("checkpointedTime")),
        runtime=_text(config.get("runtime")) or None,
        container_image=container_image,
        shell_job=process.get("terminal") is True,
        volumes=_volumes(config, members),
        networks=_networks(config),
        addresses=addresses,
        ports=_ports(config),
        host_mounts=_host_mounts(config, spec),
        size_bytes=size_bytes,
        foreign=writer,
    )


def convert(stage: Path) -> None:
    """Bring what another program unpacked into `stage` into the layout of podman: a plain rootfs-diff.tar, and deleted.files.

    containerd has a compressed layer of a container image there, in which files named ".wh.NAME" say that NAME is deleted, and ".wh..wh..opq"
    that the directory hides what is below it (OCI image-spec, layer.md). Deletions are done before the tar is unpacked, so an opaque directory
    is a deleted one.

    Raises:
        ArchiveInvalid: the layer is damaged, or too much comes out of it.
        OSError: the disk is full.
    """
    source = stage / ROOTFS_DIFF
    if not source.is_file():
        return
    with source.open("rb") as file:
        if file.read(2) != b"\x1f\x8b" and not _has_whiteouts(source):
            return
    known = deleted_files(_read(stage / DELETED_FILES)) if (stage / DELETED_FILES).exists() else []
    made = stage / f".{ROOTFS_DIFF}.new"
    fd = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as out:
        deleted = _without_whiteouts(source, out)
    os.rename(made, source)
    data = json.dumps(list(dict.fromkeys([*known, *deleted]))).encode()
    fd = os.open(stage / DELETED_FILES, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as out:
        out.write(data)


def _has_whiteouts(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:") as tar:
            return any(member.name.rpartition("/")[2].startswith(_WHITEOUT) for member in tar)
    except (tarfile.TarError, ValueError, EOFError):
        return False  # whoever applies it says what is wrong


def _without_whiteouts(path: Path, out: BinaryIO) -> list[str]:
    """Copy a layer, uncompressed, without its whiteouts; returns what they delete."""
    deleted: list[str] = []
    try:
        with (
            path.open("rb") as file,
            tarfile.open(fileobj=cast(Any, _Limited(open_stream(file))), mode="r|", errors="surrogateescape") as source,
            tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, errors="surrogateescape") as target,
        ):
            for count, member in enumerate(source):
                if count > _FILES_CAP:
                    raise ArchiveInvalid(f"{ROOTFS_DIFF} has more than {_FILES_CAP} files")
                if member.issparse():
                    raise ArchiveInvalid(f"{ROOTFS_DIFF} has a sparse file in it, no layer of a container image has one")
                folder, _, leaf = member.name.removeprefix("./").rpartition("/")
                place = f"/{folder}/".replace("//", "/")
                if leaf == _OPAQUE:
                    if place != "/":
                        deleted.append(place.rstrip("/"))
                elif leaf.startswith(_WHITEOUT):
                    if not leaf.startswith(_WHITEOUT * 2):  # aufs' own
                        deleted.append(place + leaf.removeprefix(_WHITEOUT))
                else:
                    target.addfile(member, source.extractfile(member) if member.isreg() else None)
                cast(Any, source).members = []  # they keep every header otherwise
                cast(Any, target).members = []
    except (tarfile.TarError, EOFError, ValueError, UnicodeError) as error:
        raise ArchiveInvalid(f"{ROOTFS_DIFF} is damaged: {error}") from None
    return deleted_files(json.dumps(deleted).encode())


class _Limited:
    """A stream that ends with ArchiveInvalid when far more comes out of it than went in."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def read(self, size: int) -> bytes:
        if self._stream.count > _RATIO_FLOOR_BYTES and self._stream.count > _RATIO_CAP * self._stream.raw.count:
            raise ArchiveInvalid(f"{ROOTFS_DIFF} unpacks to more than {_RATIO_CAP} times its size", hint="it looks like a zip bomb")
        return self._stream.read(size)


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


def deleted_files(data: bytes) -> list[str]:
    """The paths of a `deleted.files` member: absolute, in the container.

    Raises:
        ArchiveInvalid: not JSON, not a list, or a path that is none.
    """
    if len(data) > MAX_BYTES:
        raise ArchiveInvalid(f"{DELETED_FILES} is larger than {MAX_BYTES >> 20} MiB")
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ArchiveInvalid(f"{DELETED_FILES} is not valid JSON: {error}") from None
    if plain is None:
        return []
    if not isinstance(plain, list) or not all(isinstance(path, str) for path in plain):
        raise ArchiveInvalid(f"{DELETED_FILES} is not a list of paths")
    for path in plain:
        if not path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise ArchiveInvalid(f"{DELETED_FILES} has {path[:100]!r}, which is no path in the container")
    return plain
