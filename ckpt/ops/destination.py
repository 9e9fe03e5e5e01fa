"""`check --to`: what the destination says about itself, and what that means for a workload that wants to move there."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from ckpt.criu import bindings, features
from ckpt.engines import registry
from ckpt.errors import CkptError, FeatureMissing
from ckpt.host import facts as host_facts
from ckpt.host.procfs import OpenKinds
from ckpt.host.procnet import listening_ports
from ckpt.host.run import CommandFailed
from ckpt.model import Container, DumpOptions, Finding, HostFacts
from ckpt.ops import look
from ckpt.ops.compat import compare

WORKLOADS_CAP = 4096
_DEFAULT_NETWORKS = {"", "podman", "bridge", "host", "none", "private", "slirp4netns", "pasta"}


def destination_request(
    container: Container, *, name: str | None = None, publish: Sequence[str] = (), ignore_volumes: bool = False
) -> dict[str, Any]:
    """What the destination must know to answer.

    Args:
        name: the name that it gets there (None: its own; with another it also gets another id and other addresses).
        publish: ports published there instead of its own, as `[IP:]HOST:CONTAINER[/PROTOCOL]`.
    """
    ports = [{"host_ip": p.host_ip, "host_port": p.host_port, "protocol": p.protocol} for p in container.ports]
    renamed = name is not None and name != container.name
    return {
        "engine": container.engine,
        "runtime": container.runtime or "",
        "name": name or container.name,
        "id": "" if renamed else container.id,
        "container_image": container.container_image.id if container.container_image else "",
        "ports": [_published(text) for text in publish] or ports,
        "volumes": [] if ignore_volumes else [volume.name for volume in container.volumes],
        "networks": list(container.networks),
        "addresses": [] if renamed else list(container.addresses),
        "host_mounts": [mount.source for mount in container.host_mounts],
    }


def destination_report(request: dict[str, Any], *, store_root: Path | None = None) -> dict[str, Any]:
    """Runs on the destination: its facts, and what of the request is there, taken or missing. Touches nothing.

    What its engine cannot tell is None. `request` is `destination_request`'s; missing keys are nothing asked.
    """
    criu = features.facts()
    report: dict[str, Any] = {
        "facts": asdict(replace(host_facts.gather(store_root or look.store_root()), criu_version=criu.version or host_facts.criu_version())),
        "criu": {"working": criu.working, "reason": criu.reason, "hint": criu.hint, "lazy_pages": criu.lazy_pages, "missing": list(criu.missing)},
        "engine": {"usable": False, "reason": "not asked for"},
        "pages": _takes_pages(),
        "lazy": False,
        "early": False,
        "container_image": None,
        "names": [],
        "ports_busy": _ports_busy(request),
        "volumes": None,
        "networks": None,
        "network_details": None,
        "addresses_busy": [],
        "host_mounts_missing": [str(path) for path in request.get("host_mounts", []) if not os.path.exists(str(path))],
    }
    if isinstance(asked := request.get("workloads"), list):
        report["workloads"] = standing(asked[:WORKLOADS_CAP])
    if not request.get("engine"):
        return report
    try:
        engine = registry.by_name(str(request["engine"]))
    except CkptError as error:
        report["engine"] = {"usable": False, "reason": error.message}
        return report
    capabilities = engine.probe()
    report["engine"] = asdict(capabilities)
    report["early"] = capabilities.early
    report["lazy"] = capabilities.lazy and bool(criu.lazy_pages)
    if not capabilities.usable:
        return report
    image = str(request.get("container_image") or "")
    if image:
        report["container_image"] = _ask(engine, "has_container_image", image)
    report["volumes"] = _of_these(_ask(engine, "volume_names"), request.get("volumes"))
    report["networks"] = _of_these(_ask(engine, "network_names"), request.get("networks"))
    if request.get("networks"):
        report["network_details"] = _network_details(engine, [str(name) for name in request["networks"]])
    present = _quietly(engine.containers, [])
    wanted = {str(request.get("name") or ""), str(request.get("id") or "")} - {""}
    report["names"] = sorted({c.name if c.name in wanted else c.id for c in present if c.name in wanted or c.id in wanted})
    addresses = {str(address) for address in request.get("addresses", [])}
    if addresses:
        for container in present:
            if container.state in ("running", "paused"):
                addressed = _quietly(lambda it=container: engine.describe(it).addresses, ())  # type: ignore[misc]
                report["addresses_busy"] += sorted(addresses & set(addressed))
    return report


def standing(asked: Sequence[Any]) -> list[dict[str, Any] | None]:
    """How each of these workloads stands here (`engine`, `id`, `name`): its `state`, "" when its id is not here, its `name`, and whether another one
    has the name that was given (`name_taken`); None when its engine cannot be asked."""
    lists: dict[str, list[Container] | None] = {}
    found: list[dict[str, Any] | None] = []
    for one in asked:
        engine, identity, name = (str(one.get(key) or "") for key in ("engine", "id", "name")) if isinstance(one, dict) else ("", "", "")
        if engine not in lists:
            try:
                lists[engine] = list(registry.by_name(engine).containers())
            except (CkptError, CommandFailed):
                lists[engine] = None
        present = lists[engine]
        if present is None:
            found.append(None)
            continue
        mine = next((c for c in present if c.id == identity), None)
        taken = any(c.name == name and c.id != identity for c in present)
        found.append({"state": mine.state if mine else "", "name": mine.name if mine else "", "name_taken": taken})
    return found


def destination_findings(
    container: Container,
    report: Mapping[str, Any],
    *,
    name: str | None = None,
    source: HostFacts | None = None,
    kinds: OpenKinds | None = None,
    disk_bytes: int | None = None,
) -> list[Finding]:
    """What the destination's report means for this container.

    Args:
        name: the name that it gets there (None: its own).
        source: the facts of this host; kinds: what the container holds; disk_bytes: what it wrote on disk. None: looked up.
    """
    source = source or host_facts.gather(look.store_root())
    kinds = kinds or look.open_kinds(container) or OpenKinds()
    disk = look.disk_bytes(container, DumpOptions()) if disk_bytes is None else disk_bytes
    destination = facts_from(report.get("facts") or {})
    there = destination.hostname or "the destination"
    found = compare(source, destination, memory_bytes=kinds.dump_bytes, disk_bytes=kinds.dump_bytes + disk)
    criu = report.get("criu") or {}
    if destination.criu_version and criu.get("working") is False:
        found.append(Finding("CRIU there", "error", f"on {there}: {criu.get('reason') or 'CRIU does not work'}", str(criu.get("hint") or "")))
    found += _engine(container, report, there)
    if not (report.get("engine") or {}).get("usable"):
        return found
    found += _container_image(container, report, there)
    found += _name(container, name or container.name, report, there)
    renamed = name is not None and name != container.name
    found += _network(container, report, 0 if renamed else kinds.tcp_established, there)
    found += [] if renamed else _addresses_there(container, report, kinds.tcp_established, there)
    existing = report.get("volumes")
    if existing:
        hint = "remove or rename them there, or leave them as they are with --ignore-volumes"
        found.append(Finding("volumes", "error", f"already on {there}: {', '.join(map(str, existing))}", hint))
    elif container.volumes:
        found.append(Finding("volumes", "ok", ", ".join(volume.name for volume in container.volumes)))
    missing = report.get("host_mounts_missing") or []
    if missing:
        found.append(
            Finding("host mounts there", "error", f"not on {there}: {', '.join(map(str, missing))}", "make them there with the content it expects")
        )
    return found


def facts_from(values: Mapping[str, Any]) -> HostFacts:
    """Facts from their JSON form; keys of other versions are ignored."""
    known = {f.name for f in fields(HostFacts)}
    taken: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if key in known}
    return HostFacts(**taken)


def _engine(container: Container, report: Mapping[str, Any], there: str) -> list[Finding]:
    engine = report.get("engine") or {}
    if not engine.get("usable"):
        return [Finding("engine there", "error", f"{container.engine} cannot be used on {there}: {engine.get('reason') or 'unknown'}", "")]
    runtimes = [str(runtime) for runtime in engine.get("runtimes") or []]
    version = f"{container.engine} {engine.get('version') or ''}".strip()
    # An engine names its runtimes by program; the container's may be a path.
    runtime = Path(container.runtime or "").name
    if runtime and runtimes and runtime not in {Path(name).name for name in runtimes}:
        return [
            Finding(
                "engine there", "error", f"{version} on {there} has no {runtime}", f"install {runtime} there: a checkpoint stays with its runtime"
            )
        ]
    return [Finding("engine there", "ok", f"{version}{f', {runtime}' if runtime else ''}")]


def _container_image(container: Container, report: Mapping[str, Any], there: str) -> list[Finding]:
    if container.container_image is None:
        return []
    name = container.container_image.name or container.container_image.id[:12]
    if report.get("container_image") is None:
        return [Finding("container image", "warning", f"it is not known whether {name} is on {there}")]
    return [Finding("container image", "ok", f"{name} is there" if report["container_image"] else f"{name} is not there: copied first")]


def _name(container: Container, name: str, report: Mapping[str, Any], there: str) -> list[Finding]:
    taken = report.get("names") or []
    if taken:
        what = f"the name {name} is" if name in taken else f"the id {container.id[:12]} is"
        return [Finding("name", "error", f"{what} taken on {there}", f"remove it there first, or give it another name: --name {name}-2")]
    return [Finding("name", "ok", f"{name} is free on {there}")] if name else []


def _network(container: Container, report: Mapping[str, Any], connections: int, there: str) -> list[Finding]:
    found: list[Finding] = []
    busy = [f"{port}/{protocol}" for protocol, port in report.get("ports_busy") or []]
    if busy:
        found.append(Finding("ports", "error", f"in use on {there}: {', '.join(busy)}", "end what uses them there, or publish others (-p)"))
    elif container.ports:
        found.append(Finding("ports", "ok", f"{', '.join(f'{p.host_port}/{p.protocol}' for p in container.ports)} free on {there}"))
    own = [network for network in container.networks if network not in _DEFAULT_NETWORKS]
    if own:
        present = report.get("networks")
        absent = [network for network in own if present is not None and network not in present]
        if present is None:
            found.append(
                Finding("networks", "warning", f"it is not known whether {there} has {', '.join(own)}", f"{container.engine} network ls, there")
            )
        elif absent:
            hint = f"{container.engine} network create {absent[0]}, there, with the same subnet"
            found.append(Finding("networks", "error", f"not on {there}: {', '.join(absent)}", hint))
        else:
            found.append(Finding("networks", "ok", f"{', '.join(own)} there"))
    addresses = report.get("addresses_busy") or []
    if addresses:
        hint = "end what uses them there" if connections else "end what uses them there, or take another address (--ignore-static-ip)"
        found.append(Finding("addresses", "error", f"in use on {there}: {', '.join(map(str, addresses))}", hint))
    return found


def _addresses_there(container: Container, report: Mapping[str, Any], connections: int, there: str) -> list[Finding]:
    """Whether its addresses can be had on the destination's networks, and whether packets for them will find it there."""
    details = {name: known for name, known in (report.get("network_details") or {}).items() if name in container.networks and known}
    subnets = {name: [str(subnet) for subnet in known.get("subnets") or []] for name, known in details.items()}
    found: list[Finding] = []
    for name, known in details.items():
        if known.get("interface_missing"):
            hint = "bring it up there, or make the network anew on another one"
            found.append(Finding("networks", "error", f"{name} lies on {known.get('interface')} of {there}, which is not there", hint))
    homeless = [address for address in container.addresses if any(subnets.values()) and not _within(address, subnets.values())]
    if homeless and len(details) == len(container.networks):
        has = "; ".join(f"{name} is {', '.join(those)}" for name, those in subnets.items() if those)
        hint = f"make {', '.join(subnets)} there with the subnet that it has here, or migrate under another name (--name)"
        found.append(Finding("networks", "error", f"no room for {', '.join(homeless)} on {there}: {has}", hint))
    if not connections or report.get("addresses_busy"):
        return found
    if container.networks and len(details) == len(container.networks) and all(known.get("shared") for known in details.values()):
        on = ", ".join(f"{name} ({known.get('driver')})" for name, known in details.items())
        return [*found, Finding("addresses", "ok", f"{_addresses(container)} on {on}, with {connections} open TCP connections")]
    hint = "its addresses must lead to the new host (macvlan, or a network that both hosts share), or the connections end"
    if not container.addresses:
        hint = "this host's address does not move with it: give it a network of its own (macvlan), or move the address at the same moment"
    text = f"{connections} open TCP connections move only together with {_addresses(container)}"
    return [*found, Finding("addresses", "warning", text, hint)]


def _within(address: str, subnets: Iterable[Iterable[str]]) -> bool:
    try:
        return any(ipaddress.ip_address(address) in ipaddress.ip_network(subnet, strict=False) for those in subnets for subnet in those)
    except ValueError:
        return True  # not understood: podman will say what is wrong


def _network_details(engine: object, names: Sequence[str]) -> dict[str, Any] | None:
    method = getattr(engine, "network_details", None)
    found: dict[str, dict[str, Any]] | None = None if method is None else _quietly(lambda: method(names), None)
    for known in (found or {}).values():
        if known["shared"] and known["interface"]:
            known["interface_missing"] = not (Path("/sys/class/net") / known["interface"]).exists()
    return found


def _takes_pages() -> bool:
    """Whether a stream of memory pages can be made into CRIU images here."""
    try:
        bindings.load("images.pagemap_pb2")
    except FeatureMissing:
        return False
    return True


def _addresses(container: Container) -> str:
    return ", ".join(container.addresses) or "the address of this host"


def _ports_busy(request: Mapping[str, Any]) -> list[tuple[str, int]]:
    wanted = {(str(p.get("protocol") or "tcp"), int(p.get("host_port") or 0)) for p in request.get("ports", [])}
    return sorted(wanted & listening_ports()) if wanted else []


def _of_these(present: Any, wanted: Any) -> list[str] | None:
    return None if present is None else [str(name) for name in wanted or [] if name in present]


def _ask(engine: object, question: str, *args: str) -> Any:
    """The answer of a method that an engine may have (`has_container_image`, `volume_names`, `network_names`); None without it."""
    method: Callable[..., Any] | None = getattr(engine, question, None)
    return None if method is None else _quietly(lambda: method(*args), None)


def _quietly(call: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return call()
    except (CkptError, CommandFailed):
        return otherwise


def _published(text: str) -> dict[str, Any]:
    """`[IP:]HOST:CONTAINER[/PROTOCOL]`; a text that is none asks for nothing (the engine will refuse it)."""
    ports, _, protocol = text.partition("/")
    parts = ports.rsplit(":", 2)
    host = parts[-2] if len(parts) > 1 else ""
    return {"host_ip": parts[0] if len(parts) > 2 else "", "host_port": int(host) if host.isdigit() else 0, "protocol": protocol or "tcp"}
