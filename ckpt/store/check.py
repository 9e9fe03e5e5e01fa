"""Is a checkpoint whole? All of it is read."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from ckpt.archive.layout import CONFIG, DIGEST_PREFIX, INVENTORY, MANIFEST, SIGNATURE, SPEC
from ckpt.errors import CkptError
from ckpt.model import Checkpoint
from ckpt.store.reading import StoreMembers

if TYPE_CHECKING:
    from ckpt.store.catalog import Catalog

_PIECE: Final = 1 << 20


def check(catalog: Catalog, checkpoint: Checkpoint) -> list[str]:
    """The body of `Catalog.check`."""
    wanted = dict(checkpoint.manifest.digests)
    try:
        members = catalog.members(checkpoint)
    except (CkptError, OSError) as error:
        return [str(error)]
    problems: list[str] = []
    with members:
        names = [name for name in members.names() if not name.endswith("/") and name not in (MANIFEST, SIGNATURE)]
        if wanted:
            problems += [f"{name} is missing" for name in sorted(wanted.keys() - set(names))]
            problems += [f"{name} is not in its manifest" for name in sorted(set(names) - wanted.keys())]
        else:
            problems += [f"{name} is missing" for name in (CONFIG, SPEC, INVENTORY) if name not in names and checkpoint.manifest.foreign]
        for name in names:
            try:
                digest = _digest(members, name)
            except (CkptError, OSError) as error:
                problems.append(str(error))
                continue
            if wanted.get(name, digest) != digest:
                problems.append(f"{name} was changed or damaged: its digest is not the one in the manifest")
    return problems


def _digest(members: StoreMembers, name: str) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE))
    with members.open(name) as source:
        while count := source.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(buffer[:count])
    return DIGEST_PREFIX + digest.hexdigest()
