"""The format as docs/format.md has it: vectors, frames, the index, and readers that believe none of it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from ckpt.archive import index, layout, reader, writer
from ckpt.archive.members import StageMembers
from ckpt.archive.opened import ArchiveMembers
from ckpt.errors import ArchiveInvalid, CkptError

VECTORS = Path(__file__).resolve().parents[1] / "vectors"
CONTAINER = "c" * 64
MTIME_S = 1_700_000_000


def vector_stage(path: Path) -> Path:
    """What the vector was made of: fixed bytes, fixed times."""
    for name in ("artifacts", "checkpoint"):
        (path / name).mkdir(parents=True)
    contents = {
        "config.dump": json.dumps({"id": CONTAINER, "name": "web", "rootfsImageID": "d" * 64, "rootfsImageName": "busybox"}).encode(),
        "spec.dump": b'{"annotations": {"io.container.manager": "libpod"}}',
        "checkpoint/inventory.img": b"inventory",
        "checkpoint/core-1.img": b"core",
        "checkpoint/pages-1.img": b"".join(bytes([n]) * 4096 for n in range(80)),
        "deleted.files": b'["/etc/motd"]',
    }
    for name, data in contents.items():
        (path / name).write_bytes(data)
    # Of fields that every version has: the vector does not change when one is added.
    made = {"schema": 1, "id": "0123456789abcdef", "name": "web", "engine": "podman", "container_id": CONTAINER, "created_s": 1.5,
            "generation": 1, "digests": layout.digest_members(path)}  # fmt: skip
    (path / layout.MANIFEST).write_bytes(json.dumps(made, indent=1, sort_keys=True).encode() + b"\n")
    for name in ["artifacts", "checkpoint", layout.MANIFEST, *contents]:
        os.utime(path / name, (MTIME_S, MTIME_S))
    return path


@pytest.fixture
def archive(tmp_path: Path) -> bytes:
    return pack(vector_stage(tmp_path / "vector"))


def pack(stage: Path, **options: object) -> bytes:
    out = io.BytesIO()
    writer.write(StageMembers(stage), out, **options)  # type: ignore[arg-type]
    return out.getvalue()


def opened(tmp_path: Path, data: bytes) -> ArchiveMembers:
    path = tmp_path / "opened.tar.zst"
    path.write_bytes(data)
    return ArchiveMembers(path)


def content(members: ArchiveMembers, name: str) -> bytes:
    with members.open(name) as file:
        return b"".join(iter(lambda: file.read(10_000), b""))


# The vectors


def test_the_vector_is_read(tmp_path: Path) -> None:
    told = json.loads((VECTORS / "small.json").read_text())
    data = (VECTORS / "small.tar.zst").read_bytes()
    assert len(data) < 20_000
    assert hashlib.sha256(data).hexdigest() == told["sha256"]
    found = reader.extract(io.BytesIO(data), tmp_path / "stage")
    assert found is not None and found.digests == told["digests"]
    with opened(tmp_path, data) as members:
        assert members.indexed and members.names() == [row[0] for row in told["members"]]
        found_entries = index.load(lambda offset, size: data[offset : offset + size], len(data))
        assert found_entries is not None
        assert told["members"] == [[e.name, e.header_offset, e.data_offset, e.size_bytes, e.mtime_s] for e in found_entries.entries]


def test_the_writer_makes_the_vector(tmp_path: Path) -> None:
    told = json.loads((VECTORS / "small.json").read_text())
    stage = vector_stage(tmp_path / "vector")
    tar = pack(stage, compress="none")
    assert hashlib.sha256(tar).hexdigest() == told["tar_sha256"]
    data = pack(stage)
    if list(zstandard.ZSTD_VERSION) == told["zstd"]:
        assert data == (VECTORS / "small.tar.zst").read_bytes()
    assert zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True).read() == tar


def test_the_same_members_give_the_same_bytes(tmp_path: Path) -> None:
    stage = vector_stage(tmp_path / "vector")
    (stage / "checkpoint/pages-2.img").write_bytes(random.Random(1).randbytes(9 << 20))
    os.utime(stage / "checkpoint/pages-2.img", (MTIME_S, MTIME_S))
    assert pack(stage, threads=1) == pack(stage, threads=3)


# Other programs


@pytest.mark.skipif(not shutil.which("zstd"), reason="no zstd here")
def test_zstd_and_tar_read_it(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.zst"
    path.write_bytes(pack(vector_stage(tmp_path / "vector")))
    subprocess.run(["zstd", "-q", "-t", path], check=True, timeout=30)
    plain = subprocess.run(["zstd", "-q", "-dc", path], check=True, timeout=30, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        assert [member.name + "/" * member.isdir() for member in tar] == opened(tmp_path, path.read_bytes()).names()


def test_the_first_bytes_are_a_normal_frame_and_windows_are_small(archive: bytes) -> None:
    at, count = 0, 0
    found = index.load(lambda offset, size: archive[offset : offset + size], len(archive))
    assert found is not None
    for frame in found.frames:
        parameters = zstandard.get_frame_parameters(archive[frame.offset : frame.offset + 18])
        assert parameters.has_checksum and parameters.content_size == frame.size_bytes and parameters.window_size <= 1 << 27
        assert frame.offset == at
        at, count = at + frame.compressed_bytes, count + 1
    assert archive[:4] == b"\x28\xb5\x2f\xfd" and count == 3


# Access to members


@pytest.mark.parametrize("compress", ["zstd", "gzip", "none"])
def test_members_in_any_order(tmp_path: Path, compress: str) -> None:
    stage = vector_stage(tmp_path / "vector")
    (stage / "checkpoint/pages-2.img").write_bytes(random.Random(1).randbytes(9_000_001))
    with opened(tmp_path, pack(stage, compress=compress)) as members:
        assert members.indexed == (compress != "gzip")
        assert members.names() == layout.stage_members(stage)
        for name in reversed(members.names()):
            if not name.endswith("/"):
                assert content(members, name) == (stage / name).read_bytes(), name
                assert members.size_bytes(name) == (stage / name).stat().st_size
        assert members.mtime_s("checkpoint/core-1.img") == MTIME_S
        with members.open("checkpoint/pages-2.img") as file:
            if compress != "gzip":
                file.seek(8_400_000)
                assert file.read(1000) == (stage / "checkpoint/pages-2.img").read_bytes()[8_400_000:8_401_000]


def test_a_small_member_of_a_large_archive_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = vector_stage(tmp_path / "vector")
    (stage / "checkpoint/pages-2.img").write_bytes(random.Random(1).randbytes(20 << 20))
    data = pack(stage)
    (tmp_path / "a").write_bytes(data)
    read = 0
    whole = os.pread

    def pread(fd: int, count: int, offset: int) -> bytes:
        nonlocal read
        found = whole(fd, count, offset)
        read += len(found)
        return found

    monkeypatch.setattr(os, "pread", pread)
    assert reader.peek(tmp_path / "a").manifest.name == "web"
    assert 0 < read < 300_000 < len(data) // 50


# Lies


def rebuilt(archive: bytes, change: Callable[[dict[str, object]], object]) -> bytes:
    """The archive with another index, the table made to fit."""
    count, _, _ = struct.unpack("<IBI", archive[-9:])
    table = archive[-9 - 8 * count : -9]
    members_bytes = struct.unpack("<II", table[-8:])[0]
    start = len(archive) - 17 - 8 * count - members_bytes
    plain = json.loads(archive[start + 8 : start + members_bytes])
    change(plain)
    data = json.dumps(plain).encode()
    entries = table[:-8] + struct.pack("<II", len(data) + 8, 0)
    end = entries + archive[-9:]
    return archive[:start] + struct.pack("<II", index.MEMBERS_MAGIC, len(data)) + data + struct.pack("<II", index.TABLE_MAGIC, len(end)) + end


LIES: dict[str, Callable[[dict[str, object]], object]] = {
    "schema": lambda plain: plain.update(schema=2),
    "none": lambda plain: plain.update(members=[]),
    "name": lambda plain: plain["members"][2].__setitem__(0, "spec.dump"),  # type: ignore[index]
    "twice": lambda plain: plain["members"].append(plain["members"][0]),  # type: ignore[attr-defined,index]
    "outside": lambda plain: plain["members"][2].__setitem__(0, "../x"),  # type: ignore[index]
    "size": lambda plain: plain["members"][-1].__setitem__(3, 20),  # type: ignore[index]
    "larger": lambda plain: plain["members"][-1].__setitem__(3, 1 << 40),  # type: ignore[index]
    "negative": lambda plain: plain["members"][-1].__setitem__(3, -1),  # type: ignore[index]
    "bool": lambda plain: plain["members"][-1].__setitem__(3, True),  # type: ignore[index]
    "offset": lambda plain: plain["members"][3].__setitem__(1, 0),  # type: ignore[index]
    "data": lambda plain: plain["members"][3].__setitem__(2, 7),  # type: ignore[index]
    "hidden": lambda plain: plain["members"].pop(2),  # type: ignore[attr-defined]
    "time": lambda plain: plain["members"][2].__setitem__(4, 7),  # type: ignore[index]
    "sums": lambda plain: plain.update(crc32=[1]),
    "crc": lambda plain: plain["crc32"].__setitem__(0, 7),  # type: ignore[index]
    "swapped": lambda plain: plain["members"].reverse(),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("lie", LIES)
def test_an_index_that_lies(tmp_path: Path, archive: bytes, lie: str) -> None:
    changed = rebuilt(archive, LIES[lie])
    with pytest.raises(ArchiveInvalid):
        opened(tmp_path, changed)
    with pytest.raises(ArchiveInvalid):
        reader.extract(io.BytesIO(changed), tmp_path / "stage")


def test_an_archive_without_its_index_is_read_as_before(tmp_path: Path, archive: bytes) -> None:
    found = index.load(lambda offset, size: archive[offset : offset + size], len(archive))
    assert found is not None
    bare = archive[: found.frames[-1].offset + found.frames[-1].compressed_bytes]
    with opened(tmp_path, bare) as members:
        assert not members.indexed and content(members, "deleted.files") == b'["/etc/motd"]'
        assert len(content(members, "checkpoint/pages-1.img")) == 4096 * 80
    assert reader.extract(io.BytesIO(bare), tmp_path / "stage") is not None


def test_a_flipped_bit_of_the_compressed_bytes_is_found(tmp_path: Path, archive: bytes) -> None:
    generator = random.Random(4)
    for number in range(200):
        changed = bytearray(archive)
        changed[generator.randrange(len(archive))] ^= 1 << generator.randrange(8)
        with pytest.raises(CkptError):
            reader.extract(io.BytesIO(changed), tmp_path / str(number))
        shutil.rmtree(tmp_path / str(number), ignore_errors=True)


@pytest.mark.parametrize("where", ["begin", "middle", "end"])
def test_a_seekable_archive_of_somebody_else(tmp_path: Path, archive: bytes, where: str) -> None:
    """Skippable frames are no reason to refuse what is no archive of ours, wherever they are but at the beginning."""
    tar = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(archive), read_across_frames=True).read()
    with tarfile.open(fileobj=io.BytesIO(tar)) as source:
        plain = io.BytesIO()
        with tarfile.open(fileobj=plain, mode="w") as target:
            for member in source:
                if member.name != layout.MANIFEST:
                    target.addfile(member, source.extractfile(member) if member.isreg() else None)
    data = plain.getvalue()
    first, second, skip = zstandard.compress(data[:5000]), zstandard.compress(data[5000:]), b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    changed = {"begin": skip + first + second, "middle": first + skip + second, "end": first + second + skip}[where]
    if where == "begin":  # podman takes that for a tar
        with pytest.raises(ArchiveInvalid):
            opened(tmp_path, changed)
        return
    with opened(tmp_path, changed) as members:
        assert content(members, "deleted.files") == b'["/etc/motd"]'
    assert reader.extract(io.BytesIO(changed), tmp_path / "stage") is None
