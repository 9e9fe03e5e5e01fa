"""What kind of file system a path is on, as the kernel's table of mounts says (proc_pid_mountinfo(5))."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

_NETWORK: Final = frozenset({
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "ceph", "afs", "lustre", "gpfs", "beegfs", "gfs2", "ocfs2", "orangefs", "virtiofs", "glusterfs",
})  # fmt: skip
_LOCAL_FUSE: Final = frozenset({"fuseblk", "fuse.fuse-overlayfs", "fuse.bcachefs", "fuse.ntfs-3g", "fuse.lxcfs"})


def kind(path: Path) -> str:
    """The type of the file system that `path`, or the nearest directory above it that exists, is on: "ext4", "nfs4", "fuse.sshfs"; "" if unknown."""
    place = path.absolute()
    while True:
        try:
            device = os.stat(place).st_dev
            break
        except OSError:
            if place == place.parent:
                return ""
            place = place.parent
    wanted = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").split("\n")
    except OSError:
        return ""
    for line in reversed(lines):
        head, _, tail = line.partition(" - ")
        fields = head.split()
        if len(fields) > 2 and fields[2] == wanted:
            return tail.split()[0] if tail.split() else ""
    return ""


def is_shared(path: Path) -> bool:
    """Whether other hosts may see the same files: a network or cluster file system. FUSE counts, but for kinds known to be local."""
    name = kind(path)
    return name in _NETWORK or (name.startswith("fuse") and name not in _LOCAL_FUSE)
