"""Capture and apply of a root file system, over a real overlay (root) and as plain trees."""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt.archive import rootfs
from ckpt.errors import ArchiveInvalid, CkptError, NoSpace, RestoreFailed
from ckpt.model import RootFs

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: mounts an overlay, makes device nodes")
MIB = 1 << 20
ACL = bytes.fromhex("02000000 01000600ffffffff 02000600e8030000 04000400ffffffff 10000600ffffffff 20000400ffffffff".replace(" ", ""))
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")
_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: Path, kind: str, data: str) -> None:
    if _libc.mount(source.encode(), os.fsencode(target), kind.encode(), 0, data.encode()):
        pytest.skip(f"cannot mount {kind}: {os.strerror(ctypes.get_errno())}")


def unmount(target: Path) -> None:
    _libc.umount2(os.fsencode(target), 2)


class Overlay:
    """An overlay mount with its own upper directory; `lowers` topmost first."""

    def __init__(self, base: Path, name: str, lowers: list[Path], options: str = "") -> None:
        self.upper, self.work, self.merged = (base / f"{name}-{part}" for part in ("upper", "work", "merged"))
        for path in (self.upper, self.work, self.merged):
            path.mkdir()
        self.lowers = tuple(lowers)
        layers = ":".join(map(str, lowers))
        mount("overlay", self.merged, "overlay", f"lowerdir={layers},upperdir={self.upper},workdir={self.work}{options}")

    @property
    def rootfs(self) -> RootFs:
        return RootFs(self.merged, self.upper, self.lowers)


@pytest.fixture
def base(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "tmpfs"
    path.mkdir()
    mount("tmpfs", path, "tmpfs", "size=256m")
    yield path
    for merged in path.glob("*-merged"):
        unmount(merged)
    unmount(path)


def put(path: Path, data: bytes = b"original\n", mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def make_lower(top: Path, bottom: Path) -> None:
    for name in (
        "data/state",
        "data/gone",
        "data/keep",
        "etc/motd",
        "dir/a",
        "dir/sub/b",
        "tofile/x/y",
        "renamed/one",
        "renamed/deep/two",
        "meta/file",
    ):
        put(bottom / name)
    put(bottom / "todir")
    put(bottom / "opaque/old")
    put(bottom / "opaque/sub/old2")
    put(bottom / "opaque/sub/kept")
    put(bottom / "big", b"b" * 300_000)
    put(bottom / "hiddenbytop")
    put(bottom / "nested/a/b/c")
    put(bottom / "nested/a/b/d")
    os.symlink("dir", bottom / "linkdir")
    os.symlink("/etc", bottom / "escape")
    put(bottom / "tolink")
    put(top / "opaque/fromtop")
    put(top / "data/top")
    put(top / "linked1")
    os.link(top / "linked1", top / "linked2")
    if top != bottom:
        os.mknod(top / "hiddenbytop", stat.S_IFCHR, os.makedev(0, 0))
    (bottom / "attrs").mkdir()
    os.setxattr(bottom / "attrs", "user.old", b"1")


def change(root: Path) -> None:
    """Everything that a container can do to its files."""
    (root / "data/state").write_bytes(b"modified\n")
    (root / "data/gone").unlink()
    put(root / "data/new", b"new\n", 0o4755)
    put(root / "added/deep/er/file", b"x" * 100_000)
    for name in ("a", "sub/b"):
        (root / "dir" / name).unlink()
    (root / "dir/sub").rmdir()
    (root / "dir").rmdir()
    (root / "tofile/x/y").unlink()
    (root / "tofile/x").rmdir()
    (root / "tofile").rmdir()
    put(root / "tofile", b"now a file")
    (root / "todir").unlink()
    put(root / "todir/inner/file")
    for name in ("old", "sub/old2", "sub/kept", "fromtop"):
        (root / "opaque" / name).unlink()
    (root / "opaque/sub").rmdir()
    (root / "opaque").rmdir()
    put(root / "opaque/sub/kept", b"again")
    (root / "nested/a/b/c").unlink()
    (root / "nested/a/b/d").rename(root / "nested/a/e")
    (root / "tolink").unlink()
    os.symlink("/data/state", root / "tolink")
    (root / "linkdir").unlink()
    put(root / "linkdir/real")
    (root / "linked1").write_bytes(b"both changed")
    os.chmod(root / "meta", 0o1770)
    os.chown(root / "meta", 1234, 70_000)
    os.utime(root / "meta", ns=(5, 1_600_000_000_123_456_789))
    os.chmod(root, 0o711)
    put(root / "hard/one", b"hard")
    os.link(root / "hard/one", root / "hard/two")
    os.link(root / "hard/one", root / "added/three")
    put(root / "owned")
    os.chown(root / "owned", 3_000_000, 4_000_000)
    os.chmod(root / "owned", 0o6711)
    put(root / "times")
    os.utime(root / "times", ns=(1, 1_234_567_890_987_654_321))
    os.symlink("nowhere", root / "dangling")
    os.chown(root / "dangling", 7, 8, follow_symlinks=False)
    os.utime(root / "dangling", ns=(1, 999_999_999_000_000_007), follow_symlinks=False)
    os.mkfifo(root / "fifo", 0o620)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "disk", stat.S_IFBLK | 0o660, os.makedev(7, 300))
    with open(root / "sparse", "wb") as file:
        file.write(b"start")
        file.seek(16 * MIB)
        file.write(b"middle")
        file.truncate(40 * MIB)
    with open(root / "allhole", "wb") as file:
        file.truncate(24 * MIB)
    for name in (b"new\nline", b"odd\xff\xfebytes", b"-dash", b"*star", b"sp ace", "ümläut".encode(), b"back\\slash", b"n" * 255, b"\\n"):
        with open(os.path.join(os.fsencode(root), name), "wb") as file:
            file.write(name)
    long = root
    for part in range(8):
        long = long / (f"{part}" * 200)
    put(long / "file", b"long")
    put(root / "capable", b"#!", 0o755)
    os.setxattr(root / "capable", "security.capability", CAPABILITY)
    for key, value in (("user.plain", b"v"), ("user.binary", b"\0\xff\n=\x80"), ("user.empty", b"")):
        try:
            os.setxattr(root / "capable", key, value)
        except OSError:
            break
    put(root / "acl/file")
    os.setxattr(root / "acl/file", "system.posix_acl_access", ACL)
    os.setxattr(root / "acl", "system.posix_acl_default", ACL)
    put(root / "acl/heir")
    put(root / "noheir/file")
    try:
        os.removexattr(root / "attrs", "user.old")
        os.setxattr(root / "attrs", "user.new", b"2")
    except OSError:
        pass
    put(root / "zero", b"")


def snapshot(root: Path, *, blocks: bool = True) -> dict[bytes, tuple[object, ...]]:
    """Everything that is to be equal, by path."""
    groups: dict[tuple[int, int], list[bytes]] = {}
    found: dict[bytes, tuple[object, ...]] = {}
    top = os.fsencode(root)
    paths = [top]
    for here, directories, files in os.walk(top):
        paths += [os.path.join(here, name) for name in directories + files]
    for path in paths:
        facts = os.lstat(path)
        name = os.path.relpath(path, top)
        content: object = None
        used = 0
        if stat.S_ISREG(facts.st_mode):
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            used = facts.st_blocks
            if facts.st_nlink > 1:
                groups.setdefault((facts.st_dev, facts.st_ino), []).append(name)
        elif stat.S_ISLNK(facts.st_mode):
            content = os.readlink(path)
        attributes = tuple(
            (key, os.getxattr(path, key, follow_symlinks=False))
            for key in sorted(os.listxattr(path, follow_symlinks=False))
            if not key.startswith(("trusted.", "security.selinux"))
        )
        size = 0 if stat.S_ISDIR(facts.st_mode) else facts.st_size
        node = facts.st_rdev if facts.st_mode & (stat.S_IFBLK | stat.S_IFCHR) else 0
        found[name] = (
            oct(facts.st_mode), facts.st_uid, facts.st_gid, facts.st_mtime_ns, size, content, attributes, node, used if blocks else 0,
        )  # fmt: skip
    for members in groups.values():
        for name in members:
            found[name] += (tuple(sorted(members)),)
    return found


def differences(one: dict[bytes, tuple[object, ...]], two: dict[bytes, tuple[object, ...]]) -> dict[bytes, object]:
    return {name: (one.get(name), two.get(name)) for name in one.keys() | two.keys() if one.get(name) != two.get(name)}


@needs_root
@pytest.mark.parametrize("options", ["", ",redirect_dir=on", ",metacopy=on,redirect_dir=on", ",index=on"])
def test_a_container_root_comes_back_exactly(base: Path, tmp_path: Path, options: str) -> None:
    top, bottom = base / "top", base / "bottom"
    for path in (top, bottom):
        path.mkdir()
    make_lower(top, bottom)
    source = Overlay(base, "source", [top, bottom], options)
    change(source.merged)
    if "redirect" in options:
        os.rename(source.merged / "renamed", source.merged / "moved")
        (source.merged / "moved/one").unlink()
        put(source.merged / "renamed/deep/other")
        os.chmod(source.merged / "big", 0o600)
        os.utime(source.merged / "big", ns=(1, 1_500_000_000_000_000_001))

    diff, deleted_files = tmp_path / "rootfs-diff.tar", tmp_path / "deleted.files"
    deleted = rootfs.capture(source.rootfs, diff, deleted_files)

    assert stat.S_IMODE(diff.stat().st_mode) == 0o600 and stat.S_IMODE(deleted_files.stat().st_mode) == 0o600
    assert json.loads(deleted_files.read_text()) == deleted
    assert {"/data/gone", "/dir", "/nested/a/b/c", "/nested/a/b/d"} <= set(deleted)
    assert {"/opaque/old", "/opaque/fromtop", "/opaque/sub/old2"} <= set(deleted)
    with tarfile.open(diff) as tar:
        names = set(tar.getnames())
    # Podman deletes after it unpacked: nothing may be in both.
    assert not {name for name in names if any(f"/{name}" == d or f"/{name}".startswith(d + "/") for d in deleted)}
    assert diff.stat().st_size < 8 * MIB

    target = Overlay(base, "target", [top, bottom])
    assert rootfs.apply(diff, deleted_files, target.merged) == []
    assert differences(snapshot(source.merged), snapshot(target.merged)) == {}


@needs_root
def test_a_second_generation_comes_back_too(base: Path, tmp_path: Path) -> None:
    """Upper of a restored container (made by apply, not by the container) is captured just as well."""
    bottom = base / "bottom"
    make_lower(bottom, base / "other")
    first = Overlay(base, "first", [bottom, base / "other"])
    change(first.merged)
    previous = first
    for generation in ("second", "third"):
        diff, deleted = tmp_path / f"{generation}.tar", tmp_path / f"{generation}.deleted"
        rootfs.capture(previous.rootfs, diff, deleted)
        previous = Overlay(base, generation, [bottom, base / "other"])
        rootfs.apply(diff, deleted, previous.merged)
        assert differences(snapshot(first.merged), snapshot(previous.merged)) == {}


@needs_root
def test_a_socket_is_left_out_and_what_it_replaced_is_gone(base: Path, tmp_path: Path) -> None:
    import socket

    lower = base / "lower"
    put(lower / "run/place")
    source = Overlay(base, "source", [lower])
    (source.merged / "run/place").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(source.merged / "run/place"))
        assert rootfs.capture(source.rootfs, tmp_path / "d.tar") == ["/run/place"]


@needs_root
def test_capture_into_a_stream_without_descriptor_equals_the_file(base: Path, tmp_path: Path) -> None:
    lower = base / "lower"
    put(lower / "a")
    source = Overlay(base, "source", [lower])
    put(source.merged / "b", os.urandom(3 * MIB))
    rootfs.capture(source.rootfs, tmp_path / "d.tar")
    stream = io.BytesIO()
    rootfs.capture(source.rootfs, stream)
    assert stream.getvalue() == (tmp_path / "d.tar").read_bytes()


@needs_root
def test_no_space(base: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount("tmpfs", small, "tmpfs", "size=1m")
    try:
        tree = base / "tree"
        put(tree / "file", os.urandom(2 * MIB))
        with pytest.raises(NoSpace):
            rootfs.capture_tree(tree, small / "t.tar")
        (small / "t.tar").unlink()
        rootfs.capture_tree(tree, base / "t.tar")
        with pytest.raises(NoSpace):
            rootfs.apply_tree(base / "t.tar", small)
    finally:
        unmount(small)


@needs_root
def test_a_volume_comes_back_exactly(base: Path) -> None:
    source, target = base / "source", base / "target"
    for path in (source, target):
        path.mkdir()
        make_lower(path, path)
    change(source)
    put(target / "from-image")
    rootfs.capture_tree(source, base / "v.tar")
    rootfs.apply_tree(base / "v.tar", target, empty=True)
    assert differences(snapshot(source), snapshot(target)) == {}


def hostile(path: Path, *members: tarfile.TarInfo, data: bytes = b"owned") -> Path:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data))
    return path


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, link
    return member


@needs_root
def test_nothing_outside_of_the_root_is_touched(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    put(outside / "file", b"safe")
    os.symlink(outside, root / "abs")
    os.symlink("../outside", root / "rel")
    before = snapshot(outside)
    for name in ("../outside/file", "/../outside/file", "a/../../outside/file"):
        with pytest.raises(ArchiveInvalid):
            rootfs.apply(hostile(tmp_path / "t.tar", info(name)), None, root)
    for members in (
        (info("abs/file"),),
        (info("rel/file"),),
        (info("l", tarfile.SYMTYPE, str(outside)), info("l/file")),
        (info("h", tarfile.LNKTYPE, str(outside / "file")), info("h")),
        (info("h2", tarfile.LNKTYPE, "../outside/file"),),
        (info("abs"),),
    ):
        with pytest.raises((ArchiveInvalid, RestoreFailed)) if members[0].name != "abs" else _nothing():
            rootfs.apply(hostile(tmp_path / "t.tar", *members), None, root)
        assert snapshot(outside) == before
    os.unlink(root / "abs")
    os.symlink(outside, root / "abs")
    (tmp_path / "deleted").write_text(json.dumps(["/abs/file", "/rel/file", "/abs"]))
    rootfs.apply(None, tmp_path / "deleted", root)
    assert snapshot(outside) == before and not os.path.lexists(root / "abs")
    (tmp_path / "deleted").write_text(json.dumps(["/../outside/file"]))
    with pytest.raises(ArchiveInvalid):
        rootfs.apply(None, tmp_path / "deleted", root)
    assert snapshot(outside) == before


class _nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@needs_root
def test_damaged_tars_and_lists_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    whole = hostile(tmp_path / "t.tar", *(info(f"f{n}") for n in range(20)), data=b"z" * 1000).read_bytes()
    for cut in (0, 1, 511, 512, 700, 1024, 1536, 5000, 20 * 1536 - 1, 20 * 1536):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(ArchiveInvalid):
            rootfs.apply(tmp_path / "cut.tar", None, root)
    (tmp_path / "cut.tar").write_bytes(whole[:1536] + b"\x01" + whole[1537:])
    with pytest.raises(ArchiveInvalid):
        rootfs.apply(tmp_path / "cut.tar", None, root)
    for text in ("{", '{"a": 1}', "[1]", "[" * 100_000):
        (tmp_path / "deleted").write_text(text)
        with pytest.raises(ArchiveInvalid):
            rootfs.apply(None, tmp_path / "deleted", root)
    (tmp_path / "deleted").write_text("null")
    assert rootfs.apply(None, tmp_path / "deleted", root) == []
    assert rootfs.apply(tmp_path / "none.tar", tmp_path / "none", root) == []


@needs_root
def test_the_root_itself_cannot_supply_modules(tmp_path: Path) -> None:
    """Python files in the container's root are never imported by the child."""
    root = tmp_path / "root"
    for name in ("traceback.py", "usr/lib/python3.11/traceback.py", "encodings/idna.py", "encodings/cp437.py"):
        put(root / name, b"open('/pwned', 'w')")
    hostile(tmp_path / "t.tar", info("x", b"Z"))
    with pytest.raises((ArchiveInvalid, RestoreFailed)):
        rootfs.apply(tmp_path / "t.tar", None, root)
    rootfs.apply(hostile(tmp_path / "t.tar", info("ok")), None, root)
    assert (root / "ok").exists() and not (root / "pwned").exists()


def test_a_plain_directory_has_no_difference(tmp_path: Path) -> None:
    assert rootfs.capture(RootFs(tmp_path), tmp_path / "d.tar") == [] and not (tmp_path / "d.tar").exists()


def test_a_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CkptError):
        rootfs.capture_tree(tmp_path / "none", tmp_path / "t.tar")
    with pytest.raises(CkptError):
        rootfs.capture(RootFs(None, tmp_path / "none"), tmp_path / "t.tar")


@needs_root
def test_a_lazy_redirect_without_a_mount_is_refused(base: Path, tmp_path: Path) -> None:
    put(base / "lower/dir/file")
    source = Overlay(base, "source", [base / "lower"], ",redirect_dir=on")
    os.rename(source.merged / "dir", source.merged / "moved")
    with pytest.raises(CkptError, match="redirect_dir"):
        rootfs.capture(RootFs(None, source.upper, source.lowers), tmp_path / "d.tar")
