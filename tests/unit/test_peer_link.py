"""The peer protocol between a client and a server in one process, with a relay that damages or cuts what passes."""

from __future__ import annotations

import hashlib
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ckpt import errors
from ckpt.events import BytesMoved, Event, Notice
from ckpt.model import Carriage, Compression
from ckpt.peer import messages
from ckpt.peer.client import Peer
from ckpt.peer.frames import HEADER_BYTES, MAGIC, Kind
from ckpt.peer.server import Handler, Session, serve

BEAT_S = 0.05
PLAIN, PACK = Compression("none"), Compression("zstd", 1)
LIMIT_S = 0.6


@dataclass
class Relay:
    """Passes bytes on from one descriptor to another; `touch(offset, data)` returns what goes on, None cuts."""

    touch: Callable[[int, bytes], bytes | None] = lambda offset, data: data
    prefix: bytes = b""
    passed: int = 0
    stalled: threading.Event = field(default_factory=threading.Event)

    def run(self, source: socket.socket, target: socket.socket) -> None:
        try:
            if self.prefix:
                target.sendall(self.prefix)
            while data := source.recv(1 << 16):
                if self.stalled.is_set():
                    continue
                out = self.touch(self.passed, data)
                self.passed += len(data)
                if out is None:
                    break
                target.sendall(out)
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


@dataclass
class Served:
    peer: Peer
    to_server: Relay
    to_client: Relay
    ended: list[errors.CkptError | None]
    thread: threading.Thread
    events: list[Event]


@contextmanager
def serving(
    handlers: dict[str, Handler],
    *,
    to_server: Relay | None = None,
    to_client: Relay | None = None,
    compress: bool = False,
    carriage: Carriage | None = None,
    concurrent: tuple[str, ...] = (),
    shake: bool = True,
) -> Iterator[Served]:
    """A client and a server, a relay each way between them."""
    there, back = to_server or Relay(), to_client or Relay()
    client_end, relay_a = socket.socketpair()
    relay_b, server_end = socket.socketpair()
    threads = [
        threading.Thread(target=there.run, args=(relay_a, relay_b), daemon=True),
        threading.Thread(target=back.run, args=(relay_b, relay_a), daemon=True),
    ]
    ended: list[errors.CkptError | None] = []
    fd = server_end.detach()

    def serve_it() -> None:
        ended.append(serve(fd, fd, handlers, concurrent=concurrent, link_timeout_s=LIMIT_S, beat_s=BEAT_S, hello_timeout_s=5))

    server = threading.Thread(target=serve_it, daemon=True)
    for thread in (*threads, server):
        thread.start()
    events: list[Event] = []
    fd2 = client_end.detach()
    peer = Peer(
        fd2,
        fd2,
        name="b",
        carriage=carriage or Carriage(compress=PACK if compress else PLAIN),
        link_timeout_s=LIMIT_S,
        beat_s=BEAT_S,
        on_event=events.append,
    )
    well = False
    try:
        if shake:
            assert peer.link.handshake(5)
        yield Served(peer, there, back, ended, server, events)
        well = True
    finally:
        peer.close(goodbye=well)
        server.join(5)
        relay_a.close()
        relay_b.close()
        assert not server.is_alive()


def receiver(into: Path) -> Handler:
    def stage(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        got = session.receive_files(into, allow=lambda path: not path.startswith("forbidden"))
        return {"files": {file.path: file.sha256 for file in got}, "bytes": sum(file.size_bytes for file in got)}

    return stage


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_stage(root: Path, size: int = 3_000_001) -> list[str]:
    """A stage with random, empty, sparse, compressible and nested members."""
    (root / "checkpoint").mkdir(parents=True)
    (root / "checkpoint/pages-1.img").write_bytes(random.Random(1).randbytes(size))
    (root / "checkpoint/empty.img").write_bytes(b"")
    (root / "checkpoint/core-1.img").write_bytes(b"core" * 50_000)
    with (root / "sparse").open("wb") as out:
        out.truncate(64 << 20)
        out.seek(8 << 20)
        out.write(b"island")
        out.seek(40 << 20)
        out.write(os.urandom(5000))
    with (root / "hollow").open("wb") as out:
        out.truncate(1 << 20)
    (root / "config.dump").write_text("{}")
    os.chmod(root / "config.dump", 0o644)
    return ["config.dump", "checkpoint", "sparse", "hollow"]


# ---------------------------------------------------------------- calls


def test_calls_events_and_state() -> None:
    def put(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        session.state["kept"] = args["value"]
        session.emit(Notice("web", "kept", warning=True))
        session.emit(BytesMoved("web", "memory", 1, 2))
        return {}

    with serving({"put": put, "get": lambda session, args: {"value": session.state["kept"], "source": session.source}}) as s:
        assert s.peer.call("put", {"value": [1, "zwei"]}) == {}
        assert s.peer.call("get") == {"value": [1, "zwei"], "source": socket.gethostname()}
        assert s.events == [Notice("web", "kept", True), BytesMoved("web", "memory", 1, 2)]
        assert s.peer.hostname == socket.gethostname()
    assert s.ended == [None]


@pytest.mark.parametrize("cls", [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.CkptError)])
def test_every_error_comes_back_as_itself(cls: type[errors.CkptError]) -> None:
    def fail(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        raise cls("it failed", where="web is running", hint="try again", log="/var/log/x:7")

    with serving({"fail": fail}) as s:
        with pytest.raises(cls) as caught:
            s.peer.call("fail")
        assert type(caught.value) is cls
        assert (caught.value.message, caught.value.where, caught.value.hint) == ("it failed", "web is running", "try again")
        assert caught.value.log == f"{socket.gethostname()}:/var/log/x:7"


def test_other_exceptions_get_the_fitting_class(tmp_path: Path) -> None:
    def full(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        with open("/dev/full", "wb", buffering=0) as sink:
            session.receive_files(tmp_path, allow=lambda path: True, sinks={"a": sink})
        return {}

    def bug(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        return {"x": args["missing"]}

    (tmp_path / "a").write_bytes(bytes(9_000_000))
    with serving({"full": full, "bug": bug}) as s:
        with pytest.raises(errors.NoSpace, match=socket.gethostname()):
            s.peer.send_stage(tmp_path, ["a"], verb="full")
        with pytest.raises(errors.Bug, match="KeyError"):
            s.peer.call("bug")
        with pytest.raises(errors.FeatureMissing, match="unheard-of"):
            s.peer.call("unheard-of")


def test_call_over_time_and_calls_beside_it() -> None:
    go = threading.Event()

    def slow(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        go.wait(5)
        return {"late": True}

    with serving({"slow": slow, "status": lambda session, args: {"ok": True}}, concurrent=("status",)) as s:
        with pytest.raises(errors.TransferFailed, match="'slow' within"):
            s.peer.call("slow", timeout_s=0.1)
        assert s.peer.call("status", timeout_s=2) == {"ok": True}
        go.set()
        assert s.peer.call("status") == {"ok": True}


def test_a_long_call_outlives_the_link_timeout() -> None:
    def slow(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        time.sleep(LIMIT_S * 1.5)  # the subject of the test: silence of the handler is no silence of the link
        return {"done": True}

    with serving({"slow": slow}) as s:
        assert s.peer.call("slow") == {"done": True}


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("compress", [False, True])
def test_files_arrive_whole_with_their_holes(tmp_path: Path, compress: bool) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    target.mkdir()
    members = make_stage(source)
    seen: list[int] = []
    with serving({"stage": receiver(target)}, compress=compress) as s:
        with s.peer.upload("stage", {}) as up:
            up.send_stage(source, iter(members), on_bytes=seen.append)
            with subprocess.Popen(["head", "-c", "5000000", "/dev/urandom"], stdout=subprocess.PIPE) as process:
                assert process.stdout is not None
                up.send_stream("rootfs-diff.tar", process.stdout)
        sent = s.peer.sent_bytes
    names = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == names | {"rootfs-diff.tar"}
    for name in names:
        assert sha256(source / name) == sha256(target / name) == up.digests[name] == up.result["files"][name]
        assert (target / name).stat().st_mode & 0o7777 == 0o600
    assert up.digests["rootfs-diff.tar"] == sha256(target / "rootfs-diff.tar")
    assert (target / "checkpoint").stat().st_mode & 0o7777 == 0o700
    assert (target / "sparse").stat().st_blocks * 512 < 1 << 20
    assert seen == sorted(seen) and seen[-1] == sum((source / name).stat().st_size for name in names)
    assert sent < 9_500_000, "holes are not sent"


def test_compression_pays_only_where_it_does(tmp_path: Path) -> None:
    (tmp_path / "soft").write_bytes(b"abcdefgh" * 1_000_000)
    (tmp_path / "hard").write_bytes(os.urandom(8_000_000))
    for name, low, high in (("soft", 0, 500_000), ("hard", 8_000_000, 8_100_000)):
        into = tmp_path / f"to-{name}"
        into.mkdir()
        with serving({"stage": receiver(into)}, compress=True) as s:
            s.peer.send_stage(tmp_path, [name])
            assert low < s.peer.sent_bytes < high
        assert sha256(into / name) == sha256(tmp_path / name)


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../x", "a//x", "", ".", "a\0b", "x" * 2000, "forbidden"])
def test_hostile_paths_are_refused(tmp_path: Path, path: str) -> None:
    target = tmp_path / "b"
    target.mkdir()
    with serving({"stage": receiver(target)}) as s:
        with pytest.raises(errors.TransferFailed):
            with s.peer.upload() as up:
                up._control(Kind.FILE, {"path": path, "mode": 0o777, "size": 3})
                s.peer.link.send_data(up._channel, 0, b"abc")
        assert not list(target.iterdir())
        with s.peer.upload() as up:
            pass  # the link goes on after a refusal
        assert up.result == {"files": {}, "bytes": 0}


def test_nothing_is_overwritten_and_no_link_followed(tmp_path: Path) -> None:
    source, target, other = tmp_path / "a", tmp_path / "b", tmp_path / "other"
    for directory in (source / "d", target, other):
        directory.mkdir(parents=True)
    (source / "d/f").write_text("new")
    (source / "f").write_text("new")
    (target / "d").symlink_to(other)
    (target / "f").symlink_to(other / "f")
    with serving({"stage": receiver(target)}) as s:
        for member in ("d/f", "f"):
            with pytest.raises(errors.TransferFailed, match="something else is in its place"):
                s.peer.send_stage(source, [member])
        with pytest.raises(errors.TransferFailed, match="not sent"):
            s.peer.send_stage(target, ["f"])
    assert not list(other.iterdir())


def test_lies_about_sizes_are_refused(tmp_path: Path) -> None:
    lies: list[tuple[dict[str, Any], int]] = [({"size": 10}, 1 << 60), ({"size": None}, 5), ({"size": 2}, 0)]
    with serving({"stage": receiver(tmp_path)}) as s:
        for fact, offset in lies:
            with pytest.raises(errors.TransferFailed):
                with s.peer.upload() as up:
                    up._control(Kind.FILE, {"path": "f", "mode": 0o600, **fact})
                    s.peer.link.send_data(up._channel, offset, b"abc")
        with pytest.raises(errors.TransferFailed, match="digest"):
            with s.peer.upload() as up:
                up._control(Kind.FILE, {"path": "f", "mode": 0o600, "size": 3})
                s.peer.link.send_data(up._channel, 0, b"abc")
                up._control(Kind.END, {"size": 3, "sha256": hashlib.sha256(b"abd").hexdigest()})
    assert not (tmp_path / "f").exists()


def test_the_sender_gives_up(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 100)
    into = tmp_path / "into"
    into.mkdir()
    seen: list[str] = []

    def stage(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        try:
            return receiver(into)(session, args)
        except errors.TransferFailed as error:
            seen.append(error.message)
            raise

    with serving({"stage": stage, "status": lambda session, args: {}}) as s:
        with pytest.raises(ZeroDivisionError):
            with s.peer.upload() as up:
                up.send_stage(tmp_path, ["f"])
                _ = 1 / 0
        assert seen == ["the other side gave up: division by zero"]
        assert s.peer.call("status") == {}


@pytest.mark.parametrize("compress", [False, True])
def test_memory_is_bounded(tmp_path: Path, compress: bool) -> None:
    script = f"""
import resource, os, threading, socket, subprocess
from pathlib import Path
from ckpt.peer.client import Peer
from ckpt.peer.server import serve
import zstandard
a, b = socket.socketpair()
def stage(session, args):
    with open(os.devnull, "wb", buffering=0) as sink:
        return {{"bytes": session.receive_files(Path({str(tmp_path)!r}), allow=lambda p: True, sinks={{"s": sink}})[0].size_bytes}}
fa, fb = a.detach(), b.detach()
t = threading.Thread(target=serve, args=(fb, fb, {{"stage": stage}})); t.start()
from ckpt.model import Carriage, Compression
peer = Peer(fa, fa, carriage=Carriage(compress=Compression({"zstd" if compress else "none"!r})))
assert peer.link.handshake(5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
p = subprocess.Popen(["head", "-c", str(200 << 20), "/dev/{"zero" if compress else "urandom"}"], stdout=subprocess.PIPE)
assert peer.send_stream("s", p.stdout) == {{"bytes": 200 << 20}}
peer.close(); t.join()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60


# ---------------------------------------------------------------- damage


def flip(at: int, mask: int) -> Callable[[int, bytes], bytes]:
    def touch(offset: int, data: bytes) -> bytes:
        if offset <= at < offset + len(data):
            changed = bytearray(data)
            changed[at - offset] ^= mask
            return bytes(changed)
        return data

    return touch


def small_run(s: Served, source: Path) -> dict[str, Any]:
    assert s.peer.call("status", {"x": 1}) == {"x": 1}
    with s.peer.upload() as up:
        up.send_stage(source, ["checkpoint", "config.dump"])
    return up.result


def damaged(tmp_path: Path, seed: int, direction: str, total: int, fixed: int | None = None) -> None:
    source, target = tmp_path / "a", tmp_path / f"b{seed}-{direction}-{fixed}"
    target.mkdir()
    dice = random.Random(seed)
    at = fixed if fixed is not None else dice.randrange(total)
    relay = Relay(flip(at, 1 << dice.randrange(8)))
    handlers: dict[str, Handler] = {"stage": receiver(target), "status": lambda session, args: args}
    try:
        with serving(handlers, shake=False, compress=bool(seed % 2), **{direction: relay}) as s:
            if not s.peer.link.handshake(2):
                raise errors.TransferFailed("no hello")
            result = small_run(s, source)
    except (errors.TransferFailed, errors.CannotConnect) as error:
        assert type(error) is errors.TransferFailed, error
        for path in target.rglob("*"):
            if path.is_file():
                assert sha256(path) == sha256(source / path.relative_to(target))
        return
    for name, digest in result["files"].items():
        assert sha256(source / name) == sha256(target / name) == digest


@pytest.mark.parametrize("direction,total", [("to_server", 403_000), ("to_client", 900)])
def test_a_flipped_bit_is_always_noticed(tmp_path: Path, direction: str, total: int) -> None:
    make_stage(tmp_path / "a", size=200_000)
    for seed in range(40):
        damaged(tmp_path, seed, direction, total)


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_every_byte_of_the_hello_is_guarded(tmp_path: Path, direction: str) -> None:
    make_stage(tmp_path / "a", size=2000)
    for at in range(0, HEADER_BYTES + 30, 3):
        damaged(tmp_path, at, direction, 10**9, fixed=at)


class CutAt:
    """Cuts a byte stream at the first frame of a kind: before it, in its header, or in its payload."""

    def __init__(self, kind: Kind, place: str) -> None:
        self.kind, self.place = kind, place
        self.buffer = b""
        self.hit = False

    def __call__(self, offset: int, data: bytes) -> bytes | None:
        if self.hit:
            return None
        self.buffer += data
        out = b""
        while len(self.buffer) >= HEADER_BYTES:
            assert self.buffer.startswith(MAGIC)
            length = int.from_bytes(self.buffer[12:16], "big")
            if self.buffer[4] == self.kind:
                self.hit = True
                keep = {"before": 0, "header": 17, "payload": HEADER_BYTES + length // 2}[self.place]
                return out + self.buffer[:keep]
            if len(self.buffer) < HEADER_BYTES + length:
                break
            out += self.buffer[: HEADER_BYTES + length]
            self.buffer = self.buffer[HEADER_BYTES + length :]
        return out


class Cutter(Relay):
    """A relay that cuts at once when its CutAt has hit."""

    def __init__(self, kind: Kind, place: str) -> None:
        super().__init__(CutAt(kind, place))

    def run(self, source: socket.socket, target: socket.socket) -> None:
        cut = self.touch
        assert isinstance(cut, CutAt)
        try:
            while not cut.hit and (data := source.recv(1 << 16)):
                target.sendall(cut(0, data) or b"")
        except OSError:
            pass
        for end in (source, target):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


@pytest.mark.parametrize("place", ["before", "header", "payload"])
@pytest.mark.parametrize(
    "direction,kind",
    [("to_server", k) for k in (Kind.HELLO, Kind.CALL, Kind.FILE, Kind.DATA, Kind.END, Kind.DONE)]
    + [("to_client", k) for k in (Kind.HELLO, Kind.READY, Kind.RESULT, Kind.EVENT)],
)
def test_a_cut_anywhere_ends_both_sides(tmp_path: Path, direction: str, kind: Kind, place: str) -> None:
    make_stage(tmp_path / "a", size=200_000)
    (tmp_path / "b").mkdir()
    lost = threading.Event()

    def stage(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        session.on_lost(lost.set)
        session.emit(Notice("web", "x"))
        return receiver(tmp_path / "b")(session, args)

    with pytest.raises(errors.TransferFailed):
        with serving({"stage": stage, "status": lambda session, args: args}, shake=False, **{direction: Cutter(kind, place)}) as s:
            if not s.peer.link.handshake(2):
                raise errors.TransferFailed("no hello")
            small_run(s, tmp_path / "a")
    if kind in (Kind.FILE, Kind.DATA, Kind.END, Kind.DONE, Kind.READY):
        assert lost.is_set()
    for path in (tmp_path / "b").rglob("*"):
        if path.is_file():
            assert sha256(path) == sha256(tmp_path / "a" / path.relative_to(tmp_path / "b"))


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_silence_is_noticed_on_both_ends(direction: str) -> None:
    lost = threading.Event()

    def hold(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        session.on_lost(lost.set)
        return {}

    def wait(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        started_s = time.monotonic()
        while not session.lost and time.monotonic() - started_s < 5:
            time.sleep(0.01)
        return {}

    with pytest.raises(errors.TransferFailed):
        with serving({"hold": hold, "wait": wait}) as s:
            s.peer.call("hold")
            getattr(s, direction).stalled.set()
            started_s = time.monotonic()
            s.peer.call("wait", timeout_s=10)
    assert time.monotonic() - started_s < LIMIT_S + 2
    assert lost.wait(2)
    assert isinstance(s.ended[0], errors.TransferFailed)


def test_lost_is_called_after_the_handler_ended_and_may_be_cleared() -> None:
    order: list[str] = []

    def work(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        session.on_lost(lambda: order.append("lost"))
        while not session.lost:
            time.sleep(0.01)
        order.append("handler")
        return {}

    def finish(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        session.on_lost(lambda: order.append("never"))
        session.on_lost(None)
        return {}

    with pytest.raises(errors.TransferFailed):
        with serving({"work": work}) as s:
            s.peer.call("work", timeout_s=0.1)
    assert order == ["handler", "lost"]
    with serving({"finish": finish}) as s:
        s.peer.call("finish")
    assert order == ["handler", "lost"]


# ---------------------------------------------------------------- hello


@pytest.mark.parametrize("text", [b"", b"Welcome to b!\n", b"\x89CK", b"\x89CK\x89CKPX"[:6], b"x" * 65_000, b"\n" * 36, b"y" * 37, b"\x89" * 39])
def test_text_before_the_hello_is_skipped(text: bytes) -> None:
    with serving({"status": lambda session, args: {}}, to_client=Relay(prefix=text)) as s:
        assert s.peer.link.preamble == text.decode(errors="replace").strip()
        assert s.peer.call("status") == {}


def test_too_much_text_before_the_hello() -> None:
    with pytest.raises(errors.TransferFailed, match="text instead of the protocol"):
        with serving({}, to_client=Relay(prefix=b"x" * 70_000)):
            pass


def test_another_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    real = messages.hello
    once = iter([messages.PROTOCOL + 1, messages.PROTOCOL])
    monkeypatch.setattr(messages, "hello", lambda: {**real(), "protocol": next(once)})
    with pytest.raises((errors.PeerVersion, errors.TransferFailed)) as caught:
        with serving({}, shake=False) as s:
            if s.peer.link.handshake(5):
                s.peer.call("status")
            raise errors.TransferFailed("cut")
    s.thread.join(5)
    assert isinstance(caught.value, errors.PeerVersion) or isinstance(s.ended[0], errors.PeerVersion)


def test_events_of_a_newer_version_are_dropped() -> None:
    assert messages.event_from_json({"event": "Unheard", "x": 1}) is None
    assert messages.event_from_json({"event": "Notice", "target": "t", "text": "x", "new": 1}) == Notice("t", "x")
