"""How content is carried: the limit of its rate, what may pass it by, and when it is compressed."""

from __future__ import annotations

import io
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt import errors
from ckpt.model import Carriage, Compression
from ckpt.peer import messages
from ckpt.peer.compression import Auto
from ckpt.peer.frames import CHUNK_BYTES, Frame, Kind
from ckpt.peer.queues import Closed, Inbox, Outbox, Outgoing
from ckpt.peer.rate import LimitedWriter, TokenBucket
from ckpt.peer.server import Session
from tests.unit.test_peer_link import LIMIT_S, PACK, PLAIN, Relay, receiver, serving, sha256

MIB = 1 << 20


def limited(rate: int) -> Carriage:
    return Carriage(bwlimit_bytes_s=rate, compress=PLAIN)


# ---------------------------------------------------------------- the limit of the rate


@pytest.mark.parametrize("rate", [2 * MIB, 20 * MIB])
def test_the_rate_is_reached_and_not_passed(tmp_path: Path, rate: int) -> None:
    (tmp_path / "f").write_bytes(os.urandom(rate * 3 // 2))
    into = tmp_path / "into"
    into.mkdir()
    with serving({"stage": receiver(into)}, carriage=limited(rate)) as s:
        began_s = time.monotonic()
        s.peer.send_stage(tmp_path, ["f"])
        took_s = time.monotonic() - began_s
    assert 1.3 < took_s < 2.5, f"{rate * 1.5 / took_s / MIB:.1f} MiB/s"
    assert sha256(into / "f") == sha256(tmp_path / "f")


def test_the_limit_is_about_what_the_link_carries(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abcdefgh" * MIB)
    (tmp_path / "into").mkdir()
    with serving({"stage": receiver(tmp_path / "into")}, carriage=Carriage(MIB, PACK)) as s:
        began_s = time.monotonic()
        s.peer.send_stage(tmp_path, ["f"])
        assert time.monotonic() - began_s < 4, "8 MiB that compress to almost nothing"


def test_calls_pass_content_that_waits(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(os.urandom(MIB))
    (tmp_path / "into").mkdir()
    handlers = {"stage": receiver(tmp_path / "into"), "ask": lambda session, args: {"ok": True}}
    with serving(handlers, carriage=limited(200 << 10), concurrent=("ask",)) as s:
        done = threading.Event()

        def send() -> None:
            with pytest.raises(errors.TransferFailed):
                s.peer.send_stage(tmp_path, ["f"])
            done.set()

        thread = threading.Thread(target=send)
        thread.start()
        began_s = time.monotonic()
        for _ in range(10):
            assert s.peer.call("ask") == {"ok": True}
        assert time.monotonic() - began_s < 3 and not done.is_set()
        # 5 s are to go: the end of the link is not waited for that long.
        s.peer.link.interrupt()
        thread.join(2)
        assert done.is_set()


def test_a_slow_limit_is_no_silence(tmp_path: Path) -> None:
    """A piece that waits longer than the link may be silent: heartbeats go on."""
    (tmp_path / "f").write_bytes(os.urandom(48 << 10))
    (tmp_path / "into").mkdir()
    with serving({"stage": receiver(tmp_path / "into")}, carriage=limited(round((16 << 10) / LIMIT_S / 1.5))) as s:
        s.peer.send_stage(tmp_path, ["f"])


def test_an_interrupted_sender_does_not_wait_for_what_is_queued(tmp_path: Path) -> None:
    into = tmp_path / "into"
    into.mkdir()
    with serving({"stage": receiver(into), "ask": lambda session, args: {}}, carriage=limited(64 << 10)) as s:
        with open("/dev/urandom", "rb", buffering=0) as noise, pytest.raises(KeyboardInterrupt):
            with s.peer.upload() as up:
                timer = threading.Timer(0.3, signal.pthread_kill, (threading.main_thread().ident, signal.SIGINT))
                timer.start()
                began_s = time.monotonic()
                up.send_stream("f", noise)  # 16 s for its first piece
        assert s.peer.call("ask") == {}
        assert time.monotonic() - began_s < 6
        timer.join()
    assert not list(into.iterdir())


def test_bucket_by_a_clock_of_our_own() -> None:
    now = [0.0]
    bucket = TokenBucket(1000.0, clock=lambda: now[0])
    sent = 0
    while now[0] < 10:
        if wait_s := bucket.wait_s():
            now[0] += wait_s
            continue
        bucket.take(300)
        sent += 300
    assert 10_000 <= sent <= 10_300
    now[0] += 3600  # what an idle hour left is not caught up with
    assert bucket.wait_s() == 0
    bucket.take(100)
    bucket.take(300)
    assert bucket.wait_s() == pytest.approx(0.3)


def test_a_stream_of_a_rate() -> None:
    out = io.BytesIO()
    data = os.urandom(MIB)
    began_s = time.monotonic()
    assert LimitedWriter(out, TokenBucket(2 * MIB)).write(data) == MIB
    assert 0.4 < time.monotonic() - began_s < 1.5
    assert out.getvalue() == data


# ---------------------------------------------------------------- the queues


def part(order: int, size: int = 10, kind: Kind = Kind.DATA) -> Frame:
    return Frame(kind, 1, bytes(size), order=order)


def test_an_upload_is_put_together_in_its_order() -> None:
    inbox = Inbox()
    for order in random.Random(1).sample(range(50), 50):
        inbox.put(part(order))
    assert [inbox.get().order for _ in range(50)] == list(range(50))
    for bad in (49, 3):
        with pytest.raises(errors.TransferFailed, match="twice"):
            inbox.put(part(bad))
    inbox.put(part(50, kind=Kind.END))
    inbox.put(Frame(Kind.ABORT, 1))
    assert inbox.get().kind is Kind.ABORT, "an end before its time overtakes"
    inbox.close(drop=True)
    with pytest.raises(Closed):
        inbox.get()


def test_the_part_that_is_due_always_finds_room() -> None:
    inbox = Inbox(limit_bytes=1100)
    for order in (1, 2):
        inbox.put(part(order, 500))
    over = threading.Event()

    def ahead() -> None:
        inbox.put(part(3, 500))
        over.set()

    thread = threading.Thread(target=ahead, daemon=True)
    thread.start()
    assert not over.wait(0.1)
    inbox.put(part(0, 500))
    assert [inbox.get().order for _ in range(4)] == [0, 1, 2, 3]
    thread.join(2)


def test_a_part_that_never_comes() -> None:
    inbox = Inbox(limit_bytes=1000, starved_s=0.1)
    inbox.put(part(1, 600))
    with pytest.raises(errors.TransferFailed, match="missing"):
        inbox.put(part(2, 600))


def test_control_first_and_the_goodbye_last() -> None:
    outbox = Outbox()
    outbox.put_content(Outgoing(part(0), 1, 10))
    outbox.put_content(Outgoing(part(1), 2, 10))
    outbox.put(Outgoing(Frame(Kind.CALL, 3), 3, 0))
    outbox.close(last=Frame(Kind.BYE))
    outbox.drop(2)
    kinds = [item.ready().kind for item in (outbox.get(1), outbox.get(1), outbox.get(1)) if item]
    assert kinds == [Kind.CALL, Kind.DATA, Kind.BYE]
    with pytest.raises(Closed):
        outbox.get(1)


# ---------------------------------------------------------------- compression


class Pipeline:
    """A link of a rate, compressors of a rate, and content that compresses to a ratio, by a clock of its own."""

    def __init__(self, link: float, compressors: float, ratio: float, idle: float = 0.8) -> None:
        self.link, self.compressors, self.ratio, self.idle = link, compressors, ratio, idle
        self.now_s = 0.0
        self.auto = Auto(clock=lambda: self.now_s, idle=lambda: self.idle)
        self.soft = b"abcdefgh" * (CHUNK_BYTES // 8)
        self.hard = random.Random(1).randbytes(CHUNK_BYTES)
        self.reads = 4000.0 * MIB
        self.sent = 0
        self.packed = 0

    def run(self, seconds: float) -> float:
        """Runs so long; returns the part of the content that was compressed."""
        self.sent = self.packed = 0
        end_s = self.now_s + seconds
        while self.now_s < end_s:
            level, epoch = self.auto.choose(self.hard if self.ratio > 0.9 else self.soft)
            on_wire = CHUNK_BYTES * (self.ratio if level is not None else 1.0)
            link_s, read_s = on_wire / self.link, CHUNK_BYTES / self.reads
            pack_s = CHUNK_BYTES / self.compressors if level is not None else 0.0
            took_s = max(link_s, pack_s, read_s)
            self.now_s += took_s
            self.sent += 1
            self.packed += level is not None
            stuck = took_s - read_s if took_s == link_s else 0.0
            self.auto.note(epoch, CHUNK_BYTES, stuck, took_s if took_s == pack_s else 0.0, packed=level is not None)
        return self.packed / self.sent


def test_on_where_the_link_is_slow() -> None:
    pipeline = Pipeline(link=25 * MIB, compressors=800 * MIB, ratio=0.5)
    pipeline.run(2)
    assert pipeline.run(60) == 1.0, "it stays on without trying in vain"
    assert pipeline.auto.said().startswith("zstd:1 for 9")


@pytest.mark.parametrize(
    "pipeline",
    [
        Pipeline(link=6000 * MIB, compressors=800 * MIB, ratio=0.5),  # nobody waits for the link
        Pipeline(link=1000 * MIB, compressors=800 * MIB, ratio=0.5, idle=0.05),  # ssh takes all there is of the processors
        Pipeline(link=25 * MIB, compressors=800 * MIB, ratio=1.0),  # nothing to gain
        Pipeline(link=25 * MIB, compressors=20 * MIB, ratio=0.5),  # a slow processor
    ],
    ids=["fast link", "busy", "incompressible", "slow processor"],
)
def test_off_where_it_does_not_pay(pipeline: Pipeline) -> None:
    assert pipeline.run(60) < 0.1


def test_it_decides_again() -> None:
    pipeline = Pipeline(link=25 * MIB, compressors=800 * MIB, ratio=0.5)
    pipeline.run(5)
    assert pipeline.auto.on
    pipeline.link = 6000 * MIB  # the link became fast
    pipeline.run(10)
    assert pipeline.run(20) < 0.1
    pipeline.link = 25 * MIB
    pipeline.run(40)
    assert pipeline.auto.on
    pipeline.ratio = 1.0
    pipeline.run(10)


def throttle(rate: float) -> Callable[[int, bytes], bytes]:
    """A relay's link of a rate."""
    began_s = time.monotonic()

    def touch(offset: int, data: bytes) -> bytes:
        ahead_s = offset / rate - (time.monotonic() - began_s)
        if ahead_s > 0:
            time.sleep(ahead_s)
        return data

    return touch


def test_measured_over_a_link(tmp_path: Path) -> None:
    half = os.urandom(32 << 10) + bytes(32 << 10)
    (tmp_path / "f").write_bytes(half * (40 * MIB // len(half)))
    (tmp_path / "into").mkdir()
    with serving({"stage": receiver(tmp_path / "into")}, to_server=Relay(throttle(12 * MIB)), carriage=Carriage()) as s:
        assert s.peer.link._packer and s.peer.link._packer.auto
        s.peer.link._packer.auto._idle = lambda: 0.9  # other tests may have the processors
        s.peer.send_stage(tmp_path, ["f"])
        stats = s.peer.statistics()
    assert sha256(tmp_path / "into/f") == sha256(tmp_path / "f")
    assert stats["stage_raw_bytes"] == 40 * MIB
    assert str(stats["compress"]).startswith("auto: zstd:1 for"), stats
    assert float(stats["compress_ratio"]) < 0.85, stats


def test_statistics_by_kind(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abcdefgh" * 100_000)
    (tmp_path / "into").mkdir()
    with serving({"stage": receiver(tmp_path / "into")}, carriage=Carriage(compress=Compression("zstd", 5))) as s:
        with s.peer.upload("stage", kind="container-image") as up:
            up.send_stage(tmp_path, ["f"])
        stats = s.peer.statistics()
    assert stats["container_image_raw_bytes"] == 800_000
    assert 0 < int(stats["container_image_wire_bytes"]) < 80_000
    assert stats["compress"] == "zstd:5" and float(stats["compress_ratio"]) < 0.1


def test_a_side_without_zstd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = messages.hello
    monkeypatch.setattr(messages, "hello", lambda: {**real(), "zstd": False})
    with pytest.raises(errors.FeatureMissing, match=f"the Python on {socket.gethostname()} cannot read and write zstd"):
        with serving({}, carriage=Carriage(compress=PACK)):
            pass

    def answer(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        return {"fine": True}

    with serving({"ask": answer}, carriage=Carriage()) as s:
        assert s.peer.call("ask") == {"fine": True}
