"""`ckpt check`: what stands in the way of a checkpoint or a migration, found before anything is touched and without touching.

Errors block, warnings do not; what cannot be looked at is a warning. `checkpoint` and `migrate` ask the same questions
(`local_findings`, `decide`, `raise_on_error`) before they begin.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ckpt.criu import lazy
from ckpt.errors import (
    BusyError,
    CkptError,
    EngineUnavailable,
    FeatureMissing,
    IncompatibleHost,
    NoSpace,
    PermissionDenied,
    TargetNotFound,
)
from ckpt.events import Emit, StepDone, StepFailed, StepStarted, ignore
from ckpt.host import facts as host_facts
from ckpt.host.procfs import OpenKinds
from ckpt.host.run import CommandFailed
from ckpt.model import Container, DumpOptions, Finding, Target
from ckpt.ops import consent, hooks, look
from ckpt.ops import findings as meaning
from ckpt.ops.compat import size_text
from ckpt.ops.destination import destination_findings, destination_report, destination_request

if TYPE_CHECKING:
    from ckpt.engines.base import Engine
    from ckpt.peer.client import Peer
    from ckpt.transports.https_peer import Access

__all__ = ["CheckReport", "check", "decide", "destination_findings", "destination_report", "local_findings", "raise_on_error", "destination_request"]

CALL_TIMEOUT_S: Final = 60.0
_PLUGINS: Final = ("/usr/lib/criu", "/usr/local/lib/criu", "/usr/lib64/criu", "/usr/libexec/criu")

ARRIVING: Final = "arriving memory"
"""The finding about a tree whose memory is not all there."""
_ERRORS: Final[dict[str, type[CkptError]]] = {
    "target": TargetNotFound,
    "state": BusyError,
    "name": BusyError,
    ARRIVING: BusyError,
    "ports": BusyError,
    "addresses": BusyError,
    "volumes": BusyError,
    "permission": PermissionDenied,
    "engine": EngineUnavailable,
    "engine there": EngineUnavailable,
    "space": NoSpace,
    "disk space": NoSpace,
    "memory": NoSpace,
    "architecture": IncompatibleHost,
    "CPU": IncompatibleHost,
    "CRIU version": IncompatibleHost,
    "CRIU there": IncompatibleHost,
    "networks": IncompatibleHost,
    "container image": IncompatibleHost,
    "host mounts there": IncompatibleHost,
}
"""The error that a finding becomes, by its check; all others are FeatureMissing."""

_THERE: Final = frozenset(_ERRORS) - {"target", "state", ARRIVING, "permission", "engine", "space"}
"""Checks of `destination_findings`."""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The table of one target. `container` is what was found under that name."""

    target: str
    findings: tuple[Finding, ...]
    container: Container | None = None

    @property
    def ok(self) -> bool:
        """True when nothing blocks."""
        return not any(finding.severity == "error" for finding in self.findings)


def check(
    targets: Sequence[Target],
    *,
    all: bool = False,
    to: str | None = None,
    options: DumpOptions | None = None,
    emit: Emit = ignore,
    ssh_options: Sequence[str] = (),
    access: Access | None = None,
) -> list[CheckReport]:
    """Look at each target, and with `to` at that destination.

    Args:
        all: every running container instead of `targets`.

    Raises:
        TargetNotFound, UsageError, EngineUnavailable: the only target cannot be resolved (of several, it is a finding).
        CannotConnect, PeerVersion: the destination cannot be asked.
    """
    from ckpt.ops import resolve

    chosen: list[tuple[str, Engine | None, Container | None, list[Finding]]] = []
    if all:
        chosen = [(container.name, engine, container, []) for engine, container in resolve.all_running()]
    for target in () if all else targets:
        try:
            engine, container = resolve.resolve(target)
            chosen.append((str(target), engine, container, []))
        except CkptError as error:
            if len(targets) == 1:
                raise
            chosen.append((str(target), None, None, [Finding("target", "error", error.message, error.hint or "")]))
    if to is None:
        return [_report(*one, None, to, options or DumpOptions(), emit) for one in chosen]
    from ckpt.peer import client

    with client.connect(to, ssh_options=ssh_options, access=access, purpose="check") as peer:
        return [_report(*one, peer, to, options or DumpOptions(), emit) for one in chosen]


def _report(
    label: str,
    engine: Engine | None,
    container: Container | None,
    found: list[Finding],
    peer: Peer | None,
    to: str | None,
    options: DumpOptions,
    emit: Emit,
) -> CheckReport:
    began = time.monotonic()
    emit(StepStarted(label, "check", f"-> {to}" if to else ""))
    if engine is not None and container is not None:
        kinds = look.open_kinds(container)
        found = [*found, *_local(engine, container, options, kinds)]
        if peer is not None:
            found += _there(container, kinds, peer)
    report = CheckReport(label, tuple(found), container)
    bad = [finding for finding in found if finding.severity == "error"]
    if bad:
        emit(StepFailed(label, "check", bad[0].detail))
    else:
        warnings = sum(finding.severity == "warning" for finding in found)
        emit(StepDone(label, "check", f"{warnings} warnings" if warnings else "", time.monotonic() - began))
    return report


@dataclass(frozen=True, slots=True)
class Looked:
    """One look at a workload that is to be saved."""

    options: DumpOptions
    """With nothing left open."""
    findings: tuple[Finding, ...]
    needed_bytes: int
    """In the store, at most."""


def look_over(engine: Engine, container: Container, options: DumpOptions) -> Looked:
    """`decide` and `local_findings` by one look. Touches nothing, never raises."""
    kinds = look.open_kinds(container)
    chosen = _decided(container, options, kinds or OpenKinds())
    needed = (kinds.dump_bytes if kinds else 0) + look.disk_bytes(container, chosen)
    return Looked(chosen, tuple(_local(engine, container, chosen, kinds)), needed)


def local_findings(engine: Engine, container: Container, options: DumpOptions) -> list[Finding]:
    """What this host, the engine and the workload itself say about a checkpoint. Touches nothing, never raises."""
    return _local(engine, container, options, look.open_kinds(container))


def decide(engine: Engine, container: Container, options: DumpOptions) -> DumpOptions:
    """The options with every None replaced by what the workload needs.

    A listening socket counts for `tcp_established` too: a connection may come between this look and the freeze, and a dump
    that may save connections does not mind having none.
    """
    if options.tcp_established is not None and options.file_locks is not None and options.shell_job is not None:
        return options
    return _decided(container, options, look.open_kinds(container) or OpenKinds())


def _decided(container: Container, options: DumpOptions, kinds: OpenKinds) -> DumpOptions:
    shell_job = kinds.needs_shell_job and meaning.is_process_tree(container)
    return replace(
        options,
        tcp_established=kinds.needs_tcp_established if options.tcp_established is None else options.tcp_established,
        file_locks=kinds.needs_file_locks if options.file_locks is None else options.file_locks,
        shell_job=shell_job if options.shell_job is None else options.shell_job,
    )


def raise_on_error(name: str, findings: Sequence[Finding], *, to: str | None = None) -> None:
    """Raise the first finding that blocks, as the error that fits it.

    Args:
        name: what the user typed.
        to: the destination, when the findings are about a migration.

    Raises:
        FeatureMissing, BusyError, EngineUnavailable, PermissionDenied, NoSpace, IncompatibleHost, TargetNotFound.
    """
    blocking = [finding for finding in findings if finding.severity == "error"]
    if not blocking:
        return
    first = blocking[0]
    error = _ERRORS.get(first.check, FeatureMissing)
    verb = f"cannot be moved to {to}" if to else "cannot be moved" if first.check in _THERE else "cannot be checkpointed"
    more = f" (and {len(blocking) - 1} more: ckpt check {name}{f' --to {to}' if to else ''})" if len(blocking) > 1 else ""
    where = f"{name} is untouched" if error is TargetNotFound or first.check == "state" else f"{name} is running, untouched"
    raise error(f"{name} {verb}: {first.detail}{more}", where=where, hint=first.hint or None)


def _local(engine: Engine, container: Container, options: DumpOptions, kinds: OpenKinds | None) -> list[Finding]:
    found = [_state(container)]
    if kinds is not None and lazy.arriving(kinds.pids):
        hint = "wait until all of it is there: seconds, as a rule (ckpt restore --lazy)"
        found.append(Finding(ARRIVING, "error", "its memory is still arriving, and would be missing from the checkpoint", hint))
    if os.geteuid() != 0:
        found.append(Finding("permission", "error", "checkpointing needs root", "run it with sudo"))
    capabilities = engine.probe()
    named = f"{engine.name} {capabilities.version}".strip()
    found.append(Finding("engine", "ok", named) if capabilities.usable else Finding("engine", "error", f"{engine.name}: {capabilities.reason}"))
    version = "CRIU"
    if capabilities.criu:
        criu, version = _criu()
        found.append(criu)
    found += _preflight(engine, container, options)
    found += _labels_and_hooks(container)
    if kinds is None:
        if container.state == "running":
            found.append(Finding("processes", "warning", "its processes could not be looked at"))
        return found
    workload = meaning.of_workload(container, kinds, options, criu=version, set_up=look.criu_options(container), gpu_plugin=_gpu_plugin())
    # What the engine found itself it says in its own words.
    said = {(finding.check.lower(), finding.severity) for finding in found}
    found += [finding for finding in workload if (finding.check.lower(), finding.severity) not in said]
    found.append(_space(kinds, look.disk_bytes(container, options)))
    return found


def _labels_and_hooks(container: Container) -> list[Finding]:
    """What the container's labels say, and what runs around an operation. What a label forbids is the operations' own error (consent)."""
    found: list[Finding] = []
    labels = consent.Labels()
    try:
        labels = consent.labels(container)
        for label, meant in ((labels.forbids("checkpoint"), "saved"), (labels.forbids("migrate"), "moved")):
            if label and not any(finding.detail.startswith(label) for finding in found):
                found.append(Finding("labels", "warning", f"{label}: it is not {meant}", "--override-label does it all the same"))
    except CkptError as error:
        found.append(Finding("labels", "warning", error.message, error.hint or ""))
    return [*found, *(Finding("hooks", severity, detail, hint) for severity, detail, hint in hooks.described(labels))]


def _state(container: Container) -> Finding:
    if container.state == "running":
        return Finding("state", "ok", "running")
    hints = {"paused": "unpause it first", "created": "start it first", "exited": "start it first"}
    return Finding("state", "error", f"it is {container.state}, not running", hints.get(container.state, ""))


def _criu() -> tuple[Finding, str]:
    """The finding about CRIU here, and what to call it in other findings."""
    from ckpt.criu import features

    try:
        facts = features.facts()
    except (CkptError, CommandFailed, OSError) as error:
        return Finding("CRIU", "warning", f"CRIU could not be asked: {error}"), "CRIU"
    if not facts.working:
        missing = not facts.version
        return Finding("CRIU", "error", facts.reason or "CRIU does not work", facts.hint or ("install CRIU" if missing else "")), "CRIU"
    return Finding("CRIU", "ok", f"{facts.version}, works on this kernel"), f"CRIU {facts.version}"


def _preflight(engine: Engine, container: Container, options: DumpOptions) -> list[Finding]:
    try:
        # CRIU has its own line already.
        return [finding for finding in engine.preflight(container, options) if finding.check.lower() != "criu"]
    except (CkptError, CommandFailed, OSError) as error:
        return [Finding("runtime", "warning", f"{engine.name} could not be asked: {error}")]


def _space(kinds: OpenKinds, disk_bytes: int) -> Finding:
    needed, free = kinds.dump_bytes + disk_bytes, host_facts.free_bytes(look.store_root())
    if not free:
        return Finding("space", "warning", "it is not known how much is free in the store")
    if free < needed:
        return Finding("space", "error", f"up to {size_text(needed)} needed in the store, {size_text(free)} free", "ckpt prune, or another --store")
    return Finding("space", "ok", f"up to {size_text(needed)} needed, {size_text(free)} free")


def _gpu_plugin() -> bool:
    return any(name.startswith(("cuda_plugin", "amdgpu_plugin")) for place in _PLUGINS if os.path.isdir(place) for name in os.listdir(place))


def _there(container: Container, kinds: OpenKinds | None, peer: Peer) -> list[Finding]:
    there = peer.hostname
    try:
        report: dict[str, Any] = peer.call("facts", destination_request(container), timeout_s=CALL_TIMEOUT_S)
    except CkptError as error:
        return [Finding("destination", "warning", f"{there} did not answer: {error.message}", error.hint or "")]
    return destination_findings(container, report, kinds=kinds)
