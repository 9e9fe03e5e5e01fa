"""Reading a tree that somebody else changes meanwhile: nothing outside of it can be reached, whatever its links become.

openat2(2); fstatfs(2) and syncfs(2), which Python does not have, for what a file's times tell about its content.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
from typing import Final

_OPENAT2: Final = 437  # the same on every architecture (Linux 5.6)
_RESOLVE: Final = 0x02 | 0x04 | 0x08  # NO_MAGICLINKS, NO_SYMLINKS, BENEATH
_RESOLVE_IN_ROOT: Final = 0x02 | 0x10  # NO_MAGICLINKS, IN_ROOT
_HOW: Final = struct.Struct("=QQQ")
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_GONE: Final = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EXDEV, errno.ENXIO, errno.ESTALE)
_TELLING: Final = frozenset({0xEF53, 0x58465342, 0x9123683E})
"""ext2/3/4, xfs, btrfs (statfs(2)): their page_mkwrite sets the times at the first write to a mapped page that is clean. tmpfs has none."""

_libc: Final = ctypes.CDLL(None, use_errno=True)


def open_beneath(directory_fd: int, path: str, flags: int, mode: int = 0) -> int:
    """openat2 with RESOLVE_BENEATH, NO_SYMLINKS and NO_MAGICLINKS: nothing but what is really below the directory is opened, or made.

    Raises:
        OSError: ELOOP for a link on the way, EXDEV for a way out, and all that open(2) says.
    """
    how = _HOW.pack(flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode, _RESOLVE)
    name = ctypes.c_char_p(os.fsencode(path))
    fd = int(_libc.syscall(ctypes.c_long(_OPENAT2), ctypes.c_int(directory_fd), name, how, ctypes.c_size_t(len(how))))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return fd


class Gone(Exception):
    """It is not there any more, or something else is in its place."""


class Tree:
    """An open directory; paths are bytes relative to it, "" is itself. Close it with `close`."""

    def __init__(self, root: bytes) -> None:
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._parent = -1
        self._parent_path: bytes | None = None

    def close(self) -> None:
        """Give the descriptors back."""
        self._forget()
        os.close(self._root)

    def _forget(self) -> None:
        if self._parent >= 0:
            os.close(self._parent)
        self._parent, self._parent_path = -1, None

    def _at(self, path: bytes) -> tuple[int, bytes]:
        """The directory that a path is in, and its last part."""
        head, _, leaf = path.rpartition(b"/")
        if not head:
            return self._root, leaf or b"."
        if head != self._parent_path:
            self._forget()
            how = _HOW.pack(os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, 0, _RESOLVE)
            fd = _libc.syscall(ctypes.c_long(_OPENAT2), ctypes.c_int(self._root), ctypes.c_char_p(head), how, ctypes.c_size_t(len(how)))
            if fd < 0:
                raise _error(ctypes.get_errno(), path)
            self._parent, self._parent_path = fd, head
        return self._parent, leaf

    def lstat(self, path: bytes) -> os.stat_result:
        """Raises Gone, OSError."""
        at, leaf = self._at(path)
        try:
            return os.stat(leaf, dir_fd=at, follow_symlinks=False)
        except OSError as error:
            raise _error(error.errno or 0, path) from None

    def open(self, path: bytes) -> int:
        """A regular file, for reading. Raises Gone, OSError."""
        at, leaf = self._at(path)
        try:
            fd = os.open(leaf, _READ, dir_fd=at)
        except OSError as error:
            raise _error(error.errno or 0, path) from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise Gone
        return fd

    def readlink(self, path: bytes) -> bytes:
        """Raises Gone, OSError."""
        at, leaf = self._at(path)
        try:
            return os.readlink(leaf, dir_fd=at)
        except OSError as error:
            raise Gone if error.errno == errno.EINVAL else _error(error.errno or 0, path) from None

    def xattrs(self, path: bytes) -> dict[str, bytes]:
        """Every extended attribute that can be seen. Raises Gone, OSError."""
        at, leaf = self._at(path)
        where = b"/proc/self/fd/%d/%s" % (at, leaf)
        found = {}
        try:
            for key in os.listxattr(where, follow_symlinks=False):
                try:
                    found[key] = os.getxattr(where, key, follow_symlinks=False)
                except OSError as error:
                    if error.errno not in (errno.ENODATA, errno.EPERM):
                        raise
        except OSError as error:
            if error.errno != errno.ENOTSUP:
                raise _error(error.errno or 0, path) from None
        return found

    def tells_mapped_writes(self) -> bool:
        """Whether a write through a shared mapping, to a page that was flushed before, changes the file's times here."""
        buffer = ctypes.create_string_buffer(512)
        if _libc.fstatfs(self._root, buffer) != 0:
            return False
        return ctypes.c_long.from_buffer(buffer).value in _TELLING

    def flush(self) -> None:
        """Bring the file system's dirty pages to the disk; from then on the next write to any of them is seen in its file's times."""
        if _libc.syncfs(self._root) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _error(number: int, path: bytes) -> Exception:
    return Gone() if number in _GONE else OSError(number, os.strerror(number), os.fsdecode(path))


def exists_in(root_fd: int, path: str) -> bool:
    """Whether a process whose root directory is `root_fd` finds something at `path`: links lead where they lead for that process."""
    how = _HOW.pack(os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT)
    name = ctypes.c_char_p(os.fsencode(path))
    fd = int(_libc.syscall(ctypes.c_long(_OPENAT2), ctypes.c_int(root_fd), name, how, ctypes.c_size_t(len(how))))
    if fd >= 0:
        os.close(fd)
    return fd >= 0
