"""The engines `runc` and `crun` with the real runtimes on a lab host: containers that are nothing but a bundle and an id."""

from __future__ import annotations

import json

import pytest

from tests.lab.harness import Lab

pytestmark = pytest.mark.lab

# Runs on the host. The counter appends "tick wallclock_ns" to /data/ticks in its root file system.
PRELUDE = '''
import json, os, shutil, subprocess, sys, time
from pathlib import Path
from ckpt.archive import rootfs
from ckpt.engines import _oci_bundle as bundles
from ckpt.engines.registry import by_name
from ckpt.errors import BusyError, CkptError, DumpFailed, RestoreFailed, UsageError
from ckpt.model import DumpOptions, Manifest, RestoreOptions
from ckpt.store.job import Job

RUNTIME = sys.argv[1]
engine = by_name(RUNTIME)
top = Path("/srv/oci")
store = Path("/var/lib/ckpt")

def until(condition, limit_s=20):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)

def make(bundle, command=("/bin/counter", "/data/ticks"), change=lambda spec: None):
    for name in ("bin", "data", "proc", "dev", "sys", "tmp"):
        (bundle / "rootfs" / name).mkdir(parents=True, exist_ok=True)
    shutil.copy("/opt/lab/bin/counter", bundle / "rootfs/bin/counter")
    (bundle / "rootfs/data/state").write_text("original")
    (bundle / "config.json").unlink(missing_ok=True)
    subprocess.run([RUNTIME, "spec"], cwd=bundle, check=True)
    spec = json.loads((bundle / "config.json").read_text())
    spec["process"]["terminal"] = False
    spec["process"]["args"] = list(command)
    spec["root"]["readonly"] = False
    spec["linux"].pop("resources", None)
    change(spec)
    (bundle / "config.json").write_text(json.dumps(spec))
    return bundle

def start(name="c1", change=lambda spec: None, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, command=("/bin/counter", "/data/ticks")):
    bundle = make(top / name, command, change)
    subprocess.run([RUNTIME, "run", "--detach", "--bundle", bundle, name], stdin=stdin, stdout=stdout, stderr=stdout, check=True)
    if command[-1] == "/data/ticks":
        until(lambda: len(ticks(bundle)) > 5)
    return engine.describe(engine.find(name)[0])

def ticks(bundle, file="rootfs/data/ticks"):
    try:
        lines = (bundle / file).read_text().lstrip("\\0").splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [int(line.split()[0]) for line in lines if line.endswith("\\n")]

def stands(bundle):
    before = ticks(bundle)
    time.sleep(0.15)  # that nothing happens can only be watched
    return ticks(bundle) == before

def goes_on(bundle, after, file="rootfs/data/ticks"):
    until(lambda: len(ticks(bundle, file)) > len(after) + 3)
    now = ticks(bundle, file)
    assert now == list(range(now[0], now[0] + len(now))), f"ticks were lost or repeated: {now}"

def dump(container, stage="stage", **options):
    job = Job.create(store, "checkpoint")
    directory = top / stage
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    held = engine.dump(container, directory, DumpOptions(**options), job)
    # What ops do while it is held.
    if container.rootfs.upper_dir is None:
        rootfs.capture_tree(container.rootfs.merged_dir, directory / "rootfs-diff.tar")
    else:
        rootfs.capture(container.rootfs, directory / "rootfs-diff.tar", directory / "deleted.files")
    return job, held

def manifest(container):
    return Manifest(id="1", name=container.name, engine=RUNTIME, container_id=container.id, created_s=0, runtime=RUNTIME)

def restore(container, name=None, stage="stage", job=None, ready=None):
    directory = top / stage
    fill = lambda root: rootfs.apply(directory / "rootfs-diff.tar", directory / "deleted.files", root)
    job = job or Job.create(store, "restore")
    nothing = lambda *ignored: None
    return engine.restore(directory, manifest(container), RestoreOptions(name=name), job, rootfs_ready=ready or fill, volume_ready=nothing)

def names():
    return sorted(c.name for c in engine.containers())

def cgroup(container):
    return bundles.cgroup_of(container.pid)
'''


def play(lab: Lab, runtime: str, scenario: str) -> None:
    """Run a scenario on host a."""
    lab.a.run(["python3", "-c", PRELUDE + scenario, runtime], timeout_s=120)


@pytest.fixture(params=["runc", "crun"])
def runtime(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_describe(lab: Lab, runtime: str) -> None:
    play(
        lab,
        runtime,
        """
Path("/srv/data").mkdir()
def change(spec):
    spec["mounts"].append({"source": "/srv/data", "destination": "/host", "type": "bind", "options": ["rbind", "ro"]})
    spec["annotations"] = {"role": "web"}
can = engine.probe()
assert can.usable and can.hold and can.clone and can.version[0].isdigit(), can
c = start(change=change)
assert names() == ["c1"] and engine.find("c") == [] and [x.id for x in engine.find("c1")] == ["c1"]
assert c.state == "running" and c.runtime == RUNTIME and c.bundle_dir == top / "c1" and c.rootfs.merged_dir == top / "c1/rootfs"
assert c.rootfs.upper_dir is None and engine.full_rootfs and not c.terminal and abs(c.created_s - time.time()) < 60
assert [(m.source, m.destination) for m in c.host_mounts] == [("/srv/data", "/host")] and c.labels["role"] == "web"
assert {f.severity for f in engine.preflight(c, DumpOptions())} == {"ok"}
try:
    engine.remove(c)
    raise AssertionError("removed while running")
except BusyError:
    pass
subprocess.run([RUNTIME, "kill", "c1", "KILL"], check=True)
until(lambda: engine.describe(c).state == "exited")
engine.remove(c)
assert names() == []
""",
    )


def test_podmans_containers_are_podmans(lab: Lab, runtime: str) -> None:
    image = lab.a.load_image()
    lab.a.run(["podman", "--runtime", runtime, "run", "-d", "--name", "web", image, "counter", "/data/ticks"])
    assert json.loads(lab.a.run([runtime, "list", "-f", "json"]).stdout), "podman uses another state directory: this test proves nothing"
    play(lab, runtime, 'assert names() == []\nassert [c.name for c in by_name("podman").containers()] == ["web"]')


def test_resume_then_end_and_restore_in_place(lab: Lab, runtime: str) -> None:
    play(
        lab,
        runtime,
        """
c = start()
b = c.bundle_dir
job, held = dump(c)
assert stands(b) and (top / "stage/checkpoint/pstree.img").exists()
config = json.loads((top / "stage/config.dump").read_text())
assert config["id"] == "c1" and config["runtime"] == RUNTIME and config["bundle"] == str(b) and config["rootfsImageName"] == ""
assert json.loads((top / "stage/spec.dump").read_text()) == json.loads((b / "config.json").read_text())
at = ticks(b)
held.resume()
job.release()
goes_on(b, at)
assert engine.describe(c).state == "running"

(b / "rootfs/data/state").write_text("modified")
job, held = dump(c)
at = ticks(b)
held.end()
job.release()
assert names() == [] and not engine.known("c1") and not os.path.exists(f"/proc/{c.pid}"), names()
(b / "rootfs/data/state").write_text("later")
r = restore(c)
assert r.init_pid and stands(b)
back = r.resume()
assert back.id == "c1" and back.state == "running" and back.bundle_dir == b and back.pid == r.init_pid and cgroup(back) == "/c1", back
goes_on(b, at)
assert (b / "rootfs/data/state").read_text() == "modified"
try:
    restore(c)
    raise AssertionError("restored over a running one")
except BusyError:
    pass
goes_on(b, ticks(b))

# And once more from there.
job, held = dump(back)
at = ticks(b)
held.end()
restore(back).resume()
goes_on(b, at)
assert not bundles.BUNDLES.exists() or not list(bundles.BUNDLES.iterdir())
""",
    )


def test_two_copies_beside_the_source(lab: Lab, runtime: str) -> None:
    play(
        lab,
        runtime,
        """
c = start()
job, held = dump(c)
at = ticks(c.bundle_dir)
held.resume()
copies = []
for name in ("one", "two"):
    copy = restore(c, name).resume()
    assert copy.name == name and copy.bundle_dir == bundles.BUNDLES / name and copy.state == "running", copy
    goes_on(copy.bundle_dir, at)
    copies.append(copy)
goes_on(c.bundle_dir, at)
assert names() == ["c1", "one", "two"]
assert [cgroup(x) for x in (c, *copies)] == ["/c1", "/one", "/two"]

# One of them is dumped, ended, brought back; the others never notice.
job, held = dump(copies[0], "again")
assert stands(copies[0].bundle_dir)
goes_on(c.bundle_dir, ticks(c.bundle_dir))
goes_on(copies[1].bundle_dir, ticks(copies[1].bundle_dir))
at = ticks(copies[0].bundle_dir)
held.end()
shutil.rmtree(copies[0].bundle_dir)
back = restore(copies[0], stage="again").resume()
assert back.id == "one"
goes_on(back.bundle_dir, at)
subprocess.run([RUNTIME, "delete", "--force", "one"], check=True)
goes_on(c.bundle_dir, ticks(c.bundle_dir))
goes_on(copies[1].bundle_dir, ticks(copies[1].bundle_dir))
""",
    )


def test_named_cgroup(lab: Lab, runtime: str) -> None:
    play(
        lab,
        runtime,
        """
c = start(change=lambda spec: spec["linux"].update(cgroupsPath="/shop/c1"))
job, held = dump(c)
held.resume()
copy = restore(c, "copy").resume()
assert [cgroup(c), cgroup(copy)] == ["/shop/c1", "/shop/copy"], [cgroup(c), cgroup(copy)]
""",
    )


def test_abort_leaves_nothing(lab: Lab, runtime: str) -> None:
    play(
        lab,
        runtime,
        """
c = start()
job, held = dump(c)
held.resume()
groups = sorted(os.listdir("/sys/fs/cgroup"))
job = Job.create(store, "restore")
r = restore(c, "copy", job=job)
assert stands(bundles.BUNDLES / "copy")
r.abort()
assert names() == ["c1"] and not engine.known("copy") and not os.path.exists(bundles.BUNDLES / "copy") and not os.path.exists(f"/proc/{r.init_pid}")
until(lambda: sorted(os.listdir("/sys/fs/cgroup")) == groups)
engine.rollback(job)  # again: nothing more to do
goes_on(c.bundle_dir, ticks(c.bundle_dir))

# Its files cannot be filled: nothing was begun.
def broken(root):
    raise OSError(28, "No space left on device")
try:
    restore(c, "copy", ready=broken)
    raise AssertionError("restored")
except OSError:
    pass
assert names() == ["c1"] and not os.path.exists(bundles.BUNDLES / "copy")

# CRIU refuses: the program is not there.
try:
    restore(c, "copy", ready=lambda root: (root / "bin").mkdir())
    raise AssertionError("restored")
except RestoreFailed as error:
    assert "copy cannot be restored" in error.message and error.log, error.to_json()
assert names() == ["c1"] and not engine.known("copy") and not os.path.exists(bundles.BUNDLES / "copy")
try:
    restore(c, "copy", ready=lambda root: None)
    raise AssertionError("restored")
except RestoreFailed as error:
    assert "does not hold its root file system" in error.message
for bad in ("../x", "-x", "a/b", ".."):
    try:
        restore(c, bad)
        raise AssertionError(bad)
    except UsageError:
        pass
goes_on(c.bundle_dir, ticks(c.bundle_dir))

# In place, with the source gone: only what the restore made goes.
job, held = dump(c)
at = ticks(c.bundle_dir)
held.end()
restore(c).abort()
assert names() == [] and (c.bundle_dir / "config.json").exists()
restore(c).resume()
goes_on(c.bundle_dir, at)
""",
    )


def test_owner_dies_while_held(lab: Lab, runtime: str) -> None:
    play(
        lab,
        runtime,
        """
c = start()
def die(code):
    with subprocess.Popen([sys.executable, "-c", PRELUDE_AGAIN + code, RUNTIME], stdout=subprocess.PIPE, text=True) as owner:
        line = owner.stdout.readline().strip()
        owner.kill()
    return Job(Path(line))

job = die('job, held = dump(engine.describe(engine.find("c1")[0]))\\nprint(job.directory, flush=True)\\ntime.sleep(60)\\n')
goes_on(c.bundle_dir, ticks(c.bundle_dir))
assert job.acquire()
engine.rollback(job)
job.release()
assert engine.describe(c).state == "running"

job, held = dump(c)
held.resume()
job = die('job = Job.create(store, "restore")\\nr = restore(engine.describe(engine.find("c1")[0]), "copy", job=job)\\n'
          'print(job.directory, flush=True)\\ntime.sleep(60)\\n')
assert job.acquire()
engine.rollback(job)
assert names() == ["c1"] and not engine.known("copy") and not os.path.exists(bundles.BUNDLES / "copy"), names()
goes_on(c.bundle_dir, ticks(c.bundle_dir))

# Past the point of no return it stays held, for who goes on with it.
job = die('job, held = dump(engine.describe(engine.find("c1")[0]))\\njob.write("commit")\\nprint(job.directory, flush=True)\\ntime.sleep(60)\\n')
assert stands(c.bundle_dir)
assert job.acquire()
engine.rollback(job)
assert stands(c.bundle_dir)
at = ticks(c.bundle_dir)
engine.adopt(c, job).end()
assert names() == []
restore(c).resume()
goes_on(c.bundle_dir, at)
""".replace("PRELUDE_AGAIN", repr(PRELUDE)),
    )


def test_output_files_and_pipes(lab: Lab, runtime: str) -> None:
    """`run -d c1 >log`: the file is none of the container's mounts, CRIU alone refuses it."""
    play(
        lab,
        runtime,
        """
log = top / "log"
top.mkdir()
def written():
    return ticks(top, "log")
(top / "input").write_text("never read")
with log.open("wb") as out, open(top / "input", "rb") as into:
    c = start(stdin=into, stdout=out, command=("/bin/counter", "-"))
until(lambda: len(written()) > 5)
job, held = dump(c)
at = written()
held.end()
back = restore(c).resume()
goes_on(top, at, "log")
assert written()[0] == 0

# A copy must not write into the file of the original.
job, held = dump(back)
held.resume()
copy = restore(back, "copy").resume()
until(lambda: len(ticks(copy.bundle_dir, "output.log")) > 3)
goes_on(top, written(), "log")
assert stands(copy.bundle_dir)
subprocess.run([RUNTIME, "delete", "--force", "copy"], check=True)

# Its file has grown since: it is not cut, the restored one writes to a file of its own.
subprocess.run([RUNTIME, "delete", "--force", "c1"], check=True)
with log.open("wb") as out:
    c = start(stdout=out, command=("/bin/counter", "-"))
until(lambda: len(written()) > 5)
job, held = dump(c)
held.resume()
goes_on(top, written(), "log")
subprocess.run([RUNTIME, "delete", "--force", "c1"], check=True)
before = log.read_bytes()
restore(c).resume()
until(lambda: len(ticks(bundles.BUNDLES, "c1.output.log")) > 3)
assert log.read_bytes() == before

# The other end of a pipe is gone with the source; the restored one writes to /dev/null, and can be dumped again.
reader = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
c = start("c2", stdout=reader.stdin)
reader.stdin.close()
for _ in range(2):
    job, held = dump(c)
    at = ticks(c.bundle_dir)
    held.end()
    c = restore(c).resume()
    goes_on(c.bundle_dir, at)
assert reader.wait(10) == 0
""",
    )


def test_overlay_as_root(lab: Lab, runtime: str) -> None:
    play(
        lab,
        runtime,
        """
top = Path("/var/lib/containers")  # a tmpfs: the root of a lab host is an overlay, which cannot be another one's upper directory
make(top / "c1")
lower = top / "lower"
(top / "c1/rootfs").rename(lower)
for name in ("upper", "work"):
    (top / name).mkdir()
(top / "c1/rootfs").mkdir()
subprocess.run(["mount", "-t", "overlay", "o", "-o", f"lowerdir={lower},upperdir={top}/upper,workdir={top}/work", top / "c1/rootfs"], check=True)
null = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
subprocess.run([RUNTIME, "run", "-d", "--bundle", top / "c1", "c1"], check=True, **null)
b = top / "c1"
until(lambda: len(ticks(b)) > 5)
c = engine.describe(engine.find("c1")[0])
assert c.rootfs.upper_dir == top / "upper" and c.rootfs.lower_dirs == (lower,), c.rootfs
job, held = dump(c)
at = ticks(b)
held.resume()
r = restore(c, "copy")
r.abort()
assert not os.path.exists(bundles.BUNDLES / "copy"), "the overlay was not taken away"
copy = restore(c, "copy").resume()
goes_on(copy.bundle_dir, at)
goes_on(b, at)
assert copy.rootfs.lower_dirs == (lower,) and copy.rootfs.upper_dir == copy.bundle_dir / "upper"
job, held = dump(c)
at = ticks(b)
held.end()
restore(c).resume()
goes_on(b, at)
job, held = dump(c := engine.describe(c))
held.end()
subprocess.run(["umount", b / "rootfs"], check=True)
try:
    restore(c)
    raise AssertionError("restored without its root")
except RestoreFailed as error:
    assert "not mounted" in error.message
""",
    )


def test_failed_dump_leaves_it_running(lab: Lab, runtime: str) -> None:
    play(
        lab,
        runtime,
        """
c = start()
b = c.bundle_dir
broken = Job.create(store, "checkpoint")
stage = top / "stage"
(stage / "checkpoint").mkdir(parents=True)
(stage / "checkpoint/pstree.img").mkdir()
try:
    engine.dump(c, stage, DumpOptions(), broken)
    raise AssertionError("dumped into a directory that cannot be written")
except DumpFailed as error:
    assert error.message.startswith("c1 cannot be checkpointed") and error.log, error.to_json()
goes_on(b, ticks(b))
assert engine.describe(c).state == "running"
broken.release()
job, held = dump(c)
held.resume()
goes_on(b, ticks(b))
""",
    )


def test_on_another_host(lab: Lab, runtime: str) -> None:
    """The bundle is made anew from the checkpoint, under the name and the cgroup of the source; a missing host mount is said at once."""
    play(
        lab,
        runtime,
        """
Path("/srv/data").mkdir()
mount = {"source": "/srv/data", "destination": "/host", "type": "bind", "options": ["rbind"]}
c = start(change=lambda spec: spec["mounts"].append(mount))
job, held = dump(c)
held.end()
""",
    )
    lab.a.run(["sh", "-c", "tar -C /srv/oci -c stage | ssh b 'mkdir -p /srv/oci && tar -C /srv/oci -x'"])
    restored = """
from ckpt.model import Container
c = Container(RUNTIME, "c1", "c1", "exited")
try:
    restore(c)
    raise AssertionError("restored without its host mount")
except RestoreFailed as error:
    assert "/srv/data" in error.message and not bundles.BUNDLES.exists()
Path("/srv/data").mkdir()
back = restore(c).resume()
assert back.id == "c1" and back.bundle_dir == bundles.BUNDLES / "c1" and cgroup(back) == "/c1"
goes_on(back.bundle_dir, ticks(back.bundle_dir))
before = ticks(back.bundle_dir)
job, held = dump(back)
held.end()
again = restore(back).resume()
assert again.bundle_dir == back.bundle_dir
goes_on(again.bundle_dir, before)
"""
    lab.b.run(["python3", "-c", PRELUDE + restored, runtime], timeout_s=120)
