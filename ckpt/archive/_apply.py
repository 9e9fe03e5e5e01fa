"""The child of `rootfs.apply`: runs alone (`python -I -S -c SOURCE OPTIONS`), locked into the container's root by chroot.

Standard input is the tar (a regular file). After the chroot nothing is imported and no file but those of the tree is opened. The result
is one JSON object on standard output: {"kind": "ok"|"invalid"|"space"|"failed", "text": ..., "warnings": [...]}.
"""

from __future__ import annotations

import encodings.ascii
import encodings.latin_1
import encodings.utf_8  # noqa: F401
import errno
import json
import os
import resource
import stat
import sys
import tarfile
from decimal import Decimal
from typing import Any

MAX_WARNINGS = 20
MEMORY = 2 << 30
MAX_DEPTH = 4096
MAX_SIZE = 1 << 62
PIECE = 1 << 30
XATTR = "SCHILY.xattr."
XATTR_ALLOWED = ("user.", "security.capability", "system.posix_acl_access", "system.posix_acl_default")


class Invalid(Exception):
    """The tar or the list makes no sense."""


class Extraction:
    """Members of one tar, put into the current root."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.directories: list[tuple[str, tarfile.TarInfo]] = []

    def warn(self, text: str) -> None:
        if len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(text)

    def delete(self, paths: list[str]) -> None:
        for path in paths:
            remove("/" + clean(path))

    def run(self, fd: int) -> None:
        try:
            tar = tarfile.open(fileobj=os.fdopen(os.dup(fd), "rb"), mode="r:", encoding="utf-8", errors="surrogateescape")  # noqa: SIM115
        except (tarfile.TarError, ValueError, OverflowError, KeyError, IndexError, EOFError) as error:
            raise Invalid(f"this is not a tar: {error}") from None
        with tar:
            last = -1
            while True:
                try:
                    member = tar.next()
                except (tarfile.TarError, ValueError, OverflowError, KeyError, IndexError, EOFError) as error:
                    raise Invalid(f"the tar is damaged: {error}") from None
                if member is None:
                    break
                # tarfile keeps every member it saw; a tree may have millions.
                tar.members.clear()  # type: ignore[attr-defined]
                if member.size < 0 or tar.offset <= last:
                    # Older versions of tarfile go back then, and round for ever (CVE-2025-8194).
                    raise Invalid("the tar is damaged: a member with a negative size")
                last = tar.offset
                self.put(fd, member)
            end = os.pread(fd, 512, tar.offset)
        if len(end) != 512 or any(end):
            # tarfile takes a damaged header for the end.
            raise Invalid("the tar is damaged or truncated")
        for path, member in reversed(self.directories):
            # A file may have come in the place of a directory that the tar has, too.
            if stat.S_ISDIR(os.lstat(path).st_mode):
                self.dress(path, member)

    def put(self, fd: int, member: tarfile.TarInfo) -> None:
        name = clean(member.name)
        path = "/" + name
        if member.isdir():
            if name:
                make_directory(path)
            self.directories.append((path, member))
            return
        if not name:
            raise Invalid("the root is not a directory")
        parent = os.path.dirname(path)
        if not os.path.lexists(parent):
            os.makedirs(parent, 0o755)
        remove(path)
        if member.islnk():
            target = "/" + clean(member.linkname)
            try:
                os.link(target, path, follow_symlinks=False)
            except FileNotFoundError:
                raise Invalid(f"{name} is a link to {member.linkname}, which is not there") from None
            return
        if member.isreg() or member.type == tarfile.GNUTYPE_SPARSE:
            write_file(fd, path, member)
        elif member.issym():
            os.symlink(member.linkname, path)
        elif member.isfifo():
            os.mkfifo(path, 0o600)
        elif member.ischr() or member.isblk():
            kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
            os.mknod(path, kind | 0o600, os.makedev(member.devmajor, member.devminor))
        else:
            raise Invalid(f"{name} is of an unknown kind")
        self.dress(path, member)

    def dress(self, path: str, member: tarfile.TarInfo) -> None:
        """Owner, mode, attributes, time: in this order, for a change of owner clears set-id bits and capabilities."""
        os.chown(path, member.uid, member.gid, follow_symlinks=False)
        if not member.issym():
            os.chmod(path, member.mode & 0o7777)
        self.attributes(path, member)
        when = to_ns(member)
        os.utime(path, ns=(when, when), follow_symlinks=False)

    def attributes(self, path: str, member: tarfile.TarInfo) -> None:
        wanted = {key[len(XATTR) :]: value.encode("utf-8", "surrogateescape") for key, value in member.pax_headers.items() if key.startswith(XATTR)}
        try:
            present = os.listxattr(path, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            present = []
        for key in present:
            # Left from a directory of the container image, or inherited from a parent with a default ACL.
            if key not in wanted and allowed(key):
                os.removexattr(path, key, follow_symlinks=False)
        for key, value in wanted.items():
            if not allowed(key):
                continue
            try:
                os.setxattr(path, key, value, follow_symlinks=False)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.EINVAL):
                    raise
                self.warn(f"{path}: attribute {key}: {error.strerror}")


def allowed(key: str) -> bool:
    return not key.startswith("user.overlay.") and (key in XATTR_ALLOWED or key.startswith("user."))


def to_ns(member: tarfile.TarInfo) -> int:
    """Nanoseconds; tarfile's own float has lost them."""
    try:
        return int(Decimal(member.pax_headers["mtime"]) * 1_000_000_000)
    except (KeyError, ArithmeticError, ValueError):
        return int(member.mtime) * 1_000_000_000


def clean(name: str) -> str:
    """A path relative to the root without "." and without a leading slash; ".." is refused although the chroot would hold it."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts or "\0" in name or len(parts) > MAX_DEPTH:
        raise Invalid(f"{name[:200]!r} is not a path within the root")
    return "/".join(parts)


def remove(path: str) -> None:
    """Remove whatever is there, with everything beneath; links are not followed."""
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (IsADirectoryError, PermissionError):
        if not os.path.isdir(path) or os.path.islink(path):
            raise
        if path != "/":
            empty_directory(path)
            os.rmdir(path)


def empty_directory(top: str) -> None:
    """Without recursion: the depth of a tree is the archive's choice."""
    for here, directories, files in os.walk(top, topdown=False):
        for name in files:
            os.unlink(os.path.join(here, name))
        for name in directories:
            path = os.path.join(here, name)
            if os.path.islink(path):
                os.unlink(path)
            else:
                os.rmdir(path)


def make_directory(path: str) -> None:
    try:
        facts = os.lstat(path)
    except FileNotFoundError:
        os.makedirs(path, 0o700)
        return
    if not stat.S_ISDIR(facts.st_mode):
        os.unlink(path)
        os.mkdir(path, 0o700)


def write_file(fd: int, path: str, member: tarfile.TarInfo) -> None:
    """Data goes from file to file inside the kernel; holes are skipped."""
    extents: Any = member.sparse if member.sparse is not None else [(0, member.size)]
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        position = member.offset_data
        size = member.size
        for offset, length in extents:
            if offset < 0 or length < 0 or offset + length > size or size > MAX_SIZE:
                raise Invalid(f"{member.name} has a damaged map of holes")
            os.lseek(out, offset, os.SEEK_SET)
            while length > 0:
                count = os.sendfile(out, fd, position, min(length, PIECE))
                if not count:
                    raise Invalid("the tar is truncated")
                position += count
                length -= count
        if os.fstat(out).st_size != size:
            os.ftruncate(out, size)
    finally:
        os.close(out)


def main() -> tuple[str, str, list[str]]:
    options: dict[str, Any] = json.loads(sys.argv[1])
    extraction = Extraction()
    try:
        with os.fdopen(options["deleted_fd"], "rb") as file:
            text = file.read()
        try:
            deleted = json.loads(text) if text.strip() else []
        except (ValueError, RecursionError) as error:
            raise Invalid(f"the list of deleted files is not JSON: {error}") from None
        if deleted is None:
            deleted = []
        if not isinstance(deleted, list) or not all(isinstance(path, str) for path in deleted):
            raise Invalid("the list of deleted files is not a list of paths")
        # A header may claim to be as long as it likes, and tarfile reads it whole.
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        # Modules that are loaded lazily are loaded now: in the container's root they would be the container's.
        Decimal("1.5")
        b"\xff".decode("utf-8", "surrogateescape")
        os.umask(0)
        os.chroot(options["root"])
        os.chdir("/")
        sys.path.clear()
        sys.meta_path.clear()
        if options["empty"]:
            empty_directory("/")
        extraction.delete(deleted)
        if options["has_tar"]:
            extraction.run(0)
    except Invalid as error:
        return "invalid", str(error), extraction.warnings
    except MemoryError:
        return "invalid", "it needs too much memory", extraction.warnings
    except OSError as error:
        kind = "space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "failed"
        return kind, f"{error.strerror}: {error.filename}" if error.filename else str(error), extraction.warnings
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}", extraction.warnings
    return "ok", "", extraction.warnings


if __name__ == "__main__":
    kind, text, warnings = main()
    sys.stdout.write(json.dumps({"kind": kind, "text": text, "warnings": warnings}) + "\n")
    sys.stdout.flush()
    os._exit(0 if kind == "ok" else 1)
