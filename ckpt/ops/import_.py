"""An archive into the store: verified, nothing restored."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Literal

from ckpt.archive import layout, reader, seal, trust
from ckpt.errors import TargetNotFound
from ckpt.events import BytesMoved, Emit, Notice, StepDone, StepStarted
from ckpt.model import Manifest
from ckpt.ops import faults
from ckpt.ops.result import Outcome
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.job import DEFAULT_ROOT


def import_(
    source: Path | Literal["-"],
    *,
    name: str | None = None,
    incoming: trust.Incoming = trust.ANYBODY,
    store_root: Path = DEFAULT_ROOT,
    emit: Emit,
) -> Outcome:
    """Unpack an archive (a file, or "-" for the standard input) into the store and verify it on the way.

    Args:
        name: what to call it in the store; its own name when None.
        incoming: what opens it when it is encrypted, and whose signature it must have.

    Raises:
        TargetNotFound, ArchiveInvalid, DigestMismatch, KeyProblem, NoSpace: the store is as before.
    """
    label = str(source)
    if source == "-":
        return _import(sys.stdin.buffer, None, label, name, incoming, store_root, emit)
    path = Path(source)
    try:
        file = path.open("rb")
    except (FileNotFoundError, IsADirectoryError):
        raise TargetNotFound(f"there is no archive {label!r}") from None
    with file:
        return _import(file, path.stat().st_size or None, label, name, incoming, store_root, emit)


def _import(
    file: BinaryIO, total: int | None, label: str, name: str | None, incoming: trust.Incoming, root: Path, emit: Emit
) -> Outcome:
    catalog = Catalog(root)
    catalog.sweep()
    began = time.monotonic()
    draft = catalog.begin(name or "import", origin="import")
    try:
        manifest = unpack(file, draft, label, emit, total, incoming)
        draft.name = name or manifest.name
        faults.point("unpacked")
        checkpoint = draft.commit(replace(manifest, name=draft.name))
    except BaseException:
        draft.discard()
        raise
    stats: dict[str, float | int | str] = {"size_bytes": checkpoint.manifest.size_bytes, "total_s": round(time.monotonic() - began, 3)}
    return Outcome(label, True, checkpoint, stats=stats)


def unpack(
    file: BinaryIO, draft: Draft, label: str, emit: Emit, total: int | None = None, incoming: trust.Incoming = trust.ANYBODY
) -> Manifest:
    """An archive, encrypted or not, into a draft, verified; one that is not ours gets a made-up manifest with digests from now on, and a notice."""
    began, done = time.monotonic(), 0
    emit(StepStarted(label, "unpack"))

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        emit(BytesMoved(label, "unpack", done, total))

    signers: list[str | None] = []
    stream = seal.reading(file, incoming.identities)
    manifest = reader.extract(stream, draft.stage, on_bytes=on_bytes, judge=lambda data, given: signers.append(incoming.judge(data, given)))
    seal.finish(stream)
    if manifest is None:
        manifest = reader.foreign_manifest(draft.stage)
        manifest = replace(manifest, digests=layout.digest_members(draft.stage))
        # No warning: podman's archives have no digests to begin with, and an import of one is no half success.
        emit(Notice(label, f"written by {manifest.foreign}, without digests: it cannot be verified that it is whole"))
    said = [] if manifest.foreign else ["digests equal"]
    emit(StepDone(label, "unpack", ", ".join([*said, *(f"signed by {signer}" for signer in signers if signer)]), time.monotonic() - began))
    return manifest
