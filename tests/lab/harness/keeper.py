"""The lab's keeper: makes the hosts, then waits for end of file on its standard input, then takes everything away again.

Run as `unshare --net python -I -S keeper.py SPEC.json` by lab.py, which holds the other end of the pipe: the end of the `with` block,
an exception, Ctrl-C and `kill -9` of the owner all look the same from here. So the code that cleans up after a crash is the code that
cleans up always. It needs the standard library only.

Every mount of a host is made in the host's own mount namespace and the switch lives in the keeper's network namespace: both vanish with
their processes. What is left to take away by hand are cgroups and one directory. Should the keeper itself be killed, the hosts die
with it (parent death signal), and the next lab sweeps those (see `sweep`).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RUN = Path("/run/ckpt-lab")
PREFIX = "ckptlab-"
PR_SET_PDEATHSIG = 1
IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)
UP_TIMEOUT_S = 20
CLEAN_TIMEOUT_S = 10.0


def cgroup_mounts() -> tuple[list[Path], Path | None]:
    """Mount points of the machine's v1 hierarchies, and of cgroup2."""
    v1, v2 = [], None
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mountpoint, kind, _ = line.split(" ", 3)
        if kind == "cgroup":
            v1.append(Path(mountpoint))
        elif kind == "cgroup2" and v2 is None:
            v2 = Path(mountpoint)
    return v1, v2


def poke(path: Path, text: str) -> bool:
    try:
        path.write_text(text)
    except OSError:
        return False
    return True


def make_cgroups(name: str) -> list[Path]:
    """An own cgroup in every hierarchy: without it CRIU dumps the machine's whole v1 trees, and restoring their cpuset fails."""
    v1, v2 = cgroup_mounts()
    made = []
    for root in [*v1, *([v2] if v2 else [])]:
        group = root / name
        group.mkdir(exist_ok=True)
        made.append(group)
        if (root / "cpuset.cpus").exists() and root != v2:
            for knob in ("cpuset.cpus", "cpuset.mems"):
                (group / knob).write_text((root / knob).read_text())
            (group / "cgroup.clone_children").write_text("1")
    return made


def enable_controllers(group: Path) -> None:
    """Give the cgroup2 below the host what the machine has; podman warns and waits without it."""
    for level in (group.parent, group):
        with contextlib.suppress(OSError):
            for controller in (level / "cgroup.controllers").read_text().split():
                poke(level / "cgroup.subtree_control", f"+{controller}")


def remove_cgroups(name: str) -> list[Path]:
    """Kill what is in the cgroups `name` of all hierarchies and remove them, deepest first; what could not be removed."""
    v1, v2 = cgroup_mounts()
    groups = [root / name for root in [*v1, *([v2] if v2 else [])] if (root / name).exists()]
    deadline = time.monotonic() + CLEAN_TIMEOUT_S
    while groups and time.monotonic() < deadline:
        for group in groups:
            for directory, _, _ in os.walk(group, topdown=False):
                for pid in _members(Path(directory)):
                    with contextlib.suppress(OSError):
                        os.kill(pid, signal.SIGKILL)
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        groups = [group for group in groups if group.exists()]
        if groups:
            time.sleep(0.02)
    return groups


def _members(group: Path) -> list[int]:
    try:
        return [pid for pid in map(int, (group / "cgroup.procs").read_text().split()) if pid not in (0, os.getpid())]
    except (OSError, ValueError):
        return []


@contextlib.contextmanager
def _flock(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def claim(directory: Path) -> None:
    """Hold the lab's directory for as long as this process lives (the descriptor is kept open on purpose)."""
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def sweep() -> None:
    """Remove what keepers left that were killed themselves: directories that nobody holds, and cgroups without a directory."""
    living = set()
    for directory in RUN.iterdir():
        if not directory.is_dir():
            continue
        fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
        except BlockingIOError:
            living.add(directory.name)
        finally:
            os.close(fd)
    v1, v2 = cgroup_mounts()
    names = {group.name for root in [*v1, *([v2] if v2 else [])] for group in root.glob(f"{PREFIX}*")}
    for name in names:
        if name.removeprefix(PREFIX).rsplit("-", 1)[0] not in living:
            remove_cgroups(name)


INIT = r"""
set -e
read -r pid _ </proc/self/stat; echo "$pid"          # the old /proc: our pid as the keeper sees it
cd "$MOUNTPOINT"
mount -t tmpfs -o "size=$ROOT_SIZE,mode=755" lab .; cd "$MOUNTPOINT"
mkdir upper work root
mount -t overlay -o "lowerdir=$LOWER,upperdir=upper,workdir=work" lab root
cd root
tar -C "$FILES" -c . | tar -x --no-overwrite-dir --numeric-owner
printf '%s\n' "$BINDS" | while read -r from to; do
    [ -n "$from" ] || continue
    mkdir -p "./$to"; mount --bind "$from" "./$to"; mount -o remount,bind,ro "./$to"
done
# /run as Debian's initramfs mounts it.
mount -t proc proc proc; mount -t sysfs sys sys; mount -t tmpfs -o mode=755,nosuid,nodev,noexec run run
mount -t tmpfs tmp tmp
mount -t tmpfs -o mode=755 dev dev; mkdir dev/pts dev/shm dev/mqueue dev/net
for n in null zero full random urandom tty kmsg fuse net/tun userfaultfd; do
    if [ -e "/dev/$n" ]; then cp -a "/dev/$n" "dev/$n"; fi
done
ln -s pts/ptmx dev/ptmx; ln -s /proc/self/fd dev/fd
for n in 0:stdin 1:stdout 2:stderr; do ln -s "/proc/self/fd/${n%:*}" "dev/${n#*:}"; done
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,gid=5 devpts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm; mount -t mqueue mqueue dev/mqueue
mount -t cgroup2 cgroup sys/fs/cgroup
mkdir sys/fs/cgroup/init; echo 1 >sys/fs/cgroup/init/cgroup.procs
printf '%s\n' "$TMPFS" | while read -r path size; do
    [ -n "$path" ] || continue
    mkdir -p "./$path"; mount -t tmpfs -o "size=$size,mode=700" tmpfs "./$path"
done
mkdir .old run/sshd run/lock; pivot_root . .old; umount -l /.old; rmdir /.old
cd /
hostname "$NAME"; ip link set lo up
/usr/sbin/sshd
echo ready
exec env --ignore-signal=CHLD sleep infinity >/dev/null   # so the kernel reaps orphans for us
"""


class Host:
    """One host: its cgroups, and the process that is its PID 1."""

    def __init__(self, lab: str, directory: Path, spec: dict[str, Any]) -> None:
        self.name = str(spec["name"])
        self.cgroup = f"{PREFIX}{lab}-{self.name}"
        self.groups: list[Path] = []
        self._spec = spec
        self._directory = directory
        self._outer: subprocess.Popen[bytes] | None = None
        self.pid = 0

    def start(self) -> None:
        self.groups = make_cgroups(self.cgroup)
        mountpoint = self._directory / f"{self.name}.root"
        mountpoint.mkdir()
        env = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "MOUNTPOINT": str(mountpoint),
            "NAME": self.name,
            "FILES": self._spec["files"],
            "LOWER": ":".join(self._spec["lowers"]),
            "ROOT_SIZE": self._spec["root_size"],
            "BINDS": "\n".join(f"{a} {b}" for a, b in self._spec["binds"]),
            "TMPFS": "\n".join(f"{a} {b}" for a, b in self._spec["tmpfs"]),
        }
        namespaces = ["--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup"]
        argv = ["unshare", *namespaces, "--fork", "--kill-child", "--propagation", "private", "sh", "-c", INIT]
        libc = ctypes.CDLL(None, use_errno=True)

        def enter() -> None:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            for number in IGNORED:  # would be inherited by everything in the host
                signal.signal(number, signal.SIG_DFL)
            for group in self.groups:
                (group / "cgroup.procs").write_text(str(os.getpid()))

        with open(self._directory / f"{self.name}.log", "wb") as log:
            self._outer = subprocess.Popen(
                argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, preexec_fn=enter, start_new_session=True
            )

    def wait_ready(self) -> None:
        assert self._outer is not None and self._outer.stdout is not None
        first = self._outer.stdout.readline().strip()
        if not first or self._outer.stdout.readline().strip() != b"ready":
            log = (self._directory / f"{self.name}.log").read_text(errors="replace")
            raise RuntimeError(f"host {self.name} did not come up:\n{log}")
        self.pid = int(first)
        _, v2 = cgroup_mounts()
        if v2 is not None:  # cgroup2: no processes in inner nodes, or no controllers below
            group = v2 / self.cgroup
            poke(group / "init/cgroup.procs", str(self._outer.pid))
            enable_controllers(group)

    def entry(self) -> list[str]:
        """The cgroup.procs files that a process writes itself into before it enters the host."""
        _, v2 = cgroup_mounts()
        return [str(group / ("init/cgroup.procs" if group.parent == v2 else "cgroup.procs")) for group in self.groups]

    def stop(self) -> list[Path]:
        if self.pid:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)  # PID 1 of the host: the kernel ends everything in it
        if self._outer is not None:
            if not self.pid:
                self._outer.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._outer.wait(CLEAN_TIMEOUT_S)
        return remove_cgroups(self.cgroup)


def ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, timeout=UP_TIMEOUT_S)


def link(hosts: list[Host], specs: list[dict[str, Any]]) -> None:
    """Plug every host's eth0 into the switch (a bridge in our network namespace); the port is named after the host."""
    ip("link", "add", "name", "switch", "type", "bridge")
    ip("link", "set", "dev", "switch", "up")
    for host, spec in zip(hosts, specs, strict=True):
        ip("link", "add", "name", host.name, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid))
        ip("link", "set", "dev", host.name, "master", "switch", "up")
        inside = ["nsenter", "-t", str(host.pid), "-n", "ip", "-batch", "-"]
        batch = f"addr add {spec['address']}/24 dev eth0\nlink set eth0 up\n"
        subprocess.run(inside, input=batch.encode(), check=True, capture_output=True, timeout=UP_TIMEOUT_S)


def _too_late(*_: object) -> None:
    raise TimeoutError(f"not up after {UP_TIMEOUT_S} s")


def main() -> int:
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)  # our end is the end of file
    spec = json.loads(Path(sys.argv[1]).read_text())
    lab, directory = str(spec["id"]), Path(sys.argv[1]).parent
    claim(directory)  # inherited by no one; lab.py holds RUN's lock until we answer
    hosts = [Host(lab, directory, one) for one in spec["hosts"]]
    answer: dict[str, Any]
    status = 0
    try:
        try:
            signal.signal(signal.SIGALRM, _too_late)
            signal.alarm(UP_TIMEOUT_S)
            for host in hosts:
                host.start()
            for host in hosts:
                host.wait_ready()
            link(hosts, spec["hosts"])
            signal.alarm(0)
            answer = {"hosts": {host.name: {"pid": host.pid, "entry": host.entry()} for host in hosts}}
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            detail = getattr(error, "stderr", None) or b""
            answer, status = {"error": f"{error} {detail.decode(errors='replace')}".strip()}, 1
        # A dead owner (BrokenPipeError) is an end of file that comes early.
        with contextlib.suppress(OSError):
            os.write(1, json.dumps(answer).encode() + b"\n")
        while status == 0 and os.read(0, 4096):
            pass
    finally:
        left = [group for host in hosts for group in host.stop()]
        for group in left:
            print(f"cannot remove {group}", file=sys.stderr)
        shutil.rmtree(directory, ignore_errors=True)
    return 1 if left else status


if __name__ == "__main__":
    sys.exit(main())
