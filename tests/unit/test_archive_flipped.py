"""One bit is flipped, anywhere in an archive: it is found before anything could run."""

from __future__ import annotations

import gzip
import io
import random
import shutil
import struct
import tarfile
from pathlib import Path

import pytest

from ckpt.archive import layout, reader, writer
from ckpt.archive.manifest import dumps
from ckpt.archive.members import StageMembers
from ckpt.errors import ArchiveInvalid, DigestMismatch
from ckpt.model import Manifest

CODECS = pytest.mark.parametrize("compress", ["zstd", "gzip", "none"])
PLACES = 200


def made(stage: Path, compress: str) -> bytes:
    """An archive of ours with members of all sizes."""
    generator = random.Random(7)
    for name in ("checkpoint", "artifacts", "volumes"):
        (stage / name).mkdir(parents=True)
    (stage / "config.dump").write_text('{"id": "' + "c" * 64 + '", "name": "web"}')
    (stage / "spec.dump").write_text("{}")
    (stage / "checkpoint/inventory.img").write_bytes(generator.randbytes(61))
    (stage / "checkpoint/core-1.img").write_bytes(generator.randbytes(700))
    (stage / "checkpoint/pages-1.img").write_bytes(generator.randbytes(300_000) + bytes(300_000))
    (stage / "rootfs-diff.tar").write_bytes(b"text " * 20_000)
    (stage / "volumes/data.tar").write_bytes(generator.randbytes(2048))
    manifest = Manifest("a" * 16, "web", "podman", "c" * 64, 1.5, digests=layout.digest_members(stage))
    (stage / layout.MANIFEST).write_bytes(dumps(manifest))
    out = io.BytesIO()
    writer.write(StageMembers(stage), out, compress=compress)  # type: ignore[arg-type]
    return out.getvalue()


def found(data: bytes, into: Path) -> bool:
    """Whether the archive is refused."""
    try:
        reader.extract(io.BytesIO(data), into)  # None would be an archive of somebody else, which is taken without digests
        return False
    except (ArchiveInvalid, DigestMismatch):
        return True
    finally:
        shutil.rmtree(into, ignore_errors=True)


def missed(data: bytes, bits: list[int], into: Path) -> list[tuple[int, int]]:
    """Which of these bits can be flipped without notice."""
    bad = []
    for bit in bits:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        if not found(bytes(changed), into) and not _fills_a_byte_of_deflate(data, bytes(changed)):
            bad.append(divmod(bit, 8))
    return bad


def _fills_a_byte_of_deflate(data: bytes, changed: bytes) -> bool:
    """RFC 1951, 3.2.4: a stored block begins at a byte; the up to seven bits before it are skipped, and no check sum covers them.

    Nobody can find those; the tar that comes out is the same to the last bit.
    """
    return data.startswith(b"\x1f\x8b") and gzip.decompress(data) == gzip.decompress(changed) and data[:10] == changed[:10]


@CODECS
@pytest.mark.timeout(200)
def test_two_hundred_random_bits(tmp_path: Path, compress: str) -> None:
    data = made(tmp_path / "stage", compress)
    assert not found(data, tmp_path / "out")
    seed = random.randrange(1 << 32)
    bits = [random.Random(1).randrange(8 * len(data)) for _ in range(PLACES // 2)] + random.Random(seed).choices(range(8 * len(data)), k=PLACES // 2)
    assert missed(data, bits, tmp_path / "out") == [], f"seed {seed}"


@CODECS
@pytest.mark.timeout(200)
def test_the_bits_that_no_check_sum_of_the_compression_covers(tmp_path: Path, compress: str) -> None:
    """The headers of the first frame; the index at the end, every bit of every eighth byte."""
    data = made(tmp_path / "stage", compress)
    head = 18 if compress != "none" else 512
    bits = [*range(8 * head)] if compress != "none" else [8 * n + n % 8 for n in range(head)]
    tail = range(max(head, len(data) - 900), len(data), 8 if compress != "none" else 16)
    bits += [8 * n + n // 8 % 8 for n in tail]
    assert missed(data, bits, tmp_path / "out") == []


def test_every_frame_of_zstd(tmp_path: Path) -> None:
    """All bits of all frames' headers."""
    data = made(tmp_path / "stage", "zstd")
    starts = [n for n in range(len(data) - 4) if data[n : n + 4] == b"\x28\xb5\x2f\xfd" or struct.unpack_from("<I", data, n)[0] >> 4 == 0x184D2A5]
    assert len(starts) >= 4
    assert missed(data, [8 * start + bit for start in starts for bit in range(9 * 8)], tmp_path / "out") == []


def test_every_bit_of_a_tar_header_and_of_the_manifest(tmp_path: Path) -> None:
    data = made(tmp_path / "stage", "none")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        member = tar.getmember(layout.MANIFEST)
    begin, end = member.offset, member.offset_data + member.size
    generator = random.Random(3)
    bits = [8 * (begin + n) + bit for n in range(148, 157) for bit in range(8)]
    bits += [8 * n + generator.randrange(8) for n in range(member.offset_data, end, 7)]
    assert missed(data, bits, tmp_path / "out") == []
