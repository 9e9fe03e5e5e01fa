"""The store: checkpoints kept on this host, whole or not there, sharing the pages that they have in common.

Layout below the root (0700), described in docs/store.md:

    checkpoints/ID/     a checkpoint: the small members of podman's archive layout, `artifacts/ckpt.json`, and `recipe` (see recipe)
    packs/ID.pack       the pages that checkpoint ID brought (see pack); ID.dead: those of its chunks that are gone
    tmp/ID/             a draft while it is written; or a checkpoint on its way out
    locks/ID            a file that the owner of a draft or a reader of a checkpoint holds a flock on
    history/ID.json     what became of a job (see history)
    generations.json    last generation given to each name, so that no number is given twice
    tags.key            the secret of the pages' tags (see pages)
    store.json          the version of this layout
    groups/NAME@N.json  checkpoints that belong together (see groups)
    lock                flock around everything that gives numbers, makes or sweeps drafts, and takes packs away

A name is data: directories are named by the id only. A checkpoint comes into being by one rename of a draft whose every file is
on the disk, after the rename of its pack, and goes by one rename into `tmp/`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ckpt.archive import layout
from ckpt.archive import manifest as manifest_file
from ckpt.errors import ArchiveInvalid, BusyError, CkptError, ConfigError, DigestMismatch, NoSpace, PermissionDenied, TargetNotFound
from ckpt.model import Checkpoint, Entry, Manifest
from ckpt.store import durable, locks
from ckpt.store import entry as entries
from ckpt.store.draft import PRIVATE, Draft
from ckpt.store.job import DEFAULT_ROOT

if TYPE_CHECKING:
    from ckpt.archive.members import Members
    from ckpt.store.collect import Collected
    from ckpt.store.pages import Tagger
    from ckpt.store.reading import PageReader, StoreMembers
    from ckpt.store.recipe import Recipe

__all__ = ["Broken", "Catalog", "Draft", "Listing", "new_name"]

MANIFEST: Final = Path("artifacts", "ckpt.json")
SCHEMA: Final = 2
SCHEMA_FILE: Final = "store.json"
SIGNATURE: Final = Path(layout.SIGNATURE)


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


class Catalog:
    """The checkpoints below `root`. Cheap to make: no directory is touched before it is needed."""

    def __init__(self, root: Path = DEFAULT_ROOT, *, key: bytes | None = None, spill: Path | None = None) -> None:
        """
        Args:
            key: 32 bytes; the chunks of new checkpoints are encrypted with it, and those of old ones decrypted.
            spill: the directory that the chunks of drafts go to, in files without a name: they are gone with their owner, and what is in
                such a draft can be read, but not be committed.
        """
        self.root = root
        self.key = key
        self.spill = spill
        self.entries = root / "checkpoints"
        self.drafts = root / "tmp"
        self.packs = root / "packs"
        self.locks = root / "locks"
        self._seen: dict[str, tuple[tuple[int, ...], Checkpoint]] = {}
        """Directory name -> its files' stamps, and what they said: a host's save lists the store for each of its containers."""

    # -- writing -------------------------------------------------------------------------------------------------

    def begin(self, name: str, *, origin: str = "local") -> Draft:
        """An empty draft for a checkpoint of `name`, locked by this process.

        Args:
            origin: as in `Entry`: where it comes from.

        Raises:
            NoSpace, PermissionDenied: the store cannot be written.
        """
        with self.storage("begin a checkpoint"), self.locked():
            # Under the store's lock: a sweeper never sees the directory without its lock.
            identity = secrets.token_hex(8)
            fd = locks.take(self.locks / identity, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                locks.sign(fd)
                (self.drafts / identity).mkdir(mode=0o700)
            except BaseException:
                os.close(fd)
                raise
        return Draft(self, name, identity, fd, origin)

    def adopt(self, draft: Draft, manifest: Manifest, sign: Callable[[bytes], bytes] | None = None) -> Checkpoint:
        """The body of `Draft.commit`."""
        draft.pack(manifest.digests)
        digests = manifest.digests
        if digests:
            for name, digest in draft.digests.items():
                if digests.get(name, digest) != digest:
                    raise DigestMismatch(f"{name} is not what the manifest says")
            digests = dict(sorted({**draft.digests, **digests}.items()))
        size_bytes = durable.tree_size_bytes(draft.stage, skip=PRIVATE) + draft.bulk_bytes
        pack = draft.finish()
        # The many bytes go to the disk before the lock is taken: nobody waits for them.
        durable.sync_tree(draft.stage)
        final = replace(manifest, id=draft.id, name=draft.name, size_bytes=size_bytes, digests=digests)
        signed = _signed(draft.stage, final, sign)
        with self.locked():
            generation = self.number(draft.name)
            final = replace(final, generation=generation)
            data = signed
            if data is None:
                data = manifest_file.dumps(final)
                durable.write_file(draft.stage / MANIFEST, data)
            entry = Entry(
                draft.name, generation, size_bytes, time.time(), draft.origin, draft.tags, draft.note, _digest(data), draft.pinned, draft.group
            )
            entries.write(draft.stage, entry)
            place = self.entries / draft.id
            draft.share()  # from its first moment in the store it can be leased
            if pack is not None:
                os.rename(pack, self.packs / f"{draft.id}.pack")
                durable.sync_directory(self.packs)
            # From here to the entry's rename only the store's lock keeps what the draft had claimed.
            shutil.rmtree(draft.stage / PRIVATE, ignore_errors=True)
            durable.sync_directory(draft.stage)
            os.rename(draft.stage, place)
            durable.sync_directory(self.entries)
            durable.sync_directory(self.drafts)
        draft.close()
        return Checkpoint(final, place, entry)

    def remove(self, checkpoint: Checkpoint) -> None:
        """Take a checkpoint out of the store: at once for everybody else, then its bytes, and the chunks that only it needed.

        Raises:
            BusyError: it is being restored.
            TargetNotFound: it is gone already.
        """
        from ckpt.store import sweep

        identity = checkpoint.directory.name
        names: list[str] = []
        with self.storage("remove the checkpoint"), self.locked():
            gone = self.drafts / f"{identity}.{secrets.token_hex(4)}"
            if not checkpoint.directory.is_dir():
                raise TargetNotFound(f"{checkpoint.ref} is gone already")
            try:
                fd = locks.take(self.locks / identity, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BusyError(f"{checkpoint.ref} is in use", hint="wait until its restore or export has ended") from None
            try:
                with suppress(CkptError, OSError):
                    names = sweep.packs_of(checkpoint.directory)
                try:
                    os.rename(checkpoint.directory, gone)
                except FileNotFoundError:
                    raise TargetNotFound(f"{checkpoint.ref} is gone already") from None
                durable.sync_directory(self.entries)
                (self.locks / identity).unlink(missing_ok=True)
            finally:
                os.close(fd)
        # The recipe goes last: whoever finds it in `tmp/` knows what is still to be given back.
        sweep.give_back(self, names)
        shutil.rmtree(gone, ignore_errors=True)

    def amend(self, checkpoint: Checkpoint, change: Callable[[Entry], Entry]) -> Checkpoint:
        """Change what the store knows about a checkpoint (tags, note, pin).

        Raises:
            TargetNotFound: it is gone.
        """
        with self.storage("change the store"), self.locked():
            try:
                now = _read(checkpoint.directory)
            except FileNotFoundError:
                raise TargetNotFound(f"{checkpoint.ref} is no longer in the store") from None
            entry = change(now.entry)
            entries.write(checkpoint.directory, entry)
        return replace(now, entry=entry)

    def sweep(self) -> list[str]:
        """Remove what dead owners left in `tmp/`, `packs/` and `locks/`; returns the names of the removed directories.

        Never touches a living draft, or a pack that a checkpoint needs.
        """
        from ckpt.store import sweep

        return sweep.sweep(self)

    def collect(self, *, dry_run: bool = False, packs: Iterable[str] | None = None) -> Collected:
        """Give back the space of packs and chunks that no checkpoint and no living draft needs. Safe at any time, beside anything.

        Args:
            dry_run: say what would be given back, touch nothing.
            packs: look at these only.

        Raises:
            NoSpace, PermissionDenied: the store cannot be written.
        """
        from ckpt.store import collect

        if not self.root.is_dir():
            return collect.Collected()
        with self.storage("collect garbage"):
            return collect.collect(self, dry_run=dry_run, packs=packs)

    # -- reading -------------------------------------------------------------------------------------------------

    def members(self, checkpoint: Checkpoint) -> StoreMembers:
        """The members of a checkpoint (`archive.members.Members`); to be closed. Keep a lease while you use it.

        Raises:
            DigestMismatch: its recipe is damaged.
        """
        from ckpt.store.reading import StoreMembers

        return StoreMembers(checkpoint.directory, self.recipe(checkpoint), self.page_reader(checkpoint))

    def page_reader(self, checkpoint: Checkpoint) -> PageReader:
        """Random access to the bulk members of a checkpoint; to be closed. Keep a lease while you use it.

        Raises:
            DigestMismatch: its recipe is damaged.
        """
        from ckpt.store.reading import PageReader

        return PageReader(checkpoint.directory, self.recipe(checkpoint), self.packs, self.key)

    @contextmanager
    def outgoing(self, checkpoint: Checkpoint) -> Iterator[tuple[Members, Manifest]]:
        """Members and manifest for an archive: digests that were not made when it was saved are in the manifest. Keep a lease while you use it.

        Raises:
            DigestMismatch: something is damaged.
        """
        from ckpt.store import whole

        with whole.outgoing(self, checkpoint) as found:
            yield found

    def compare_plain(self, members: StoreMembers) -> None:
        """Read the plain files that only have a seal: nothing else says that they are whole. Raises DigestMismatch."""
        from ckpt.store.check import compare_seal

        for name in members.recipe.plain:
            for problem in compare_seal(members, name, self.tagger()):
                raise DigestMismatch(problem)

    def tagger(self) -> Tagger | None:
        """What makes the tags and seals of this store; None when its secret is lost."""
        from ckpt.store import base
        from ckpt.store.pages import Tagger

        secret = self.key or base.known_secret(self.root)
        return Tagger(secret) if secret else None

    def materialize(
        self,
        checkpoint: Checkpoint,
        into: Path,
        *,
        only: Callable[[str], bool] | None = None,
        on_bytes: Callable[[int], None] | None = None,
        flat: bool = False,
        link: bool = False,
    ) -> dict[str, str]:
        """Write the members of a checkpoint as plain files (0600) into a directory; zero pages become holes.

        Args:
            into: made (0700) when it is not there; must not hold files of the members' names.
            only: which members.
            on_bytes: called, by one thread at a time, with the number of bytes written since the last call.
            flat: make the SHA-256 of every member; else of one with a seal that is compared, and the digest is what the store says.
            link: memory that is a plain file with a seal in the store is not copied: who gets it must not write to it.

        Returns:
            Member -> "sha256:HEX" of what was written (none of the manifest and its signature, and of members that never had one).

        Raises:
            DigestMismatch: something is damaged; the message names the member.
            NoSpace: `into` is full. After any error the caller removes what is there.
        """
        from ckpt.store import materialize

        telling = threading.Lock()

        def tell(count: int) -> None:
            with telling:
                if on_bytes is not None:
                    on_bytes(count)

        into.mkdir(mode=0o700, exist_ok=True)
        with self.members(checkpoint) as members:
            threads = max(2, min(8, os.cpu_count() or 2))
            found = self.recipe(checkpoint)
            tagger = None if flat else self.tagger()
            return materialize.materialize(
                members, found, into, only=only, on_bytes=tell if on_bytes else None, threads=threads, tagger=tagger, link=link
            )

    def recipe(self, checkpoint: Checkpoint) -> Recipe:
        """Of which pages a checkpoint is made. Raises DigestMismatch, ArchiveInvalid."""
        from ckpt.store import recipe

        return recipe.load(checkpoint.directory / recipe.NAME)

    def sizes(self) -> dict[str, tuple[int, int, int]]:
        """For each checkpoint: bytes of its members; bytes on the disk that only it needs; bytes that others need as well."""
        from ckpt.store import collect

        with self.storage("read the store"):
            return collect.sizes(self)

    def footprint(self) -> Callable[[Iterable[Checkpoint]], int]:
        """Ask what of the disk some checkpoints need together (what they share counts once), as the store is now. Bytes."""
        from ckpt.store import collect

        with self.storage("read the store"):
            return collect.footprint(self)

    def check(self, checkpoint: Checkpoint) -> list[str]:
        """Read everything of a checkpoint; returns what is wrong with it, nothing when it is whole."""
        from ckpt.store import check

        with self.storage("read the store"):
            return check.check(self, checkpoint)

    def listing(self) -> Listing:
        """Everything in the store; what cannot be read is named in `broken` and left alone.

        Raises:
            PermissionDenied: the store cannot be opened.
        """
        found: list[Checkpoint] = []
        broken: list[Broken] = []
        with self.storage("read the store"):
            self._check_schema()
            names = locks.listing(self.entries)
        for name in names:
            directory = self.entries / name
            try:
                found.append(self._read(directory))
            except FileNotFoundError:
                if directory.exists():  # else: removed while we looked
                    broken.append(Broken(directory, f"{MANIFEST} is missing"))
            except (OSError, CkptError, ValueError, TypeError, KeyError, AttributeError) as error:
                broken.append(Broken(directory, str(error)))
        found.sort(key=lambda c: (c.manifest.name, c.manifest.generation, c.manifest.created_s))
        return Listing(tuple(found), tuple(broken))

    def _read(self, directory: Path) -> Checkpoint:
        """`_read`, once as long as the files stay the same: they are only ever replaced whole."""
        stamps: tuple[int, ...] = ()
        for name in (MANIFEST, entries.FILE):
            with suppress(FileNotFoundError):
                about = os.stat(directory / name)
                stamps += (about.st_ino, about.st_mtime_ns, about.st_ctime_ns, about.st_size)
        known = self._seen.get(directory.name)
        if known is None or known[0] != stamps:
            known = self._seen[directory.name] = stamps, _read(directory)
        return known[1]

    def all(self) -> list[Checkpoint]:
        """The readable checkpoints, sorted by name, oldest first."""
        return list(self.listing().checkpoints)

    def find(self, ref: str) -> Checkpoint:
        """The checkpoint that `ref` names: NAME or NAME@latest (newest), NAME@N, NAME@TAG, an id or the unique beginning of one.

        Raises:
            TargetNotFound: none, or several, with what is close.
        """
        from ckpt.store.find import find

        return find(self.all(), ref)

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
        gone = f"{checkpoint.ref} is no longer in the store"
        if not checkpoint.directory.is_dir():
            raise TargetNotFound(gone)
        with self.storage("read the store"):
            self.locks.mkdir(mode=0o700, exist_ok=True)
            try:
                fd = locks.take(self.locks / checkpoint.directory.name, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise TargetNotFound(gone) from None
        try:
            if not checkpoint.directory.is_dir():
                raise TargetNotFound(gone)
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
    def locked(self) -> Iterator[None]:
        """The store's lock: short, never while something waits for data."""
        for directory in (self.root, self.entries, self.drafts, self.packs, self.locks):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if not self._check_schema():
                durable.write_file(self.root / SCHEMA_FILE, json.dumps({"schema": SCHEMA}).encode())
            yield
        finally:
            os.close(fd)

    def _check_schema(self) -> bool:
        """Whether the store says which layout it has. Raises ConfigError for one of the future."""
        try:
            found = json.loads((self.root / SCHEMA_FILE).read_bytes())["schema"]
        except FileNotFoundError:
            return False
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.root / SCHEMA_FILE} cannot be read: {error}", hint="is this a store of ckpt?") from None
        if not isinstance(found, int) or found > SCHEMA:
            raise ConfigError(f"the store {self.root} was made by a newer ckpt (schema {found!r}, this one knows {SCHEMA})", hint="use a newer ckpt")
        return True

    def number(self, name: str) -> int:
        """The next generation of `name`, given only once; under the store's lock."""
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


def _signed(stage: Path, manifest: Manifest, sign: Callable[[bytes], bytes] | None) -> bytes | None:
    """The bytes of a manifest that stays as it is: signed now (no number is given yet), or as it came with its signature."""
    if sign is not None:
        data = manifest_file.dumps(replace(manifest, generation=0))
        found = sign(data)  # may ask ssh-agent, or wait for somebody to touch a token: not under the store's lock
        durable.write_file(stage / MANIFEST, data)
        durable.write_file(stage / SIGNATURE, found)
        return data
    if (stage / SIGNATURE).is_file() and (stage / MANIFEST).is_file():
        return (stage / MANIFEST).read_bytes()
    return None


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
