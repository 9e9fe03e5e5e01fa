"""The hosts' root file system: Debian trixie with podman, crun and runc, and CRIU pinned from sid.

Trixie's own CRIU 4.1.1 cannot dump inet sockets on kernels that refuse SO_PASSCRED on them (6.16 and later); sid's 4.2.1 can.
The recipe below is data: its digest names the cached directory, so a change builds a new root and leaves the old one alone.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

from .cache import LabUnavailable, build_once, cache_directory, digest

MIRROR = os.environ.get("CKPT_LAB_MIRROR", "http://deb.debian.org/debian")
SUITE = "trixie"
BASE = ("ca-certificates", "python3", "iproute2")
# fmt: off
PACKAGES = (
    # engines
    "podman", "crun", "runc", "conmon", "netavark", "aardvark-dns", "nftables", "iptables",
    # what ckpt needs
    "python3-click", "python3-rich", "python3-zstandard", "python3-xxhash", "python3-requests", "python3-protobuf", "python3-pip", "python3-venv",
    "python3-numpy", "python3-cryptography", "python3-aiohttp",
    "openssh-server", "openssh-client", "iputils-arping", "zstd", "gzip", "tar", "attr",
    # what tests look with, and run
    "checkpointctl", "docker-registry", "skopeo", "age", "nginx-light", "sshfs",
    "procps", "busybox-static", "socat", "iputils-ping", "redis-server", "redis-tools",
    "bash-completion", "zsh", "fish", "man-db", "less",
)
FROM_SID = ("criu", "libcriu2", "python3-pycriu", "libcompel1", "libnl-3-200")
# fmt: on
FILES = {
    "usr/sbin/policy-rc.d": "#!/bin/sh\nexit 101\n",  # no service may start while packages are installed
    # The clock of a test machine may be off; nothing here is trusted beyond the archive's signature.
    "etc/apt/apt.conf.d/99lab": 'Acquire::Check-Valid-Until "false";\nAcquire::Check-Date "false";\n',
}
SID_FILES = {
    "etc/apt/sources.list.d/sid.list": f"deb {MIRROR} sid main\n",
    "etc/apt/preferences.d/pin": "Package: *\nPin: release n=trixie\nPin-Priority: 700\n\nPackage: *\nPin: release n=sid\nPin-Priority: 100\n",
}
RECIPE = 1
"""Raise it when the steps below change in a way that changes the result."""


def rootfs_digest() -> str:
    return digest(json.dumps([SUITE, BASE, PACKAGES, FROM_SID, FILES, SID_FILES, RECIPE], sort_keys=True).encode())


def rootfs_ready() -> bool:
    """Whether the root is built already."""
    return (cache_directory() / f"rootfs-{rootfs_digest()}").exists()


def rootfs() -> Path:
    """The built root (takes about 80 s the first time).

    Raises:
        LabUnavailable: not root, no debootstrap, no mirror.
    """
    return build_once(f"rootfs-{rootfs_digest()}", _build)


def _step(argv: list[str], timeout_s: float = 900.0) -> None:
    env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    env |= {key: value for key, value in os.environ.items() if key.lower() in ("http_proxy", "https_proxy", "no_proxy")}
    done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s)
    if done.returncode:
        tail = "\n".join(done.stdout.decode(errors="replace").splitlines()[-12:])
        raise LabUnavailable(f"building the lab's root file system: {' '.join(argv[:6])} … ended with {done.returncode}\n{tail}")


def _write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        if text.startswith("#!"):
            path.chmod(0o755)


def _build(root: Path) -> None:
    if os.geteuid() != 0:
        raise LabUnavailable("the lab needs root")
    _step(["debootstrap", "--variant=minbase", f"--include={','.join(BASE)}", SUITE, str(root), MIRROR])
    # Own mount and pid namespaces: no mount of /proc is left behind, whatever happens.
    chroot = ["unshare", "--mount", "--pid", "--fork", "--kill-child", f"--root={root}", "--mount-proc"]
    install = [*chroot, "apt-get", "install", "-y", "--no-install-recommends"]
    _write(root, FILES)
    _step([*install, *PACKAGES])
    _write(root, SID_FILES)
    for attempt in range(3):  # a mirror in the middle of an update
        try:
            _step([*chroot, "apt-get", "update"])
            break
        except LabUnavailable:
            if attempt == 2:
                raise
            time.sleep(5)
    _step([*install, *(f"{name}/sid" for name in FROM_SID)])
    _step([*chroot, "apt-get", "clean"])
    shutil.rmtree(root / "var/lib/apt/lists", ignore_errors=True)
