"""An archive from members: one pass, nothing whole in memory, in podman's order and podman's compressions.

The same members give the same bytes (with the same zstd library and level), on any number of threads.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
import tarfile
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final, Literal, Protocol, cast

from ckpt.archive import index
from ckpt.archive.frames import FrameSink
from ckpt.archive.layout import CHUNK_BYTES
from ckpt.archive.members import Members
from ckpt.errors import CkptError, NoSpace
from ckpt.host import run

Compression = Literal["zstd", "gzip", "none"]
OnBytes = Callable[[int], None]

_LEVELS: Final[dict[str, int]] = {"zstd": 1, "gzip": 1, "none": 0}
_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)
_BLOCK: Final = 512
_PIGZ_EXIT_S: Final = 600.0


class _Sink(Protocol):
    def write(self, data: memoryview | bytes, /) -> object: ...

    def close(self) -> None: ...


class _Counter:
    """A binary stream that counts and writes everything (raw files may write less than they are given)."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self.count = 0

    def write(self, data: memoryview | bytes) -> int:
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += self._out.write(view[done:]) or 0
        self.count += len(view)
        return len(view)

    def flush(self) -> None:
        self._out.flush()

    def close(self) -> None:
        self.flush()


class _Zlib:
    """gzip in this process."""

    def __init__(self, out: _Counter, level: int) -> None:
        self._out = out
        self._engine = zlib.compressobj(level, zlib.DEFLATED, 31)

    def write(self, data: memoryview | bytes) -> None:
        self._out.write(self._engine.compress(data))

    def close(self) -> None:
        self._out.write(self._engine.flush())


class _Pigz:
    """gzip on all cores by the external pigz; a thread carries what it writes to the stream."""

    def __init__(self, out: _Counter, program: str, level: int, threads: int) -> None:
        self._out = out
        self._error: BaseException | None = None
        argv = [program, "-c", f"-{level}", "-n", *(["-p", str(threads)] if threads > 0 else [])]
        self._process = run.spawn(argv, stdin=run.PIPE, stdout=run.PIPE)
        self._thread = threading.Thread(target=self._carry, name="ckpt-pigz", daemon=True)
        self._thread.start()

    def _carry(self) -> None:
        assert self._process.stdout is not None
        try:
            while data := self._process.stdout.read1(CHUNK_BYTES):  # type: ignore[attr-defined]
                self._out.write(data)
        except BaseException as error:  # it is raised again by close(), in the thread that asked
            self._error = error
            self._process.kill()

    def write(self, data: memoryview | bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
        except BrokenPipeError:
            self.close()
            raise CkptError("pigz ended early") from None

    def close(self) -> None:
        with suppress(BrokenPipeError):
            if self._process.stdin:
                self._process.stdin.close()
        self._thread.join()
        code = self._process.wait(_PIGZ_EXIT_S)
        if self._error:
            raise self._error
        if code:
            raise CkptError(f"pigz failed (exit status {code})")

    def abort(self) -> None:
        self._process.kill()
        with suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        self._thread.join()
        self._process.wait()


def _open_sink(out: _Counter, compress: Compression, level: int, threads: int) -> _Sink:
    if compress == "none":
        return out
    if compress == "gzip":
        program = run.which("pigz")
        return _Pigz(out, program, level, threads) if program else _Zlib(out, level)
    return FrameSink(out.write, level, threads)


def _header(name: str, size: int, mtime: float) -> bytes:
    info = tarfile.TarInfo(name.rstrip("/"))
    info.size = size
    info.mtime = int(mtime)
    info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
    info.mode = 0o700 if name.endswith("/") else 0o600
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def write(
    members: Members,
    out: BinaryIO,
    *,
    compress: Compression = "zstd",
    level: int | None = None,
    threads: int = -1,
    on_bytes: OnBytes | None = None,
) -> int:
    """Stream the members into `out` as a tar, compressed.

    Args:
        level: of the compressor; None: the fast one (memory pages gain little from more).
        threads: of the compressor; -1: one a core (16 at most).
        on_bytes: called with the number of bytes (uncompressed) handled since the last call.

    Returns:
        Bytes written to `out`.

    Raises:
        NoSpace: `out` is full.
        CkptError: a member changed its size while it was read, or the compressor failed.
    """
    counter = _Counter(out)
    sink: _Sink | None = None
    try:
        sink = _open_sink(counter, compress, _LEVELS[compress] if level is None else level, threads)
        buffer = memoryview(bytearray(CHUNK_BYTES))
        entries: list[index.Entry] = []
        at = 0
        for name in members.names():
            entry = _write_member(members, name, at, sink, buffer, on_bytes)
            at = entry.data_offset + entry.size_bytes + -entry.size_bytes % _BLOCK
            entries.append(entry)
        sink.write(bytes(2 * _BLOCK))
        sink.close()
        if isinstance(sink, FrameSink):
            counter.write(index.tail(entries, sink.frames))
        sink = None
        counter.flush()
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise NoSpace("no space left for the archive", hint="free some space or choose another place") from error
        raise
    finally:
        if isinstance(sink, _Pigz | FrameSink):
            sink.abort()
    return counter.count


def _write_member(members: Members, name: str, at: int, sink: _Sink, buffer: memoryview, on_bytes: OnBytes | None) -> index.Entry:
    """Write one member whose header begins at byte `at` of the tar."""
    size_bytes, mtime_s = members.size_bytes(name), max(0, int(members.mtime_s(name)))
    header = _header(name, size_bytes, mtime_s)
    entry = index.Entry(name, at, at + len(header), size_bytes, mtime_s)
    large = size_bytes >= index.LARGE_BYTES and isinstance(sink, FrameSink)
    if large:
        cast(FrameSink, sink).cut()
    sink.write(header)
    if name.endswith("/"):
        return entry
    with members.open(name) as file:
        left = size_bytes
        while left:
            count = file.readinto(buffer[: min(left, CHUNK_BYTES)])  # type: ignore[attr-defined]
            if not count:
                raise CkptError(f"{name} became shorter while it was archived")
            sink.write(buffer[:count])
            left -= count
            if on_bytes:
                on_bytes(count)
    if rest := -size_bytes % _BLOCK:
        sink.write(bytes(rest))
    if large:
        cast(FrameSink, sink).cut()
    return entry


def write_file(
    members: Members,
    path: Path,
    *,
    compress: Compression = "zstd",
    level: int | None = None,
    threads: int = -1,
    on_bytes: OnBytes | None = None,
) -> int:
    """`write` into a file that is there complete (0600, on the disk) or not at all. Returns its size in bytes.

    Raises:
        NoSpace: no space left; nothing is left behind.
        CkptError: as `write`.
    """
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with io.FileIO(fd, "w") as raw:
            size = write(members, raw, compress=compress, level=level, threads=threads, on_bytes=on_bytes)
            os.fsync(fd)
        os.rename(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise NoSpace(f"no space left for {path}", hint="free some space or choose another place") from error
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    return size
