"""The lab as a context manager: hosts up, linked by a switch, ssh between them; everything gone at the end."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from . import keeper, workloads
from .cache import LabUnavailable, cache_directory, locked
from .host import Host
from .rootfs import rootfs
from .wheel import wheel_layer

DOWN_TIMEOUT_S = 60.0
NEEDED = {  # program -> Debian package
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "pivot_root": "util-linux",
    "script": "bsdutils",
    "mount": "mount",
    "ip": "iproute2",
    "tc": "iproute2",
    "ssh-keygen": "openssh-client",
    "tar": "tar",
    "debootstrap": "debootstrap",
    "gcc": "gcc",
}
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PYTHON = "python3.13"  # trixie's


class Lab:
    """Hosts `a` (10.77.0.1), `b` (10.77.0.2), … as namespaces over one cached root.

    Args:
        wheel: ckpt's wheel, installed on every host (None: no ckpt there).
        source: a checkout whose `ckpt` package the hosts use in place, instead of a wheel.
        hosts: their names; addresses count up from 10.77.0.1.
        runtime: podman's default OCI runtime.
        store_mib: size of /var/lib/ckpt (a file system of its own, so that a test can fill it).
        containers_mib: size of /var/lib/containers.
        root_mib: size of everything else that is written.
    """

    def __init__(
        self,
        *,
        wheel: Path | None = None,
        source: Path | None = None,
        hosts: Sequence[str] = ("a", "b"),
        runtime: Literal["crun", "runc"] = "crun",
        store_mib: int = 2048,
        containers_mib: int = 4096,
        root_mib: int = 4096,
    ) -> None:
        self.id = f"{os.getpid()}-{secrets.token_hex(3)}"
        self._names = tuple(hosts)
        self._addresses = {name: f"10.77.0.{number}" for number, name in enumerate(hosts, 1)}
        self._wheel, self._source, self._runtime = wheel, source, runtime
        self._sizes = {"store": store_mib, "containers": containers_mib, "root": root_mib}
        self._directory = keeper.RUN / self.id
        self._keeper: subprocess.Popen[bytes] | None = None
        self._locks = contextlib.ExitStack()
        self.hosts: dict[str, Host] = {}

    @property
    def a(self) -> Host:
        return self.hosts["a"]

    @property
    def b(self) -> Host:
        return self.hosts["b"]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts.values())

    def __enter__(self) -> Lab:
        prepare()
        lowers = [str(workloads.layer()), str(rootfs())]
        if self._wheel is not None:
            layer = wheel_layer(self._wheel)
            self._locks.enter_context(locked(cache_directory() / f"{layer.name}.lock", shared=True))
            lowers.insert(0, str(layer))
        # CRIU's lazy server needs pipes of 4 MiB. This sysctl is the machine's: there is none in a namespace.
        with contextlib.suppress(OSError, ValueError):
            knob = Path("/proc/sys/fs/pipe-max-size")
            if int(knob.read_text()) < 64 << 20:
                knob.write_text(str(64 << 20))
        try:
            self._start(lowers)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _start(self, lowers: list[str]) -> None:
        keeper.RUN.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(keeper.RUN / "lock"):
            keeper.sweep()
            self._directory.mkdir(mode=0o700)
            spec = {"id": self.id, "hosts": self._specs(lowers)}
            (self._directory / "spec.json").write_text(json.dumps(spec))
            # In a session of its own: Ctrl-C at the terminal is the owner's business.
            self._keeper = subprocess.Popen(
                ["unshare", "--net", sys.executable, "-I", "-S", keeper.__file__, str(self._directory / "spec.json")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
            assert self._keeper.stdout is not None
            line = self._keeper.stdout.readline()
        answer = json.loads(line or '{"error": "the keeper died"}')
        if "error" in answer:
            raise LabUnavailable(f"the lab's hosts did not come up: {answer['error']}")
        for name, facts in answer["hosts"].items():
            self.hosts[name] = Host(name, self._addresses[name], facts["pid"], facts["entry"])

    def close(self) -> None:
        """Take the hosts down (also done by the keeper alone when this process dies)."""
        if self._keeper is not None:
            assert self._keeper.stdin is not None
            with contextlib.suppress(OSError):
                self._keeper.stdin.close()
            self._keeper.stdin = None
            _, complaint = self._keeper.communicate(timeout=DOWN_TIMEOUT_S)
            self._keeper = None
            self.hosts.clear()
            if complaint:
                print(complaint.decode(errors="replace"), file=sys.stderr)
        elif self._directory.exists():
            shutil.rmtree(self._directory, ignore_errors=True)
        self._locks.close()

    # -- the link -------------------------------------------------------------------------------------------------------------

    def _switch(self, *argv: str) -> bytes:
        assert self._keeper is not None
        return subprocess.run(["nsenter", "-t", str(self._keeper.pid), "-n", *argv], check=True, capture_output=True, timeout=10).stdout

    def cut_link(self, host: str = "b") -> None:
        """Pull the host's cable: nothing arrives, nobody is told (no reset, no unreachable)."""
        self._switch("ip", "link", "set", "dev", host, "down")

    def restore_link(self, host: str = "b") -> None:
        """Plug it in again."""
        self._switch("ip", "link", "set", "dev", host, "up")

    def limit_rate(self, mbit: float | None, *hosts: str) -> None:
        """Limit what each host (all of them by default) receives to `mbit` Mbit/s; None lifts the limit."""
        for host in hosts or self._names:
            if mbit is None:
                with contextlib.suppress(subprocess.CalledProcessError):  # there was none
                    self._switch("tc", "qdisc", "del", "dev", host, "root")
            else:
                rate = ["rate", f"{int(mbit * 1e6)}bit", "burst", "256kb", "latency", "50ms"]
                self._switch("tc", "qdisc", "replace", "dev", host, "root", "tbf", *rate)

    def received_bytes(self, host: str = "b") -> int:
        """All bytes that the switch has sent to the host so far, headers included."""
        return int(json.loads(self._switch("ip", "-json", "-stats", "link", "show", "dev", host))[0]["stats64"]["tx"]["bytes"])

    # -- what the hosts are made of --------------------------------------------------------------------------------------------

    def _specs(self, lowers: list[str]) -> list[dict[str, object]]:
        keys = self._directory / "keys"
        keys.mkdir()
        for name in ("user", *self._names):
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"{name}@lab", "-f", str(keys / name)]
            subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, timeout=10)
        binds = []
        if self._source is not None:
            binds = [[str(self._source.resolve() / "ckpt"), f"usr/local/lib/{PYTHON}/dist-packages/ckpt"]]
        tmpfs = [["var/lib/containers", f"{self._sizes['containers']}m"], ["var/lib/ckpt", f"{self._sizes['store']}m"]]
        specs: list[dict[str, object]] = []
        for name in self._names:
            files = self._directory / f"{name}.files"
            self._write_files(files, name, keys)
            specs.append(
                {
                    "name": name,
                    "address": self._addresses[name],
                    "lowers": lowers,
                    "files": str(files),
                    "binds": binds,
                    "tmpfs": tmpfs,
                    "root_size": f"{self._sizes['root']}m",
                }
            )
        return specs

    def _write_files(self, root: Path, name: str, keys: Path) -> None:
        others = "".join(f"{address} {other}\n" for other, address in self._addresses.items())
        public = {other: " ".join((keys / f"{other}.pub").read_text().split()[:2]) for other in self._names}
        known = "".join(f"{other},{address} {public[other]}\n" for other, address in self._addresses.items())
        containers = (
            "[containers]\n"
            "pids_limit = 0\n"  # a host sees cgroup2 only, which has no pids controller where v1 holds it
            'log_driver = "k8s-file"\n'  # no journald
            "[engine]\n"
            f'runtime = "{self._runtime}"\n'
            'cgroup_manager = "cgroupfs"\n'
            'events_logger = "file"\n'
        )
        files = {
            "etc/hostname": (f"{name}\n", 0o644),
            "etc/hosts": (f"127.0.0.1 localhost\n{others}", 0o644),
            "etc/resolv.conf": ("# no name servers: the lab has no outside\n", 0o644),
            "etc/containers/containers.conf": (containers, 0o644),
            "etc/ssh/sshd_config.d/lab.conf": ("UsePAM no\nPrintMotd no\nMaxStartups 100\nMaxSessions 100\n", 0o644),
            "etc/ssh/ssh_host_ed25519_key": ((keys / name).read_text(), 0o600),
            "etc/ssh/ssh_host_ed25519_key.pub": ((keys / f"{name}.pub").read_text(), 0o644),
            "root/.ssh/id_ed25519": ((keys / "user").read_text(), 0o600),
            "root/.ssh/id_ed25519.pub": ((keys / "user.pub").read_text(), 0o644),
            "root/.ssh/authorized_keys": ((keys / "user.pub").read_text(), 0o600),
            "root/.ssh/known_hosts": (known, 0o600),
            "root/.ssh/config": ("Host *\n StrictHostKeyChecking yes\n BatchMode yes\n ConnectTimeout 10\n", 0o600),
        }
        if self._source is not None:
            launcher = "#!/usr/bin/python3\nimport sys\nfrom ckpt.cli.main import main\nsys.exit(main())\n"
            files["usr/local/bin/ckpt"] = (launcher, 0o755)
        root.mkdir(mode=0o755)
        for path, (text, mode) in files.items():
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
            target.chmod(mode)


def missing_programs() -> list[str]:
    return [program for program in NEEDED if shutil.which(program, path=PATH) is None]


def install_missing() -> None:
    """Install the programs that the lab needs and the machine lacks (Debian, root; nothing happens elsewhere)."""
    packages = sorted({NEEDED[program] for program in missing_programs()})
    if "gcc" in packages:
        packages.append("libc6-dev")
    if not packages or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return
    print(f"installing {', '.join(packages)}", file=sys.stderr)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for argv in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", *packages]):
        subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=900)


def check_prerequisites() -> None:
    """Raises LabUnavailable when this machine cannot have a lab."""
    if os.geteuid() != 0:
        raise LabUnavailable("the lab needs root")
    if missing := missing_programs():
        packages = sorted({NEEDED[program] for program in missing})
        raise LabUnavailable(f"missing programs: {', '.join(missing)} (apt-get install {' '.join(packages)})")
    namespaces = ["--mount", "--pid", "--fork", "--uts", "--ipc", "--net", "--cgroup"]
    done = subprocess.run(["unshare", *namespaces, "mount", "-t", "tmpfs", "lab", "/mnt"], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise LabUnavailable(f"no permission to make namespaces and mounts: {done.stderr.strip()}")


def prepare() -> None:
    """Build what the hosts are made of (once; cached outside the checkout).

    Raises:
        LabUnavailable: not on this machine; the message says why.
    """
    check_prerequisites()
    workloads.layer()
