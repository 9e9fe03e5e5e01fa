"""inspect, search, verify and diff: over a dump made here, as a directory of a store and as an archive."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyrage
import pytest

from ckpt.archive import foreign, layout, manifest, seal, trust, writer
from ckpt.archive.members import StageMembers
from ckpt.archive.signature import Demand
from ckpt.cli.main import main
from ckpt.criu import contents, memory
from ckpt.criu.bindings import load
from ckpt.errors import ArchiveInvalid, DigestMismatch, EngineUnavailable, FeatureMissing, KeyProblem, UsageError
from ckpt.events import ignore
from ckpt.model import Manifest, RestoreOptions
from ckpt.ops import diff, inspect, verify
from ckpt.ops.import_ import import_
from ckpt.ops.restore import restore
from ckpt.store.catalog import Catalog
from ckpt.transports.base import Location
from tests.unit import dumps
from tests.unit.dumps import HEAP, PAGE, STACK

try:
    load("images.magic")
except FeatureMissing:
    pytest.skip("pycriu is not installed", allow_module_level=True)


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    return dumps.make(tmp_path / "stage")


def archive(stage: Path, path: Path) -> str:
    with path.open("wb") as out:
        writer.write(StageMembers(stage), out)
    return str(path)


def store(root: Path, stage: Path) -> None:
    draft = Catalog(root).begin("web")
    shutil.copytree(stage, draft.stage, dirs_exist_ok=True)
    made = manifest.loads((stage / layout.MANIFEST).read_bytes())
    (draft.stage / layout.MANIFEST).unlink()
    draft.commit(made)


# What is in a dump


def test_contents(stage: Path) -> None:
    found = contents.read(StageMembers(stage))
    one, two = found.tasks
    assert (one.pid, one.ppid, one.comm, one.threads, one.state, one.uid, one.gid) == (1, 0, "redis", 2, "running", 999, 998)
    assert (one.exe, one.cwd) == ("/bin/redis", "/")
    assert (two.comm, two.state, two.files) == ("child?[31m", "zombie", [])
    assert one.memory.by_kind_bytes == {"heap": 64 * PAGE, "stack": 4 * PAGE}
    assert (one.memory.image_bytes, one.memory.mapped_bytes, one.memory.zero_bytes) == (3 * PAGE, 68 * PAGE, 65 * PAGE)
    assert [(file.fd, file.kind, file.path) for file in one.files] == [
        (0, "file", "/data/dump.rdb"), (1, "file", "/"), (3, "inet", "tcp 10.0.0.1:80 -> 10.0.0.2:4711"),
    ]  # fmt: skip
    assert [(s.fd, s.protocol, s.state, s.local, s.remote) for s in one.sockets] == [(3, "tcp", "established", "10.0.0.1:80", "10.0.0.2:4711")]
    assert [(m.mountpoint, m.fstype) for m in found.mounts] == [("/data", "tmpfs")]
    assert found.kinds == {"file": 2, "inet": 1}


@pytest.mark.parametrize("name", ["pstree.img", "core-1.img", "files.img", "fdinfo-1.img", "mm-1.img", "pagemap-1.img", "mountpoints-5.img"])
def test_damaged_images_are_one_error(stage: Path, name: str) -> None:
    path = stage / "checkpoint" / name
    whole = path.read_bytes()
    generator = random.Random(name)
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(generator.randrange(1, 4)):
            changed[generator.randrange(len(whole))] = generator.randrange(256)
        path.write_bytes(changed[: generator.randrange(len(whole))] if generator.random() < 0.3 else changed)
        try:
            contents.read(StageMembers(stage))
        except ArchiveInvalid as error:
            assert "\n" not in error.message


def test_inspect_the_store_and_an_archive(stage: Path, tmp_path: Path) -> None:
    store(tmp_path / "store", stage)
    for ref in (archive(stage, tmp_path / "web.tar.zst"), "web"):
        seen = inspect.inspect(ref, environment=True, store_root=tmp_path / "store")
        assert seen.contents is not None and [task.pid for task in seen.contents.tasks] == [1, 2] and not seen.unread
        assert seen.words == {1: inspect.Words(("redis", "-p", "80"), ("A=1", "TOKEN=x"))}
    assert inspect.inspect("web", store_root=tmp_path / "store").words == {}


def test_inspect_for_people(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ref = archive(stage, tmp_path / "web.tar.zst")
    assert main(["inspect", ref]) == 0
    out = capsys.readouterr().out
    assert "redis" in out and "  child?[31m" in out and "/bin/redis" in out and "TOKEN" not in out and "4711" not in out
    assert main(["inspect", "-a", "--env", ref]) == 0
    out = capsys.readouterr().out
    assert "10.0.0.2:4711" in out and "/data/dump.rdb" in out and "TOKEN=x" in out and "config.dump" in out
    assert main(["inspect", "--format", "json", ref]) == 0
    row = json.loads(capsys.readouterr().out)["results"][0]
    assert row["tasks"][0]["memory"]["image_bytes"] == 3 * PAGE and "environment" not in row["tasks"][0]
    assert row["archive"]["indexed"] and row["memory"]["mapped_by_kind_bytes"]["heap"] == 64 * PAGE


# Search


def test_search_over_the_border_of_two_pages(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ref = archive(stage, tmp_path / "web.tar.zst")
    (found,) = inspect.search(ref, "secret")
    assert (found.pid, found.comm, found.kind, found.address) == (1, "redis", "heap", HEAP + PAGE - 3)
    assert found.context[found.address - found.context_address :].startswith(b"secret")
    assert [one.address for one in inspect.search(ref, "73 65 63", how="hex")] == [HEAP + PAGE - 3]
    assert [one.address for one in inspect.search(ref, "TOK[A-Z]+", how="regex")] == [STACK + 16]
    assert not list(inspect.search(ref, "nothing"))
    assert main(["inspect", "--search", "secret", ref]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 redis heap 0x10000ffd (6 bytes)\n") and "|             sec|" not in out and "sec" in out
    assert main(["inspect", "--search", "secret", "--format", "json", ref]) == 0
    row = json.loads(capsys.readouterr().out)["results"][0]
    assert (row["pid"], row["address"], "736563726574" in row["context"]) == (1, HEAP + PAGE - 3, True)


@pytest.mark.parametrize(("pattern", "how"), [("", "text"), ("xyz", "hex"), (" ", "hex"), ("(", "regex"), ("x" * 5000, "text")])
def test_what_cannot_be_searched(stage: Path, tmp_path: Path, pattern: str, how: str) -> None:
    with pytest.raises(UsageError):
        list(inspect.search(archive(stage, tmp_path / "a"), pattern, how=how))


def test_search_finds_what_a_plain_search_finds(tmp_path: Path) -> None:
    """Runs of pages with gaps, chunks of any size, matches anywhere."""
    generator = random.Random(6)
    pages = {HEAP + n * PAGE * 7: generator.randbytes(PAGE * generator.randrange(1, 6)) for n in range(9)}
    pages |= {STACK + n * PAGE: bytes(PAGE - 2) + b"ab" for n in range(4)}
    pages = {at: data.replace(b"\x07", b"ab") for at, data in pages.items()}
    pages = {at: data[: len(data) // PAGE * PAGE] for at, data in pages.items() if len(data) >= PAGE}
    stage = dumps.make(tmp_path / "stage", pages=pages)
    source = StageMembers(stage)
    (pagemap,) = contents.pagemaps(source)
    joined: dict[int, bytes] = {}
    for at, data in sorted(pages.items()):
        before = next((start for start, held in joined.items() if start + len(held) == at), None)
        if before is None:
            joined[at] = data
        else:
            joined[before] += data
    wanted = [start + at for start, data in sorted(joined.items()) for at in range(len(data)) if data.startswith(b"ab", at)]
    assert [one.address for one in memory.search(source, pagemap, b"ab")] == wanted
    small = memory.stream(source, pagemap, chunk_bytes=PAGE)
    assert b"".join(data for _, data in small) == b"".join(data for _, data in sorted(pages.items()))


# Verify


def test_verify(stage: Path, tmp_path: Path) -> None:
    store(tmp_path / "store", stage)
    ref = archive(stage, tmp_path / "web.tar.zst")
    for outcome in verify.verify([ref, "web"], deep=True, store_root=tmp_path / "store", emit=ignore):
        assert outcome.ok, outcome.error
        assert outcome.stats["digests"] == "equal" and outcome.stats["members"] == len(layout.digest_members(stage))


def test_verify_all_names_the_damaged_one(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "store"
    store(root, stage)
    store(root, stage)
    damaged = Catalog(root).find("web@1").directory / "checkpoint/core-1.img"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert main(["--store", str(root), "verify", "--all"]) == DigestMismatch.exit_code
    out, err = capsys.readouterr()
    assert out.startswith("web@2: ok") and "web@1" not in out
    (said,) = [line for line in err.splitlines() if line.startswith("error")]
    assert said.startswith("error: web@1: checkpoint/core-1.img was changed or damaged")


def short(stage: Path) -> None:
    with (stage / "checkpoint/pages-1.img").open("ab") as file:
        file.truncate(PAGE)


def append(name: str, data: bytes) -> Any:
    def change(stage: Path) -> None:
        with (stage / name).open("ab") as file:
            file.write(data)

    return change


def leading_out(stage: Path) -> None:
    with tarfile.open(stage / "rootfs-diff.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("../../etc/passwd"))


DAMAGE = {
    "pages-1.img has 4096 bytes": short,
    "core-1.img is": append("checkpoint/core-1.img", b"\xff\xff\xff\x00abc"),
    "belongs to no pagemap": append("checkpoint/pages-7.img", bytes(PAGE)),
    "deleted.files": append("deleted.files", b'["../x"]'),
    "leads out of it": leading_out,
    "config.dump is not valid": append("config.dump", b"x"),
    "mountpoints": append("checkpoint/mountpoints-9.img", b"not an image"),
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_deep_finds_what_digests_do_not(stage: Path, tmp_path: Path, problem: str) -> None:
    DAMAGE[problem](stage)
    dumps.seal(stage)
    store(tmp_path / "store", stage)
    (shallow,) = verify.verify(["web"], store_root=tmp_path / "store", emit=ignore)
    assert shallow.ok
    (outcome,) = verify.verify(["web"], deep=True, store_root=tmp_path / "store", emit=ignore)
    assert not outcome.ok and problem in str(outcome.stats["problems"])


def test_a_damaged_archive_and_none(stage: Path, tmp_path: Path) -> None:
    ref = Path(archive(stage, tmp_path / "web.tar.zst"))
    with (stage / "checkpoint/pages-1.img").open("r+b") as file:
        file.write(b"!")
    changed = archive(stage, tmp_path / "changed.tar.zst")
    (outcome,) = verify.verify([changed], store_root=tmp_path / "store", emit=ignore)
    assert isinstance(outcome.error, DigestMismatch) and "pages-1.img" in outcome.error.message
    ref.write_bytes(ref.read_bytes()[:-100])
    (outcome,) = verify.verify([str(ref)], store_root=tmp_path / "store", emit=ignore)
    assert isinstance(outcome.error, ArchiveInvalid)
    with pytest.raises(UsageError):
        verify.verify([], store_root=tmp_path / "store", emit=ignore)


def test_a_signature_is_mentioned_and_judged(stage: Path, tmp_path: Path) -> None:
    (stage / layout.SIGNATURE).write_bytes(b"no signature")
    (tmp_path / "signers").write_text("")
    ref = archive(stage, tmp_path / "web.tar.zst")
    (outcome,) = verify.verify([ref], store_root=tmp_path / "store", emit=ignore)
    assert outcome.ok and outcome.stats["signature"] == "not checked"
    incoming = trust.Incoming((), Demand(tmp_path / "signers"))
    (outcome,) = verify.verify([ref], incoming=incoming, store_root=tmp_path / "store", emit=ignore)
    assert not outcome.ok and outcome.stats["signature"] == "wrong"
    (stage / layout.SIGNATURE).unlink()
    (outcome,) = verify.verify([archive(stage, tmp_path / "unsigned")], incoming=incoming, store_root=tmp_path / "store", emit=ignore)
    assert not outcome.ok and "not signed" in str(outcome.stats["problems"])


@pytest.mark.parametrize("compress", ["zstd", "none", "gzip"])
def test_an_encrypted_archive_is_looked_into_with_its_key(stage: Path, tmp_path: Path, compress: Any) -> None:
    key = pyrage.x25519.Identity.generate()
    (tmp_path / "key").write_text(str(key))
    (tmp_path / "key").chmod(0o600)
    sealed = tmp_path / "web.age"
    with sealed.open("wb") as out, seal.encrypting(out, seal.recipients([f"age:{key.to_public()}"])) as inside:
        writer.write(StageMembers(stage), inside, compress=compress)
    with pytest.raises(KeyProblem):
        inspect.inspect(str(sealed), store_root=tmp_path)
    incoming = trust.Incoming(seal.identities([tmp_path / "key"]))
    seen = inspect.inspect(str(sealed), environment=True, incoming=incoming, store_root=tmp_path)
    assert seen.sealed and seen.indexed == (compress != "gzip") and seen.words[1].argv == ("redis", "-p", "80")
    (found,) = inspect.search(str(sealed), "secret", incoming=incoming)
    assert found.address == HEAP + PAGE - 3
    (outcome,) = verify.verify([str(sealed)], deep=True, incoming=incoming, store_root=tmp_path, emit=ignore)
    assert outcome.ok, outcome.error
    with sealed.open("r+b") as file:
        file.truncate(sealed.stat().st_size - 20)
    (outcome,) = verify.verify([str(sealed)], incoming=incoming, store_root=tmp_path, emit=ignore)
    assert not outcome.ok


# Diff


def tar(path: Path, **files: bytes) -> None:
    with tarfile.open(path, "w") as target:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            target.addfile(member, io.BytesIO(data))


def test_diff(tmp_path: Path) -> None:
    one = {HEAP: bytes(4 * PAGE), STACK: bytes(PAGE), STACK + 2 * PAGE: b"x" * PAGE}
    two = {HEAP: bytes(PAGE) + b"!" + bytes(PAGE - 1) + bytes(2 * PAGE), HEAP + 4 * PAGE: bytes(PAGE), STACK + 2 * PAGE: b"x" * PAGE}
    a, b = dumps.make(tmp_path / "a", pages=one), dumps.make(tmp_path / "b", pages=two, comm="valkey", remote="10.0.0.9")
    tar(a / "rootfs-diff.tar", same=b"1", gone=b"2", changed=b"3")
    tar(b / "rootfs-diff.tar", same=b"1", new=b"2", changed=b"4")
    (b / "deleted.files").write_text('["/etc/motd"]')
    for stage in (a, b):
        dumps.seal(stage)
    found = diff.diff(archive(a, tmp_path / "a.tar"), archive(b, tmp_path / "b.tar"), store_root=tmp_path, emit=ignore)
    assert found.same_container and not found.same
    assert found.memory == [diff.MemoryChange(1, "valkey", 1, 1, 1, 4)]
    assert [(c.what, c.change) for c in found.processes] == [("1 redis", "removed"), ("1 valkey", "added")] or [
        (c.what, c.change) for c in found.processes
    ] == [("1 valkey", "added"), ("1 redis", "removed")]
    assert [(c.what, c.change, c.detail) for c in found.files] == [
        ("/changed", "changed", "content"), ("/gone", "removed", ""), ("/new", "added", ""),
        ("/etc/motd", "removed", "deleted from the container image"),
    ]  # fmt: skip
    assert [c.what for c in found.config] == ["environment B"] and "redis" not in found.config[0].detail
    assert {c.what.split()[-1] for c in found.sockets} == {"10.0.0.2:4711", "10.0.0.9:4711"}
    same = diff.diff(str(tmp_path / "a.tar"), str(tmp_path / "a.tar"), store_root=tmp_path, emit=ignore)
    assert same.same


def test_diff_for_people(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ref = archive(stage, tmp_path / "a.tar")
    other = archive(dumps.make(tmp_path / "b", pages={HEAP: b"x" * PAGE}), tmp_path / "b.tar")
    assert main(["diff", ref, ref]) == 0
    assert "nothing differs" in capsys.readouterr().out
    assert main(["diff", ref, other]) == 0
    assert "~ 1 redis  pages: 1 changed, 0 new, 2 gone, 0 same (4 KiB)" in capsys.readouterr().out


# Archives of other programs


def foreign_stage(path: Path, manager: str, config: dict[str, Any], **members: bytes) -> Path:
    made = dumps.make(path)
    shutil.rmtree(made / "artifacts")
    (made / "config.dump").write_text(json.dumps({"id": dumps.CONTAINER, "name": "counter", **config}))
    (made / "spec.dump").write_text(json.dumps({"annotations": {"io.container.manager": manager} if manager else {}}))
    for name, data in members.items():
        (made / name.replace("__", ".").replace("_", "-")).write_bytes(data)
    return made


REDUCED = {"rootfsImageRef": "docker.io/library/redis@sha256:" + "e" * 64, "rootfsImageName": "redis:7", "runtime": "runc",
           "checkpointedTime": "2026-11-21T12:03:11Z"}  # fmt: skip


def layer() -> bytes:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as target:
        for name, data in (("etc/new", b"new"), ("etc/.wh.motd", b""), ("var/.wh..wh..opq", b""), ("var/kept", b"kept"), ("var/.wh..wh.aufs", b"")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            target.addfile(member, io.BytesIO(data))
    return gzip.compress(plain.getvalue())


@pytest.mark.parametrize("key", ["networks", "newNetworks", "orderedNetworks"])
def test_podman_4_to_6(tmp_path: Path, key: str) -> None:
    networks = {"networks": ["net1", "net2"], "newNetworks": {"net1": {}, "net2": {}}, "orderedNetworks": [{"name": "net1"}, {"name": "net2"}]}
    stage = foreign_stage(tmp_path / "stage", "libpod", {"rootfsImageID": "d" * 64, "rootfsImageName": "redis", key: networks[key]})
    seen = inspect.inspect(archive(stage, tmp_path / "p.tar"), store_root=tmp_path)
    assert (seen.manifest.foreign, seen.manifest.engine, seen.manifest.networks) == ("podman", "podman", ("net1", "net2"))
    assert seen.contents is not None and seen.manifest.created_s > 0


@pytest.mark.parametrize(("writer_name", "manager"), [("cri-o", "cri-o"), ("containerd", "")])
def test_kubernetes(tmp_path: Path, writer_name: str, manager: str) -> None:
    stage = foreign_stage(tmp_path / "stage", manager, REDUCED, dump__log=b"log", rootfs_diff__tar=layer())
    ref = archive(stage, tmp_path / "k.tar")
    assert main(["inspect", ref]) == 0
    (outcome,) = verify.verify([ref], deep=True, store_root=tmp_path / "store", emit=ignore)
    assert outcome.ok and outcome.stats["digests"] == "none"
    done = import_(Location.of(Path(ref)), store_root=tmp_path / "store", emit=ignore)
    assert done.checkpoint is not None
    found: Manifest = done.checkpoint.manifest
    assert (found.foreign, found.engine, found.name) == (writer_name, "cri", "counter")
    assert found.container_image is not None and found.container_image.digest == "sha256:" + "e" * 64
    (back,) = restore([found.id], options=RestoreOptions(), store_root=tmp_path / "store", emit=ignore)
    assert isinstance(back.error, EngineUnavailable) and writer_name in back.error.message


def test_whiteouts_become_deletions(tmp_path: Path) -> None:
    stage = foreign_stage(tmp_path / "stage", "", REDUCED, rootfs_diff__tar=layer())
    foreign.convert(stage)
    with tarfile.open(stage / "rootfs-diff.tar", "r:") as found:
        assert found.getnames() == ["etc/new", "var/kept"]
    assert json.loads((stage / "deleted.files").read_text()) == ["/etc/motd", "/var"]
    assert layout.stage_members(stage)
    before = (stage / "rootfs-diff.tar").read_bytes()
    foreign.convert(stage)
    assert (stage / "rootfs-diff.tar").read_bytes() == before


@pytest.mark.parametrize("data", [b"\x1f\x8b\x08garbage", gzip.compress(b"no tar, " * 100), layer()[:-20]], ids=["garbage", "no-tar", "cut"])
def test_a_damaged_layer(tmp_path: Path, data: bytes) -> None:
    stage = foreign_stage(tmp_path / "stage", "", REDUCED, rootfs_diff__tar=data)
    with pytest.raises(ArchiveInvalid):
        foreign.convert(stage)


def test_old_and_new_manifests(stage: Path) -> None:
    data = json.loads((stage / layout.MANIFEST).read_bytes())
    made = manifest.loads((stage / layout.MANIFEST).read_bytes())
    for key in ("open_kinds", "memory_bytes", "mounts", "check"):
        del data[key]
    assert manifest.loads(json.dumps(data).encode()) == made
    full = replace(made, open_kinds={"inet": 2}, memory_bytes={"heap": 1 << 40}, mounts=(("/data", "tmpfs"),))
    assert manifest.loads(manifest.dumps(full)) == full
    with pytest.raises(ArchiveInvalid):
        manifest.loads(json.dumps(data | {"open_kinds": {"inet": "2"}}).encode())
