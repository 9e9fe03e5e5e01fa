"""A checkpoint on its way out of the store, with the digests that were not made when it was saved.

Who saves a whole host does not wait for SHA-256 of all its memory: the seals of its members (see pages) say as much to this store. An archive
must carry its digests, so they are made when one is written.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO

from ckpt.archive import manifest as manifest_file
from ckpt.archive.layout import MANIFEST
from ckpt.archive.members import Members
from ckpt.model import Checkpoint, Manifest
from ckpt.store.check import digest_of, undigested

if TYPE_CHECKING:
    from ckpt.store.catalog import Catalog


@contextmanager
def outgoing(catalog: Catalog, checkpoint: Checkpoint) -> Iterator[tuple[Members, Manifest]]:
    """The body of `Catalog.outgoing`."""
    with catalog.members(checkpoint) as members:
        missing = undigested(members, checkpoint.manifest)
        if not missing:
            yield members, checkpoint.manifest
            return
        made = {name: digest_of(members, name) for name in missing}
        manifest = replace(checkpoint.manifest, digests=dict(sorted({**checkpoint.manifest.digests, **made}.items())))
        yield _WithManifest(members, manifest_file.dumps(manifest)), manifest


class _WithManifest:
    """Members with another manifest."""

    def __init__(self, members: Members, data: bytes) -> None:
        self._members, self._data = members, data

    def names(self) -> list[str]:
        return self._members.names()

    def size_bytes(self, name: str) -> int:
        return len(self._data) if name == MANIFEST else self._members.size_bytes(name)

    def mtime_s(self, name: str) -> float:
        return self._members.mtime_s(name)

    def open(self, name: str) -> AbstractContextManager[BinaryIO]:
        return io.BytesIO(self._data) if name == MANIFEST else self._members.open(name)
