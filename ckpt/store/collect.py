"""Garbage: packs that no checkpoint needs, and chunks that none needs in packs that are still needed.

References are read without the store's lock; under it only what has changed since is read again, the dead chunks are written down
(see dead) and dead packs are renamed into `tmp/`. Only then bytes go, by holes punched into packs: a crash at any point leaves a store that
is whole, and the next run finishes. A pack that a living draft has claimed is left alone.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ckpt.errors import CkptError
from ckpt.model import Checkpoint
from ckpt.store import durable, locks, recipe, sweep
from ckpt.store.dead import SUFFIX as DEAD
from ckpt.store.dead import load_dead, save_dead
from ckpt.store.draft import CLAIMS, PRIVATE
from ckpt.store.pack import SUFFIX, align, read_table
from ckpt.store.pages import Places

if TYPE_CHECKING:
    from ckpt.store.catalog import Catalog

_KEEP_SIZE_PUNCH_HOLE: Final = 0x01 | 0x02
_COPY_BYTES: Final = 1 << 20

Needs = dict[str, Places]


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection gave back (or would)."""

    freed_bytes: int = 0
    packs: int = 0
    """Packs that went as a whole."""
    chunks: int = 0
    """Chunks that went from packs that stay."""
    claimed: int = 0
    """Packs with something to give back that a living draft uses: next time."""
    problems: tuple[str, ...] = field(default=())
    """Checkpoints whose recipe cannot be read. As long as there is one nothing is given back: it might need it."""


def collect(catalog: Catalog, *, dry_run: bool, packs: Iterable[str] | None) -> Collected:
    """The body of `Catalog.collect`."""
    if not dry_run:
        sweep.clear(catalog)
    removed = sweep.removed(catalog) if packs is None and not dry_run else []
    wanted = None if packs is None else set(packs)
    known: dict[str, Needs] = {}
    _read_needs(catalog, known, wanted)
    punches: list[tuple[str, list[tuple[int, int]]]] = []
    freed = gone = chunks = claimed = 0
    doomed: list[Path] = []
    with catalog.locked():
        problems = _read_needs(catalog, known, wanted)
        if problems:
            return Collected(problems=tuple(problems))
        needed = _union(known)
        kept = _claims(catalog)
        for file in locks.listing(catalog.packs):
            name, suffix = os.path.splitext(file)
            if suffix != SUFFIX:
                if suffix not in (DEAD,) or not (catalog.packs / (name + SUFFIX)).exists():
                    if not dry_run and (wanted is None or name in wanted):
                        (catalog.packs / file).unlink(missing_ok=True)
                continue
            if wanted is not None and name not in wanted:
                continue
            path = catalog.packs / file
            if name not in needed:
                if name in kept:
                    claimed += 1
                    continue
                freed += _disk_bytes(path)
                gone += 1
                if not dry_run:
                    doomed.append(catalog.drafts / f"{name}.{secrets.token_hex(4)}.gone")
                    os.rename(path, doomed[-1])
                    (catalog.packs / (name + DEAD)).unlink(missing_ok=True)
                continue
            try:
                table = read_table(path)
            except (CkptError, OSError):
                continue  # damaged: nothing of it is known to be dead
            alive = np.zeros(len(table), bool)
            alive[needed[name][needed[name] < len(table)]] = True
            before = np.zeros(len(table), bool)
            before[load_dead(catalog.packs, name, len(table))] = True
            fresh = ~alive & ~before
            if fresh.any() and name in kept:
                claimed += 1
                continue
            if fresh.any():
                chunks += int(fresh.sum())
                freed += int(_aligned(table["stored"][fresh]).sum())
                if not dry_run:
                    save_dead(catalog.packs, name, np.flatnonzero(~alive))
            if (~alive).any() and not dry_run and (fresh.any() or wanted is None):
                punches.append((name, [(int(row["offset"]), align(int(row["stored"]))) for row in table[~alive]]))
        if doomed:
            durable.sync_directory(catalog.packs)
    # What is dead on the disk's own record cannot come back to life: no lock is needed any more.
    for path in doomed:
        path.unlink(missing_ok=True)
    for name, ranges in punches:
        with suppress(FileNotFoundError):
            _punch(catalog.packs / (name + SUFFIX), ranges, catalog.drafts)
    if removed:
        sweep.clear(catalog, removed)
    return Collected(freed, gone, chunks, claimed)


def sizes(catalog: Catalog) -> dict[str, tuple[int, int, int]]:
    """The body of `Catalog.sizes`."""
    known: dict[str, Needs] = {}
    _read_needs(catalog, known, None)
    users: dict[str, Places] = {}
    stored: dict[str, Places] = {}
    for needs in known.values():
        for name, chunks in needs.items():
            if name not in stored:
                try:
                    stored[name] = _aligned(read_table(catalog.packs / (name + SUFFIX))["stored"])
                except (CkptError, OSError):
                    stored[name] = np.zeros(0, np.int64)
                users[name] = np.zeros(len(stored[name]), np.int64)
            users[name][chunks[chunks < len(stored[name])]] += 1
    found: dict[str, tuple[int, int, int]] = {}
    for checkpoint in catalog.all():
        unique = durable.tree_size_bytes(checkpoint.directory)
        shared = 0
        for name, chunks in known.get(checkpoint.directory.name, {}).items():
            mine = chunks[chunks < len(stored[name])]
            alone = users[name][mine] == 1
            unique += int(stored[name][mine][alone].sum())
            shared += int(stored[name][mine][~alone].sum())
        found[checkpoint.manifest.id] = (checkpoint.manifest.size_bytes, unique, shared)
    return found


def footprint(catalog: Catalog) -> Callable[[Iterable[Checkpoint]], int]:
    """The body of `Catalog.footprint`."""
    known: dict[str, Needs] = {}
    _read_needs(catalog, known, None)
    stored: dict[str, Places] = {}
    small: dict[str, int] = {}

    def count(checkpoints: Iterable[Checkpoint]) -> int:
        total = 0
        needs: dict[str, Needs] = {}
        for checkpoint in checkpoints:
            name = checkpoint.directory.name
            if name not in small:
                with suppress(OSError):
                    small[name] = durable.tree_size_bytes(checkpoint.directory)
            total += small.get(name, 0)
            needs[name] = known.get(name, {})
        for name, chunks in _union(needs).items():
            if name not in stored:
                try:
                    stored[name] = _aligned(read_table(catalog.packs / (name + SUFFIX))["stored"])
                except (CkptError, OSError):
                    stored[name] = np.zeros(0, np.int64)
            total += int(stored[name][chunks[chunks < len(stored[name])]].sum())
        return total

    return count


def _read_needs(catalog: Catalog, known: dict[str, Needs], wanted: set[str] | None) -> list[str]:
    """Bring `known` (entry -> the chunks it needs of each pack) up to date; an entry never changes. Returns the entries that cannot be read."""
    problems: list[str] = []
    there = locks.listing(catalog.entries)
    for gone in known.keys() - set(there):
        del known[gone]
    for name in there:
        if name in known:
            continue
        path = catalog.entries / name / recipe.NAME
        try:
            if wanted is not None and wanted.isdisjoint(recipe.load_packs(path)):
                known[name] = {}
            else:
                known[name] = recipe.load(path).chunks()
        except NotADirectoryError:
            known[name] = {}
        except (CkptError, OSError) as error:
            problems.append(f"{name}: {error}")
    return problems


def _union(known: dict[str, Needs]) -> Needs:
    parts: dict[str, list[Places]] = {}
    for needs in known.values():
        for name, chunks in needs.items():
            parts.setdefault(name, []).append(chunks)
    return {name: np.unique(np.concatenate(arrays)) for name, arrays in parts.items()}


def _claims(catalog: Catalog) -> set[str]:
    """The packs that living drafts are deduplicated against (under the store's lock)."""
    kept: set[str] = set()
    for name in locks.listing(catalog.drafts):
        if "." in name or not (locks.is_held(catalog.locks / name) or locks.is_elsewhere(catalog.locks / name)):
            continue
        with suppress(FileNotFoundError):
            claims: Any = json.loads((catalog.drafts / name / PRIVATE / CLAIMS).read_bytes())
            kept.update(claims["packs"])
    return kept


def _aligned(stored: Any) -> Places:
    result: Places = -(-stored.astype(np.int64) // 4096) * 4096
    return result


def _disk_bytes(path: Path) -> int:
    return path.lstat().st_blocks * 512


def _punch(path: Path, ranges: list[tuple[int, int]], drafts: Path) -> None:
    merged: list[tuple[int, int]] = []
    for offset, length in sorted(ranges):
        if merged and sum(merged[-1]) == offset:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((offset, length))
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        for offset, length in merged:
            _punch_hole(fd, offset, length)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV):
            raise
        _rewrite(fd, path, merged, drafts)
    finally:
        os.close(fd)


def _punch_hole(fd: int, offset: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.fallocate64 if hasattr(libc, "fallocate64") else libc.fallocate
    call.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if call(fd, _KEEP_SIZE_PUNCH_HOLE, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _rewrite(fd: int, path: Path, holes: list[tuple[int, int]], drafts: Path) -> None:
    """Where no hole can be punched: the same pack once more, sparse, renamed over the old one."""
    part = drafts / f"{path.stem}.{secrets.token_hex(4)}.part"
    size = os.fstat(fd).st_size
    out = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(out, size)
        at = 0
        for offset, length in [*holes, (size, 0)]:
            while at < offset:
                data = os.pread(fd, min(_COPY_BYTES, offset - at), at)
                if not data:
                    raise OSError(errno.EIO, f"{path} became shorter")
                at += os.pwrite(out, data, at)
            at = offset + length
        os.fsync(out)
        if not os.path.exists(path):
            raise FileNotFoundError(errno.ENOENT, "it was collected meanwhile", str(path))
        os.rename(part, path)
        durable.sync_directory(path.parent)
    finally:
        os.close(out)
        part.unlink(missing_ok=True)
