"""Attacks with the outer tar, its compression, and the manifest."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import struct
import tarfile
from functools import partial
from typing import Any

from tests.corpus.attack import attack, register
from tests.corpus.base import a_manifest, archive, foreign, info, members, pack

SYMLINKS, TARFILE = "CVE-2026-53489 links to host files", "CVE-2025-4517/4330/4138, CVE-2026-7774"
TRICKS, BOMBS, FORGED = "tar", "bombs", "forged manifest"
EVIL = b"evil"


def _first(*parts: tuple[str | tarfile.TarInfo, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    """Evil members before the honest ones."""
    return pack(*parts, *members().items(), kind=kind)


def _last(*parts: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    return pack(*members().items(), *parts)


for _name, _why, _parts in (
    ("symlink in place of a directory", SYMLINKS, [(info("checkpoint", tarfile.SYMTYPE, "/etc"), b"")]),
    ("symlink for a member", SYMLINKS, [(info("ctr.log", tarfile.SYMTYPE, "/etc/shadow"), b"")]),
    ("symlink within the archive", SYMLINKS, [(info("checkpoint/x.img", tarfile.SYMTYPE, "core-1.img"), b"")]),
    ("hard link to a host file", SYMLINKS, [(info("ctr.log", tarfile.LNKTYPE, "/etc/shadow"), b"")]),
    ("hard link to a member", SYMLINKS, [(info("ctr.log", tarfile.LNKTYPE, "config.dump"), b"")]),
    ("link chain out", TARFILE, [(info("a", tarfile.SYMTYPE, "."), b""), (info("a/b", tarfile.SYMTYPE, ".."), b""), (info("a/b/evil"), EVIL)]),
    ("link longer than PATH_MAX", TARFILE, [(info("d/" * 1000 + "l", tarfile.SYMTYPE, "../" * 1000 + "etc"), b"")]),
    ("hard link to a symlink", TARFILE, [(info("x", tarfile.SYMTYPE, "/etc/passwd"), b""), (info("ctr.log", tarfile.LNKTYPE, "x"), b"")]),
    ("parent", TRICKS, [("../evil", EVIL)]),
    ("parent inside", TRICKS, [("checkpoint/../../evil", EVIL)]),
    ("absolute", TRICKS, [("/tmp/ckpt-corpus-evil", EVIL)]),
    ("absolute member", TRICKS, [("/ctr.log", EVIL)]),
    ("backslashes", TRICKS, [("checkpoint\\..\\..\\evil", EVIL)]),
    ("no member of the layout", TRICKS, [("config.json", b"{}")]),
    ("entry.json", FORGED, [("entry.json", b'{"schema": 1, "origin": "local"}')]),
    ("entry.json in a directory", FORGED, [("artifacts/../entry.json", b"{}")]),
    ("hidden directory", TRICKS, [(".git/", b""), (".git/hooks/x", EVIL)]),
    ("deep", TRICKS, [("checkpoint/a/b.img", EVIL)]),
    ("control characters in a name", TRICKS, [("checkpoint/\x1b]0;owned\x07.img", EVIL)]),
    ("newline in a name", TRICKS, [("checkpoint/a\nerror: all is well", EVIL)]),
    ("surrogates in a name", TRICKS, [("checkpoint/\udcff.img", EVIL)]),
    ("overlong name", TRICKS, [("checkpoint/" + "x" * 300, EVIL)]),
    ("overlong path", TRICKS, [("x/" * 3000 + "x", EVIL)]),
    ("dot as a file", TRICKS, [(".", EVIL)]),
    ("empty name", TRICKS, [("checkpoint/", b""), (info("checkpoint//"), EVIL)]),
    ("member twice", TRICKS, [("config.dump", b"{}")]),
    ("member twice by a dot", TRICKS, [("./config.dump", b"{}")]),
    ("member twice by dots", TRICKS, [("././/config.dump", b"{}")]),
    ("directory twice", TRICKS, [(info("checkpoint", tarfile.DIRTYPE), b""), (info("checkpoint/", tarfile.DIRTYPE), b"")]),
    ("directory with data", TRICKS, [(info("artifacts/", tarfile.DIRTYPE), EVIL)]),
    ("directory as a file", TRICKS, [("checkpoint", EVIL)]),
    ("file as a directory", TRICKS, [(info("ctr.log", tarfile.DIRTYPE), b"")]),
    ("character device", TRICKS, [(info("ctr.log", tarfile.CHRTYPE), b"")]),
    ("block device", TRICKS, [(info("ctr.log", tarfile.BLKTYPE), b"")]),
    ("FIFO", TRICKS, [(info("ctr.log", tarfile.FIFOTYPE), b"")]),
    ("contiguous file of an unknown kind", TRICKS, [(info("ctr.log", b"Q"), EVIL)]),
    ("multi-volume", TRICKS, [(info("ctr.log", b"M"), EVIL)]),
    ("volume label", TRICKS, [(info("label", b"V"), b"")]),
    ("global header", TRICKS, [(info("g", tarfile.XGLTYPE), b"17 path=../evil\n")]),
    ("old GNU sparse", TRICKS, [(info("ctr.log", tarfile.GNUTYPE_SPARSE), EVIL)]),
    ("pax sparse", TRICKS, [(info("ctr.log", GNU__sparse__realsize="9" * 15), EVIL)]),
    ("pax sparse 1.0", TRICKS, [(info("ctr.log", GNU__sparse__major="1", GNU__sparse__minor="0", GNU__sparse__name="../evil"), EVIL)]),
    ("pax path", TRICKS, [(info("ctr.log", path="../evil"), EVIL)]),
    ("pax path, absolute", TRICKS, [(info("ctr.log", path="/tmp/ckpt-corpus-evil"), EVIL)]),
    ("pax path with a NUL", TRICKS, [(info("ctr.log", path="ctr.log\0/../evil"), EVIL)]),
    ("pax link", TRICKS, [(info("ctr.log", tarfile.SYMTYPE, "x", linkpath="/etc/shadow"), b"")]),
    ("pax size, negative", TRICKS, [(info("ctr.log", size="-512"), EVIL)]),
    ("pax size, no number", TRICKS, [(info("ctr.log", size="0x10"), EVIL)]),
    ("pax size, other digits", TRICKS, [(info("ctr.log", size="\u0663"), EVIL)]),
    ("pax size, endless", BOMBS, [(info("ctr.log", size="9" * 18), EVIL)]),
    ("pax size, longer than a number", BOMBS, [(info("ctr.log", size="1" * 5000), EVIL)]),
    ("huge pax header", BOMBS, [(info("ctr.log", comment="x" * (2 << 20)), EVIL)]),
    ("pre-checkpoint", TRICKS, [("pre-checkpoint/", b"")]),
    ("second half of a pre-checkpoint", TRICKS, [(info("checkpoint/parent", tarfile.SYMTYPE, "../pre-checkpoint"), b"")]),
    ("volume with a path for a name", TRICKS, [("volumes/../../evil.tar", EVIL)]),
    ("volume that is hidden", TRICKS, [("volumes/.tar", EVIL)]),
    ("signature as a directory", TRICKS, [(info("artifacts/ckpt.json.sig/", tarfile.DIRTYPE), b""), ("artifacts/ckpt.json.sig/x", EVIL)]),
):
    register(_name, _why, "import", partial(_first if "twice" not in _name else _last, *_parts))


def _bent(at: int, data: bytes, *, of: bytes | None = None, sum_again: bool = True) -> bytes:
    """The first header with some bytes changed, and its sum made right again."""
    whole = bytearray(of or foreign(members()))
    whole[at : at + len(data)] = data
    if sum_again:
        whole[148:156] = b" " * 8
        whole[148:156] = b"%06o\0 " % sum(whole[:512])
    return bytes(whole)


for _name, _at, _data, _again in (
    ("size in base 256, negative", 124, b"\xff" * 12, True),
    ("size in base 256, endless", 124, b"\x80" + b"\xff" * 11, True),
    ("size of a minus", 124, b"-0000000001\0", True),
    ("size of no number", 124, b"\0\0\0\0zzzzzzz\0", True),
    ("sum of zero", 148, b"000000\0 ", False),
    ("sum without an end", 148, b"0" * 8, False),
    ("a name that a NUL cuts", 0, b"config.dump\0", False),
    ("a type that is a NUL and a slash", 0, b"config.dump/\0", True),
):
    if _name != "a name that a NUL cuts":
        register(_name, TRICKS, "import", partial(_bent, _at, _data, sum_again=_again))


def _long_name(name: bytes) -> bytes:
    """A GNU long name."""
    head = info("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    return pack((head, name), ("ctr.log", EVIL), *members().items(), kind=tarfile.GNU_FORMAT)


for _name, _long in (
    ("", b"../evil\0"), (", absolute", b"/tmp/ckpt-corpus-evil\0"), (" with a NUL", b"ctr.log\0../evil\0"), (", huge", b"x" * (3 << 20)),
):  # fmt: skip
    register(f"GNU long name{_name}", TRICKS, "import", partial(_long_name, _long))


@attack("many extended headers", BOMBS)
def many_extended() -> bytes:
    one = pack((info("x", tarfile.XHDTYPE), b"11 a=bcdef\n"))[:1024]
    return one * 40 + foreign(members())


@attack("long name and pax path", TRICKS)
def two_names() -> bytes:
    long = pack((info("././@LongLink", tarfile.GNUTYPE_LONGNAME), b"ctr.log\0"), kind=tarfile.GNU_FORMAT)[:1024]
    return long + _first((info("ctr.log", path="../evil"), EVIL))


@attack("pax record with a wrong length", TRICKS)
def pax_length() -> bytes:
    return pack((info("x", tarfile.XHDTYPE), b"99 path=ctr.log\n"), ("ctr.log", EVIL), *members().items())


@attack("pax record without an equals sign", TRICKS)
def pax_equals() -> bytes:
    return pack((info("x", tarfile.XHDTYPE), b"11 pathxxx\n"), ("ctr.log", EVIL), *members().items())


@attack("pax record twice", TRICKS)
def pax_twice() -> bytes:
    return pack((info("x", tarfile.XHDTYPE), b"16 path=ctr.log\n16 path=ctr.lox\n"), ("ctr.log", EVIL), *members().items())


@attack("something behind the end", TRICKS)
def behind() -> bytes:
    return foreign(members()) + _first(("../evil", EVIL))


@attack("something in the padding", TRICKS)
def padding() -> bytes:
    whole = bytearray(foreign(members()))
    whole[512 + len(members()["config.dump"]) + 1] = 1
    return bytes(whole)


@attack("no end", TRICKS)
def no_end() -> bytes:
    return foreign(members()).rstrip(b"\0")


def _zstd(data: bytes, level: int = 3) -> bytes:
    import zstandard

    return zstandard.ZstdCompressor(level, write_checksum=True).compress(data)


def _cut(pack_it: Any, share: float) -> bytes:
    data: bytes = pack_it(foreign(members()))
    return data[: int(len(data) * share)]


for _name, _codec in (("zstd", _zstd), ("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)):
    for _share in (0.1, 0.5, 0.97):
        register(f"{_name}, cut at {_share:.0%}", "truncation", "import", partial(_cut, _codec, _share))
    register(f"{_name} of garbage", "codec", "import", partial(lambda pack_it: pack_it(b"x" * 5000), _codec))
    register(f"{_name} in {_name}", "codec", "import", partial(lambda pack_it: pack_it(pack_it(foreign(members()))), _codec))


def _liar(size_bytes: int) -> bytes:
    """A member that claims to be endless, of zeros."""
    return pack(("config.dump", members()["config.dump"]), (info("checkpoint/pages-1.img", size=str(size_bytes)), b""))[:-9216] + bytes(1 << 20)


def _huge() -> bytes:
    return pack(("config.dump", b" " * (20 << 20)))


for _name, _codec in (("zstd", _zstd), ("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)):
    register(f"bomb of {_name}: a member without end", BOMBS, "import", partial(lambda pack_it: pack_it(_liar(1 << 41)), _codec))
    register(f"bomb of {_name}: a huge config.dump", BOMBS, "import", partial(lambda pack_it: pack_it(_huge()), _codec))


@attack("zstd with a window of a terabyte", BOMBS)
def window() -> bytes:
    return b"\x28\xb5\x2f\xfd\x00\xf0" + _zstd(foreign(members()))[6:]


@attack("zstd that needs a dictionary", "codec")
def dictionary() -> bytes:
    data = bytearray(_zstd(foreign(members())))
    data[4] |= 1
    data.insert(6, 7)
    return bytes(data)


@attack("zstd with an endless skippable frame", BOMBS)
def skippable() -> bytes:
    return _zstd(foreign(members())) + struct.pack("<II", 0x184D2A50, 0xFFFFFFFF) + bytes(100)


@attack("gzip with something behind it", "codec")
def gzip_behind() -> bytes:
    return gzip.compress(foreign(members())) + b"evil"


@attack("xz that needs much memory", BOMBS)
def xz_memory() -> bytes:
    return lzma.compress(foreign(members()), filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}])


for _count in (0, 1, 9, 511):
    register(f"{_count} bytes", "truncation", "import", partial(os.urandom, _count))
register("random bytes", "codec", "import", partial(os.urandom, 20_000))
register("zeros", "codec", "import", partial(bytes, 20_000))
register("a zip", "codec", "import", lambda: b"PK\3\4" + bytes(2000))


# The manifest


def _manifest_as(**changes: Any) -> bytes:
    """Ours, with something else in the manifest (and its own digest right)."""
    plain = json.loads(a_manifest(members()))
    plain.pop("check")
    return pack(("artifacts/ckpt.json", json.dumps(plain | changes).encode()), *members().items())


for _name, _changes in (
    ("of another schema", {"schema": 2}), ("with a path for a name", {"name": "../../etc"}), ("with a slash in its name", {"name": "a/b"}),
    ("with an escape in its name", {"name": "\x1b[2J"}), ("with no name", {"name": ""}), ("with a path for an engine", {"engine": "../x"}),
    ("with a long id", {"id": "a" * 5000}), ("with a negative number", {"generation": -1}), ("with a huge number", {"generation": 1 << 80}),
    ("with true for a number", {"generation": True}), ("with a path for a volume", {"volumes": [["../../x", "/"]]}),
    ("with a digest of no member", {"digests": {"../x": "sha256:" + "0" * 64}}), ("with md5", {"digests": {"config.dump": "md5:00"}}),
    ("that misses all digests", {"digests": {"config.dump": "sha256:" + "0" * 64}}), ("with a list for an object", {"host": []}),
    ("with a wrong digest of its own", {"check": "sha256:" + "1" * 64}), ("with a bent field for its digest", {"chebk": "sha256:" + "1" * 64}),
):  # fmt: skip
    register(f"manifest {_name}", FORGED, "import", partial(_manifest_as, **_changes))


def _changed(name: str, data: bytes | None) -> bytes:
    """The digests of the honest members, and one that is not."""
    honest = members()
    manifest = a_manifest(honest)
    if data is None:
        del honest[name]
    else:
        honest[name] = data
    return pack(("artifacts/ckpt.json", manifest), *honest.items())


_EACH = ("config.dump", "spec.dump", "checkpoint/core-1.img", "checkpoint/pages-1.img", "rootfs-diff.tar", "deleted.files", "volumes/data.tar")
for _member in _EACH:
    register(f"{_member} was exchanged", FORGED, "import", partial(_changed, _member, b'["/x"]' if _member == "deleted.files" else b"{}"))
for _member in ("config.dump", "spec.dump", "checkpoint/inventory.img", "checkpoint/pages-1.img", "checkpoint/core-1.img"):
    register(f"{_member} is missing", FORGED, "import", partial(_changed, _member, None))
register("a member that the manifest has not", FORGED, "import", partial(_changed, "checkpoint/core-2.img", b"x"))


@attack("two manifests", FORGED)
def two_manifests() -> bytes:
    return pack(("artifacts/ckpt.json", a_manifest(members())), *members().items(), ("artifacts/ckpt.json", a_manifest(members(), name="other")))


@attack("a manifest that is not JSON", FORGED)
def no_json() -> bytes:
    return pack(("artifacts/ckpt.json", b"nope"), *members().items())


@attack("a manifest of 17 MiB", BOMBS)
def big_manifest() -> bytes:
    return gzip.compress(pack(("artifacts/ckpt.json", b" " * (17 << 20)), *members().items()))


@attack("a manifest with a key twice", FORGED)
def key_twice() -> bytes:
    data = a_manifest(members()).rstrip().removesuffix(b"}") + b', "engine": "process"}'
    return pack(("artifacts/ckpt.json", data), *members().items())


def honest() -> bytes:
    """No attack: the tests' own control."""
    return archive(members())
