"""Start a service once, keep it as a checkpoint when it is ready, and from then on restore that instead of starting it.

Nothing of this needs a journal of its own: a container that was started by the very same command line and has no checkpoint yet is taken up
where the one before was broken off.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ckpt.archive.layout import CONFIG
from ckpt.engines import registry
from ckpt.engines.base import Engine, RunsNew
from ckpt.errors import BusyError, CkptError, TargetNotFound, UsageError
from ckpt.events import Emit, Notice, StepDone, StepStarted
from ckpt.model import Checkpoint, Container, DumpOptions, RestoreOptions, Target
from ckpt.ops import checkpoint as saving
from ckpt.ops import clone, faults, mark, readiness, recover
from ckpt.ops import restore as restoring
from ckpt.ops.readiness import Probe
from ckpt.ops.result import Outcome
from ckpt.store.catalog import Catalog
from ckpt.store.job import DEFAULT_ROOT

TAG: Final = "warm"
NOTE_CAP: Final = 1500
_MOST_COPIES: Final = 1000


@dataclass(frozen=True, slots=True)
class Wanted:
    """What shall run."""

    name: str
    arguments: tuple[str, ...]
    publish: tuple[str, ...] = ()
    probe: Probe | None = None
    ready_timeout_s: float = 60.0


def run_warm(
    wanted: Wanted, *, engine_name: str = "podman", dump: DumpOptions, options: RestoreOptions, store_root: Path = DEFAULT_ROOT, emit: Emit
) -> Outcome:
    """Restore the warm checkpoint of that name; when there is none, or it is of another start, start it cold and make one.

    Args:
        dump: with `leave_running` it runs on after a cold start; else the checkpoint is all that is left of it.

    Raises:
        UsageError: no probe for a cold start, or an engine that starts nothing.
        BusyError: a container of that name is in the way.
        NotReady: what was started is removed again, nothing is in the store.
        CkptError: as `checkpoint` and `restore`.
    """
    for line in recover.sweep(store_root):
        emit(Notice("", line, warning=True))
    engine = registry.by_name(engine_name)
    if not isinstance(engine, RunsNew):
        raise UsageError(f"{engine_name} starts nothing by itself", hint="start it, and save it with ckpt checkpoint --tag warm")
    catalog = Catalog(store_root)
    command = engine.run_command(wanted.name, wanted.arguments, wanted.publish)
    here = next((engine.describe(found) for found in engine.find(wanted.name) if found.name == wanted.name), None)
    old = _warm(catalog, wanted.name)
    if old is not None:
        other = _differs(catalog, engine, old, command)
        if not other:
            return _again(wanted, old, here, options, catalog, engine, emit)
        emit(Notice(wanted.name, f"{old.ref} is not used: {other}; it is started cold, and replaced"))
    return _cold(wanted, command, here, old, engine, dump, catalog, emit)


def _warm(catalog: Catalog, name: str) -> Checkpoint | None:
    with suppress(TargetNotFound):
        return catalog.find(f"{name}@{TAG}")
    return None


def _differs(catalog: Catalog, engine: RunsNew, old: Checkpoint, command: Sequence[str]) -> str:
    """Why a warm checkpoint is not what this command line would start; "" when it is."""
    with catalog.lease(old) as directory:
        made_by = engine.command_in((directory / CONFIG).read_bytes())
    if _arguments(made_by) != _arguments(command):
        return "it was started with other arguments"
    image = old.manifest.container_image
    if image is not None and engine.image_now(image) != image.id:
        return f"{image.name} is another container image now"
    return ""


def _arguments(command: Sequence[str]) -> list[str]:
    """Without the program, whose path may be written in several ways."""
    return list(command[1:])


def _again(
    wanted: Wanted, warm: Checkpoint, here: Container | None, options: RestoreOptions, catalog: Catalog, engine: Engine, emit: Emit
) -> Outcome:
    """The warm checkpoint in its place, or a copy of it beside what runs."""
    if here is not None and here.state in ("running", "paused"):
        taken = {container.name for container in engine.containers()}
        name = next(f"{wanted.name}-{number}" for number in range(2, _MOST_COPIES) if f"{wanted.name}-{number}" not in taken)
        emit(Notice(wanted.name, f"it is {here.state}: this is a copy, {name}"))
        return clone.bring(warm, [clone.Copy(name, _free(wanted.publish))], options, catalog, emit)[0]
    fresh = replace(options, lazy=options.lazy and engine.probe().lazy, tcp_close=True, ignore_static_ip=True, ignore_static_mac=True)
    return restoring.restore([warm.manifest.id], options=fresh, store_root=catalog.root, emit=emit)[0]


def _free(publish: Sequence[str]) -> tuple[str, ...]:
    """The same ports of the container at ports of the host that are free: those that were named are the original's."""
    return tuple(mapping.rpartition(":")[2] for mapping in publish)


def _cold(
    wanted: Wanted,
    command: list[str],
    here: Container | None,
    old: Checkpoint | None,
    engine: Engine,
    dump: DumpOptions,
    catalog: Catalog,
    emit: Emit,
) -> Outcome:
    assert isinstance(engine, RunsNew)
    probe = wanted.probe
    if probe is None:
        hint = "--ready-port, --ready-log, --ready-http, --ready-cmd or --ready-file"
        raise UsageError(f"{wanted.name} must be started cold: say how to tell that it is ready", hint=hint)
    taken_up = here is not None and here.state == "running" and _arguments(engine.command_of(here)) == _arguments(command) and old is None
    if here is not None and not taken_up:
        hint = f"{engine.name} rm -f {wanted.name}, or choose another name"
        raise BusyError(f"there is a container {wanted.name} already", where=f"it is {here.state}, untouched", hint=hint)
    began = time.monotonic()
    emit(StepStarted(wanted.name, "start"))
    container = here if here is not None else engine.run_new(wanted.name, command)
    try:
        if container.name != wanted.name:
            raise UsageError(f"it calls itself {container.name}: leave --name out of its arguments")
        faults.point("warm-started")
        took_s = readiness.wait(engine, container, probe, wanted.ready_timeout_s)
        emit(StepDone(wanted.name, "start", f"ready: {probe}", time.monotonic() - began))
        faults.point("warm-ready")
        target = Target.parse(f"{engine.name}:{container.name}")
        saved = saving.checkpoint([target], options=dump, store_root=catalog.root, emit=emit)
        if saved[0].error is not None:
            raise saved[0].error
    except BaseException as error:
        if not taken_up:
            engine.discard(container)
        if isinstance(error, CkptError):
            error.where = f"{container.name} {'runs as before' if taken_up else 'was removed again'}; nothing of it is in the store"
        raise
    note = f"ready: {probe}, {took_s:.1f} s after its start\nmade by: {' '.join(command)}"
    outcome = mark.made(saved, [TAG], "".join(c if c.isprintable() or c == "\n" else "?" for c in note)[:NOTE_CAP], store_root=catalog.root)[0]
    faults.point("warm-saved")
    warnings = list(outcome.warnings)
    if old is not None:
        try:
            catalog.remove(old)
        except CkptError as error:
            mark.tag([old.manifest.id], [], [TAG], store_root=catalog.root)
            warnings.append(f"{old.ref}, which was warm before, stays: {error.message}")
    if not dump.leave_running and outcome.container is not None:
        with suppress(CkptError):
            engine.remove(engine.describe(outcome.container))
    return replace(outcome, target=wanted.name, warnings=tuple(warnings), stats={**outcome.stats, "ready_s": round(took_s, 3)})
