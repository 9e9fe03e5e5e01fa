"""A link: one reader thread, one writer thread, heartbeats each way, and one end that everybody hears of."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from ckpt.errors import CannotConnect, CkptError, FeatureMissing, TransferFailed
from ckpt.model import Carriage
from ckpt.peer import messages, rate
from ckpt.peer.compression import Packer
from ckpt.peer.frames import ZSTD, Buffer, BufferPool, Frame, FrameReader, FrameWriter, Kind, have_zstd, message, prepare
from ckpt.peer.queues import CONTENT, Closed, Outbox, Outgoing, Waited
from ckpt.peer.wires import FdWire, Wire

BEAT_S: Final = 1.0
LINK_TIMEOUT_S: Final = 15.0


@dataclass(slots=True)
class Traffic:
    """Content of one kind that was sent: bytes of it, and what went over the link for them (compressed, with framing)."""

    raw_bytes: int = 0
    wire_bytes: int = 0


class Link:
    """Frames over a pair of descriptors.

    Args:
        inp, out: descriptors or wires, taken over (and closed by `close`).
        on_frame: called in the reader thread for every frame but heartbeats; may block to slow the other side down.
        on_end: called once when the link ended: with None after the other side's goodbye, else with the cause.
        explain: makes the error for a cause; the client asks ssh what happened there.
        carriage: how content is carried: limit of the rate, compression.
    """

    def __init__(
        self,
        inp: int | Wire,
        out: int | Wire,
        *,
        on_frame: Callable[[Frame], None],
        on_end: Callable[[CkptError | None], None],
        explain: Callable[[CkptError], CkptError] = lambda cause: cause,
        link_timeout_s: float = LINK_TIMEOUT_S,
        beat_s: float = BEAT_S,
        carriage: Carriage | None = None,
    ) -> None:
        self._wires: list[Wire] = [_wire(way) for way in dict.fromkeys((inp, out))]
        self._on_frame = on_frame
        self._on_end = on_end
        self._explain = explain
        self._beat_s = beat_s
        self._stop = threading.Event()
        self._ended = threading.Lock()
        self._shaken = False
        self._write_error: CkptError | None = None
        self.pool = BufferPool()
        self._reader = FrameReader(self._wires[0], silence_s=link_timeout_s, stopped=self._stop.is_set, pool=self.pool)
        self._writer = FrameWriter(self._wires[-1], stopped=self._stop.is_set)
        self._link_timeout_s = link_timeout_s
        self._streams: list[FrameWriter] = []
        self.carriage = carriage or Carriage()
        self._outbox = Outbox(rate.bucket(self.carriage))
        self._packer: Packer | None = None
        self._orders: dict[int, int] = {}
        self._counting = threading.Lock()
        self.traffic: dict[str, Traffic] = {}
        """What was sent, by the label of `send_data`."""
        self._threads: list[threading.Thread] = []
        self.error: CkptError | None = None
        self.carrier = "ssh"
        """What the link itself goes over."""
        self.remote: dict[str, Any] = {}
        """The other side's hello."""

    @property
    def preamble(self) -> str:
        """Text that came before the other side's hello."""
        return self._reader.preamble.decode(errors="replace").strip()

    @property
    def sent_bytes(self) -> int:
        """Bytes written so far, headers and all."""
        return self._writer.sent_bytes + sum(stream.sent_bytes for stream in self._streams)

    def statistics(self) -> dict[str, float | int | str]:
        """`sent_bytes` in all; `KIND_raw_bytes` and `KIND_wire_bytes` of each kind of content; `compress` and what it leaves (`compress_ratio`)."""
        with self._counting:
            found: dict[str, float | int | str] = {"sent_bytes": self.sent_bytes, "compress": self._compression()}
            found |= {"carrier": "tls" if self.carriage.direct else self.carrier, "streams": len(self._streams) or 1}
            for label, traffic in self.traffic.items():
                found[f"{label.replace('-', '_')}_raw_bytes"] = traffic.raw_bytes
                found[f"{label.replace('-', '_')}_wire_bytes"] = traffic.wire_bytes
            raw_bytes = sum(traffic.raw_bytes for traffic in self.traffic.values())
            if raw_bytes:
                found["compress_ratio"] = round(sum(traffic.wire_bytes for traffic in self.traffic.values()) / raw_bytes, 3)
        return found

    def _compression(self) -> str:
        """What is done at the moment, in the words of the option: `none`, `zstd:3`, `auto: none`, `auto: zstd:1`."""
        if self._packer is None:
            return "none"
        auto = self._packer.auto
        return f"zstd:{self.carriage.compress.level}" if auto is None else f"auto: {auto.said()}"

    def handshake(self, timeout_s: float) -> bool:
        """Say hello, hear hello, start the threads; False when the other side ended without a word.

        Raises:
            CannotConnect: no hello in time.
            PeerVersion: the other side speaks another protocol.
            TransferFailed: what came was damaged.
        """
        self.send_json(Kind.HELLO, 0, messages.hello())
        self._start(partial(self._write_loop, self._writer), "ckpt-link-writer")
        try:
            frame = self._reader.hello(timeout_s)
        except TimeoutError:
            raise CannotConnect(f"the other side did not answer within {timeout_s:g} s") from None
        if frame is None:
            return False
        self.remote = frame.json()
        messages.check_hello(self.remote)
        self._choose_compression()
        self._shaken = True
        if self._write_error is not None:
            self._broken(self._write_error)
        self._start(self._read_loop, "ckpt-link-reader")
        return True

    def _start(self, target: Callable[[], None], name: str) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _choose_compression(self) -> None:
        wanted = self.carriage.compress
        if wanted.mode == "none":
            return
        if have_zstd() and self.remote.get("zstd"):
            self._packer = Packer(wanted)
        elif wanted.mode == "zstd":
            where = str(self.remote.get("host") or "the other host") if have_zstd() else "this host"
            raise FeatureMissing(f"the Python on {where} cannot read and write zstd", hint="install its package zstandard, or --compress none")

    def send(self, frame: Frame) -> None:
        """Queue a frame; those of an upload wait while the queue is full. Raises the link's error when it has ended."""
        if frame.kind in CONTENT:
            self._put(Outgoing(replace(frame, order=self._order(frame.channel)), frame.channel, len(frame.payload)))
            return
        if frame.kind is Kind.CALL:
            self._orders[frame.channel] = 0
        elif frame.kind is Kind.ABORT:
            self._outbox.drop(frame.channel)
        self._put(Outgoing(frame, frame.channel, len(frame.payload)), control=True)

    def send_json(self, kind: Kind, channel: int, value: dict[str, Any] | None = None) -> None:
        """Queue a control message."""
        self.send(message(kind, channel, value or {}))

    def send_data(self, channel: int, offset: int, data: Buffer, *, lease: bytearray | None = None, label: str = "data") -> None:
        """Queue a piece of a file; compression runs on all cores and keeps the order.

        Args:
            lease: the buffer of `pool` that `data` lies in; it goes back there once sent.
            label: what it is counted as in `traffic`.
        """
        rest = memoryview(data)
        bucket = self._outbox.bucket
        piece_bytes = bucket.piece_bytes if bucket else len(rest)
        while rest:
            piece, rest = rest[:piece_bytes], rest[piece_bytes:]
            frame = Frame(Kind.DATA, channel, piece, offset, lease=None if rest else lease, order=self._order(channel))
            offset += len(piece)
            made, epoch = self._packer.pack(frame) if self._packer else (frame, 0)
            self._put(Outgoing(made, channel, len(piece), label, epoch))

    def _order(self, channel: int) -> int:
        """The next number among the frames of a channel's upload. One upload is sent by one thread."""
        order = self._orders.get(channel, 0)
        self._orders[channel] = order + 1
        return order

    def _put(self, item: Outgoing, *, control: bool = False) -> None:
        if not (self._outbox.put(item) if control else self._outbox.put_content(item)):
            raise self.failure()

    def failure(self) -> CkptError:
        """The error to raise for a link that has ended."""
        return messages.again(self.error) if self.error else TransferFailed("the link was closed")

    def send_over(self, wires: Sequence[Wire]) -> None:
        """From now on uploads take these ways, whichever is free; taken over."""
        writers = [FrameWriter(wire, stopped=self._stop.is_set) for wire in wires]
        self._wires += wires
        self._streams += writers
        for number, writer in enumerate(writers):
            self._start(partial(self._write_loop, writer, stream=True), f"ckpt-stream-{number}")

    def receive_from(self, wire: Wire) -> None:
        """Content comes by this way, too; taken over. It has to be heard of as often as the link itself, and the link ends when it breaks."""
        self._wires.append(wire)
        reader = FrameReader(wire, silence_s=self._link_timeout_s, stopped=self._stop.is_set, pool=self.pool)
        self._start(partial(self._read_stream, reader), "ckpt-stream-reader")

    def _read_stream(self, reader: FrameReader) -> None:
        try:
            while (frame := reader.read()) is not None:
                if frame.kind is Kind.BYE:
                    return
                if frame.kind in CONTENT:
                    self._on_frame(frame)
                elif frame.kind is not Kind.BEAT:
                    raise TransferFailed(f"a stream brought an unexpected {frame.kind.name} message")
            raise TransferFailed("a stream was cut")
        except CkptError as error:
            self._broken(error)
        except Exception as error:
            self._broken(TransferFailed(f"cannot receive: {type(error).__name__}: {error}"))

    def _write_loop(self, writer: FrameWriter, *, stream: bool = False) -> None:
        waited = Waited()
        try:
            while True:
                try:
                    item = self._outbox.get(self._beat_s, control=not stream, content=stream or not self._streams, waited=waited)
                except Closed:
                    if stream:
                        writer.write(Frame(Kind.BYE))
                    return
                if item is None:
                    writer.write(Frame(Kind.BEAT))
                    continue
                frame = item.ready()
                sent_bytes, stuck_s = writer.write(frame)
                self.pool.give(frame.lease)
                if frame.kind is Kind.DATA:
                    self._count(item, frame, sent_bytes, stuck_s + waited.limited_s, waited.packing_s)
                    waited = Waited()
        except CkptError as error:
            self._unsent(error)
        except Exception as error:
            self._unsent(TransferFailed(f"cannot send: {type(error).__name__}: {error}"))

    def _count(self, item: Outgoing, frame: Frame, sent_bytes: int, stuck_s: float, packing_s: float) -> None:
        with self._counting:
            traffic = self.traffic.setdefault(item.label, Traffic())
            traffic.raw_bytes += item.size_bytes
            traffic.wire_bytes += sent_bytes
        if self._packer is not None and self._packer.auto is not None:
            writers = len(self._streams) or 1
            self._packer.auto.note(item.epoch, item.size_bytes, stuck_s / writers, packing_s / writers, packed=bool(frame.flags & ZSTD))

    def _unsent(self, cause: CkptError) -> None:
        # Before the hello the reader finds the end by itself, and ssh's exit status tells more than a broken pipe does.
        self._write_error = cause
        if self._shaken:
            self._broken(cause)

    def _read_loop(self) -> None:
        try:
            while (frame := self._reader.read()) is not None:
                if frame.kind is Kind.BYE:
                    self._end(None)
                    return
                if frame.kind is not Kind.BEAT:
                    self._on_frame(frame)
            raise TransferFailed("the link was cut")
        except CkptError as error:
            self._broken(error)
        except Exception as error:
            self._broken(TransferFailed(f"cannot receive: {type(error).__name__}: {error}"))

    def _broken(self, cause: CkptError) -> None:
        if not self._stop.is_set():
            self._end(cause)

    def _end(self, cause: CkptError | None) -> None:
        if not self._ended.acquire(blocking=False):
            return
        if cause is not None:
            self.error = self._explain(cause)
            self._stop.set()
            self._outbox.close(drop=True)
        self._on_end(self.error)

    def interrupt(self) -> None:
        """End the link from this side, as if it had been cut."""
        self._broken(TransferFailed("ended by a signal"))

    def close(self, *, goodbye: bool, timeout_s: float = 5.0) -> None:
        """End the link. With `goodbye` everything queued is sent first, then a BYE, and the other side's BYE is waited for."""
        deadline_s = time.monotonic() + timeout_s
        goodbye = goodbye and self.error is None
        self._outbox.close(drop=not goodbye, last=Frame(Kind.BYE) if goodbye else None)
        if goodbye:
            for thread in self._threads:  # the writer comes first
                thread.join(max(0.0, deadline_s - time.monotonic()))
        self._stop.set()
        for thread in self._threads:
            thread.join(2.0)
        if self._packer is not None:
            self._packer.close()
        if not any(thread.is_alive() for thread in self._threads):
            for wire in self._wires:
                wire.close()
        self._wires = []


def _wire(way: int | Wire) -> Wire:
    if not isinstance(way, int):
        return way
    prepare(way)
    return FdWire(way)
