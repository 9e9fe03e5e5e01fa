"""Further ways for content: handed over by further ssh connections, or by TLS with pinned certificates."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ckpt import errors
from ckpt.model import Carriage
from ckpt.peer import streams, tls
from ckpt.peer.frames import prepare
from ckpt.peer.server import Session
from ckpt.peer.wires import FdWire, TlsWire
from tests.unit.test_peer_link import PACK, PLAIN, Served, make_stage, receiver, serving, sha256

LEND = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); from ckpt.peer.streams import lend; sys.exit(lend(sys.argv[1]))"


@pytest.fixture(autouse=True)
def reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_CONNECTION", "127.0.0.1 40000 127.0.0.1 22")


@contextmanager
def lent(peer: Any, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    """What ssh_below.join does, without ssh."""
    path = str(peer.call("streams", {"streams": count})["socket"])
    assert os.stat(os.path.dirname(path)).st_mode & 0o777 == 0o700
    others = [subprocess.Popen([sys.executable, "-c", LEND, path], stdin=subprocess.PIPE) for _ in range(count)]
    wires = []
    for other in others:
        assert other.stdin is not None
        fd = os.dup(other.stdin.fileno())
        other.stdin.close()
        prepare(fd)
        wires.append(FdWire(fd))
    streams.await_joined(peer, count)
    peer.link.send_over(wires)
    try:
        yield others
    finally:
        peer.close(goodbye=peer.link.error is None)
        for other in others:
            assert other.wait(5) == 0
        assert not os.path.exists(path)


def moved(s: Served, source: Path, target: Path, members: list[str]) -> None:
    with s.peer.upload() as up:
        up.send_stage(source, members)
    for name, digest in up.result["files"].items():
        assert digest == up.digests[name] == sha256(source / name) == sha256(target / name)


@pytest.mark.parametrize("compress", [PLAIN, PACK], ids=["plain", "zstd"])
@pytest.mark.parametrize("way", ["ssh", "direct"])
def test_files_arrive_whole(tmp_path: Path, way: str, compress: Any) -> None:
    source = tmp_path / "a"
    members = make_stage(source, size=30_000_001)
    handlers: dict[str, Any] = {}
    for number in (1, 2):
        (tmp_path / f"b{number}").mkdir()
    handlers = {"stage": receiver(tmp_path / "b1"), "again": receiver(tmp_path / "b2")}
    with serving(handlers, carriage=Carriage(compress=compress, direct=way == "direct")) as s:
        if way == "direct":
            streams.join_direct(s.peer, 3)
            moved(s, source, tmp_path / "b1", members)
            assert s.peer.send_stage(source, members, verb="again")["bytes"] > 30_000_000
        else:
            with lent(s.peer, 3):
                moved(s, source, tmp_path / "b1", members)
                assert s.peer.send_stage(source, members, verb="again")["bytes"] > 30_000_000
        carried = [stream.sent_bytes for stream in s.peer.link._streams]
        assert len(carried) == 3 and min(carried) > 1 << 20, "each carries its part"
        assert s.peer.link._writer.sent_bytes < 20_000, "no content goes by the link itself"
        assert s.peer.statistics()["streams"] == 3


@pytest.mark.parametrize("way", ["ssh", "direct"])
def test_a_cut_stream_ends_the_link_on_both_sides(tmp_path: Path, way: str) -> None:
    (tmp_path / "b").mkdir()
    lost = threading.Event()

    def stage(session: Session, args: dict[str, Any]) -> dict[str, Any]:
        session.on_lost(lost.set)
        return receiver(tmp_path / "b")(session, args)

    def endless(s: Served) -> None:
        with open("/dev/urandom", "rb", buffering=0) as noise, s.peer.upload() as up:
            up.send_stream("noise", noise, on_bytes=lambda done: cut(s, done))

    def cut(s: Served, done: int) -> None:
        if done == 8 << 20:
            wire = s.peer.link._wires[-1]
            if isinstance(wire, TlsWire):
                wire._sock.shutdown(socket.SHUT_RDWR)
            else:
                killed[0].kill()
                os.dup2(os.open(os.devnull, os.O_WRONLY), wire.fileno())

    killed: list[subprocess.Popen[bytes]] = []
    with pytest.raises(errors.TransferFailed):
        with serving({"stage": stage}) as s:
            if way == "direct":
                streams.join_direct(s.peer, 2)
                endless(s)
            else:
                path = str(s.peer.call("streams", {"streams": 1})["socket"])
                reader, writer = os.pipe()
                killed.append(subprocess.Popen([sys.executable, "-c", LEND, path], stdin=reader))
                os.close(reader)
                streams.await_joined(s.peer, 1)
                prepare(writer)
                s.peer.link.send_over([FdWire(writer)])
                endless(s)
    assert lost.wait(5)
    assert not list((tmp_path / "b").iterdir())
    for process in killed:
        process.wait()


def test_strangers_are_sent_away(tmp_path: Path) -> None:
    """Only the certificate that came over the link is accepted, on either side, and noise at the port does not keep the source out."""
    mine, stranger = tls.identity(), tls.identity()
    with serving({"stage": receiver(tmp_path)}) as s:
        answer = s.peer.call("streams", {"streams": 1, "direct": True, "certificate": mine.certificate})
        at, theirs = (answer["address"], answer["port"]), answer["certificate"]
        assert at[0] == "127.0.0.1" and at[1] in streams.PORTS
        with socket.create_connection(at) as noise:
            noise.sendall(b"GET / HTTP/1.0\r\n\r\n")
            using = tls.context(stranger, theirs, server=False)
            with pytest.raises(OSError):
                # TLS 1.3: the client is done before the server has looked at its certificate.
                sock = tls.wrap(socket.create_connection(at, timeout=5), using, theirs, server=False)
                sock.settimeout(5)
                sock.recv(1)
            using = tls.context(mine, stranger.certificate, server=False)
            with pytest.raises(ssl.SSLError):
                tls.wrap(socket.create_connection(at, timeout=5), using, stranger.certificate, server=False)
            assert s.peer.call("joined", {"count": 1})["joined"] == 0
            using = tls.context(mine, theirs, server=False)
            sock = tls.wrap(socket.create_connection(at, timeout=5), using, theirs, server=False)
            assert sock.version() == "TLSv1.3"
            streams_there = s.peer.call("joined", {"count": 1})
            assert streams_there["joined"] == 1
            with pytest.raises(errors.BusyError):
                s.peer.call("streams", {"streams": 1})
        s.peer.link.send_over([TlsWire(sock)])
        (tmp_path / "src").mkdir()
        (tmp_path / "src/f").write_bytes(b"x" * 100_000)
        s.peer.send_stage(tmp_path / "src", ["f"])
    with pytest.raises(OSError):  # nobody listens any more
        socket.create_connection(at, timeout=2)


def test_nobody_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "DIRECT_LIMIT_S", 0.5)
    with serving({}) as s:
        answer = s.peer.call("streams", {"streams": 2, "direct": True, "certificate": tls.identity().certificate})
        with pytest.raises(errors.CannotConnect, match="0 of 2 streams reached b"):
            streams.await_joined(s.peer, 2, 0.1)
        with pytest.raises(OSError):
            socket.create_connection((answer["address"], answer["port"]), timeout=2)


@pytest.mark.parametrize(
    "args",
    [{}, {"streams": 0}, {"streams": 17}, {"streams": "2"}, {"streams": 1, "direct": True}]
    + [
        {"streams": 1, "direct": True, "certificate": text}
        for text in ("", "x" * 9000, "-----BEGIN CERTIFICATE-----\nAA=\n-----END CERTIFICATE-----")
    ],
)
def test_what_is_asked_for_wrongly(args: dict[str, Any]) -> None:
    with serving({}) as s:
        with pytest.raises((errors.UsageError, errors.TransferFailed)):
            s.peer.call("streams", args)
        with pytest.raises(errors.UsageError):
            s.peer.call("joined", {"count": "x"})


def test_a_host_that_does_not_know_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_CONNECTION")
    with serving({}) as s, pytest.raises(errors.FeatureMissing, match="SSH_CONNECTION"):
        streams.join_direct(s.peer, 1)


def test_a_port_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"address": "127.0.0.1", "port": 1, "certificate": tls.identity().certificate}
    with serving({"streams": lambda session, args: answer}) as s, pytest.raises(errors.CannotConnect, match="port 1 of b directly") as caught:
        streams.join_direct(s.peer, 1)
    assert "49152 to 49215" in str(caught.value.hint)


def test_a_key_has_no_name(tmp_path: Path) -> None:
    made = tls.identity()
    assert "PRIVATE KEY" in made.key and "PRIVATE" not in made.certificate
    assert made.key != tls.identity().key


def test_nobody_waits_for_what_is_lent(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LEND, str(tmp_path / "none")], capture_output=True, text=True, timeout=20)
    assert "nobody waits for a stream here" in done.stderr and done.returncode != 0
