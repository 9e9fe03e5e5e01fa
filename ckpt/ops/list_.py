"""What the store holds."""

from __future__ import annotations

from pathlib import Path

from ckpt.model import Checkpoint
from ckpt.store.catalog import Broken, Catalog
from ckpt.store.job import DEFAULT_ROOT


def list_(*, store_root: Path = DEFAULT_ROOT, name: str | None = None) -> list[Checkpoint]:
    """The checkpoints in the store by name, oldest first within a name; only those of `name` when it is given."""
    return [c for c in Catalog(store_root).all() if name is None or c.manifest.name == name]


def broken(*, store_root: Path = DEFAULT_ROOT) -> list[Broken]:
    """Entries of the store that cannot be read, for a warning beside the list."""
    return list(Catalog(store_root).listing().broken)
