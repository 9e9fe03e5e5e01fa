"""A checkpoint as one archive, carried anywhere: from the store, or straight from a running container, without the store in between."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from pathlib import Path
from typing import cast

from ckpt.archive import layout, seal, trust, writer
from ckpt.archive import manifest as manifest_file
from ckpt.archive.members import Members
from ckpt.errors import TargetNotFound, TransferFailed, UsageError
from ckpt.events import BytesMoved, Emit, Notice, StepDone, StepStarted
from ckpt.model import Checkpoint, DumpOptions, Manifest, Target
from ckpt.ops import faults, recover, resolve
from ckpt.ops.checkpoint import save
from ckpt.ops.result import Outcome
from ckpt.store import durable, volatile
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.job import DEFAULT_ROOT
from ckpt.transports.base import CarrierOptions, Location, Payload, Stored, Upload, carrier_of

Figures = dict[str, float | int | str]


def export(
    ref: str,
    to: Location,
    *,
    compress: str = "zstd",
    level: int | None = None,
    leave_running: bool = False,
    options: DumpOptions,
    carrier: CarrierOptions | None = None,
    outgoing: trust.Outgoing = trust.OPEN,
    store_root: Path = DEFAULT_ROOT,
    emit: Emit,
) -> Outcome:
    """Write an archive of `ref` to a location: a file, the standard output, another host, a web server, …

    `ref` is a checkpoint in the store, else a running container: that one is dumped, written, and only when the other end has the whole
    archive (a file: on the disk) ended, or left running. `ENGINE:NAME` is always the container.

    Args:
        outgoing: whom the archive is encrypted to (then nothing of the container is on a disk in clear on the way), and who signs it.

    Raises:
        CkptError: no archive was written; a container goes on as before.
    """
    if compress not in ("zstd", "gzip", "none"):
        raise UsageError(f"no compression is called {compress!r}", hint="zstd, gzip or none")
    if carrier is not None and carrier.registry_form == "image" and outgoing.recipients:
        raise UsageError("an encrypted archive cannot be an image: engines could not read it", hint="--as artifact")
    for line in recover.sweep(store_root):
        emit(Notice("", line, warning=True))
    outgoing.try_key()
    catalog = Catalog(store_root)
    packing = _Packing(to, _carrier_options(carrier, ref, store_root, emit), cast(writer.Compression, compress), level, outgoing, ref, emit)
    try:
        checkpoint = catalog.find(ref)
    except TargetNotFound as missing:
        try:
            engine, container = resolve.resolve(Target.parse(ref))
        except TargetNotFound as error:
            both = f"there is neither a checkpoint nor a container {ref!r}"
            raise TargetNotFound(both, hint="; ".join(h for h in (missing.hint, error.hint) if h) or None) from None
        packing.check()
        if packing.options.registry_form == "image" and engine.name != "podman":
            raise UsageError(f"only a container of podman can become an image, {ref} is of {engine.name}", hint="--as artifact") from None

        def keep(draft: Draft, manifest: Manifest) -> tuple[Checkpoint | None, Figures]:
            final = replace(manifest, id=draft.id, size_bytes=draft.size_bytes)
            durable.write_file(draft.stage / layout.MANIFEST, manifest_file.dumps(final))
            with draft.members() as members:
                figures = packing.write(members, final)
            emit(Notice(ref, f"{to} {figures['digest']}"))
            return None, {"size_bytes": final.size_bytes, **figures}

        sealed = bool(outgoing.recipients)
        chosen = replace(options, leave_running=leave_running or options.leave_running, sealed=sealed)
        return save(engine, container, ref, chosen, catalog, emit, keep, step="archive", drafts=volatile.catalog(store_root) if sealed else None)
    began = time.monotonic()
    emit(StepStarted(ref, "archive", f"{checkpoint.ref}, from the store"))
    with catalog.lease(checkpoint), catalog.outgoing(checkpoint) as (members, manifest):
        figures = packing.write(members, manifest)
    emit(StepDone(ref, "archive", f"{to} {figures['digest']}", time.monotonic() - began))
    return Outcome(ref, True, checkpoint, stats={"size_bytes": checkpoint.manifest.size_bytes, **figures})


def _carrier_options(given: CarrierOptions | None, label: str, root: Path, emit: Emit) -> CarrierOptions:
    return replace(given or CarrierOptions(), spool_dir=root, notice=lambda text: emit(Notice(label, text)))


class _Packing:
    """Members -> archive -> carrier."""

    def __init__(
        self,
        to: Location,
        options: CarrierOptions,
        compress: writer.Compression,
        level: int | None,
        outgoing: trust.Outgoing,
        label: str,
        emit: Emit,
    ) -> None:
        self.to = to
        self.options = options
        self.compress = compress
        self.level = level
        self.outgoing = outgoing
        self.label = label
        self.emit = emit
        self.carrier = carrier_of(to)

    def check(self) -> None:
        """What would fail is better known before a container is touched."""
        self.carrier.check_write(self.to, self.options)

    def write(self, members: Members, manifest: Manifest) -> Figures:
        """Returns the figures when the other end has it all."""
        members = self.outgoing.signed(members)
        sealed = bool(self.outgoing.recipients)
        total, done = sum(members.size_bytes(name) for name in members.names()), 0

        def on_bytes(count: int) -> None:
            nonlocal done
            done += count
            self.emit(BytesMoved(self.label, "archive", done, total))

        payload = Payload(compression=self.compress, encrypted=sealed, manifest=None if sealed else manifest)
        with self.carrier.open_write(self.to, self.options, payload) as upload:
            out = _Digested(upload)
            with seal.encrypting(out, self.outgoing.recipients) as stream:
                writer.write(members, stream, compress=self.compress, level=self.level, on_bytes=on_bytes)
            faults.point("archived")
            stored = upload.commit()
        digest = out.sha256.hexdigest()
        self._compare(stored, out.count, digest)
        return {"archive_bytes": out.count, "path": stored.reference or str(self.to), "digest": f"sha256:{digest}"}

    def _compare(self, stored: Stored, size: int, digest: str) -> None:
        """A carrier has done so itself; the workload's end hangs on it, so once more."""
        if stored.size_bytes != size or stored.sha256 not in (None, digest):
            raise TransferFailed(f"{self.to}: the other end has something else than was sent")


class _Digested:
    """An upload as the file that the writer writes to."""

    def __init__(self, upload: Upload) -> None:
        self._upload = upload
        self.sha256 = hashlib.sha256()
        self.count = 0

    def write(self, data: bytes | memoryview, /) -> int:
        self.sha256.update(data)
        count = self._upload.write(data)
        self.count += count
        return count

    def flush(self) -> None:
        pass
