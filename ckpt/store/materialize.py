"""A checkpoint as plain files: chunks are read, verified and written by threads, digests follow behind."""

from __future__ import annotations

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol

import numpy as np

from ckpt.archive.layout import DIGEST_PREFIX, MANIFEST, SIGNATURE
from ckpt.errors import DigestMismatch, NoSpace
from ckpt.store.pages import CHUNK_PAGES, LINEAR, PACK_SHIFT, PAGE_BYTES, Places, Seal, Tagger
from ckpt.store.reading import StoreMembers
from ckpt.store.recipe import ZERO, Bulk, Recipe

OnBytes = Callable[[int], None]
_PIECE: Final = 1 << 20
_COPIED: Final = 64 << 20
_TOGETHER: Final = 8
"""Chunks a task: every task wakes up threads."""
_AHEAD: Final = 8


def materialize(
    members: StoreMembers,
    recipe: Recipe,
    into: Path,
    *,
    only: Callable[[str], bool] | None,
    on_bytes: OnBytes | None,
    threads: int,
    tagger: Tagger | None,
    link: bool,
) -> dict[str, str]:
    """The body of `Catalog.materialize`."""
    digests: dict[str, str] = {}
    with no_space(into), ThreadPoolExecutor(threads, "ckpt-write") as writers, ThreadPoolExecutor(2, "ckpt-digest") as hashers:
        pending: list[tuple[str, Future[str]]] = []
        stop = threading.Event()
        try:
            for name in members.names():
                path = into / name
                if name.endswith("/"):
                    path.mkdir(mode=0o700, exist_ok=True)
                    continue
                if only is not None and not only(name):
                    continue
                path.parent.mkdir(mode=0o700, exist_ok=True)
                bulk = recipe.members.get(name)
                if name in recipe.plain:
                    future: Future[str] = hashers.submit(_plain, members, name, recipe.plain[name], path, on_bytes, tagger, link)
                elif bulk is None:
                    future = hashers.submit(_copy, members, name, path, on_bytes)
                else:
                    future = _write(members, name, bulk, path, on_bytes, writers, hashers, stop, _check_of(name, bulk, tagger))
                pending.append((name, future))
                while pending and pending[0][1].done():
                    first, finished = pending.pop(0)
                    digests[first] = finished.result()
            for name, future in pending:
                digests[name] = future.result()
        except BaseException as error:
            stop.set()
            if isinstance(error, _BrokenOff):
                for _, future in pending:
                    if (cause := future.exception()) is not None and not isinstance(cause, _BrokenOff):
                        raise cause from None
            raise
    return {name: digest for name, digest in sorted(digests.items()) if digest and name not in (MANIFEST, SIGNATURE)}


class _BrokenOff(Exception):
    """Another member could not be written."""


@contextmanager
def no_space(into: Path) -> Iterator[None]:
    """Turn a full disk into NoSpace."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space left in {into} to unpack the checkpoint", hint="free some space") from error
        raise


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _copy(members: StoreMembers, name: str, path: Path, on_bytes: OnBytes | None) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_PIECE))
    fd = _create(path)
    try:
        with members.open(name) as source:
            while count := source.readinto(buffer):  # type: ignore[attr-defined]
                digest.update(buffer[:count])
                _pwritev(fd, [buffer[:count]], os.lseek(fd, 0, os.SEEK_CUR))
                os.lseek(fd, count, os.SEEK_CUR)
                if on_bytes:
                    on_bytes(count)
        when_ns = int(members.mtime_s(name) * 1e9)
        os.utime(fd, ns=(when_ns, when_ns))
    finally:
        os.close(fd)
    return DIGEST_PREFIX + digest.hexdigest()


def _plain(
    members: StoreMembers, name: str, sealed: str, path: Path, on_bytes: OnBytes | None, tagger: Tagger | None, link: bool
) -> str:
    """A member that is a plain file with a seal; never a digest ("")."""
    if tagger is None or not tagger.sealed(sealed):
        raise DigestMismatch(f"{name} cannot be checked: the store's secret (tags.key) is another one")
    seal = tagger.seal()
    with members.open(name) as source:
        fd = source.fileno()
        seal.read(fd)
        if seal.text() != sealed:
            raise DigestMismatch(f"{name} was changed or damaged: its seal is not the one in the store")
        about = os.fstat(fd)
        if link:
            with suppress(OSError):
                os.link(members.path(name), path, follow_symlinks=False)
                if on_bytes:
                    on_bytes(about.st_size)
                return ""
        into = _create(path)
        try:
            at = 0
            while at < about.st_size:
                count = os.copy_file_range(fd, into, min(about.st_size - at, _COPIED), at, at)
                if not count:
                    raise OSError(errno.EIO, f"{name} became shorter")
                at += count
                if on_bytes:
                    on_bytes(count)
            os.utime(into, ns=(about.st_mtime_ns, about.st_mtime_ns))
        finally:
            os.close(into)
    return ""


def _write(
    members: StoreMembers,
    name: str,
    bulk: Bulk,
    path: Path,
    on_bytes: OnBytes | None,
    writers: ThreadPoolExecutor,
    hashers: ThreadPoolExecutor,
    stop: threading.Event,
    check: _Check,
) -> Future[str]:
    fd = _create(path)
    room = threading.Semaphore(_AHEAD)
    waits: list[Future[None]] = []
    hasher: Future[str] | None = None
    try:
        os.ftruncate(fd, bulk.size_bytes)
        keys, order, bounds, last = _by_chunk(bulk)

        tasks = -(-len(keys) // _TOGETHER)

        def write(task: int) -> None:
            try:
                for at in range(task * _TOGETHER, min((task + 1) * _TOGETHER, len(keys))):
                    if stop.is_set():
                        return
                    pack, number = divmod(int(keys[at]), 1 << PACK_SHIFT)
                    chunk = members.pages.load(pack, number)
                    done = _scatter(fd, bulk.size_bytes, chunk, number, order[bounds[at] : bounds[at + 1]])
                    if on_bytes:
                        on_bytes(done)
            except DigestMismatch as error:
                raise DigestMismatch(f"{name} was changed or damaged: {error.message}") from error
            finally:
                room.release()

        made = threading.Condition()
        hasher = hashers.submit(_follow, fd, bulk, last // _TOGETHER, waits, tasks, made, stop, check)
        for task in range(tasks):
            room.acquire()
            with made:
                waits.append(writers.submit(write, task))
                made.notify_all()
            if hasher.done():
                break
        return hasher
    except BaseException:
        stop.set()
        if hasher is None:
            os.close(fd)
        raise


def _follow(
    fd: int,
    bulk: Bulk,
    last: Places,
    waits: list[Future[None]],
    total: int,
    made: threading.Condition,
    stop: threading.Event,
    check: _Check,
) -> str:
    """The flat digest ("": it has none), behind the writers; closes the file."""
    buffer = memoryview(bytearray(_PIECE))
    try:
        seen = 0
        for piece, at in enumerate(range(0, bulk.size_bytes, _PIECE)):
            while seen <= last[piece]:
                with made:
                    while len(waits) <= seen:
                        if stop.is_set():
                            raise _BrokenOff
                        made.wait(0.5)
                waits[seen].result()
                seen += 1
            size = min(_PIECE, bulk.size_bytes - at)
            done = 0
            while done < size:
                count = os.preadv(fd, [buffer[done:size]], at + done)
                if not count:
                    raise OSError(errno.EIO, "the file that was just written became shorter")
                done += count
            check.update(buffer[:size])
        while seen < total:
            with made:
                while len(waits) <= seen:
                    if stop.is_set():
                        raise _BrokenOff
                    made.wait(0.5)
            waits[seen].result()
            seen += 1
        digest = check.digest()
        when_ns = int(bulk.mtime_s * 1e9)
        os.utime(fd, ns=(when_ns, when_ns))
    except BaseException:
        stop.set()  # who has not begun to write does not any more
        raise
    finally:
        with made:
            begun = list(waits)
        wait(begun)
        os.close(fd)
    return digest


class _Check(Protocol):
    """What looks at the content of a member as it was written."""

    def update(self, data: memoryview, /) -> None: ...

    def digest(self) -> str:
        """The flat digest, "" when there is none. Raises DigestMismatch."""


class _Flat:
    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.update = self._hash.update

    def digest(self) -> str:
        return DIGEST_PREFIX + self._hash.hexdigest()


class _Chunks:
    """It only has a seal, and the secret for that is lost: there are still the checksums of its chunks."""

    def update(self, data: memoryview, /) -> None:
        pass

    def digest(self) -> str:
        return ""


class _Sealed:
    def __init__(self, name: str, bulk: Bulk, seal: Seal) -> None:
        self._name, self._bulk, self._seal = name, bulk, seal
        self.update = seal.update

    def digest(self) -> str:
        if self._seal.text() != self._bulk.seal:
            raise DigestMismatch(f"{self._name} was changed or damaged: its seal is not the one in the store")
        return self._bulk.digest


def _check_of(name: str, bulk: Bulk, tagger: Tagger | None) -> _Check:
    if tagger is not None and tagger.sealed(bulk.seal):
        return _Sealed(name, bulk, tagger.seal())
    return _Flat() if bulk.digest or not bulk.seal else _Chunks()


def _by_chunk(bulk: Bulk) -> tuple[Places, Places, Places, Places]:
    """The member by chunks, in the order of their first pages.

    Returns:
        keys: pack << 40 | chunk of each task; order: rows (page in chunk, pages, first page of the member), task by task; bounds: where
        each task's rows begin; last: for each piece of the member the last task that writes into it (-1: none).
    """
    real = bulk.places != ZERO
    places, counts, firsts = bulk.places[real], bulk.counts[real], bulk.firsts[:-1][real]
    pieces = -(-bulk.size_bytes // _PIECE)
    last = np.full(pieces, -1, np.int64)
    if not len(places):
        return places, np.zeros((0, 3), np.int64), np.zeros(1, np.int64), last
    # Cut the runs where chunks end.
    begin = places & LINEAR
    spans = (begin + counts - 1) // CHUNK_PAGES - begin // CHUNK_PAGES + 1
    owner = np.repeat(np.arange(len(places)), spans)
    nth = np.arange(len(owner)) - np.repeat(np.cumsum(spans) - spans, spans)
    start = np.where(nth == 0, begin[owner], (begin[owner] // CHUNK_PAGES + nth) * CHUNK_PAGES)
    stop = np.minimum(begin[owner] + counts[owner], (begin[owner] // CHUNK_PAGES + nth + 1) * CHUNK_PAGES)
    target = firsts[owner] + start - begin[owner]
    chunk = places[owner] >> PACK_SHIFT << PACK_SHIFT | start // CHUNK_PAGES
    keys, first, inverse = np.unique(chunk, return_index=True, return_inverse=True)
    rank = np.empty(len(keys), np.int64)
    by_first = np.argsort(first)
    rank[by_first] = np.arange(len(keys))
    task = rank[inverse]
    sort = np.argsort(task, kind="stable")
    rows = np.stack((start % CHUNK_PAGES, stop - start, target), axis=1)[sort]
    bounds = np.searchsorted(task[sort], np.arange(len(keys) + 1))
    # A row touches one or two pieces: it is at most half a MiB.
    for edge in (target, target + stop - start - 1):
        np.maximum.at(last, edge * PAGE_BYTES // _PIECE, task)
    return keys[by_first], rows, bounds, np.maximum.accumulate(last)


def _scatter(fd: int, size_bytes: int, chunk: memoryview, number: int, rows: Places) -> int:
    done = 0
    for slot, pages, target in rows.tolist():
        begin, offset = slot * PAGE_BYTES, target * PAGE_BYTES
        count = min(pages * PAGE_BYTES, size_bytes - offset)
        if begin + count > len(chunk):
            raise DigestMismatch(f"chunk {number} is shorter than it should be")
        _pwritev(fd, [chunk[begin : begin + count]], offset)
        done += count
    return done


def _pwritev(fd: int, views: list[memoryview], offset: int) -> None:
    (view,) = views
    while view:
        count = os.pwritev(fd, [view], offset)
        view, offset = view[count:], offset + count
