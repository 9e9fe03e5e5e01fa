"""What dead owners left behind: drafts, removed checkpoints, lock files, packs that never became part of a checkpoint."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt.errors import CkptError
from ckpt.store import locks

if TYPE_CHECKING:
    from ckpt.store.catalog import Catalog


def sweep(catalog: Catalog) -> list[str]:
    """The body of `Catalog.sweep`."""
    gone = removed(catalog)
    names: list[str] = []
    for name in gone:
        with suppress(CkptError, OSError):
            names += packs_of(catalog.drafts / name)
    give_back(catalog, names)
    return clear(catalog, gone)


def removed(catalog: Catalog) -> list[str]:
    """What is in `tmp/` of removed checkpoints, whose remover may have died before he gave back their packs."""
    return [name for name in locks.listing(catalog.drafts) if "." in name and (catalog.drafts / name).is_dir()]


def packs_of(directory: Path) -> list[str]:
    """The packs that the checkpoint in a directory needs. Raises DigestMismatch."""
    from ckpt.store import recipe

    return recipe.load_packs(directory / recipe.NAME)


def give_back(catalog: Catalog, packs: list[str]) -> None:
    """What a removed checkpoint leaves behind; what cannot be done now is done by the next collection."""
    if packs:
        with suppress(CkptError, OSError):
            catalog.collect(packs=packs)


def clear(catalog: Catalog, removed: Collection[str] = ()) -> list[str]:
    """`sweep`, but of removed checkpoints only these."""
    if not catalog.drafts.is_dir():
        return []
    doomed: list[tuple[Path, int]] = []
    with catalog.storage("sweep the store"), catalog.locked():
        for name in locks.listing(catalog.drafts):
            path = catalog.drafts / name
            try:
                if not path.is_dir() or path.is_symlink():
                    path.unlink(missing_ok=True)
                elif "." in name:  # a removed checkpoint: nobody's
                    if name in removed:
                        doomed.append((path, -1))
                elif not locks.is_elsewhere(catalog.locks / name):
                    doomed.append((path, locks.take(catalog.locks / name, fcntl.LOCK_EX | fcntl.LOCK_NB)))
                    # It died between the renames of its pack and of itself: nobody can have referred to that pack.
                    (catalog.packs / f"{name}.pack").unlink(missing_ok=True)
            except BlockingIOError:
                continue
        busy = {path.name for path, _ in doomed}
        for name in locks.listing(catalog.locks):
            if name in busy or locks.is_elsewhere(catalog.locks / name):
                continue
            if not (catalog.drafts / name).exists() and not (catalog.entries / name).exists():
                with suppress(BlockingIOError):
                    os.close(locks.take(catalog.locks / name, fcntl.LOCK_EX | fcntl.LOCK_NB))
                    (catalog.locks / name).unlink(missing_ok=True)
    for path, fd in doomed:
        shutil.rmtree(path, ignore_errors=True)
        if fd >= 0:
            (catalog.locks / path.name).unlink(missing_ok=True)
            os.close(fd)
    return [path.name for path, _ in doomed]
