"""What is fuzzed. A target takes bytes and returns; a CkptError is an answer, any other exception is a finding.

Each has seeds: honest input, so that the fuzzer begins behind the first check.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from ckpt.archive import _apply, foreign, index, layout, manifest, reader, schema, seal, strict_json, wants, wants_podman, zstdframes
from ckpt.archive.codec import Stream, open_stream
from ckpt.archive.tarstream import Limits, TarStream
from ckpt.criu import images, pagestream, privileges, seccomp
from ckpt.criu.bindings import load
from ckpt.errors import ArchiveInvalid, CkptError
from ckpt.peer import frames, messages
from ckpt.peer.wires import FdWire
from ckpt.store import entry

SMALL = Limits(max_members=200, max_total_bytes=8 << 20, max_small_bytes=1 << 20, ratio_floor_bytes=4 << 20)


@dataclass(frozen=True)
class Target:
    """`run` on any bytes ends, with nothing or a CkptError."""

    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]


TARGETS: dict[str, Target] = {}


def target(seeds: Callable[[], list[bytes]]) -> Callable[[Callable[[bytes], object]], Callable[[bytes], object]]:
    """Register a function under its name."""

    def add(run: Callable[[bytes], object]) -> Callable[[bytes], object]:
        TARGETS[run.__name__.rstrip("_")] = Target(run, seeds)
        return run

    return add


def one(name: str, data: bytes) -> bool:
    """Run a target; False when it answered with a CkptError."""
    try:
        TARGETS[name].run(data)
    except CkptError:
        return False
    return True


def _archives() -> list[bytes]:
    from tests.corpus import base

    return [base.archive(base.members()), base.foreign({k: v for k, v in base.members().items() if not k.startswith("checkpoint/core")})]


def _compressed() -> list[bytes]:
    import bz2
    import lzma

    import zstandard

    plain = b"text " * 300
    zstd = zstandard.ZstdCompressor(1, write_checksum=True).compress(plain)
    return [plain, gzip.compress(plain), bz2.compress(plain), lzma.compress(plain), zstd, zstd + zstd, zstd + b"\x50\x2a\x4d\x18\4\0\0\0abcd"]


def _member(*names: str) -> Callable[[], list[bytes]]:
    def seeds() -> list[bytes]:
        from tests.corpus import base

        found = base.members() | {layout.MANIFEST: base.a_manifest(base.members())}
        return [found[name] for name in names]

    return seeds


@target(_archives)
def extract(data: bytes) -> None:
    """The whole way of an import."""
    directory = Path(tempfile.mkdtemp(prefix="ckpt-fuzz-", dir="/dev/shm"))
    try:
        if reader.extract(io.BytesIO(data), directory / "stage", limits=SMALL) is None:
            reader.foreign_manifest(directory / "stage")
        assert sorted(path.name for path in directory.iterdir()) == ["stage"]
    finally:
        shutil.rmtree(directory)


@target(_archives)
def peek(data: bytes) -> None:
    """An archive that is looked at."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(data)
        file.flush()
        reader.peek(Path(file.name), limits=SMALL)


@target(_archives)
def tar(data: bytes) -> None:
    """The outer tar."""
    for member in TarStream(open_stream(io.BytesIO(b"c" + data[1:])), SMALL):
        assert layout.is_allowed(member.name) and ".." not in member.name.split("/") and not member.name.startswith("/")


@target(_compressed)
def codec(data: bytes) -> None:
    """Decompression."""
    stream: Stream = open_stream(io.BytesIO(data))
    while stream.count < 4 << 20 and stream.read(65536):
        pass
    stream.require_as_written([])


@target(_compressed)
def zstd_headers(data: bytes) -> None:
    """Frames of zstd, in pieces."""
    source = io.BytesIO(data)
    found = zstdframes.ZstdFrames(lambda size: source.read(min(size, 7)))
    total = 0
    while total < 4 << 20 and (piece := found.read(65536)):
        total += len(piece)


def _indexes() -> list[bytes]:
    return [b"x" * 40 + index.tail([index.Entry("config.dump", 0, 512, 3, 1), index.Entry("spec.dump", 1024, 1536, 2, 1)], [(40, 3072, 0)])]


@target(_indexes)
def archive_index(data: bytes) -> None:
    """The index at the end."""
    index.load(lambda offset, count: data[offset : offset + count] if offset >= 0 else b"", len(data))


@target(_member(layout.MANIFEST))
def manifest_(data: bytes) -> None:
    """artifacts/ckpt.json; what is taken can be written again."""
    manifest.dumps(manifest.loads(data))


@target(lambda: [b'{"a": [1, -2.5e3, "x", null, true, {"b": {}}]}'])
def json_strict(data: bytes) -> None:
    """What is taken means the same to Python's own reader."""
    found = strict_json.parse(data, "x")
    assert found == json.loads(data)


@target(lambda: [entry.dumps(entry.Entry("web", 1, tags=("a",), note="n"))])
def store_entry(data: bytes) -> None:
    """checkpoints/ID/entry.json."""
    entry.dumps(entry.loads(data))


@target(lambda: [b"root@host:web.tar", b"https://user:secret@host:7443/a/b?x=y", b"oci://registry:5000/app:tag", b"-", b"./web.tar.zst"])
def location(data: bytes) -> None:
    """Where an archive is."""
    from ckpt.transports.base import Location

    repr(Location.parse(data.decode("utf-8", "surrogateescape")))


@cache
def _key() -> Any:
    import pyrage

    return pyrage.x25519.Identity.generate()


def _sealed() -> list[bytes]:
    out = io.BytesIO()
    with seal.encrypting(out, seal.recipients([f"age:{_key().to_public()}"])) as sealed:
        sealed.write(b"text" * 40_000)
    return [out.getvalue(), out.getvalue()[:300]]


@target(_sealed)
def sealed(data: bytes) -> None:
    """Encrypted archives."""
    seal.is_sealed(data[:64])
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(str(_key()).encode() + b"\n")
        file.flush()
        keys = seal.identities([Path(file.name)])
    stream = seal.decrypting(io.BytesIO(data), keys)
    while stream.read(65536):
        pass


def _recipes() -> list[bytes]:
    import numpy as np

    from ckpt.store import recipe

    places, counts = np.array([0, recipe.ZERO, 5], np.int64), np.array([2, 1, 1], np.int64)
    return [recipe.dumps(recipe.Recipe(["a" * 16], {"checkpoint/pages-1.img": recipe.Bulk(4 * 4096, places, counts, 1.0, "sha256:x")}))[:-32]]


@target(_recipes)
def store_recipe(data: bytes) -> None:
    """Which chunks a checkpoint has; its sum is made right."""
    from ckpt.store import recipe

    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
        file.write(data + hashlib.sha256(data).digest())
        file.flush()
        try:
            recipe.load_packs(Path(file.name))
        except CkptError:
            pass
        recipe.load(Path(file.name))


@target(lambda: [b'Bearer realm="https://a/token",service="r",scope="repository:x:pull,push", Basic realm="y"'])
def registry_challenges(data: bytes) -> None:
    """What a registry wants to be asked with."""
    from ckpt.transports import _oci_auth

    _oci_auth.challenges(data.decode("latin-1"))


@target(_member("config.dump", "spec.dump", "network.status"))
def foreign_manifest(data: bytes) -> None:
    """A manifest made up of what podman left."""
    made = foreign.made_up(data, b"{}", data, size_bytes=1)
    manifest.loads(manifest.dumps(made))
    foreign.made_up(b'{"id": "cc"}', data, b"{}", size_bytes=1)


@target(_member("network.status", "deleted.files"))
def small_members(data: bytes) -> None:
    """network.status, deleted.files."""
    for look in (schema.network_status, schema.deleted_files):
        try:
            look(data)
        except ArchiveInvalid:
            pass


@target(_member("spec.dump"))
def spec(data: bytes) -> None:
    """What a runtime configuration asks for; it can be shown."""
    for item in wants.of_spec(schema.spec(data), wants.Profile(no_new_privileges=True, apparmor=True, selinux=True)):
        assert all(ord(c) >= 32 for c in item.allow + item.asks)


@target(_member("config.dump"))
def config(data: bytes) -> None:
    """What podman's configuration asks for."""
    schema.config(data)
    plain = manifest.json_object(data, "config.dump")
    for item in wants_podman.of_podman(plain, plain.get("spec") if isinstance(plain.get("spec"), dict) else {}, wants.Profile()):
        assert all(ord(c) >= 32 for c in item.allow + item.asks)
    wants_podman.volume_names(plain)


def _inner() -> list[bytes]:
    from tests.corpus import base

    sparse = base.info("s", GNU__sparse__map="0,1,4,1", GNU__sparse__size="5")
    return [base.pack(("a", b"x" * 100), ("d/", b""), ("d/b", b"")), base.pack((sparse, b"ab"))]


class _Nowhere(_apply.Extraction):
    """Extraction that writes nothing."""

    def put(self, fd: int, member: Any) -> None:
        name = _apply.clean(member.name)
        assert ".." not in name.split("/") and not name.startswith("/")
        _apply.to_ns(member)
        if member.sparse is not None:
            list(member.sparse)


@target(_inner)
def inner_tar(data: bytes) -> None:
    """rootfs-diff.tar and volumes."""
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        file.write(data)
        file.seek(0)
        try:
            _Nowhere().run(file.fileno())
        except (_apply.Invalid, MemoryError, OSError):
            pass


def _images(name: str) -> Callable[[], list[bytes]]:
    return _member(f"checkpoint/{name}")


def _on_images(name: str, data: bytes, look: Callable[[Path], object]) -> None:
    directory = Path(tempfile.mkdtemp(prefix="ckpt-fuzz-", dir="/dev/shm"))
    try:
        from tests.corpus import base

        for member, content in base.members().items():
            if member.startswith("checkpoint/"):
                (directory / member.partition("/")[2]).write_bytes(content)
        (directory / name).write_bytes(data)
        look(directory)
    finally:
        shutil.rmtree(directory)


for _name, _look in (
    ("pstree.img", lambda d: (images.process_tree(d), images.all_ids(d), list(privileges.credentials(d)))),
    ("core-1.img", lambda d: (list(privileges.credentials(d)), images.process_tree(d))),
    ("inventory.img", lambda d: (images.run_id(d), privileges.shared_namespaces(d))),
    ("ids-1.img", privileges.shared_namespaces),
    ("mountpoints-13.img", privileges.host_mounts),
    ("seccomp.img", lambda d: seccomp.let_through(d, [0], frozenset())),
):
    TARGETS["image_" + _name.partition(".")[0].replace("-", "_")] = Target(
        lambda data, name=_name, look=_look: _on_images(name, data, look), _images(_name)  # type: ignore[misc]
    )


def _files() -> list[bytes]:
    from tests.corpus import base

    kind = load("images.fdinfo_pb2").file_entry
    entry = kind(type=1, id=1)
    entry.reg.id = entry.reg.flags = entry.reg.pos = 1
    entry.reg.name = "/x"
    sock = kind(type=4, id=2)
    for name in ("id", "ino", "family", "type", "proto", "state", "src_port", "dst_port", "flags", "backlog"):
        setattr(sock.isk, name, 6)
    sock.isk.src_addr.append(1)
    sock.isk.dst_addr.append(1)
    return [base.image("FILES", entry), base.image("FILES", entry, sock)]


@target(_files)
def image_files(data: bytes) -> None:
    """files.img: connections, terminals."""
    _on_images("files.img", data, lambda d: (images.open_kinds(d), images.memory_bytes(d)))


def _pages() -> list[bytes]:
    kind, record = pagestream.Kind, pagestream.record
    image = next(number for number in range(1 << 16) if pagestream.pagemap_name(number) == "pagemap-1.img")
    pages = record(kind.PAGES, image, 0x1000, 1) + bytes(4096)
    return [record(kind.OPEN, image) + pages + record(kind.CLOSE, image) + record(kind.END)]


@target(_pages)
def page_stream(data: bytes) -> None:
    """Memory pages from another host."""
    directory = Path(tempfile.mkdtemp(prefix="ckpt-fuzz-", dir="/dev/shm"))
    try:
        with pagestream.PageWriter(directory, max_bytes=4 << 20) as writer:
            for at in range(0, len(data), 1000):
                writer.write(data[at : at + 1000])
            writer.finish()
    finally:
        shutil.rmtree(directory)


def _frames() -> list[bytes]:
    found = []
    hello = frames.message(frames.Kind.HELLO, 0, messages.hello())
    call = frames.message(list(frames.Kind)[1], 1, {"verb": "x", "args": {}})
    for several in ([hello], [hello, call], [call, frames.Frame(frames.Kind.DATA, 2, b"data")]):
        found.append(b"".join(frames.encode_header(frame, n) + bytes(frame.payload) for n, frame in enumerate(several)))
    return found


@target(_frames)
def peer_frames(data: bytes) -> None:
    """Frames of the protocol between hosts; the sums are made right, so that what is behind them is reached."""
    r, w = os.pipe()
    try:
        os.write(w, data[:60_000])
        os.close(w)
        read = frames.FrameReader(FdWire(r), silence_s=2.0)
        frame = read.hello(2.0)
        while frame is not None:
            if frame.kind == frames.Kind.DATA:
                cast(Any, frame).data()
            else:
                plain = frame.json()
                if frame.kind == frames.Kind.HELLO:
                    messages.check_hello(plain)
                messages.error_from_json(plain)
                messages.event_from_json(plain)
            frame = read.read()
    finally:
        os.close(r)


@target(lambda: [json.dumps({"code": "policy", "message": "m", "event": "StepDone", "wants": [{}], **messages.hello()}).encode()])
def peer_messages(data: bytes) -> None:
    """What a message says."""
    plain = strict_json.parse(data, "x")
    if isinstance(plain, dict):
        messages.error_from_json(plain)
        messages.event_from_json(plain)
        messages.check_hello(plain)

