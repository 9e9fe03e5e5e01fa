"""Files of this host, and pipes: the standard input and output."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Final

from ckpt.errors import CkptError, NoSpace, PermissionDenied, TargetNotFound, TransferFailed, UsageError
from ckpt.transports.base import FILE, PIPE, CarrierOptions, Download, Location, Payload, Stored, Upload

_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED: Final = (errno.EACCES, errno.EPERM, errno.EROFS)


class FileCarrier:
    """A file that is there complete (0600, on the disk) or not at all; a FIFO or device is written as it stands."""

    schemes = (FILE,)

    def check_write(self, location: Location, options: CarrierOptions) -> None:
        """Raises UsageError for a directory, TargetNotFound when its directory is missing, PermissionDenied."""
        path = _path(location)
        if path.is_dir() or location.raw.endswith("/"):
            raise UsageError(f"{location} is a directory", hint="name a file in it")
        if not path.parent.is_dir():
            raise TargetNotFound(f"there is no directory {str(path.parent)!r}", hint="make it first, or choose another place")
        if not os.access(path if _is_special(path) else path.parent, os.W_OK):
            raise PermissionDenied(f"{location} cannot be written: permission denied")

    @contextmanager
    def open_read(self, location: Location, options: CarrierOptions) -> Iterator[Download]:
        """Raises TargetNotFound, PermissionDenied."""
        path = _path(location)
        try:
            file = path.open("rb", buffering=0)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise TargetNotFound(f"there is no archive {str(location)!r}") from None
        except PermissionError:
            raise PermissionDenied(f"{location} cannot be read: permission denied") from None
        with file:
            there = os.fstat(file.fileno())
            yield _Reading(file, there.st_size if stat.S_ISREG(there.st_mode) else None, location)

    @contextmanager
    def open_write(self, location: Location, options: CarrierOptions, payload: Payload) -> Iterator[Upload]:
        """Raises NoSpace and what `check_write` raises."""
        self.check_write(location, options)
        path = _path(location)
        if _is_special(path):
            # It cannot be replaced by a finished file; its reader sees the end of the stream.
            with _explained(location):
                special = path.open("wb", buffering=0)
            with special:
                yield _Streaming(special, location)
            return
        with _explained(location):
            fd, named = _nameless(path)
        writing = _Writing(fd, named, path, location)
        try:
            yield writing
        finally:
            writing.close()


class PipeCarrier:
    """`-`: the standard input or output. What it carried is safe when the reader says so, which nobody hears here."""

    schemes = (PIPE,)

    def check_write(self, location: Location, options: CarrierOptions) -> None:
        """Nothing can be known before."""

    @contextmanager
    def open_read(self, location: Location, options: CarrierOptions) -> Iterator[Download]:
        """The standard input."""
        yield _Reading(sys.stdin.buffer, None, location)

    @contextmanager
    def open_write(self, location: Location, options: CarrierOptions, payload: Payload) -> Iterator[Upload]:
        """The standard output."""
        yield _Streaming(sys.stdout.buffer, location)


CARRIERS: Final = (FileCarrier(), PipeCarrier())


class _Reading:
    etag: str | None = None

    def __init__(self, file: BinaryIO, size_bytes: int | None, location: Location) -> None:
        self._file = file
        self._location = location
        self.size_bytes = size_bytes

    def read(self, size: int = -1, /) -> bytes:
        with _explained(self._location, reading=True):
            return self._file.read(size) or b""


class _Streaming:
    def __init__(self, out: BinaryIO, location: Location) -> None:
        self._out = out
        self._location = location
        self._count = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        view = memoryview(data).cast("B")
        done = 0
        with _explained(self._location):
            while done < len(view):
                done += self._out.write(view[done:]) or 0
        self._count += done
        return done

    def commit(self) -> Stored:
        with _explained(self._location):
            self._out.flush()
        return Stored(self._count)


class _Writing:
    def __init__(self, fd: int, named: Path | None, path: Path, location: Location) -> None:
        self._fd = fd
        self._named = named
        self._path = path
        self._location = location
        self._count = 0

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        view = memoryview(data).cast("B")
        done = 0
        with _explained(self._location):
            while done < len(view):
                done += os.write(self._fd, view[done:])
        self._count += done
        return done

    def commit(self) -> Stored:
        with _explained(self._location):
            os.fsync(self._fd)
            directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                if self._named is None:
                    named = _beside(self._path)
                    # With a directory Python calls linkat(2), and only that follows the link in /proc.
                    os.link(f"/proc/self/fd/{self._fd}", named.name, dst_dir_fd=directory, follow_symlinks=True)
                    self._named = named
                os.rename(self._named, self._path)
                self._named = None
                os.fsync(directory)
            finally:
                os.close(directory)
        return Stored(self._count)

    def close(self) -> None:
        os.close(self._fd)
        if self._named is not None:
            with suppress(FileNotFoundError):
                os.unlink(self._named)


def _nameless(path: Path) -> tuple[int, Path | None]:
    """A file for writing beside `path`, without a name where the file system can do that: then not even a kill leaves anything."""
    flags = os.O_WRONLY | os.O_CLOEXEC
    try:
        return os.open(path.parent, flags | os.O_TMPFILE, 0o600), None
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise
    named = _beside(path)
    return os.open(named, flags | os.O_CREAT | os.O_EXCL, 0o600), named


def _beside(path: Path) -> Path:
    # A name has at most 255 bytes, and a character of it up to four.
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.tmp")


def _path(location: Location) -> Path:
    assert location.path is not None
    return location.path


def _is_special(path: Path) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)


@contextmanager
def _explained(location: Location, *, reading: bool = False) -> Iterator[None]:
    try:
        yield
    except CkptError:
        raise
    except BrokenPipeError:
        who = "the standard output" if location.scheme == PIPE else str(location)
        raise TransferFailed(f"whoever read {who} has gone away") from None
    except OSError as error:
        if error.errno in _NO_SPACE and not reading:
            raise NoSpace(f"no space left for {location}", hint="free some space or choose another place") from error
        if error.errno in _NOT_ALLOWED:
            raise PermissionDenied(f"{location}: {error.strerror}") from error
        raise CkptError(f"{location} cannot be {'read' if reading else 'written'}: {error.strerror}") from error
