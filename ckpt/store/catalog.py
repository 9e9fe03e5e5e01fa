"""The store: checkpoints kept on this host, one directory each, whole or not there.

Layout below the root (0700):

    checkpoints/ID/     a checkpoint in podman's archive layout, unpacked, with `artifacts/ckpt.json`
    tmp/ID/             a draft: the same while it is written, flocked by its owner; or a checkpoint on its way out
    history/ID.json     what became of a job (see history)
    generations.json    last generation given to each name, so that no number is given twice
    lock                flock around everything that gives numbers, makes or sweeps drafts

A name is data: directories are named by the id only. A checkpoint comes into being by one rename of a draft whose every file is
on the disk, and goes by one rename into `tmp/`.
"""

from __future__ import annotations

import difflib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ckpt.archive import manifest as manifest_file
from ckpt.errors import ArchiveInvalid, BusyError, CkptError, NoSpace, PermissionDenied, TargetNotFound
from ckpt.model import Checkpoint, Entry, Manifest
from ckpt.store import durable
from ckpt.store import entry as entries
from ckpt.store.job import DEFAULT_ROOT

MANIFEST: Final = Path("artifacts", "ckpt.json")
MIN_PREFIX: Final = 4
"""An id may be shortened to this many characters where that is unique."""


@dataclass(frozen=True, slots=True)
class Broken:
    """An entry of the store that cannot be read; it is listed by nobody and harms nobody."""

    directory: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    """All that the store holds: oldest first within a name, and what could not be read."""

    checkpoints: tuple[Checkpoint, ...]
    broken: tuple[Broken, ...]


class Draft:
    """A checkpoint being written. Exactly one of `commit` and `discard` is called; a dead owner's draft is swept."""

    def __init__(self, catalog: Catalog, name: str, identity: str, fd: int, origin: str) -> None:
        self._catalog = catalog
        self._fd = fd
        self.name = name
        self.id = identity
        self.origin = origin

    @property
    def stage(self) -> Path:
        """The directory to fill (0700, same file system as the store)."""
        return self._catalog.drafts / self.id

    def commit(self, manifest: Manifest) -> Checkpoint:
        """Make the draft a checkpoint: number it, bring every byte to the disk, rename it into place.

        The id, the name and the generation of `manifest` are set here, and so is `size_bytes`.

        Raises:
            NoSpace: the disk is full; the draft is still there, to be discarded.
        """
        with self._catalog.storage("store the checkpoint"):
            return self._catalog.adopt(self, manifest)

    def discard(self) -> None:
        """Remove the draft. Never raises for what is gone already."""
        shutil.rmtree(self.stage, ignore_errors=True)
        self.close()

    def share(self) -> None:
        """Let readers in, still no remover (the step before a checkpoint appears)."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def fileno(self) -> int:
        """The lock's descriptor: a process that inherits it keeps the draft alive after us."""
        return self._fd

    def close(self) -> None:
        """Give the lock back (also done by the kernel when the owner dies)."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Catalog:
    """The checkpoints below `root`. Cheap to make: no directory is touched before it is needed."""

    def __init__(self, root: Path = DEFAULT_ROOT) -> None:
        self.root = root
        self.entries = root / "checkpoints"
        self.drafts = root / "tmp"

    # -- writing -------------------------------------------------------------------------------------------------

    def begin(self, name: str, *, origin: str = "local") -> Draft:
        """An empty draft for a checkpoint of `name`, locked by this process.

        Args:
            origin: as in `Entry`: where it comes from.

        Raises:
            NoSpace, PermissionDenied: the store cannot be written.
        """
        with self.storage("begin a checkpoint"), self._locked():
            # Under the store's lock: a sweeper never sees the directory without its lock.
            identity = secrets.token_hex(8)
            stage = self.drafts / identity
            stage.mkdir(mode=0o700)
            fd = _lock_directory(stage, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Draft(self, name, identity, fd, origin)

    def adopt(self, draft: Draft, manifest: Manifest) -> Checkpoint:
        """The body of `Draft.commit`."""
        # The many bytes go to the disk before the lock is taken: nobody waits for them.
        durable.sync_tree(draft.stage)
        with self._locked():
            generation = self._next_generation(draft.name)
            size_bytes = durable.tree_size_bytes(draft.stage)
            final = replace(manifest, id=draft.id, name=draft.name, generation=generation, size_bytes=size_bytes)
            data = manifest_file.dumps(final)
            durable.write_file(draft.stage / MANIFEST, data)
            entry = Entry(draft.name, generation, size_bytes, time.time(), draft.origin, manifest_digest=_digest(data))
            entries.write(draft.stage, entry)
            durable.sync_directory(draft.stage)
            place = self.entries / draft.id
            draft.share()  # from its first moment in the store it can be leased
            os.rename(draft.stage, place)
            durable.sync_directory(self.entries)
            durable.sync_directory(self.drafts)
        draft.close()
        return Checkpoint(final, place, entry)

    def remove(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint out of the store: at once for everybody else, then its bytes.

        Raises:
            BusyError: it is being restored.
            TargetNotFound: it is gone already.
        """
        with self.storage("remove the checkpoint"), self._locked():
            gone = self.drafts / f"{checkpoint.directory.name}.{secrets.token_hex(4)}"
            try:
                fd = _lock_directory(checkpoint.directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(f"{checkpoint.ref} is in use", hint="wait until its restore or export has ended") from None
            except FileNotFoundError:
                raise TargetNotFound(f"{checkpoint.ref} is gone already") from None
            os.rename(checkpoint.directory, gone)
            durable.sync_directory(self.entries)
        try:
            shutil.rmtree(gone, ignore_errors=True)
        finally:
            os.close(fd)

    def sweep(self) -> list[str]:
        """Remove what dead owners left in `tmp/`; returns the names of the removed directories. Never touches a living draft."""
        if not self.drafts.is_dir():
            return []
        doomed: list[tuple[Path, int]] = []
        with self.storage("sweep the store"), self._locked():
            for path in sorted(self.drafts.iterdir()):
                try:
                    doomed.append((path, _lock_directory(path, fcntl.LOCK_EX | fcntl.LOCK_NB)))
                except (BlockingIOError, FileNotFoundError):
                    continue
                except NotADirectoryError:
                    path.unlink(missing_ok=True)
        for path, fd in doomed:
            shutil.rmtree(path, ignore_errors=True)
            os.close(fd)
        return [path.name for path, _ in doomed]

    # -- reading -------------------------------------------------------------------------------------------------

    def listing(self) -> Listing:
        """Everything in the store; what cannot be read is named in `broken` and left alone.

        Raises:
            PermissionDenied: the store cannot be opened.
        """
        found: list[Checkpoint] = []
        broken: list[Broken] = []
        with self.storage("read the store"):
            try:
                names = sorted(os.listdir(self.entries))
            except FileNotFoundError:
                names = []
        for name in names:
            directory = self.entries / name
            try:
                found.append(_read(directory))
            except FileNotFoundError:
                if directory.exists():  # else: removed while we looked
                    broken.append(Broken(directory, f"{MANIFEST} is missing"))
            except (OSError, CkptError, ValueError, TypeError, KeyError, AttributeError) as error:
                broken.append(Broken(directory, str(error)))
        found.sort(key=lambda c: (c.manifest.name, c.manifest.generation, c.manifest.created_s))
        return Listing(tuple(found), tuple(broken))

    def all(self) -> list[Checkpoint]:
        """The readable checkpoints, sorted by name, oldest first."""
        return list(self.listing().checkpoints)

    def find(self, ref: str) -> Checkpoint:
        """The checkpoint that `ref` names: NAME or NAME@latest (newest), NAME@N, an id or the unique beginning of one.

        Raises:
            TargetNotFound: none, or several, with what is close.
        """
        known = self.all()
        exact = [c for c in known if c.manifest.name == ref]
        if exact:
            return exact[-1]
        name, at, generation = ref.rpartition("@")
        if at:
            versions = [c for c in known if c.manifest.name == name]
            if versions and generation == "latest":
                return versions[-1]
            if versions and generation.isascii() and generation.isdigit():
                for candidate in versions:
                    if candidate.manifest.generation == int(generation):
                        return candidate
            if versions:
                there = ", ".join(c.ref for c in versions)
                raise TargetNotFound(f"there is no checkpoint {ref!r} in the store", hint=f"there is: {there}")
        if len(ref) >= MIN_PREFIX and re.fullmatch(r"[0-9a-f]+", ref):
            begins = [c for c in known if c.manifest.id.startswith(ref)]
            if len(begins) == 1:
                return begins[0]
            if begins:
                raise TargetNotFound(f"{ref!r} is ambiguous: {', '.join(f'{c.manifest.id} ({c.ref})' for c in begins)}")
        close = difflib.get_close_matches(name or ref, sorted({c.manifest.name for c in known}))
        hint = f"did you mean {' or '.join(close)}?" if close else "ckpt list shows what is there"
        raise TargetNotFound(f"there is no checkpoint {ref!r} in the store", hint=hint)

    @contextmanager
    def lease(self, checkpoint: Checkpoint) -> Iterator[Path]:
        """Keep a checkpoint from being removed while it is read.

        Raises:
            TargetNotFound: it is gone.
        """
        with self.lease_fd(checkpoint):
            yield checkpoint.directory

    @contextmanager
    def lease_fd(self, checkpoint: Checkpoint) -> Iterator[int]:
        """`lease`, as the lock's descriptor: a process that inherits it keeps the lease after us.

        Raises:
            TargetNotFound: it is gone.
        """
        try:
            fd = _lock_directory(checkpoint.directory, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (FileNotFoundError, BlockingIOError):
            raise TargetNotFound(f"{checkpoint.ref} is no longer in the store") from None
        try:
            yield fd
        finally:
            os.close(fd)

    # -- inside --------------------------------------------------------------------------------------------------

    @contextmanager
    def storage(self, doing: str) -> Iterator[None]:
        """Turn what the operating system says about the store into our own errors."""
        try:
            yield
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                hint = "free some space (ckpt prune, ckpt rm) or name another store"
                raise NoSpace(f"no space left in {self.root} to {doing}", hint=hint) from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise PermissionDenied(f"cannot {doing} in {self.root}: {error.strerror}", hint="run it as root") from error
            raise

    @contextmanager
    def _locked(self) -> Iterator[None]:
        for directory in (self.root, self.entries, self.drafts):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _next_generation(self, name: str) -> int:
        path = self.root / "generations.json"
        try:
            given = json.loads(path.read_bytes())
            last = int(given.get(name, 0))
        except (OSError, ValueError, TypeError, AttributeError):
            given, last = {}, 0  # lost or torn: the checkpoints themselves still say
        last = max([last, *(c.manifest.generation for c in self.all() if c.manifest.name == name)])
        given[name] = last + 1
        durable.write_file(path, json.dumps(given, ensure_ascii=True).encode())
        return last + 1


def _lock_directory(path: Path, how: int) -> int:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, how)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _read(directory: Path) -> Checkpoint:
    data = (directory / MANIFEST).read_bytes()
    manifest = manifest_file.loads(data)
    entry = entries.read(directory)
    if entry is None:  # of an older ckpt
        if manifest.id != directory.name:
            raise ArchiveInvalid(f"its manifest says id {manifest.id!r}")
        return Checkpoint(manifest, directory, Entry(manifest.name, manifest.generation, manifest.size_bytes, manifest.created_s))
    if entry.manifest_digest and entry.manifest_digest != _digest(data):
        raise ArchiveInvalid("its manifest was changed or damaged")
    assigned = replace(manifest, id=directory.name, name=entry.name, generation=entry.generation, size_bytes=entry.size_bytes)
    return Checkpoint(assigned, directory, entry)


def new_name(prefix: str = "imported") -> str:
    """A name for a checkpoint that nobody named."""
    return f"{prefix}-{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}"
