"""A host of the lab: run programs in it, read and write its files."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, TypeAlias

from .workloads import IMAGE, IMAGE_ARCHIVE

Argument: TypeAlias = str | os.PathLike[str]
_ENTER = 'while [ "$1" != -- ]; do echo $$ >"$1" 2>/dev/null; shift; done; shift; exec "$@"'
_ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8"}


def _texts(argv: Sequence[Argument]) -> list[str]:
    return [os.fspath(argument) for argument in argv]


@dataclass(frozen=True, slots=True)
class HostResult:
    """A finished program."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str


class CommandError(AssertionError):
    """A program ended with another status than 0, or took too long; both its outputs are in the message."""

    def __init__(self, host: str, result: HostResult, reason: str) -> None:
        super().__init__(f"on {host}: {shlex.join(result.argv)}: {reason}\n--- stdout\n{result.stdout}\n--- stderr\n{result.stderr}")
        self.result = result


class HostProcess(subprocess.Popen[bytes]):
    """A running program in a host. Signals go to the program itself; `returncode` is its own."""

    @property
    def inner_pid(self) -> int | None:
        """The program's pid as seen from outside the host; None before it has started and after its end."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def send_signal(self, sig: int) -> None:
        """Signal the program (nsenter, which waits for it, then ends the same way)."""
        if self.poll() is None:
            inner = self.inner_pid
            with contextlib.suppress(ProcessLookupError):
                os.kill(inner if inner is not None else self.pid, sig)

    def kill_session(self) -> None:
        """SIGKILL the program and what it started in its process group."""
        inner = self.inner_pid
        if inner is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(inner, signal.SIGKILL)
        self.kill()


@dataclass(slots=True)
class Host:
    """One host. `pid` is its PID 1 and `root` its root directory, both as seen from outside."""

    name: str
    address: str
    pid: int
    entry: list[str]
    _image_loaded: bool = field(default=False, init=False)

    @property
    def root(self) -> Path:
        """The host's root from outside. Absolute symlinks below it lead astray: read_file and write_file don't mind them."""
        return Path(f"/proc/{self.pid}/root")

    def command(self, argv: Sequence[Argument], *, cwd: str = "/root", session: bool = True) -> list[str]:
        """The machine's command line that runs `argv` in the host: joins its cgroups, then its namespaces."""
        enter = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w"]
        inside = [*(["setsid", "-w"] if session else []), "env", "-C", cwd, "--", *_texts(argv)]
        return ["sh", "-c", _ENTER, "enter", *self.entry, "--", *enter, *inside]

    def popen(
        self,
        argv: Sequence[Argument],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str = "/root",
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        stdout: int | IO[Any] | None = subprocess.PIPE,
        stderr: int | IO[Any] | None = subprocess.PIPE,
    ) -> HostProcess:
        """Start a program and return at once. Its environment is a fresh one plus `env`; standard outputs are pipes of bytes."""
        full = {**_ENV, "TERM": os.environ.get("TERM", "dumb"), **(env or {})}
        return HostProcess(self.command(argv, cwd=cwd), env=full, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)

    def run(
        self,
        argv: Sequence[Argument],
        *,
        input: str | bytes | None = None,
        timeout_s: float = 60.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: str = "/root",
    ) -> HostResult:
        """Run a program to its end.

        Raises:
            CommandError: over time, or (with `check`) a status other than 0.
        """
        data = input.encode() if isinstance(input, str) else input
        process = self.popen(argv, env=env, cwd=cwd, stdin=subprocess.DEVNULL if data is None else subprocess.PIPE)
        args = tuple(_texts(argv))
        late = False
        try:
            out, err = process.communicate(data, timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            late = True
            process.kill_session()
            out, err = error.stdout or b"", error.stderr or b""
            # A daemon of the program may hold the pipes open: take what is there and don't wait for it.
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, err = process.communicate(timeout=2)
        except BaseException:
            process.kill_session()
            process.wait()
            raise
        code = process.returncode if process.returncode is not None else -signal.SIGKILL
        result = HostResult(args, code, out.decode(errors="replace"), err.decode(errors="replace"))
        if late:
            raise CommandError(self.name, result, f"no end after {timeout_s:g} s")
        if check and result.returncode:
            raise CommandError(self.name, result, f"status {result.returncode}")
        return result

    def read_file(self, path: str) -> bytes:
        """A file's contents.

        Raises:
            CommandError: it cannot be read.
        """
        with self.popen(["cat", "--", path]) as process:
            out, err = process.communicate(timeout=60)
        if process.returncode:
            raise CommandError(self.name, HostResult(("cat", path), process.returncode, "", err.decode()), f"status {process.returncode}")
        return out

    def write_file(self, path: str, data: str | bytes, *, mode: int = 0o644) -> None:
        """Write a file, with its directories."""
        script = 'mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"'
        self.run(["sh", "-c", script, "sh", path, f"{mode:o}"], input=data)

    def exists(self, path: str) -> bool:
        return self.run(["test", "-e", path], check=False).returncode == 0

    def prune_v1_cgroups(self) -> None:
        """Remove the cgroups that crun's restores leave in the machine's v1 hierarchies, which a host with cgroup2 alone does not have.

        CRIU dumps all of them with every container and makes them again below the next one: they would double at each restore.
        """
        for entry in self.entry:
            group = Path(entry).parent
            if not (group / "cgroup.controllers").exists():
                for directory, _, _ in os.walk(group, topdown=False):
                    if Path(directory) != group:
                        with contextlib.suppress(OSError):
                            os.rmdir(directory)

    def load_image(self) -> str:
        """Load the workloads' container image (once), and give its name."""
        if not self._image_loaded:
            self.run(["podman", "load", "-q", "-i", IMAGE_ARCHIVE])
            self._image_loaded = True
        return IMAGE

    def shell(self, argv: Sequence[str] = ("bash", "-l")) -> int:
        """Run a program on our own terminal, with a pseudo-terminal of the host's own; its status."""
        full = {**_ENV, "TERM": os.environ.get("TERM", "dumb")}
        wrapped = ["script", "-qec", shlex.join(argv), "/dev/null"]
        return subprocess.run(self.command(wrapped, session=False), env=full).returncode
