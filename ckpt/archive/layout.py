"""The members of an archive: podman's `--export` layout, in podman's order, and their digests.

Source: podman libpod/container_internal_common.go (`includeFiles`); directories are walked in the order of their names.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Final

from ckpt.errors import ArchiveInvalid, DigestMismatch
from ckpt.model import Manifest

MANIFEST: Final = "artifacts/ckpt.json"
SIGNATURE: Final = "artifacts/ckpt.json.sig"
"""An OpenSSH signature (PROTOCOL.sshsig) over the bytes of the manifest; no digest of it is in the manifest."""
UNDIGESTED: Final = frozenset({MANIFEST, SIGNATURE})
CONFIG: Final = "config.dump"
SPEC: Final = "spec.dump"
NETWORK_STATUS: Final = "network.status"
STATS: Final = "stats-dump"
INVENTORY: Final = "checkpoint/inventory.img"
ROOTFS_DIFF: Final = "rootfs-diff.tar"
DELETED_FILES: Final = "deleted.files"
DEVSHM: Final = "devshm-checkpoint.tar"

ORDER: Final = (
    "artifacts/", DEVSHM, CONFIG, SPEC, NETWORK_STATUS, STATS, "ctr.log", "checkpoint/", ROOTFS_DIFF, DELETED_FILES, "volumes/",
)  # fmt: skip
FOREIGN: Final = frozenset({"dump.log", "restore.log", "bind.mounts", "status", "status.dump", "container.log", "io.kubernetes.cri-o.LogPath"})
"""Members that CRI-O and containerd add; they are read, never written."""

DIGEST_PREFIX: Final = "sha256:"
CHUNK_BYTES: Final = 1 << 20

_BULK_IMAGES: Final = ("checkpoint/pages-", "checkpoint/ghost-file-", "checkpoint/tmpfs-")
_DIRECTORIES: Final = tuple(name for name in ORDER if name.endswith("/"))
_BAD: Final = re.compile(r"[\x00-\x1f\x7f/\\\ud800-\udfff]")


def is_allowed(name: str) -> bool:
    """Whether a member of this name may be in an archive. Directories end in "/"; there is one level of them."""
    if name in ORDER or name in FOREIGN:
        return True
    head, slash, leaf = name.partition("/")
    if not slash or f"{head}/" not in _DIRECTORIES or not leaf or leaf in (".", "..") or len(leaf.encode(errors="replace")) > 255:
        return False
    if _BAD.search(leaf):
        return False
    return head != "volumes" or (leaf.endswith(".tar") and len(leaf) > 4 and not leaf.startswith("."))


def stage_members(stage: Path) -> list[str]:
    """Relative paths of all members that are in `stage`, in the archive's order; directories end in "/".

    `checkpoint/` is always listed (checkpointctl looks for its header). What is no member of the layout is left out.
    """
    found: list[str] = []
    for name in ORDER:
        path = stage / name
        if not name.endswith("/"):
            if _is_file(path):
                found.append(name)
            continue
        if path.is_dir():
            found.append(name)
            found += [name + leaf for leaf in sorted(os.listdir(path)) if is_allowed(name + leaf) and _is_file(path / leaf)]
        elif name == "checkpoint/":
            found.append(name)
    return found


def digest_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """ "sha256:HEX" of a file."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            if on_bytes:
                on_bytes(count)
    return DIGEST_PREFIX + digest.hexdigest()


def is_pages(name: str) -> bool:
    """Whether a member holds memory pages: nearly all bytes of a checkpoint."""
    return name.startswith("checkpoint/pages-")


def is_bulk(name: str) -> bool:
    """Whether a member may be large: memory pages, files, logs. A store keeps those in chunks; all others are plain files, a few KiB each."""
    if name in (ROOTFS_DIFF, DEVSHM, "ctr.log") or name.startswith("volumes/"):
        return not name.endswith("/")
    return name.startswith(_BULK_IMAGES)


def digest_members(stage: Path, on_bytes: Callable[[int], None] | None = None, *, only: Callable[[str], bool] | None = None) -> dict[str, str]:
    """Digests of every member in `stage` but the manifest itself and its signature, computed on all cores (hashing releases Python's lock)."""
    names = [name for name in stage_members(stage) if not name.endswith("/") and name not in UNDIGESTED and (only is None or only(name))]
    # The largest first, so that no core is left alone with it at the end.
    names.sort(key=lambda name: -(stage / name).stat().st_size)
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        return dict(sorted(zip(names, pool.map(lambda name: digest_file(stage / name, on_bytes), names), strict=True)))


def compare_digests(found: dict[str, str], manifest: Manifest) -> None:
    """Compare the digests of what is there with those of the manifest.

    Raises:
        DigestMismatch: a member differs, is missing, or is not in the manifest; the message names it.
    """
    for name, digest in manifest.digests.items():
        if name not in found:
            raise DigestMismatch(f"{name} is missing from the checkpoint, its manifest has it")
        if found[name] != digest:
            raise DigestMismatch(f"{name} was changed or damaged: its digest is not the one in the manifest")
    if extra := sorted(set(found) - set(manifest.digests)):
        raise DigestMismatch(f"{extra[0]} is in the checkpoint but not in its manifest")


def check_digests(
    stage: Path, manifest: Manifest, on_bytes: Callable[[int], None] | None = None, *, only: Callable[[str], bool] | None = None
) -> None:
    """Read every member of `stage` and compare with the manifest.

    Args:
        only: the members to be read; of the others it is known that they are there.

    Raises:
        DigestMismatch: a member differs, is missing, or is not in the manifest; the message names it.
    """
    missing = set(manifest.digests) - set(stage_members(stage))
    if missing:
        raise DigestMismatch(f"{min(missing)} is missing from the checkpoint, its manifest has it")
    wanted = {name: digest for name, digest in manifest.digests.items() if only is None or only(name)}
    compare_digests(digest_members(stage, on_bytes, only=only), replace(manifest, digests=wanted))


def require_members(stage: Path) -> None:
    """Raise ArchiveInvalid when one of the members without which nothing can be restored is not there."""
    for name in (CONFIG, SPEC, INVENTORY):
        if not _is_file(stage / name):
            raise ArchiveInvalid(f"the archive has no {name}, it is not a complete checkpoint")


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False
