"""Archives written, read back, and refused: the hostile corpus."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zstandard

from ckpt.archive import layout, manifest, reader, writer
from ckpt.archive.members import StageMembers
from ckpt.archive.reader import Limits, extract, foreign_manifest, peek
from ckpt.errors import ArchiveInvalid, CkptError, DigestMismatch, NoSpace
from ckpt.model import ContainerImage, HostMount, Manifest, PortMapping, Process

CONTAINER = "c" * 64
SKIPPABLE = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
CONFIG = {"id": CONTAINER, "name": "web", "rootfsImageID": "d" * 64, "rootfsImageName": "docker.io/library/redis:7", "runtime": "crun",
          "namedVolumes": [{"volumeName": "data", "dest": "/data", "options": None}, {"volumeName": "../evil", "dest": "/x"}, 7],
          "newNetworks": {"podman": {"interface_name": "eth0"}}, "staticDir": "/var/lib/containers/x/userdata",
          "newPortMappings": [{"host_ip": "", "container_port": 80, "host_port": 8080, "range": 2, "protocol": "tcp"}],
          "userVolumes": ["/data", "/srv"],
          "createdTime": "2026-11-21T12:03:11.123456789+01:00"}  # fmt: skip
SPEC = {"annotations": {"io.container.manager": "libpod"}, "process": {"terminal": True},
        "mounts": [{"type": "bind", "source": "/srv/www", "destination": "/srv"}, {"type": "bind", "source": "/x", "destination": "/etc/hosts"},
                   {"type": "proc", "source": "proc", "destination": "/proc"}]}  # fmt: skip
NETWORK = {"podman": {"interfaces": {"eth0": {"subnets": [{"ipnet": "10.88.0.9/16", "gateway": "10.88.0.1"}], "mac_address": "aa"}}}}


def make_stage(path: Path, *, with_manifest: bool = True) -> Path:
    for name in ("checkpoint", "artifacts", "volumes"):
        (path / name).mkdir(parents=True)
    (path / "config.dump").write_text(json.dumps(CONFIG))
    (path / "spec.dump").write_text(json.dumps(SPEC))
    (path / "network.status").write_text(json.dumps(NETWORK))
    (path / "stats-dump").write_bytes(b"\x40\x59\x10\x55")
    random.seed(1)
    (path / "checkpoint/inventory.img").write_bytes(random.randbytes(60))
    (path / "checkpoint/core-1.img").write_bytes(random.randbytes(700))
    (path / "checkpoint/pages-1.img").write_bytes(random.randbytes(3_000_000) + bytes(1_500_000))
    (path / "rootfs-diff.tar").write_bytes(random.randbytes(10_240))
    (path / "deleted.files").write_text('["/etc/motd"]')
    (path / "volumes/data.tar").write_bytes(random.randbytes(2048))
    (path / "journal.jsonl").write_text("not a member")
    if with_manifest:
        write_manifest(path)
    return path


def write_manifest(path: Path) -> Manifest:
    made = Manifest("a" * 32, "web", "podman", CONTAINER, 1.5, processes=(Process(1, 0, "re\x1bdis"),), volumes=(("data", "/data"),),
                    container_image=ContainerImage("d" * 64, "redis"), ports=(PortMapping("", 80, 80),), host_mounts=(HostMount("/a\nb", "/c"),),
                    external={"cwd": "/tmp"}, digests=layout.digest_members(path))  # fmt: skip
    (path / layout.MANIFEST).write_bytes(manifest.dumps(made))
    return replace(made, processes=(Process(1, 0, "re?dis"),))


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    return make_stage(tmp_path / "stage")


def archive(stage: Path, **options: object) -> bytes:
    out = io.BytesIO()
    size = writer.write(StageMembers(stage), out, **options)  # type: ignore[arg-type]
    assert size == len(out.getvalue())
    return out.getvalue()


def same(one: Path, two: Path) -> bool:
    names = layout.stage_members(one)
    return names == layout.stage_members(two) and all((one / n).read_bytes() == (two / n).read_bytes() for n in names if not n.endswith("/"))


def unpack(data: bytes, stage: Path, **limits: int) -> Manifest | None:
    return extract(io.BytesIO(data), stage, limits=Limits(**limits))


# The layout and the manifest


def test_members_are_in_podmans_order(stage: Path) -> None:
    assert layout.stage_members(stage) == [
        "artifacts/", "artifacts/ckpt.json", "config.dump", "spec.dump", "network.status", "stats-dump", "checkpoint/", "checkpoint/core-1.img",
        "checkpoint/inventory.img", "checkpoint/pages-1.img", "rootfs-diff.tar", "deleted.files", "volumes/", "volumes/data.tar",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["", "/", "..", "checkpoint", "checkpoint/..", "checkpoint/a/b", "checkpoint/\x1b", "config.json", "volumes/x",
                                  "volumes/.tar", "../config.dump", "/config.dump", "config.dump/", "checkpoint//", "artifacts/\udcff",
                                  "x" * 300])  # fmt: skip
def test_what_is_no_member_is_not_allowed(name: str) -> None:
    assert not layout.is_allowed(name)


def test_digests_name_the_member(stage: Path) -> None:
    found = manifest.loads((stage / layout.MANIFEST).read_bytes())
    layout.check_digests(stage, found)
    with (stage / "checkpoint/pages-1.img").open("r+b") as file:
        file.seek(1000)
        file.write(b"\0")
    with pytest.raises(DigestMismatch, match=r"checkpoint/pages-1\.img"):
        layout.check_digests(stage, found)
    (stage / "checkpoint/pages-1.img").unlink()
    with pytest.raises(DigestMismatch, match="missing"):
        layout.check_digests(stage, found)


def test_a_manifest_comes_back(stage: Path) -> None:
    made = write_manifest(stage)
    assert manifest.loads(manifest.dumps(made)) == made
    plain = json.loads(manifest.dumps(made))
    assert plain["schema"] == 1
    check = plain.pop("check")
    assert manifest.loads(json.dumps(plain | {"future": [1]}).encode()) == made
    for changed in ({"check": check, "generation": 7}, {"chech": check}, {"check": "sha256:" + "0" * 64}):
        with pytest.raises((DigestMismatch, ArchiveInvalid)):
            manifest.loads(json.dumps(plain | changed).encode())


@pytest.mark.parametrize("change", [
    {"schema": 2}, {"schema": True}, {"schema": None}, {"id": 1}, {"id": ""}, {"name": "a/b"}, {"name": "x\x1b[31m"}, {"name": "n" * 256},
    {"name": ".."},
    {"name": "a\udcff"}, {"created_s": "1"}, {"created_s": 10**400}, {"generation": True}, {"generation": -1}, {"generation": 1 << 70},
    {"processes": {}},
    {"processes": [{"pid": 1}]}, {"processes": [3]}, {"volumes": [["a"]]}, {"volumes": [["../x", "/"]]}, {"volumes": [["a", "/", "b"]]},
    {"digests": {"../x": "sha256:" + "0" * 64}}, {"digests": {"config.dump": "md5:0"}}, {"digests": []}, {"host": None}, {"networks": ["a/b"]},
    {"tcp_established": 1}, {"container_image": {"id": "x"}}, {"external": {"a": 1}}, {"external": {"a": "b\0"}},
    {"digests": {"checkpoint/": "sha256:" + "0" * 64}},
])  # fmt: skip
def test_a_wrong_manifest_is_refused(stage: Path, change: dict[str, object]) -> None:
    plain = json.loads((stage / layout.MANIFEST).read_bytes())
    with pytest.raises(ArchiveInvalid):
        manifest.loads(json.dumps(plain | change).encode())


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 200_000, b'{"schema": NaN}', b'{"schema": 1}', b" " * (17 << 20)])
def test_garbage_is_no_manifest(data: bytes) -> None:
    with pytest.raises(ArchiveInvalid):
        manifest.loads(data)


# Round trips


@pytest.mark.parametrize("compress", ["zstd", "gzip", "none"])
def test_an_archive_comes_back(stage: Path, tmp_path: Path, compress: str) -> None:
    counts: list[int] = []
    data = archive(stage, compress=compress, on_bytes=counts.append)
    assert sum(counts) == sum((stage / n).stat().st_size for n in layout.stage_members(stage) if not n.endswith("/"))
    read: list[int] = []
    found = extract(io.BytesIO(data), tmp_path / "out", on_bytes=read.append)
    assert sum(read) == len(data)
    assert found == manifest.loads((stage / layout.MANIFEST).read_bytes())
    assert same(stage, tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "out/checkpoint").stat().st_mode) == 0o700
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*") if p.is_file()} == {0o600}


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress, gzip.compress, lambda d: gzip.compress(d[:5000]) + gzip.compress(d[5000:]),
                                  lambda d: bz2.compress(d[:9000]) + bz2.compress(d[9000:]),
                                  lambda d: zstandard.compress(d[:70_000]) + SKIPPABLE + zstandard.compress(d[70_000:])])  # fmt: skip
def test_other_compressions_and_frames(stage: Path, tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    assert unpack(pack(archive(stage, compress="none")), tmp_path / "out") is not None
    assert same(stage, tmp_path / "out")


@pytest.mark.parametrize("program", ["zstd -dc", "gzip -dc", "cat"])
def test_other_programs_read_it(stage: Path, tmp_path: Path, program: str) -> None:
    argv = program.split()
    if shutil.which(argv[0]) is None:
        pytest.skip(f"{argv[0]} is not installed")
    data = archive(stage, compress={"zstd": "zstd", "gzip": "gzip", "cat": "none"}[argv[0]])
    plain = subprocess.run(argv, input=data, capture_output=True, check=True).stdout
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-x", "-C", str(tmp_path / "out")], input=plain, check=True)
    assert same(stage, tmp_path / "out")
    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        assert {(m.uid, m.gid, m.mode) for m in tar if m.isfile()} == {(0, 0, 0o600)}


def test_it_reads_pipes(stage: Path, tmp_path: Path) -> None:
    data = archive(stage)
    receiver, sender = os.pipe()

    def send() -> None:
        with os.fdopen(sender, "wb") as file:
            for start in range(0, len(data), 777):
                file.write(data[start : start + 777])
                file.flush()

    thread = threading.Thread(target=send)
    thread.start()
    with os.fdopen(receiver, "rb", buffering=0) as file:
        assert extract(file, tmp_path / "out") is not None  # type: ignore[arg-type]
    thread.join()
    assert same(stage, tmp_path / "out")


@pytest.mark.parametrize("style", ["tar -C {stage} -cf - .", "tar -C {stage} --format=gnu -cf - artifacts config.dump spec.dump checkpoint"])
def test_archives_of_other_tars(stage: Path, tmp_path: Path, style: str) -> None:
    (stage / "journal.jsonl").unlink()
    data = subprocess.run(style.format(stage=stage).split(), capture_output=True, check=True).stdout
    if "gnu" in style:
        with pytest.raises(DigestMismatch, match="missing"):
            unpack(data, tmp_path / "out")
    else:
        assert unpack(data, tmp_path / "out") is not None
        assert same(stage, tmp_path / "out")


def test_write_file_is_whole_or_absent(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.tar.zst"
    assert writer.write_file(StageMembers(stage), target) == target.stat().st_size
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    before = target.read_bytes()

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_write_member", full)
    with pytest.raises(NoSpace):
        writer.write_file(StageMembers(stage), target)
    assert target.read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ["out.tar.zst", "stage"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("compress", ["zstd", "gzip", "none"])
def test_a_full_device(stage: Path, compress: str) -> None:
    with open("/dev/full", "wb", buffering=0) as out, pytest.raises(NoSpace):
        writer.write(StageMembers(stage), out, compress=compress)  # type: ignore[arg-type]


def test_a_member_that_shrinks(stage: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = writer._header
    monkeypatch.setattr(
        writer, "_header", lambda name, size, mtime: (os.truncate(stage / name, 0) if "pages" in name else None, header(name, size, mtime))[1]
    )
    with pytest.raises(CkptError, match="shorter"):
        archive(stage)


# Manifests that are not there or not of this checkpoint


def test_an_archive_of_podman(tmp_path: Path) -> None:
    stage = make_stage(tmp_path / "stage", with_manifest=False)
    assert unpack(archive(stage), tmp_path / "out") is None
    found = foreign_manifest(tmp_path / "out")
    assert (found.name, found.engine, found.foreign, found.container_id, found.runtime) == ("web", "podman", "podman", CONTAINER, "crun")
    assert found.container_image == ContainerImage("d" * 64, "docker.io/library/redis:7")
    assert found.volumes == (("data", "/data"),) and found.networks == ("podman",) and found.addresses == ("10.88.0.9",)
    assert found.ports == (PortMapping("", 8080, 80), PortMapping("", 8081, 81)) and found.host_mounts == (HostMount("/srv/www", "/srv"),)
    assert found.shell_job and found.created_s > 0
    assert manifest.loads(manifest.dumps(found)) == found
    assert found.id == foreign_manifest(tmp_path / "out").id


@pytest.mark.parametrize("config", [{"id": 7}, {"id": "../x"}, {"id": "x\n"}, {}])
def test_an_archive_without_a_container(tmp_path: Path, config: dict[str, object]) -> None:
    stage = make_stage(tmp_path / "stage", with_manifest=False)
    (stage / "config.dump").write_text(json.dumps(config))
    with pytest.raises(ArchiveInvalid):
        foreign_manifest(stage)


def test_a_made_up_manifest_takes_any_types(tmp_path: Path) -> None:
    stage = make_stage(tmp_path / "stage", with_manifest=False)
    junk: list[object] = [None, 1, True, "x\x1b", [], {}, [None, 1, "a", [[]]], {"a": {"b": 1}}, "z" * 9999, 1e308, -5]
    for value in junk:
        (stage / "config.dump").write_text(
            json.dumps({key: value for key in CONFIG} | {"id": CONTAINER, "orderedNetworks": value, "networks": value})
        )
        (stage / "spec.dump").write_text(json.dumps({key: value for key in SPEC}))
        (stage / "network.status").write_text(json.dumps({"podman": value, "x": {"interfaces": {"y": {"subnets": value}}}}))
        found = foreign_manifest(stage)
        assert manifest.loads(manifest.dumps(found)) == found


def test_a_manifest_of_another_container_is_dropped(stage: Path, tmp_path: Path) -> None:
    (stage / "config.dump").write_text(json.dumps(CONFIG | {"id": "e" * 64}))
    with pytest.raises(DigestMismatch, match="config.dump"):  # nothing else differs: it is damage
        unpack(archive(stage), tmp_path / "damaged")
    (stage / "checkpoint/core-1.img").write_bytes(b"another dump")
    assert unpack(archive(stage), tmp_path / "out") is None
    assert not (tmp_path / "out" / layout.MANIFEST).exists()


def test_a_manifest_of_an_earlier_dump_is_dropped(stage: Path, tmp_path: Path) -> None:
    """Podman exports `artifacts/` of a restored container again."""
    for name in ("inventory", "core-1"):
        (stage / f"checkpoint/{name}.img").write_bytes(b"another dump")
    assert unpack(archive(stage), tmp_path / "out") is None


@pytest.mark.parametrize("name", ["checkpoint/pages-1.img", "checkpoint/inventory.img", "config.dump", "volumes/data.tar", "deleted.files"])
def test_a_changed_member_is_found(stage: Path, tmp_path: Path, name: str) -> None:
    data = bytearray((stage / name).read_bytes())
    data[len(data) // 2 if name != "config.dump" else data.index(b"crun")] ^= 1
    (stage / name).write_bytes(data)
    with pytest.raises(DigestMismatch, match=name):
        unpack(archive(stage), tmp_path / "out")


def test_an_added_member_is_found(stage: Path, tmp_path: Path) -> None:
    (stage / "checkpoint/extra.img").write_bytes(b"x")
    with pytest.raises(DigestMismatch, match="extra"):
        unpack(archive(stage), tmp_path / "out")


@pytest.mark.parametrize("name", ["config.dump", "spec.dump", "checkpoint/inventory.img"])
def test_a_missing_member_is_found(tmp_path: Path, name: str) -> None:
    stage = make_stage(tmp_path / "stage", with_manifest=False)
    (stage / name).unlink()
    data = archive(stage)
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(ArchiveInvalid, match=name):
        unpack(data, tmp_path / "out")
    with pytest.raises(ArchiveInvalid, match=name):
        peek(tmp_path / "a")


# Hostile archives


def pack(*members: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for member, data in members:
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", **pax: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.pax_headers = kind, link, {k.replace("__", "."): v for k, v in pax.items()}
    return member


OK = (info("config.dump"), json.dumps(CONFIG).encode())
HOSTILE = {
    "parent": [(info("../evil"), b"x")],
    "parent inside": [(info("checkpoint/../../evil"), b"x")],
    "absolute": [(info("/tmp/evil"), b"x")],
    "absolute member": [(info("/config.dump"), b"{}")],
    "dot dot member": [(info("checkpoint/.."), b"x")],
    "symlink": [(info("checkpoint", tarfile.SYMTYPE, "/tmp"), b""), (info("checkpoint/evil"), b"x")],
    "symlink file": [(info("config.dump", tarfile.SYMTYPE, "/etc/passwd"), b"")],
    "parent link": [(info("checkpoint/parent", tarfile.SYMTYPE, "../pre-checkpoint"), b"")],
    "hard link": [OK, (info("spec.dump", tarfile.LNKTYPE, "config.dump"), b"")],
    "hard link out": [(info("spec.dump", tarfile.LNKTYPE, "/etc/passwd"), b"")],
    "character device": [(info("config.dump", tarfile.CHRTYPE), b"")],
    "block device": [(info("config.dump", tarfile.BLKTYPE), b"")],
    "fifo": [(info("config.dump", tarfile.FIFOTYPE), b"")],
    "unknown type": [(info("config.dump", b"Q"), b"")],
    "sparse": [(info("config.dump", GNU__sparse__realsize="99999999999"), b"x")],
    "duplicate": [OK, OK],
    "duplicate by dot": [OK, (info("./config.dump"), b"{}")],
    "duplicate directory": [(info("checkpoint", tarfile.DIRTYPE), b""), (info("checkpoint/", tarfile.DIRTYPE), b"")],
    "unknown member": [(info("config.json"), b"{}")],
    "deep": [(info("checkpoint/a/b"), b"x")],
    "control": [(info("checkpoint/\x1b[31m.img"), b"x")],
    "directory as file": [(info("checkpoint"), b"x")],
    "file as directory": [(info("config.dump", tarfile.DIRTYPE), b"")],
    "pre-checkpoint": [(info("pre-checkpoint", tarfile.DIRTYPE), b"")],
    "pax path": [(info("config.dump", path="../evil"), b"x")],
    "pax size": [(info("config.dump", size="-1"), b"x")],
    "pax size text": [(info("config.dump", size="1e3"), b"x")],
    "huge pax": [(info("config.dump", comment="x" * (2 << 20)), b"x")],
    "root as file": [(info("."), b"x")],
    "not json": [(info("config.dump"), b"nope"), (info("spec.dump"), b"{}"), (info("checkpoint/inventory.img"), b"x")],
    "not an object": [OK, (info("spec.dump"), b"[]"), (info("checkpoint/inventory.img"), b"x")],
    "bad manifest": [(info("artifacts/ckpt.json"), b"{}"), OK, (info("spec.dump"), b"{}"), (info("checkpoint/inventory.img"), b"x")],
    "big manifest": [(info("artifacts/ckpt.json"), b" " * (17 << 20))],
    "nothing": [],
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_hostile_members_are_refused(tmp_path: Path, case: str, kind: int) -> None:
    if kind == tarfile.GNU_FORMAT and any(member.pax_headers for member, _ in HOSTILE[case]):
        pytest.skip("PAX only")
    out = tmp_path / "deep" / "out"
    out.parent.mkdir()
    data = pack(*HOSTILE[case], kind=kind)
    with pytest.raises(ArchiveInvalid) as caught:
        unpack(data, out)
    assert "\n" not in caught.value.message and "\x1b" not in caught.value.message
    assert not any(p.name == "evil" for p in tmp_path.rglob("*")) and not Path("/tmp/evil").exists()
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(ArchiveInvalid):
        peek(tmp_path / "a.tar")


def test_links_that_wait_in_the_stage_are_not_followed(stage: Path, tmp_path: Path) -> None:
    data = archive(stage)
    victim = tmp_path / "victim"
    victim.mkdir()
    (tmp_path / "one").mkdir()
    os.symlink(victim, tmp_path / "one/checkpoint")
    (tmp_path / "two").mkdir()
    os.symlink(victim / "file", tmp_path / "two/config.dump")
    for name in ("one", "two"):
        with pytest.raises(ArchiveInvalid):
            unpack(data, tmp_path / name)
    assert not any(victim.iterdir())


def test_caps(tmp_path: Path) -> None:
    many = pack(*((info(f"checkpoint/{n}.img"), b"") for n in range(300)))
    with pytest.raises(ArchiveInvalid, match="more than 200 members"):
        unpack(many, tmp_path / "a", max_members=200)
    bomb = zstandard.compress(pack(OK, (info("checkpoint/pages-1.img"), bytes(20 << 20))), 19)
    assert len(bomb) < 10_000
    with pytest.raises(ArchiveInvalid, match="times its size"):
        unpack(bomb, tmp_path / "b", ratio_floor_bytes=4 << 20)
    assert sum(p.stat().st_size for p in (tmp_path / "b").rglob("*")) < 8 << 20
    with pytest.raises(ArchiveInvalid, match="more than 1048576 bytes"):
        unpack(bomb, tmp_path / "c", max_total_bytes=1 << 20)
    tail = zstandard.compress(pack(OK) + bytes(64 << 20), 19)
    with pytest.raises(ArchiveInvalid, match="times its size"):
        unpack(tail, tmp_path / "d", ratio_floor_bytes=1 << 20)
    liar = info("checkpoint/pages-1.img", size="999999999999999")
    with pytest.raises(ArchiveInvalid, match="more than"):
        unpack(pack((liar, b"x")), tmp_path / "e")


@pytest.mark.parametrize("data", [b"", b"x", b"hello world, no archive", os.urandom(5000), bytes(512), bytes(20_000), b"\x28\xb5\x2f\xfd",
    b"\x1f\x8b\x08",
                                  b"BZh91AY", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd" + os.urandom(5000), b"\x1f\x8b\x08" + os.urandom(5000),
                                  b"BZh9" + os.urandom(5000), b"\xfd7zXZ\0" + os.urandom(5000), gzip.compress(b"text"), zstandard.compress(b""),
                                  zstandard.compress(b"z" * 100_000), b"PK\3\4" + bytes(600)], ids=range(18))  # fmt: skip
def test_what_is_no_archive(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ArchiveInvalid) as caught:
        unpack(data, tmp_path / "out")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("compress", ["zstd", "gzip", "none"])
def test_truncated_anywhere(stage: Path, tmp_path: Path, compress: str) -> None:
    data = archive(stage, compress=compress)
    cuts = {0, 1, 3, 4, 9, 10, 100, 511, 512, 513, 1024, 1536, len(data) - 1, len(data) - 4, len(data) - 8, len(data) // 2}
    cuts |= {random.Random(2).randrange(len(data)) for _ in range(25)}
    for number, cut in enumerate(sorted(cuts)):
        if compress == "none" and cut >= len(data) - 512:
            continue  # one block of zeros is an end, as podman has it
        with pytest.raises(ArchiveInvalid):
            unpack(data[:cut], tmp_path / str(number))
        shutil.rmtree(tmp_path / str(number), ignore_errors=True)


@pytest.mark.parametrize("compress", ["zstd", "gzip", "none"])
def test_one_flipped_bit_anywhere(stage: Path, tmp_path: Path, compress: str) -> None:
    data = archive(stage, compress=compress)
    generator = random.Random(3)
    wrong = []
    for number in range(60):
        changed = bytearray(data)
        changed[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        out = tmp_path / str(number)
        try:
            found = unpack(bytes(changed), out)
        except (ArchiveInvalid, DigestMismatch):
            pass
        else:
            # A bit in padding or in a time stamp changes nothing that counts.
            if found is None or not same(stage, out):
                wrong.append(number)
        shutil.rmtree(out, ignore_errors=True)
    assert wrong == []


def test_random_damage_raises_only_our_errors(stage: Path, tmp_path: Path) -> None:
    data = archive(stage, compress="none")[:60_000]
    generator = random.Random(4)
    for number in range(150):
        changed = bytearray(data)
        for _ in range(generator.randrange(1, 30)):
            changed[generator.randrange(8000)] = generator.randrange(256)
        out = tmp_path / str(number)
        with pytest.raises((ArchiveInvalid, DigestMismatch)):
            unpack(bytes(changed), out)
        shutil.rmtree(out, ignore_errors=True)


def test_peek_sees_without_unpacking(stage: Path, tmp_path: Path) -> None:
    for compress in ("zstd", "none"):
        path = tmp_path / f"a.{compress}"
        writer.write_file(StageMembers(stage), path, compress=compress)  # type: ignore[arg-type]
        found = peek(path)
        assert found.compression == compress and found.archive_bytes == path.stat().st_size
        assert found.manifest == manifest.loads((stage / layout.MANIFEST).read_bytes())
        assert found.config == CONFIG and found.spec == SPEC and found.stats == b"\x40\x59\x10\x55"
        assert found.sizes["checkpoint/pages-1.img"] == 4_500_000
    shutil.rmtree(stage / "artifacts")
    writer.write_file(StageMembers(stage), tmp_path / "b")
    assert peek(tmp_path / "b").manifest.foreign == "podman"


def test_memory_does_not_grow_with_the_archive(tmp_path: Path) -> None:
    """Peak memory of a writing and reading process, for a small and a large archive."""
    program = """
import io, os, resource, sys
from pathlib import Path
from ckpt.archive import reader, writer
from ckpt.archive.members import StageMembers
stage, out, size = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
block = os.urandom(1 << 19) + bytes(1 << 19)
with (stage / "checkpoint/pages-1.img").open("wb") as file:
    for _ in range(size):
        file.write(block)
writer.write_file(StageMembers(stage), out / "a", threads=2)
with (out / "a").open("rb") as file:
    reader.extract(file, out / "s")
reader.peek(out / "a")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for size in (64, 256):
        base = tmp_path / str(size)
        base.mkdir()
        stage = make_stage(base / "stage", with_manifest=False)
        argv = [sys.executable, "-c", program, str(stage), str(base), str(size)]
        root = str(Path(reader.__file__).parents[2])
        peaks.append(int(subprocess.run(argv, capture_output=True, check=True, env={"PYTHONPATH": root}).stdout))
        shutil.rmtree(base)
    assert peaks[1] < peaks[0] + 20_000, peaks
