"""Reads `podman container inspect` (podman-container-inspect(1)) into our own nouns."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from ckpt.model import Container, ContainerImage, HostMount, PortMapping, RootFs, State, Volume


def state_of(text: str) -> State:
    """Podman's state in our words."""
    known: dict[str, State] = {
        "running": "running",
        "paused": "paused",
        "exited": "exited",
        "stopped": "exited",
        "created": "created",
        "configured": "created",
    }
    return known.get(text.lower(), "unknown")


def seconds(stamp: str) -> float:
    """RFC 3339 with nanoseconds, as Go writes it, as seconds since 1970; 0.0 when it is none."""
    try:
        return datetime.datetime.fromisoformat(stamp[:19] + "+00:00").timestamp()
    except ValueError:
        return 0.0


def ports_of(bindings: dict[str, Any] | None) -> tuple[PortMapping, ...]:
    """`HostConfig.PortBindings`: {"80/tcp": [{"HostIp": "", "HostPort": "8080"}]}."""
    found = []
    for inner, outers in (bindings or {}).items():
        port, _, protocol = inner.partition("/")
        for outer in outers or []:
            if str(outer.get("HostPort", "")).isdigit() and port.isdigit():
                found.append(PortMapping(outer.get("HostIp") or "", int(outer["HostPort"]), int(port), protocol or "tcp"))
    return tuple(found)


def container_from_inspect(data: dict[str, Any]) -> Container:
    """One element of podman's inspect output as a `Container`."""
    config, host, state = data.get("Config") or {}, data.get("HostConfig") or {}, data.get("State") or {}
    graph = (data.get("GraphDriver") or {}).get("Data") or {}
    networks = (data.get("NetworkSettings") or {}).get("Networks") or {}
    mounts = data.get("Mounts") or []
    labels = dict(config.get("Labels") or {})
    rootfs = RootFs(
        Path(graph["MergedDir"]) if graph.get("MergedDir") else None,
        Path(graph["UpperDir"]) if graph.get("UpperDir") else None,
        tuple(Path(p) for p in graph.get("LowerDir", "").split(":") if p),
    )
    return Container(
        engine="podman",
        id=data["Id"],
        name=data["Name"],
        state=state_of(state.get("Status", "")),
        pid=state.get("Pid") or None,
        runtime=data.get("OCIRuntime") or None,
        container_image=ContainerImage(data["Image"], data.get("ImageName", ""), data.get("ImageDigest") or "") if data.get("Image") else None,
        rootfs=rootfs,
        volumes=tuple(Volume(m["Name"], Path(m["Source"]), m["Destination"]) for m in mounts if m.get("Type") == "volume" and m.get("Name")),
        host_mounts=tuple(HostMount(m["Source"], m["Destination"]) for m in mounts if m.get("Type") == "bind"),
        ports=ports_of(host.get("PortBindings")),
        networks=tuple(networks),
        addresses=tuple(n[key] for n in networks.values() for key in ("IPAddress", "GlobalIPv6Address") if n.get(key)),
        labels=labels,
        terminal=bool(config.get("Tty")),
        created_s=seconds(str(data.get("Created", ""))),
        auto_remove=bool(host.get("AutoRemove")),
        requires=tuple(map(str, data.get("Dependencies") or ())),
        pod=str(data.get("Pod") or ""),
        units=(labels["PODMAN_SYSTEMD_UNIT"],) if labels.get("PODMAN_SYSTEMD_UNIT") else (),
        restarts=str((host.get("RestartPolicy") or {}).get("Name") or "no") != "no",
        infra=bool(data.get("IsInfra")),
    )
