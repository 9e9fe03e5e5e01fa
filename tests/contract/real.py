"""The real engines, on a lab host that all their tests share. Each test has its own store, and a host without containers."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from ckpt.host.run import Result
from tests.contract.subject import DRIVER, LIMIT_S, Subject, Unsupported, parse, wait_until
from tests.lab.harness import Host, Lab

TOP = Path(__file__).resolve().parents[2]
REMOTE_DRIVER = "/opt/contract/tests/contract/driver.py"


class _OnHost:
    """What the real subjects share."""

    killable = True
    engine = ""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.scratch = f"/var/lib/ckpt/contract-{secrets.token_hex(4)}"
        host.run(["mkdir", "-p", self.scratch])
        if not host.exists(REMOTE_DRIVER):
            host.write_file(REMOTE_DRIVER, DRIVER.read_bytes())

    def drive(self, verb: str, what: str = "", *options: str, fault: str = "") -> dict[str, Any]:
        argv = ["python3", REMOTE_DRIVER, "real", "-", verb, what, "--store", self.scratch, *options]
        done = self.host.run(argv, env={"CKPT_FAULT": fault} if fault else {}, check=False, timeout_s=LIMIT_S)
        return parse(Result(done.argv, done.returncode, done.stdout.encode(), done.stderr.encode()))

    def last_tick(self, path: str) -> int:
        """The last whole line of a tick file."""
        lines = self.host.run(["tail", "-n", "2", path], check=False).stdout.rpartition("\n")[0].splitlines()
        return int(lines[-1].split()[0]) if lines else -1


class PodmanSubject(_OnHost):
    """podman with one OCI runtime; ticks go to a file of the host, so that they can be read of an ended container."""

    engine = "podman"

    def __init__(self, host: Host, runtime: str) -> None:
        super().__init__(host)
        self.runtime = runtime

    def start_counter(self, name: str, *, broken: str = "") -> str:
        if broken:
            raise Unsupported(f"podman cannot play a container whose {broken} is broken")
        where = f"{self.scratch}/ticks-{name}"
        self.host.run(["mkdir", "-p", where])
        run = ["podman", "--runtime", self.runtime, "run", "-d", "--name", name, "-v", f"{where}:/ticks", self.host.load_image()]
        self.host.run([*run, "counter", "/ticks/ticks"])
        assert wait_until(lambda: self.ticks(name) > 0)
        return name

    def ticks(self, target: str) -> int:
        return self.last_tick(f"{self.scratch}/ticks-{target}/ticks")

    def close(self) -> None:
        self.host.run(["podman", "rm", "-a", "-f", "-t", "0"], check=False)
        self.host.prune_v1_cgroups()


class OciSubject(_OnHost):
    """runc or crun used directly: a bundle made by hand; ticks go to a file of its root directory."""

    def __init__(self, host: Host, runtime: str) -> None:
        super().__init__(host)
        self.engine = runtime
        self.names: list[str] = []

    def start_counter(self, name: str, *, broken: str = "") -> str:
        if broken:
            raise Unsupported(f"{self.engine} cannot play a container whose {broken} is broken")
        self.names.append(name)
        script = (
            'set -e; mkdir -p "$1/rootfs/bin" "$1/rootfs/proc" "$1/rootfs/dev" "$1/rootfs/sys" "$1/rootfs/data"; cd "$1"\n'
            'cp /opt/lab/bin/counter rootfs/bin/; "$2" spec\n'
            "python3 -c 'import json; s = json.load(open(\"config.json\")); "
            's["process"].update(terminal=False, args=["/bin/counter", "/data/ticks"]); '
            's["root"]["readonly"] = False; s["linux"].pop("resources", None); json.dump(s, open("config.json", "w"))\'\n'
            '"$2" run --detach --bundle "$1" "$3" </dev/null >/dev/null 2>&1\n'
        )
        self.host.run(["sh", "-c", script, "sh", self._bundle(name), self.engine, name])
        assert wait_until(lambda: self.ticks(name) > 0)
        return f"{self.engine}:{name}"

    def _bundle(self, name: str) -> str:
        return f"{self.scratch}/bundle-{name}"

    def ticks(self, target: str) -> int:
        return self.last_tick(f"{self._bundle(target.rpartition(':')[2])}/rootfs/data/ticks")

    def close(self) -> None:
        for name in self.names:
            self.host.run([self.engine, "delete", "--force", name], check=False)
        self.host.prune_v1_cgroups()


class ProcessSubject(_OnHost):
    """A process tree of the host."""

    engine = "process"

    def start_counter(self, name: str, *, broken: str = "") -> str:
        if broken:
            raise Unsupported(f"a process whose {broken} is broken is not played")
        out = f"{self.scratch}/ticks"
        start = 'setsid /opt/lab/bin/counter "$1" </dev/null >/dev/null 2>&1 & echo $!'
        self.pid = int(self.host.run(["sh", "-c", start, "sh", out]).stdout)
        assert wait_until(lambda: self.ticks("") > 0)
        return f"pid:{self.pid}"

    def ticks(self, target: str) -> int:
        return self.last_tick(f"{self.scratch}/ticks")

    def close(self) -> None:
        # Only the counter of this test, whatever has its pid by now.
        ours = 'tr "\\0" " " <"/proc/$1/cmdline" | grep -qF "$2" && kill -9 "$1"'
        self.host.run(["sh", "-c", ours, "sh", str(getattr(self, "pid", 0)), self.scratch], check=False)
        self.host.prune_v1_cgroups()


@contextmanager
def real_host() -> Iterator[Host]:
    """A lab host that uses the checkout's ckpt."""
    with Lab(source=TOP, hosts=("a",)) as lab:
        yield lab.a


class Hosts:
    """The one host of a session, made when the first test asks for it."""

    @cached_property
    def _made(self) -> tuple[Any, Host]:
        manager = real_host()
        return manager, manager.__enter__()

    def get(self) -> Host:
        return self._made[1]

    def close(self) -> None:
        if "_made" in self.__dict__:
            self._made[0].__exit__(None, None, None)


def subject(name: str, host: Host) -> Subject:
    """The subject of a real engine: `podman-crun`, `podman-runc`, `runc`, `crun`, `process`."""
    engine, _, runtime = name.partition("-")
    if engine == "podman":
        return PodmanSubject(host, runtime)
    if engine in ("runc", "crun"):
        return OciSubject(host, engine)
    return ProcessSubject(host)
