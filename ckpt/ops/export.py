"""A checkpoint as one file: from the store, or straight from a running container, without the store in between."""

from __future__ import annotations

import os
import stat
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

from ckpt.archive import layout, writer
from ckpt.archive import manifest as manifest_file
from ckpt.archive.members import Members
from ckpt.errors import TargetNotFound, UsageError
from ckpt.events import BytesMoved, Emit, Notice, StepDone, StepStarted
from ckpt.model import Checkpoint, DumpOptions, Manifest, Target
from ckpt.ops import recover, resolve
from ckpt.ops.checkpoint import save
from ckpt.ops.result import Outcome
from ckpt.store import durable
from ckpt.store.catalog import Catalog, Draft
from ckpt.store.job import DEFAULT_ROOT

Figures = dict[str, float | int | str]


def export(
    ref: str,
    output: Path | Literal["-"],
    *,
    compress: str = "zstd",
    level: int | None = None,
    leave_running: bool = False,
    options: DumpOptions,
    store_root: Path = DEFAULT_ROOT,
    emit: Emit,
) -> Outcome:
    """Write an archive of `ref` to a file (whole or not at all) or to "-", the standard output.

    `ref` is a checkpoint in the store, else a running container: that one is dumped, written, and only when the archive is on the
    disk ended (or left running). `ENGINE:NAME` is always the container.

    Raises:
        CkptError: no archive was written; a container goes on as before.
    """
    if compress not in ("zstd", "gzip", "none"):
        raise UsageError(f"no compression is called {compress!r}", hint="zstd, gzip or none")
    for line in recover.sweep(store_root):
        emit(Notice("", line, warning=True))
    catalog = Catalog(store_root)
    try:
        checkpoint = catalog.find(ref)
    except TargetNotFound as missing:
        try:
            engine, container = resolve.resolve(Target.parse(ref))
        except TargetNotFound as error:
            both = f"there is neither a checkpoint nor a container {ref!r}"
            raise TargetNotFound(both, hint="; ".join(h for h in (missing.hint, error.hint) if h) or None) from None

        def keep(draft: Draft, manifest: Manifest) -> tuple[Checkpoint | None, Figures]:
            final = replace(manifest, id=draft.id, size_bytes=draft.size_bytes)
            durable.write_file(draft.stage / layout.MANIFEST, manifest_file.dumps(final))
            with draft.members() as members:
                return None, {"size_bytes": final.size_bytes, **_write(members, final.size_bytes, output, compress, level, ref, emit)}

        chosen = replace(options, leave_running=leave_running or options.leave_running)
        return save(engine, container, ref, chosen, catalog, emit, keep, step="archive")
    began = time.monotonic()
    emit(StepStarted(ref, "archive", f"{checkpoint.ref}, from the store"))
    with catalog.lease(checkpoint), catalog.members(checkpoint) as members:
        figures = _write(members, checkpoint.manifest.size_bytes, output, compress, level, ref, emit)
    emit(StepDone(ref, "archive", str(output), time.monotonic() - began))
    return Outcome(ref, True, checkpoint, stats={"size_bytes": checkpoint.manifest.size_bytes, **figures})


def _write(members: Members, total: int, output: Path | Literal["-"], compress: str, level: int | None, label: str, emit: Emit) -> Figures:
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        emit(BytesMoved(label, "archive", done, total))

    kind = cast(writer.Compression, compress)
    if output == "-":
        size = writer.write(members, sys.stdout.buffer, compress=kind, level=level, on_bytes=on_bytes)
        sys.stdout.buffer.flush()
    elif _is_special(Path(output)):
        # A FIFO or device cannot be replaced by a finished file; its reader sees the end of the stream.
        with open(output, "wb") as out:
            size = writer.write(members, out, compress=kind, level=level, on_bytes=on_bytes)
    else:
        size = writer.write_file(members, Path(output), compress=kind, level=level, on_bytes=on_bytes)
    return {"archive_bytes": size, "path": str(output)}


def _is_special(path: Path) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
