"""An archive into a stage. The archive is hostile until its end was read: nothing is written but whitelisted members, beneath the stage."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Final, Protocol

from ckpt.archive import manifest as manifests
from ckpt.archive import schema
from ckpt.archive.codec import open_stream
from ckpt.archive.foreign import foreign_manifest, made_up
from ckpt.archive.layout import (
    CHUNK_BYTES,
    CONFIG,
    DIGEST_PREFIX,
    INVENTORY,
    MANIFEST,
    NETWORK_STATUS,
    SIGNATURE,
    SPEC,
    STATS,
    UNDIGESTED,
    compare_digests,
    is_bulk,
    require_members,
)
from ckpt.archive.opened import ArchiveMembers
from ckpt.archive.tarstream import DEFAULT_LIMITS, Limits, Member, TarStream
from ckpt.errors import ArchiveInvalid, DigestMismatch, NoSpace
from ckpt.host.beneath import open_beneath
from ckpt.model import Manifest

__all__ = ["DEFAULT_LIMITS", "Limits", "Peek", "extract", "foreign_manifest", "peek"]

OnBytes = Callable[[int], None]
Judge = Callable[[bytes, bytes | None], object]
"""Told the manifest and its signature (None: there is none) as soon as they came; raises DigestMismatch for what is not to be taken."""


class Sink(Protocol):
    """Where the content of a member goes that becomes no file: pieces, then `close`. It makes the digest ("sha256:HEX") itself."""

    digest: str

    def write(self, data: bytes | memoryview, /) -> int: ...

    def close(self) -> None: ...


_CORE_CAP: Final = 64 << 20
_SMALL: Final = frozenset({MANIFEST, SIGNATURE, CONFIG, SPEC, NETWORK_STATUS, STATS})


@dataclass(frozen=True, slots=True)
class Peek:
    """What `peek` sees: the small members, and the size of every member. `stats` and `network_status` are raw bytes."""

    compression: str
    archive_bytes: int
    manifest: Manifest
    config: dict[str, Any]
    spec: dict[str, Any]
    network_status: bytes = b""
    stats: bytes = b""
    sizes: dict[str, int] = field(default_factory=dict)


def extract(
    source: BinaryIO,
    stage: Path,
    *,
    limits: Limits = DEFAULT_LIMITS,
    on_bytes: OnBytes | None = None,
    judge: Judge | None = None,
    sinks: Callable[[str], Sink | None] | None = None,
) -> Manifest | None:
    """Unpack an archive from a file or a pipe into `stage` (made with 0700 if it is not there), verifying it on the way.

    Args:
        on_bytes: called with the number of bytes (compressed, as read from `source`) since the last call.
        judge: asked before anything but the manifest and its signature is unpacked. What it took must be what the archive is.
        sinks: makes what takes a bulk member (`layout.is_bulk`); without one it becomes a file like all others.

    Returns:
        The manifest when the archive has one that belongs to it, else None (`foreign_manifest` makes one up).

    Raises:
        ArchiveInvalid: not an archive, damaged, truncated, not complete or with members that are not allowed.
        DigestMismatch: a member is not what the manifest says.
        NoSpace: the stage's file system is full. After any error the caller removes the stage.
    """
    with suppress(FileExistsError):
        stage.mkdir(mode=0o700)
    with _no_space(stage), _Directories(stage) as directories, ThreadPoolExecutor(1) as pool:
        stream = open_stream(source)
        tar = TarStream(stream, limits)
        digests: dict[str, str] = {}
        told = 0
        signed = _Signed(stage, judge)
        for member in tar:
            if member.name.endswith("/"):
                directories.get(member.name)
                continue
            _check_size(member, limits)
            signed.before(member.name)
            if is_bulk(member.name) and member.name in digests:
                raise ArchiveInvalid(f"{stage / member.name} is there already")
            if sinks is not None and is_bulk(member.name) and (sink := sinks(member.name)) is not None:
                for piece in tar.data():
                    sink.write(piece)
                    if on_bytes and stream.raw.count > told:
                        on_bytes(stream.raw.count - told)
                        told = stream.raw.count
                sink.close()
                digests[member.name] = sink.digest
                continue
            fd = directories.create(member.name)
            try:
                digest = hashlib.sha256()
                pending: Future[None] | None = None
                for piece in tar.data():
                    # The digest of one piece is made while the next one is decompressed.
                    if pending:
                        pending.result()
                    pending = pool.submit(digest.update, piece)
                    _write_all(fd, piece)
                    if on_bytes and stream.raw.count > told:
                        on_bytes(stream.raw.count - told)
                        told = stream.raw.count
                if pending:
                    pending.result()
            finally:
                os.close(fd)
            if member.name not in UNDIGESTED:
                digests[member.name] = DIGEST_PREFIX + digest.hexdigest()
        if on_bytes and stream.raw.count > told:
            on_bytes(stream.raw.count - told)
    require_members(stage)
    config = manifests.json_object(_read_small(stage / CONFIG), CONFIG)
    schema.check(stage)
    if not (stage / MANIFEST).exists():
        signed.reject_stale()
        return None
    found = manifests.loads(_read_small(stage / MANIFEST))
    if _is_stale(found, digests, other=config.get("id") != found.container_id):
        signed.reject_stale()
        os.unlink(stage / MANIFEST)
        return None
    compare_digests(digests, found)
    stream.require_as_written(tar.entries)
    return found


class _Signed:
    """When the judge is asked, and that nothing is unpacked which it has not seen."""

    def __init__(self, stage: Path, judge: Judge | None) -> None:
        self._stage = stage
        self._judge = judge
        self._asked = False
        self._vouched = False

    def before(self, name: str) -> None:
        """A member is about to be unpacked."""
        if self._judge is None:
            return
        if name in UNDIGESTED:
            if self._asked:
                raise DigestMismatch(f"{name} is not at the beginning of the archive: its signature cannot be relied on")
            return
        if not self._asked:
            self._asked = True
            data, signature = (_read_small(self._stage / part) if (self._stage / part).exists() else None for part in (MANIFEST, SIGNATURE))
            self._judge(data or b"", signature)
            self._vouched = signature is not None

    def reject_stale(self) -> None:
        """The manifest is not of this checkpoint, so nor is its signature."""
        if self._vouched:
            raise DigestMismatch("the archive is not what was signed: its manifest belongs to another checkpoint")
        (self._stage / SIGNATURE).unlink(missing_ok=True)


def _is_stale(manifest: Manifest, digests: dict[str, str], *, other: bool) -> bool:
    """Whether the manifest is of an earlier checkpoint, of the same container or of the one that it is a copy of (`other`).

    Podman keeps `artifacts/` of a container that it restored and exports it again with its next checkpoint. Every dump has its own
    inventory and its own core files; damage hits one member, and config.dump with the container's id may be that one.
    """
    cores = any(manifest.digests[name] != digests.get(name) for name in manifest.digests if name.startswith("checkpoint/core-"))
    known = manifest.digests.get(INVENTORY)
    inventory = known is not None and known != digests.get(INVENTORY)
    return (inventory or cores) if other else (inventory and cores)


def peek(path: Path, *, limits: Limits = DEFAULT_LIMITS) -> Peek:
    """Read the small members and the sizes of all members of an archive file; nothing is written, digests are not verified.

    Raises:
        ArchiveInvalid: as `extract`.
    """
    with ArchiveMembers(path, limits=limits) as members:
        return look(members, limits=limits)


def look(members: ArchiveMembers, *, limits: Limits = DEFAULT_LIMITS) -> Peek:
    """`peek` into an archive that is open.

    Raises:
        ArchiveInvalid: as `extract`.
    """
    sizes = {name: members.size_bytes(name) for name in members.names() if not name.endswith("/")}
    small: dict[str, bytes] = {}
    for name, size_bytes in sizes.items():
        _check_size(Member(name, size_bytes), limits)
        if name in _SMALL:
            small[name] = _read_member(members, name)
    for name in (CONFIG, SPEC, INVENTORY):
        if name not in sizes:
            raise ArchiveInvalid(f"the archive has no {name}, it is not a complete checkpoint")
    config = manifests.json_object(small[CONFIG], CONFIG)
    spec = manifests.json_object(small[SPEC], SPEC)
    manifest = manifests.loads(small[MANIFEST]) if MANIFEST in small else None
    other = manifest is not None and manifest.container_id != config.get("id")
    if manifest is None or _is_stale(manifest, _identity(members, manifest, all_cores=other), other=other):
        manifest = made_up(small[CONFIG], small.get(NETWORK_STATUS, b""), small[SPEC], size_bytes=sum(sizes.values()), members=tuple(sizes))
        manifest = manifest if manifest.created_s else replace(manifest, created_s=members.mtime_s(INVENTORY))
    return Peek(members.compression, members.archive_bytes, manifest, config, spec, small.get(NETWORK_STATUS, b""), small.get(STATS, b""), sizes)


def _identity(members: ArchiveMembers, manifest: Manifest, *, all_cores: bool) -> dict[str, str]:
    """Digests of the members that tell one dump from the next. When the inventory is that of the manifest, it is enough."""
    sizes = {name: members.size_bytes(name) for name in members.names()}
    found = {INVENTORY: DIGEST_PREFIX + hashlib.sha256(_read_member(members, INVENTORY)).hexdigest()} if sizes.get(INVENTORY, 0) < _CORE_CAP else {}
    if all_cores or found.get(INVENTORY) != manifest.digests.get(INVENTORY):
        for name, size_bytes in sizes.items():
            if name.startswith("checkpoint/core-") and size_bytes < _CORE_CAP:
                found[name] = DIGEST_PREFIX + hashlib.sha256(_read_member(members, name)).hexdigest()
    return found


def _read_member(members: ArchiveMembers, name: str) -> bytes:
    with members.open(name) as file:
        return b"".join(iter(lambda: file.read(CHUNK_BYTES), b""))


def _check_size(member: Member, limits: Limits) -> None:
    if member.size_bytes > limits.max_total_bytes:
        raise ArchiveInvalid(f"the archive holds {member.name} with more than {limits.max_total_bytes} bytes")
    if member.name in _SMALL and member.size_bytes > limits.max_small_bytes:
        raise ArchiveInvalid(f"the archive holds {member.name} with more than {limits.max_small_bytes} bytes")


def _read_small(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(manifests.MAX_BYTES + 1)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextmanager
def _no_space(stage: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space left in {stage} to unpack the archive", hint="free some space or use another store") from error
        raise


class _Directories:
    """File descriptors of the stage and of the directories in it: nothing is opened by a path that the archive could bend."""

    def __init__(self, stage: Path) -> None:
        self._stage = stage
        self._fds: dict[str, int] = {}

    def __enter__(self) -> _Directories:
        self._fds[""] = os.open(self._stage, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def get(self, name: str) -> int:
        """The descriptor of `name` ("" or "checkpoint/"), made if it is not there."""
        if name not in self._fds:
            leaf = name.rstrip("/")
            with suppress(FileExistsError):
                os.mkdir(leaf, 0o700, dir_fd=self._fds[""])
            try:
                self._fds[name] = open_beneath(self._fds[""], leaf, os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                raise ArchiveInvalid(f"{self._stage / leaf} is in the way: {error.strerror}") from error
        return self._fds[name]

    def create(self, name: str) -> int:
        """A new file, 0600."""
        head, slash, leaf = name.rpartition("/")
        try:
            return open_beneath(self.get(head + slash), leaf, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            raise ArchiveInvalid(f"{self._stage / name} is there already") from None
