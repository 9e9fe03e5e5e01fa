"""The files that a process tree writes: they travel with it, since CRIU wants them back as they were, by path and size.

What is put back never destroys anything: a file that is there already and differs is kept beside it as `NAME.ckpt-before-JOB`.
"""

from __future__ import annotations

import filecmp
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Final

from ckpt.archive import layout, rootfs
from ckpt.criu import tree
from ckpt.errors import ArchiveInvalid, RestoreFailed
from ckpt.store.job import Job

BLOCK_BYTES: Final = 1 << 20


def save(root_pid: int, stage: Path) -> list[str]:
    """Write the regular files that the (frozen) tree has open for writing to `rootfs-diff.tar`; returns their paths."""
    paths = sorted({found.path for found in tree.open_files(root_pid) if found.writable and not found.deleted and os.path.isfile(found.path)})
    if paths:
        rootfs.capture_files(paths, stage / layout.ROOTFS_DIFF)
    return paths


def put_back(stage: Path, job: Job) -> None:
    """Bring the files of `rootfs-diff.tar` to their places; journaled, so that `undo` can take it back.

    Raises:
        ArchiveInvalid: the tar holds something else than regular files.
        RestoreFailed: a file cannot be written.
    """
    import tarfile

    source = stage / layout.ROOTFS_DIFF
    if not source.exists():
        return
    done: list[dict[str, str]] = []
    try:
        with tarfile.open(source, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                content = tar.extractfile(member) if member.isreg() else None
                if content is None or name.is_absolute() or ".." in name.parts:
                    raise ArchiveInvalid(f"{member.name!r} cannot belong to a process tree")
                path = Path("/", name)
                path.parent.mkdir(parents=True, exist_ok=True)
                part = path.with_name(f".{path.name}.{job.id}")
                _write(part, content, member)
                if (
                    path.is_file()
                    and not path.is_symlink()
                    and filecmp.cmp(part, path, shallow=False)
                    and path.stat().st_mode & 0o7777 == member.mode & 0o7777
                ):
                    part.unlink()
                    continue
                before = path.with_name(f"{path.name}.ckpt-before-{job.id}") if os.path.lexists(path) else None
                done.append({"path": str(path), "before": str(before or "")})
                job.write("files", files=done)
                if before is not None:
                    os.rename(path, before)
                os.rename(part, path)
    except tarfile.TarError as error:
        raise ArchiveInvalid(f"{layout.ROOTFS_DIFF} is damaged: {error}") from error
    except OSError as error:
        raise RestoreFailed(f"cannot put back {error.filename}: {error.strerror}", where="nothing is running") from error


def undo(job: Job) -> None:
    """Take back what `put_back` did. Idempotent."""
    for entry in reversed(job.facts.get("files", [])):
        path, before = Path(entry["path"]), entry["before"]
        with suppress(OSError):
            if before and os.path.lexists(before):
                os.rename(before, path)
            elif not before:
                path.unlink(missing_ok=True)
        with suppress(OSError):
            path.with_name(f".{path.name}.{job.id}").unlink(missing_ok=True)


def _write(path: Path, content: object, member: object) -> None:
    import tarfile

    assert isinstance(member, tarfile.TarInfo)
    source: BinaryIO = content  # type: ignore[assignment]
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as out:
        while block := source.read(BLOCK_BYTES):
            if block.count(0) == len(block):
                out.seek(len(block), os.SEEK_CUR)
            else:
                out.write(block)
        out.truncate(member.size)
        os.fchown(fd, member.uid, member.gid)
        os.fchmod(fd, member.mode & 0o7777)
    os.utime(path, (member.mtime, member.mtime))
