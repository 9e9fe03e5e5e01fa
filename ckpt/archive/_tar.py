"""The two C-speed engines under `rootfs`: GNU tar writes, a child process locked into the root reads."""

from __future__ import annotations

import errno
import functools
import importlib.resources
import io
import json
import os
import re
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Final

from ckpt.archive.layout import CHUNK_BYTES
from ckpt.errors import ArchiveInvalid, CkptError, FeatureMissing, NoSpace, RestoreFailed
from ckpt.host import run

_XATTRS: Final = ("user.*", "security.capability", "system.posix_acl_*")
_NO_SPACE_TEXT: Final = ("No space left on device", "Disk quota exceeded")
_MAX_MESSAGES: Final = 64 << 10
_MAX_DELETED: Final = 64 << 20


@functools.cache
def _gnu_tar() -> str:
    program = run.which("tar")
    if program is None or "GNU tar" not in run.run([program, "--version"], check=False).text:
        raise FeatureMissing("GNU tar is not installed", hint="install the package tar")
    return program


def create(root: bytes, names: Iterable[bytes], out: Path | BinaryIO, *, timeout_s: float) -> None:
    """Write `names` (relative to `root`, nothing is recursed into) as a POSIX tar that keeps sparse files, xattrs and hard links.

    Raises:
        NoSpace: `out` is full.
        CkptError: tar failed or took longer than `timeout_s`.
        OSError: what producing `names` raised.
    """
    argv = [
        _gnu_tar(), "--create", "--file=-", "--format=posix", "--sparse", "--hole-detection=seek", "--numeric-owner",
        # No access times and no process id in the headers: the same tree gives the same bytes.
        "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
        "--xattrs", *(f"--xattrs-include={pattern}" for pattern in _XATTRS), "--xattrs-exclude=user.overlay.*",
        "--no-recursion", "--null", "--verbatim-files-from", "--blocking-factor=128", f"--directory={os.fsdecode(root)}", "--files-from=-",
    ]  # fmt: skip
    if isinstance(out, Path):
        fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with io.FileIO(fd, "w") as file:
            _run_tar(argv, names, file, timeout_s)
        return
    _run_tar(argv, names, out, timeout_s)


def _run_tar(argv: list[str], names: Iterable[bytes], out: BinaryIO | io.FileIO, timeout_s: float) -> None:
    direct = _has_descriptor(out)
    if direct:
        out.flush()
    process = run.spawn(argv, stdin=run.PIPE, stdout=out if direct else run.PIPE, stderr=run.PIPE)
    assert process.stdin is not None and process.stderr is not None
    messages = io.BytesIO()
    errors: list[BaseException] = []
    carriers = [threading.Thread(target=_keep, args=(process.stderr, messages), daemon=True)]
    if not direct:
        carriers.append(threading.Thread(target=_carry, args=(process, out, errors), daemon=True))
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        process.kill()

    alarm = threading.Timer(timeout_s, expire)
    alarm.daemon = True
    for thread in (*carriers, alarm):
        thread.start()
    try:
        with suppress(BrokenPipeError):
            for name in names:
                process.stdin.write(name + b"\0")
            process.stdin.close()
        process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        alarm.cancel()
        with suppress(BrokenPipeError):
            process.stdin.close()
        for thread in carriers:
            thread.join()
    text = messages.getvalue().decode(errors="replace").strip()
    if errors:
        if isinstance(errors[0], OSError) and errors[0].errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace("no space left for the files of the container") from errors[0]
        raise errors[0]
    if expired.is_set():
        raise CkptError(f"tar did not end within {timeout_s:g} s")
    if any(sign in text for sign in _NO_SPACE_TEXT):
        raise NoSpace("no space left for the files of the container")
    # 1: a file changed while it was read. A container is frozen, but a volume may have other users.
    if process.returncode not in (0, 1):
        raise CkptError(f"tar failed: {text.splitlines()[0] if text else f'exit status {process.returncode}'}")


def _has_descriptor(out: BinaryIO | io.FileIO) -> bool:
    try:
        out.fileno()
    except (OSError, AttributeError):
        return False
    return True


def _keep(source: io.IOBase | object, into: io.BytesIO) -> None:
    while data := source.read(65536):  # type: ignore[union-attr]
        if into.tell() < _MAX_MESSAGES:
            into.write(data)


def _carry(process: run.Process, out: BinaryIO | io.FileIO, errors: list[BaseException]) -> None:
    assert process.stdout is not None
    try:
        while data := process.stdout.read(CHUNK_BYTES):
            out.write(data)
    except BaseException as error:  # it is raised again by the thread that asked
        errors.append(error)
        process.kill()


def apply(diff: Path | None, deleted: Path | None, root: Path, *, timeout_s: float = 3600.0) -> list[str]:
    """Bring a captured difference onto a mounted root: deletions, then the tar. Nothing outside of `root` can be touched.

    A child process changes its root to `root` before it looks at anything in the tar, so that links in the tar or in the container
    image lead nowhere else. Existing files are replaced, directories merged; owners, modes, times, xattrs, holes, hard links and
    device nodes are as in the tar.

    Args:
        diff: `rootfs-diff.tar`, plain; None or not there: nothing to add.
        deleted: `deleted.files`; None or not there: nothing to delete.

    Returns:
        Warnings: extended attributes that the file system of `root` cannot hold.

    Raises:
        ArchiveInvalid: the tar or the list is damaged or makes no sense.
        NoSpace: `root` is full.
        RestoreFailed: anything else that the child reports.
    """
    return _extract(diff, deleted, root, empty=False, timeout_s=timeout_s)


def apply_tree(tar: Path, directory: Path, *, empty: bool = False, timeout_s: float = 3600.0) -> list[str]:
    """`apply` for a tree written by `capture_tree` (or a volume's tar by podman).

    Args:
        empty: remove everything in `directory` first (a new volume may have been filled from the container image).
    """
    return _extract(tar, None, directory, empty=empty, timeout_s=timeout_s)


def _extract(tar: Path | None, deleted: Path | None, root: Path, *, empty: bool, timeout_s: float) -> list[str]:
    files: list[io.BufferedReader] = []
    try:
        for path in (tar, deleted):
            found = path is not None and os.path.lexists(path)
            files.append(_open_plain(path) if found and path is not None else open(os.devnull, "rb"))  # noqa: SIM115
        if os.fstat(files[1].fileno()).st_size > _MAX_DELETED:
            raise ArchiveInvalid("the list of deleted files is too large")
        options = {"root": str(root.absolute()), "empty": empty, "has_tar": files[0].name != os.devnull, "deleted_fd": files[1].fileno()}
        source = importlib.resources.files("ckpt.archive").joinpath("_apply.py").read_text(encoding="utf-8")
        process = run.spawn(
            [sys.executable, "-I", "-S", "-c", source, json.dumps(options)],
            stdin=files[0], stdout=run.PIPE, stderr=run.PIPE, pass_fds=[files[1].fileno()],
        )  # fmt: skip
    except run.CommandFailed as error:
        raise RestoreFailed(f"cannot start the extraction: {error.reason}") from error
    finally:
        for file in files:
            file.close()
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except BaseException as error:
        process.kill()
        process.communicate()
        if type(error).__name__ == "TimeoutExpired":
            raise RestoreFailed(f"the files of the container were not in place within {timeout_s:g} s") from None
        raise
    return report(stdout, stderr, process.returncode)


def _open_plain(path: Path) -> io.BufferedReader:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    return open(fd, "rb")


def report(stdout: bytes, stderr: bytes, code: int) -> list[str]:
    """The warnings in a child's answer; raises what it means otherwise (see `apply`)."""
    try:
        told = json.loads(stdout)
        kind, text, warnings = told["kind"], _printable(told["text"]), [_printable(line) for line in told["warnings"]]
    except (ValueError, KeyError, TypeError):
        text = _printable(stderr.decode(errors="replace").strip().rpartition("\n")[2])
        raise RestoreFailed(f"the extraction of the container's files broke off: {text or f'exit status {code}'}") from None
    if kind == "invalid":
        raise ArchiveInvalid(f"the container's files cannot be restored: {text}")
    if kind == "space":
        raise NoSpace(f"no space left for the container's files: {text}")
    if kind != "ok" or code:
        raise RestoreFailed(f"the container's files cannot be restored: {text or f'exit status {code}'}")
    return warnings


def _printable(text: object) -> str:
    """Names in messages come from the archive: no control characters reach a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "?", str(text))[:500]
