"""Files on another host, by SFTP: it needs no ckpt, and not even a shell, there.

`[user@]host:path` (below the home directory unless it begins with /), `ssh://[user@]host[:port]/path` (from the root; `/~/path` below the
home directory). A file is written beside its name, as `.NAME.HEX.part` (0600), brought to the disk and renamed.
"""

from __future__ import annotations

import posixpath
import secrets
import stat
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, NoReturn
from urllib.parse import unquote

from ckpt.errors import CannotConnect, CkptError, RemoteRefused, TargetNotFound, TransferFailed, UsageError
from ckpt.transports import ssh, ssh_cipher, ssh_sftp
from ckpt.transports._patience import Broken, Patience
from ckpt.transports.base import SSH, CarrierOptions, Download, Location, Payload, Stored, Upload
from ckpt.transports.ssh_sftp import Attributes, Refused, Sftp, Unreached

_READ_WINDOW_BYTES: Final = 4 << 20


class SshCarrier:
    """Files on a host that ssh reaches."""

    schemes = (SSH,)

    def check_write(self, location: Location, options: CarrierOptions) -> None:
        """Raises CannotConnect, RemoteRefused (no such directory, no SFTP), UsageError."""
        place = _Place(location, options)
        try:
            place.connect()
            place.check_target()
        except Broken as problem:
            raise _error(place, problem) from None
        finally:
            place.close()

    @contextmanager
    def open_read(self, location: Location, options: CarrierOptions) -> Iterator[Download]:
        """Raises TargetNotFound, CannotConnect, RemoteRefused."""
        place = _Place(location, options)
        try:
            try:
                reading = _Reading(place)
            except Broken as problem:
                raise _error(place, problem) from None
            yield reading
        finally:
            place.close()

    @contextmanager
    def open_write(self, location: Location, options: CarrierOptions, payload: Payload) -> Iterator[Upload]:
        """Raises as `check_write`."""
        place = _Place(location, options)
        try:
            try:
                writing = _Writing(place)
            except Broken as problem:
                raise _error(place, problem) from None
            try:
                yield writing
            finally:
                writing.close()
        finally:
            place.close()


CARRIER: Final = SshCarrier()


def parse(location: Location) -> tuple[ssh.Destination, str]:
    """Host and path of a location. Raises UsageError."""
    if location.is_url:
        parts = location.split
        destination = ssh.Destination.parse(f"ssh://{parts.netloc}")
        path = unquote(parts.path)
        path = path.removeprefix("/~/") if path.startswith("/~/") else path
    else:
        bracket = location.raw.find("]:")
        end = bracket + 1 if bracket >= 0 else location.raw.index(":")
        destination, path = ssh.Destination.parse(location.raw[:end]), location.raw[end + 1 :]
        path = path.removeprefix("~/")
    if not path or path.endswith("/") or posixpath.basename(path) in (".", ".."):
        raise UsageError(f"{location} names no file", hint="write it as [user@]host:path/of/the/archive")
    return destination, path


class _Place:
    """A path on a host, and the connection to it while there is one."""

    def __init__(self, location: Location, options: CarrierOptions) -> None:
        self.location = location
        self.options = options
        self.destination, path = parse(location)
        self.path = path.encode(errors="surrogateescape")
        self.patience = Patience(location, options)
        self._ssh_options: tuple[str, ...] | None = None
        self._sftp: Sftp | None = None

    @property
    def sftp(self) -> Sftp:
        if self._sftp is None:
            raise Broken("the ssh connection broke")
        return self._sftp

    def connect(self) -> Sftp:
        """A new connection. Raises Unreached."""
        self.close()
        if self._ssh_options is None:
            self._ssh_options = (*self.options.ssh_options, *ssh_cipher.preference(self.destination, self.options.ssh_options))
        self._sftp = Sftp(self.destination, self._ssh_options, self.options.idle_timeout_s)
        return self._sftp

    def close(self) -> None:
        if self._sftp is not None:
            self._sftp.close()
            self._sftp = None

    def check_target(self) -> None:
        """The directory is there, and the path is none."""
        directory = posixpath.dirname(self.path) or b"."
        try:
            there = self.sftp.attributes(ssh_sftp.STAT, directory)
        except Refused as no:
            self.refused(no, "the directory of the archive")
        if there.mode is not None and not stat.S_ISDIR(there.mode):
            raise RemoteRefused(f"{self.location}: {directory.decode(errors='replace')} is no directory there")
        with suppress(Refused):
            found = self.sftp.attributes(ssh_sftp.STAT, self.path)
            if found.mode is not None and stat.S_ISDIR(found.mode):
                raise RemoteRefused(f"{self.location} is a directory there", hint="name a file in it")

    def refused(self, no: Refused, what: str) -> NoReturn:
        """Raise what an error status means."""
        if no.code == ssh_sftp.NO_SUCH_FILE:
            raise RemoteRefused(f"{self.location}: {what} is not there") from None
        if no.code == ssh_sftp.PERMISSION_DENIED:
            raise RemoteRefused(f"{self.location}: {what}: permission denied there") from None
        free = None
        with suppress(Refused, Broken):
            free = self.sftp.free_bytes(posixpath.dirname(self.path) or b".")
        # OpenSSH has one code for all other errors.
        if free is not None and free < 1 << 20:
            raise RemoteRefused(f"{self.location}: no space is left there", hint="make room on the other end") from None
        raise RemoteRefused(f"{self.location}: {what}: {no.text or 'it failed'}") from None


def _error(place: _Place, problem: Broken) -> CkptError:
    if isinstance(problem, Unreached):
        return problem.error
    return TransferFailed(f"{place.location}: {problem.message}", hint="try again")


def _again(place: _Place, problem: Broken, at_bytes: int) -> Sftp:
    """Connect anew, however often that takes. Raises TransferFailed, CannotConnect."""
    told = False
    while True:
        place.close()
        problem.connected = True  # it was reached before
        place.patience.wait(problem)
        if not told:
            place.options.notice(f"{place.location}: {problem.message}; going on at byte {at_bytes}")
            told = True
        try:
            return place.connect()
        except Broken as further:
            problem = further
        except CannotConnect as further:
            problem = Broken(further.message)


class _Reading:
    etag: str | None = None

    def __init__(self, place: _Place) -> None:
        self._place = place
        self._done = 0
        self._asked = 0
        self._requests: deque[tuple[int, int]] = deque()
        """(number, length), in the order of the file."""
        place.connect()
        self._handle, there = self._open()
        self._identity = (there.size_bytes, there.mtime_s)
        self.size_bytes: int = there.size_bytes or 0

    def _open(self) -> tuple[bytes, Attributes]:
        place = self._place
        try:
            there = place.sftp.attributes(ssh_sftp.STAT, place.path)
            if there.mode is not None and not stat.S_ISREG(there.mode):
                raise TargetNotFound(f"there is no archive {str(place.location)!r}: it is no regular file")
            handle = place.sftp.handle(place.path, ssh_sftp.FXF_READ)
            there = place.sftp.attributes(ssh_sftp.FSTAT, handle)
        except Refused as no:
            if no.code == ssh_sftp.NO_SUCH_FILE:
                raise TargetNotFound(f"there is no archive {str(place.location)!r}") from None
            place.refused(no, "the archive")
        if there.size_bytes is None:
            raise RemoteRefused(f"{place.location}: the server does not tell its size")
        return handle, there

    def read(self, size: int = -1, /) -> bytes:
        """As `Download.read`."""
        while self._done < self.size_bytes and size:
            try:
                piece = self._some()
            except Broken as problem:
                self._resume(problem)
                continue
            if 0 <= size < len(piece):
                self._spare = piece[size:]
                piece = piece[:size]
            self._done += len(piece)
            self._place.patience.progressed(len(piece))
            return piece
        return b""

    _spare = b""

    def _some(self) -> bytes:
        if self._spare:
            piece, self._spare = self._spare, b""
            return piece
        sftp = self._place.sftp
        while self._asked < self.size_bytes and self._asked - self._done < _READ_WINDOW_BYTES:
            length = min(sftp.read_bytes, self.size_bytes - self._asked)
            number = sftp.ask(ssh_sftp.READ, ssh_sftp.text(self._handle), ssh_sftp.long(self._asked), length)
            self._requests.append((number, length))
            self._asked += length
        number, length = self._requests.popleft()
        try:
            found = sftp.data(sftp.answer(number))
        except Refused as no:
            self._place.refused(no, "the archive")
        if not found or len(found) > length:
            raise TransferFailed(f"{self._place.location} became shorter while it was read")
        piece = found
        if len(piece) < length:  # allowed, if rare: the rest is asked for next, in its place
            at = self._done + len(piece)
            number = sftp.ask(ssh_sftp.READ, ssh_sftp.text(self._handle), ssh_sftp.long(at), length - len(piece))
            self._requests.appendleft((number, length - len(piece)))
        return piece

    def _resume(self, problem: Broken) -> None:
        place = self._place
        while True:
            _again(place, problem, self._done)
            self._requests.clear()
            self._asked = self._done
            self._spare = b""
            try:
                self._handle, there = self._open()
            except Broken as further:
                problem = further
                continue
            if (there.size_bytes, there.mtime_s) != self._identity:
                raise TransferFailed(f"{place.location} changed while it was read", hint="try again")
            return


class _Writing:
    """Blocks at their offsets, many under way at a time; what is not acknowledged is kept, and sent again after a break."""

    def __init__(self, place: _Place) -> None:
        self._place = place
        name = posixpath.basename(place.path)
        self._part = posixpath.join(posixpath.dirname(place.path), b"." + name[:200] + b"." + secrets.token_hex(4).encode() + b".part")
        self._count = 0
        self._filling = bytearray()
        self._waiting: OrderedDict[int, bytes] = OrderedDict()
        """What is not acknowledged, by offset."""
        self._numbers: dict[int, int] = {}
        """Of requests: number -> offset."""
        self._held_bytes = 0
        self._acknowledged = 0
        self._finished = False
        self._renamed_before = False
        sftp = place.connect()
        # Of one size, also over a connection to come; a block is far less than a chunk.
        self._block = min(sftp.write_bytes, place.options.chunk_bytes)
        place.check_target()
        flags = ssh_sftp.FXF_WRITE | ssh_sftp.FXF_CREAT | ssh_sftp.FXF_EXCL
        try:
            self._handle = place.sftp.handle(self._part, flags)
        except Refused as no:
            place.refused(no, "a file beside it")

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        view = memoryview(data).cast("B")
        done = 0
        block = self._block
        while done < len(view):
            piece = view[done : done + block - len(self._filling)]
            self._filling += piece
            done += len(piece)
            if len(self._filling) >= block:
                self._queue()
        return done

    def commit(self) -> Stored:
        if self._filling:
            self._queue()
        while True:
            try:
                self._settle(0)
                self._finish()
                break
            except Broken as problem:
                self._resume(problem)
        self._finished = True
        return Stored(self._count)

    def close(self) -> None:
        """Remove the part, unless it was committed."""
        if self._finished:
            return
        place = self._place
        place.patience.stopped.set()
        with suppress(CkptError, Refused, Broken, OSError):
            # What is still queued on a slow link would be in the way; a new connection is not.
            place.connect()
            place.sftp.status(place.sftp.ask(ssh_sftp.REMOVE, ssh_sftp.text(self._part)))

    def _queue(self) -> None:
        block, self._filling = bytes(self._filling), bytearray()
        offset = self._count
        self._count += len(block)
        self._waiting[offset] = block
        self._held_bytes += len(block)
        while True:
            try:
                if offset not in self._numbers.values():
                    self._send(offset, block)
                self._settle(max(0, self._place.options.chunk_bytes - len(block)))
                return
            except Broken as problem:
                self._resume(problem)

    def _send(self, offset: int, block: bytes) -> None:
        sftp = self._place.sftp
        number = sftp.ask(ssh_sftp.WRITE, ssh_sftp.text(self._handle), ssh_sftp.long(offset), ssh_sftp.text(block))
        self._numbers[number] = offset

    def _settle(self, most_bytes: int) -> None:
        """Take what was acknowledged, and wait until no more than so much is not."""
        sftp = self._place.sftp
        sftp.pump(0)
        while self._numbers:
            number = next(iter(self._numbers))
            if not sftp.answered(number):
                if self._held_bytes <= most_bytes:
                    return
                sftp.step()
                continue
            try:
                sftp.status(number)
            except Refused as no:
                self._place.refused(no, "it cannot be written")
            block = self._waiting.pop(self._numbers.pop(number))
            self._held_bytes -= len(block)
            self._acknowledged = self._count - self._held_bytes - len(self._filling)
            self._place.patience.progressed(len(block))

    def _finish(self) -> None:
        """Sync, compare the length, rename. Raises Broken."""
        if self._renamed_before:
            return
        sftp = self._place.sftp
        try:
            sftp.sync(self._handle)
            there = sftp.attributes(ssh_sftp.FSTAT, self._handle)
            if there.size_bytes is not None and there.size_bytes != self._count:
                raise TransferFailed(f"{self._place.location}: {there.size_bytes} bytes are there, {self._count} were sent")
            sftp.status(sftp.ask(ssh_sftp.CLOSE, ssh_sftp.text(self._handle)))
            sftp.rename(self._part, self._place.path)
        except Refused as no:
            if no.code == ssh_sftp.FAILURE and "posix-rename@openssh.com" not in sftp.extensions:
                raise RemoteRefused(f"{self._place.location} is there already, and this server cannot replace it") from None
            self._place.refused(no, "it cannot be finished")

    def _resume(self, problem: Broken) -> None:
        """Open the part again and send what was not acknowledged; or find that it has its name already."""
        place = self._place
        while True:
            sftp = _again(place, problem, self._acknowledged)
            self._numbers.clear()
            try:
                try:
                    self._handle = sftp.handle(self._part, ssh_sftp.FXF_WRITE)
                    there = sftp.attributes(ssh_sftp.FSTAT, self._handle)
                except Refused as no:
                    if no.code == ssh_sftp.NO_SUCH_FILE and self._renamed(sftp):
                        return
                    place.refused(no, "what was sent before the break")
                if there.size_bytes is not None and there.size_bytes < self._acknowledged:
                    raise TransferFailed(f"{place.location}: the other end lost what it had", hint="try again")
                for offset, block in self._waiting.items():
                    self._send(offset, block)
                return
            except Broken as further:
                problem = further

    def _renamed(self, sftp: Sftp) -> bool:
        """Whether the rename went well and only its answer was lost."""
        if self._waiting or self._filling:
            return False
        with suppress(Refused):
            if sftp.attributes(ssh_sftp.STAT, self._place.path).size_bytes == self._count:
                self._renamed_before = True
                return True
        return False
