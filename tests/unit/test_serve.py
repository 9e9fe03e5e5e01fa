"""`ckpt serve`, the real one, on loopback: who gets in, uploads that break, bad requests, downloads."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt.archive import writer
from ckpt.archive.members import StageMembers
from ckpt.errors import BusyError, TargetNotFound, UsageError
from ckpt.serve import certificate, limits, listen
from ckpt.serve.tokens import Tokens
from ckpt.store.catalog import Catalog
from tests.unit.serving import Client, Server, unverified
from tests.unit.test_archive_reader import make_stage

Start = Callable[..., Server]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    made: list[Server] = []

    def begin(store: Path | None = None, **options: Any) -> Server:
        made.append(Server(store or tmp_path / "store", **options))
        return made[-1]

    yield begin
    for server in made:
        server.close()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = io.BytesIO()
    writer.write(StageMembers(make_stage(tmp_path_factory.mktemp("stage"))), out)
    return out.getvalue()


def nothing_stored(store: Path) -> None:
    assert Catalog(store).all() == []
    assert list((store / "uploads").iterdir()) == []
    assert not (store / "tmp").exists() or list((store / "tmp").iterdir()) == []


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_upload_becomes_a_checkpoint(start: Start, archive: bytes) -> None:
    server = start()
    client = server.client(server.token("upload"))
    offered = client.request("OPTIONS", client.path)
    assert offered.status == 204 and offered.headers["Ckpt-Upload"] == "1" and "max-append-size=" in offered.headers["Upload-Limit"]
    assert client.begin(len(archive)).status == 201
    half = len(archive) // 2
    sent = client.append(0, archive[:half])
    assert (sent.status, sent.offset) == (204, half)
    partial = next((server.store / "uploads").iterdir())
    assert stat.S_IMODE(partial.stat().st_mode) == 0o700 and stat.S_IMODE((partial / "data").stat().st_mode) == 0o600
    assert Catalog(server.store).all() == []
    assert client.append(7, archive[7:]).offset == half, "409 says where it stands"
    assert client.append(half, archive[half:]).offset == len(archive)
    done = client.finish(len(archive), hashlib.sha256(archive).digest())
    assert (done.status, done.json()["ref"]) == (201, "web@1") and done.headers["Upload-Complete"] == "?1"
    again = client.finish(len(archive), hashlib.sha256(archive).digest())
    assert (again.status, again.json()["ref"]) == (201, "web@1"), "the answer can be had again"
    assert [c.ref for c in Catalog(server.store).all()] == ["web@1"]
    assert not (partial / "data").exists()


def test_plain_put(start: Start, archive: bytes) -> None:
    server = start()
    done = server.client(server.token("upload")).request("PUT", "/other.tar.zst", body=archive)
    assert (done.status, done.json()["ref"]) == (201, "other@1")
    refused = server.client(server.token("upload")).request("PUT", "/", body=archive[:-9])
    assert refused.status == 422
    assert len(Catalog(server.store).all()) == 1


def cut_patch(server: Server, client: Client, offset: int, data: bytes, keep: int, *, reset: bool) -> None:
    """A PATCH whose connection is reset, or closed when the server waits for more, after `keep` bytes of its content."""
    assert server.service is not None
    upload = server.service.uploads.under_way()[0]
    plain = socket.create_connection(("127.0.0.1", client.port))
    with unverified().wrap_socket(plain) as sock:
        head = f"PATCH {client.upload} HTTP/1.1\r\nHost: b\r\nUpload-Offset: {offset}\r\nUpload-Complete: ?0\r\nContent-Length: {len(data)}\r\n"
        sock.sendall((head + f"Authorization: {client.headers['Authorization']}\r\n\r\n").encode())
        if not reset:
            wait_until(lambda: upload.connection is not None)
        sock.sendall(data[:keep])
        if not reset:
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(4096):
                pass
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def test_fifty_breaks(start: Start, archive: bytes) -> None:
    """Each goes on where the server stands, and what it has is what was sent."""
    server = start()
    client = server.client(server.token("upload"))
    client.begin(len(archive))
    chance = random.Random(4)
    offset = 0
    for number in range(50):
        size = len(archive) // 60
        keep = chance.randrange(size)
        cut_patch(server, client, offset, archive[offset : offset + size], keep, reset=number % 2 == 0)
        told = client.request("HEAD", client.upload)
        assert told.status == 204 and offset <= told.offset <= offset + keep
        offset = told.offset
    assert offset > 0, "what arrived counts"
    assert client.append(offset, archive[offset:]).offset == len(archive)
    assert client.finish(len(archive), hashlib.sha256(archive).digest()).status == 201


def test_a_dead_connection_is_pushed_aside(start: Start, archive: bytes) -> None:
    """An earlier PATCH that still hangs adds nothing after a HEAD."""
    server = start()
    client = server.client(server.token("upload"))
    client.begin()
    plain = socket.create_connection(("127.0.0.1", client.port))
    with unverified().wrap_socket(plain) as sock:
        head = f"PATCH {client.upload} HTTP/1.1\r\nHost: b\r\nUpload-Offset: 0\r\nUpload-Complete: ?0\r\nContent-Length: 5000\r\n"
        sock.sendall((head + f"Authorization: {client.headers['Authorization']}\r\n\r\n").encode() + archive[:1000])
        begun = time.monotonic()
        told = client.request("HEAD", client.upload)
        assert told.status == 204 and time.monotonic() - begun < 5
        try:
            sock.sendall(archive[1000:5000])
        except OSError:
            pass
        assert client.request("HEAD", client.upload).offset == told.offset


def test_kill_9_and_going_on(tmp_path: Path, archive: bytes) -> None:
    store = tmp_path / "store"
    token = Tokens(store).new(allow=["upload"])[1]
    words = [sys.executable, "-m", "ckpt", "serve", "--store", str(store), "--listen", "127.0.0.1:0", "--write-only"]

    def begin() -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
        assert process.stdout is not None
        port = int(process.stdout.readline().rpartition(":")[2])
        assert process.stdout.readline().startswith("fingerprint sha256:")
        return process, port

    process, port = begin()
    try:
        client = Client(port, token)
        client.begin(len(archive))
        assert client.append(0, archive[:1_000_000]).status == 204
        process.kill()
        process.wait(10)
        process, client.port = begin()
        told = client.request("HEAD", client.upload)
        assert (told.status, told.offset) == (204, 1_000_000)
        client.append(1_000_000, archive[1_000_000:])
        done = client.finish(len(archive), hashlib.sha256(archive).digest())
        assert done.status == 201
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0
    finally:
        process.kill()
        process.wait(10)
    assert [c.ref for c in Catalog(store).all()] == ["web@1"]
    assert stat.S_IMODE((store / "serve" / "certificate.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((store / "serve" / "tokens.json").stat().st_mode) == 0o600
    assert token.split("_", 2)[2] not in (store / "serve" / "tokens.json").read_text()


# -- refusals ------------------------------------------------------------------------------------------------------


def test_a_wrong_digest_and_a_wrong_length(start: Start, archive: bytes) -> None:
    server = start()
    token = server.token("upload")
    client = server.client(token)
    client.begin()
    client.append(0, archive)
    refused = client.finish(len(archive), hashlib.sha256(b"other").digest())
    assert (refused.status, refused.json()["code"]) == (422, "digest-mismatch")
    assert client.request("HEAD", client.upload).status == 404
    client.begin(len(archive) + 5)
    client.append(0, archive)
    assert client.finish(len(archive), hashlib.sha256(archive).digest()).status == 422
    client.begin(10)
    assert client.append(0, archive).status == 413
    nothing_stored(server.store)
    assert client.send(archive).status == 201, "what came to nothing did not use up the token"


def test_what_is_no_archive(start: Start, archive: bytes) -> None:
    server = start()
    client = server.client(server.token("upload"))
    broken = bytearray(archive)
    broken[len(broken) // 2] ^= 1
    for data in (b"x" * 4096, archive[: len(archive) // 2], bytes(broken)):
        refused = client.send(data)
        assert refused.status == 422, refused.body
        assert refused.json()["message"] and refused.json()["code"] in ("archive-invalid", "digest-mismatch")
    assert Catalog(server.store).all() == []
    assert not list(server.store.glob("uploads/*/data"))


def test_too_large(start: Start, archive: bytes) -> None:
    server = start(max_bytes=100_000)
    client = server.client(server.token("upload"))
    assert client.begin(200_000).status == 413
    assert client.begin().status == 201
    assert client.append(0, bytes(100_001)).status == 413
    client.begin()
    chunked = client.request("PATCH", client.upload, {"Upload-Offset": "0", "Upload-Complete": "?0"}, iter([bytes(60_000)] * 3))
    assert chunked.status == 413
    assert client.request("PUT", "/x", body=bytes(100_001)).status == 413
    nothing_stored(server.store)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root for a small tmpfs")
def test_a_full_disk(tmp_path: Path, start: Start, archive: bytes) -> None:
    """507, and the room is given back."""
    store = tmp_path / "small"
    store.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", store], check=True, timeout=20)
    server = start(store)
    try:
        client = server.client(server.token("upload", uses=3))
        (store / "filler").write_bytes(bytes(5 << 19))
        assert client.begin(1 << 30).status == 507
        client.begin()
        assert client.append(0, bytes(3 << 20)).status == 204
        assert client.append(3 << 20, bytes(7 << 20)).status == 507
        assert client.request("HEAD", client.upload).status == 404
        nothing_stored(store)
        # It fits itself, but not beside what it unpacks to.
        small = client.send(archive)
        assert small.status == 507
        assert Catalog(store).all() == [] and not list(store.glob("uploads/*/data")) and not list(store.glob("tmp/*"))
    finally:
        server.close()
        subprocess.run(["umount", store], check=True, timeout=20)


@pytest.mark.parametrize(
    "path",
    [
        "/checkpoints/..%2F..%2Fetc",
        "/..%2fx",
        "/checkpoints/.hidden",
        "/checkpoints/a%00b",
        "/checkpoints/a%0ab",
        "/peer",
        "/checkpoints/-x",
        "/a%2Fb",
    ],
)
def test_names_are_data(start: Start, path: str) -> None:
    server = start()
    assert server.client(server.token("upload")).request("POST", path, {"Content-Length": "0"}).status in (400, 404, 405)
    nothing_stored(server.store)
    assert server.client(server.token("upload")).request("HEAD", "/uploads/..%2F..%2Fserve").status == 404


def test_bad_requests(start: Start) -> None:
    server = start()
    client = server.client(server.token("upload"))
    client.begin()
    assert client.request("PATCH", client.upload, {"Upload-Offset": "-1"}, b"x").status == 400
    assert client.request("PATCH", client.upload, {}, b"x").status == 400
    assert client.request("PATCH", client.upload, {"Upload-Offset": "0", "Upload-Complete": "yes"}, b"x").status == 400
    assert client.request("PATCH", client.upload, {"Upload-Offset": "0", "Upload-Complete": "?1", "Content-Length": "0"}).status == 400
    assert client.request("POST", client.path, {"Upload-Length": "9" * 40, "Content-Length": "0"}).status == 400
    assert client.request("TRACE", "/checkpoints").status == 405
    wrong = client.request("GET", "/nowhere/at/all")
    assert wrong.status == 404 and wrong.headers["Content-Type"].startswith("application/problem+json") and wrong.json()["message"]
    assert client.request("HEAD", client.upload).offset == 0
    assert client.request("DELETE", client.upload).status == 204
    assert client.request("DELETE", client.upload).status == 404
    nothing_stored(server.store)


# -- who gets in ---------------------------------------------------------------------------------------------------


def test_tokens(start: Start, archive: bytes) -> None:
    server = start()
    assert server.client().begin().status == 401
    once = server.token("upload")
    client = server.client(once)
    client.begin()
    assert server.client(once).begin().status == 403, "one use is one upload"
    assert server.client(server.token("upload")).request("HEAD", client.upload).status == 404, "another's upload is nowhere"
    client.append(0, archive)
    assert client.finish(len(archive), hashlib.sha256(archive).digest()).status == 201
    assert server.client(once).send(archive).status == 403, "used up"
    assert server.client(server.token("download")).begin().status == 403
    assert server.client(server.token("upload", expires_s=-1)).begin().status == 401
    assert len(Catalog(server.store).all()) == 1


def test_guessing_is_slowed(start: Start) -> None:
    server = start()
    right = server.token("upload")
    wrong = right[:-4] + "AAAA"
    answers = [server.client(wrong).begin().status for _ in range(limits.FREE_TRIES + 1)]
    assert answers == [401] * limits.FREE_TRIES + [429]
    late = server.client(right).begin()
    assert late.status == 429 and int(late.headers["Retry-After"]) > 0


def test_token_store(tmp_path: Path) -> None:
    now = [1000.0]
    tokens = Tokens(tmp_path, now=lambda: now[0])
    made, text = tokens.new(uses=2, expires_s=60, allow=["migrate", "upload"])
    assert made.allow == ("upload", "migrate")
    assert tokens.verify(text) is not None
    for wrong in ("", text + "x", text[:-1], text.upper(), f"ckpt_{'0' * 12}_{text[-43:]}", "Bearer"):
        assert tokens.verify(wrong) is None
    assert [tokens.claim(made.id, use) for use in ("a", "a", "b", "c")] == ["open", "open", "open", ""]
    tokens.release(made.id, "b")
    assert tokens.claim(made.id, "c") == "open"
    tokens.finish(made.id, "a")
    assert tokens.claim(made.id, "a") == "done"
    tokens.release(made.id, "a")
    assert tokens.claim(made.id, "d") == ""
    assert [token.id for token in tokens.all()] == [made.id]
    now[0] += 60
    assert tokens.verify(text) is None and tokens.all() == [] and tokens.claim(made.id, "a") == ""
    other, _ = tokens.new()
    assert json.loads((tmp_path / "serve/tokens.json").read_text()).keys() == {other.id}, "expired ones go"
    tokens.revoke(other.id)
    with pytest.raises(TargetNotFound):
        tokens.revoke(other.id)
    for options in ({"allow": ["root"]}, {"allow": []}, {"uses": 0}):
        with pytest.raises(UsageError):
            tokens.new(**options)  # type: ignore[arg-type]


def with_certificate(tmp_path: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    path = tmp_path / f"{name}.pem"
    path.write_bytes(certificate.make(name))
    path.chmod(0o600)
    context = unverified()
    context.load_cert_chain(path)
    return path, context


def test_client_certificates(tmp_path: Path, start: Start, archive: bytes) -> None:
    known, context = with_certificate(tmp_path, "known")
    _, stranger = with_certificate(tmp_path, "stranger")
    server = start(client_ca=known)
    assert Client(server.port, context=context).send(archive).status == 201
    assert Client(server.port).begin().status == 401
    with pytest.raises((ssl.SSLError, ConnectionError)):
        Client(server.port, context=stranger).begin()
    server.close()
    other = start(tmp_path / "other", client_ca=known, client_fingerprints=frozenset({"sha256:" + "0" * 64}))
    assert Client(other.port, context=context).begin().status == 401


@pytest.mark.parametrize(("allow", "upload", "download"), [("upload", 201, 403), ("download", 403, 200)])
def test_one_way_only(start: Start, allow: str, upload: int, download: int) -> None:
    server = start(allow=frozenset({allow}))
    client = server.client(server.token("upload", "download", "migrate", uses=9))
    assert client.begin().status == upload
    assert client.request("GET", "/checkpoints").status == download
    refused = client.request("GET", "/peer", {"Upgrade": "ckpt-peer", "Connection": "Upgrade", "Ckpt-Session": "0" * 32})
    assert refused.status == 403 and "migrate" in refused.json()["message"]


# -- reading -------------------------------------------------------------------------------------------------------


def test_downloads(start: Start, archive: bytes, tmp_path: Path) -> None:
    server = start()
    client = server.client(server.token("upload", "download", uses=9))
    client.send(archive)
    (listed,) = client.request("GET", "/checkpoints").json()["checkpoints"]
    assert listed["ref"] == "web@1"
    whole = client.request("GET", "/checkpoints/web@1")
    assert whole.status == 200 and int(whole.headers["Content-Length"]) == len(whole.body)
    assert whole.headers["ETag"] == listed["etag"]
    middle = len(whole.body) // 3
    rest = client.request("GET", "/checkpoints/web", {"Range": f"bytes={middle}-", "If-Range": whole.headers["ETag"]})
    assert rest.status == 206 and rest.body == whole.body[middle:]
    assert rest.headers["Content-Range"] == f"bytes {middle}-{len(whole.body) - 1}/{len(whole.body)}"
    assert client.request("GET", "/checkpoints/web", {"Range": "bytes=5-9"}).body == whole.body[5:10]
    assert client.request("GET", "/checkpoints/web", {"Range": f"bytes={middle}-", "If-Range": '"other"'}).status == 200
    assert client.request("GET", "/checkpoints/web", {"Range": f"bytes={len(whole.body)}-"}).status == 416
    packed = client.request("GET", "/checkpoints/web?compress=zstd")
    assert packed.status == 200 and len(packed.body) < len(whole.body)
    assert client.request("HEAD", "/checkpoints/web").headers["Content-Length"] == str(len(whole.body))
    assert client.request("GET", "/checkpoints/web@7").status == 404
    assert client.request("GET", "/checkpoints/..%2f..%2fetc").status == 404
    once = server.client(server.token("download"))
    assert once.request("GET", "/checkpoints/web").status == once.request("GET", "/checkpoints/web").status == 200
    again = server.client(server.token("upload"), path="/checkpoints/again")
    assert again.send(whole.body).json()["ref"] == "again@1"
    assert once.request("GET", "/checkpoints/again").status == 403, "one use is one checkpoint"
    assert again.request("GET", "/checkpoints/web").status == 403


# -- patience ------------------------------------------------------------------------------------------------------


def test_who_says_nothing_is_shown_the_door(start: Start) -> None:
    """No request, half a head, a body that does not come: each ends, and others are served meanwhile."""
    server = start(head_s=0.6, silence_s=0.6)
    client = server.client(server.token("upload", uses=9))
    client.begin()
    connections = []
    for text in ("", "GET /checkpo"):
        connections.append(unverified().wrap_socket(socket.create_connection(("127.0.0.1", server.port), 20)))
        connections[-1].sendall(text.encode())
    slow = unverified().wrap_socket(socket.create_connection(("127.0.0.1", server.port), 20))
    head = f"PATCH {client.upload} HTTP/1.1\r\nHost: b\r\nUpload-Offset: 0\r\nContent-Length: 500\r\n"
    slow.sendall((head + f"Authorization: {client.headers['Authorization']}\r\n\r\nabc").encode())
    begun = time.monotonic()
    assert b" 408 " in slow.recv(4096).partition(b"\r\n")[0]
    for sock in connections:
        try:
            assert sock.recv(10) == b""
        except ConnectionError:
            pass
    assert time.monotonic() - begun < 10
    assert client.request("HEAD", client.upload).offset == 3, "what came is kept"
    for sock in (*connections, slow):
        sock.close()


def test_a_trickle_is_too_slow(start: Start) -> None:
    server = start(silence_s=0.5, least_bytes_s=1000.0)
    client = server.client(server.token("upload"))
    client.begin()
    with unverified().wrap_socket(socket.create_connection(("127.0.0.1", server.port), 20)) as slow:
        head = f"PATCH {client.upload} HTTP/1.1\r\nHost: b\r\nUpload-Offset: 0\r\nContent-Length: 5000\r\n"
        slow.sendall((head + f"Authorization: {client.headers['Authorization']}\r\n\r\n").encode())
        slow.settimeout(0.1)
        said = b""
        for _ in range(60):
            try:
                slow.sendall(b"x")
                said += slow.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                break
            if said:
                break
    assert b" 408 " in said.partition(b"\r\n")[0]


def test_connections_are_few(start: Start) -> None:
    server = start(max_connections=3)
    client = server.client(server.token("upload"))
    held = [unverified().wrap_socket(socket.create_connection(("127.0.0.1", server.port), 20)) for _ in range(3)]
    with pytest.raises((ConnectionError, ssl.SSLError, OSError)):
        client.begin()
    for sock in held:
        sock.close()

    def served() -> bool:
        try:
            return client.begin().status == 201
        except OSError:
            return False

    wait_until(served)


def test_the_rate(start: Start, archive: bytes) -> None:
    server = start(rate_bytes_s=1 << 20)
    client = server.client(server.token("upload"))
    client.begin()
    begun = time.monotonic()
    assert client.append(0, archive[:2_500_000]).status == 204
    assert 1.0 < time.monotonic() - begun < 6


def test_old_uploads_go(start: Start) -> None:
    server = start()
    token = server.token("upload")
    client = server.client(token)
    client.begin()
    assert server.service is not None
    assert server.service.uploads.stale() == []
    (gone,) = server.service.uploads.stale(time.time() + 90_000)
    assert client.request("HEAD", client.upload).status == 404
    gone.remove()
    assert gone.directory.exists() is False


def test_one_server_a_store(start: Start) -> None:
    server = start()
    with pytest.raises(BusyError):
        start(server.store)


@pytest.mark.parametrize(
    ("text", "parsed"), [(":7443", (None, 7443)), ("10.0.0.2", ("10.0.0.2", 7443)), ("[::1]:8", ("::1", 8)), ("[::1]", ("::1", 7443))]
)
def test_addresses(text: str, parsed: tuple[str | None, int]) -> None:
    assert listen.parse_address(text) == parsed
    for wrong in ("x:y", ":99999", "a:-1"):
        with pytest.raises(UsageError):
            listen.parse_address(wrong)


# -- the command ---------------------------------------------------------------------------------------------------


def ckpt(store: Path, *words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "ckpt", "--store", str(store), "serve", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=Path(__file__).parents[2])


def test_token_command(tmp_path: Path) -> None:
    made = ckpt(tmp_path, "token", "new", "--allow", "migrate", "--expires", "2h", "--uses", "3")
    assert made.returncode == 0, made
    token = Tokens(tmp_path).verify(made.stdout.strip())
    assert token is not None and token.allow == ("migrate",) and token.uses == 3 and round(token.expires_s - token.created_s) == 7200
    listed = ckpt(tmp_path, "token", "list")
    assert token.id in listed.stdout and "used 0 of 3" in listed.stdout and made.stdout.strip() not in listed.stdout
    assert ckpt(tmp_path, "token", "revoke", token.id).returncode == 0
    assert ckpt(tmp_path, "token", "revoke", token.id).returncode == TargetNotFound.exit_code


@pytest.mark.parametrize(
    "words",
    [
        ["token"],
        ["nonsense"],
        ["token", "new", "--allow", "root"],
        ["--uses", "2"],
        ["--write-only", "--read-only"],
        ["--listen", "x:y"],
        ["--key", "k"],
        ["--client-fingerprint", "sha256:00", "--client-ca", "x"],
        ["--max-size", "much"],
        ["--stdio", "--once"],
        ["--restrict-to-path", "/nowhere"],
    ],
)
def test_wrong_usage(tmp_path: Path, words: list[str]) -> None:
    done = ckpt(tmp_path / "store", *words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") <= 3, done
    assert not (tmp_path / "store").exists()


# -- what the configuration says of archives -----------------------------------------------------------------------


def test_downloads_are_encrypted_and_uploads_opened(start: Start, archive: bytes, tmp_path: Path) -> None:
    pyrage = pytest.importorskip("pyrage")
    from ckpt.archive import seal, trust

    identity = pyrage.x25519.Identity.generate()
    key = tmp_path / "key"
    key.write_text(str(identity) + "\n")
    key.chmod(0o600)
    outgoing = trust.Outgoing(seal.recipients((f"age:{identity.to_public()}",), None))
    server = start(outgoing=outgoing, incoming=trust.Incoming(seal.identities((key,), None)))
    client = server.client(server.token(uses=9))
    assert client.send(archive).json()["ref"] == "web@1", "clear ones are taken, too"
    given = client.request("GET", "/checkpoints/web")
    assert given.status == 200 and seal.is_sealed(given.body[:64]) and "ETag" not in given.headers
    assert given.headers["Accept-Ranges"] == "none" and "Content-Length" not in given.headers
    assert client.request("GET", "/checkpoints/web", {"Range": "bytes=10-"}).status == 200
    assert client.send(given.body).json()["ref"] == "web@2"
    stranger = start(tmp_path / "other")
    refused = stranger.client(stranger.token()).send(given.body)
    assert (refused.status, refused.json()["code"]) == (422, "key")


def test_unsigned_uploads(start: Start, archive: bytes, tmp_path: Path) -> None:
    from ckpt.archive import signature, trust

    signers = tmp_path / "signers"
    signers.write_text("")
    server = start(incoming=trust.Incoming((), signature.Demand(signers, required=True, local=True)))
    refused = server.client(server.token()).send(archive)
    assert refused.status == 422 and refused.json()["code"] in ("digest-mismatch", "key"), refused.body
    assert Catalog(server.store).all() == []
