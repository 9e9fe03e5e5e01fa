"""Attacks with the tars inside: the root file system's difference and volumes, and the files that are deleted. They end in a root of their own."""

from __future__ import annotations

import tarfile
from functools import partial

from tests.corpus.attack import INVALID, attack, register
from tests.corpus.base import info, pack

PODMAN, TARFILE, BOMBS = "podman #27977", "CVE-2025-4517/4330/4138, CVE-2026-7774", "bombs"
FAILED = 21
EVIL = b"evil"

for _name, _parts in (
    ("parent", [("../evil", EVIL)]), ("parent inside", [("a/../../evil", EVIL)]),
    ("a parent in a link", [(info("l", tarfile.LNKTYPE, "../evil"), b"")]),
    ("a link to what is not there", [(info("l", tarfile.LNKTYPE, "nothing"), b"")]), ("the root as a file", [(info("."), EVIL)]),
    ("an unknown kind", [(info("x", b"Z"), b"")]),
):  # fmt: skip
    register(f"inner tar: {_name}", TARFILE, "apply", lambda parts=_parts: (pack(*parts), b""))  # type: ignore[misc]

for _name, _list in (
    ("parent", b'["../../../tmp/victim"]'), ("parent inside", b'["/a/../../../victim"]'), ("a NUL", b'["/a\\u0000"]'), ("no list", b'{"a": 1}'),
    ("numbers", b"[7]"), ("no JSON", b"/etc/passwd"), ("depth", b"[" * 200_000),
):  # fmt: skip
    register(f"deleted files: {_name}", PODMAN, "apply", partial(lambda data: (b"", data), _list))


def _bent(at: int, data: bytes) -> tuple[bytes, bytes]:
    whole = bytearray(pack(("a", b"x" * 600), ("b", b"y")))
    whole[at : at + len(data)] = data
    whole[148:156] = b" " * 8
    whole[148:156] = b"%06o\0 " % sum(whole[:512])
    return bytes(whole), b""


register("inner tar: a negative size", "CVE-2025-8194", "apply", partial(_bent, 124, b"\xff" * 10 + b"\xfc\x00"), INVALID, FAILED)
register("inner tar: an endless size", BOMBS, "apply", partial(_bent, 124, b"\x80" + b"\x7f" * 11), INVALID, FAILED)


@attack("inner tar: cut", "truncation", "apply")
def cut() -> tuple[bytes, bytes]:
    return pack(("a", b"x" * 6000))[:3000], b""


@attack("inner tar: garbage behind a member", "truncation", "apply")
def behind() -> tuple[bytes, bytes]:
    return pack(("a", EVIL))[:1024] + b"z" * 2048, b""


@attack("inner tar: a pax header of gigabytes", BOMBS, "apply", INVALID, FAILED)
def pax_huge() -> tuple[bytes, bytes]:
    head = bytearray(pack((info("x", tarfile.XHDTYPE), b"11 a=bcdef\n"))[:512])
    head[124:136] = b"77777777777\0"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head) + bytes(1 << 20), b""


@attack("inner tar: a map of holes that goes outside", BOMBS, "apply")
def sparse_outside() -> tuple[bytes, bytes]:
    pax = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "s", "GNU.sparse.size": "10", "GNU.sparse.map": "0,4,5000,4"}
    head = info("s")
    head.pax_headers = pax
    return pack((head, b"datadata")), b""


# Not refused, but nothing outside may be touched: the test looks at the canary.
HARMLESS = {
    "a symlink, then a file through it": [(info("out", tarfile.SYMTYPE, "{outside}"), b""), ("out/evil", EVIL)],
    "an absolute name": [("/{outside}/evil", EVIL)],
    "a symlink to the parent": [(info("up", tarfile.SYMTYPE, "../../../../../../../.."), b""), ("up/evil", EVIL)],
    "a hard link through a symlink": [(info("out", tarfile.SYMTYPE, "{outside}"), b""), (info("l", tarfile.LNKTYPE, "out/canary"), b"")],
    "trusted xattrs": [(info("x", SCHILY__xattr__trusted__overlay__redirect="/etc"), EVIL)],
    "a name of a whiteout": [("etc/.wh.passwd", b"")],
}
