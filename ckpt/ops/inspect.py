"""Look into a checkpoint, in the store or in an archive file, without unpacking it and without reading its memory pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ckpt.archive import layout, trust
from ckpt.archive.opened import ArchiveMembers
from ckpt.errors import ArchiveInvalid, CkptError, FeatureMissing, UsageError
from ckpt.model import DumpStats, Manifest
from ckpt.ops.opening import Opened, opening
from ckpt.store.job import DEFAULT_ROOT

if TYPE_CHECKING:
    from ckpt.criu.contents import Contents

ENVIRONMENT_CAP_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Words:
    """The command line and the environment of a process, from its memory."""

    argv: tuple[str, ...]
    environment: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What is in a checkpoint.

    Attributes:
        sizes: bytes of each member (unpacked).
        foreign: not written by ckpt, its manifest is made up.
        contents: what the CRIU images tell; None when they cannot be read, `unread` says why.
        words: by pid, only when they were asked for.
        archive_bytes: the size of the archive file; 0 for the store. `indexed`: it can be read in parts.
    """

    manifest: Manifest
    sizes: dict[str, int]
    foreign: bool
    contents: Contents | None = None
    unread: str = ""
    words: dict[int, Words] = field(default_factory=dict)
    path: str = ""
    signed: bool = False
    archive_bytes: int = 0
    compression: str = ""
    indexed: bool = False
    stats: DumpStats = DumpStats()
    sealed: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """A match in the memory of a process (pid 0: shared memory, of the number that `comm` says)."""

    pid: int
    comm: str
    kind: str
    address: int
    length: int
    context_address: int
    context: bytes


def inspect(
    ref_or_file: str, *, environment: bool = False, incoming: trust.Incoming = trust.ANYBODY, store_root: Path = DEFAULT_ROOT
) -> Inspection:
    """Inspect a checkpoint of the store, else an archive file. What is written as a path (with a "/") is a file.

    Args:
        environment: read command lines and environments too: they are in memory pages, and may hold secrets.

    Raises:
        TargetNotFound: it is neither.
        ArchiveInvalid: the file is no archive of a checkpoint.
    """
    with opening(ref_or_file, incoming=incoming, store_root=store_root) as opened:
        members = opened.members
        names = members.names()
        sizes = {name: members.size_bytes(name) for name in names if not name.endswith("/")}
        contents, unread = _contents(opened)
        return Inspection(
            opened.manifest,
            sizes,
            bool(opened.manifest.foreign),
            contents,
            unread,
            _words(opened, contents) if environment and contents else {},
            str(opened.path),
            layout.SIGNATURE in sizes,
            opened.archive_bytes,
            opened.compression,
            isinstance(members, ArchiveMembers) and members.indexed,
            _stats(opened),
            isinstance(members, ArchiveMembers) and members.sealed,
        )


def _contents(opened: Opened) -> tuple[Contents | None, str]:
    from ckpt.criu import contents

    try:
        return contents.read(opened.members), ""
    except (ArchiveInvalid, FeatureMissing) as error:
        return None, error.message
    except ImportError as error:
        return None, str(error)


def _stats(opened: Opened) -> DumpStats:
    """CRIU's figures: those of the manifest, else (an archive of podman) those of stats-dump."""
    if opened.manifest.stats != DumpStats() or layout.STATS not in opened.members.names():
        return opened.manifest.stats
    from ckpt.criu import images

    try:
        with opened.members.open(layout.STATS) as file:
            return images.stats_of(file)
    except (CkptError, ImportError):
        return DumpStats()


def _words(opened: Opened, contents: Contents) -> dict[int, Words]:
    from ckpt.criu import contents as criu
    from ckpt.criu import memory

    found: dict[int, Words] = {}
    for task in contents.tasks:
        if f"checkpoint/mm-{task.pid}.img" not in opened.members.names():
            continue
        texts = []
        for start, end in criu.argument_ranges(opened.members, task.pid):
            data = b""
            for pagemap in criu.pagemaps(opened.members, only=task.pid):
                data = memory.read(opened.members, pagemap, start, min(end, start + ENVIRONMENT_CAP_BYTES))
            texts.append(tuple(criu.text(word) for word in data.rstrip(b"\0").split(b"\0")) if data.strip(b"\0") else ())
        found[task.pid] = Words(*texts)
    return found


def search(
    ref_or_file: str,
    pattern: str,
    *,
    how: str = "text",
    pid: int | None = None,
    max_matches: int = 100,
    context_bytes: int = 32,
    incoming: trust.Incoming = trust.ANYBODY,
    store_root: Path = DEFAULT_ROOT,
) -> Iterator[Found]:
    """Search the memory of a checkpoint's processes, page by page in the order of the addresses.

    Args:
        how: `text` (as UTF-8), `hex` (bytes, blanks between them allowed) or `regex` (Python's, over bytes).
        pid: only this process.

    Raises:
        UsageError: no such pattern, or no such process.
        TargetNotFound, ArchiveInvalid: as `inspect`.
    """
    from ckpt.criu import contents as criu
    from ckpt.criu import memory

    wanted = _pattern(pattern, how)
    with opening(ref_or_file, incoming=incoming, store_root=store_root) as opened:
        tasks = {task.pid: task for task in criu.read(opened.members).tasks}
        if pid is not None and pid not in tasks:
            raise UsageError(f"{opened.label} has no process {pid}")
        left = max_matches
        for pagemap in criu.pagemaps(opened.members, only=pid):
            task = None if pagemap.shared else tasks.get(pagemap.number)
            mapped = criu.mappings(opened.members, task.pid)[0] if task and f"checkpoint/mm-{task.pid}.img" in opened.members.names() else ()
            for match in memory.search(opened.members, pagemap, wanted, context_bytes=context_bytes):
                if not left:
                    return
                left -= 1
                kind = "shared" if pagemap.shared else memory.kind_at(mapped, match.address)
                yield Found(
                    0 if pagemap.shared else pagemap.number, task.comm if task else f"shared memory {pagemap.number}", kind,
                    match.address, match.length, match.context_address, match.context,
                )  # fmt: skip


def _pattern(pattern: str, how: str) -> bytes | re.Pattern[bytes]:
    if not pattern or len(pattern) > 4096:
        raise UsageError("what to search for must have 1 to 4096 characters")
    if how == "hex":
        try:
            data = bytes.fromhex(pattern)
        except ValueError:
            raise UsageError(f"{pattern!r} is not hexadecimal", hint="write bytes, as in 'de ad be ef'") from None
        if not data:
            raise UsageError("what to search for is empty")
        return data
    if how == "regex":
        try:
            return re.compile(pattern.encode(errors="surrogateescape"))
        except re.error as error:
            raise UsageError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern.encode(errors="surrogateescape")
