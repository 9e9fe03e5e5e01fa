"""ckpt's own http carrier and `ckpt serve`: cut at random bytes, both ways."""

from __future__ import annotations

import hashlib
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from ckpt.errors import DigestMismatch, RemoteRefused
from ckpt.events import ignore
from ckpt.ops import import_
from ckpt.store.catalog import Catalog
from ckpt.transports.base import CarrierOptions, Location, Payload, carrier_of
from tests.unit.serving import Server
from tests.unit.test_archive_reader import make_stage

CHUNK = 64 << 10


class Cutter:
    """A wire between client and server that is cut after random numbers of bytes in one direction; then it lets everything through."""

    def __init__(self, port: int, cuts: list[int], *, up: bool) -> None:
        self._port, self._cuts, self._up = port, cuts, up
        self.up_bytes = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                far = socket.create_connection(("127.0.0.1", self._port))
                for source, sink, up in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._carry, args=(source, sink, up), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        left = self._cuts.pop() if self._cuts and up == self._up else 1 << 60
        with suppress(OSError):
            while left > 0 and (data := source.recv(min(left, 16384))):
                sink.sendall(data)
                left -= len(data)
                self.up_bytes += len(data) * up
        for sock in (source, sink):
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "store")
    yield made
    made.close()


@pytest.fixture
def options(server: Server, tmp_path: Path) -> CarrierOptions:
    path = tmp_path / "token"
    path.write_text(server.token("upload", "download", uses=5))
    path.chmod(0o600)
    return CarrierOptions(chunk_bytes=CHUNK, idle_timeout_s=20.0, retry_limit_s=60.0, token_file=path, fingerprint=server.fingerprint)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    import io

    from ckpt.archive import writer
    from ckpt.archive.members import StageMembers

    out = io.BytesIO()
    writer.write(StageMembers(make_stage(tmp_path_factory.mktemp("stage"))), out, compress="none")
    return out.getvalue()


def put(port: int, data: bytes, options: CarrierOptions, path: str = "web") -> Any:
    location = Location.parse(f"https://127.0.0.1:{port}/{path}")
    with carrier_of(location).open_write(location, options, Payload()) as writing:
        for at in range(0, len(data), 50_000):
            writing.write(data[at : at + 50_000])
        return writing.commit()


@pytest.mark.timeout(180)
def test_fifty_cuts_of_an_upload(server: Server, options: CarrierOptions, archive: bytes) -> None:
    chance = random.Random(5)
    cuts = [3000 + chance.randrange(3 * CHUNK) for _ in range(50)]
    wire = Cutter(server.port, cuts, up=True)
    stored = put(wire.port, archive, options)
    wire.close()
    assert cuts == [] and stored.reference == "web@1"
    assert [c.ref for c in Catalog(server.store).all()] == ["web@1"]
    # Of each cut at most one chunk comes again; handshakes and heads of requests are on top.
    assert wire.up_bytes < len(archive) + 50 * (CHUNK + 6000) + len(archive) // CHUNK * 2000


@pytest.mark.timeout(180)
def test_fifty_cuts_of_a_download(server: Server, options: CarrierOptions, archive: bytes, tmp_path: Path) -> None:
    put(server.port, archive, options)
    chance = random.Random(6)
    cuts = [20_000 + chance.randrange(len(archive) // 30) for _ in range(50)]
    wire = Cutter(server.port, cuts, up=False)
    location = Location.parse(f"https://127.0.0.1:{wire.port}/checkpoints/web")
    outcome = import_.import_(location, name="copy", carrier=options, store_root=tmp_path / "other", emit=ignore)
    wire.close()
    assert cuts == [] and outcome.checkpoint is not None and outcome.checkpoint.ref == "copy@1"
    whole = Server.client(server, Path(options.token_file or "").read_text()).request("GET", "/checkpoints/web").body
    assert outcome.stats["digest"] == "sha256:" + hashlib.sha256(whole).hexdigest()


def test_refusals_come_through(server: Server, options: CarrierOptions, archive: bytes, tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(RemoteRefused, match="cert|trusted"):
        put(server.port, archive, replace(options, fingerprint=None))
    (tmp_path / "token").write_text("ckpt_wrong")
    with pytest.raises(RemoteRefused):
        put(server.port, archive, options)
    (tmp_path / "token").write_text(server.token("download"))
    with pytest.raises(RemoteRefused, match="does not allow upload"):
        put(server.port, archive, options)
    (tmp_path / "token").write_text(server.token("upload"))
    broken = bytearray(archive)
    broken[len(broken) // 2] ^= 1
    with pytest.raises(DigestMismatch):
        put(server.port, bytes(broken), options)
    assert Catalog(server.store).all() == []
    assert put(server.port, archive, options).reference == "web@1"
