"""A checkpoint out of the store's chunks into a directory where CRIU and the engine find it, verified before anything else is touched."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt.archive import layout
from ckpt.archive.members import Members
from ckpt.events import BytesMoved, Emit, StepDone, StepStarted
from ckpt.model import Checkpoint, Manifest
from ckpt.store.catalog import Catalog

if TYPE_CHECKING:
    from ckpt.store.reading import PageReader


class PageMember:
    """A pages file in the store, as `criu.pagechunks` reads it."""

    def __init__(self, pages: PageReader, leaf: str) -> None:
        self._pages = pages
        self._name = f"checkpoint/{leaf}"
        self.size_bytes = pages.size_bytes(self._name)

    def read(self, offset: int, length: int) -> memoryview:
        """Raises DigestMismatch, OSError."""
        data = memoryview(bytearray(length))
        return data[: self._pages.read_into(self._name, offset, data)]


def unpack(catalog: Catalog, checkpoint: Checkpoint, stage: Path, *, lazy: bool, signed: bool = False, emit: Emit, label: str) -> float:
    """Write the members of a leased checkpoint to `stage` as plain files, and compare them with its manifest.

    Args:
        lazy: of the memory pages only those that CRIU itself reads in a lazy restore; the others are verified when they are asked for.
        signed: somebody's signature was asked for. What a chunk is verified with then says that it is undamaged, not that it is his: all memory
            is compared with the manifest before anything runs.

    Returns:
        Seconds that it took.

    Raises:
        ArchiveInvalid, DigestMismatch: the checkpoint is damaged.
        NoSpace: there is not enough room for it beside the store.
    """
    manifest = checkpoint.manifest
    began, done = time.monotonic(), 0
    emit(StepStarted(label, "verify"))

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        emit(BytesMoved(label, "verify", done, None if lazy else manifest.size_bytes))

    with catalog.storage("unpack the checkpoint"):
        found = catalog.materialize(checkpoint, stage, only=_not_pages if lazy else None, on_bytes=on_bytes, flat=signed, link=True)
        if lazy:
            from ckpt.criu import pagechunks

            with catalog.members(checkpoint) as members:
                catalog.compare_plain(members)
                if signed:
                    found |= _digests(members, [name for name in members.names() if layout.is_pages(name)])
                _compare(found, manifest, stage, [] if signed else members.names())
                pagechunks.write_eager(stage / "checkpoint", lambda name: PageMember(members.pages, name))
        else:
            _compare(found, manifest, stage, [])
    took_s = time.monotonic() - began
    emit(StepDone(label, "verify", _verified(manifest, lazy), took_s))
    return took_s


class Unpacking:
    """A checkpoint of the store on its way into a directory: all but its memory is there, memory follows in a thread.

    Args and Raises: as of `unpack`, not lazily; what is wrong with the memory `wait` raises.
    """

    def __init__(self, catalog: Catalog, checkpoint: Checkpoint, stage: Path, *, emit: Emit, label: str) -> None:
        self._catalog, self._checkpoint, self._stage, self._emit, self._label = catalog, checkpoint, stage, emit, label
        self._began = time.monotonic()
        self._error: BaseException | None = None
        emit(StepStarted(label, "verify"))
        with catalog.storage("unpack the checkpoint"):
            found = catalog.materialize(checkpoint, stage, only=_not_pages)
            with catalog.members(checkpoint) as members:
                _compare(found, checkpoint.manifest, stage, members.names())
        self.took_s = 0.0
        self._thread = threading.Thread(target=self._pages, name="ckpt-unpack")
        self._thread.start()

    def wait(self) -> None:
        """Until all of it is there. Raises ArchiveInvalid, DigestMismatch, NoSpace."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _pages(self) -> None:
        manifest = self._checkpoint.manifest
        try:
            with self._catalog.storage("unpack the checkpoint"):
                found = self._catalog.materialize(self._checkpoint, self._stage, only=layout.is_pages, link=True)
            known = {name: digest for name, digest in manifest.digests.items() if layout.is_pages(name)}
            if known:
                layout.compare_digests(found, replace(manifest, digests=known))
            self.took_s = time.monotonic() - self._began
            self._emit(StepDone(self._label, "verify", _verified(manifest, False), self.took_s))
        except BaseException as error:
            self._error = error


def _digests(members: Members, names: list[str]) -> dict[str, str]:
    """ "sha256:HEX" of members, read by several threads."""

    def digest(name: str) -> str:
        made, buffer = hashlib.sha256(), memoryview(bytearray(layout.CHUNK_BYTES))
        with members.open(name) as source:
            while count := source.readinto(buffer):  # type: ignore[attr-defined]
                made.update(buffer[:count])
        return layout.DIGEST_PREFIX + made.hexdigest()

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _compare(found: dict[str, str], manifest: Manifest, stage: Path, left: list[str]) -> None:
    """`left`: what is in the store, of which memory pages are not in `found`."""
    if not manifest.digests:
        layout.require_members(stage)
        return
    known = {name: digest for name, digest in manifest.digests.items() if not (layout.is_pages(name) and name in left)}
    there = {name: digest for name, digest in found.items() if name not in (layout.MANIFEST, layout.SIGNATURE)}
    layout.compare_digests(there, replace(manifest, digests=known))


def _not_pages(name: str) -> bool:
    return not layout.is_pages(name)


def _verified(manifest: Manifest, lazy: bool) -> str:
    if not manifest.digests:
        return "no digests in it"
    return "digests equal, memory is compared while it arrives" if lazy else "digests equal"
