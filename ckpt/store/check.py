"""Is a checkpoint whole? All of it is read."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from ckpt.archive.layout import CONFIG, DIGEST_PREFIX, INVENTORY, MANIFEST, SIGNATURE, SPEC
from ckpt.errors import CkptError
from ckpt.model import Checkpoint, Manifest
from ckpt.store.reading import StoreMembers

if TYPE_CHECKING:
    from ckpt.store.catalog import Catalog
    from ckpt.store.pages import Tagger

_PIECE: Final = 1 << 20


def check(catalog: Catalog, checkpoint: Checkpoint) -> list[str]:
    """The body of `Catalog.check`."""
    wanted = dict(checkpoint.manifest.digests)
    try:
        members = catalog.members(checkpoint)
    except (CkptError, OSError) as error:
        return [str(error)]
    problems: list[str] = []
    sealed: set[str] = set()
    tagger = catalog.tagger()
    with members:
        names = [name for name in members.names() if not name.endswith("/") and name not in (MANIFEST, SIGNATURE)]
        if wanted:
            problems += [f"{name} is missing" for name in sorted(wanted.keys() - set(names))]
            sealed = set(undigested(members, checkpoint.manifest))
            problems += [f"{name} is not in its manifest" for name in sorted(set(names) - wanted.keys() - sealed)]
        else:
            problems += [f"{name} is missing" for name in (CONFIG, SPEC, INVENTORY) if name not in names and checkpoint.manifest.foreign]
        for name in names:
            try:
                if name in sealed:
                    problems += compare_seal(members, name, tagger)
                    continue
                digest = digest_of(members, name)
            except (CkptError, OSError) as error:
                problems.append(str(error))
                continue
            if wanted.get(name, digest) != digest:
                problems.append(f"{name} was changed or damaged: its digest is not the one in the manifest")
    return problems


def undigested(members: StoreMembers, manifest: Manifest) -> list[str]:
    """The members that only have a seal."""
    sealed = [name for name, bulk in members.recipe.members.items() if bulk.seal and not bulk.digest] + list(members.recipe.plain)
    return [name for name in sealed if manifest.digests and name not in manifest.digests]


def compare_seal(members: StoreMembers, name: str, tagger: Tagger | None) -> list[str]:
    """What is wrong with a member that has a seal."""
    text = members.recipe.plain.get(name) or members.recipe.members[name].seal
    if (tagger is None or not tagger.sealed(text)) and name in members.recipe.plain:
        return [f"{name} cannot be checked: the store's secret (tags.key) is another one"]
    seal = tagger.seal() if tagger is not None and tagger.sealed(text) else None  # else its chunks have their checksums
    buffer = memoryview(bytearray(_PIECE))
    with members.open(name) as source:
        while count := source.readinto(buffer):  # type: ignore[attr-defined]
            if seal is not None:
                seal.update(buffer[:count])
    if seal is not None and seal.text() != text:
        return [f"{name} was changed or damaged: its seal is not the one in the store"]
    return []


def digest_of(members: StoreMembers, name: str) -> str:
    """ "sha256:HEX" of a member. Raises DigestMismatch, OSError."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE))
    with members.open(name) as source:
        while count := source.readinto(buffer):  # type: ignore[attr-defined]
            digest.update(buffer[:count])
    return DIGEST_PREFIX + digest.hexdigest()
