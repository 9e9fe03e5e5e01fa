"""What the user names for looking at: a checkpoint of the store, else an archive file; its manifest and its members."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ckpt.archive import reader, trust
from ckpt.archive.members import Members
from ckpt.archive.opened import ArchiveMembers
from ckpt.errors import TargetNotFound
from ckpt.model import Checkpoint, Manifest
from ckpt.store.catalog import Catalog
from ckpt.store.job import DEFAULT_ROOT


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint for reading. `checkpoint`: of the store; None for a file. `has_manifest`: its manifest was written by ckpt, not made up."""

    label: str
    manifest: Manifest
    members: Members
    path: Path
    checkpoint: Checkpoint | None = None
    archive_bytes: int = 0
    compression: str = ""

    @property
    def has_manifest(self) -> bool:
        """Whether ckpt wrote it; else there are no digests."""
        return not self.manifest.foreign


@contextmanager
def opening(ref_or_file: str, *, incoming: trust.Incoming = trust.ANYBODY, store_root: Path = DEFAULT_ROOT) -> Iterator[Opened]:
    """Open a checkpoint of the store, else an archive file. What is written as a path (with a "/") is a file.

    Args:
        incoming: its identities open an encrypted archive.

    Raises:
        TargetNotFound: it is neither.
        ArchiveInvalid: the file is no archive of a checkpoint.
        KeyProblem, DigestMismatch: it is encrypted, and cannot be opened.
    """
    path = Path(ref_or_file)
    if "/" not in ref_or_file:
        catalog = Catalog(store_root)
        try:
            checkpoint = catalog.find(ref_or_file)
        except TargetNotFound:
            if not path.is_file():
                raise
        else:
            with catalog.lease(checkpoint), catalog.members(checkpoint) as members:
                yield Opened(checkpoint.ref, checkpoint.manifest, members, checkpoint.directory, checkpoint)
            return
    if not path.is_file():
        raise TargetNotFound(f"there is no archive {ref_or_file!r}")
    with ArchiveMembers(path, identities=incoming.identities) as archive:
        seen = reader.look(archive)
        yield Opened(ref_or_file, seen.manifest, archive, path, None, archive.archive_bytes, archive.compression)
