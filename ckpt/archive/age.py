"""The age file format, version 1 (C2SP, age.md): header, stanzas and the payload's chunks, as streams.

The primitives are the library's (cryptography). The framing is done here, because the bindings of the age library (pyrage 1.4) encrypt
at a third of the speed, hold Python's lock meanwhile, and know passphrases only for what is whole in memory. The tests hold the two
against each other, and against the program `age`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import io
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

from ckpt.errors import ArchiveInvalid, DigestMismatch

VERSION: Final = b"age-encryption.org/v1\n"
FILE_KEY_BYTES: Final = 16
CHUNK_BYTES: Final = 64 << 10
TAG_BYTES: Final = 16
_BOX_BYTES: Final = CHUNK_BYTES + TAG_BYTES
_BATCH: Final = 16
"""Chunks that are written (and read) at a time: 1 MiB."""
_MAX_HEADER: Final = 256 << 10
MAX_LINE: Final = 4096
COLUMNS: Final = 64
_NONCE_BYTES: Final = 16
_WORD: Final = re.compile(r"[\x21-\x7e]+\Z")


class Source(Protocol):
    """What can be read from: files, pipes, what a carrier gives."""

    def read(self, size: int = ..., /) -> bytes | None: ...


@dataclass(frozen=True, slots=True)
class Stanza:
    """The file key, wrapped for one recipient."""

    kind: str
    args: tuple[str, ...]
    body: bytes


class Sink(Protocol):
    """What can be written to: files, pipes, what a carrier gives. Raw files may write less than they are given."""

    def write(self, data: bytes | memoryview, /) -> int | None: ...


class Recipient(Protocol):
    """Whom a file is encrypted to."""

    def wrap(self, file_key: bytes) -> Stanza: ...


class Identity(Protocol):
    """What opens files."""

    def unwrap(self, stanzas: tuple[Stanza, ...]) -> bytes | None:
        """The file key; None when no stanza is for this identity. Raises KeyProblem when one is and it does not open."""


def hkdf(secret: bytes, *, salt: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869) of 32 bytes; the library's own insists on a secret that is not empty, which age once needs."""
    key = hmac.digest(salt or bytes(32), secret, "sha256")
    return hmac.digest(key, info + b"\1", "sha256")


def encode(data: bytes) -> str:
    """Base64 as age has it: no padding."""
    return base64.b64encode(data).rstrip(b"=").decode()


def decode(text: str) -> bytes:
    """The reverse, in its one canonical spelling. Raises ValueError."""
    if "=" in text:
        raise ValueError("padding")
    data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    if encode(data) != text:
        raise ValueError("not canonical")
    return data


# -- the header ------------------------------------------------------------------------------------------------------


def make_header(file_key: bytes, stanzas: Iterable[Stanza]) -> bytes:
    """The header of a file whose key is `file_key`."""
    lines = [VERSION]
    for stanza in stanzas:
        lines.append(f"-> {' '.join((stanza.kind, *stanza.args))}\n".encode())
        text = encode(stanza.body)
        # The last line is shorter than a full one, if need be empty.
        lines += [f"{text[at : at + COLUMNS]}\n".encode() for at in range(0, len(text) + 1, COLUMNS)]
    lines.append(b"---")
    covered = b"".join(lines)
    return covered + f" {encode(_mac(file_key, covered))}\n".encode()


def _mac(file_key: bytes, covered: bytes) -> bytes:
    return hmac.digest(hkdf(file_key, salt=b"", info=b"header"), covered, "sha256")


@dataclass(frozen=True, slots=True)
class Header:
    """A header as it was read; nothing of it is to be believed before `check`."""

    stanzas: tuple[Stanza, ...]
    covered: bytes
    mac: bytes

    def check(self, file_key: bytes) -> None:
        """Raise DigestMismatch when the header is not the one that was written with this key."""
        if not hmac.compare_digest(_mac(file_key, self.covered), self.mac):
            raise DigestMismatch("the header of the encrypted archive was altered")


class Buffered:
    """Lines and exact amounts from a stream that gives what it likes."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._held = b""

    def take(self, size: int) -> bytes:
        """`size` bytes, fewer only at the end."""
        parts = [self._held]
        have = len(self._held)
        while have < size and (data := self._source.read(size - have)):
            parts.append(data)
            have += len(data)
        whole = parts[-1] if have == len(parts[-1]) else b"".join(parts)
        self._held = whole[size:]
        return whole[:size] if self._held else whole

    def line(self) -> bytes:
        """A line without its end; the last one may lack it. Raises DigestMismatch when there is none, or one that is too long."""
        while b"\n" not in self._held:
            if len(self._held) > MAX_LINE:
                raise damaged("altered: its header makes no sense")
            data = self._source.read(MAX_LINE)
            if not data:
                if not self._held:
                    raise damaged("truncated")
                break
            self._held += data
        found, _, self._held = self._held.partition(b"\n")
        return found


def damaged(what: str) -> DigestMismatch:
    """An age file that is not what was written."""
    return DigestMismatch(f"the encrypted archive is {what}")


def read_header(source: Buffered) -> Header:
    """The header; the payload follows in `source`.

    Raises:
        ArchiveInvalid: not an age file of version 1.
        DigestMismatch: damaged or truncated.
    """
    if source.take(len(VERSION)) != VERSION:
        raise ArchiveInvalid("this is no age file of version 1")
    covered = [VERSION]
    stanzas: list[Stanza] = []
    size = 0
    while True:
        line = source.line()
        size += len(line) + 1
        if line.startswith(b"--- "):
            covered.append(b"---")
            try:
                mac = decode(line[4:].decode("ascii"))
            except ValueError:
                mac = b""
            if len(mac) != hashlib.sha256().digest_size or not stanzas:
                raise damaged("altered: its header makes no sense")
            return Header(tuple(stanzas), b"".join(covered), mac)
        covered.append(line + b"\n")
        if not line.startswith(b"-> "):
            raise damaged("altered: its header makes no sense")
        words = line[3:].decode("latin-1").split(" ")
        if not all(_WORD.match(word) for word in words):
            raise damaged("altered: its header makes no sense")
        text = ""
        while True:
            piece = source.line()
            size += len(piece) + 1
            covered.append(piece + b"\n")
            if len(piece) > COLUMNS or size > _MAX_HEADER:
                raise damaged("altered: its header makes no sense")
            text += piece.decode("latin-1")
            if len(piece) < COLUMNS:
                break
        try:
            stanzas.append(Stanza(words[0], tuple(words[1:]), decode(text)))
        except ValueError:
            raise damaged("altered: its header makes no sense") from None


# -- the payload -----------------------------------------------------------------------------------------------------


def _payload_key(file_key: bytes, nonce: bytes) -> bytes:
    return hkdf(file_key, salt=nonce, info=b"payload")


class Encrypting(io.RawIOBase):
    """Writes an age file to `out`: the header at once, then what is written here, encrypted in chunks of 64 KiB. `finish` ends it;
    a file that was not finished is refused by every reader.
    """

    def __init__(self, out: Sink, recipients: Iterable[Recipient]) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        file_key, nonce = os.urandom(FILE_KEY_BYTES), os.urandom(_NONCE_BYTES)
        self._out = out
        self._cipher = ChaCha20Poly1305(_payload_key(file_key, nonce))
        self._number = 0
        self._held = bytearray(CHUNK_BYTES)
        self._held_bytes = 0
        self._boxes = memoryview(bytearray(_BATCH * _BOX_BYTES))
        self._filled = 0
        self._put(make_header(file_key, [recipient.wrap(file_key) for recipient in recipients]) + nonce)

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        """Take all of `data`."""
        view = memoryview(data)
        size, at = view.nbytes, 0
        if size:
            view = view.cast("B")
        while at < size:
            if self._held_bytes == CHUNK_BYTES:
                # More follows, so this was not the last chunk.
                self._seal(self._held)
                self._held_bytes = 0
            if not self._held_bytes and size - at > CHUNK_BYTES:
                self._seal(view[at : at + CHUNK_BYTES])
                at += CHUNK_BYTES
                continue
            count = min(CHUNK_BYTES - self._held_bytes, size - at)
            self._held[self._held_bytes : self._held_bytes + count] = view[at : at + count]
            self._held_bytes += count
            at += count
        return size

    def finish(self) -> None:
        """Write the last chunk."""
        self._seal(memoryview(self._held)[: self._held_bytes], last=True)
        self._put(self._boxes[: self._filled])

    def _seal(self, chunk: bytearray | memoryview, *, last: bool = False) -> None:
        size = len(chunk) + TAG_BYTES
        if self._filled + size > len(self._boxes):
            self._put(self._boxes[: self._filled])
            self._filled = 0
        nonce = self._number.to_bytes(11, "big") + bytes([last])
        self._boxes[self._filled : self._filled + size] = self._cipher.encrypt(nonce, chunk, None)
        self._filled += size
        self._number += 1

    def _put(self, data: bytes | memoryview) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += self._out.write(view[done:]) or 0


class Decrypting(io.RawIOBase):
    """Reads what an age file holds. Every byte was authenticated before it is given out, and the end only comes after the last chunk."""

    def __init__(self, source: Buffered, file_key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        nonce = source.take(_NONCE_BYTES)
        if len(nonce) != _NONCE_BYTES:
            raise damaged("truncated")
        self._source = source
        self._cipher = ChaCha20Poly1305(_payload_key(file_key, nonce))
        self._number = 0
        self._box = source.take(_BOX_BYTES)
        self._chunk = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Raises DigestMismatch for a chunk that was altered, moved or cut off."""
        view = memoryview(buffer)
        if not self._chunk and self._number >= 0:
            self._chunk = memoryview(self._open())
        count = min(len(view), len(self._chunk))
        view[:count] = self._chunk[:count]
        self._chunk = self._chunk[count:]
        return count

    def _open(self) -> bytes:
        from cryptography.exceptions import InvalidTag

        box, self._box = self._box, self._source.take(_BOX_BYTES)
        last = not self._box
        if len(box) < TAG_BYTES:
            raise damaged("truncated")
        try:
            chunk = self._cipher.decrypt(self._number.to_bytes(11, "big") + bytes([last]), box, None)
        except InvalidTag:
            raise damaged("truncated or altered" if last else "altered") from None
        if not chunk and (self._number or not last):
            raise damaged("altered: it has an empty chunk")
        self._number = -1 if last else self._number + 1
        return chunk


class RandomAccess:
    """What an age file (not an armored one) holds, read at any place. May be used by many threads.

    The last chunk is opened first: a file that was cut off is found, and so is the length that the others must have.
    """

    def __init__(self, fd: int, unwrap: Callable[[tuple[Stanza, ...]], bytes]) -> None:
        """`fd` is of a regular file and stays the caller's. Raises as `open_file`."""
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        self._fd = fd
        buffered = Buffered(_FromStart(fd))
        header = read_header(buffered)
        file_key = unwrap(header.stanzas)
        header.check(file_key)
        nonce = buffered.take(_NONCE_BYTES)
        self._start = len(header.covered) + len(f" {encode(header.mac)}\n") + len(nonce)
        self._cipher = ChaCha20Poly1305(_payload_key(file_key, nonce))
        stored = os.fstat(fd).st_size - self._start
        self._last = (stored - 1) // _BOX_BYTES
        if len(nonce) != _NONCE_BYTES or stored - self._last * _BOX_BYTES < TAG_BYTES:
            raise damaged("truncated")
        self.size_bytes = stored - (self._last + 1) * TAG_BYTES
        """Of the content."""
        self._recent: tuple[int, bytes] = (-1, b"")
        if not self._chunk(self._last) and self._last:
            raise damaged("altered: it has an empty chunk")

    def pread(self, count: int, offset: int) -> bytes:
        """At most `count` bytes at `offset`, fewer only at the end. Raises DigestMismatch for a chunk that was altered."""
        end = min(offset + count, self.size_bytes)
        parts: list[bytes] = []
        while offset < end:
            number, at = divmod(offset, CHUNK_BYTES)
            part = self._chunk(number)[at : at + end - offset]
            parts.append(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _chunk(self, number: int) -> bytes:
        from cryptography.exceptions import InvalidTag

        recent, chunk = self._recent
        if recent == number:
            return chunk
        box = os.pread(self._fd, _BOX_BYTES, self._start + number * _BOX_BYTES)
        try:
            chunk = self._cipher.decrypt(number.to_bytes(11, "big") + bytes([number == self._last]), box, None)
        except InvalidTag:
            raise damaged("truncated or altered") from None
        self._recent = (number, chunk)
        return chunk


class _FromStart:
    """Reads a file from its beginning without moving its position."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = 0

    def read(self, size: int = CHUNK_BYTES, /) -> bytes:
        data = os.pread(self._fd, size, self._at)
        self._at += len(data)
        return data


def open_file(source: Source, unwrap: Callable[[tuple[Stanza, ...]], bytes]) -> Decrypting:
    """Read the header, let `unwrap` find the file key, and give the content.

    Raises:
        ArchiveInvalid, DigestMismatch: as `read_header` and `Header.check`; and what `unwrap` raises.
    """
    buffered = Buffered(source)
    header = read_header(buffered)
    file_key = unwrap(header.stanzas)
    header.check(file_key)
    return Decrypting(buffered, file_key)
