"""A tree that is sent while it changes: in rounds, the last one while nothing changes, each with what is different since the one before.

What the other end has is remembered: for every name what stat(2) said *before* the file was read, and a digest of every block that was
sent, taken from the very bytes. A file counts as unchanged when stat(2) still says the same, its times were safely older than the reading
(they have the clock tick's granularity), and the file system tells writes through shared mappings. Such a write changes a file's times
only when the page was clean: so everything is flushed after the looking and before the reading. tmpfs never tells: there, and on any
file system that is not known to, the content is read again each time and compared by its digests.

The stream: one JSON object a line, `{"o": OPERATION, "p": PATH, …}`, "data" followed by its bytes (`_tree_child`).
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import stat
import struct
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Final

from ckpt.archive._apply import allowed
from ckpt.archive.chunks import READ_BYTES, ChunkReader
from ckpt.archive.rootfs import Survey
from ckpt.errors import CkptError
from ckpt.host.beneath import Gone, Tree

BLOCK_BYTES: Final = 64 << 10
"""What changes is found in blocks of this size: as small as costs nothing measurable, 16 bytes of digest each are kept."""
SETTLED_NS: Final = 100_000_000
"""A file that changed within this time before it was looked at may change again within the same tick: ten ticks of the slowest kernel (HZ=100)."""
_LARGE_BYTES: Final = 16 << 30
_DIGEST_BYTES: Final = 16
_FACTS: Final = struct.Struct("=IIIQqqQQQ")

Look = Callable[[bool], Survey]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What one look found at a name."""

    kind: int
    facts: bytes
    """Digest of what stat(2) said; empty when its times are too young to be believed."""
    inode: int
    links: int


@dataclass(frozen=True, slots=True)
class _Known:
    """What the other end has at a name."""

    kind: int
    facts: bytes
    inode: int = 0
    group: bytes = b""
    """The names that are one file, digested; empty for a file of one name."""
    main: bool = True
    """The one of these names under which the content was sent."""
    size: int = 0
    block: int = BLOCK_BYTES
    digests: bytes = b""


class TreeSource:
    """One tree and what the other end has of it. Not for use by several threads.

    Args:
        look: finds the names; called with True while the tree changes.
    """

    def __init__(self, look: Look) -> None:
        from xxhash import xxh3_128_digest

        self._look = look
        self._digest = xxh3_128_digest
        self._seed = secrets.randbits(64)  # so that nobody who writes the files can prepare two blocks of one digest
        self._known: dict[bytes, _Known] = {}
        self._reader = ChunkReader()
        self._zero_digests: dict[int, bytes] = {}
        self._tree: Tree
        self._touched: set[bytes] = set()
        self._live = True
        self.deleted: list[str] = []
        """What the last look found deleted of what is below the tree (see Survey)."""

    def round(self, *, live: bool) -> Iterator[bytes | memoryview]:
        """The stream that brings the other end to what is here. A piece is valid until the next one is asked for.

        Args:
            live: the tree changes meanwhile; what goes while it is read is left to the next round.

        Raises:
            CkptError: the tree cannot be read, or (not `live`) it changed.
        """
        self._live, self._touched = live, set()
        try:
            survey = self._look(live)
            self.deleted = survey.deleted
            self._tree = Tree(survey.root)
            try:
                yield from self._operations(survey.names)
            finally:
                self._tree.close()
        except Gone:
            raise CkptError("a file of the container went while nothing should have changed", hint="does somebody else use its volume?") from None
        except OSError as error:
            raise CkptError(f"cannot read the files of the container: {error.strerror}: {error.filename or ''}") from error

    def _operations(self, names: list[bytes]) -> Iterator[bytes | memoryview]:
        seen = self._stat_all(names)
        tells = self._tree.tells_mapped_writes()
        if self._live and tells:
            self._tree.flush()
        device = self._tree.lstat(b"").st_dev  # what is mounted beneath is of another file system, and was not flushed
        groups = self._groups(seen)
        parked: dict[bytes, tuple[int, _Known]] = {}
        yield from self._park(seen, parked)
        yield from self._delete(seen)
        if not self._live:
            # The other end may follow on top of what is below the tree.
            for name in self.deleted:
                path = os.fsencode(name.lstrip("/"))
                yield _line("delete", path)
                self._touch(path)
        mains: dict[bytes, tuple[bytes, bool]] = {}
        dress: set[bytes] = set()
        for path, now in seen.items():
            old = self._known.get(path)
            if now.kind == stat.S_IFDIR:
                if old is None:
                    yield _line("dir", path)
                if old is None or not now.facts or old.facts != now.facts:
                    dress.add(path)
                self._known[path] = _Known(now.kind, now.facts)
                continue
            group = groups.get(path, b"")
            if group in mains and group:
                main, fresh = mains[group]
                if fresh or old is None or old.group != group:
                    yield _line("link", path, to=os.fsdecode(main))
                    self._touch(path)
                self._known[path] = _Known(now.kind, now.facts, now.inode, group, main=False)
                continue
            try:
                if now.kind == stat.S_IFREG:
                    fresh = yield from self._file(path, now, group, parked.get(path), tells and now.inode >> 64 == device)
                else:
                    fresh = yield from self._special(path, now, group)
            except Gone:
                yield from self._went(path)
            else:
                mains[group] = (path, fresh)
        yield _line("settle")
        for path in sorted(dress | (self._touched & seen.keys())):
            try:
                yield _line("dress", path, m=self._meta(path, self._tree.lstat(path)))
            except Gone:
                yield from self._went(path)
        yield _line("done")

    def _stat_all(self, names: list[bytes]) -> dict[bytes, _Seen]:
        settled_ns = time.time_ns() - SETTLED_NS
        seen = {}
        for name in names:
            path = b"" if name == b"." else name
            try:
                found = self._tree.lstat(path)
            except Gone:
                if not self._live:
                    raise
                continue
            facts = b""
            if found.st_ctime_ns < settled_ns:
                facts = self._digest(
                    _FACTS.pack(
                        found.st_mode, found.st_uid, found.st_gid, found.st_size, found.st_mtime_ns,
                        found.st_ctime_ns, found.st_ino, found.st_dev, found.st_rdev,
                    ),
                    self._seed,
                )  # fmt: skip
            seen[path] = _Seen(stat.S_IFMT(found.st_mode), facts, found.st_dev << 64 | found.st_ino, found.st_nlink)
        return seen

    def _groups(self, seen: dict[bytes, _Seen]) -> dict[bytes, bytes]:
        """Names of files with several names -> a digest of all of these."""
        together: dict[int, list[bytes]] = {}
        for path, now in seen.items():
            if now.links > 1 and now.kind != stat.S_IFDIR:
                together.setdefault(now.inode, []).append(path)
        return {path: self._digest(b"\0".join(paths), self._seed) for paths in together.values() if len(paths) > 1 for path in paths}

    def _park(self, seen: dict[bytes, _Seen], parked: dict[bytes, tuple[int, _Known]]) -> Iterator[bytes]:
        """Large files that have another name now need not be sent again. All are put aside first: names may have been exchanged."""
        homes = {now.inode: path for path, now in seen.items() if now.kind == stat.S_IFREG and now.links == 1}
        for path, old in list(self._known.items()):
            if old.kind != stat.S_IFREG or old.group or old.size < BLOCK_BYTES:
                continue
            home = homes.get(old.inode)
            if home is None or home == path or home in parked:
                continue
            del self._known[path]
            parked[home] = (len(parked), old)
            yield _line("park", path, n=parked[home][0])
            self._touch(path)
            self._touched.add(b"")

    def _delete(self, seen: dict[bytes, _Seen]) -> Iterator[bytes]:
        def differs(path: bytes, old: _Known) -> bool:
            now = seen.get(path)
            return now is None or (now.kind == stat.S_IFDIR) != (old.kind == stat.S_IFDIR)

        gone = {path for path, old in self._known.items() if differs(path, old)}
        for path in gone:
            del self._known[path]
            if _parent(path) not in gone:
                yield _line("delete", path)
                self._touch(path)

    def _went(self, path: bytes) -> Iterator[bytes]:
        """It went between looking and reading."""
        if not self._live:
            raise Gone
        old = self._known.pop(path, None)
        if old is not None and old.kind != stat.S_IFDIR:
            yield _line("delete", path)
            self._touch(path)
        elif old is not None:
            self._known[path] = _Known(old.kind, b"")  # the next round deletes it with what is in it

    def _special(self, path: bytes, now: _Seen, group: bytes) -> Generator[bytes, None, bool]:
        """A link, FIFO or device. Returns whether it was made anew."""
        old = self._known.get(path)
        same = old is not None and bool(now.facts) and (old.kind, old.facts, old.group, old.main) == (now.kind, now.facts, group, True)
        if not same:
            found = self._tree.lstat(path)
            if stat.S_IFMT(found.st_mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFSOCK):
                raise Gone
            to = os.fsdecode(self._tree.readlink(path)) if stat.S_ISLNK(found.st_mode) else ""
            device = [os.major(found.st_rdev), os.minor(found.st_rdev)]
            yield _line("special", path, to=to, dev=device, m=self._meta(path, found))
            self._touch(path)
        self._known[path] = _Known(now.kind, now.facts, now.inode, group)
        return not same

    def _file(
        self, path: bytes, now: _Seen, group: bytes, parked: tuple[int, _Known] | None, tells: bool
    ) -> Generator[bytes | memoryview, None, bool]:
        """A regular file: what differs of its content, and what it has besides. Returns whether it was made anew."""
        old = self._known.get(path)
        if old is not None and (old.kind != stat.S_IFREG or old.group != group or not old.main):
            old = None
        if parked is None and old is not None and tells and now.facts and old.facts == now.facts:
            return False
        fd = self._tree.open(path)
        try:
            found = os.fstat(fd)
            meta = self._meta(path, found)
            base = old
            if parked is not None:
                number, base = parked
                yield _line("unpark", path, n=number)
                self._touch(path)
            if base is None:
                self._touch(path)
            begun = parked is not None or base is None or not now.facts or base.facts != now.facts
            if begun:
                yield _line("file", path, new=base is None)
            block = base.block if base else BLOCK_BYTES if found.st_size < _LARGE_BYTES else READ_BYTES
            digests = bytearray()
            for at, length, pieces in self._reader.chunks(fd, found.st_size):
                fresh = self._digests(length, block, hole=not pieces)
                was = base.digests[len(digests) : len(digests) + len(fresh)] if base else b""
                digests += fresh
                if fresh == was:
                    continue
                for first, end in _runs(was, fresh):
                    if not begun:
                        begun = True
                        yield _line("file", path, new=False)
                    start, stop = at + first * block, min(at + end * block, at + length)
                    yield from self._run(at, start, stop, pieces, old_size=base.size if base else 0)
            if begun:
                yield _line("end", size=found.st_size, m=meta)
        finally:
            os.close(fd)
        self._known[path] = _Known(now.kind, now.facts, now.inode, group, True, found.st_size, block, bytes(digests))
        return base is None or parked is not None

    def _digests(self, length: int, block: int, *, hole: bool) -> bytes:
        """Of the blocks of the chunk in hand."""
        if hole and length == READ_BYTES:
            known = self._zero_digests.get(block)
            if known is None:
                known = self._zero_digests[block] = self._digest(bytes(block), self._seed) * (READ_BYTES // block)
            return known
        if hole:
            self._reader.view[:length] = bytes(length)
        return b"".join([self._digest(self._reader.view[at : min(at + block, length)], self._seed) for at in range(0, length, block)])

    def _run(self, at: int, start: int, stop: int, pieces: list[tuple[int, int]], *, old_size: int) -> Iterator[bytes | memoryview]:
        """The changed range [start, stop) of the chunk at `at`: its data, and zeros where it has holes now."""
        inside = [(max(low, start), min(high, stop)) for low, high in pieces if low < stop and high > start]
        if start < old_size and sum(high - low for low, high in inside) < stop - start:
            yield _line("hole", at=start, n=stop - start)
        for low, high in inside:
            yield _line("data", at=low, n=high - low)
            yield self._reader.view[low - at : high - at]

    def _meta(self, path: bytes, found: os.stat_result) -> list[Any]:
        xattrs = {key: base64.b64encode(value).decode() for key, value in sorted(self._tree.xattrs(path).items()) if allowed(key)}
        return [found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, xattrs]

    def _touch(self, path: bytes) -> None:
        """The other end's directory of `path` gets another time by what it is told to do."""
        self._touched.add(_parent(path))


class PieceStream:
    """Pieces as something to be read like a raw file. Every byte is copied once, into the reader's buffer."""

    def __init__(self, pieces: Iterator[bytes | memoryview]) -> None:
        self._pieces = pieces
        self._piece = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill the buffer as far as one piece goes; 0 at the end."""
        while not self._piece:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._piece = memoryview(piece)
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count


def _line(operation: str, path: bytes | None = None, **more: object) -> bytes:
    value: dict[str, object] = {"o": operation}
    if path is not None:
        value["p"] = os.fsdecode(path)
    return json.dumps({**value, **more}, separators=(",", ":")).encode() + b"\n"


def _parent(path: bytes) -> bytes:
    return path.rpartition(b"/")[0]


def _runs(was: bytes, fresh: bytes) -> Iterator[tuple[int, int]]:
    """[first, end) of neighbouring blocks whose digests differ."""
    count = len(fresh) // _DIGEST_BYTES
    start = -1
    for at in range(count):
        part = slice(at * _DIGEST_BYTES, (at + 1) * _DIGEST_BYTES)
        if was[part] != fresh[part]:
            start = at if start < 0 else start
        elif start >= 0:
            yield start, at
            start = -1
    if start >= 0:
        yield start, count
