"""Framing of the peer protocol: checked frames on two file descriptors.

A frame is a header of 40 bytes, big endian, and a payload of at most 4 MiB:

    magic 4s | type u8 | flags u8 | channel u16 | sequence u32 | length u32 | raw length u32 | offset u64 | order u32
    | payload check u32 | header crc32 u32

The payload's check sum is its CRC-32; of DATA the lower half of its xxh3_64, which costs a tenth: a workload is frozen meanwhile.
The header has its own check sum so that a damaged length is noticed at once and not waited for. Sequence numbers count from 0 in each
direction; `order` counts the frames of one upload (FILE, DATA, END, DONE). Payloads are JSON objects, but for DATA, whose `offset` is
the place in the file (a jump is a hole) and which may be one zstd frame (flag bit 0). The layout of the header and of the hello never
change; anything else may, with the protocol number in the hello.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from xxhash import xxh3_64_intdigest

from ckpt.errors import TransferFailed
from ckpt.peer.wires import Wire

MAGIC: Final = b"\x89CKP"
MAX_PAYLOAD_BYTES: Final = 4 << 20
MAX_PREAMBLE_BYTES: Final = 64 << 10
PIPE_BYTES: Final = 1 << 20
CHUNK_BYTES: Final = 1 << 20
_POOLED_BYTES: Final = 64 << 10
ZSTD: Final = 1
_BODY: Final = struct.Struct(">4sBBHIIIQII")
_CRC: Final = struct.Struct(">I")
HEADER_BYTES: Final = _BODY.size + _CRC.size
_TICK_S: Final = 0.2

Buffer = bytes | bytearray | memoryview


class BufferPool:
    """Buffers of one chunk that go round: fresh memory is paid with a page fault every 4 KiB, which halves the throughput of a virtual machine."""

    def __init__(self, limit: int = 24) -> None:
        self._free: deque[bytearray] = deque(maxlen=limit)

    def take(self) -> bytearray:
        """A buffer of CHUNK_BYTES with anything in it."""
        try:
            return self._free.pop()
        except IndexError:
            return bytearray(CHUNK_BYTES)

    def give(self, buffer: bytearray | None) -> None:
        """Return a buffer that nobody looks at any more; None is ignored."""
        if buffer is not None:
            self._free.append(buffer)


class Kind(IntEnum):
    """Types of frames."""

    HELLO = 1
    CALL = 2
    READY = 3
    RESULT = 4
    ERROR = 5
    EVENT = 6
    FILE = 7
    DATA = 8
    END = 9
    DONE = 10
    ABORT = 11
    BEAT = 12
    BYE = 13


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame; `raw_bytes` is the length of the payload before compression, `lease` the pool's buffer that the payload lies in, `order` its
    place among the frames of its upload."""

    kind: Kind
    channel: int = 0
    payload: Buffer = b""
    offset: int = 0
    flags: int = 0
    raw_bytes: int = 0
    lease: bytearray | None = None
    order: int = 0

    def json(self) -> dict[str, Any]:
        """The payload as a JSON object. Raises TransferFailed when it is none."""
        try:
            value = json.loads(bytes(self.payload))
        except ValueError as error:
            raise TransferFailed(f"the other side sent a malformed {self.kind.name} message") from error
        if not isinstance(value, dict):
            raise TransferFailed(f"the other side sent a malformed {self.kind.name} message")
        return value

    def data(self) -> Buffer:
        """The payload, decompressed. Raises TransferFailed when it does not decompress to what was announced."""
        if not self.flags & ZSTD:
            return self.payload
        import zstandard

        try:
            if zstandard.frame_content_size(self.payload) != self.raw_bytes:
                raise TransferFailed("damaged data arrived: a compressed frame of another size")
            data: bytes = zstandard.ZstdDecompressor().decompress(self.payload)
        except zstandard.ZstdError as error:
            raise TransferFailed("damaged data arrived: a compressed frame does not decompress") from error
        if len(data) != self.raw_bytes:
            raise TransferFailed("damaged data arrived: a compressed frame of another size")
        return data


def message(kind: Kind, channel: int, value: dict[str, Any]) -> Frame:
    """A frame with a JSON object. Raises TransferFailed when it is larger than a frame may be."""
    payload = json.dumps(value, separators=(",", ":")).encode()
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise TransferFailed(f"a {kind.name} message of {len(payload)} bytes is larger than the protocol allows")
    return Frame(kind, channel, payload)


def _check(kind: int, payload: Buffer) -> int:
    return xxh3_64_intdigest(payload) & 0xFFFFFFFF if kind == Kind.DATA else zlib.crc32(payload)


def encode_header(frame: Frame, sequence: int) -> bytes:
    """The header of a frame."""
    length = len(frame.payload)
    body = _BODY.pack(
        MAGIC,
        frame.kind,
        frame.flags,
        frame.channel,
        sequence & 0xFFFFFFFF,
        length,
        frame.raw_bytes or length,
        frame.offset,
        frame.order & 0xFFFFFFFF,
        _check(frame.kind, frame.payload),
    )
    return body + _CRC.pack(zlib.crc32(body))


def have_zstd() -> bool:
    """True when this Python can read and write zstd."""
    try:
        import zstandard  # noqa: F401
    except ImportError:
        return False
    return True


def prepare(fd: int) -> None:
    """Make a descriptor non-blocking (it is always polled) and its pipe large."""
    os.set_blocking(fd, False)
    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        pass  # a socket, or the user's pipe quota is used up: slower, not wrong


class FrameReader:
    """Reads frames from a wire. One thread at a time.

    Args:
        silence_s: how long nothing at all may be heard; heartbeats of the other side keep a link from being silent.
        stopped: asked now and then while waiting; True ends the wait with TransferFailed.
    """

    def __init__(self, wire: Wire, *, silence_s: float, stopped: Callable[[], bool] = lambda: False, pool: BufferPool | None = None) -> None:
        self._wire = wire
        self._pool = pool or BufferPool()
        self._silence_s = silence_s
        self._stopped = stopped
        self._sequence = 0
        self._head = bytearray(HEADER_BYTES)
        self._poll = select.poll()
        self._poll.register(wire.fileno(), select.POLLIN)
        self.preamble = b""
        """What came before the hello (text from a shell's start-up files)."""

    def _fill(self, view: memoryview, deadline_s: float | None) -> int:
        """Fill the view; returns fewer bytes only at end of file."""
        done = 0
        heard_s = time.monotonic()
        while done < len(view):
            try:
                count = self._wire.read(view[done:])
            except BlockingIOError:
                now_s = time.monotonic()
                if self._stopped():
                    raise TransferFailed("the link was closed") from None
                if deadline_s is not None:
                    if now_s > deadline_s:
                        raise TimeoutError from None
                elif now_s - heard_s > self._silence_s:
                    raise TransferFailed(f"the link is dead: nothing was heard for {self._silence_s:g} s") from None
                self._poll.poll(_TICK_S * 1000)
                continue
            except OSError as error:
                if error.errno in (errno.ECONNRESET, errno.EIO):
                    return done
                raise TransferFailed(f"the link broke: {error.strerror}") from error
            if count == 0:
                return done
            done += count
            heard_s = time.monotonic()
        return done

    def hello(self, timeout_s: float) -> Frame | None:
        """The first frame; text before it is skipped and kept in `preamble`. None at end of file.

        Raises:
            TimeoutError: it did not come within `timeout_s`.
            TransferFailed: it is damaged, or there was too much text before it.
        """
        deadline_s = time.monotonic() + timeout_s
        window = memoryview(self._head)
        skipped = bytearray()
        have = 0
        while True:
            have += self._fill(window[have:], deadline_s)
            at = self._head.find(MAGIC, 0, have)
            if at == 0 and have == HEADER_BYTES:
                self.preamble = bytes(skipped)
                frame = self._finish(deadline_s)
                if frame.kind is not Kind.HELLO:
                    raise TransferFailed("the link is damaged: no hello")
                return frame
            if have < HEADER_BYTES:
                skipped += self._head[:have]
                self.preamble = bytes(skipped)
                return None
            # Keep what may be the start of the magic; the fill above brings the rest.
            cut = at if at > 0 else HEADER_BYTES - len(MAGIC) + 1
            skipped += self._head[:cut]
            if len(skipped) > MAX_PREAMBLE_BYTES:
                self.preamble = bytes(skipped)
                raise TransferFailed("the other side sent text instead of the protocol", hint="do its shell's start-up files print something?")
            self._head[: HEADER_BYTES - cut] = self._head[cut:]
            have = HEADER_BYTES - cut

    def read(self) -> Frame | None:
        """The next frame; None at an orderly end of file. Raises TransferFailed for anything damaged, cut or silent."""
        got = self._fill(memoryview(self._head), None)
        if got == 0:
            return None
        if got < HEADER_BYTES:
            raise TransferFailed("the link was cut in the middle of a frame")
        return self._finish(None)

    def _finish(self, deadline_s: float | None) -> Frame:
        body = memoryview(self._head)[: _BODY.size]
        magic, kind, flags, channel, sequence, length, raw_bytes, offset, order, check = _BODY.unpack(body)
        (header_check,) = _CRC.unpack_from(self._head, _BODY.size)
        if magic != MAGIC or zlib.crc32(body) != header_check:
            raise TransferFailed("damaged data arrived: the check sum of a frame's header is wrong")
        if sequence != self._sequence & 0xFFFFFFFF:
            raise TransferFailed("damaged data arrived: a frame is missing or came twice")
        if length > MAX_PAYLOAD_BYTES or raw_bytes > MAX_PAYLOAD_BYTES:
            raise TransferFailed(f"the other side sent a frame of {max(length, raw_bytes)} bytes, more than the protocol allows")
        lease = self._pool.take() if _POOLED_BYTES < length <= CHUNK_BYTES else None
        payload = memoryview(bytearray(length) if lease is None else lease)[:length]
        if self._fill(payload, deadline_s) < length:
            raise TransferFailed("the link was cut in the middle of a frame")
        if _check(kind, payload) != check:
            raise TransferFailed("damaged data arrived: the check sum of a frame is wrong")
        self._sequence += 1
        try:
            known = Kind(kind)
        except ValueError:
            raise TransferFailed(f"the other side sent a frame of unknown type {kind}") from None
        return Frame(known, channel, payload, offset, flags, raw_bytes, lease, order)


class FrameWriter:
    """Writes frames to a wire. One thread at a time. A link that takes nothing is noticed by its reader, which then stops it."""

    def __init__(self, wire: Wire, *, stopped: Callable[[], bool] = lambda: False) -> None:
        self._wire = wire
        self._stopped = stopped
        self._sequence = 0
        self._poll = select.poll()
        self._poll.register(wire.fileno(), select.POLLOUT)
        self.sent_bytes = 0

    def write(self, frame: Frame) -> tuple[int, float]:
        """Write all of a frame. Raises TransferFailed when the other side is gone.

        Returns:
            How many bytes that were, and for how many seconds the descriptor took nothing.
        """
        stuck_s = 0.0
        head = memoryview(encode_header(frame, self._sequence))
        self._sequence += 1
        body = memoryview(frame.payload)
        total = len(head) + len(body)
        done = 0
        while done < total:
            parts = [head[done:], body] if done < len(head) else [body[done - len(head) :]]
            try:
                done += self._wire.write(parts)
            except BlockingIOError:
                if self._stopped():
                    raise TransferFailed("the link was closed") from None
                began_s = time.monotonic()
                self._poll.poll(_TICK_S * 1000)
                stuck_s += time.monotonic() - began_s
            except OSError as error:
                raise TransferFailed(f"the link broke: {error.strerror}") from error
        self.sent_bytes += total
        return total, stuck_s
