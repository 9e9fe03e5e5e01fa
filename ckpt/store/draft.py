"""A checkpoint being written."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ckpt.archive.layout import is_bulk, stage_members
from ckpt.model import Checkpoint, Manifest

if TYPE_CHECKING:
    from ckpt.store.catalog import Catalog
    from ckpt.store.reading import StoreMembers
    from ckpt.store.recipe import Bulk
    from ckpt.store.sink import Packer, Sink

PRIVATE: Final = ".store"
"""In a draft's directory: what the store keeps there for itself, `pack` and `claims`."""
PACK: Final = "pack"
CLAIMS: Final = "claims"


class Draft:
    """A checkpoint being written. Exactly one of `commit` and `discard` is called; a dead owner's draft is swept.

    Small members are plain files in `stage`. Bulk members go through a `sink`, or are plain files as well and packed by `commit`.
    """

    def __init__(self, catalog: Catalog, name: str, identity: str, fd: int, origin: str) -> None:
        self._catalog = catalog
        self._fd = fd
        self._lock = threading.Lock()
        self._packer: Packer | None = None
        self._packs: list[str] = []
        self._sinks: dict[str, Sink] = {}
        self._bulk: dict[str, Bulk] = {}
        self._plain: dict[str, str] = {}
        self.name = name
        self.id = identity
        self.origin = origin
        self.pinned = False
        """The checkpoint that becomes of it is pinned from its first moment on."""
        self.tags: tuple[str, ...] = ()
        """Tags, note and group that the checkpoint has from its first moment."""
        self.note = ""
        self.group = ""
        self.flat_digests = True
        """Make the SHA-256 of what sinks write, too. Without it the manifest has none of them; an archive gets them when it is written."""
        self.raw = False
        """Large members that are plain files stay so: nothing is compressed or shared with other checkpoints. Those of which the manifest has no
        digest get a seal. Not in a store with a key."""

    @property
    def stage(self) -> Path:
        """The directory to fill (0700, same file system as the store)."""
        return self._catalog.drafts / self.id

    @property
    def digests(self) -> dict[str, str]:
        """Member -> "sha256:HEX" of what finished sinks wrote."""
        return {name: member.digest for name, member in sorted(self._bulk.items()) if member.digest}

    @property
    def size_bytes(self) -> int:
        """Bytes of all members there are: plain files and finished sinks."""
        plain = (os.lstat(self.stage / name).st_size for name in stage_members(self.stage) if not name.endswith("/"))
        return sum(plain) + self.bulk_bytes

    @property
    def bulk_bytes(self) -> int:
        """Bytes of the members that sinks wrote."""
        return sum(member.size_bytes for member in self._bulk.values())

    def bulk_size_bytes(self, name: str) -> int:
        """The size of a member that a finished sink wrote. Raises KeyError."""
        return self._bulk[name].size_bytes

    def prepare(self) -> None:
        """Load what is needed for a first sink, ahead of time (while a container still runs).

        Raises:
            NoSpace, PermissionDenied: the store cannot be written.
        """
        self._packing()

    def sink(self, name: str, *, digest: bool | None = None) -> Sink:
        """Write a bulk member straight into chunks. A second sink of the same name replaces what the first one wrote.

        Args:
            name: a member of the layout for which `is_bulk` holds.
            digest: also make the flat SHA-256 of the content (None: as `flat_digests` says).

        Raises:
            NoSpace, PermissionDenied: the store cannot be written.
        """
        from ckpt.store.sink import Sink

        if not is_bulk(name):
            raise ValueError(f"{name} is no bulk member")
        wanted = self.flat_digests if digest is None else digest
        sink = Sink(name, self._packing(), lambda: self._catalog.storage("store the checkpoint"), self._finished, digest=wanted)
        with self._lock:
            old = self._sinks.pop(name, None)
            self._sinks[name] = sink
            self._bulk.pop(name, None)
        if old is not None:
            old.abort()
        return sink

    def members(self) -> StoreMembers:
        """What is there by now, plain files and finished sinks, for reading (and to be closed) before the commit."""
        from ckpt.store.reading import PageReader, StoreMembers
        from ckpt.store.recipe import Recipe

        own = None
        if self._packer is not None:
            self._packer.flush()
            with self._catalog.storage("store the checkpoint"):
                self._packer.writer.wait()
            own = self._packer.writer.reader(self.id, self._catalog.key)
        found = Recipe([self.id, *self._packs], dict(self._bulk))
        return StoreMembers(self.stage, found, PageReader(self.stage, found, self._catalog.packs, self._catalog.key, own=own))

    def pack(self, known: dict[str, str] | None = None) -> None:
        """Move bulk members that are plain files in the stage into chunks.

        Args:
            known: digests that are known already; of other members they are made on the way.
        """
        names = [name for name in stage_members(self.stage) if not name.endswith("/") and is_bulk(name)]
        if self.raw and self._catalog.key is None:
            self._seal([name for name in names if name not in (known or {})])
            return
        for name in names:
            path = self.stage / name
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                about = os.fstat(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                with self.sink(name, digest=name not in (known or {})) as sink:
                    sink.read_from(fd, about.st_size)
            finally:
                os.close(fd)
            self._bulk[name].mtime_s = about.st_mtime
            self._bulk[name].digest = self._bulk[name].digest or (known or {})[name]
            path.unlink()

    def _seal(self, names: list[str]) -> None:
        from ckpt.store import base
        from ckpt.store.pages import Tagger

        if not names:
            return
        with self._catalog.locked():
            tagger = Tagger(base.secret(self._catalog.root))
        for name in names:
            fd = os.open(self.stage / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                os.fchmod(fd, 0o600)  # CRIU writes it for everybody to read
                seal = tagger.seal()
                seal.read(fd)
            finally:
                os.close(fd)
            self._plain[name] = seal.text()

    def commit(self, manifest: Manifest, *, sign: Callable[[bytes], bytes] | None = None) -> Checkpoint:
        """Make the draft a checkpoint: pack it, number it, bring every byte to the disk, rename it into place.

        The id, the name and the generation of `manifest` are set here, and so is `size_bytes`; digests of members that a sink wrote are
        added when there are digests of others. A manifest that is in the draft with a signature over it stays as it came.

        Args:
            sign: makes a signature over the manifest's bytes.

        Raises:
            NoSpace: the disk is full; the draft is still there, to be discarded.
            DigestMismatch: a sink wrote something else than the manifest says.
        """
        with self._catalog.storage("store the checkpoint"):
            return self._catalog.adopt(self, manifest, sign)

    def finish(self) -> Path | None:
        """End packing: recipe and pack are on the disk. Returns the pack, if there is one (for `Catalog.adopt`)."""
        from ckpt.store import durable, recipe

        if open_sinks := [name for name, sink in self._sinks.items() if not sink.closed]:
            raise ValueError(f"the sink of {open_sinks[0]} is still open")
        if self._plain and not self._bulk:
            durable.write_file(self.stage / recipe.NAME, recipe.dumps(recipe.Recipe([], {}, self._plain)))
        if not self._bulk:
            self._stop()
            return None
        assert self._packer is not None
        self._packer.flush()
        writer = self._packer.writer
        writer.wait()
        made = writer.path if writer.count else None
        if made:
            writer.finish()
        self._stop()
        durable.write_file(self.stage / recipe.NAME, recipe.dumps(recipe.Recipe([self.id, *self._packs], self._bulk, self._plain)))
        return made

    def discard(self) -> None:
        """Remove the draft. Never raises for what is gone already."""
        self._stop()
        shutil.rmtree(self.stage, ignore_errors=True)
        self.close()

    def share(self) -> None:
        """Let readers in, still no remover (the step before a checkpoint appears)."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def fileno(self) -> int:
        """The lock's descriptor: a process that inherits it keeps the draft alive after us."""
        return self._fd

    def close(self) -> None:
        """Give the lock back (also done by the kernel when the owner dies)."""
        self._stop()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _finished(self, sink: Sink, member: Bulk) -> None:
        with self._lock:
            if self._sinks.get(sink.name) is sink:
                self._bulk[sink.name] = member

    def _stop(self) -> None:
        for sink in self._sinks.values():
            sink.abort()
        if self._packer is not None:
            self._packer.writer.close()
            self._packer = None

    def _packing(self) -> Packer:
        with self._lock:
            if self._packer is None:
                with self._catalog.storage("store the checkpoint"):
                    self._packer = self._begin()
            return self._packer

    def _begin(self) -> Packer:
        from ckpt.store import base
        from ckpt.store.pack import PackWriter
        from ckpt.store.pages import Tagger
        from ckpt.store.sink import Packer

        catalog = self._catalog
        private = self.stage / PRIVATE
        with catalog.locked():
            tagger = Tagger(catalog.key or base.secret(catalog.root))
            known = base.order(catalog.all(), self.name)
            self._packs = base.choose(known, catalog.packs)
            private.mkdir(mode=0o700, exist_ok=True)
            # What is named here stays until this draft is a checkpoint or gone: see collect.
            claims = private / CLAIMS
            with open(os.open(claims, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
                json.dump({"packs": self._packs}, file)
        index = base.load(self._packs, catalog.packs, tagger, known)
        threads = max(2, min(8, os.cpu_count() or 2))
        if catalog.spill is None:
            return Packer(PackWriter(private / PACK, tagger.id, catalog.key, threads), tagger, index)
        catalog.spill.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A plain file there is swept as nobody's, should we be killed before it has lost its name.
        nameless = catalog.spill / f"{self.id}.spill"
        writer = PackWriter(nameless, tagger.id, catalog.key, threads)
        nameless.unlink()
        return Packer(writer, tagger, index)
