"""Look into a checkpoint, in the store or in an archive file, without unpacking it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ckpt.archive import reader
from ckpt.errors import TargetNotFound
from ckpt.model import Manifest
from ckpt.store.catalog import Catalog
from ckpt.store.job import DEFAULT_ROOT


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is in a checkpoint. `sizes`: bytes of each member (unpacked); `foreign`: not written by ckpt, its manifest is made up."""

    manifest: Manifest
    sizes: dict[str, int]
    foreign: bool


def inspect(ref_or_file: str, *, store_root: Path = DEFAULT_ROOT) -> Inspection:
    """Inspect a checkpoint of the store, else an archive file. What is written as a path (with a "/") is a file.

    Raises:
        TargetNotFound: it is neither.
        ArchiveInvalid: the file is no archive of a checkpoint.
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
                sizes = {name: members.size_bytes(name) for name in members.names() if not name.endswith("/")}
            return Inspection(checkpoint.manifest, sizes, bool(checkpoint.manifest.foreign))
    if not path.is_file():
        raise TargetNotFound(f"there is no archive {ref_or_file!r}")
    seen = reader.peek(path)
    return Inspection(seen.manifest, dict(seen.sizes), bool(seen.manifest.foreign))
