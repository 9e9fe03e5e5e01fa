"""What the store holds."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ckpt.errors import UsageError
from ckpt.model import Checkpoint
from ckpt.store.catalog import Broken, Catalog
from ckpt.store.job import DEFAULT_ROOT
from ckpt.store.retention import when_s


@dataclass(frozen=True, slots=True)
class Listed:
    """A checkpoint, and what of the disk it needs alone and together with others; None where nobody counted."""

    checkpoint: Checkpoint
    unique_bytes: int | None = None
    shared_bytes: int | None = None


_FIELDS: Final[dict[str, Callable[[Checkpoint], Sequence[str]]]] = {
    "name": lambda c: (c.manifest.name,),
    "engine": lambda c: (c.manifest.engine,),
    "runtime": lambda c: (c.manifest.runtime or "",),
    "host": lambda c: (c.manifest.host.hostname,),
    "image": lambda c: (c.manifest.container_image.name, c.manifest.container_image.id) if c.manifest.container_image else ("",),
    "container": lambda c: (c.manifest.container_id,),
    "tag": lambda c: c.entry.tags,
    "origin": lambda c: (c.entry.origin, c.entry.origin.partition(":")[0]),
    "pinned": lambda c: ("true" if c.entry.pinned else "false",),
}
"""Filter -> the texts of which one has to match; `*` and `?` as in a shell."""
_ORDERS: Final[dict[str, Callable[[Listed], tuple[float | str, ...]]]] = {
    "name": lambda one: (one.checkpoint.manifest.name, one.checkpoint.manifest.generation),
    "created": lambda one: (when_s(one.checkpoint),),
    "size": lambda one: (one.checkpoint.manifest.size_bytes,),
    "unique": lambda one: (one.unique_bytes or 0,),
    "engine": lambda one: (one.checkpoint.manifest.engine, one.checkpoint.manifest.name, one.checkpoint.manifest.generation),
}
FILTERS: Final = (*_FIELDS, "since", "before")
ORDERS: Final = tuple(_ORDERS)


def list_(
    *,
    store_root: Path = DEFAULT_ROOT,
    name: str | None = None,
    filters: Sequence[tuple[str, str]] = (),
    since_s: float | None = None,
    before_s: float | None = None,
    sort: str = "name",
    reverse: bool = False,
    sizes: bool = True,
) -> list[Listed]:
    """The checkpoints in the store, by name, oldest first within a name, unless `sort` says otherwise.

    Args:
        filters: (key, pattern) pairs; of one key any has to match, of several keys each.
        since_s, before_s: only those made then or later, or earlier; seconds since the epoch.
        sizes: count what each needs of the disk (reads the recipe of every checkpoint in the store).

    Raises:
        UsageError: no such filter or order.
    """
    for key, _ in filters:
        if key not in _FIELDS:
            raise UsageError(f"there is no filter {key!r}", hint="filters: " + ", ".join(FILTERS))
    if sort not in _ORDERS:
        raise UsageError(f"there is no order {sort!r}", hint="orders: " + ", ".join(ORDERS))
    catalog = Catalog(store_root)
    measured = catalog.sizes() if sizes else {}
    found = []
    for checkpoint in catalog.all():
        if (name is not None and checkpoint.manifest.name != name) or not _matches(checkpoint, filters):
            continue
        if (since_s is not None and when_s(checkpoint) < since_s) or (before_s is not None and when_s(checkpoint) >= before_s):
            continue
        _, unique, shared = measured.get(checkpoint.manifest.id, (None, None, None))
        found.append(Listed(checkpoint, unique, shared))
    return sorted(found, key=_ORDERS[sort], reverse=reverse)


def _matches(checkpoint: Checkpoint, filters: Sequence[tuple[str, str]]) -> bool:
    return all(
        any(fnmatch.fnmatchcase(text, pattern) for other, pattern in filters if other == key for text in _FIELDS[key](checkpoint))
        for key in {key for key, _ in filters}
    )


def broken(*, store_root: Path = DEFAULT_ROOT) -> list[Broken]:
    """Entries of the store that cannot be read, for a warning beside the list."""
    return list(Catalog(store_root).listing().broken)
