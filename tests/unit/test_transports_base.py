"""Locations, and the carriers of this host: files and pipes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from ckpt.errors import CkptError, NoSpace, TargetNotFound, UsageError
from ckpt.transports import file
from ckpt.transports.base import CarrierOptions, Location, Payload, carrier_of, known_schemes

OPTIONS = CarrierOptions()


@pytest.mark.parametrize(
    ("text", "scheme", "shown"),
    [
        ("-", "pipe", "-"),
        ("web.tar", "file", "web.tar"),
        ("/srv/a:b", "file", "/srv/a:b"),
        ("./a:b", "file", "./a:b"),
        ("file:///srv/a%20b", "file", "/srv/a b"),
        ("b:web.tar", "ssh", "b:web.tar"),
        ("me@b:/srv/web.tar", "ssh", "me@b:/srv/web.tar"),
        ("me@[2001:db8::1]:web.tar", "ssh", "me@[2001:db8::1]:web.tar"),
        ("ssh://me@b:2222/srv/web.tar", "ssh", "ssh://me@b:2222/srv/web.tar"),
        ("https://me:sesame@b:7443/web.tar?X-Amz-Signature=sesame", "https", "https://b:7443/web.tar"),
        ("HTTPS://b/web.tar", "https", "https://b/web.tar"),
        ("http://[::1]:80/x", "http", "http://[::1]:80/x"),
    ],
)
def test_locations(text: str, scheme: str, shown: str) -> None:
    location = Location.parse(text)
    assert (location.scheme, str(location)) == (scheme, shown)
    assert "sesame" not in f"{location} {location!r}"
    assert carrier_of(location)


@pytest.mark.parametrize(
    "text",
    ["", " ", "a\nb", "ftp://b/x", "https://", "https:///x", "https://[/x", "https://b:99999/x", "https://b/x#y", "file://b/x", "ssh://a:sesame@b/x"],
)
def test_what_is_no_location(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Location.parse(text)
    assert "sesame" not in caught.value.message


def test_every_carrier_registers() -> None:
    assert {"file", "http", "https", "ssh"} <= set(known_schemes())


def write(location: Location, *pieces: bytes) -> None:
    with carrier_of(location).open_write(location, OPTIONS, Payload()) as upload:
        for piece in pieces:
            assert upload.write(piece) == len(piece)
        assert upload.commit().size_bytes == sum(map(len, pieces))


@pytest.mark.parametrize("nameless", [True, False])
def test_a_file_is_there_whole_or_as_before(tmp_path: Path, nameless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not nameless:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # as a file system without O_TMPFILE: EISDIR
    path = tmp_path / "web.tar"
    location = Location.parse(str(path))
    write(location, b"one", b"two")
    assert path.read_bytes() == b"onetwo" and path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(KeyboardInterrupt), carrier_of(location).open_write(location, OPTIONS, Payload()) as upload:
        upload.write(b"three")
        assert path.read_bytes() == b"onetwo"
        raise KeyboardInterrupt
    assert [one.name for one in tmp_path.iterdir()] == ["web.tar"] and path.read_bytes() == b"onetwo"
    write(location, b"four")
    assert path.read_bytes() == b"four" and len(list(tmp_path.iterdir())) == 1
    with carrier_of(location).open_read(location, OPTIONS) as download:
        assert download.size_bytes == 4 and download.read(3) + download.read(3) + download.read(3) == b"four"


def test_two_exports_to_one_file(tmp_path: Path) -> None:
    location = Location.parse(str(tmp_path / "web.tar"))
    carrier = carrier_of(location)
    with carrier.open_write(location, OPTIONS, Payload()) as first, carrier.open_write(location, OPTIONS, Payload()) as second:
        first.write(b"first")
        second.write(b"second")
        second.commit()
        first.commit()
    assert (tmp_path / "web.tar").read_bytes() == b"first" and len(list(tmp_path.iterdir())) == 1


def test_bad_places(tmp_path: Path) -> None:
    for text, kind in ((f"{tmp_path}", UsageError), (f"{tmp_path}/no/web.tar", TargetNotFound), (f"{tmp_path}/x/", UsageError)):
        location = Location.parse(text)
        with pytest.raises(kind):
            carrier_of(location).check_write(location, OPTIONS)
    with pytest.raises(TargetNotFound), carrier_of(location).open_read(Location.parse(f"{tmp_path}/none"), OPTIONS):
        pass
    full = Location.parse("/dev/full")
    with pytest.raises(NoSpace), carrier_of(full).open_write(full, OPTIONS, Payload()) as upload:
        upload.write(b"x")


def test_no_space_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_nameless", lambda path: (os.open("/dev/full", os.O_WRONLY), None))
    with pytest.raises(NoSpace, match="web.tar"):
        write(Location.parse(str(tmp_path / "web.tar")), b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_fifo_is_written_as_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()), daemon=True)
    reader.start()
    write(Location.parse(str(path)), b"data")
    reader.join(10)
    assert got == [b"data"] and path.is_fifo()


def test_a_reader_that_goes_away(tmp_path: Path) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    location = Location.parse(str(path))
    with pytest.raises(CkptError, match="gone away"), carrier_of(location).open_write(location, OPTIONS, Payload()) as upload:
        os.close(reader)
        upload.write(b"x")
