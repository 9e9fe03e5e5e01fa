"""Files over a link: the sender's reading with holes left out, the receiver's writing beneath one directory.

Per file: FILE {"path", "mode", "size"}, DATA frames (a jump in their offsets is a hole), END {"size", "sha256"}. Both ends compute
the SHA-256 of the content (holes count as zeros), so that it can be compared with a manifest without reading the file again.
A stream that is sent with `"digest": false` (memory pages, for their sake a workload is frozen) has only the frames' own check sums.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, Protocol, cast

from ckpt.archive.chunks import extents
from ckpt.errors import TransferFailed
from ckpt.peer.frames import CHUNK_BYTES, PIPE_BYTES, Buffer, Frame, Kind

MAX_PATH_BYTES: Final = 1024
MAX_DEPTH: Final = 16
_ZEROS: Final = memoryview(bytes(CHUNK_BYTES))

Allow = Callable[[str], bool]


class Carrier(Protocol):
    """Where a sender puts its frames."""

    def control(self, kind: Kind, value: dict[str, object]) -> None: ...

    def buffer(self) -> bytearray: ...

    def data(self, offset: int, data: Buffer, lease: bytearray) -> None: ...


@dataclass(frozen=True, slots=True)
class ReceivedFile:
    """A file that arrived whole. `mode`: its permission bits at the source (here it is 0600); `sha256` of its content, in hex."""

    path: str
    size_bytes: int
    mode: int
    sha256: str


def check_path(path: object) -> str:
    """A relative path without tricks. Raises TransferFailed."""
    if isinstance(path, str) and 0 < len(os.fsencode(path)) <= MAX_PATH_BYTES and "\0" not in path:
        parts = path.split("/")
        if len(parts) <= MAX_DEPTH and all(part not in ("", ".", "..") and len(os.fsencode(part)) <= 255 for part in parts):
            return path
    raise TransferFailed(f"the other side sent a file with an unusable path: {str(path)[:80]!r}")


# ---------------------------------------------------------------- sending


def walk(stage: Path, members: Iterable[str]) -> Iterator[str]:
    """The members with directories replaced by the files below them, sorted. A member may appear while this runs."""
    for member in members:
        check_path(member)
        if (stage / member).is_symlink() or not (stage / member).is_dir():
            yield member
            continue
        yield from walk(stage, sorted(f"{member}/{name}" for name in os.listdir(stage / member)))


def send_file(carrier: Carrier, stage: Path, member: str, *, on_bytes: Callable[[int], None]) -> str:
    """Send one file of the stage, holes left out; returns its sha256.

    Args:
        on_bytes: called with each number of bytes of content passed, holes included.

    Raises:
        TransferFailed: it is not a regular file, or shrank while it was read.
    """
    try:
        fd = os.open(stage / member, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        what = "a symbolic link, which is not sent" if error.errno == errno.ELOOP else error.strerror
        raise TransferFailed(f"cannot send {member}: {what}") from error
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode):
            raise TransferFailed(f"cannot send {member}: not a regular file")
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        carrier.control(Kind.FILE, {"path": member, "mode": stat.S_IMODE(about.st_mode), "size": about.st_size})
        digest = hashlib.sha256()
        done = 0
        for start, end in extents(fd, about.st_size):
            _hash_zeros(digest, start - done)
            if start > done:
                on_bytes(start - done)
            done = start
            while done < end:
                lease = carrier.buffer()
                count = os.preadv(fd, [memoryview(lease)[: end - done]], done)
                if not count:
                    raise TransferFailed(f"cannot send {member}: it became shorter while it was read")
                data = memoryview(lease)[:count]
                digest.update(data)
                carrier.data(done, data, lease)
                done += count
                on_bytes(count)
        _hash_zeros(digest, about.st_size - done)
        if about.st_size > done:
            on_bytes(about.st_size - done)
        carrier.control(Kind.END, {"size": about.st_size, "sha256": digest.hexdigest()})
        return digest.hexdigest()
    except OSError as error:
        raise TransferFailed(f"cannot read {member}: {error.strerror}") from error
    finally:
        os.close(fd)


class Readable(Protocol):
    """What a stream must offer: a pipe, a raw file."""

    def readinto(self, buffer: memoryview, /) -> int | None: ...


def send_stream(carrier: Carrier, path: str, stream: Readable | BinaryIO, *, on_bytes: Callable[[int], None], digest: bool = True) -> str:
    """Send what a pipe brings, to its end, as the file `path`; returns its sha256 ("" without a digest)."""
    check_path(path)
    try:
        fcntl.fcntl(stream.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)  # type: ignore[union-attr]
    except (OSError, ValueError, AttributeError):
        pass  # no pipe, or the user's quota is used up
    carrier.control(Kind.FILE, {"path": path, "mode": 0o600, "size": None, "digest": digest})
    sum_ = hashlib.sha256()
    done = 0
    try:
        while count := _fill(stream, lease := carrier.buffer()):
            data = memoryview(lease)[:count]
            if digest:
                sum_.update(data)
            carrier.data(done, data, lease)
            done += count
            on_bytes(count)
    except OSError as error:
        raise TransferFailed(f"cannot read what becomes {path}: {error.strerror}") from error
    carrier.control(Kind.END, {"size": done, "sha256": sum_.hexdigest() if digest else ""})
    return sum_.hexdigest() if digest else ""


def _fill(stream: Readable | BinaryIO, buffer: bytearray) -> int:
    """Fill the buffer, so that the 64 KiB pieces of a pipe do not become small frames; fewer bytes only at the end."""
    view = memoryview(buffer)
    readinto = getattr(stream, "readinto", None)
    done = 0
    while done < len(view):
        if readinto is not None:
            count = int(readinto(view[done:]) or 0)
        else:
            piece = cast(BinaryIO, stream).read(len(view) - done)
            count = len(piece)
            view[done : done + count] = piece
        if not count:
            break
        done += count
    return done


class _Digest(Protocol):
    def update(self, data: Buffer, /) -> None: ...


def _hash_zeros(digest: _Digest, count: int) -> None:
    while count > 0:
        step = min(count, CHUNK_BYTES)
        digest.update(_ZEROS[:step])
        count -= step


# ---------------------------------------------------------------- receiving


class Receiver:
    """Takes the frames of an upload and writes files beneath `into`, which exists and belongs to the caller.

    Args:
        allow: which relative paths may come; everything else ends the transfer.
        sinks: paths whose content goes into a stream (the stdin of a program) instead of a file; only these may come without a digest.
        max_bytes: how much content may come in all (holes included).
        on_bytes: called with the bytes of content written so far.
    """

    def __init__(
        self,
        into: Path,
        allow: Allow,
        *,
        sinks: Mapping[str, BinaryIO] | None = None,
        max_bytes: int | None = None,
        on_bytes: Callable[[int], None] = lambda done: None,
    ) -> None:
        self._allow = allow
        self._sinks = sinks or {}
        self._max_bytes = max_bytes
        self._on_bytes = on_bytes
        self._root = os.open(into, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._seen: set[str] = set()
        self._path: str | None = None
        self._parent = -1
        self._fd = -1
        self._sink: BinaryIO | None = None
        self._mode = 0
        self._size: int | None = None
        self._position = 0
        self._total_bytes = 0
        self._digest = hashlib.sha256()
        self._digested = True
        self.files: list[ReceivedFile] = []

    def take(self, frame: Frame) -> bool:
        """Process one frame; False after the last (DONE). Raises TransferFailed, or OSError from writing."""
        if frame.kind is Kind.DATA:
            self._data(frame)
        elif frame.kind is Kind.FILE:
            self._begin(frame)
        elif frame.kind is Kind.END:
            self._finish(frame)
        elif frame.kind is Kind.ABORT:
            raise TransferFailed(f"the other side gave up: {str(frame.json().get('message', ''))[:500]}")
        elif frame.kind is Kind.DONE:
            if self._path is not None:
                raise TransferFailed(f"{self._path} arrived without its end")
            return False
        else:
            raise TransferFailed(f"unexpected {frame.kind.name} message during a transfer")
        return True

    def close(self) -> None:
        """Close everything; a file that did not arrive whole is removed."""
        if self._path is not None and self._fd >= 0:
            os.close(self._fd)
            os.unlink(os.path.basename(self._path), dir_fd=self._parent)
        self._leave()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    def _leave(self) -> None:
        if self._parent >= 0:
            os.close(self._parent)
        self._parent = self._fd = -1
        self._sink = self._path = None

    def _begin(self, frame: Frame) -> None:
        value = frame.json()
        path = check_path(value.get("path"))
        mode, size = value.get("mode"), value.get("size")
        if self._path is not None:
            raise TransferFailed(f"{self._path} arrived without its end")
        if not self._allow(path):
            raise TransferFailed(f"the other side sent a file that is not expected: {path!r}")
        if path in self._seen:
            raise TransferFailed(f"the other side sent {path!r} twice")
        if self._max_bytes is not None and isinstance(size, int) and self._total_bytes + size > self._max_bytes:
            raise TransferFailed(f"{path!r} makes the transfer larger than the {self._max_bytes} bytes allowed")
        self._seen.add(path)
        self._size = size if isinstance(size, int) else None
        self._mode = mode & 0o7777 if isinstance(mode, int) else 0o600
        self._position = 0
        self._digest = hashlib.sha256()
        self._digested = value.get("digest") is not False or path not in self._sinks
        if path in self._sinks:
            self._sink = self._sinks[path]
        else:
            self._create(path)
        self._path = path

    def _create(self, path: str) -> None:
        """Make the file and its directories, one component at a time, following no link."""
        *directories, name = path.split("/")
        at = os.dup(self._root)
        try:
            for directory in directories:
                try:
                    os.mkdir(directory, 0o700, dir_fd=at)
                except FileExistsError:
                    pass
                below = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
                os.close(at)
                at = below
            self._fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=at)
        except OSError as error:
            os.close(at)
            if error.errno in (errno.EEXIST, errno.ELOOP, errno.ENOTDIR):
                raise TransferFailed(f"cannot receive {path!r}: something else is in its place") from error
            raise
        self._parent = at

    def _data(self, frame: Frame) -> None:
        if self._path is None:
            raise TransferFailed("the other side sent data that belongs to no file")
        if frame.offset < self._position:
            raise TransferFailed(f"{self._path} arrived out of order")
        data = memoryview(frame.data())
        self._skip_to(frame.offset, len(data))
        if self._digested:
            self._digest.update(data)
        at = self._position
        rest = data
        while rest:
            # An unbuffered stream may take a part, as write(2) may.
            count = os.pwrite(self._fd, rest, at) if self._sink is None else self._sink.write(rest)
            rest = rest[count:]
            at += count
        self._position += len(data)
        self._total_bytes += len(data)
        self._on_bytes(self._total_bytes)

    def _skip_to(self, offset: int, more_bytes: int) -> None:
        """Pass a hole; the caps are checked before anything is hashed, so that a lie about an offset costs nothing."""
        hole = offset - self._position
        if self._max_bytes is not None and self._total_bytes + hole + more_bytes > self._max_bytes:
            raise TransferFailed(f"the transfer is larger than the {self._max_bytes} bytes allowed")
        if hole and (self._size is None or self._sink is not None):
            raise TransferFailed(f"the other side sent a hole in a stream: {self._path}")
        if self._size is not None and offset + more_bytes > self._size:
            raise TransferFailed(f"{self._path} is larger than announced")
        _hash_zeros(self._digest, hole)
        self._position = offset
        self._total_bytes += hole

    def _finish(self, frame: Frame) -> None:
        value = frame.json()
        size, sha256 = value.get("size"), value.get("sha256")
        if self._path is None or not isinstance(size, int) or size < self._position or size != (self._size or size):
            raise TransferFailed("the other side ended a file that it did not begin, or with a wrong size")
        self._skip_to(size, 0)
        if self._sink is not None:
            self._sink.flush()
        else:
            os.ftruncate(self._fd, size)
        if (self._digest.hexdigest() if self._digested else "") != sha256:
            raise TransferFailed(f"{self._path} arrived damaged: its digest is not the one computed by the sender")
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)
        self.files.append(ReceivedFile(self._path, size, self._mode, str(sha256)))
        self._leave()
