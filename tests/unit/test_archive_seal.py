"""Encrypted archives: what we write the age library reads and the other way round, and nothing altered, truncated or for others is taken."""

from __future__ import annotations

import io
import os
import random
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyrage
import pytest

from ckpt.archive import age, agekeys, seal
from ckpt.archive.members import StageMembers
from ckpt.archive.reader import extract
from ckpt.archive.writer import write
from ckpt.errors import ArchiveInvalid, CkptError, DigestMismatch, KeyProblem, UsageError
from tests.unit.test_archive_reader import make_stage

SIZES = (0, 1, age.CHUNK_BYTES - 1, age.CHUNK_BYTES, age.CHUNK_BYTES + 1, 2 * age.CHUNK_BYTES, 17 * age.CHUNK_BYTES, 1_234_567)


class Keys:
    """One of each kind, made by their own programs."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        identity = pyrage.x25519.Identity.generate()
        self.native = directory / "age.txt"
        self.native.write_text(f"# created: today\n# public key: {identity.to_public()}\n{identity}\n")
        self.native.chmod(0o600)
        self.recipient = str(identity.to_public())
        self.ed25519 = self.ssh("ed25519")
        self.rsa = self.ssh("rsa", "-b", "2048")
        self.pyrage = {self.native: identity, **{path: pyrage.ssh.Identity.from_buffer(path.read_bytes()) for path in (self.ed25519, self.rsa)}}

    def ssh(self, kind: str, *more: str, name: str = "", passphrase: str = "") -> Path:
        path = self.directory / (name or kind)
        subprocess.run(["ssh-keygen", "-q", "-t", kind, *more, "-N", passphrase, "-C", "somebody@somewhere", "-f", path], check=True, timeout=60)
        return path

    @property
    def specs(self) -> dict[Path, str]:
        return {self.native: f"age:{self.recipient}", self.ed25519: "age:" + public(self.ed25519), self.rsa: f"age:{self.rsa}.pub"}


def public(path: Path) -> str:
    return path.with_name(path.name + ".pub").read_text().strip()


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    return Keys(tmp_path_factory.mktemp("keys"))


def sealed(data: bytes, to: tuple[seal.Recipient, ...], *, piece: int = 100_003) -> bytes:
    out = io.BytesIO()
    with seal.encrypting(out, to) as stream:
        for at in range(0, len(data), piece):
            assert stream.write(data[at : at + piece]) == len(data[at : at + piece])
    return out.getvalue()


def opened(data: bytes, *files: Path, secret: seal.Passphrase | None = None) -> bytes:
    return seal.decrypting(io.BytesIO(data), seal.identities(files, secret)).read()


@pytest.mark.parametrize("size", SIZES)
def test_both_ways_with_the_library(keys: Keys, size: int) -> None:
    data = random.Random(size).randbytes(size)
    ours = sealed(data, seal.recipients(list(keys.specs.values())))
    recipients = [identity.to_public() if hasattr(identity, "to_public") else None for identity in keys.pyrage.values()]
    to = [r for r in recipients if r] + [pyrage.ssh.Recipient.from_str(public(path)) for path in (keys.ed25519, keys.rsa)]
    theirs, armored = pyrage.encrypt(data, to), pyrage.encrypt(data, to, armored=True)
    for path, identity in keys.pyrage.items():
        assert pyrage.decrypt(ours, [identity]) == data
        for archive in (ours, theirs, armored):
            assert seal.is_sealed(archive[: seal.HEAD_BYTES])
            assert opened(archive, path) == data


@pytest.mark.parametrize("piece", [1, 4096, age.CHUNK_BYTES, age.CHUNK_BYTES + 1, 1 << 20])
def test_pieces_of_any_size(keys: Keys, piece: int) -> None:
    data = random.Random(5).randbytes(20_000 if piece == 1 else 3 * age.CHUNK_BYTES)
    assert pyrage.decrypt(sealed(data, seal.recipients([keys.specs[keys.native]]), piece=piece), [keys.pyrage[keys.native]]) == data


def test_a_source_that_gives_little(keys: Keys) -> None:
    class Slow(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(min(size or 1, 977))

    data = random.Random(6).randbytes(150_000)
    armored = pyrage.encrypt(data, [keys.pyrage[keys.native].to_public()], armored=True)
    for archive in (sealed(data, seal.recipients([keys.specs[keys.native]])), armored):
        assert seal.decrypting(Slow(archive), seal.identities([keys.native])).read() == data


@pytest.fixture(scope="module")
def protected(keys: Keys) -> bytes:
    """The native identity, encrypted with a passphrase by the library (which takes its second for that)."""
    return pyrage.passphrase.encrypt(keys.native.read_bytes(), "correct horse")


def test_passphrase_both_ways(keys: Keys, protected: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agekeys, "SCRYPT_LOG_N", 12)
    data = random.Random(1).randbytes(70_000)
    file = tmp_path / "passphrase"
    file.write_text("correct horse\nsecond line\n")
    file.chmod(0o600)
    secret = seal.passphrase(file)
    assert secret is not None and "horse" not in repr(secret)
    ours = sealed(data, seal.recipients([], secret))
    assert pyrage.passphrase.decrypt(ours, "correct horse") == data
    assert opened(protected, secret=seal.passphrase(command="printf 'correct %s\\n' horse")) == keys.native.read_bytes()
    with pytest.raises(KeyProblem):
        opened(ours, secret=seal.Passphrase(b"wrong"))
    with pytest.raises(KeyProblem, match="needs a passphrase"):
        opened(ours)


@pytest.mark.skipif(shutil.which("age") is None, reason="no age on this host (the lab has it)")
def test_both_ways_with_the_program(keys: Keys, tmp_path: Path) -> None:
    data = random.Random(2).randbytes(200_000)
    ours = sealed(data, seal.recipients(list(keys.specs.values())))
    for path in keys.pyrage:
        assert subprocess.run(["age", "-d", "-i", path], input=ours, capture_output=True, check=True, timeout=60).stdout == data
    theirs = subprocess.run(["age", "-r", keys.recipient], input=data, capture_output=True, check=True, timeout=60).stdout
    assert opened(theirs, keys.native) == data


# -- refused -----------------------------------------------------------------------------------------------------------


def test_no_key_and_other_keys(keys: Keys) -> None:
    archive = sealed(b"x", seal.recipients([keys.specs[keys.ed25519]]))
    with pytest.raises(KeyProblem, match="encrypted and needs a key"):
        opened(archive)
    with pytest.raises(KeyProblem, match="other keys") as caught:
        opened(archive, keys.native, keys.rsa)
    assert "ssh-ed25519" in str(caught.value.hint)


def test_every_truncation_is_found(keys: Keys) -> None:
    archive = sealed(random.Random(3).randbytes(3 * age.CHUNK_BYTES), seal.recipients([keys.specs[keys.native]]))
    ends = {random.Random(4).randrange(len(archive)) for _ in range(60)}
    box = age.CHUNK_BYTES + age.TAG_BYTES
    ends |= {len(archive) - 1, len(archive) - box, len(archive) - 2 * box, len(archive) - 3 * box, len(archive) - 3 * box - 16}
    for end in ends - set(range(23)):
        with pytest.raises(DigestMismatch):
            opened(archive[:end], keys.native)
    with pytest.raises(DigestMismatch):
        opened(archive + b"\0", keys.native)
    swapped = archive[: -3 * box] + archive[-2 * box : -box] + archive[-3 * box : -2 * box] + archive[-box:]
    with pytest.raises(DigestMismatch):
        opened(swapped, keys.native)


def test_a_flipped_bit_anywhere_is_found_before_anything_is_kept(keys: Keys, tmp_path: Path) -> None:
    """200 random places, and every byte of the header."""
    stage = make_stage(tmp_path / "stage")
    out = io.BytesIO()
    with seal.encrypting(out, seal.recipients([keys.specs[keys.native]])) as stream:
        write(StageMembers(stage), stream)
    archive = out.getvalue()
    header = archive.index(b"\n---") + 50
    chance = random.Random(11)
    places = [chance.randrange(header, len(archive)) for _ in range(200)] + list(range(header))
    identities = seal.identities([keys.native])
    for count, place in enumerate(places):
        bad = bytearray(archive)
        bad[place] ^= 1 << chance.randrange(8)
        into = tmp_path / f"into{count}"
        with pytest.raises((DigestMismatch, KeyProblem, ArchiveInvalid)) as caught:
            found = seal.reading(io.BytesIO(bytes(bad)), identities)
            extract(found, into)
            seal.finish(found)
        if place >= header:
            assert caught.type is DigestMismatch
        shutil.rmtree(into, ignore_errors=True)


def test_what_was_cut_off_behind_the_archive_is_found(keys: Keys, tmp_path: Path) -> None:
    """The archive inside is whole, but the last chunk of the age file, empty or of zeros, is not there."""
    stage = make_stage(tmp_path / "stage")
    plain = io.BytesIO()
    write(StageMembers(stage), plain, compress="none")
    data = plain.getvalue()
    data += bytes(-len(data) % age.CHUNK_BYTES + age.CHUNK_BYTES)
    archive = sealed(data, seal.recipients([keys.specs[keys.native]]))
    with pytest.raises(DigestMismatch):
        found = seal.reading(io.BytesIO(archive[: -age.CHUNK_BYTES - age.TAG_BYTES]), seal.identities([keys.native]))
        extract(found, tmp_path / "into")
        seal.finish(found)


@pytest.mark.parametrize(
    "data",
    [
        b"age-encryption.org/v1\n",
        b"age-encryption.org/v1\n--- " + b"A" * 43 + b"\n",
        b"age-encryption.org/v1\n-> X25519\n\n--- " + b"A" * 43 + b"\n" + bytes(48),
        b"age-encryption.org/v1\n-> X25519 AAAA\nAAAA\n--- " + b"A" * 43 + b"\n" + bytes(48),
        b"age-encryption.org/v1\n-> scrypt " + b"A" * 22 + b" 18 9\n" + b"A" * 43 + b"\n--- " + b"A" * 43 + b"\n",
        b"age-encryption.org/v1\n-> x " + b"y" * 10_000,
        b"age-encryption.org/v1\n-> x y\n" + (b"A" * 64 + b"\n") * 10_000,
        b"age-encryption.org/v1\n-> x \x01\n\n--- " + b"A" * 43 + b"\n",
        b"age-encryption.org/v1\n" + b"-> X25519 " + b"A" * 43 + b"\n" + b"A" * 43 + b"\n--- " + b"A" * 43 + b"\n" + bytes(48),
    ],
    ids=range(9),
)
def test_headers_that_make_no_sense(keys: Keys, data: bytes) -> None:
    with pytest.raises((DigestMismatch, KeyProblem)):
        opened(data, keys.native, secret=seal.Passphrase(b"x"))


def test_a_work_factor_that_would_eat_the_memory() -> None:
    stanza = agekeys.wrap_scrypt(b"x", bytes(16), log_n=10)
    with pytest.raises(KeyProblem, match="work factor"):
        agekeys.unwrap_scrypt(b"x", [age.Stanza("scrypt", (stanza.args[0], "30"), stanza.body)])
    with pytest.raises(DigestMismatch):
        agekeys.unwrap_scrypt(b"x", [stanza, age.Stanza("X25519", ("A",), b"")])


# -- keys ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_keys_that_others_can_read(keys: Keys, tmp_path: Path, mode: int) -> None:
    path = tmp_path / "key"
    path.write_bytes(keys.native.read_bytes())
    path.chmod(mode)
    for use in (lambda: seal.identities([path]), lambda: seal.passphrase(path)):
        with pytest.raises(KeyProblem, match="read by others"):
            use()


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "no identity"), (b"AGE-SECRET-KEY-1QQQ\n", "no identity"), (b"AGE-PLUGIN-YUBIKEY-1QQ\n", "plugin"), (b"\xff\xfe", "no identity"),
     (b"-----BEGIN OPENSSH PRIVATE KEY-----\nAAAA\n-----END OPENSSH PRIVATE KEY-----\n", "not a private key")],
)  # fmt: skip
def test_files_that_hold_no_key(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(KeyProblem, match=said):
        seal.identities([path])
    with pytest.raises(KeyProblem, match="cannot be read"):
        seal.identities([tmp_path / "none"])


def test_a_protected_ssh_key_and_a_protected_identity(keys: Keys, protected: bytes, tmp_path: Path) -> None:
    with pytest.raises(KeyProblem, match="passphrase"):
        seal.identities([keys.ssh("ed25519", name="protected", passphrase="secret")])
    path = tmp_path / "key.age"
    path.write_bytes(protected)
    path.chmod(0o600)
    with pytest.raises(KeyProblem, match="protected by a passphrase"):
        seal.identities([path])
    archive = sealed(b"data", seal.recipients([keys.specs[keys.native]]))
    assert opened(archive, path, secret=seal.Passphrase(b"correct horse")) == b"data"
    with pytest.raises(KeyProblem, match="cannot be opened"):
        seal.identities([path], seal.Passphrase(b"wrong"))


@pytest.mark.parametrize(
    "command", ["exit 3", "true", "head -c 5000 /dev/zero | tr '\\0' x"], ids=["fails", "silent", "endless"]
)  # fmt: skip
def test_commands_that_give_no_passphrase(command: str) -> None:
    with pytest.raises(KeyProblem):
        seal.passphrase(command=command)


def test_what_is_no_recipient(keys: Keys, tmp_path: Path) -> None:
    secret = keys.native.read_text().splitlines()[-1]
    for spec in ("age:", "x25519:abc", keys.recipient, f"age:{keys.recipient[:-1]}q", "age:ssh-ed25519 AAAA", "age:ssh-dss AAAA x", f"age:{secret}"):
        with pytest.raises(UsageError) as caught:
            seal.recipients([spec])
        assert "SECRET" not in caught.value.message
    for spec in (f"age:{tmp_path}/none", f"age:{tmp_path}"):
        with pytest.raises(KeyProblem):
            seal.recipients([spec])
    empty = tmp_path / "empty"
    empty.write_text("# nobody\n")
    with pytest.raises(KeyProblem, match="no recipient"):
        seal.recipients([f"age:{empty}"])
    with pytest.raises(UsageError, match="do not go together"):
        seal.recipients([keys.specs[keys.native]], seal.Passphrase(b"x"))
    with pytest.raises(UsageError):
        seal.recipients(["none", keys.specs[keys.native]])
    assert seal.recipients(["none"]) == ()


def test_a_file_of_recipients(keys: Keys, tmp_path: Path) -> None:
    path = tmp_path / "team"
    path.write_text(f"# us\n{keys.recipient}\n\n{public(keys.ed25519)}\n{public(keys.rsa)}\n")
    archive = sealed(b"data", seal.recipients([f"age:{path}"]))
    for key in keys.pyrage:
        assert opened(archive, key) == b"data"


# -- streams ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_read_at_any_place(keys: Keys, tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    path = tmp_path / "sealed"
    path.write_bytes(sealed(data, seal.recipients(list(keys.specs.values()))))
    chance = random.Random(8)
    identities = seal.identities([keys.rsa])
    with path.open("rb") as file:
        found = seal.random_access(file.fileno(), identities)
        assert found.size_bytes == size
        assert found.pread(size + 10, 0) == data
        for _ in range(50):
            offset, count = chance.randrange(size + 1), chance.randrange(200_000)
            assert found.pread(count, offset) == data[offset : offset + count]
    archive = path.read_bytes()
    for bad in (archive[:-1], archive + b"x", archive[: len(archive) - len(archive) % 65552] if size > 70_000 else archive[:-16]):
        path.write_bytes(bad)
        with path.open("rb") as file, pytest.raises(DigestMismatch):
            seal.random_access(file.fileno(), identities)
    with pytest.raises(KeyProblem), path.open("rb") as file:
        seal.random_access(file.fileno(), ())


def test_memory_does_not_grow_with_the_archive(keys: Keys) -> None:
    def peak(count: int) -> int:
        reading, writing = os.pipe()
        import threading

        def produce() -> None:
            with os.fdopen(writing, "wb") as out, seal.encrypting(out, seal.recipients([keys.specs[keys.native]])) as stream:
                for _ in range(count):
                    stream.write(bytes(1 << 20))

        thread = threading.Thread(target=produce)
        tracemalloc.start()
        thread.start()
        with os.fdopen(reading, "rb") as source:
            plain, size = seal.decrypting(source, seal.identities([keys.native])), 0
            while data := plain.read(1 << 20):
                size += len(data)
        thread.join()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert size == count << 20
        return most

    assert peak(4) < 8 << 20
    assert peak(48) < 8 << 20


def test_an_error_leaves_a_file_that_nobody_takes(keys: Keys) -> None:
    out = io.BytesIO()

    def fail() -> None:
        with seal.encrypting(out, seal.recipients([keys.specs[keys.native]])) as stream:
            stream.write(bytes(300_000))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with pytest.raises(DigestMismatch):
        opened(out.getvalue(), keys.native)


def test_what_is_not_sealed_is_given_as_it_is() -> None:
    for data in (b"", b"x", b"\x28\xb5\x2f\xfd" + bytes(100)):
        assert not seal.is_sealed(data)
        source = seal.reading(io.BytesIO(data), ())
        assert b"".join(iter(lambda: source.read(1000), b"")) == data  # noqa: B023


def test_the_errors_have_their_exit_codes() -> None:
    codes: dict[Callable[..., CkptError], int] = {DigestMismatch: 31, KeyProblem: 32, UsageError: 2}
    assert {kind("x").exit_code for kind in codes} == set(codes.values())
