"""The recipe of a checkpoint: of which pages its bulk members are made.

A file `recipe` in the entry: 8 bytes magic, 4 bytes length of the head, the head (JSON: schema, packs, members with size, mtime, digest, seal
and number of runs, seals of plain files), the runs of all members after each other (zstd), SHA-256 of all before it. A run is 12 bytes: a place
(8 bytes, see pages; its pack is a number in the head's list; -2: zero pages) and how many pages from there on. The last page of a member is
filled up with zeros.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ckpt.archive.layout import is_allowed, is_bulk
from ckpt.errors import ArchiveInvalid, DigestMismatch
from ckpt.store.pack import unpack
from ckpt.store.pages import CHUNK_PAGES, LINEAR, PACK_SHIFT, PAGE_BYTES, Places

NAME: Final = "recipe"
ZERO: Final = -2
SCHEMA: Final = 1
RUN: Final = np.dtype([("place", "<i8"), ("count", "<u4")])
_MAGIC: Final = b"ckptrcp1"
_HEAD: Final = struct.Struct("<8sI")
_MAX_HEAD_BYTES: Final = 64 << 20


@dataclass(slots=True)
class Bulk:
    """A bulk member: its size, and the runs it is made of (`places`, `counts`); `firsts`: the page of the member that each begins with."""

    size_bytes: int
    places: Places
    counts: Places
    mtime_s: float = 0.0
    digest: str = ""
    """ "sha256:HEX" of the content, "" when nobody made it."""
    seal: str = ""
    """As `pages.Seal.text`; "" in a store of an older ckpt."""
    firsts: Places = field(init=False)

    def __post_init__(self) -> None:
        self.firsts = np.concatenate((np.zeros(1, np.int64), np.cumsum(self.counts)))


@dataclass(slots=True)
class Recipe:
    """The packs that a checkpoint needs, and its bulk members."""

    packs: list[str]
    members: dict[str, Bulk]
    plain: dict[str, str] = field(default_factory=dict)
    """Seals of members that are plain files beside it and have no digest."""

    @property
    def size_bytes(self) -> int:
        """Of all bulk members."""
        return sum(member.size_bytes for member in self.members.values())

    def chunks(self) -> dict[str, npt.NDArray[np.int64]]:
        """For each pack the chunks that are needed, sorted."""
        found: dict[str, list[npt.NDArray[np.int64]]] = {}
        for member in self.members.values():
            real = member.places != ZERO
            places, counts = member.places[real], member.counts[real]
            packs, first = places >> PACK_SHIFT, (places & LINEAR) // CHUNK_PAGES
            last = ((places & LINEAR) + counts - 1) // CHUNK_PAGES
            for number in np.unique(packs):
                mine = packs == number
                spans = np.stack((first[mine], last[mine] - first[mine] + 1), axis=1)
                found.setdefault(self.packs[int(number)], []).append(np.unique(_spread(spans[:, 0], spans[:, 1])))
        return {name: np.unique(np.concatenate(parts)) for name, parts in found.items()}


def runs(values: Places) -> tuple[Places, Places]:
    """An array of places, one a page, as runs: where each begins and how long it is."""
    return join(values, np.ones(len(values), np.int64))


def join(places: Places, counts: Places) -> tuple[Places, Places]:
    """Runs that go on from one another become one."""
    if not len(places):
        return places, counts
    follows = (places[1:] == places[:-1] + counts[:-1]) & (places[:-1] >= 0)
    follows |= (places[1:] == ZERO) & (places[:-1] == ZERO)
    begins = np.concatenate((np.zeros(1, np.int64), np.flatnonzero(~follows) + 1))
    return places[begins], np.add.reduceat(counts, begins)


def dumps(recipe: Recipe) -> bytes:
    """The recipe as a file's content. Packs that nothing refers to are left out."""
    import zstandard

    kept: dict[int, int] = {}
    parts: list[bytes] = []
    members: dict[str, dict[str, Any]] = {}
    for name, member in recipe.members.items():
        places, counts = _short(member.places, member.counts)
        for number in np.unique(places[places >= 0] >> PACK_SHIFT):
            kept.setdefault(int(number), len(kept))
        table = np.zeros(len(recipe.packs) + 1, np.int64)
        for old, new in kept.items():
            table[old] = new
        numbers = np.where(places >= 0, places >> PACK_SHIFT, 0)
        array = np.zeros(len(places), RUN)
        array["place"] = np.where(places >= 0, table[numbers] << PACK_SHIFT | places & LINEAR, ZERO)
        array["count"] = counts
        parts.append(array.tobytes())
        members[name] = {"size_bytes": member.size_bytes, "mtime_s": member.mtime_s, "runs": len(places)}
        members[name] |= {"digest": member.digest, "seal": member.seal}
    told = {"schema": SCHEMA, "packs": [recipe.packs[n] for n in kept], "members": members, **({"plain": recipe.plain} if recipe.plain else {})}
    head = json.dumps(told, separators=(",", ":")).encode()
    data = _HEAD.pack(_MAGIC, len(head)) + head + zstandard.ZstdCompressor(level=1).compress(b"".join(parts))
    return data + hashlib.sha256(data).digest()


def load(path: Path) -> Recipe:
    """Read a recipe; one that is not there is an empty one (a checkpoint without bulk members, or of the layout of old).

    Raises:
        DigestMismatch: it is damaged.
        ArchiveInvalid: a newer version wrote it.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return Recipe([], {})
    if len(data) < _HEAD.size + 32 or hashlib.sha256(data[:-32]).digest() != data[-32:]:
        raise DigestMismatch(f"{path} was changed or damaged")
    magic, length = _HEAD.unpack_from(data)
    try:
        head = json.loads(data[_HEAD.size : _HEAD.size + length])
        if magic != _MAGIC or head["schema"] != SCHEMA:
            raise ArchiveInvalid(f"{path} was written by a newer ckpt", hint="use a newer ckpt")
        total = sum(item["runs"] for item in head["members"].values())
        array = np.frombuffer(unpack(data[_HEAD.size + length : -32], total * RUN.itemsize), RUN)
        members: dict[str, Bulk] = {}
        at = 0
        for name, item in head["members"].items():
            part = array[at : at + item["runs"]]
            at += item["runs"]
            place, count = part["place"].astype(np.int64), part["count"].astype(np.int64)
            member = Bulk(item["size_bytes"], place, count, item["mtime_s"], item["digest"], str(item.get("seal", "")))
            bad = (member.places != ZERO) & ((member.places < 0) | (member.places >> PACK_SHIFT >= len(head["packs"])))
            bad |= member.counts < 1
            if not is_allowed(name) or not is_bulk(name) or bad.any() or member.firsts[-1] != pages_of(member.size_bytes):
                raise ValueError(f"impossible runs of {name!r}")
            members[name] = member
        if not all(isinstance(pack, str) and pack.isalnum() for pack in head["packs"]):
            raise ValueError("impossible names of packs")
        plain = head.get("plain", {})
        if not all(is_allowed(name) and is_bulk(name) and isinstance(seal, str) for name, seal in plain.items()):
            raise ValueError("impossible plain members")
        return Recipe(head["packs"], members, plain)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DigestMismatch(f"{path} is damaged: {error}") from None


def pages_of(size_bytes: int) -> int:
    """Pages that so many bytes take."""
    return -(-size_bytes // PAGE_BYTES)


def load_packs(path: Path) -> list[str]:
    """The packs that a recipe names, without reading its runs. Raises DigestMismatch."""
    try:
        with path.open("rb") as file:
            magic, length = _HEAD.unpack(file.read(_HEAD.size))
            if magic != _MAGIC or length > _MAX_HEAD_BYTES:
                raise ValueError("it is no recipe")
            return [str(name) for name in json.loads(file.read(length))["packs"]]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, struct.error, RecursionError) as error:
        raise DigestMismatch(f"{path} is damaged: {error}") from None


def _short(places: Places, counts: Places) -> tuple[Places, Places]:
    """Split runs that are too long for 32 bits (16 TiB)."""
    limit = (1 << 32) - 1
    if not len(counts) or counts.max() <= limit:
        return places, counts
    pieces = -(-counts // limit)
    offset = _spread(np.zeros(len(pieces), np.int64), pieces) * limit
    place, left = np.repeat(places, pieces), np.repeat(counts, pieces) - offset
    return np.where(place == ZERO, ZERO, place + offset), np.minimum(left, limit)


def _spread(first: Places, count: Places) -> Places:
    """first[0], first[0]+1, … (count[0] of them), first[1], …"""
    ends = np.cumsum(count)
    if not len(ends):
        return np.zeros(0, np.int64)
    result: Places = np.arange(ends[-1], dtype=np.int64) - np.repeat(ends - count, count) + np.repeat(first, count)
    return result
