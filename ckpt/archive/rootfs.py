"""The complete difference between a container and its container image, read from the overlay's upper directory, and trees as a whole.

Podman's own export loses every modified file (it looks for it on the host instead of in the container) and changes of directories.
The format is podman's: `rootfs-diff.tar` (plain, paths relative to the root) and `deleted.files` (JSON array of absolute paths), so that
podman restores what is captured here. Overlay's on-disk format: Linux Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from ckpt.archive import _tar
from ckpt.archive._tar import apply, apply_tree
from ckpt.errors import CkptError
from ckpt.model import RootFs

__all__ = ["Survey", "apply", "apply_tree", "capture", "capture_files", "capture_tree", "survey", "survey_tree", "write_deleted"]

_PREFIXES: Final = ("trusted.overlay.", "user.overlay.")
_GONE: Final = (FileNotFoundError, NotADirectoryError)


@dataclass(frozen=True, slots=True)
class Survey:
    """What travels of a tree: `names` below `root` (relative, parents before children, "." is the root itself), `deleted` of what is below it.

    `deleted` are absolute paths inside the container, in the order of their names.
    """

    root: bytes
    names: list[bytes]
    deleted: list[str]


@dataclass(slots=True)
class _Found:
    """What a walk of the upper directory finds. Paths are relative bytes without a leading slash; "." is the root."""

    names: list[bytes] = field(default_factory=list)
    deleted: list[bytes] = field(default_factory=list)
    incomplete: bool = False
    """Upper alone does not hold the data (metacopy, redirect_dir): it must be read through the merged directory."""
    linked: list[bytes] = field(default_factory=list)
    """Files that share their data with names in the lower layers which were not copied up (index=on)."""
    live: bool = False
    """The container runs: what goes meanwhile is no error."""


def capture(rootfs: RootFs, out: Path | BinaryIO, deleted_files: Path | None = None, *, timeout_s: float = 3600.0) -> list[str]:
    """Write everything that the container changed in its root file system as a tar. The container must be frozen.

    Args:
        out: `rootfs-diff.tar` (made with 0600), or an open binary stream.
        deleted_files: where to write `deleted.files`; not written when nothing was deleted.

    Returns:
        The deleted paths, absolute inside the container, in the order of their names. Nothing is captured for a plain directory
        (`upper_dir` None): see `capture_tree`. Sockets are left out, as podman does.

    Raises:
        CkptError: the overlay cannot be read, or tar failed.
        NoSpace: `out` is full.
    """
    if rootfs.upper_dir is None:
        return []
    try:
        found = survey(rootfs)
        _tar.create(found.root, found.names, out, timeout_s=timeout_s)
    except OSError as error:
        raise CkptError(f"cannot read the changes of the container's root file system: {error}") from error
    if deleted_files is not None:
        write_deleted(found.deleted, deleted_files)
    return found.deleted


def write_deleted(deleted: list[str], deleted_files: Path) -> None:
    """Write `deleted.files`; nothing when nothing was deleted."""
    if not deleted:
        return
    fd = os.open(deleted_files, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="ascii") as file:
        # ASCII: a byte that is no UTF-8 travels as \udcXX.
        json.dump(deleted, file)


def survey(rootfs: RootFs, *, live: bool = False) -> Survey:
    """What the container changed in its root file system, an overlay or a plain directory (of which it is everything).

    Args:
        live: the container runs: what goes while this looks is left out.

    Raises:
        CkptError: the overlay cannot be read as it is.
        OSError: something cannot be read, or (not `live`) went meanwhile.
    """
    if rootfs.upper_dir is None:
        assert rootfs.merged_dir is not None
        return survey_tree(rootfs.merged_dir, live=live)
    found = _Found(live=live)
    upper = os.fsencode(rootfs.upper_dir)
    lowers = [os.fsencode(path) for path in rootfs.lower_dirs]
    merged = os.fsencode(rootfs.merged_dir) if rootfs.merged_dir else None
    found.names.append(b".")
    _walk(upper, b"", False, lowers, merged, found)
    source = upper
    if found.incomplete or found.linked:
        if merged is None:
            raise CkptError("the overlay uses metacopy, redirect_dir or index and is not mounted, its upper directory alone is not complete")
        source = merged
        _add_aliases(merged, found)
    return Survey(source, found.names, sorted("/" + os.fsdecode(path) for path in found.deleted))


def survey_tree(directory: Path, *, live: bool = False) -> Survey:
    """Everything in a directory. Raises OSError."""
    root = os.fsencode(directory)
    return Survey(root, list(_tree(root, live=live)), [])


def capture_tree(directory: Path, out: Path | BinaryIO, *, timeout_s: float = 3600.0) -> None:
    """Write a whole directory (a named volume, a plain root file system) as a tar, the directory itself as its first member.

    Raises:
        CkptError: the directory cannot be read, or tar failed.
        NoSpace: `out` is full.
    """
    root = os.fsencode(directory)
    try:
        os.listdir(root)
        _tar.create(root, _tree(root), out, timeout_s=timeout_s)
    except OSError as error:
        raise CkptError(f"cannot read {directory}: {error}") from error


def capture_files(paths: Iterable[str], out: Path | BinaryIO, *, timeout_s: float = 3600.0) -> None:
    """Write single files, named by absolute paths, as a tar relative to the root.

    Raises:
        CkptError: tar failed. NoSpace: `out` is full.
    """
    _tar.create(b"/", (os.fsencode(path.lstrip("/")) for path in paths), out, timeout_s=timeout_s)


def _tree(root: bytes, below: bytes = b".", *, live: bool = False) -> Iterator[bytes]:
    """`below` and everything in it, without sockets; parents before children."""
    yield below
    for entry in _entries(os.path.join(root, below), live):
        path = _join(b"" if below == b"." else below, entry.name)
        if entry.is_dir(follow_symlinks=False):
            yield from _tree(root, path, live=live)
        elif entry.is_symlink() or not stat.S_ISSOCK(_kind(entry, live)):
            yield path


def _entries(directory: bytes, live: bool) -> list[os.DirEntry[bytes]]:
    """Sorted by name. `live`: a directory that went is empty."""
    with suppress(*(_GONE if live else ())), os.scandir(directory) as entries:
        return sorted(entries, key=lambda entry: entry.name)
    return []


def _kind(entry: os.DirEntry[bytes], live: bool) -> int:
    """The mode of an entry; `live`: 0 when it went."""
    with suppress(*(_GONE if live else ())):
        return entry.stat(follow_symlinks=False).st_mode
    return 0


def _walk(upper: bytes, at: bytes, hidden: bool, lowers: list[bytes], merged: bytes | None, found: _Found) -> None:
    """Collect what is in directory `at` of upper. `hidden`: nothing of the lower directories shows through here (opaque)."""
    here = os.path.join(upper, at) if at else upper
    opaque = _attribute(here, "opaque")
    hidden = hidden or opaque == b"y"
    if at and _attribute(here, "redirect") is not None:
        # A renamed directory: its content comes from elsewhere in the lower layers, only the mount knows.
        found.incomplete = True
        if merged is not None:
            content = list(_tree(merged, at, live=found.live))
            found.names += content[1:]
            present = set(content)
            found.deleted += [path for path in _lower_paths(lowers, at) if path not in present]
        return
    names = set()
    for entry in _entries(here, found.live):
        path = _join(at, entry.name)
        if not _kind(entry, found.live):
            continue
        facts = entry.stat(follow_symlinks=False)
        kind = stat.S_IFMT(facts.st_mode)
        if _is_whiteout(entry.path, facts, opaque):
            if not hidden:
                found.deleted.append(path)
            continue
        names.add(entry.name)
        if kind == stat.S_IFSOCK:
            # Not in the tar; what the container image had in its place is gone all the same.
            if _lower_kind(lowers, path) is not None:
                found.deleted.append(path)
            continue
        found.names.append(path)
        if kind == stat.S_IFDIR:
            _walk(upper, path, hidden, lowers, merged, found)
        elif kind == stat.S_IFREG:
            found.incomplete = found.incomplete or _attribute(entry.path, "metacopy") is not None
            if facts.st_nlink > 1 and _attribute(entry.path, "nlink") is not None:
                found.linked.append(path)
    if hidden:
        found.deleted += [_join(at, name) for name in _lower_names(lowers, at) if name not in names]


def _add_aliases(merged: bytes, found: _Found) -> None:
    """With index=on a hard link of the container image stays one: its other names show the change without being in upper."""
    inodes = {(facts.st_dev, facts.st_ino) for path in found.linked if (facts := _lstat(os.path.join(merged, path), found.live))}
    if not inodes:
        return
    known = set(found.names)
    for path in _tree(merged, live=found.live):
        facts = _lstat(os.path.join(merged, path), found.live)
        if facts is None:
            continue
        if facts.st_nlink > 1 and (facts.st_dev, facts.st_ino) in inodes and path not in known:
            found.names.append(path)


def _lstat(path: bytes, live: bool) -> os.stat_result | None:
    """`live`: None when it went."""
    with suppress(*(_GONE if live else ())):
        return os.lstat(path)
    return None


def _is_whiteout(path: bytes, facts: os.stat_result, opaque: bytes | None) -> bool:
    """A character device 0:0, or (in a directory marked "x", Linux 6.7) an empty file with the whiteout attribute."""
    if stat.S_ISCHR(facts.st_mode):
        return facts.st_rdev == 0
    return stat.S_ISREG(facts.st_mode) and facts.st_size == 0 and opaque is not None and _attribute(path, "whiteout") is not None


def _attribute(path: bytes, name: str) -> bytes | None:
    for prefix in _PREFIXES:
        with suppress(OSError):
            return os.getxattr(path, prefix + name, follow_symlinks=False)
    return None


def _layers(lowers: list[bytes], at: bytes) -> Iterator[bytes]:
    """The directories that make up `at` in the merged view of the lower layers, the topmost first."""
    parts = [part for part in at.split(b"/") if part]
    for lower in lowers:
        path, last = lower, _attribute(lower, "opaque") == b"y"
        missing = False
        for part in parts:
            parent_opaque = _attribute(path, "opaque")
            path = os.path.join(path, part)
            try:
                facts = os.lstat(path)
            except FileNotFoundError:
                missing = True
                break
            if not stat.S_ISDIR(facts.st_mode) or _is_whiteout(path, facts, parent_opaque):
                return
            last = last or _attribute(path, "opaque") == b"y"
        if not missing:
            yield path
        if last:
            return


def _lower_names(lowers: list[bytes], at: bytes) -> list[bytes]:
    """Names that the merged lower layers show in directory `at`."""
    seen: dict[bytes, bool] = {}
    for path in _layers(lowers, at):
        opaque = _attribute(path, "opaque")
        with os.scandir(path) as entries:
            for entry in entries:
                seen.setdefault(entry.name, not _is_whiteout(entry.path, entry.stat(follow_symlinks=False), opaque))
    return sorted(name for name, there in seen.items() if there)


def _lower_kind(lowers: list[bytes], path: bytes) -> int | None:
    """The file type (S_IFMT) that the lower layers show at `path`, None when there is nothing."""
    head, _, leaf = path.rpartition(b"/")
    for layer in _layers(lowers, head):
        with suppress(FileNotFoundError):
            facts = os.lstat(os.path.join(layer, leaf))
            gone = _is_whiteout(os.path.join(layer, leaf), facts, _attribute(layer, "opaque"))
            return None if gone else stat.S_IFMT(facts.st_mode)
    return None


def _lower_paths(lowers: list[bytes], at: bytes) -> Iterator[bytes]:
    """Every path beneath `at` in the merged lower layers."""
    for name in _lower_names(lowers, at):
        path = _join(at, name)
        yield path
        if _lower_kind(lowers, path) == stat.S_IFDIR:
            yield from _lower_paths(lowers, path)


def _join(at: bytes, name: bytes) -> bytes:
    return at + b"/" + name if at else name
