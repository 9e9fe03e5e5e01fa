"""The process engine with real CRIU on a lab host: held dump, held restore, owners that die, a TCP connection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.harness import Host, Lab, LabUnavailable

pytestmark = pytest.mark.lab

# Runs on the host. Everything that a scenario starts is in `started` and ended by its pid.
PRELUDE = '''
import os, shutil, signal, socket, subprocess, sys, tempfile, time
from pathlib import Path
from ckpt.criu import images, netlock, tree
from ckpt.engines.process import ProcessEngine
from ckpt.errors import CkptError, DumpFailed, RestoreFailed, UsageError
from ckpt.model import DumpOptions, Manifest, RestoreOptions
from ckpt.store.job import Job

engine = ProcessEngine()
root = Path(os.environ["SCRATCH"])
started = {}

def until(condition, limit_s=10):
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)

def start(code, *argv, session=True):
    ready = root / "ready"
    ready.unlink(missing_ok=True)
    program = root / "program.py"
    program.write_text(code)
    with open(root / "out", "w") as out:
        p = subprocess.Popen([sys.executable, program, str(root), *argv], stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=session)
    started[p.pid] = p
    until(ready.exists)
    return p

COUNTER = """
import sys, time
n = 0
while True:
    n += 1
    with open(sys.argv[1] + "/count", "a") as out:
        out.write(f"{n}\\\\n")
    if n == 3:
        open(sys.argv[1] + "/ready", "w").close()
    time.sleep(0.02)
"""

def numbers():
    return [int(line) for line in (root / "count").read_text().splitlines()]

def stands():
    before = numbers()
    time.sleep(0.2)  # that nothing happens can only be watched
    return numbers() == before

def goes_on(after):
    until(lambda: len(numbers()) > len(after) + 2)
    assert numbers() == list(range(1, len(numbers()) + 1)), "counts were lost or repeated"

def dump(pid, stage="stage", job=None, **options):
    container = engine.describe(engine.find(str(pid))[0])
    return container, engine.dump(container, root / stage, DumpOptions(**options), job or Job.create(root, "dump"))

def restore(container, stage="stage", job=None, **facts):
    manifest = Manifest(id="1", name=container.name, engine="process", container_id=container.id, created_s=0, **facts)
    nothing = lambda *ignored: None
    return engine.restore(root / stage, manifest, RestoreOptions(), job or Job.create(root, "restore"), rootfs_ready=nothing, volume_ready=nothing)

def ended(pid):
    until(lambda: not ((s := tree.stat(pid)) and s.alive))

def die_holding(code):
    """Run `code` in another process until it prints a line, then kill it -9. Returns the line."""
    with subprocess.Popen([sys.executable, "-c", PRELUDE_AGAIN + code], stdout=subprocess.PIPE, text=True) as owner:
        line = owner.stdout.readline().strip()
        owner.kill()
    return line
'''
CLEAN_UP = """
finally:
    for pid, process in started.items():
        if process.poll() is None or tree.stat(pid):
            try:
                os.kill(pid, signal.SIGKILL)
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
    texts = f"PRELUDE_AGAIN = {PRELUDE!r}\nBODY = {body!r}\n"
    program = f'{PRELUDE}\n{texts}try:\n    exec(compile(BODY, "scenario", "exec"))\n{CLEAN_UP}'
    host.run(["sh", "-c", 'export SCRATCH="$(mktemp -d)"; exec python3 -'], input=program, timeout_s=120)


def test_probe_and_find(host: Host) -> None:
    scenario(
        host,
        """
p = start(COUNTER)
can = engine.probe()
assert can.usable and can.hold and can.version.startswith("4."), can
[found] = engine.find(str(p.pid))
assert found.name == f"{tree.stat(p.pid).comm}-{p.pid}" and engine.find(found.name) == [found]
assert not engine.find("nobody") and not engine.find("0") and engine.containers() == []
assert not [f for f in engine.preflight(found, DumpOptions()) if f.severity == "error"]
for pid in (1, os.getpid()):
    try:
        engine.describe(engine.find(str(pid))[0])
        raise AssertionError(f"{pid} was not refused")
    except UsageError:
        pass
""",
    )


def test_held_dump_resumes(host: Host) -> None:
    scenario(
        host,
        """
p = start(COUNTER)
container, held = dump(p.pid)
assert stands()
before = numbers()
held.resume()
goes_on(before)
[process] = images.process_tree(root / "stage/checkpoint")
assert process.pid == p.pid and process.comm == tree.stat(p.pid).comm
assert images.memory_bytes(root / "stage/checkpoint") > 0
""",
    )


def test_end_and_restore_goes_on_where_it_was(host: Host) -> None:
    scenario(
        host,
        """
p = start(COUNTER)
container, held = dump(p.pid)
before = numbers()
held.end()
ended(p.pid)
p.wait()
assert images.stats(root / "stage/stats-dump").frozen_time_us > 0
again = restore(container)
assert again.init_pid == p.pid and numbers() == before and stands()
assert again.resume().pid == p.pid
goes_on(before)
# Its pid is taken now, and whoever has it must not suffer.
try:
    restore(container)
    raise AssertionError("restored twice")
except RestoreFailed as error:
    assert f"pid {p.pid} is taken" in error.message
goes_on(numbers())
""",
    )


def test_restored_tree_outlives_its_restorer(host: Host) -> None:
    scenario(
        host,
        """
p = start(COUNTER)
container, held = dump(p.pid)
held.end()
p.wait()
done = subprocess.run([sys.executable, "-c", PRELUDE_AGAIN + f'''
from ckpt.model import Container
restore(Container("process", "x", {container.name!r}, "exited")).resume()
'''], timeout=60)
assert done.returncode == 0
goes_on(numbers())
assert tree.stat(p.pid).ppid == 1
""",
    )


def test_leave_running(host: Host) -> None:
    scenario(
        host,
        """
p = start(COUNTER)
container, held = dump(p.pid, leave_running=True)
before = numbers()
held.resume()
goes_on(before)
assert images.stats(root / "stage/stats-dump").frozen_time_us > 0
""",
    )


def test_killed_owner_before_commit_resumes_the_source(host: Host) -> None:
    scenario(
        host,
        """
p = start(COUNTER)
job = Job(Path(die_holding(f'''
job = Job.create(root, "dump")
dump({p.pid}, job=job)
print(job.directory, flush=True)
signal.pause()
''')))
goes_on(numbers())
assert job.acquire(wait=True)
engine.rollback(job)
engine.rollback(job)
goes_on(numbers())
""",
    )


@pytest.mark.parametrize("verdict", ["end", "resume"])
def test_killed_owner_after_commit_keeps_the_source_frozen(host: Host, verdict: str) -> None:
    scenario(
        host,
        """
p = start(COUNTER)
job = Job(Path(die_holding(f'''
job = Job.create(root, "dump")
dump({p.pid}, job=job)
job.write("commit")
print(job.directory, flush=True)
signal.pause()
''')))
before = numbers()
assert stands() and tree.stat(p.pid).alive
assert job.acquire(wait=True)
held = engine.adopt(engine.describe(engine.find(str(p.pid))[0]), job)
assert stands()
if "VERDICT" == "end":
    held.end()
    ended(p.pid)
else:
    held.resume()
    goes_on(before)
""".replace("VERDICT", verdict),
    )


def test_aborted_restore_leaves_nothing(host: Host) -> None:
    scenario(
        host,
        """
p = start(COUNTER)
container, held = dump(p.pid)
held.end()
p.wait()
again = restore(container)
assert tree.stat(p.pid)
again.abort()
assert tree.stat(p.pid) is None and not netlock.snapshot()
die_holding(f'''
from ckpt.model import Container
restore(Container("process", "x", {container.name!r}, "exited"))
print("held", flush=True)
signal.pause()
''')
until(lambda: tree.stat(p.pid) is None)
assert not netlock.snapshot()
before = numbers()
restore(container).resume()
goes_on(before)
""",
    )


def test_tcp_connection_survives(host: Host) -> None:
    scenario(
        host,
        """
p = start('''
import socket, sys
s = socket.create_server(("127.0.0.1", 7300))
open(sys.argv[1] + "/ready", "w").close()
c, _ = s.accept()
while data := c.recv(4096):
    c.sendall(data)
''')
client = socket.create_connection(("127.0.0.1", 7300), timeout=10)

def echo(text):
    client.sendall(text)
    assert client.recv(100) == text

echo(b"1")
assert tree.needs(p.pid).tcp_established
try:
    dump(p.pid)
    raise AssertionError("dumped without --tcp-established")
except DumpFailed as error:
    assert "connected TCP socket" in error.message and "--tcp-established" in error.hint
echo(b"2")
container, held = dump(p.pid, "resumed", tcp_established=True)
assert netlock.locks_of(root / "resumed/checkpoint")
held.resume()
echo(b"3")
assert not netlock.snapshot()
container, held = dump(p.pid, tcp_established=True)
client.sendall(b"sent while it was away")
held.end()
p.wait()
locks = netlock.snapshot()
assert locks, "the peer would have been reset"
try:
    restore(container)
    raise AssertionError("restored without --tcp-established")
except RestoreFailed as error:
    assert "connected TCP sockets" in error.message
assert netlock.snapshot() == locks
restore(container, tcp_established=True).resume()
assert client.recv(100) == b"sent while it was away"
echo(b"4")
assert not netlock.snapshot()
container, held = dump(p.pid, "last", tcp_established=True)
held.end()
assert netlock.unlock(root / "last/checkpoint", p.pid) and not netlock.snapshot()
""",
    )


def test_failures_leave_it_running_and_say_why(host: Host) -> None:
    scenario(
        host,
        """
held_open = COUNTER.replace("n = 0", "import fcntl; n = 0; f = open(sys.argv[1] + '/lock'); fcntl.flock(f, fcntl.LOCK_EX)")
(root / "lock").write_text("only read, so it does not travel")
p = start(held_open)
assert tree.needs(p.pid).file_locks
before = numbers()
try:
    dump(p.pid)
    raise AssertionError("dumped with a lock")
except DumpFailed as error:
    assert "file locks" in error.message and "running" in error.where
    path, line = error.log.rsplit(":", 1)
    assert "Some file locks" in open(path).read().splitlines()[int(line) - 1]
goes_on(before)
container, held = dump(p.pid, "stage", file_locks=True)
held.end()
p.wait()
(root / "lock").write_text("changed")
try:
    restore(container, file_locks=True)
    raise AssertionError("restored with a changed file")
except RestoreFailed as error:
    assert "/lock is not what it was" in error.message, error.message
assert tree.stat(p.pid) is None
""",
    )
