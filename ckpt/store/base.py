"""What a draft is deduplicated against: the packs of the checkpoints that are likely to have the same pages."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from ckpt.errors import CkptError
from ckpt.model import Checkpoint
from ckpt.store import durable, recipe
from ckpt.store.dead import load_dead
from ckpt.store.pack import SUFFIX, count_pages, read_table, read_tags
from ckpt.store.pages import CHUNK_PAGES, LINEAR, PACK_SHIFT, Index, Places, Tagger

BUDGET_BYTES: Final = 64 << 20
_PAGE_COST: Final = 24
_MAX_PACKS: Final = 4096
_MAX_RECIPES: Final = 512
_SPARSE: Final = 4
SECRET: Final = "tags.key"


def secret(root: Path) -> bytes:
    """The secret of a store's tags, made when there is none (under the store's lock). When it is lost, new checkpoints share nothing with old."""
    path = root / SECRET
    with suppress(FileNotFoundError):
        if len(found := path.read_bytes()) == 32:
            return found
    made = secrets.token_bytes(32)
    durable.write_file(path, made)
    return made


def known_secret(root: Path) -> bytes | None:
    """The secret of a store's tags; None when there is none."""
    with suppress(OSError):
        if len(found := (root / SECRET).read_bytes()) == 32:
            return found
    return None


def order(known: Iterable[Checkpoint], name: str) -> list[Checkpoint]:
    """Which checkpoints to look at first: of the same name, then of the same container image, then others; the newest first."""
    newest = sorted(known, key=lambda c: (c.manifest.generation, c.manifest.created_s), reverse=True)
    same = [c for c in newest if c.manifest.name == name]
    newest.sort(key=lambda c: c.manifest.created_s, reverse=True)
    image = same[0].manifest.container_image if same else None
    rest = [c for c in newest if c.manifest.name != name]
    like = [c for c in rest if image is not None and c.manifest.container_image == image]
    return same + like + [c for c in rest if c not in like]


def choose(candidates: Iterable[Checkpoint], packs: Path, budget_bytes: int = BUDGET_BYTES) -> list[str]:
    """The packs whose tags fit into the budget."""
    chosen: list[str] = []
    seen: set[str] = set()
    for checkpoint in candidates:
        try:
            names = recipe.load_packs(checkpoint.directory / recipe.NAME)
        except (CkptError, OSError):
            continue
        for name in names:
            if name in seen:
                continue
            seen.add(name)
            with suppress(CkptError, OSError):
                cost = count_pages(packs / (name + SUFFIX)) * _PAGE_COST
                if cost <= budget_bytes:
                    budget_bytes -= cost
                    chosen.append(name)
        if budget_bytes < _PAGE_COST * CHUNK_PAGES or len(chosen) >= _MAX_PACKS:
            break
    return chosen


def load(names: list[str], packs: Path, tagger: Tagger, known: Sequence[Checkpoint]) -> Index:
    """The pages of packs; pack `names[n]` has number n + 1. What cannot be read or compared is left out.

    Left out as well are chunks of which the checkpoints in the store (`known`) need less than a quarter: what is still needed of them is
    written once more, so that they die with the old checkpoints instead of living on for a few pages.
    """
    index = Index()
    used = _used(names, packs, known)
    tags, places = [], []
    for number, name in enumerate(names, 1):
        with suppress(CkptError, OSError):
            identity, table, found = read_tags(packs / (name + SUFFIX))
            if identity != tagger.id:
                continue
            counts = table["pages"].astype(np.int64)
            chunks = np.arange(len(table), dtype=np.int64)
            ends = np.cumsum(counts)
            within = np.arange(len(found), dtype=np.int64) - np.repeat(ends - counts, counts)
            where = np.repeat(chunks * CHUNK_PAGES, counts) + within
            alive = np.ones(len(table), bool)
            alive[load_dead(packs, name, len(table))] = False
            if name in used:
                pages = used[name][: len(table) * CHUNK_PAGES].reshape(len(table), CHUNK_PAGES)
                alive &= pages.sum(axis=1) * _SPARSE >= counts
            keep = np.repeat(alive, counts)
            tags.append(found[keep])
            places.append((where | number << PACK_SHIFT)[keep])
    if tags:
        index.add(np.concatenate(tags), np.concatenate(places))
    return index


def _used(names: list[str], packs: Path, known: Sequence[Checkpoint]) -> dict[str, npt.NDArray[np.bool_]]:
    """For each pack, which of its pages checkpoints need; {} when that cannot be told."""
    if len(known) > _MAX_RECIPES:
        return {}
    begins: dict[str, npt.NDArray[np.int32]] = {}
    wanted = set(names)
    for checkpoint in known:
        path = checkpoint.directory / recipe.NAME
        try:
            if wanted.isdisjoint(recipe.load_packs(path)):
                continue
            found = _spans(path)
        except (CkptError, OSError):
            return {}
        for name, firsts, counts in found:
            if name not in wanted:
                continue
            if name not in begins:
                try:
                    begins[name] = np.zeros(len(read_table(packs / (name + SUFFIX))) * CHUNK_PAGES + 1, np.int32)
                except (CkptError, OSError):
                    wanted.discard(name)
                    continue
            first = np.minimum(firsts, len(begins[name]) - 1)
            np.add.at(begins[name], first, 1)
            np.add.at(begins[name], np.minimum(first + counts, len(begins[name]) - 1), -1)
    return {name: np.cumsum(changes)[:-1] > 0 for name, changes in begins.items()}


_Spans = list[tuple[str, Places, Places]]
_KEPT_RUNS: Final = 1 << 20
_kept: dict[tuple[str, int], _Spans] = {}
"""Of recipes that were read (they never change): a host's save makes many drafts one after another. 16 MiB at most."""


def _spans(path: Path) -> _Spans:
    """The packs of a recipe, and of each which pages: first ones and how many. Raises DigestMismatch, ArchiveInvalid, OSError."""
    key = os.fspath(path), os.stat(path).st_ino
    if (known := _kept.get(key)) is not None:
        return known
    found = recipe.load(path)
    made: _Spans = []
    for member in found.members.values():
        numbers = np.where(member.places == recipe.ZERO, -1, member.places >> PACK_SHIFT)
        for number in np.unique(numbers[numbers >= 0]).tolist():
            mine = numbers == number
            made.append((found.packs[number], member.places[mine] & LINEAR, member.counts[mine]))
    if sum(len(firsts) for spans in [*_kept.values(), made] for _, firsts, _ in spans) > _KEPT_RUNS:
        _kept.clear()
    _kept[key] = made
    return made
