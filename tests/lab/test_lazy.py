"""`restore --lazy`: the workload runs before its memory is there. memhog tells: it checks every page, and ends with status 3 at a wrong one."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.lab.counting import leftovers, wait_until
from tests.lab.harness import Host, Lab, LabUnavailable
from tests.lab.harness.host import HostResult

pytestmark = pytest.mark.lab

WORLDS = ("podman-crun", "podman-runc", "crun", "runc", "process")
MIB = 256
SMALL_MIB = 48
ALL_CHECKED = 150
"""memhog looks at each of its pages once in so many ticks."""
GATE = "/tmp/gate"
HOLD = "/tmp/hold-pages"
NO_UFFD = "/tmp/no-userfaultfd"
DAEMON_HOLD = f"""
#include <linux/ioctl.h>
#include <linux/userfaultfd.h>
#include <stdarg.h>
#include <sys/syscall.h>
#include <unistd.h>
int ioctl(int fd, unsigned long request, ...) {{
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    while (request == UFFDIO_COPY && access("{HOLD}", F_OK) == 0)
        usleep(2000);
    return syscall(SYS_ioctl, fd, request, argument);
}}
"""
"""Loaded into the daemon: no page comes while the file HOLD is there. (SIGSTOP would do, but CRIU 4.2.1 dies of the SIGCONT.)"""
CRIU = f"""#!/bin/sh
[ "$1" = lazy-pages ] && export LD_PRELOAD=/opt/hold.so
[ "$1 $2" = "check --feature" ] && [ -e {NO_UFFD} ] && exit 1
exec /usr/sbin/criu "$@"
"""


class World:
    """One memhog on a host, in a container or as a process; its ticks are read from outside."""

    def __init__(self, host: Host, kind: str) -> None:
        self.host, self.kind = host, kind
        self.scratch = f"/var/lib/lazy/{kind}"
        self.ref = "web"
        self.saved_ticks = 0
        self.at = 0
        self.said = b""

    @property
    def target(self) -> str:
        return self.ref if self.kind.startswith("podman") else f"pid:{self.ref.rpartition('-')[2]}" if self.kind == "process" else f"{self.kind}:web"

    def start(self, mib: int = MIB, command: tuple[str, ...] = ()) -> None:
        """Start it and wait for its first ticks."""
        host, where = self.host, self.scratch
        host.run(["mkdir", "-p", where])
        if self.kind.startswith("podman"):
            argv = command or ("memhog", str(mib), "0", "/ticks/ticks")
            runtime = self.kind.removeprefix("podman-")
            host.run(["podman", "--runtime", runtime, "run", "-d", "--name", "web", "-v", f"{where}:/ticks", host.load_image(), *argv])
        elif self.kind == "process":
            start = 'setsid /opt/lab/bin/memhog "$1" 0 "$2" </dev/null >/dev/null 2>&1 & echo $!'
            self.ref = "memhog-" + host.run(["sh", "-c", start, "sh", str(mib), f"{where}/ticks"]).stdout.strip()
        else:
            script = (
                'set -e; cd "$1"; mkdir -p rootfs/bin rootfs/proc rootfs/dev rootfs/sys rootfs/data; ln -s rootfs/data/ticks ticks\n'
                'cp /opt/lab/bin/memhog rootfs/bin/; "$2" spec\n'
                'python3 -c \'import json, sys; s = json.load(open("config.json")); '
                's["process"].update(terminal=False, args=["/bin/memhog", sys.argv[1], "0", "/data/ticks"]); '
                's["root"]["readonly"] = False; s["linux"].pop("resources", None); json.dump(s, open("config.json", "w"))\' "$3"\n'
                '"$2" run --detach --bundle "$1" web </dev/null >/dev/null 2>&1\n'
            )
            host.run(["sh", "-c", script, "sh", where, self.kind, str(mib)])
        wait_until(lambda: len(self.ticks()) > 20, "memhog counts")

    def ticks(self, name: str = "ticks") -> list[int]:
        """The numbers of all whole lines."""
        text = self.host.run(["cat", f"{self.scratch}/{name}"], check=False).stdout
        return [int(line.split()[0]) for line in text[: text.rfind("\n") + 1].splitlines()]

    def pids(self) -> list[int]:
        """The living memhogs."""
        found = self.host.run(["sh", "-c", "grep -lx memhog /proc/[0-9]*/comm; true"], check=False).stdout.split()
        return [int(path.split("/")[2]) for path in found]

    def ckpt(self, *argv: str, code: int = 0, fault: str = "") -> HostResult:
        """Run ckpt; it must end with this status."""
        done = self.host.run(["ckpt", *argv], env={"CKPT_FAULT": fault} if fault else {}, check=False, timeout_s=120)
        assert done.returncode == code, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def checkpoint(self) -> None:
        self.ckpt("checkpoint", self.target)
        self.saved_ticks, self.at = len(self.ticks()), self.ticks()[-1]

    def restore(self, *options: str) -> dict[str, Any]:
        """Restore it; what it said."""
        self.before_restore()
        found: dict[str, Any] = json.loads(self.ckpt("restore", "--format", "json", *(options or (self.ref,))).stdout)
        (row,) = found["results"]
        assert row["state"] == "running"
        return dict(row)

    def before_restore(self) -> None:
        # A tick file on a mount of the host stays as it is, any other is brought back as it was.
        self.saved_ticks = len(self.ticks()) if self.kind.startswith("podman") else self.saved_ticks

    def restore_without_pages(self, *options: str) -> None:
        """Restore lazily; once the tree is held (CRIU needs some itself) no page comes before `let_pages_come`."""
        self.before_restore()
        with self.held(*options):
            self.host.write_file(HOLD, "")

    @contextmanager
    def held(self, *options: str, code: int = 0) -> Iterator[None]:
        """A lazy restore that waits while the tree is held."""
        host = self.host
        restore = host.popen(["ckpt", "restore", "--lazy", *(options or (self.ref,))], env={"CKPT_FAULT": f"restored:gate={GATE}"})
        try:
            wait_until(lambda: host.exists(f"{GATE}.reached") or restore.poll() is not None, "it is held")
            yield
        finally:
            host.write_file(GATE, "")
            try:
                out, self.said = restore.communicate(timeout=60)
            finally:
                if restore.poll() is None:
                    restore.kill_session()
            host.run(["rm", "-f", GATE, f"{GATE}.reached"])
        assert restore.returncode == code, (out, self.said)

    def let_pages_come(self) -> None:
        self.host.run(["rm", HOLD])

    def daemon(self) -> int:
        """The lazy-pages daemon."""
        (found,) = self.host.run(["pgrep", "-f", "^[^ ]*criu lazy-pages"]).stdout.split()
        return int(found)

    def goes_on(self, ticks: int = ALL_CHECKED) -> None:
        """It counts from where it was saved, long enough for all its memory to be checked."""
        wait_until(lambda: len(self.ticks()) > self.saved_ticks + ticks or not self.pids(), "memhog counts on")
        now = self.ticks()[self.saved_ticks :]
        assert now == list(range(self.at + 1, self.at + 1 + len(now))), (self.at, now[:5], now[-5:])
        assert len(now) > ticks, f"memhog ended\n{self.traces()}"

    def settled(self) -> None:
        """No job, no draft, no daemon, no lock: as if the restore had been an ordinary one."""
        try:
            wait_until(lambda: not leftovers(self.host) and not self.keepers(), "nothing is left", 30)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{leftovers(self.host)}\n{self.traces()}") from None
        self.host.run(["sh", "-c", "for d in $(ls -d /var/lib/ckpt/checkpoints/*); do flock -n -x $d true || exit 1; done"])

    def traces(self) -> str:
        """What jobs and kept logs tell, for a test that failed."""
        script = "tail -n 40 /var/lib/ckpt/jobs/*/*.jsonl /var/lib/ckpt/jobs/*/*.log /var/lib/ckpt/jobs/*/criu/*.log /var/log/ckpt/*/*; ps -ef"
        return self.host.run(["sh", "-c", script], check=False).stdout

    def keepers(self) -> str:
        return self.host.run(["pgrep", "-f", "keeper_main"], check=False).stdout

    def kill(self) -> None:
        for pid in self.pids():
            self.host.run(["kill", "-9", str(pid)], check=False)
        wait_until(lambda: not self.pids(), "memhog has ended")

    def close(self) -> None:
        self.host.run(["rm", "-f", HOLD, GATE, f"{GATE}.reached", NO_UFFD])
        self.kill()
        self.host.run(["podman", "rm", "-a", "-f", "-t", "0"], check=False)
        for runtime in ("crun", "runc"):
            self.host.run([runtime, "delete", "--force", "web"], check=False)
        wait_until(lambda: not self.host.run(["pgrep", "-f", "keeper_main|guard_main"], check=False).stdout, "guards and keepers are through")
        self.host.run(["sh", "-c", "rm -rf /var/lib/lazy /var/lib/ckpt/* /var/log/ckpt /root/web.tar"])
        self.host.prune_v1_cgroups()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    try:
        lab = Lab(source=Path(__file__).parents[2], hosts=("a",)).__enter__()
    except LabUnavailable as error:
        pytest.skip(str(error))
    try:
        built = tmp_path_factory.mktemp("hold") / "hold.so"
        argv = ["gcc", "-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", built]
        subprocess.run(argv, input=DAEMON_HOLD.encode(), check=True)
        lab.a.write_file("/opt/hold.so", built.read_bytes())
        lab.a.write_file("/usr/local/sbin/criu", CRIU, mode=0o755)
        yield lab.a
    finally:
        lab.close()


@pytest.fixture
def make(host: Host) -> Iterator[Callable[[str], World]]:
    made: list[World] = []

    def one(kind: str) -> World:
        made.append(World(host, kind))
        return made[-1]

    yield one
    for world in made:
        world.close()


@pytest.fixture(params=WORLDS)
def world(request: pytest.FixtureRequest, make: Callable[[str], World]) -> World:
    return make(request.param)


def test_its_memory_follows(world: World) -> None:
    world.start()
    world.checkpoint()
    assert world.restore("--lazy", world.ref)["stats"]["lazy"] is True
    world.goes_on()
    world.settled()
    world.kill()
    assert "lazy" not in world.restore()["stats"]
    world.goes_on()
    world.settled()


def test_it_runs_before_its_memory_is_there(world: World) -> None:
    """No page comes: the restore ends all the same. Until then the checkpoint must stay, and a dump would be short."""
    world.start(SMALL_MIB)
    world.checkpoint()
    world.restore_without_pages()
    (pid,) = world.pids()
    resident = int(world.host.run(["awk", "/^VmRSS/ {print $2}", f"/proc/{pid}/status"]).stdout)
    assert resident < SMALL_MIB * 1024 / 2
    refused = world.ckpt("rm", world.ref, code=11)
    assert "still arriving" in refused.stderr and "wait" in refused.stderr
    assert "still arriving" in world.ckpt("checkpoint", world.target, code=11).stderr
    assert "still arriving" in world.host.run(["ckpt", "check", world.target], check=False).stdout
    world.let_pages_come()
    world.goes_on()
    world.settled()
    world.ckpt("rm", world.ref)


@pytest.mark.parametrize(("kind", "step"), [*((kind, "restored") for kind in WORLDS), ("podman-crun", "restoring"), ("process", "lazy-started")])
def test_killed_before_the_commit(make: Callable[[str], World], kind: str, step: str) -> None:
    world = make(kind)
    world.start(SMALL_MIB)
    world.checkpoint()
    world.ckpt("restore", "--lazy", world.ref, fault=f"{step}:kill", code=-9)
    world.settled()
    assert not world.pids()
    world.restore("--lazy", world.ref)
    world.goes_on()
    world.settled()


@pytest.mark.parametrize(("kind", "step"), [*((kind, "restore-commit") for kind in WORLDS), ("podman-crun", "resumed"), ("process", "resumed")])
def test_killed_after_the_commit(make: Callable[[str], World], kind: str, step: str) -> None:
    world = make(kind)
    world.start(SMALL_MIB)
    world.checkpoint()
    world.before_restore()
    world.ckpt("restore", "--lazy", world.ref, fault=f"{step}:kill", code=-9)
    world.goes_on()
    world.settled()


@pytest.mark.parametrize("action", ["fail", "interrupt", "enospc"])
def test_a_failure_while_it_is_held_leaves_nothing(make: Callable[[str], World], action: str) -> None:
    world = make("podman-crun")
    world.start(SMALL_MIB)
    world.checkpoint()
    world.ckpt("restore", "--lazy", world.ref, fault=f"restored:{action}", code={"fail": 21, "interrupt": 130, "enospc": 60}[action])
    assert not world.pids() and not leftovers(world.host)
    world.restore()
    world.goes_on(20)


def test_a_killed_daemon_ends_the_workload_before_it_sees_wrong_memory(world: World) -> None:
    world.start(SMALL_MIB)
    world.checkpoint()
    world.restore_without_pages()
    before = world.ticks()
    world.host.run(["kill", "-KILL", str(world.daemon())])
    wait_until(lambda: not world.pids(), "it was ended")
    assert len(world.ticks()) <= len(before) + 1
    if world.kind.startswith("podman"):
        status = ["podman", "container", "inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "web"]
        wait_until(lambda: world.host.run(status).stdout.strip() == "exited 137", "podman knows that it was killed")
    wait_until(lambda: not world.keepers(), "its keeper is through")
    world.before_restore()
    said = world.ckpt("restore", world.ref).stderr
    assert "did not all arrive" in said and "signal 9" in said, said
    world.goes_on()
    world.settled()
    assert world.host.run(["ls", "/var/log/ckpt"]).stdout


def test_a_daemon_that_dies_while_it_is_held_is_a_failed_restore(world: World) -> None:
    host = world.host
    world.start(SMALL_MIB)
    world.checkpoint()
    with world.held(code=21):
        host.run(["kill", "-KILL", str(world.daemon())])
        wait_until(lambda: not host.run(["sh", "-c", "ls /var/lib/ckpt/jobs/*/lazy.failed"], check=False).returncode, "its keeper saw it")
    assert b"lazy-pages daemon was ended by signal 9" in world.said
    assert not world.pids()
    world.settled()
    world.restore()
    world.goes_on(20)


def test_a_killed_keeper_takes_no_memory_away(world: World) -> None:
    """The daemon goes on alone, the lease lives on in it, and the next command cleans up."""
    world.start(SMALL_MIB)
    world.checkpoint()
    world.restore_without_pages()
    world.host.run(["pkill", "-KILL", "-f", "keeper_main"])
    assert "still arriving" in world.ckpt("rm", world.ref, code=11).stderr
    world.ckpt("checkpoint", world.target, code=11)  # its sweep leaves the job
    world.let_pages_come()
    world.goes_on()
    wait_until(lambda: not world.host.run(["pgrep", "-x", "criu"], check=False).stdout, "the daemon is through")
    world.ckpt("checkpoint", world.target)
    world.settled()


def test_an_archive_is_restored_from_its_draft(world: World) -> None:
    world.start(SMALL_MIB)
    world.checkpoint()
    world.ckpt("export", world.ref, "-o", "/root/web.tar")
    world.ckpt("rm", world.ref)
    # It comes from a file: this host's policy judges it.
    allow = "process:host" if world.kind == "process" else f"mount:{world.scratch}"
    world.restore_without_pages("--import", "/root/web.tar", "--allow", allow)
    drafts = ["ls", "/var/lib/ckpt/tmp"]
    (draft,) = world.host.run(drafts).stdout.split()
    world.ckpt("restore", "nothing", code=10)  # its sweep leaves the draft
    assert world.host.run(drafts).stdout.split() == [draft]
    world.let_pages_come()
    world.goes_on()
    world.settled()
    assert not world.ckpt("list", "-q").stdout


def test_a_damaged_chunk_is_found_while_it_is_served(world: World) -> None:
    """Never by the workload: it is ended before. A restore that is not lazy finds it before it touches anything."""
    world.start(SMALL_MIB)
    world.checkpoint()
    flip = 'f=$(ls /var/lib/ckpt/packs/*.pack); printf "\\377\\377" | dd of="$f" bs=1 seek=20000001 conv=notrunc'
    world.host.run(["sh", "-c", flip])
    world.restore_without_pages()
    before = world.ticks()
    world.let_pages_come()
    wait_until(lambda: not world.pids(), "it was ended")
    wait_until(lambda: not world.keepers(), "its keeper is through")
    assert len(world.ticks()) < len(before) + ALL_CHECKED
    refused = world.ckpt("restore", world.ref, code=31).stderr
    assert "did not all arrive" in refused and "was changed or damaged" in refused and "checkpoint/pages-" in refused, refused
    world.settled()


def test_several_tasks_that_fork(make: Callable[[str], World]) -> None:
    """Tasks whose memory is complete at different times, and forks while it arrives."""
    world = make("podman-crun")
    script = "memhog 16 0 /ticks/one & memhog 200 0 /ticks/ticks & while :; do /bin/true; echo x >> /ticks/forks; done"
    world.start(command=("sh", "-c", script))
    world.checkpoint()
    one, forks = world.ticks("one"), world.host.run(["wc", "-l", f"{world.scratch}/forks"]).stdout
    world.restore("--lazy", world.ref)
    world.goes_on()
    world.settled()
    wait_until(lambda: len(world.ticks("one")) > len(one) + ALL_CHECKED, "the other counts on")
    now = world.ticks("one")
    assert now == list(range(len(now)))
    wait_until(lambda: world.host.run(["wc", "-l", f"{world.scratch}/forks"]).stdout != forks, "it forks on")


def test_a_copy_beside_the_original(make: Callable[[str], World]) -> None:
    world = make("podman-crun")
    world.start(SMALL_MIB)
    world.ckpt("checkpoint", "-R", "web")
    for name in ("one", "two"):
        world.ckpt("restore", "--lazy", "-n", name, "web")
    world.settled()
    assert len(world.pids()) == 3
    ticks = len(world.ticks())
    wait_until(lambda: len(world.ticks()) > ticks + 3 * ALL_CHECKED or len(world.pids()) < 3, "they count")
    assert len(world.pids()) == 3


def test_without_userfaultfd_nothing_is_touched(make: Callable[[str], World]) -> None:
    world = make("podman-crun")
    world.start(SMALL_MIB)
    world.checkpoint()
    world.host.write_file(NO_UFFD, "")
    assert "userfaultfd" in world.ckpt("restore", "--lazy", "web", code=13).stderr
    world.host.run(["rm", NO_UFFD])
    assert not leftovers(world.host)
    world.restore()
    world.goes_on(20)
