"""The child of `tree_receive`: runs alone (`python -I -S`), locked into one directory by chroot, and keeps the tree there as it is told.

Two orders: "sync" follows a stream of operations from standard input (see tree_send), "copy" brings another directory of this host here
(the current directory, which is outside of the root; what it holds was made by "sync", its links are never followed). Standard output gets
one JSON object for each round of "sync", and one for the "copy", as from `_apply`.
"""

from __future__ import annotations

import base64
import ctypes
import encodings.ascii
import encodings.latin_1
import encodings.utf_8  # noqa: F401
import errno
import json
import os
import secrets
import stat
import sys
from typing import Any, BinaryIO, NamedTuple

from ckpt.archive._apply import MAX_WARNINGS, PIECE, Invalid, allowed, clean, empty_directory, make_directory, remove

MAX_LINE = 1 << 20
MAX_DELETED = 256 << 20
_PUNCH_HOLE_KEEP_SIZE = 3  # fallocate(2)


class Meta(NamedTuple):
    """What a file has besides its content."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    xattrs: dict[str, bytes]


class Target:
    """The tree below the current root."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.fallocate: Any = None

    def place(self, name: str) -> str:
        """The path for something new of this name: nothing is there, its directory is."""
        path = "/" + name
        if not name:
            raise Invalid("the root is not a directory")
        parent = os.path.dirname(path)
        if not os.path.lexists(parent):
            os.makedirs(parent, 0o755)
        remove(path)
        return path

    def link(self, name: str, to: str) -> None:
        path = self.place(name)
        try:
            os.link("/" + to, path, follow_symlinks=False)
        except FileNotFoundError:
            raise Invalid(f"{name} is a link to {to}, which is not there") from None

    def special(self, name: str, mode: int, link: str, device: tuple[int, int]) -> str:
        """A symbolic link, FIFO or device node."""
        path = self.place(name)
        kind = stat.S_IFMT(mode)
        if kind == stat.S_IFLNK:
            os.symlink(link, path)
        elif kind == stat.S_IFIFO:
            os.mkfifo(path, 0o600)
        elif kind in (stat.S_IFCHR, stat.S_IFBLK):
            os.mknod(path, kind | 0o600, os.makedev(*device))
        else:
            raise Invalid(f"{name} is of an unknown kind")
        return path

    def dress(self, path: str, meta: Meta) -> None:
        """Owner, mode, attributes, time: in this order, for a change of owner clears set-id bits and capabilities."""
        os.chown(path, meta.uid, meta.gid, follow_symlinks=False)
        if not stat.S_ISLNK(meta.mode):
            os.chmod(path, stat.S_IMODE(meta.mode))
        try:
            present = os.listxattr(path, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise
            present = []
        for key in present:
            # Left from before, or inherited from a parent with a default ACL.
            if key not in meta.xattrs and allowed(key):
                os.removexattr(path, key, follow_symlinks=False)
        for key, value in meta.xattrs.items():
            if not allowed(key):
                continue
            try:
                os.setxattr(path, key, value, follow_symlinks=False)
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EPERM, errno.EINVAL):
                    raise
                if len(self.warnings) < MAX_WARNINGS:
                    self.warnings.append(f"{path}: attribute {key}: {error.strerror}")
        os.utime(path, ns=(meta.mtime_ns, meta.mtime_ns), follow_symlinks=False)

    def punch(self, fd: int, offset: int, length: int) -> None:
        """Make a range read as zeros, without space where the file system can do that."""
        if self.fallocate(fd, _PUNCH_HOLE_KEEP_SIZE, ctypes.c_int64(offset), ctypes.c_int64(length)) == 0:
            return
        if ctypes.get_errno() not in (errno.EOPNOTSUPP, errno.ENOSYS):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        end = min(offset + length, os.fstat(fd).st_size)
        zeros = memoryview(bytes(1 << 20))
        while offset < end:
            offset += os.pwrite(fd, zeros[: end - offset], offset)


class Sync(Target):
    """Follows the stream."""

    def __init__(self, stream: BinaryIO) -> None:
        super().__init__()
        self.stream = stream
        self.fd = -1
        self.path = ""
        self.parking = ""
        self.fresh = True
        """Between two rounds."""
        self.buffer = memoryview(bytearray(1 << 20))

    def run(self) -> None:
        """Rounds, each answered, until the stream ends. Raises Invalid for one that makes no sense or ends too soon."""
        while (line := self.stream.readline(MAX_LINE + 1)) or self.fresh:
            if not line and self.fresh:
                return
            if not line.endswith(b"\n"):
                raise Invalid("the stream of changes is damaged")
            try:
                order = json.loads(line)
                if order["o"] == "done" and self.fd < 0:
                    self.fresh = True
                    answer("ok", "", self.warnings)
                    continue
                self.fresh = False
                self.follow(order)
            except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
                raise Invalid(f"the stream of changes makes no sense: {type(error).__name__}: {error}") from None
        raise Invalid("the stream of changes is truncated")

    def follow(self, order: dict[str, Any]) -> None:
        what = str(order["o"])
        if (self.fd >= 0) != (what in ("data", "hole", "end")):
            raise Invalid(f"{what!r} is out of place in the stream of changes")
        if what == "data":
            self.data(number(order["at"]), number(order["n"]))
        elif what == "hole":
            self.punch(self.fd, number(order["at"]), number(order["n"]))
        elif what == "end":
            self.end(number(order["size"]), meta_of(order["m"]))
        elif what == "settle":
            self.settle()
        else:
            self.entry(what, clean(str(order["p"])), order)

    def entry(self, what: str, name: str, order: dict[str, Any]) -> None:
        path = "/" + name
        if what == "delete":
            remove(path)
        elif what == "dir":
            if name:
                make_directory(path)
        elif what == "dress":
            if stat.S_ISDIR(os.lstat(path).st_mode):
                self.dress(path, meta_of(order["m"]))
        elif what == "file":
            self.open(name, new=bool(order["new"]))
        elif what == "link":
            self.link(name, clean(str(order["to"])))
        elif what == "special":
            meta = meta_of(order["m"])
            major, minor = order["dev"]
            self.dress(self.special(name, meta.mode, str(order["to"]), (number(major), number(minor))), meta)
        elif what == "park":
            self.park(path, number(order["n"]))
        elif what == "unpark":
            os.rename(f"{self.parking or '/'}/{number(order['n'])}", self.place(name))
        else:
            raise Invalid(f"{what!r} is no operation")

    def open(self, name: str, *, new: bool) -> None:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        if new:
            self.fd = os.open(self.place(name), flags | os.O_CREAT | os.O_EXCL, 0o600)
        else:
            self.fd = os.open("/" + name, flags)
            if not stat.S_ISREG(os.fstat(self.fd).st_mode):
                raise Invalid(f"{name} is not a regular file")
        self.path = "/" + name

    def data(self, at: int, length: int) -> None:
        while length:
            count = self.stream.readinto(self.buffer[: min(length, len(self.buffer))])  # type: ignore[attr-defined]
            if not count:
                raise Invalid("the stream of changes is truncated")
            length -= count
            rest = self.buffer[:count]
            while rest:
                done = os.pwrite(self.fd, rest, at)
                at += done
                rest = rest[done:]

    def end(self, size: int, meta: Meta) -> None:
        try:
            if os.fstat(self.fd).st_size != size:
                os.ftruncate(self.fd, size)
        finally:
            os.close(self.fd)
            self.fd = -1
        self.dress(self.path, meta)

    def park(self, path: str, number: int) -> None:
        """Put a file aside that gets another name: names may be exchanged."""
        if not self.parking:
            parking = f"/.ckpt-{secrets.token_hex(8)}"
            os.mkdir(parking, 0o700)
            self.parking = parking
        os.rename(path, f"{self.parking}/{number}")

    def settle(self) -> None:
        """Files and names are complete; what follows is about directories only."""
        if self.parking:
            parking, self.parking = self.parking, ""
            empty_directory(parking)
            os.rmdir(parking)


class Copy(Target):
    """Brings the tree of the current directory."""

    def run(self) -> None:
        directories: list[tuple[str, Meta]] = [("/", meta_here("."))]
        linked: dict[tuple[int, int], str] = {}
        todo = [""]
        while todo:
            here = todo.pop()
            with os.scandir(here or ".") as scan:
                entries = sorted(scan, key=lambda entry: entry.name)
            for entry in entries:
                name = f"{here}/{entry.name}" if here else entry.name
                facts = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(facts.st_mode):
                    make_directory("/" + name)
                    directories.append(("/" + name, meta_here(name)))
                    todo.append(name)
                    continue
                if facts.st_nlink > 1:
                    first = linked.setdefault((facts.st_dev, facts.st_ino), name)
                    if first != name:
                        self.link(name, first)
                        continue
                if stat.S_ISREG(facts.st_mode):
                    path = self.file(name)
                else:
                    to = os.readlink(name) if stat.S_ISLNK(facts.st_mode) else ""
                    path = self.special(name, facts.st_mode, to, (os.major(facts.st_rdev), os.minor(facts.st_rdev)))
                self.dress(path, meta_here(name))
        for path, meta in reversed(directories):
            self.dress(path, meta)

    def file(self, name: str) -> str:
        """Data goes from file to file inside the kernel; holes are skipped."""
        path = self.place(name)
        source = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            size, at = os.fstat(source).st_size, 0
            while at < size:
                try:
                    at = os.lseek(source, at, os.SEEK_DATA)
                except OSError as error:
                    if error.errno == errno.ENXIO:
                        break
                    raise
                end = os.lseek(source, at, os.SEEK_HOLE)
                os.lseek(out, at, os.SEEK_SET)
                while at < end:
                    count = os.sendfile(out, source, at, min(end - at, PIECE))
                    if not count:
                        raise Invalid(f"{name} became shorter")
                    at += count
            os.ftruncate(out, size)
        finally:
            os.close(source)
            os.close(out)
        return path


def number(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 63:
        raise Invalid(f"{value!r} is no number of bytes")
    return value


def meta_of(found: list[Any]) -> Meta:
    """From the stream: [mode, uid, gid, mtime_ns, {attribute: base64}]."""
    mode, uid, gid, mtime_ns, xattrs = found
    if not isinstance(mtime_ns, int):
        raise Invalid("a time is no number")
    return Meta(number(mode), number(uid), number(gid), mtime_ns, {str(key): base64.b64decode(value, validate=True) for key, value in xattrs.items()})


def meta_here(name: str) -> Meta:
    facts = os.lstat(name)
    try:
        keys = [key for key in os.listxattr(name, follow_symlinks=False) if allowed(key)]
        xattrs = {key: os.getxattr(name, key, follow_symlinks=False) for key in keys}
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        xattrs = {}
    return Meta(facts.st_mode, facts.st_uid, facts.st_gid, facts.st_mtime_ns, xattrs)


def read_deleted(fd: int) -> list[str]:
    with os.fdopen(fd, "rb") as file:
        text = file.read(MAX_DELETED)
    try:
        deleted = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise Invalid(f"the list of deleted files is not JSON: {error}") from None
    if not isinstance(deleted, list) or not all(isinstance(path, str) for path in deleted):
        raise Invalid("the list of deleted files is not a list of paths")
    return deleted


def main() -> tuple[str, str, list[str]]:
    """Do what the options (JSON, the only argument) say."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    target: Target = Copy() if options["copy"] else Sync(open(0, "rb", buffering=1 << 16, closefd=False))  # noqa: SIM115
    try:
        deleted = read_deleted(options["deleted_fd"])
        # What is loaded lazily is loaded now: in the other root it would be the other root's.
        target.fallocate = ctypes.CDLL(None, use_errno=True).fallocate
        b"\xff".decode("utf-8", "surrogateescape")
        base64.b64decode("AA==", validate=True)
        os.umask(0)
        if options["copy"]:
            os.fchdir(options["source_fd"])
            os.chroot(options["root"])
        else:
            os.chroot(options["root"])
            os.chdir("/")
        sys.path.clear()
        sys.meta_path.clear()
        for path in deleted:
            remove("/" + clean(path))
        target.run()  # type: ignore[attr-defined]
    except Invalid as error:
        return "invalid", str(error), target.warnings
    except OSError as error:
        kind = "space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "failed"
        return kind, f"{error.strerror}: {error.filename}" if error.filename else str(error), target.warnings
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}", target.warnings
    return "ok", "", target.warnings


def answer(kind: str, text: str, warnings: list[str]) -> None:
    """Say how it went, in one line."""
    sys.stdout.write(json.dumps({"kind": kind, "text": text, "warnings": warnings}) + "\n")
    sys.stdout.flush()


def child() -> None:
    """Run `main`, answer when it has ended (a "sync" that ended well has answered to every round), and end the process."""
    kind, text, warnings = main()
    if kind != "ok" or json.loads(sys.argv[1])["copy"]:
        answer(kind, text, warnings)
    os._exit(0 if kind == "ok" else 1)
