"""userfaultfd (userfaultfd(2)) of other processes: copies of their descriptors, and whose memory such a descriptor serves."""

from __future__ import annotations

import ctypes
import os
from typing import Final

from ckpt.host.procread import PROC

KIND: Final = "anon_inode:[userfaultfd]"
_PIDFD_GETFD: Final = 438
"""The same number on every architecture (include/uapi/asm-generic/unistd.h, Linux 5.6)."""


def descriptors(pid: int) -> list[int] | None:
    """The userfaultfds of a process; None when it has no descriptors at all any more (it is ending, or gone)."""
    folder = PROC / str(pid) / "fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return None
    found = []
    for name in names:
        try:
            if os.readlink(folder / name) == KIND:
                found.append(int(name))
        except OSError:
            continue
    return found if names else None


def copy(pidfd: int, fd: int) -> int:
    """A descriptor of ours for the same open file (pidfd_getfd(2)), closed on exec.

    Raises:
        OSError: the process, or its descriptor, is gone (ESRCH, EBADF); not permitted (EPERM).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    got = int(libc.syscall(ctypes.c_long(_PIDFD_GETFD), ctypes.c_int(pidfd), ctypes.c_int(fd), ctypes.c_uint(0)))
    if got < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return got


def served(pid: int) -> bool:
    """True when pages of the process are still brought by somebody's userfaultfd (`um` in VmFlags, proc_pid_smaps(5))."""
    try:
        with open(PROC / str(pid) / "smaps", "rb") as smaps:
            return any(line.startswith(b"VmFlags:") and b" um" in line for line in smaps)
    except OSError:
        return False
