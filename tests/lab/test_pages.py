"""Memory pages from a real CRIU through PageTap and PageWriter into images that CRIU restores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.harness import Host, Lab, LabUnavailable

pytestmark = pytest.mark.lab

# Runs on the host. What a scenario starts is its own child or, once restored, has that child's pid.
PRELUDE = '''
import hashlib, os, re, signal, subprocess, sys, time
from pathlib import Path
from ckpt.criu import features
from ckpt.criu.pageserver import PageTap, config_lines
from ckpt.criu.pagestream import PAGE_BYTES, PageWriter
from ckpt.errors import TransferFailed

root = Path(os.environ["SCRATCH"])
ticks_file = root / "ticks"
started = []

def until(condition, limit_s=15):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)

def start(*argv):
    with open(root / "out", "w") as out:
        p = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    started.append(p)
    until(lambda: ticks_file.exists() and len(ticks()) > 20)
    return p

def ticks():
    return [int(line.split()[0]) for line in ticks_file.read_text().splitlines()]

def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False

def dump(pid, name, *options, by_config=True, parent=None, compare=None):
    """Dump with the pages through the tap and the writer, in this one thread; gives both, and CRIU's status."""
    images = root / name
    images.mkdir()
    tap = PageTap(features.version_text(), timeout_s=20, compare=compare)
    argv = ["criu", "dump", "-t", str(pid), "-D", str(images), "-o", "dump.log", *options]
    env = dict(os.environ)
    if by_config:
        (root / "criu.conf").write_text("".join(line + "\\n" for line in config_lines(tap.port)))
        env["CRIU_CONFIG_FILE"] = str(root / "criu.conf")
    else:
        argv += ["--page-server", "--address", "127.0.0.1", "--port", str(tap.port)]
    buffer = bytearray(1 << 20)
    with subprocess.Popen(argv, env=env) as criu, tap, PageWriter(images, parent=parent and root / parent) as writer:
        while count := tap.readinto(buffer):
            writer.write(memoryview(buffer)[:count])
        writer.finish()
    assert writer.pages_bytes + writer.parents * PAGE_BYTES == (tap.pages + (0 if compare else tap.parents)) * PAGE_BYTES
    return tap, writer, criu.returncode

def pagemaps(name):
    return sorted(path.name for path in (root / name).glob("pagemap-*.img"))

def restore(pid, name, go_on_s=1.5):
    """Restore; the ticks go on without a loss or a repeat, for as long as the workload needs to check all of its memory."""
    before = ticks()
    done = subprocess.run(["criu", "restore", "-D", root / name, "-o", "restore.log", "-d"])
    assert done.returncode == 0, (root / name / "restore.log").read_text()[-3000:]
    end = time.monotonic() + go_on_s
    while time.monotonic() < end:
        assert alive(pid), "it died after the restore: " + (root / "out").read_text()
        time.sleep(0.05)
    after = ticks()
    assert len(after) > len(before) + 20 and after == list(range(len(after))), "ticks were lost or repeated"
    assert (root / "out").read_text() == ""

# Private memory, shared anonymous memory that a child writes too, and a memfd; all of it is checked at each tick.
SHARER = """
import mmap, os, sys, time, zlib
size = 4 << 20
private = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
shared = mmap.mmap(-1, size)
fd = os.memfd_create("lab")
os.ftruncate(fd, size)
memfd = mmap.mmap(fd, size)
for number, area in enumerate((private, shared, memfd)):
    for page in range(0, size // 4096, 1 + number):  # gaps: pages that nobody touched
        area[page * 4096 : page * 4096 + 4096] = os.urandom(2048) + bytes([page % 251]) * 2048
sums = [zlib.crc32(area) for area in (private, shared, memfd)]
beat = mmap.mmap(-1, 4096)
if os.fork() == 0:
    while True:
        beat[0:8] = (int.from_bytes(beat[0:8], "little") + 1).to_bytes(8, "little")
        assert zlib.crc32(shared) == sums[1], "the child's shared memory is wrong"
        time.sleep(0.01)
tick = last = 0
while True:
    with open(sys.argv[1], "a") as out:
        out.write(f"{tick} {time.time_ns()}\\\\n")
    assert [zlib.crc32(area) for area in (private, shared, memfd)] == sums, "the memory is wrong"
    tick += 1
    time.sleep(0.03)
    beats = int.from_bytes(beat[0:8], "little")
    assert tick % 10 or beats > last, "the child is not seen"
    last = last if tick % 10 else beats
"""
'''
CLEAN_UP = """
finally:
    for process in started:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
"""


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    try:
        lab = Lab(source=Path(__file__).parents[2], hosts=("a",)).__enter__()
    except LabUnavailable as error:
        pytest.skip(str(error))
    try:
        yield lab.a
    finally:
        lab.close()


def scenario(host: Host, body: str) -> None:
    """Run `body` on the host; an assertion that fails there fails here, with its traceback."""
    program = f'{PRELUDE}\nBODY = {body!r}\ntry:\n    exec(compile(BODY, "scenario", "exec"))\n{CLEAN_UP}'
    host.run(["sh", "-c", 'export SCRATCH="$(mktemp -d)"; exec python3 -'], input=program, timeout_s=120)


def test_memory_arrives_whole(host: Host) -> None:
    scenario(
        host,
        """
p = start("/opt/lab/bin/memhog", "64", "20", str(ticks_file))
tap, writer, status = dump(p.pid, "images")
assert status == 0 and writer.pages_bytes > 64 << 20, (status, writer.pages_bytes)
p.wait()
# Nothing of the memory was written by CRIU itself.
assert pagemaps("images") == [f"pagemap-{p.pid}.img"]
assert [path.name for path in (root / "images").glob("pages-*.img")] == ["pages-65537.img"]
assert not (root / "images/parent").exists()
restore(p.pid, "images")
""",
    )


def test_shared_memory_too(host: Host) -> None:
    scenario(
        host,
        """
p = start(sys.executable, "-c", SHARER, str(ticks_file))
[child] = map(int, Path(f"/proc/{p.pid}/task/{p.pid}/children").read_text().split())
tap, writer, status = dump(p.pid, "images", by_config=False)
assert status == 0
p.wait()
found = pagemaps("images")
assert {f"pagemap-{p.pid}.img", f"pagemap-{child}.img"} < set(found)
shared = [name for name in found if name.startswith("pagemap-shmem-")]
assert len(shared) == 3 and writer.images == len(found) == 5, found
assert writer.pages_bytes > (4 + 2 + 4 // 3) << 20
restore(p.pid, "images")
""",
    )


def test_unchanged_pages_come_from_the_parent_images(host: Host) -> None:
    scenario(
        host,
        """
digests = {}
def compare(image, vaddr, pages):
    runs = []
    for n in range(len(pages) // PAGE_BYTES):
        digest = hashlib.blake2b(pages[n * PAGE_BYTES:][:PAGE_BYTES], digest_size=16).digest()
        key = image, vaddr + n * PAGE_BYTES
        changed = digests.get(key) != digest
        digests[key] = digest
        if runs and runs[-1][2] == changed:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, changed)
        else:
            runs.append((n, 1, changed))
    return runs

p = start("/opt/lab/bin/memhog", "32", "5", str(ticks_file))
tap, first, status = dump(p.pid, "first", "--leave-running", compare=compare)
assert status == 0 and alive(p.pid) and first.pages_bytes > 32 << 20 and not first.parents
time.sleep(0.3)
tap, second, status = dump(p.pid, "second", parent="first", compare=compare)
assert status == 0
p.wait()
assert os.readlink(root / "second/parent") == "../first"
assert 0 < second.pages_bytes < 16 << 20 < second.parents * PAGE_BYTES, (second.pages_bytes, second.parents)
restore(p.pid, "second")
""",
    )


def test_a_tap_that_is_closed_lets_the_workload_go_on(host: Host) -> None:
    scenario(
        host,
        """
p = start("/opt/lab/bin/memhog", "64", "0", str(ticks_file))
images = root / "images"
images.mkdir()
tap = PageTap(features.version_text(), timeout_s=20)
argv = ["criu", "dump", "-t", str(p.pid), "-D", str(images), "-o", "dump.log", "--page-server", "--address", "127.0.0.1", "--port", str(tap.port)]
with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as criu:
    buffer, got = bytearray(1 << 20), 0
    while got < 8 << 20:
        got += tap.readinto(buffer)
    tap.close()
    assert criu.wait(20) != 0
before = len(ticks())
until(lambda: len(ticks()) > before + 20)
assert ticks() == list(range(len(ticks()))) and p.poll() is None
""",
    )


def test_the_wrong_protocol_fails_at_once(host: Host) -> None:
    scenario(
        host,
        """
p = start("/opt/lab/bin/memhog", "1", "0", str(ticks_file))
(root / "images").mkdir()
other = "4.1.1" if tuple(map(int, features.version_text().split(".")[:2])) >= (4, 2) else "4.2"
tap = PageTap(other, timeout_s=60)
argv = ["criu", "dump", "-t", str(p.pid), "-D", str(root / "images"), "--page-server", "--address", "127.0.0.1", "--port", str(tap.port)]
with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as criu:
    began = time.monotonic()
    try:
        while tap.readinto(bytearray(1 << 20)):
            pass
        raise AssertionError("it was understood")
    except TransferFailed as error:
        assert "another version" in error.message, error
    assert criu.wait(20) != 0 and time.monotonic() - began < 10
until(lambda: len(ticks()) > 50)
""",
    )
