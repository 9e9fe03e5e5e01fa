"""An archive into the store: verified, nothing restored."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal

from ckpt.archive import foreign, layout, reader
from ckpt.errors import TargetNotFound
from ckpt.events import BytesMoved, Emit, Notice, StepDone, StepStarted
from ckpt.model import Manifest
from ckpt.ops import faults
from ckpt.ops.result import Outcome
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.job import DEFAULT_ROOT


def import_(source: Path | Literal["-"], *, name: str | None = None, store_root: Path = DEFAULT_ROOT, emit: Emit) -> Outcome:
    """Unpack an archive (a file, or "-" for the standard input) into the store and verify it on the way.

    Args:
        name: what to call it in the store; its own name when None.

    Raises:
        TargetNotFound, ArchiveInvalid, DigestMismatch, NoSpace: the store is as before.
    """
    label = str(source)
    if source == "-":
        return _import(sys.stdin.buffer, None, label, name, store_root, emit)
    path = Path(source)
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError):
        raise TargetNotFound(f"there is no archive {label!r}") from None
    with file:
        return _import(file, path.stat().st_size or None, label, name, store_root, emit)


def _import(file: BinaryIO, total: int | None, label: str, name: str | None, root: Path, emit: Emit) -> Outcome:
    catalog = Catalog(root)
    catalog.sweep()
    began = time.monotonic()
    draft = catalog.begin(name or "import", origin="import")
    try:
        manifest = unpack(file, draft, label, emit, total)
        draft.name = name or manifest.name
        faults.point("unpacked")
        checkpoint = draft.commit(replace(manifest, name=draft.name))
    except BaseException:
        draft.discard()
        raise
    stats: dict[str, float | int | str] = {"size_bytes": checkpoint.manifest.size_bytes, "total_s": round(time.monotonic() - began, 3)}
    return Outcome(label, True, checkpoint, stats=stats)


def unpack(file: BinaryIO, draft: Draft, label: str, emit: Emit, total: int | None = None) -> Manifest:
    """An archive into a draft, verified; one that is not ours gets a made-up manifest with digests from now on, and a notice."""
    began, done = time.monotonic(), 0
    emit(StepStarted(label, "unpack"))

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        emit(BytesMoved(label, "unpack", done, total))

    manifest = reader.extract(file, draft.stage, on_bytes=on_bytes)
    if manifest is None:
        foreign.convert(draft.stage)
        manifest = reader.foreign_manifest(draft.stage)
        manifest = replace(manifest, digests=layout.digest_members(draft.stage))
        # No warning: podman's archives have no digests to begin with, and an import of one is no half success.
        emit(Notice(label, f"written by {manifest.foreign}, without digests: it cannot be verified that it is whole"))
    emit(StepDone(label, "unpack", "digests equal" if not manifest.foreign else "", time.monotonic() - began))
    return manifest
