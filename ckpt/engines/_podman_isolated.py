"""A copy for analysis: podman's own record of the container, changed so that the copy shares nothing with anybody.

Its network namespace is one that is made for it, by path, with a loopback only (as `podman run --network ns:PATH` has it): podman makes no
interface and gives no address. CRIU takes that namespace as it takes podman's (it is "external" in the images). Volumes get other names.
"""

from __future__ import annotations

from typing import Any, Final

from ckpt.errors import RestoreFailed

_NETWORK: Final = frozenset({
    "networks", "newNetworks", "orderedNetworks", "networkMode", "portMappings", "newPortMappings", "staticIP", "staticMAC", "network_options",
    "networkAliases", "network_alises", "exposedPorts", "hostsAdd", "dnsServer", "dnsSearch", "dnsOption", "restart_policy", "restart_retries",
    "healthcheck", "startupHealthCheck",
})  # fmt: skip
_SHARED: Final = {"netNsCtr": "network", "ipcNsCtr": "IPC", "pidsCtr": "PID", "pidNsCtr": "PID", "utsNsCtr": "UTS", "pod": "pod"}


def config(given: dict[str, Any], volumes: dict[str, str]) -> dict[str, Any]:
    """`config.dump` without network, ports, restarts and health checks, its volumes renamed.

    Raises:
        RestoreFailed: the container shares a namespace with another one.
    """
    for key, what in _SHARED.items():
        if given.get(key):
            raise RestoreFailed(f"it shares its {what} with another container, and cannot be isolated from that", where="nothing was made")
    kept = {key: value for key, value in given.items() if key not in _NETWORK}
    named = [{**one, "volumeName": volumes[str(one.get("volumeName"))]} for one in kept.get("namedVolumes") or []]
    return {**kept, "createNetNS": False, "postConfigureNetNS": False, **({"namedVolumes": named} if named else {})}


def spec(given: dict[str, Any], network: str, mounts: dict[str, str]) -> dict[str, Any]:
    """`spec.dump` with another network namespace, and with other sources for these mounts (destination -> source).

    Raises:
        RestoreFailed: it used the network of its host.
    """
    linux = dict(given.get("linux") or {})
    spaces = [dict(space) for space in linux.get("namespaces") or []]
    networks = [space for space in spaces if space.get("type") == "network"]
    if not networks:
        raise RestoreFailed("it used the network of its host: what it has of that cannot be put into another", where="nothing was made")
    if networks[0].get("path"):
        networks[0]["path"] = network
    changed = [{**one, "source": mounts[one["destination"]]} if one.get("destination") in mounts else one for one in given.get("mounts") or []]
    return {**given, "linux": {**linux, "namespaces": spaces}, "mounts": changed}


def volume_names(given: dict[str, Any], name: str) -> dict[str, str]:
    """The volumes that the container has, and what the copy `name` calls its own."""
    return {str(one["volumeName"]): f"{name}-{one['volumeName']}"[:200] for one in given.get("namedVolumes") or [] if one.get("volumeName")}


def destinations(given: dict[str, Any]) -> dict[str, str]:
    """Where each volume is mounted: volume -> destination."""
    return {str(one["volumeName"]): str(one.get("dest", "")) for one in given.get("namedVolumes") or [] if one.get("volumeName")}
