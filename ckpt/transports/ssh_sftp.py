"""The part of SFTP (version 3: draft-ietf-secsh-filexfer-02) that carries one file, through the system's `ssh`.

Requests are numbered and may be many at a time. The extensions used, where they are offered, are those of OpenSSH's PROTOCOL file.
"""

from __future__ import annotations

import os
import select
import struct
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from ckpt.errors import CkptError, RemoteRefused
from ckpt.transports import ssh
from ckpt.transports._patience import Broken

INIT, VERSION, OPEN, CLOSE, READ, WRITE, LSTAT, FSTAT, REMOVE, STAT, RENAME = 1, 2, 3, 4, 5, 6, 7, 8, 13, 17, 18
STATUS, HANDLE, DATA, ATTRS, EXTENDED, EXTENDED_REPLY = 101, 102, 103, 105, 200, 201
OK, EOF, NO_SUCH_FILE, PERMISSION_DENIED, FAILURE, OP_UNSUPPORTED = 0, 1, 2, 3, 4, 8
FXF_READ, FXF_WRITE, FXF_CREAT, FXF_TRUNC, FXF_EXCL = 1, 2, 8, 16, 32
PACKET_BYTES: Final = 32 << 10
"""What every server takes in one request."""
LOGIN_LIMIT_S: Final = 30.0
ASKING_LIMIT_S: Final = 180.0
"""With a person who types a password."""
_ANSWER_BYTES: Final = 1 << 20
_PIPE_BYTES: Final = 256 << 10
_BLOCK_BYTES: Final = 16 << 10
_SIZE, _OWNER, _MODE, _TIMES = 1, 2, 4, 8


class Refused(Exception):
    """The server answered with an error: its code and its words."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


@dataclass(frozen=True, slots=True)
class Attributes:
    """What a server tells of a file; None for what it does not."""

    size_bytes: int | None = None
    mode: int | None = None
    mtime_s: int | None = None


class Sftp:
    """One connection. Raises Broken when it is no more; `close` it."""

    def __init__(self, destination: ssh.Destination, options: Sequence[str], idle_timeout_s: float) -> None:
        self._destination = destination
        self._idle_timeout_s = idle_timeout_s
        self._process = ssh.open(destination, ("sftp",), options, subsystem=True)
        assert self._process.stdin is not None and self._process.stdout is not None and self._process.stderr is not None
        self._in = self._process.stdout.fileno()
        self._out = self._process.stdin.fileno()
        self._err = self._process.stderr.fileno()
        for fd in (self._in, self._out, self._err):
            os.set_blocking(fd, False)
        self._said = bytearray()
        self._unsent = bytearray()
        self._come = bytearray()
        self._number = 0
        self._answers: dict[int, tuple[int, bytes]] = {}
        self._expected: set[int] = set()
        self._quiet = False
        self._arrived = 0
        self._moved_at_s: float | None = None
        self._moves_then = 0
        self.sent_bytes = 0
        self.extensions: set[str] = set()
        self.write_bytes = self.read_bytes = PACKET_BYTES
        try:
            self._greet()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End ssh."""
        process = self._process
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(2.0)
            except Exception:  # it does not want to
                process.kill()
        process.wait()

    # -- requests ------------------------------------------------------------------------------------------------

    def ask(self, kind: int, *parts: bytes | memoryview | int) -> int:
        """Begin a request; returns its number. Integers are 32 bits (64 by `long`)."""
        self._number += 1
        body = struct.pack(">BI", kind, self._number) + b"".join(struct.pack(">I", one) if isinstance(one, int) else one for one in parts)
        self._unsent += struct.pack(">I", len(body)) + body
        if not self._expected:
            self._moved_at_s = None  # it was idle, which is no slowness
        self._expected.add(self._number)
        return self._number

    def answered(self, number: int) -> bool:
        """Whether the answer to a request is there."""
        return number in self._answers

    def answer(self, number: int) -> tuple[int, bytes]:
        """Wait for the answer to a request: its kind and content. Raises Broken."""
        while number not in self._answers:
            self.step()
        return self._answers.pop(number)

    def step(self) -> None:
        """Wait until something moves. Raises Broken when a whole answer, or a block of ours, takes too long (a trickle does not count)."""
        now = time.monotonic()
        if self._moved_at_s is None or self.moves != self._moves_then:
            self._moved_at_s, self._moves_then = now, self.moves
        left_s = self._moved_at_s + self._idle_timeout_s - now
        if left_s <= 0:
            raise Broken(f"nothing, or next to nothing, came or went in time ({self._idle_timeout_s:g} s)")
        self.pump(left_s)
        if not self._expected:
            self._moved_at_s = None

    def status(self, number: int) -> None:
        """Wait for a plain yes. Raises Refused for a no."""
        kind, content = self.answer(number)
        if kind != STATUS:
            raise Broken("the SFTP server answered what was not asked")
        self._check(content)

    def handle(self, path: bytes, flags: int) -> bytes:
        """Open a file; a new one gets mode 0600. Returns the handle. Raises Refused."""
        attributes = struct.pack(">II", _MODE, 0o600) if flags & FXF_CREAT else struct.pack(">I", 0)
        return self._string(self.answer(self.ask(OPEN, text(path), flags, attributes)), HANDLE)

    def attributes(self, kind: int, what: bytes) -> Attributes:
        """STAT or LSTAT of a path, FSTAT of a handle. Raises Refused."""
        answer, content = self.answer(self.ask(kind, text(what)))
        if answer == STATUS:
            self._check(content)
        if answer != ATTRS:
            raise Broken("the SFTP server answered what was not asked")
        return _attributes(content)

    def data(self, answer: tuple[int, bytes]) -> bytes | None:
        """The content of an answer to READ; None at the end of the file. Raises Refused."""
        kind, content = answer
        if kind == STATUS and len(content) >= 4 and struct.unpack_from(">I", content)[0] == EOF:
            return None
        return self._string(answer, DATA)

    def rename(self, old: bytes, new: bytes) -> None:
        """Over what is there, at once. Raises Refused, also for a server that cannot do that."""
        if "posix-rename@openssh.com" in self.extensions:
            self.status(self.ask(EXTENDED, text(b"posix-rename@openssh.com"), text(old), text(new)))
        else:  # which fails when there is one already
            self.status(self.ask(RENAME, text(old), text(new)))

    def sync(self, handle: bytes) -> None:
        """Bring a file to the disk, where the server can."""
        if "fsync@openssh.com" in self.extensions:
            self.status(self.ask(EXTENDED, text(b"fsync@openssh.com"), text(handle)))

    def free_bytes(self, path: bytes) -> int | None:
        """Space for us on the file system of a path, where the server tells."""
        if "statvfs@openssh.com" not in self.extensions:
            return None
        kind, content = self.answer(self.ask(EXTENDED, text(b"statvfs@openssh.com"), text(path)))
        if kind != EXTENDED_REPLY or len(content) < 40:
            return None
        _, block, _, _, free = struct.unpack_from(">5Q", content)
        return int(block * free)

    # -- the pipes -----------------------------------------------------------------------------------------------

    def pump(self, timeout_s: float) -> None:
        """Send and receive what can be, waiting at most so long for something to happen. Raises Broken."""
        poll = select.poll()
        poll.register(self._in, select.POLLIN)
        if not self._quiet:
            poll.register(self._err, select.POLLIN)
        if self._unsent:
            poll.register(self._out, select.POLLOUT)
        for fd, _ in poll.poll(timeout_s * 1000):
            if fd == self._out:
                self._send()
            elif fd == self._in:
                self._receive()
            else:
                self._hear()

    @property
    def unsent_bytes(self) -> int:
        """What still waits here to be sent."""
        return len(self._unsent)

    @property
    def moves(self) -> int:
        """Grows with every answer, and every block that was sent."""
        return self._arrived + self.sent_bytes // _BLOCK_BYTES

    def _send(self) -> None:
        try:
            count = os.write(self._out, bytes(self._unsent[:_PIPE_BYTES]))
        except BlockingIOError:
            return
        except BrokenPipeError:
            raise self._gone() from None
        del self._unsent[:count]
        self.sent_bytes += count

    def _receive(self) -> None:
        try:
            data = os.read(self._in, _PIPE_BYTES)
        except BlockingIOError:
            return
        if not data:
            raise self._gone()
        self._come += data
        position = 0
        while len(self._come) - position >= 4:
            (length,) = struct.unpack_from(">I", self._come, position)
            if not 5 <= length <= _ANSWER_BYTES:
                raise RemoteRefused(f"{self._destination} does not speak SFTP: a login there may print something")
            if len(self._come) - position - 4 < length:
                break
            kind, number = struct.unpack_from(">BI", self._come, position + 4)
            content = bytes(self._come[position + 9 : position + 4 + length])
            position += 4 + length
            if number not in self._expected:
                raise Broken("the SFTP server answered what was not asked")
            self._expected.discard(number)
            self._answers[number] = (kind, content)
            self._arrived += 1
        del self._come[:position]

    def _hear(self) -> None:
        try:
            data = os.read(self._err, 4096)
        except BlockingIOError:
            return
        self._quiet = not data
        self._said += data
        del self._said[: -64 << 10]

    def _gone(self) -> Exception:
        try:
            code: int | None = self._process.wait(2.0)
        except Exception:  # it has closed its pipe, but lives
            code = None
        for _ in range(16):
            self._hear()
        said = self._said.decode(errors="replace")
        if "subsystem request failed" in said:
            hint = "enable it in its sshd_config (Subsystem sftp), or pipe: ckpt export … - | ssh HOST ckpt import -"
            return RemoteRefused(f"{self._destination} has no SFTP", hint=hint)
        if self._greeted:
            line = next((one.strip() for one in reversed(said.splitlines()) if one.strip()), "")
            return Broken("the ssh connection broke" + (f" ({line})" if line else ""))
        return Unreached(ssh.explain(self._destination, code, said, command="sftp"))

    # -- the beginning -------------------------------------------------------------------------------------------

    _greeted = False

    def _greet(self) -> None:
        self._unsent += struct.pack(">IBI", 5, INIT, 3)
        # The version takes the place of a number in this one answer.
        self._expected.add(3)
        limit_s = ASKING_LIMIT_S if ssh.interactive() else LOGIN_LIMIT_S
        deadline_s = time.monotonic() + limit_s
        while not self._answers:
            self.pump(max(0.0, deadline_s - time.monotonic()))
            if time.monotonic() >= deadline_s:
                raise Unreached(ssh.explain(self._destination, None, self._said.decode(errors="replace")))
        kind, content = self._answers.pop(3)
        if kind != VERSION:
            raise RemoteRefused(f"{self._destination} does not speak SFTP")
        self._greeted = True
        self._number = 3
        while content:
            name, content = _take(content)
            _, content = _take(content)
            self.extensions.add(name.decode(errors="replace"))
        if "limits@openssh.com" in self.extensions:
            kind, content = self.answer(self.ask(EXTENDED, text(b"limits@openssh.com")))
            if kind == EXTENDED_REPLY and len(content) >= 24:
                _, read, write = struct.unpack_from(">3Q", content)
                self.read_bytes = min(max(read, PACKET_BYTES), 8 * PACKET_BYTES) if read else PACKET_BYTES
                self.write_bytes = min(max(write, PACKET_BYTES), 8 * PACKET_BYTES) if write else PACKET_BYTES

    def _check(self, content: bytes) -> None:
        if len(content) < 4:
            raise Broken("the SFTP server answered what was not asked")
        (code,) = struct.unpack_from(">I", content)
        if code != OK:
            said = _take(content[4:])[0] if len(content) >= 8 else b""
            raise Refused(code, "".join(c if c.isprintable() else " " for c in said.decode(errors="replace"))[:200])

    def _string(self, answer: tuple[int, bytes], wanted: int) -> bytes:
        kind, content = answer
        if kind == STATUS:
            self._check(content)
        if kind != wanted:
            raise Broken("the SFTP server answered what was not asked")
        return _take(content)[0]


class Unreached(Broken):
    """There was no connection; `error` says why."""

    def __init__(self, error: CkptError) -> None:
        super().__init__(error.message, connected=False)
        self.error = error


def text(data: bytes) -> bytes:
    """A string as SFTP has it."""
    return struct.pack(">I", len(data)) + data


def long(number: int) -> bytes:
    """A 64-bit integer."""
    return struct.pack(">Q", number)


def _take(content: bytes) -> tuple[bytes, bytes]:
    if len(content) >= 4:
        (length,) = struct.unpack_from(">I", content)
        if len(content) - 4 >= length:
            return content[4 : 4 + length], content[4 + length :]
    raise Broken("the SFTP server sent something that cannot be")


def _attributes(content: bytes) -> Attributes:
    try:
        (flags,) = struct.unpack_from(">I", content)
        position = 4
        size = mode = mtime = None
        if flags & _SIZE:
            (size,) = struct.unpack_from(">Q", content, position)
            position += 8
        if flags & _OWNER:
            position += 8
        if flags & _MODE:
            (mode,) = struct.unpack_from(">I", content, position)
            position += 4
        if flags & _TIMES:
            _, mtime = struct.unpack_from(">II", content, position)
    except struct.error:
        raise Broken("the SFTP server sent something that cannot be") from None
    return Attributes(size, mode, mtime)
