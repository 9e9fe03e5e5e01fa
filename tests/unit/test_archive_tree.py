"""A tree that is sent while it changes: what arrives in the end is what a copy of the frozen tree would be, whatever happened meanwhile."""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import BinaryIO, cast

import pytest

from ckpt.archive import rootfs, tree_receive
from ckpt.archive.tree_receive import TreeWriter
from ckpt.archive.tree_send import TreeSource
from ckpt.errors import ArchiveInvalid, CkptError, NoSpace
from ckpt.host import beneath
from ckpt.model import RootFs
from tests.unit.test_archive_rootfs import ACL, CAPABILITY, Overlay, change, make_lower, mount, put, unmount

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: changes its root, makes device nodes")
MIB = 1 << 20


@pytest.fixture(params=["disk", "tmpfs"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """On the disk the times of files tell (where that is so), on tmpfs only their content does."""
    if request.param == "disk":
        yield tmp_path
    else:
        path = tmp_path / "tmpfs"
        path.mkdir()
        mount("tmpfs", path, "tmpfs", "size=256m")
        yield path
    for merged in tmp_path.rglob("*-merged"):
        unmount(merged)
    if request.param == "tmpfs":
        unmount(path)


def send(source: TreeSource, writer: TreeWriter, *, live: bool) -> int:
    """One round; returns the bytes of its stream."""
    total = 0
    for piece in source.round(live=live):
        writer.sink.write(piece)
        total += len(piece)
    writer.finish()
    return total


def facts(path: Path) -> tuple[object, ...]:
    found = path.lstat()
    keys = [key for key in os.listxattr(path, follow_symlinks=False) if key.startswith(("user.", "security.capability", "system.posix_acl"))]
    xattrs = {key: os.getxattr(path, key, follow_symlinks=False) for key in keys if not key.startswith("user.overlay.")}
    content: object = None
    if stat.S_ISREG(found.st_mode):
        content = path.read_bytes()
    elif stat.S_ISLNK(found.st_mode):
        content = os.readlink(path)
    return found.st_mode, found.st_uid, found.st_gid, found.st_mtime_ns, found.st_rdev, xattrs, content


def everything(root: Path) -> dict[str, tuple[object, ...]]:
    """What must be equal: all but sockets; names of one file as such."""
    found, first = {}, {}
    paths = [Path(here, name) for here, directories, files in os.walk(root) for name in sorted(directories + files)]
    for path in [root, *sorted(paths)]:
        about = path.lstat()
        if stat.S_ISSOCK(about.st_mode):
            continue
        name = str(path.relative_to(root))
        same = first.setdefault((about.st_dev, about.st_ino), name) if not stat.S_ISDIR(about.st_mode) else name
        found[name] = (same, *facts(path))
    return found


def assert_same(one: Path, other: Path) -> None:
    here, there = everything(one), everything(other)
    assert sorted(here) == sorted(there)
    for name in here:
        assert here[name] == there[name], name


def frozen_copy(tree: Path, into: Path) -> Path:
    """What the all-frozen way makes of it."""
    into.mkdir()
    tar = into.with_suffix(".tar")
    rootfs.capture_tree(tree, tar)
    rootfs.apply_tree(tar, into, empty=True)
    return into


class Mutator:
    """Does what a program can do to its files, at random, until it is stopped."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root = root
        self.random = random.Random(seed)
        self.stop = threading.Event()
        self.steps = 0
        self.maps: list[mmap.mmap] = []

    def some(self, *, directory: bool = False) -> Path:
        """A path that may or may not exist."""
        names = self.random.choice(["a", "b", "a/x", "a/y", "b/x", "a/x/deep", "c"])
        return self.root / names if directory else self.root / names / self.random.choice(["f", "g", "h", "log", "big"])

    def mapped(self) -> Path:
        return self.root / f"mapped{self.random.randrange(3)}"

    def replace(self, path: Path) -> None:
        put(self.root / "new", self.random.randbytes(300_000))
        (self.root / "new").rename(path)

    def opened(self, mode: str) -> BinaryIO:
        """Not waiting for the other end of a FIFO."""
        return cast(BinaryIO, open(self.some(), mode, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)))  # noqa: SIM115

    def step(self) -> None:
        r = self.random
        try:
            match r.randrange(17):
                case 0:
                    self.some(directory=True).mkdir(parents=True, exist_ok=True)
                case 1 | 2:
                    with self.opened("wb") as file:
                        file.write(r.randbytes(r.choice([0, 1, 5000, 70_000, 300_000])))
                case 3:
                    with self.opened("ab") as file:
                        file.write(r.randbytes(r.randrange(100_000)))
                case 4 | 5:
                    with self.opened("r+b") as file:
                        file.seek(r.randrange(400_000))
                        file.write(r.randbytes(r.randrange(9000)))
                case 6:
                    self.some().rename(self.some())
                case 7:
                    self.some(directory=True).rename(self.some(directory=True))
                case 8:
                    self.some().unlink()
                case 9:
                    shutil.rmtree(self.some(directory=True))
                case 10:
                    os.link(self.some(), self.some())
                case 11:
                    os.truncate(self.some(), r.randrange(600_000))
                case 12:
                    os.symlink(r.choice(["f", "/etc", "nowhere"]), self.some())
                case 13:
                    os.mkfifo(self.some(), 0o640) if r.random() < 0.5 else os.mknod(self.some(), stat.S_IFCHR | 0o600, os.makedev(1, 3))
                case 14:
                    path = self.some(directory=r.random() < 0.5)
                    os.chmod(path, r.choice([0o700, 0o4755, 0o2770, 0o644]), follow_symlinks=path.is_dir() or True)
                    os.chown(path, r.randrange(3), r.randrange(3))
                case 15:
                    path = self.some()
                    os.setxattr(path, f"user.{r.randrange(3)}", r.randbytes(4))
                    os.utime(path, ns=(1, r.randrange(1 << 60)))
                case 16:
                    # Files of their own: who writes behind the end of a mapping gets a SIGBUS.
                    self.mapped().rename(self.mapped())
                    self.replace(self.mapped()) if len(self.maps) < 20 else self.maps.clear()
                    with self.mapped().open("r+b") as file:
                        self.maps.append(mmap.mmap(file.fileno(), 0))
            for mapped in self.maps:
                mapped[(at := r.randrange(len(mapped))) : at + 1] = r.randbytes(1)
        except (OSError, ValueError):
            pass
        self.steps += 1

    def run(self) -> None:
        while not self.stop.is_set():
            self.step()
            if self.steps % 50 == 0:
                time.sleep(0.001)


@pytest.mark.parametrize("seed", range(4))
def test_a_tree_that_never_rests(base: Path, tmp_path: Path, seed: int) -> None:
    tree, there = base / "tree", base / "there"
    tree.mkdir()
    there.mkdir()
    mutator = Mutator(tree, seed)
    for _ in range(300):
        mutator.step()
    thread = threading.Thread(target=mutator.run)
    source, writer = TreeSource(lambda live: rootfs.survey_tree(tree, live=live)), TreeWriter(there)
    thread.start()
    try:
        for _ in range(6):
            send(source, writer, live=True)
        mutator.stop.set()
        thread.join()
        send(source, writer, live=False)
        assert_same(tree, frozen_copy(tree, base / "frozen"))
        assert_same(tree, there)
        # Again, slowly: every step on its own, with nothing between the rounds but what it does.
        for _ in range(25):
            mutator.step()
            send(source, writer, live=False)
        assert_same(tree, there)
    finally:
        mutator.stop.set()
        thread.join()
        writer.close()


def rounds(tree: Path, there: Path) -> tuple[TreeSource, TreeWriter]:
    """A tree that was sent once and is at rest since long enough for its times to be believed."""
    source, writer = TreeSource(lambda live: rootfs.survey_tree(tree, live=live)), TreeWriter(there)
    send(source, writer, live=True)
    time.sleep(0.15)  # the times' granularity is what this waits for, there is no condition to ask
    send(source, writer, live=True)
    return source, writer


def test_only_what_changed(base: Path) -> None:
    tree, there = base / "tree", base / "there"
    there.mkdir()
    put(tree / "big", os.urandom(20 * MIB))
    put(tree / "moved/old", os.urandom(5 * MIB))
    put(tree / "log", os.urandom(3 * MIB))
    for number in range(200):
        put(tree / f"many/{number}", os.urandom(1000))
    source, writer = rounds(tree, there)
    assert send(source, writer, live=False) < 1000
    with (tree / "big").open("r+b") as file:
        file.seek(7 * MIB + 123)
        file.write(b"changed")
    (tree / "moved/old").rename(tree / "moved/new")
    (tree / "log").rename(tree / "log.1")
    put(tree / "log", b"begins")
    sent = send(source, writer, live=False)
    assert_same(tree, there)
    assert sent < 70_000, "64 KiB of the large file, and names"
    writer.close()


def test_a_write_through_a_mapping_that_was_dirty_before(base: Path) -> None:
    tree, there = base / "tree", base / "there"
    there.mkdir()
    put(tree / "mapped", bytes(2 * MIB))
    with (tree / "mapped").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[5] = 1  # the page is dirty and writable now: the next write faults no more, unless it is flushed
        source, writer = rounds(tree, there)
        mapped[5] = 2
        send(source, writer, live=False)
        assert_same(tree, there)
        mapped[MIB + 1] = 3
        send(source, writer, live=False)
    assert_same(tree, there)
    writer.close()


def test_a_write_through_a_mapping_of_an_overlay(base: Path) -> None:
    """The container maps the file through the mount; its time is looked at in the upper directory."""
    lower, there = base / "lower", base / "there"
    for path in (lower, there):
        path.mkdir()
    put(lower / "mapped", bytes(MIB))
    overlay = Overlay(base, "here", [lower])
    with (overlay.merged / "mapped").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[5] = 1
        source, writer = TreeSource(lambda live: rootfs.survey(overlay.rootfs, live=live)), TreeWriter(there)
        send(source, writer, live=True)
        time.sleep(0.15)
        send(source, writer, live=True)
        mapped[5] = 2
        send(source, writer, live=False)
        assert (there / "mapped").read_bytes()[:6] == bytes([0, 0, 0, 0, 0, 2])
    writer.close()


def test_a_change_within_the_clock_tick(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Size and times are the same before and after; the reading was in between. (Linux 6.13 has finer times: here it gets coarse ones.)"""

    def lstat(tree: beneath.Tree, path: bytes, real: Callable[[beneath.Tree, bytes], os.stat_result] = beneath.Tree.lstat) -> SimpleNamespace:
        found = real(tree, path)
        values = {key: getattr(found, key) for key in dir(found) if key.startswith("st_")}
        return SimpleNamespace(**{**values, **{key: values[key] // 10_000_000 * 10_000_000 for key in ("st_ctime_ns", "st_mtime_ns")}})

    monkeypatch.setattr(beneath.Tree, "lstat", lstat)
    tree, there = base / "tree", base / "there"
    there.mkdir()
    put(tree / "file", b"1")
    source, writer = TreeSource(lambda live: rootfs.survey_tree(tree, live=live)), TreeWriter(there)
    for number in range(200):
        (tree / "file").write_bytes(b"%d" % (number % 10))
        send(source, writer, live=True)
        with (tree / "file").open("r+b") as file:
            file.write(b"%d" % ((number + 1) % 10))
        send(source, writer, live=False)
        assert (tree / "file").read_bytes() == (there / "file").read_bytes()
    writer.close()


def test_names_of_every_kind(base: Path) -> None:
    tree, there, onto = base / "tree", base / "there", base / "onto"
    there.mkdir()
    onto.mkdir()
    for name in (b"\xff\xfe", b"new\nline", b'quote"s', b"...", b"-rf", "\N{SNOWMAN}".encode(), b"x" * 255):
        put(Path(os.fsdecode(os.fsencode(tree) + b"/" + name + b"/" + name)))
    source, writer = rounds(tree, there)
    assert_same(tree, there)
    shutil.rmtree(tree / os.fsdecode(b"\xff\xfe"))
    send(source, writer, live=False)
    writer.close()
    tree_receive.copy(there, base / "none", onto)
    assert_same(tree, onto)


def test_a_file_system_beneath(base: Path) -> None:
    """What is mounted in the tree does not tell, whatever the tree's own file system does."""
    tree, there = base / "tree", base / "there"
    there.mkdir()
    (tree / "mounted").mkdir(parents=True)
    mount("tmpfs", tree / "mounted", "tmpfs", "size=4m")
    try:
        put(tree / "mounted/mapped", bytes(MIB))
        with (tree / "mounted/mapped").open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            mapped[5] = 1
            source, writer = rounds(tree, there)
            mapped[5] = 2
            send(source, writer, live=False)
            assert_same(tree, there)
        writer.close()
    finally:
        unmount(tree / "mounted")


def test_holes(base: Path) -> None:
    tree, there = base / "tree", base / "there"
    there.mkdir()
    put(tree / "sparse", b"")
    with (tree / "sparse").open("r+b") as file:
        for at in (0, 3 * MIB + 4096, 50 * MIB):
            file.seek(at)
            file.write(b"x" * 4096)
        file.truncate(300 * MIB)
    source, writer = rounds(tree, there)
    assert (there / "sparse").stat().st_blocks <= (tree / "sparse").stat().st_blocks + 16
    put(tree / "sparse", b"")
    os.truncate(tree / "sparse", 200 * MIB)
    send(source, writer, live=False)
    assert_same(tree, there)
    assert (there / "sparse").stat().st_blocks <= 16, "what was data is a hole again"
    writer.close()


def test_attributes(base: Path) -> None:
    tree, there = base / "tree", base / "there"
    there.mkdir()
    put(tree / "file")
    (tree / "dir").mkdir()
    source, writer = rounds(tree, there)
    try:
        os.setxattr(tree / "dir", "system.posix_acl_default", ACL)
        os.setxattr(tree / "file", "system.posix_acl_access", ACL)
        os.setxattr(tree / "file", "security.capability", CAPABILITY)
        os.setxattr(tree / "file", "user.mine", b"\xff")
    except OSError:
        pytest.skip("this file system has no such attributes")
    put(tree / "dir/inherits")
    send(source, writer, live=True)
    assert_same(tree, there)
    for key in ("security.capability", "user.mine", "system.posix_acl_access"):
        os.removexattr(tree / "file", key)
    send(source, writer, live=False)
    assert_same(tree, there)
    writer.close()


@pytest.mark.parametrize("settled", [False, True], ids=["at the end", "before the last round"])
def test_an_overlay_is_brought_onto_its_image(base: Path, settled: bool) -> None:
    """The same as capture and apply make, for everything that a container can do."""
    for name in ("top", "bottom"):
        (base / name).mkdir()
    make_lower(base / "top", base / "bottom")
    lowers = [base / "top", base / "bottom"]
    here, there, old = Overlay(base, "here", lowers), Overlay(base, "there", lowers), Overlay(base, "old", lowers)
    replica = base / "replica"
    replica.mkdir()
    source, writer = TreeSource(lambda live: rootfs.survey(here.rootfs, live=live)), TreeWriter(replica)
    send(source, writer, live=True)
    change(here.merged)
    send(source, writer, live=True)
    if settled:
        writer.close()
        tree_receive.copy(replica, Path(os.devnull), there.merged)
        writer = TreeWriter(there.merged)
    put(here.merged / "later", b"later")
    (here.merged / "data/keep").unlink()
    (here.merged / "added/deep/er/file").rename(here.merged / "moved")
    shutil.rmtree(here.merged / "nested")
    (here.merged / "todir/inner/file").unlink()
    put(here.merged / "nested/a/b/d", b"again")
    send(source, writer, live=False)
    writer.close()
    deleted = base / "deleted.files"
    rootfs.write_deleted(source.deleted, deleted)
    if not settled:
        tree_receive.copy(replica, deleted, there.merged)
    rootfs.capture(here.rootfs, base / "diff.tar", base / "deleted.old")
    assert json.loads(deleted.read_text()) == json.loads((base / "deleted.old").read_text())
    rootfs.apply(base / "diff.tar", base / "deleted.old", old.merged)
    assert_same(old.merged, there.merged)
    assert_same(here.merged, there.merged)


def test_nothing_outside_is_read(base: Path) -> None:
    """A program puts a link in a directory's place between the looking and the reading."""
    tree, there, secret = base / "tree", base / "there", base / "secret"
    there.mkdir()
    put(secret / "file", b"secret")
    put(tree / "dir/file", b"public")

    def look(live: bool) -> rootfs.Survey:
        found = rootfs.survey_tree(tree, live=live)
        shutil.rmtree(tree / "dir")
        os.symlink(secret, tree / "dir")
        return found

    writer = TreeWriter(there)
    send(TreeSource(look), writer, live=True)
    assert not any(b"secret" in path.read_bytes() for path in there.rglob("*") if path.is_file() and not path.is_symlink())
    writer.close()


HOSTILE = [
    b'{"o":"file","p":"../x","new":true}\n',
    b'{"o":"file","p":"x","new":true}\n{"o":"done"}\n',
    b'{"o":"data","at":0,"n":5}\nhello',
    b'{"o":"end","size":3,"m":[33188,0,0,0,{}]}\n',
    b'{"o":"file","p":"x","new":true}\n{"o":"data","at":-1,"n":1}\nx',
    b'{"o":"file","p":"x","new":true}\n{"o":"end","size":9223372036854775808,"m":[33188,0,0,0,{}]}\n',
    b'{"o":"special","p":"x","to":"","dev":[0,0],"m":[49572,0,0,0,{}]}\n',
    b'{"o":"what","p":"x"}\n',
    b"[" * 2000 + b"\n",
    b"x" * (2 << 20),
    b'{"o":"link","p":"x","to":"not there"}\n',
]


@pytest.mark.parametrize("stream", HOSTILE)
def test_a_hostile_stream(tmp_path: Path, stream: bytes) -> None:
    there = tmp_path / "there"
    there.mkdir()
    writer = TreeWriter(there)
    try:
        writer.sink.write(stream)
        with pytest.raises(ArchiveInvalid):
            writer.finish()
    except BrokenPipeError:
        with pytest.raises(ArchiveInvalid):
            writer.finish()
    assert sorted(os.listdir(tmp_path)) == ["there"]
    writer.close()


def test_links_lead_nowhere(tmp_path: Path) -> None:
    """What comes beneath a link is made within the directory."""
    there, outside = tmp_path / "there", tmp_path / "outside"
    there.mkdir()
    outside.mkdir()
    writer = TreeWriter(there)
    lines = [
        {"o": "special", "p": "link", "to": str(outside), "dev": [0, 0], "m": [0o120777, 0, 0, 0, {}]},
        {"o": "file", "p": "link/file", "new": True},
        {"o": "end", "size": 0, "m": [0o100644, 0, 0, 0, {}]},
        {"o": "done"},
    ]
    for line in lines:
        writer.sink.write(json.dumps(line).encode() + b"\n")
    with pytest.raises(CkptError):
        writer.finish()
    assert not list(outside.iterdir())
    writer.close()


def test_no_room(tmp_path: Path) -> None:
    tree, there = tmp_path / "tree", tmp_path / "there"
    put(tree / "file", os.urandom(3 * MIB))
    there.mkdir()
    mount("tmpfs", there, "tmpfs", "size=1m")
    writer = TreeWriter(there)
    try:
        source = TreeSource(lambda live: rootfs.survey_tree(tree, live=live))
        with pytest.raises(NoSpace):
            try:
                send(source, writer, live=True)
            except BrokenPipeError:
                writer.finish()
    finally:
        writer.close()
        unmount(there)


def test_a_plain_root_file_system(tmp_path: Path) -> None:
    put(tmp_path / "root/etc/x")
    assert b"etc/x" in rootfs.survey(RootFs(tmp_path / "root")).names
