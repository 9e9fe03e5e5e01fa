"""The small members that engines act on, looked at before anything does: types, lengths, paths that stay in the container."""

from __future__ import annotations

import ipaddress
import re
from pathlib import Path
from typing import Any, Final

from ckpt.archive import strict_json
from ckpt.archive.layout import CONFIG, DELETED_FILES, NETWORK_STATUS, SPEC
from ckpt.archive.strict_json import fields, items, text
from ckpt.archive.wants import Profile, of_spec
from ckpt.errors import ArchiveInvalid

MAX_SMALL_BYTES: Final = 16 << 20
MAX_DELETED_BYTES: Final = 64 << 20
MAX_DELETED: Final = 200_000
MAX_PATH: Final = 4096
_MAC: Final = re.compile(r"[0-9A-Fa-f:.-]{1,64}\Z")


def check(stage: Path) -> None:
    """Look at `config.dump`, `spec.dump`, `network.status` and `deleted.files` in `stage`, as far as they are there.

    Raises:
        ArchiveInvalid: one of them is not what it should be; the message names it.
    """
    for name, look in ((CONFIG, config), (SPEC, spec), (NETWORK_STATUS, network_status), (DELETED_FILES, deleted_files)):
        try:
            with (stage / name).open("rb") as file:
                limit = MAX_DELETED_BYTES if name == DELETED_FILES else MAX_SMALL_BYTES
                data = file.read(limit + 1)
        except FileNotFoundError:
            continue
        if len(data) > limit:
            raise ArchiveInvalid(f"{name} is larger than {limit >> 20} MiB")
        look(data)


def config(data: bytes) -> dict[str, Any]:
    """The engine's configuration, by the names in lower case. What it asks for is judged elsewhere (wants). Raises ArchiveInvalid."""
    found = fields(_object(data, CONFIG), CONFIG)
    for key in ("id", "name", "runtime", "rootfsimageid", "rootfsimagename"):
        if len(text(found.get(key), f"{CONFIG}: {key}")) > MAX_PATH or "\0" in (found.get(key) or ""):
            raise ArchiveInvalid(f"{CONFIG}: {key} is no name")
    return found


def spec(data: bytes) -> dict[str, Any]:
    """An OCI runtime configuration. Raises ArchiveInvalid."""
    found = _object(data, SPEC)
    of_spec(found, Profile())
    return found


def network_status(data: bytes) -> None:
    """Podman's: {NETWORK: {"interfaces": {NAME: {"subnets": [{"ipnet": ..., "gateway": ...}], "mac_address": ...}}}}. Raises ArchiveInvalid."""
    if data.strip() in (b"", b"null", b"[]"):
        return
    where = NETWORK_STATUS
    for network in _object(data, where).values():
        interfaces = fields(network, where).get("interfaces")
        if interfaces is not None and not isinstance(interfaces, dict):
            raise ArchiveInvalid(f"{where}: interfaces is not an object")
        for name, interface in (interfaces or {}).items():
            if not re.fullmatch(r"[^\s/\x00]{1,15}", name):
                raise ArchiveInvalid(f"{where} has {name[:40]!r} as the name of an interface")
            known = fields(interface, where)
            mac = text(known.get("mac_address"), where)
            if mac and not _MAC.match(mac):
                raise ArchiveInvalid(f"{where} has {mac[:40]!r} as a MAC address")
            for subnet in items(known.get("subnets"), where):
                addresses = fields(subnet, where)
                for key in ("ipnet", "gateway"):
                    address = text(addresses.get(key), where)
                    try:
                        ipaddress.ip_interface(address) if address else None
                    except ValueError:
                        raise ArchiveInvalid(f"{where} has {address[:60]!r} as an address") from None


def deleted_files(data: bytes) -> list[str]:
    """The paths that the container deleted: absolute, within it. Raises ArchiveInvalid."""
    if not data.strip():
        return []
    found = strict_json.parse(data, DELETED_FILES)
    if found is None:
        return []
    if not isinstance(found, list) or len(found) > MAX_DELETED:
        raise ArchiveInvalid(f"{DELETED_FILES} is not a list of an acceptable size")
    for path in found:
        if not isinstance(path, str) or not path.startswith("/") or len(path) > MAX_PATH or "\0" in path or ".." in path.split("/"):
            raise ArchiveInvalid(f"{DELETED_FILES} has {str(path)[:100]!r}, which is no path in the container")
        if not path.strip("/."):
            raise ArchiveInvalid(f"{DELETED_FILES} has the root itself")
    return found


def _object(data: bytes, member: str) -> dict[str, Any]:
    found = strict_json.parse(data, member)
    if not isinstance(found, dict):
        raise ArchiveInvalid(f"{member} is not a JSON object")
    return found
