"""A checkpoint of the store as a directory of plain files, for whoever needs one: a restore."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ckpt.archive import layout
from ckpt.model import Checkpoint
from ckpt.store.catalog import Catalog, Draft


@contextmanager
def opened(catalog: Catalog, checkpoint: Checkpoint, *, on_bytes: Callable[[int], None] | None = None) -> Iterator[Draft]:
    """A draft whose stage holds every member, each compared with the manifest. It is removed at the end, unless it was closed: somebody
    else has inherited its lock then, and removes it.

    Raises:
        TargetNotFound: the checkpoint is gone.
        DigestMismatch: it is damaged.
        NoSpace: there is no room for the files.
    """
    draft = catalog.begin(checkpoint.manifest.name)
    try:
        with catalog.lease(checkpoint):
            found = catalog.materialize(checkpoint, draft.stage, on_bytes=on_bytes)
        if checkpoint.manifest.digests:
            layout.compare_digests(found, checkpoint.manifest)
        else:
            layout.require_members(draft.stage)
        yield draft
    finally:
        if draft.fileno() >= 0:
            draft.discard()
