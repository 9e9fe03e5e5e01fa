"""Copies of a running container or of a checkpoint, several at once. Their memory is unpacked once, for all of them.

Each copy is an ordinary restore under another name, with a job, a guard and an undoing of its own: whatever becomes of ckpt, a copy is there or
nothing of it is. What they share is a draft with the unpacked checkpoint, which each one's keeper has a share in, and which goes with the last.

Where the engine restores lazily, a copy gets only the pages that it touches; all others are in the page cache, once.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final, cast

from ckpt.criu import lazy as memory
from ckpt.engines import registry
from ckpt.engines.base import CarriesContainerImages, Engine
from ckpt.errors import BusyError, CkptError, DumpFailed, EngineUnavailable, FeatureMissing, RestoreFailed, TargetNotFound, UsageError
from ckpt.events import Emit, Notice
from ckpt.model import Checkpoint, Container, DumpOptions, RestoreOptions, Target
from ckpt.ops import checkpoint as saving
from ckpt.ops import faults, mark, parallel, recover, resolve, warm
from ckpt.ops import restore as restoring
from ckpt.ops.result import Outcome, failure
from ckpt.ops.unpack import Unpacking
from ckpt.store.catalog import Catalog
from ckpt.store.job import DEFAULT_ROOT

TAG: Final = "clone"
"""Of the checkpoint that is made of a running container for its copies."""
END_S: Final = 1.0
BOUND: Final = "an address that the program was bound to"
"""Of the message of a restore that misses an address (criu/log.py)."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One copy that is wanted."""

    name: str
    publish: tuple[str, ...] = ()


def clone(
    ref: str,
    wanted: Callable[[str], Sequence[Copy]],
    *,
    dump: DumpOptions,
    options: RestoreOptions,
    width: int = 0,
    all_or_none: bool = False,
    store_root: Path = DEFAULT_ROOT,
    emit: Emit,
) -> list[Outcome]:
    """Make copies of what `ref` names: a running container (which is saved first, and runs on), or else a checkpoint in the store.

    Args:
        wanted: called with the original's name.
        options: for every copy; `lazy` where the engine can, else it is restored whole.
        width: so many at a time; 0: two for each processor.
        all_or_none: when one fails no more are begun, and those that came are removed.

    Raises:
        CkptError: nothing could be begun at all.
    """
    warm.imports(*warm.OUT_OF_CHUNKS, *warm.INTO_CHUNKS)
    for line in recover.sweep(store_root):
        emit(Notice("", line, warning=True))
    catalog = Catalog(store_root)
    running = _running(ref)
    source = None if running is not None else catalog.find(ref)
    copies = list(wanted(running[1].name if running is not None else source.manifest.name if source else ref))
    engine = running[0] if running is not None else registry.by_name(source.manifest.engine if source else "")
    able(engine)
    there = _taken(engine, copies)
    if there and (all_or_none or len(there) == len(copies)):
        raise BusyError(_there(there), where="nothing was touched", hint="remove them first, or choose other names")
    outcomes = [failure(name, BusyError(f"there is a container {name!r} already", where="it is as it was")) for name in there]
    if running is not None:
        source = _saved(running[1], dump, store_root, emit)
    assert source is not None
    made = bring(source, [copy for copy in copies if copy.name not in there], options, catalog, emit, width=width, all_or_none=all_or_none)
    by_name = {outcome.target: outcome for outcome in (*outcomes, *made)}
    return [by_name[copy.name] for copy in copies]


def able(engine: Engine) -> None:
    """Raise UsageError for an engine that makes no copies, EngineUnavailable for one that cannot be used."""
    can = engine.probe()
    if not can.usable:
        raise EngineUnavailable(f"{engine.name} cannot be used here", hint=can.reason or None)
    if not can.clone:
        hint = "a process tree keeps its process ids, so there is one of it at a time" if engine.name == "process" else None
        raise UsageError(f"{engine.name} cannot restore under another name, so it makes no copies", hint=hint)


def bring(
    source: Checkpoint, copies: Sequence[Copy], options: RestoreOptions, catalog: Catalog, emit: Emit, *, width: int = 0, all_or_none: bool = False
) -> list[Outcome]:
    """Restore the copies side by side from one unpacked draft; one outcome each.

    Raises:
        ArchiveInvalid, DigestMismatch, NoSpace: the checkpoint cannot be unpacked; nothing was begun.
    """
    manifest = source.manifest
    can = registry.by_name(manifest.engine).probe()
    # Two cannot have one address, and a connection has but one other end.
    fresh = replace(options, checked=True, unpublished=True, ignore_static_ip=True, ignore_static_mac=True, tcp_established=False, tcp_close=True)
    chosen = replace(fresh, lazy=options.lazy and can.lazy)
    if chosen.lazy:
        try:
            memory.require()
        except FeatureMissing as error:
            emit(Notice(source.ref, f"each copy gets memory of its own: {error.message}", warning=True))
            chosen = replace(chosen, lazy=False)
    image, engine = manifest.container_image, registry.by_name(manifest.engine)
    if can.container_images and image is not None and not cast(CarriesContainerImages, engine).has_container_image(image.id):
        raise RestoreFailed(f"container image {image.name} ({image.id[:12]}) is missing here", where="nothing was touched")
    if manifest.volumes and not options.ignore_volumes:
        names = ", ".join(name for name, _ in manifest.volumes)
        emit(Notice(source.ref, f"all copies share the volume{'s' if len(manifest.volumes) > 1 else ''} {names}", warning=True))
    stop = threading.Event()
    with catalog.lease_fd(source) as lease:
        draft = catalog.begin(manifest.name)
        try:
            unpacking = Unpacking(catalog, source, draft.stage, emit=emit, label=source.ref)
            def one(copy: Copy) -> Outcome:
                mine = replace(chosen, name=copy.name, publish=copy.publish)
                shared = restoring.Source(copy.name, manifest, draft, source, lease, unpacked=unpacking.wait)
                try:
                    outcome = restoring.bring_back(shared, mine, catalog, emit)
                except CkptError as error:
                    if BOUND in error.message:
                        error.hint = "a copy has an address of its own: let the program listen on all of them (0.0.0.0), or on the loopback"
                    if all_or_none:
                        stop.set()
                    return failure(copy.name, error)
                return replace(outcome, target=copy.name, stats={**outcome.stats, "materialize_s": round(unpacking.took_s, 6)})

            works = {copy.name: partial(one, copy) for copy in copies}
            try:
                if not chosen.lazy:
                    unpacking.wait()
                faults.point("clone-unpacking")
                results = parallel.run_all(works, width=width or 2 * (os.cpu_count() or 1), stop=stop)
            finally:
                unpacking.wait()  # when that failed, so did all
        finally:
            draft.close()
            catalog.sweep()  # what no keeper has a share in
    outcomes = [_outcome(name, result) for name, result in results.items()]
    if all_or_none and not all(outcome.ok for outcome in outcomes):
        return [_taken_back(outcome, catalog) if outcome.ok else outcome for outcome in outcomes]
    return outcomes


def _outcome(name: str, result: Outcome | BaseException) -> Outcome:
    if isinstance(result, Outcome):
        return result
    if isinstance(result, CkptError):
        return failure(name, result)
    raise result


def _taken_back(outcome: Outcome, catalog: Catalog) -> Outcome:
    """Remove a copy that came, because another one did not."""
    container = outcome.container
    try:
        if container is not None:
            engine = registry.by_name(container.engine)
            engine.stop(container, END_S)  # type: ignore[attr-defined]
            engine.remove(engine.describe(container))
    except CkptError as error:
        return replace(outcome, warnings=(*outcome.warnings, f"it was to be removed, for another copy failed, and is still there: {error.message}"))
    return failure(outcome.target, CkptError("it was removed again: another copy failed", where="nothing of it is left"))


def _running(ref: str) -> tuple[Engine, Container] | None:
    """The running container that a reference means; None: it is about a checkpoint."""
    if "@" in ref:
        return None
    try:
        engine, container = resolve.resolve(Target.parse(ref))
    except TargetNotFound:
        return None
    container = engine.describe(container)
    return (engine, container) if container.state == "running" else None


def _taken(engine: Engine, copies: Sequence[Copy]) -> list[str]:
    known = {container.name for container in engine.containers()}
    return [copy.name for copy in copies if copy.name in known]


def _there(names: Sequence[str]) -> str:
    what = "are containers of these names" if len(names) > 1 else "is a container of this name"
    return f"there {what} already: {', '.join(names)}"


def _saved(container: Container, dump: DumpOptions, store_root: Path, emit: Emit) -> Checkpoint:
    """A checkpoint of the running original, which runs on."""
    label = f"{container.engine}:{container.name}"
    found = saving.checkpoint([Target.parse(label)], options=replace(dump, leave_running=True), store_root=store_root, emit=emit)
    outcome = mark.made(found, [TAG], f"for copies, {time.strftime('%Y-%m-%d %H:%M:%S')}", store_root=store_root)[0]
    if outcome.error is not None or outcome.checkpoint is None:
        raise outcome.error or DumpFailed(f"{container.name} could not be saved")
    return outcome.checkpoint
