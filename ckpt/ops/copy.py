"""A checkpoint into another store of this host: whole, verified, its name kept, its marks with it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from ckpt.archive import layout
from ckpt.errors import CkptError, UsageError
from ckpt.events import BytesMoved, Emit, StepDone, StepStarted
from ckpt.model import Checkpoint
from ckpt.ops import faults
from ckpt.ops.result import Outcome, failure
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.check import undigested
from ckpt.store.job import DEFAULT_ROOT

_PIECE_BYTES: Final = 1 << 20


def copy(refs: Sequence[str], to_root: Path, *, store_root: Path = DEFAULT_ROOT, emit: Emit) -> list[Outcome]:
    """Copy checkpoints into the store at `to_root`; each gets the next number of its name there.

    Raises:
        UsageError: it is the same store.
    """
    source, destination = Catalog(store_root), Catalog(to_root)
    if os.path.realpath(store_root) == os.path.realpath(to_root):
        raise UsageError(f"{to_root} is the store that they are in")
    found, outcomes = [], []
    for ref in refs:
        try:
            found.append((ref, source.find(ref)))
        except CkptError as error:
            outcomes.append(failure(ref, error))
    if outcomes:
        return outcomes
    for ref, checkpoint in found:
        try:
            outcomes.append(_copy(source, checkpoint, destination, ref, emit))
        except CkptError as error:
            outcomes.append(failure(ref, error))
    return outcomes


def _copy(source: Catalog, checkpoint: Checkpoint, destination: Catalog, label: str, emit: Emit) -> Outcome:
    began = time.monotonic()
    emit(StepStarted(label, "copy", str(destination.root)))
    destination.sweep()
    with source.lease(checkpoint):
        draft = destination.begin(checkpoint.manifest.name, origin=checkpoint.entry.origin)
        try:
            _members(source, checkpoint, draft, label, emit)
            faults.point("copied")
            made = draft.commit(checkpoint.manifest)
        except BaseException:
            draft.discard()
            raise
    marks = checkpoint.entry
    made = destination.amend(made, lambda entry: replace(entry, tags=marks.tags, note=marks.note, pinned=marks.pinned))
    emit(StepDone(label, "copy", made.ref, time.monotonic() - began))
    return Outcome(label, True, made, stats={"size_bytes": made.manifest.size_bytes, "total_s": round(time.monotonic() - began, 3)})


def _members(source: Catalog, checkpoint: Checkpoint, draft: Draft, label: str, emit: Emit) -> None:
    """Every member but the manifest, which the commit writes; compared with the manifest's digests on the way."""
    members = source.members(checkpoint)
    done = 0
    buffer = memoryview(bytearray(_PIECE_BYTES))
    for name in members.names():
        if name.endswith("/"):
            (draft.stage / name).mkdir(mode=0o700, exist_ok=True)
            continue
        if name == layout.MANIFEST:
            continue
        with members.open(name) as file:
            if layout.is_bulk(name):
                sink = draft.sink(name)
                while count := file.readinto(buffer):  # type: ignore[attr-defined]
                    sink.write(buffer[:count])
                    done += count
                    emit(BytesMoved(label, "copy", done, checkpoint.manifest.size_bytes))
                sink.close()
                continue
            path = draft.stage / name
            path.parent.mkdir(mode=0o700, exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(fd, "wb") as out:
                while count := file.readinto(buffer):  # type: ignore[attr-defined]
                    out.write(buffer[:count])
                    done += count
    found = {**layout.digest_members(draft.stage, only=lambda name: not layout.is_bulk(name)), **draft.digests}
    if checkpoint.manifest.digests:
        sealed = undigested(members, checkpoint.manifest)  # their digests are new: the commit adds them
        layout.compare_digests({name: digest for name, digest in found.items() if name not in sealed}, checkpoint.manifest)
