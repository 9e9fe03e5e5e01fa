"""The ssh carrier against an SFTP server that dies at any byte, and refuses in every way."""

from __future__ import annotations

import os
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ckpt.errors import CannotConnect, CkptError, RemoteRefused, TargetNotFound, TransferFailed, UsageError
from ckpt.transports.base import CarrierOptions, Location, Payload, carrier_of
from ckpt.transports.ssh_file import parse

CHUNK = 128 << 10
QUICK = CarrierOptions(chunk_bytes=CHUNK, idle_timeout_s=5.0, retry_limit_s=10.0)
HASTY = replace(QUICK, idle_timeout_s=0.3, retry_limit_s=0.5)
DOUBLE = Path(__file__).with_name("sftp_double.py")


class Remote:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "root"
        (self.root / "srv").mkdir(parents=True)

    def mode(self, mode: str) -> None:
        (self.directory / "mode").write_text(mode)

    def cuts(self, *cuts: int | str) -> None:
        (self.directory / "cuts").write_text("\n".join(map(str, cuts)))

    @property
    def taken_bytes(self) -> int:
        return sum(map(int, (self.directory / "taken").read_text().split()))

    def there(self) -> list[str]:
        return sorted(str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file())


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Remote:
    # Without the site's modules: it starts fifty times.
    monkeypatch.setenv("CKPT_SSH", f"{sys.executable} -I -S {DOUBLE} {tmp_path}")
    return Remote(tmp_path)


def get(url: str, options: CarrierOptions = QUICK, piece: int = 50_000) -> bytes:
    location = Location.parse(url)
    data = bytearray()
    with carrier_of(location).open_read(location, options) as reading:
        while got := reading.read(piece):
            assert len(got) <= piece
            data += got
        assert reading.size_bytes == len(data)
    return bytes(data)


def put(url: str, data: bytes, options: CarrierOptions = QUICK) -> None:
    location = Location.parse(url)
    with carrier_of(location).open_write(location, options, Payload()) as writing:
        for at in range(0, len(data), 50_000):
            assert writing.write(memoryview(data)[at : at + 50_000]) == len(data[at : at + 50_000])
        assert writing.commit().size_bytes == len(data)


@pytest.mark.parametrize(
    ("text", "host", "path"),
    [
        ("b:web.tar", "b", "web.tar"),
        ("me@b:/srv/a b:c'", "me@b", "/srv/a b:c'"),
        ("b:~/web.tar", "b", "web.tar"),
        ("me@[::1]:x", "me@::1", "x"),
        ("ssh://me@b:2222/srv/a%20b", "me@b:2222", "/srv/a b"),
        ("ssh://b/~/x", "b", "x"),
    ],
)
def test_places(text: str, host: str, path: str) -> None:
    destination, found = parse(Location.parse(text))
    assert (str(destination), found) == (host, path)


@pytest.mark.parametrize("text", ["b:", "b:/srv/", "ssh://b", "ssh://b/", "b:..", "-oProxyCommand=x:y", "ssh://-b/x"])
def test_what_is_no_place(text: str) -> None:
    with pytest.raises(UsageError):
        parse(Location.parse(text))


def test_there_and_back(remote: Remote) -> None:
    data = os.urandom(1_000_000)
    put("me@b:/srv/web.tar", data)
    assert remote.there() == ["srv/web.tar"] and (remote.root / "srv/web.tar").stat().st_mode & 0o777 == 0o600
    assert get("ssh://b/srv/web.tar") == data
    put("b:srv/web.tar", b"again")
    assert get("b:srv/web.tar", piece=1) == b"again"
    put("b:srv/empty", b"")
    assert get("b:srv/empty") == b""


def test_an_upload_interrupted_at_a_random_byte_50_times_arrives_and_little_is_sent_twice(remote: Remote) -> None:
    choose = random.Random(6)
    data = choose.randbytes(4_000_000)
    # A connection that lives for less than a block brings nothing on.
    cuts = [choose.randrange(40_000, 120_000) for _ in range(50)]
    remote.cuts(*cuts)
    put("b:web.tar", data)
    assert remote.there() == ["web.tar"] and (remote.root / "web.tar").read_bytes() == data
    assert (remote.directory / "cuts").read_text() == ""
    assert remote.taken_bytes <= len(data) + 50 * (CHUNK + 1000)


def test_a_download_interrupted_50_times_arrives(remote: Remote) -> None:
    choose = random.Random(7)
    (remote.root / "web.tar").write_bytes(choose.randbytes(14_000_000))
    # What it takes in are requests for 32 KiB, of 30 bytes.
    remote.cuts(*[choose.randrange(150, 300) for _ in range(50)])
    assert get("b:web.tar") == (remote.root / "web.tar").read_bytes()
    assert (remote.directory / "cuts").read_text() == ""


def test_reads_that_give_less_than_was_asked(remote: Remote) -> None:
    (remote.root / "web.tar").write_bytes(os.urandom(300_000))
    remote.mode("short")
    assert get("b:web.tar", piece=10_000) == (remote.root / "web.tar").read_bytes()


@pytest.mark.parametrize("back", [0, 10, 40, 100, 150])
def test_an_end_that_is_interrupted(remote: Remote, back: int) -> None:
    """Also after the rename, when only its answer is lost."""
    put("b:web.tar", b"x" * 10_000)
    remote.cuts(remote.taken_bytes - back)
    put("b:web.tar", b"y" * 10_000)
    assert remote.there() == ["web.tar"] and (remote.root / "web.tar").read_bytes() == b"y" * 10_000


def test_a_file_that_changes_meanwhile_is_not_mixed(remote: Remote) -> None:
    path = remote.root / "web.tar"
    path.write_bytes(bytes(6_000_000))
    remote.cuts(300)
    location = Location.parse("b:web.tar")
    with pytest.raises(TransferFailed, match="changed"), carrier_of(location).open_read(location, QUICK) as reading:
        assert reading.read(10)
        path.write_bytes(b"\1" * 6_000_001)
        while reading.read(100_000):
            pass


def test_a_file_that_becomes_shorter(remote: Remote) -> None:
    path = remote.root / "web.tar"
    path.write_bytes(bytes(9_000_000))
    location = Location.parse("b:web.tar")
    with pytest.raises(TransferFailed, match="shorter"), carrier_of(location).open_read(location, QUICK) as reading:
        assert reading.read(10)
        os.truncate(path, 5_000_000)
        while reading.read(100_000):
            pass


def test_leaving_without_commit_leaves_nothing(remote: Remote) -> None:
    put("b:web.tar", b"as before")
    location = Location.parse("b:web.tar")
    with pytest.raises(KeyboardInterrupt), carrier_of(location).open_write(location, QUICK, Payload()) as writing:
        writing.write(bytes(500_000))
        raise KeyboardInterrupt
    assert remote.there() == ["web.tar"] and (remote.root / "web.tar").read_bytes() == b"as before"


def test_a_host_that_stays_away(remote: Remote) -> None:
    remote.cuts(100_000, *[0] * 100)
    with pytest.raises(TransferFailed, match="tried"):
        put("b:web.tar", bytes(1_000_000), HASTY)
    assert "web.tar" not in remote.there()
    remote.cuts(*[0] * 100)
    for act in (lambda: put("b:web.tar", b"x", HASTY), lambda: get("b:web.tar", HASTY)):
        with pytest.raises(CannotConnect):
            act()


@pytest.mark.parametrize(("mode", "kind", "words"), [("nosub", RemoteRefused, "no SFTP"), ("chatter", RemoteRefused, "not speak SFTP"),
    ("silent", CannotConnect, "no answer"), ("full", RemoteRefused, "no space"), ("readonly", RemoteRefused, "permission denied")])  # fmt: skip
def test_refusals(remote: Remote, mode: str, kind: type[CkptError], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckpt.transports.ssh_sftp.LOGIN_LIMIT_S", 0.5)
    remote.mode(mode)
    with pytest.raises(kind, match=words):
        put("b:web.tar", bytes(100_000))
    assert remote.there() == []


def test_what_is_not_there(remote: Remote) -> None:
    location = Location.parse("b:no/web.tar")
    for act in (lambda: put("b:no/web.tar", b""), lambda: carrier_of(location).check_write(location, QUICK)):
        with pytest.raises(RemoteRefused, match="not there"):
            act()
    with pytest.raises(TargetNotFound):
        get("b:web.tar")
    with pytest.raises(TargetNotFound, match="no regular file"):
        get("b:srv")
    with pytest.raises(RemoteRefused, match="is a directory"):
        put("b:srv", b"")


def test_a_server_without_extensions(remote: Remote) -> None:
    remote.mode("v3")
    put("b:web.tar", b"x" * 100_000)
    with pytest.raises(RemoteRefused, match="cannot replace"):
        put("b:web.tar", b"y")
    assert remote.there() == ["web.tar"] and (remote.root / "web.tar").read_bytes() == b"x" * 100_000
