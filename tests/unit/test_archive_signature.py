"""Signatures over manifests, as ssh-keygen makes and judges them; and what a store and the verbs do with them."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pyrage
import pytest

from ckpt.archive import layout, seal, signature, trust, writer
from ckpt.archive import manifest as manifests
from ckpt.archive.members import StageMembers
from ckpt.archive.reader import extract
from ckpt.cli.main import main
from ckpt.errors import ArchiveInvalid, CkptError, ConfigError, DigestMismatch, FeatureMissing, KeyProblem
from ckpt.events import ignore
from ckpt.host import run
from ckpt.model import DumpOptions, RestoreOptions, Target
from ckpt.ops.checkpoint import checkpoint
from ckpt.ops.export import export
from ckpt.ops.import_ import import_
from ckpt.ops.inspect import inspect
from ckpt.ops.restore import restore
from ckpt.ops.verify import verify
from ckpt.store import volatile
from ckpt.store.catalog import Catalog
from tests.contract import fake
from tests.unit.test_archive_reader import make_stage
from tests.unit.test_ops_checkpoint import OPTIONS, World, at, world  # noqa: F401

DATA = b'{"schema": 1}\n'


def keygen(path: Path, *more: str, passphrase: str = "") -> Path:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", *more, "-N", passphrase, "-f", path], check=True, timeout=60)
    return path


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of ops and of a stranger, and a file of allowed signers for each."""
    directory = tmp_path_factory.mktemp("signers")
    for name in ("ops", "stranger"):
        keygen(directory / name)
        (directory / f"{name}.allowed").write_text(f"{name}@example,{name}@elsewhere {(directory / f'{name}.pub').read_text()}")
    return directory


def demand(keys: Path, who: str = "ops", **more: bool) -> signature.Demand:
    return signature.Demand(keys / f"{who}.allowed", **more)


def test_ssh_keygen_says_the_same(keys: Path, tmp_path: Path) -> None:
    ours = signature.sign(DATA, keys / "ops")
    assert signature.verify(DATA, ours, keys / "ops.allowed") == "ops@example"
    (tmp_path / "sig").write_bytes(ours)
    argv = ["ssh-keygen", "-Y", "verify", "-f", keys / "ops.allowed", "-I", "ops@example", "-n", "manifest@ckpt", "-s", tmp_path / "sig"]
    subprocess.run(argv, input=DATA, check=True, capture_output=True, timeout=60)
    theirs = subprocess.run(
        ["ssh-keygen", "-Y", "sign", "-n", "manifest@ckpt", "-f", keys / "ops"], input=DATA, check=True, capture_output=True, timeout=60
    ).stdout
    assert signature.verify(DATA, theirs, keys / "ops.allowed") == "ops@example"


@pytest.mark.parametrize(
    ("data", "change", "who"),
    [(DATA + b" ", bytes, "ops"), (DATA, bytes, "stranger"), (DATA, lambda s: s[: len(s) // 2], "ops"), (DATA, lambda s: b"x" + s, "ops"),
     (DATA, lambda s: s + bytes(signature.MAX_BYTES), "ops"), (DATA, lambda s: s.replace(b"AAAA", b"AAAB", 1), "ops")],
    ids=["altered", "stranger", "cut", "no-armor", "huge", "flipped"],
)  # fmt: skip
def test_refused(keys: Path, data: bytes, change: Callable[[bytes], bytes], who: str) -> None:
    with pytest.raises(DigestMismatch):
        signature.verify(data, change(signature.sign(DATA, keys / "ops")), keys / f"{who}.allowed")


def test_a_signature_for_something_else_does_not_count(keys: Path, tmp_path: Path) -> None:
    argv = ["ssh-keygen", "-Y", "sign", "-n", "file", "-f", keys / "ops"]
    other = subprocess.run(argv, input=DATA, check=True, capture_output=True, timeout=60).stdout
    with pytest.raises(DigestMismatch):
        signature.verify(DATA, other, keys / "ops.allowed")
    narrow = tmp_path / "allowed"
    narrow.write_text(f'ops@example namespaces="file" {(keys / "ops.pub").read_text()}')
    with pytest.raises(DigestMismatch):
        signature.verify(DATA, signature.sign(DATA, keys / "ops"), narrow)
    narrow.write_text(f'ops@example valid-before="20200101" {(keys / "ops.pub").read_text()}')
    with pytest.raises(DigestMismatch):
        signature.verify(DATA, signature.sign(DATA, keys / "ops"), narrow)


def test_keys_that_cannot_sign(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    shutil.copy(keys / "ops", tmp_path / "open")
    (tmp_path / "open").chmod(0o644)
    (tmp_path / "junk").write_text("junk")
    for path in (tmp_path / "none", tmp_path / "junk", tmp_path / "open", keygen(tmp_path / "protected", passphrase="secret")):
        with pytest.raises(KeyProblem):
            trust.Outgoing(sign_key=path).try_key()
    with pytest.raises(KeyProblem, match="cannot be read"):
        signature.verify(DATA, signature.sign(DATA, keys / "ops"), tmp_path / "none")
    monkeypatch.setattr(run, "which", lambda program: None)
    with pytest.raises(FeatureMissing):
        signature.sign(DATA, keys / "ops")


def test_by_an_agent_with_the_public_key_alone(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    socket = tmp_path / "agent"
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", socket], stdout=subprocess.DEVNULL)
    try:
        assert fake.wait(socket.exists)
        monkeypatch.setenv("SSH_AUTH_SOCK", str(socket))
        subprocess.run(["ssh-add", "-q", keys / "ops"], check=True, timeout=60)
        shutil.copy(keys / "ops.pub", tmp_path / "only.pub")
        assert signature.verify(DATA, signature.sign(DATA, tmp_path / "only.pub"), keys / "ops.allowed") == "ops@example"
    finally:
        agent.terminate()
        agent.wait(10)


def test_nothing_is_left_in_the_temporary_directory(keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    good = signature.sign(DATA, keys / "ops")
    signature.verify(DATA, good, keys / "ops.allowed")
    with pytest.raises(DigestMismatch):
        signature.verify(b"", good, keys / "ops.allowed")
    assert list(tmp_path.iterdir()) == []


# -- archives --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def signed(keys: Path, tmp_path: Path) -> bytes:
    """An archive that ops signed."""
    out = io.BytesIO()
    writer.write(trust.Outgoing(sign_key=keys / "ops").signed(StageMembers(make_stage(tmp_path / "signed"))), out)
    return out.getvalue()


def test_a_signed_archive(keys: Path, signed: bytes, tmp_path: Path) -> None:
    assert extract(io.BytesIO(signed), tmp_path / "x", judge=trust.Incoming(demand=demand(keys)).judge) is not None
    assert (tmp_path / "x" / layout.SIGNATURE).stat().st_mode & 0o777 == 0o600
    found = manifests.loads((tmp_path / "x" / layout.MANIFEST).read_bytes())
    assert layout.SIGNATURE not in found.digests
    layout.check_digests(tmp_path / "x", found)
    with pytest.raises(DigestMismatch, match="nobody who is in"):
        extract(io.BytesIO(signed), tmp_path / "y", judge=trust.Incoming(demand=demand(keys, "stranger")).judge)
    # Nothing but the two was unpacked.
    assert sorted(p.name for p in (tmp_path / "y").rglob("*") if p.is_file()) == ["ckpt.json", "ckpt.json.sig"]


def test_a_flipped_bit_anywhere_in_a_signed_archive(keys: Path, tmp_path: Path) -> None:
    """Without compression, whose own checksums would find it: 200 random places, 30 of them in the manifest and the signature."""
    stage = make_stage(tmp_path / "stage")
    out = io.BytesIO()
    members = trust.Outgoing(sign_key=keys / "ops").signed(StageMembers(stage))
    writer.write(members, out, compress="none")
    archive = out.getvalue()
    start, end = archive.index(b'"schema"'), archive.index(b"-----END SSH SIGNATURE")
    chance = random.Random(13)
    places = [chance.randrange(start, end) for _ in range(30)]
    places += [chance.randrange(len(archive)) for _ in range(170)]
    judge = trust.Incoming(demand=demand(keys)).judge
    for count, place in enumerate(places):
        bad = bytearray(archive)
        bad[place] ^= 1 << chance.randrange(8)
        into = tmp_path / f"into{count}"
        found: object = None
        try:
            found = extract(io.BytesIO(bytes(bad)), into, judge=judge)
        except (DigestMismatch, ArchiveInvalid):
            pass
        else:
            # A bit in the padding of a header or member: what was unpacked is bit for bit what was signed.
            assert found is not None
            for name in StageMembers(stage).names():
                assert name.endswith("/") or (into / name).read_bytes() == (stage / name).read_bytes(), (place, name)
        shutil.rmtree(into, ignore_errors=True)


class Reordered(StageMembers):
    """The members in another order, as an attacker may write them."""

    def __init__(self, stage: Path, first: tuple[str, ...]) -> None:
        super().__init__(stage)
        self.first = first

    def names(self) -> list[str]:
        return [*self.first, *(name for name in super().names() if name not in self.first)]


@pytest.mark.parametrize("first", [("config.dump",), ("artifacts/", layout.MANIFEST, "config.dump"), (layout.SIGNATURE, "spec.dump")])
def test_a_signature_that_does_not_come_first(keys: Path, tmp_path: Path, first: tuple[str, ...]) -> None:
    stage = make_stage(tmp_path / "stage")
    (stage / layout.SIGNATURE).write_bytes(signature.sign((stage / layout.MANIFEST).read_bytes(), keys / "ops"))
    out = io.BytesIO()
    writer.write(Reordered(stage, first), out)
    for required in (True, False):
        with pytest.raises(DigestMismatch):
            extract(io.BytesIO(out.getvalue()), tmp_path / f"x{required}", judge=trust.Incoming(demand=demand(keys, required=required)).judge)


def test_an_unsigned_archive(keys: Path, tmp_path: Path) -> None:
    for with_manifest in (True, False):
        out = io.BytesIO()
        writer.write(StageMembers(make_stage(tmp_path / f"stage{with_manifest}", with_manifest=with_manifest)), out)
        with pytest.raises(DigestMismatch, match="not signed"):
            extract(io.BytesIO(out.getvalue()), tmp_path / f"a{with_manifest}", judge=trust.Incoming(demand=demand(keys)).judge)
        extract(io.BytesIO(out.getvalue()), tmp_path / f"b{with_manifest}", judge=trust.Incoming(demand=demand(keys, required=False)).judge)


def test_a_signed_manifest_on_another_checkpoint(keys: Path, signed: bytes, tmp_path: Path) -> None:
    """podman keeps `artifacts/` of what it restored: a later export has a manifest (and a signature) of an earlier dump."""
    stage = tmp_path / "signed"
    (stage / layout.SIGNATURE).write_bytes(signature.sign((stage / layout.MANIFEST).read_bytes(), keys / "ops"))
    for name in ("checkpoint/inventory.img", "checkpoint/core-1.img"):
        (stage / name).write_bytes(b"another dump")
    out = io.BytesIO()
    writer.write(StageMembers(stage), out)
    with pytest.raises(DigestMismatch, match="belongs to another"):
        extract(io.BytesIO(out.getvalue()), tmp_path / "x", judge=trust.Incoming(demand=demand(keys)).judge)
    assert extract(io.BytesIO(out.getvalue()), tmp_path / "y") is None
    assert not (tmp_path / "y" / layout.SIGNATURE).exists()


# -- use cases -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A place for drafts in memory that is this test's own."""
    place = Path("/dev/shm", f"ckpt-test-{os.getpid()}")
    if not volatile.in_memory(place.parent):
        pytest.skip("/dev/shm is no tmpfs here")
    monkeypatch.setattr(volatile, "PLACES", (place,))
    yield place
    shutil.rmtree(place, ignore_errors=True)


def test_signed_in_the_store_and_on_every_way_out(world: World, keys: Path) -> None:  # noqa: F811
    world.engine.start("web")
    (saved,) = checkpoint([Target.parse("web")], options=OPTIONS, store_root=world.root, emit=ignore, outgoing=trust.Outgoing(sign_key=keys / "ops"))
    assert saved.checkpoint is not None, saved.error
    incoming = trust.Incoming(demand=demand(keys, local=True))
    assert incoming.judge_stage(saved.checkpoint.directory) == "ops@example"
    assert Catalog(world.root).find("web@1").manifest.generation == 1
    file = world.directory / "web.tar"
    export("web@1", at(file), options=OPTIONS, store_root=world.root, emit=ignore)
    # Under another name and number it is still what was signed, and so is what is exported again.
    copy = import_(at(file), name="other", incoming=incoming, store_root=world.root, emit=ignore).checkpoint
    assert copy is not None and copy.ref == "other@1" and Catalog(world.root).find("other").ref == "other@1"
    export("other", at(file), options=OPTIONS, store_root=world.root, emit=ignore)
    import_(at(file), incoming=incoming, store_root=world.root, emit=ignore)
    (back,) = restore(["other"], options=RestoreOptions(), store_root=world.root, emit=ignore, incoming=incoming)
    assert back.ok, back.error
    world.engine.end_all()
    stranger = trust.Incoming(demand=demand(keys, "stranger", local=True))
    for refs, archive in ((["web@1"], None), ([], file)):
        place = archive and at(archive)
        (refused,) = restore(refs, import_from=place, options=RestoreOptions(), store_root=world.root, emit=ignore, incoming=stranger)
        assert isinstance(refused.error, DigestMismatch)
    with pytest.raises(DigestMismatch):
        import_(at(file), incoming=stranger, store_root=world.root, emit=ignore)
    assert world.leftovers() == [] and len(Catalog(world.root).all()) == 3


def test_what_this_host_made_needs_no_signature_unless_asked(world: World, keys: Path) -> None:  # noqa: F811
    world.engine.start("web")
    world.save("web")
    (back,) = restore(["web"], options=RestoreOptions(), store_root=world.root, emit=ignore, incoming=trust.Incoming(demand=demand(keys)))
    assert back.ok, back.error
    world.engine.end_all()
    asked = trust.Incoming(demand=demand(keys, local=True))
    (refused,) = restore(["web"], options=RestoreOptions(), store_root=world.root, emit=ignore, incoming=asked)
    assert isinstance(refused.error, DigestMismatch)


def test_encrypted_of_a_running_workload_is_staged_in_memory(world: World, keys: Path, in_memory: Path) -> None:  # noqa: F811
    web = world.engine.start("web")
    identity = pyrage.x25519.Identity.generate()
    outgoing = trust.Outgoing(seal.recipients([f"age:{identity.to_public()}"]), keys / "ops")
    file = world.directory / "web.age"
    stages: list[Path] = []
    dump = type(world.engine).dump

    def seen(self: object, container: object, stage: Path, options: DumpOptions, job: object) -> object:
        assert options.sealed
        stages.append(stage)
        return dump(self, container, stage, options, job)  # type: ignore[arg-type]

    world.engine.__class__.dump, before = seen, dump  # type: ignore[method-assign, assignment]
    try:
        out = export("fake:web", at(file), options=OPTIONS, outgoing=outgoing, store_root=world.root, emit=ignore)
    finally:
        world.engine.__class__.dump = before  # type: ignore[method-assign]
    assert out.ok and out.stats["archive_bytes"] == file.stat().st_size and file.stat().st_mode & 0o777 == 0o600
    assert stages[0].is_relative_to(in_memory) and in_memory.stat().st_mode & 0o777 == 0o700
    assert list((in_memory / "tmp").iterdir()) == [] and world.leftovers() == []
    secret = world.directory / "identity"
    secret.write_text(str(identity))
    secret.chmod(0o600)
    incoming = trust.Incoming(seal.identities([secret]), demand(keys))
    for refused, kind in ((trust.ANYBODY, KeyProblem), (trust.Incoming(incoming.identities, demand(keys, "stranger")), DigestMismatch)):
        with pytest.raises(kind):
            import_(at(file), incoming=refused, store_root=world.root, emit=ignore)
        assert Catalog(world.root).all() == [] and world.leftovers() == []
    (back,) = restore([], import_from=at(file), options=RestoreOptions(), store_root=world.root, emit=ignore, incoming=incoming)
    assert back.ok, back.error
    assert world.state(web) == "running"


@pytest.mark.parametrize("compress", ["zstd", "gzip", "none"])
def test_an_encrypted_archive_is_looked_at_and_verified_where_it_lies(world: World, keys: Path, compress: str) -> None:  # noqa: F811
    world.engine.start("web")
    (saved,) = checkpoint([Target.parse("web")], options=OPTIONS, store_root=world.root, emit=ignore, outgoing=trust.Outgoing(sign_key=keys / "ops"))
    outgoing = trust.Outgoing(seal.recipients([f"age:{keys}/ops.pub"]))
    file = world.directory / "web.age"
    export("web", at(file), compress=compress, options=OPTIONS, outgoing=outgoing, store_root=world.root, emit=ignore)
    identities = seal.identities([keys / "ops"])
    seen = inspect(str(file), identities=identities, store_root=world.root)
    assert saved.checkpoint is not None and seen.manifest.digests == saved.checkpoint.manifest.digests
    with pytest.raises(KeyProblem):
        inspect(str(file), store_root=world.root)
    incoming = trust.Incoming(identities, demand(keys, local=True))
    for ref in (str(file), "web"):
        (good,) = verify([ref], incoming=incoming, store_root=world.root, emit=ignore)
        assert good.ok and good.stats["signature"] == "ops@example" and good.stats["digests"] == "equal", good
        (bad,) = verify([ref], incoming=trust.Incoming(identities, demand(keys, "stranger", local=True)), store_root=world.root, emit=ignore)
        assert isinstance(bad.error, DigestMismatch) and bad.stats["signature"] == "wrong"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    (altered,) = verify([str(file)], incoming=incoming, store_root=world.root, emit=ignore)
    assert isinstance(altered.error, DigestMismatch)


def test_without_memory_to_stage_in_nothing_is_begun(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    if volatile.in_memory(tmp_path):
        pytest.skip("this test's directory is in memory")
    monkeypatch.setattr(volatile, "PLACES", (tmp_path / "place",))
    web = world.engine.start("web")
    outgoing = trust.Outgoing((seal.Passphrase(b"x"),))
    with pytest.raises(FeatureMissing, match="in clear"):
        export("fake:web", at(world.directory / "x"), options=OPTIONS, outgoing=outgoing, store_root=world.root, emit=ignore)
    assert world.state(web) == "running" and not (world.directory / "x").exists()


def test_a_place_in_memory_that_is_not_ours_is_not_used(in_memory: Path, tmp_path: Path) -> None:
    in_memory.symlink_to(tmp_path)
    with pytest.raises(FeatureMissing):
        volatile.catalog()
    in_memory.unlink()
    in_memory.mkdir(mode=0o755)
    with pytest.raises(FeatureMissing):
        volatile.catalog()
    in_memory.rmdir()
    draft = volatile.catalog().begin("x")
    assert volatile.sweep() == []
    draft.close()
    assert volatile.sweep() == [draft.id]


# -- the verbs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["export", "web", "-o", "x", "--encrypt", "age1abc"], 2),
        (["export", "web", "-o", "x", "--encrypt", "age:age1qqqqqqqqqqqqqqqqqqqqqqqqqq"], 2),
        (["export", "web", "-o", "x", "--encrypt", "age:/none"], 32),
        (["export", "web", "-o", "x", "--sign", "/none"], 32),
        (["export", "web", "-o", "x", "--passphrase-file", "/none"], 32),
        (["export", "web", "-o", "x", "--passphrase-file", "/a", "--passphrase-command", "b"], 2),
        (["import", "x", "--identity", "/none"], 32),
        (["checkpoint", "web", "--encrypt", "age:x"], 2),
        (["restore", "web", "--identity", "/none"], 32),
    ],
)
def test_keys_are_tried_before_anything(
    argv: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("CKPT_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("CKPT_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.setattr("ckpt.cli.main._catch_signals", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert main(argv) == code
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_the_configuration_decides_what_no_flag_does(keys: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from ckpt.cli import protection
    from ckpt.cli.common import Session
    from ckpt.cli.render.reporter import Reporter
    from ckpt.config import Settings

    team = tmp_path / "team"
    team.write_text((keys / "ops.pub").read_text())
    settings = Settings(encrypt=(f"age:{team}",), sign_key=keys / "ops", identity=(keys / "ops",), allowed_signers=keys / "ops.allowed")
    session = Session(settings, Reporter("export", "table", []))
    found = protection.outgoing(session, {})
    assert len(found.recipients) == 1 and found.sign_key == keys / "ops"
    assert protection.outgoing(session, {}, archive=False).recipients == ()
    assert protection.outgoing(session, {"encrypt": ("none",), "sign": "none"}) == trust.OPEN
    came = protection.incoming(session, {})
    assert len(came.identities) == 1 and came.demand == signature.Demand(keys / "ops.allowed", required=False)
    strict = Session(replace(settings, require_signature=True), session.reporter)
    assert protection.incoming(strict, {}).demand == signature.Demand(keys / "ops.allowed", required=True)
    with pytest.raises(ConfigError):
        protection.incoming(Session(Settings(require_signature=True), session.reporter), {})
    flag = protection.incoming(session, {"verify_with": keys / "stranger.allowed"}).demand
    assert flag == signature.Demand(keys / "stranger.allowed", required=True, local=True)


def test_the_exit_codes() -> None:
    assert [kind("x").exit_code for kind in (DigestMismatch, KeyProblem)] == [31, 32]
    assert issubclass(KeyProblem, CkptError)
