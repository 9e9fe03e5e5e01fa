"""Whether a checkpoint is whole: every digest, and with `deep` everything in it that can be parsed."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ckpt.archive import foreign, layout, seal, trust
from ckpt.archive import manifest as manifests
from ckpt.archive.codec import open_stream
from ckpt.archive.members import Members
from ckpt.archive.tarstream import DEFAULT_LIMITS, TarStream
from ckpt.errors import ArchiveInvalid, CkptError, DigestMismatch, FeatureMissing, TargetNotFound, UsageError
from ckpt.events import BytesMoved, Emit
from ckpt.model import Checkpoint
from ckpt.ops.opening import Opened, opening
from ckpt.ops.result import Outcome, failure
from ckpt.store.catalog import Catalog
from ckpt.store.job import DEFAULT_ROOT


@dataclass(slots=True)
class Report:
    """What was found. `problems` is empty for a whole checkpoint; `digests`: "equal", "wrong", or "none" where nobody made any."""

    members: int = 0
    bytes: int = 0
    digests: str = "none"
    signature: str = "none"
    problems: list[str] = field(default_factory=list)


def verify(
    refs: Sequence[str],
    *,
    all: bool = False,
    deep: bool = False,
    incoming: trust.Incoming = trust.ANYBODY,
    store_root: Path = DEFAULT_ROOT,
    emit: Emit,
) -> list[Outcome]:
    """Verify checkpoints of the store and archive files; nothing is changed.

    Args:
        all: everything in the store.
        deep: parse every CRIU image, the pages' sizes, the configuration and the tars too.
        incoming: opens what is encrypted, and says whose signature it must have; without a demand a signature is only mentioned.

    Returns:
        An outcome each; the error of a damaged one is a DigestMismatch (or ArchiveInvalid, when it is no archive).

    Raises:
        UsageError: neither or both of `refs` and `all`.
    """
    if bool(refs) == all:
        raise UsageError("name what to verify, or say --all, one of them")
    outcomes: list[Outcome] = []
    if all:
        listing = Catalog(store_root).listing()
        refs = [checkpoint.manifest.id for checkpoint in listing.checkpoints]
        for broken in listing.broken:
            outcomes.append(failure(broken.directory.name, DigestMismatch(f"{broken.directory} cannot be read: {broken.reason}")))
    for ref in refs:
        began = time.monotonic()
        try:
            checkpoint, report = _verify(ref, deep, incoming, store_root, emit)
        except CkptError as error:
            if not (all and isinstance(error, TargetNotFound)):  # removed meanwhile
                outcomes.append(failure(ref, error))
            continue
        label = checkpoint.ref if checkpoint else ref
        stats: dict[str, float | int | str] = {
            "members": report.members, "size_bytes": report.bytes, "digests": report.digests, "signature": report.signature,
            "deep": int(deep), "problems": "; ".join(report.problems), "total_s": round(time.monotonic() - began, 3),
        }  # fmt: skip
        damaged: CkptError | None = None
        if report.problems:
            more = f" (and {len(report.problems) - 1} more)" if len(report.problems) > 1 else ""
            damaged = DigestMismatch(f"{label}: {report.problems[0]}{more}", hint="it is not whole; do not restore it")
        outcomes.append(Outcome(label, not report.problems, checkpoint, error=damaged, stats=stats))
    return outcomes


def _verify(ref: str, deep: bool, incoming: trust.Incoming, root: Path, emit: Emit) -> tuple[Checkpoint | None, Report]:
    report = Report()
    with opening(ref, incoming=incoming, store_root=root) as opened:
        total = sum(opened.members.size_bytes(name) for name in opened.members.names())

        def on_bytes(count: int) -> None:
            report.bytes += count
            emit(BytesMoved(ref, "verify", report.bytes, total))

        if opened.checkpoint is None:
            digests = _file_digests(opened, incoming, on_bytes)
            report.members = len(digests)
            if opened.has_manifest:
                _compare(digests, opened.manifest.digests, report)
        else:
            report.problems += Catalog(root).check(opened.checkpoint)
            report.members = sum(not name.endswith("/") and name not in layout.UNDIGESTED for name in opened.members.names())
            report.digests = "wrong" if report.problems else "equal"
            report.bytes = report.bytes or total
        _signature(opened, incoming, report)
        if deep:
            report.problems += list(_deep(opened))
        return opened.checkpoint, report


def _compare(found: dict[str, str], wanted: dict[str, str], report: Report) -> None:
    """As `layout.compare_digests`, but all that is wrong, not the first."""
    report.problems += [f"{name} is missing" for name in wanted if name not in found]
    report.problems += [f"{name} was changed or damaged" for name in wanted if name in found and found[name] != wanted[name]]
    report.problems += [f"{name} is not in the manifest" for name in found if name not in wanted]
    report.digests = "wrong" if report.problems else "equal"


def _file_digests(opened: Opened, incoming: trust.Incoming, on_bytes: Callable[[int], None]) -> dict[str, str]:
    """Digests of an archive's members, read as an import reads it: from the beginning to the end, past every checksum of the compressor."""
    digests: dict[str, str] = {}
    sizes: dict[str, int] = {}
    with opened.path.open("rb") as file:
        content = seal.reading(file, incoming.identities)
        stream = open_stream(content)
        tar = TarStream(stream, DEFAULT_LIMITS)
        for member in tar:
            sizes[member.name] = member.size_bytes
            digest = hashlib.sha256()
            for piece in tar.data():
                digest.update(piece)
                on_bytes(len(piece))
            if not member.name.endswith("/") and member.name not in layout.UNDIGESTED:
                digests[member.name] = layout.DIGEST_PREFIX + digest.hexdigest()
        seal.finish(content)
        if opened.has_manifest:
            stream.require_as_written(tar.entries)
    if sizes != {name: opened.members.size_bytes(name) for name in opened.members.names()}:
        raise ArchiveInvalid("the archive's index does not agree with its members")
    return digests


def _signature(opened: Opened, incoming: trust.Incoming, report: Report) -> None:
    there = layout.SIGNATURE in opened.members.names()
    report.signature = "not checked" if there else "none"
    if incoming.demand is None or layout.MANIFEST not in opened.members.names():
        if incoming.demand is not None and incoming.demand.required:
            report.problems.append("the checkpoint is not signed")
        return
    try:
        who = incoming.judge(_read(opened.members, layout.MANIFEST), _read(opened.members, layout.SIGNATURE) if there else None)
    except DigestMismatch as error:
        report.signature = "wrong"
        report.problems.append(error.message)
    else:
        report.signature = f"by {who}" if who else "none"


# -- deep ------------------------------------------------------------------------------------------------------------


def _deep(opened: Opened) -> Iterator[str]:
    """Everything that does not parse."""
    members = opened.members
    names = members.names()
    found: list[str]
    for name in (layout.CONFIG, layout.SPEC, layout.NETWORK_STATUS):
        if name in names:
            with _problem(found := []):
                data = _read(members, name)
                if name != layout.NETWORK_STATUS or data.strip() not in (b"", b"null"):
                    manifests.json_object(data, name)
            yield from found
    if layout.DELETED_FILES in names:
        with _problem(found := []):
            foreign.deleted_files(_read(members, layout.DELETED_FILES))
        yield from found
    for name in names:
        if name in (layout.ROOTFS_DIFF, layout.DEVSHM) or (name.startswith("volumes/") and not name.endswith("/")):
            with _problem(found := [], name):
                _walk_tar(members, name)
            yield from found
    try:
        yield from _images(members)
    except (FeatureMissing, ImportError) as error:
        yield f"the CRIU images cannot be looked into: {error}"


def _images(members: Members) -> Iterator[str]:
    from ckpt.criu import contents, every

    found: list[str]
    with _problem(found := []):
        contents.read(members)
    yield from found
    for name in members.names():
        if name.startswith("checkpoint/") and name.endswith(".img") and not layout.is_bulk(name):
            with _problem(found := []):
                every.check(members, name)
            yield from found
    used: set[str] = set()
    with _problem(found := []):
        for pagemap in contents.pagemaps(members):
            who = f"pagemap-{'shmem-' if pagemap.shared else ''}{pagemap.number}.img"
            wanted = sum(run.pages for run in pagemap.runs if run.offset is not None) * contents.PAGE
            used.add(pagemap.name)
            if any(run.parent for run in pagemap.runs):
                found.append(f"{who} needs pages of a parent that is not here")
            if wanted and pagemap.name not in members.names():
                found.append(f"{pagemap.name} is missing, {who} needs it")
            elif wanted and (there := members.size_bytes(pagemap.name)) != wanted:
                found.append(f"{pagemap.name} has {there} bytes, {who} says {wanted}")
    yield from found
    for name in members.names():
        if re.fullmatch(r"checkpoint/pages-.+\.img", name) and name not in used and members.size_bytes(name):
            yield f"{name} belongs to no pagemap"


def _walk_tar(members: Members, name: str) -> None:
    import tarfile

    with members.open(name) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        for member in tar:
            parts = member.name.split("/")
            if member.name.startswith("/") or ".." in parts or (member.islnk() and ".." in member.linkname.split("/")):
                raise ArchiveInvalid(f"{member.name[:100]!r} leads out of it")
            cast(Any, tar).members = []  # it keeps every header otherwise


def _read(members: Members, name: str) -> bytes:
    if members.size_bytes(name) > manifests.MAX_BYTES:
        raise ArchiveInvalid(f"{name} is larger than {manifests.MAX_BYTES >> 20} MiB")
    with members.open(name) as file:
        return b"".join(iter(lambda: file.read(layout.CHUNK_BYTES), b""))


@contextmanager
def _problem(found: list[str], name: str = "") -> Iterator[None]:
    """What is wrong becomes a line of text."""
    import tarfile

    try:
        yield
    except (ArchiveInvalid, DigestMismatch) as error:
        found.append(f"{name}: {error.message}" if name else error.message)
    except (tarfile.TarError, EOFError, json.JSONDecodeError) as error:
        found.append(f"{name}: {error}")
    except OSError as error:
        if error.errno is not None and not isinstance(error, EOFError):
            raise
        found.append(f"{name}: {error}")


