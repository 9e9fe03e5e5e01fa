"""The one process runner: clean environment, time limit, output captured, failures as one exception."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

DEFAULT_TIMEOUT_S = 60.0
_AFTER_KILL_S = 0.5
_KEPT = ("PATH", "HOME", "TERM", "TMPDIR", "SSH_AUTH_SOCK", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "CONTAINERS_CONF", "CONTAINERS_STORAGE_CONF")

PIPE = subprocess.PIPE
DEVNULL = subprocess.DEVNULL
Process = subprocess.Popen[bytes]


@dataclass(frozen=True, slots=True)
class Result:
    """A finished process: `returncode` is negative for a signal, as subprocess has it."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes

    @property
    def ok(self) -> bool:
        return self.returncode == 0

    @property
    def text(self) -> str:
        return self.stdout.decode(errors="replace")

    @property
    def error_text(self) -> str:
        return self.stderr.decode(errors="replace").strip()


class CommandFailed(Exception):
    """A process that ended badly or ran over its time. Rooms above turn it into their own error."""

    def __init__(self, result: Result, reason: str) -> None:
        super().__init__(f"{shlex.join(result.argv)}: {reason}")
        self.result = result
        self.reason = reason


def which(program: str) -> str | None:
    """Absolute path of a program, also looked for in the sbin directories that a user's PATH may lack."""
    return shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment that children get: what is kept of ours, C.UTF-8 messages, and `extra`."""
    env = {key: os.environ[key] for key in _KEPT if key in os.environ}
    env.setdefault("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    env["LC_ALL"] = "C.UTF-8"
    env.update(extra or {})
    return env


def spawn(
    argv: Sequence[str | os.PathLike[str]],
    *,
    stdin: int | IO[bytes] | None = DEVNULL,
    stdout: int | IO[bytes] | None = DEVNULL,
    stderr: int | IO[bytes] | None = DEVNULL,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    pass_fds: Sequence[int] = (),
    new_session: bool = False,
) -> Process:
    """Start a process and return at once; the caller waits for it or ends it.

    Raises:
        CommandFailed: the program is not there or cannot be executed.
    """
    args = [os.fspath(a) for a in argv]
    options: dict[str, Any] = {"stdin": stdin, "stdout": stdout, "stderr": stderr, "cwd": cwd, "pass_fds": tuple(pass_fds)}
    try:
        return subprocess.Popen(args, env=environment(env), start_new_session=new_session, **options)
    except OSError as error:
        raise CommandFailed(Result(tuple(args), 127, b"", str(error).encode()), error.strerror or str(error)) from error


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    input: bytes | None = None,
    stdin: int | IO[bytes] | None = None,
    stdout: int | IO[bytes] | None = PIPE,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    check: bool = True,
) -> Result:
    """Run a process to its end.

    Args:
        input: bytes for its standard input (empty without it).
        timeout_s: it is killed after this many seconds.
        check: raise when it exits non-zero.

    Raises:
        CommandFailed: not startable, over time, or (with `check`) a non-zero exit.
    """
    source = PIPE if input is not None else (stdin if stdin is not None else DEVNULL)
    process = spawn(argv, stdin=source, stdout=stdout, stderr=PIPE, env=env, cwd=cwd)
    args = tuple(os.fspath(a) for a in argv)
    try:
        out, err = process.communicate(input, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        try:
            out, err = process.communicate(timeout=_AFTER_KILL_S)
        except subprocess.TimeoutExpired as held:  # by a child of its own, which has our pipes
            out, err = held.stdout or b"", held.stderr or b""
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            process.wait()
        raise CommandFailed(Result(args, process.returncode, out or b"", err or b""), f"no answer in {timeout_s:g} s, ended") from None
    except BaseException:
        process.kill()
        process.wait()
        raise
    result = Result(args, process.returncode, out or b"", err or b"")
    if check and not result.ok:
        raise CommandFailed(result, result.error_text.rsplit("\n", 1)[-1] or f"exit status {result.returncode}")
    return result
