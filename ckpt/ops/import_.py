"""An archive into the store, from wherever a carrier reaches: verified, nothing restored."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, Final, cast

from ckpt.archive import foreign, layout, reader, seal, trust
from ckpt.errors import ArchiveInvalid, DigestMismatch
from ckpt.events import BytesMoved, Emit, Notice, StepDone, StepStarted
from ckpt.model import Manifest
from ckpt.ops import faults, policy
from ckpt.ops.result import Outcome
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.job import DEFAULT_ROOT
from ckpt.transports.base import CarrierOptions, Download, Location, carrier_of

_REST_BYTES: Final = 64 << 10


def import_(
    source: Location,
    *,
    name: str | None = None,
    digest: str | None = None,
    carrier: CarrierOptions | None = None,
    incoming: trust.Incoming = trust.ANYBODY,
    store_root: Path = DEFAULT_ROOT,
    emit: Emit,
) -> Outcome:
    """Unpack an archive from a location into the store and verify it on the way.

    Args:
        name: what to call it in the store; its own name when None.
        digest: what the archive's SHA-256 must be, in hex.
        incoming: what opens it when it is encrypted, and whose signature it must have.

    Raises:
        TargetNotFound, ArchiveInvalid, DigestMismatch, KeyProblem, NoSpace and what its carrier raises: the store is as before.
    """
    label = str(source)
    with arriving(source, carrier, digest, emit) as archive:
        catalog = Catalog(store_root)
        catalog.sweep()
        began = time.monotonic()
        draft = catalog.begin(name or "import", origin="import")
        try:
            manifest = unpack(archive, draft, label, emit, incoming)
            draft.name = name or manifest.name
            if told := policy.notice(draft.stage, manifest):
                emit(Notice(label, told))
            faults.point("unpacked")
            checkpoint = draft.commit(replace(manifest, name=draft.name))
        except BaseException:
            draft.discard()
            raise
    stats: dict[str, float | int | str] = {
        "size_bytes": checkpoint.manifest.size_bytes,
        "archive_bytes": archive.count,
        "digest": f"sha256:{archive.sha256.hexdigest()}",
        "total_s": round(time.monotonic() - began, 3),
    }
    return Outcome(label, True, checkpoint, stats=stats)


class Archive:
    """An archive that comes in: read to its end, counted, its digest made on the way."""

    def __init__(self, download: Download, expected: str | None, label: str) -> None:
        self._source = seal.Prefixed(download)
        self._expected = expected
        self._label = label
        self.size_bytes = download.size_bytes
        self.count = 0
        self.sha256 = hashlib.sha256()

    def head(self, size: int) -> bytes:
        """The first bytes, fewer only of a shorter archive; they are read again."""
        return self._source.peek(size)

    @property
    def sealed(self) -> bool:
        """Whether it is encrypted, told by its first bytes."""
        return seal.is_sealed(self.head(seal.HEAD_BYTES))

    def read(self, size: int = -1, /) -> bytes:
        data = self._source.read(size)
        self.count += len(data)
        self.sha256.update(data)
        return data

    def finish(self) -> None:
        """The end of the archive must be the end of what comes, and all of it what was expected.

        Raises:
            ArchiveInvalid, DigestMismatch.
        """
        rest = 0
        while data := self.read(_REST_BYTES):
            rest += len(data)
            if rest > _REST_BYTES:
                raise ArchiveInvalid(f"{self._label} goes on after the archive's end")
        if self._expected is not None and self.sha256.hexdigest() != self._expected:
            raise DigestMismatch(f"{self._label} is not the archive that was asked for: its digest is sha256:{self.sha256.hexdigest()}")


@contextmanager
def arriving(source: Location, options: CarrierOptions | None, digest: str | None, emit: Emit) -> Iterator[Archive]:
    """The archive at a location. Raises what the carrier raises."""
    chosen = replace(options or CarrierOptions(), notice=lambda text: emit(Notice(str(source), text)))
    with carrier_of(source).open_read(source, chosen) as download:
        yield Archive(download, digest, str(source))


def unpack(
    archive: Archive, draft: Draft, label: str, emit: Emit, incoming: trust.Incoming = trust.ANYBODY, *, pack: bool = True
) -> Manifest:
    """An archive, encrypted or not, into a draft, verified; one that is not ours gets a made-up manifest with digests from now on, and a notice.

    Args:
        pack: bulk members go straight into the store's chunks; else every member becomes a plain file in the stage.
    """
    began, done = time.monotonic(), 0
    emit(StepStarted(label, "unpack"))

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        emit(BytesMoved(label, "unpack", done, archive.size_bytes))

    def sink(name: str) -> reader.Sink | None:
        # What containerd has there is not what podman has (foreign.convert): it must be looked into first.
        return None if name == layout.ROOTFS_DIFF and not (draft.stage / layout.MANIFEST).exists() else draft.sink(name)

    signers: list[str | None] = []
    stream = seal.decrypting(archive, incoming.identities) if archive.sealed else cast(BinaryIO, archive)
    manifest = reader.extract(
        stream,
        draft.stage,
        on_bytes=on_bytes,
        judge=lambda data, given: signers.append(incoming.judge(data, given)),
        sinks=sink if pack else None,
    )
    seal.finish(stream)
    archive.finish()
    if manifest is None:
        foreign.convert(draft.stage)
        manifest = reader.foreign_manifest(draft.stage, bulk={name: draft.bulk_size_bytes(name) for name in draft.digests})
        manifest = replace(manifest, digests={**layout.digest_members(draft.stage), **draft.digests})
        # No warning: podman's archives have no digests to begin with, and an import of one is no half success.
        emit(Notice(label, f"written by {manifest.foreign}, without digests: it cannot be verified that it is whole"))
    said = [*([] if manifest.foreign else ["digests equal"]), *(f"signed by {signer}" for signer in signers if signer)]
    emit(StepDone(label, "unpack", ", ".join(said), time.monotonic() - began))
    return manifest
