"""`ckpt peer` behind `ckpt serve`: the way there, pins, refusals, throughput, a link that breaks; and the forced command."""

from __future__ import annotations

import json
import os
import shlex
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt.errors import CannotConnect, CkptError, FeatureMissing, KeyProblem, RemoteRefused, TransferFailed, UsageError
from ckpt.model import Carriage
from ckpt.peer import client
from ckpt.serve import certificate, forced, listen, tunnel
from ckpt.transports import https_pins
from ckpt.transports.https_peer import Access
from ckpt.transports.https_peer import Server as Address
from tests.unit.serving import Server

TOP = Path(__file__).parents[2]
ECHO = """
import sys; sys.path.insert(0, {top!r})
from pathlib import Path
from ckpt.peer import server
def receive(session, args):
    into = Path(args["into"]); into.mkdir(exist_ok=True)
    files = session.receive_files(into, allow=lambda path: True)
    return {{"files": len(files)}}
def lost():
    Path({mark!r}).write_text("undone")
def hang_on(session, args):
    session.on_lost(lost)
    return {{}}
sys.exit(server.main({{"echo": lambda session, args: args, "receive": receive, "hang-on": hang_on}}))
"""


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Servers whose peers echo, receive files, and leave a mark when their link is lost."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    body = ECHO.format(top=str(TOP), mark=str(tmp_path / "mark"))

    def start_peer(store: Path, end: socket.socket, *, ask: bool) -> Any:
        from ckpt.host.run import spawn

        return spawn([sys.executable, "-c", body], stdin=end.fileno(), stdout=end.fileno(), stderr=None, new_session=True)

    monkeypatch.setattr(tunnel, "start_peer", start_peer)
    made: list[Server] = []

    def start(**options: Any) -> Server:
        made.append(Server(tmp_path / f"store{len(made)}", **options))
        return made[-1]

    yield start
    for server in made:
        server.close()


def access(server: Server, tmp_path: Path, token: str | None = None, **more: Any) -> Access:
    path = tmp_path / "token"
    path.write_text((token or server.token("migrate")) + "\n")
    path.chmod(0o600)
    return Access(**{"fingerprint": server.fingerprint, "token_file": str(path), **more})


def url(server: Server) -> str:
    return f"https://127.0.0.1:{server.port}"


def wait_until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_calls_and_files(served: Callable[..., Server], tmp_path: Path) -> None:
    server = served()
    data = os.urandom(3 << 20) + bytes(1 << 20)
    (tmp_path / "file").write_bytes(data)
    with client.connect(url(server), access=access(server, tmp_path)) as peer:
        assert peer.call("echo", {"a": 1}) == {"a": 1}
        assert peer.send_stage(tmp_path, ["file"], verb="receive", args={"into": str(tmp_path / "into")}) == {"files": 1}
        assert peer.statistics()["carrier"] == "https"
    assert (tmp_path / "into/file").read_bytes() == data
    assert not (tmp_path / "mark").exists()


def test_a_token_is_one_migration(served: Callable[..., Server], tmp_path: Path) -> None:
    """Cut, it may come again; after its goodbye it may not, and with another session never."""
    server = served()
    one = access(server, tmp_path)
    with pytest.raises(ZeroDivisionError), client.connect(url(server), access=one) as peer:
        peer.call("hang-on")
        raise ZeroDivisionError
    wait_until((tmp_path / "mark").exists)
    other = Access.from_json({**one.to_json(), "session": "0" * 32})
    with pytest.raises(RemoteRefused, match="used up"), client.connect(url(server), access=other):
        pass
    again = Access.from_json(json.loads(json.dumps(one.to_json())))
    with client.connect(url(server), access=again) as peer:
        assert peer.call("echo") == {}
    wait_until(lambda: all(state == "done" for token in server.tokens._read().values() for state in token.claims.values()))
    with pytest.raises(RemoteRefused, match="used up"), client.connect(url(server), access=again):
        pass
    with client.connect(url(server), access=again, purpose="check") as peer:
        assert peer.call("echo") == {}, "questions use up nothing"


def test_a_server_that_ends_cuts_the_link(served: Callable[..., Server], tmp_path: Path) -> None:
    server = served()
    with pytest.raises(TransferFailed, match="lost the link to 127"), client.connect(url(server), access=access(server, tmp_path)) as peer:
        peer.call("hang-on")
        server.cut()
        while True:
            peer.call("echo")
            time.sleep(0.05)
    wait_until((tmp_path / "mark").exists)


def test_a_server_that_is_stopped(served: Callable[..., Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits a while for the migration, then cuts it; the peer undoes what it began."""
    monkeypatch.setattr(listen, "STOP_S", 0.3)
    server = served()
    with pytest.raises(TransferFailed), client.connect(url(server), access=access(server, tmp_path)) as peer:
        peer.call("hang-on")
        began_s = time.monotonic()
        server.close()
        assert time.monotonic() - began_s < 20
        wait_until((tmp_path / "mark").exists)
        peer.call("echo")


@pytest.mark.timeout(120)
def test_it_is_fast(served: Callable[..., Server], tmp_path: Path) -> None:
    """Content goes through at a rate that no Python per byte could have; the figure is printed."""
    server = served()
    size = 128 << 20
    path = tmp_path / "file"
    with path.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    with client.connect(url(server), access=access(server, tmp_path), carriage=Carriage()) as peer:
        began = time.monotonic()
        peer.send_stage(tmp_path, ["file"], verb="receive", args={"into": str(tmp_path / "into")})
        took = time.monotonic() - began
    print(f"{(size >> 20) / took:.0f} MiB/s")
    assert took < 20
    (tmp_path / "into/file").unlink()


# -- whom we trust -------------------------------------------------------------------------------------------------


def test_pins(served: Callable[..., Server], tmp_path: Path) -> None:
    server = served()
    token = server.token("migrate", uses=9)
    with pytest.raises(RemoteRefused, match="not trusted"), client.connect(url(server), access=access(server, tmp_path, token, fingerprint=None)):
        pass
    wrong = "sha256:" + "0" * 64
    other = access(server, tmp_path, token, fingerprint=wrong)
    with pytest.raises(RemoteRefused, match="another certificate"), client.connect(url(server), access=other):
        pass
    assert https_pins.known(f"127.0.0.1:{server.port}") is None
    with client.connect(url(server), access=access(server, tmp_path, token)):
        pass
    assert https_pins.known(f"127.0.0.1:{server.port}") == server.fingerprint
    assert stat.S_IMODE(https_pins.user_file().stat().st_mode) == 0o600
    with client.connect(url(server), access=access(server, tmp_path, token, fingerprint=None)):
        pass
    port = server.port
    server.close()
    other = served(port=port)
    assert other.fingerprint != server.fingerprint
    with pytest.raises(RemoteRefused, match="has changed") as caught, client.connect(url(other), access=access(other, tmp_path, fingerprint=None)):
        pass
    assert caught.value.exit_code == 43 and "--fingerprint" in str(caught.value.hint)


def test_an_authority(served: Callable[..., Server], tmp_path: Path) -> None:
    """A self-made certificate can be its own authority; the name must be the one that is asked for."""
    server = served()
    own = certificate.own(server.store)
    with (
        pytest.raises(RemoteRefused, match="not trusted"),
        client.connect(url(server), access=access(server, tmp_path, fingerprint=None, ca=str(own))),
    ):
        pass
    with pytest.raises(KeyProblem), client.connect(url(server), access=access(server, tmp_path, fingerprint=None, ca=str(tmp_path / "none"))):
        pass


def test_client_certificates(served: Callable[..., Server], tmp_path: Path) -> None:
    path = tmp_path / "client.pem"
    path.write_bytes(certificate.make("client"))
    path.chmod(0o600)
    server = served(client_ca=path)
    with client.connect(url(server), access=Access(fingerprint=server.fingerprint, certificate=str(path))) as peer:
        assert peer.call("echo") == {}


def test_tokens_are_secret(served: Callable[..., Server], tmp_path: Path) -> None:
    server = served()
    good = access(server, tmp_path)
    assert good.token_file is not None
    token = Path(good.token_file).read_text().strip()
    assert Access(token_command=("echo", token)).token() == token
    with pytest.raises(KeyProblem) as caught:
        Access(token_command=("sh", "-c", f"echo {token}; exit 3")).token()
    assert token not in str(caught.value)
    with pytest.raises(KeyProblem):
        Access(token_file=str(tmp_path / "none")).token()
    with pytest.raises(KeyProblem):
        Access(token_command=("printf", "a\\rX: y")).token()
    with pytest.raises(RemoteRefused, match="401"), client.connect(url(server), access=Access(fingerprint=server.fingerprint)):
        pass


@pytest.mark.parametrize(
    "text", ["https://", "https://b/x", "https://u:p@b", "https://b:0x", "https://b?x", "https://b#x", "https://b:99999", "https://b c"]
)
def test_unusable_addresses(text: str) -> None:
    with pytest.raises(UsageError):
        Address.parse(text)


def test_addresses() -> None:
    assert str(Address.parse("https://b")) == "b:443" and str(Address.parse("HTTPS://b:1/")) == "b:1"
    assert str(Address.parse("https://[::1]:2")) == "[::1]:2"


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\n\r\n", RemoteRefused, "302"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", RemoteRefused, "404"),
        (b"HTTP/1.1 401 No\r\n\r\n", RemoteRefused, "401"),
        (b"HTTP/1.1 403 No\r\nContent-Length: 35\r\n\r\n{\"message\": \"not \\u001b[31m you\"}", RemoteRefused, "not [31m you"),
        (b"HTTP/1.1 413 No\r\n\r\n", RemoteRefused, "413"),
        (b"HTTP/1.1 429 Slow\r\n\r\n", CannotConnect, "429"),
        (b"HTTP/1.1 503 Later\r\n\r\n", CannotConnect, "503"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", RemoteRefused, "200"),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: websocket\r\n\r\n", RemoteRefused, "another protocol"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", RemoteRefused, "does not speak HTTP"),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: ckpt-peer\r\n\r\n", CannotConnect, "ended before it spoke"),
        (b"", CannotConnect, "broke off"),
        (b"x" * 40_000, CannotConnect, "too long"),
    ],
)  # fmt: skip
def test_other_answers(answer: bytes, kind: type[CkptError], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    serving = certificate.serving(certificate.own(tmp_path / "store"))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            plain, _ = listener.accept()
            with serving.context.wrap_socket(plain, server_side=True) as sock:
                sock.recv(65536)
                sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with (
            pytest.raises(kind) as caught,
            client.connect(f"https://127.0.0.1:{listener.getsockname()[1]}", access=Access(fingerprint=serving.fingerprint), timeout_s=5),
        ):
            pass
        thread.join()
    assert said in caught.value.message and "\x1b" not in caught.value.message
    assert type(caught.value) is kind


def test_nobody_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(CannotConnect, match="no answer in time"), client.connect(f"https://127.0.0.1:{port}", access=Access(), timeout_s=0.3):
            pass
    with pytest.raises(CannotConnect, match="refused") as caught, client.connect(f"https://127.0.0.1:{port}"):
        pass
    assert "ckpt serve" in str(caught.value.hint)
    with pytest.raises(UsageError, match="ssh only"), client.connect(f"https://127.0.0.1:{port}", carriage=Carriage(streams=2)):
        pass


def test_questions_only() -> None:
    """`ckpt peer --ask` begins nothing."""
    from ckpt.peer.client import Peer

    mine, theirs = socket.socketpair()
    process = subprocess.Popen([sys.executable, "-m", "ckpt", "peer", "--ask"], stdin=theirs, stdout=theirs, cwd=TOP)
    theirs.close()
    fd = mine.detach()
    peer = Peer(fd, fd)
    try:
        assert peer.link.handshake(20)
        assert "facts" in peer.call("facts", {})
        with pytest.raises(FeatureMissing):
            peer.call("begin", {"engine": "podman"})
    finally:
        peer.close()
        process.wait(20)


# -- forced command ------------------------------------------------------------------------------------------------

ALL = ("upload", "download", "migrate")


@pytest.mark.parametrize(
    ("command", "permission", "words"),
    [
        ("ckpt peer", "migrate", ["peer", "--guest"]),
        ("ckpt peer --join /tmp/ckpt-streams-ab12/socket", "migrate", ["peer", "--guest", "--join", "/tmp/ckpt-streams-ab12/socket"]),
        ("ckpt import -", "upload", ["import", "--", "-"]),
        ("ckpt import --name=web -", "upload", ["import", "--name", "web", "--", "-"]),
        ("ckpt import -n web -", "upload", ["import", "--name", "web", "--", "-"]),
    ],
)
def test_what_a_forced_command_lets_through(command: str, permission: str, words: list[str], tmp_path: Path) -> None:
    allowed = forced.permitted(command, ALL, store=tmp_path)
    assert allowed.permission == permission
    assert allowed.words == [words[0], "--store", str(tmp_path), *words[1:]]
    for less in ((), tuple(set(ALL) - {permission})):
        with pytest.raises(RemoteRefused, match="does not allow"):
            forced.permitted(command, less, store=tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        None, "",
        "ckpt", "sh", "bash -c id", "ckpt list", "ckpt rm -a", "ckpt restore web", "ckpt peer; id", "ckpt peer && id",
        "ckpt peer --store /x",
        "ckpt import /etc/shadow", "ckpt import", "ckpt import - -", "ckpt import --store /x -", "ckpt import --name ../x -", "ckpt import -n -x -",
        "ckpt import -n a -n b -", "ckpt export web -o /etc/passwd", "ckpt export web -o out", "ckpt export", "ckpt export web",
        "ckpt export -R web -o -",
        "ckpt export podman:web -o -", "ckpt export ../x -o -", "ckpt export missing -o -", "ckpt peer --join /etc/passwd",
        "ckpt peer --join /tmp/../ckpt-streams-x/../../etc", "ckpt peer\nid", "ckpt 'peer", "/tmp/ckpt peer", "CKPT_FAULT=x ckpt peer",
        "ckpt import $(id)",
        "x" * 5000,
    ],
)  # fmt: skip
def test_what_it_refuses(command: str | None, tmp_path: Path) -> None:
    with pytest.raises(RemoteRefused) as caught:
        forced.permitted(command, ALL, store=tmp_path)
    assert "\n" not in caught.value.message


def stdio(store: Path, command: str, *flags: str, given: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    words = [sys.executable, "-m", "ckpt", "serve", "--stdio", "--restrict-to-path", str(store), *flags]
    env = {**os.environ, "SSH_ORIGINAL_COMMAND": command, "PYTHONPATH": str(TOP)}
    return subprocess.run(words, input=given, capture_output=True, timeout=60, env=env)


def test_forced_command_import_and_export(tmp_path: Path) -> None:
    import io

    from ckpt.archive import writer
    from ckpt.archive.members import StageMembers
    from ckpt.store.catalog import Catalog
    from tests.unit.test_archive_reader import make_stage

    out = io.BytesIO()
    writer.write(StageMembers(make_stage(tmp_path / "stage")), out)
    store = tmp_path / "store"
    small = stdio(store, "ckpt import -", "--max-size", "1M", given=out.getvalue())
    assert small.returncode == 43 and b"larger" in small.stderr, small.stderr
    assert Catalog(store).all() == []
    done = stdio(store, "ckpt import -n given -", "--write-only", "--max-size", "100M", given=out.getvalue())
    assert done.returncode == 0 and b"given@1" in done.stdout, done.stderr
    refused = stdio(store, "ckpt export given -o -", "--write-only")
    assert refused.returncode == 43 and refused.stdout == b"" and refused.stderr.count(b"\n") <= 2
    given = stdio(store, f"ckpt export {shlex.quote('given@1')} -o -", "--read-only")
    assert given.returncode == 0 and len(given.stdout) > 1_000_000, given.stderr
    assert stdio(store, "ckpt peer", "--write-only").returncode == 43
