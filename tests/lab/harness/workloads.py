"""The workloads (small static C programs) and the container image that holds them, as one overlay layer of the hosts' root.

The layer has /opt/lab/bin/* for use outside containers and /opt/lab/busybox.tar, a docker archive of `localhost/busybox:latest`,
which a host loads when a test wants it. The archive is written here byte for byte, so its container image ID is the same everywhere.
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
from pathlib import Path

from .cache import LabUnavailable, build_once, digest
from .rootfs import rootfs, rootfs_digest

SOURCES = Path(__file__).resolve().parent.parent / "workloads"
PROGRAMS = ("counter", "memhog", "echoserver", "echoclient", "warm")
IMAGE = "localhost/busybox:latest"
IMAGE_ARCHIVE = "/opt/lab/busybox.tar"
CC = ("gcc", "-O3", "-Wall", "-Wextra", "-Werror", "-static", "-s")
# fmt: off
APPLETS = (
    "sh", "ash", "cat", "cp", "date", "dd", "df", "echo", "env", "expr", "false", "find", "free", "grep", "head", "hostname", "id", "ip",
    "kill", "ln", "ls", "md5sum", "mkdir", "mount", "mv", "nc", "netstat", "ping", "printf", "ps", "pwd", "rm", "seq", "sha256sum", "sleep",
    "sort", "stat", "sync", "tail", "tar", "tee", "test", "top", "touch", "true", "tty", "uname", "usleep", "vi", "wc", "wget", "which",
    "whoami", "yes",
)
# fmt: on
RECIPE = 1


def layer() -> Path:
    """The built layer, cached by the digest of the sources.

    Raises:
        LabUnavailable: no C compiler.
    """
    sources = [(SOURCES / f"{name}.c").read_bytes() for name in PROGRAMS]
    name = digest(*sources, rootfs_digest().encode(), json.dumps([CC, APPLETS, RECIPE]).encode())
    return build_once(f"workloads-{name}", _build)


def _build(into: Path) -> None:
    binaries = into / "opt/lab/bin"
    binaries.mkdir(parents=True, mode=0o755)
    for name in PROGRAMS:
        try:
            done = subprocess.run([*CC, "-o", binaries / name, SOURCES / f"{name}.c"], capture_output=True, text=True, timeout=120)
        except FileNotFoundError as error:
            raise LabUnavailable("the lab needs a C compiler (apt-get install gcc libc6-dev)") from error
        if done.returncode:
            raise LabUnavailable(f"cannot compile {name}.c:\n{done.stderr}")
    write_image(into / IMAGE_ARCHIVE.lstrip("/"), rootfs() / "bin/busybox", binaries)


def write_image(archive: Path, busybox: Path, binaries: Path) -> None:
    """Write a docker archive: one layer with busybox, its applets and the workloads, without any time stamps."""
    layer_tar = io.BytesIO()
    with tarfile.open(fileobj=layer_tar, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, mode in (("bin", 0o755), ("data", 0o755), ("etc", 0o755), ("tmp", 0o1777), ("root", 0o700), ("var", 0o755)):
            _add(tar, name, kind=tarfile.DIRTYPE, mode=mode)
        _add(tar, "bin/busybox", busybox.read_bytes(), mode=0o755)
        for applet in APPLETS:
            _add(tar, f"bin/{applet}", kind=tarfile.SYMTYPE, link="busybox")
        for name in PROGRAMS:
            _add(tar, f"bin/{name}", (binaries / name).read_bytes(), mode=0o755)
        _add(tar, "etc/passwd", b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:user:/tmp:/bin/sh\n")
        _add(tar, "etc/group", b"root:x:0:\nuser:x:1000:\n")
        _add(tar, "data/state", b"original\n")  # a file that tests change: a restore must not bring "original" back
    layer_bytes = layer_tar.getvalue()
    layer_id = hashlib.sha256(layer_bytes).hexdigest()
    config = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": "2026-01-01T00:00:00Z",
            "config": {"Env": ["PATH=/bin"], "Cmd": ["/bin/sh"], "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_id}"]},
            "history": [{"created": "2026-01-01T00:00:00Z", "created_by": "lab"}],
        },
        sort_keys=True,
    ).encode()
    config_name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps([{"Config": config_name, "RepoTags": [IMAGE], "Layers": [f"{layer_id}.tar"]}]).encode()
    with tarfile.open(archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        _add(tar, config_name, config)
        _add(tar, f"{layer_id}.tar", layer_bytes)
        _add(tar, "manifest.json", manifest)


def _add(tar: tarfile.TarFile, name: str, data: bytes = b"", *, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, link: str = "") -> None:
    member = tarfile.TarInfo(name)
    member.type, member.mode, member.linkname, member.size = kind, mode, link, len(data)
    tar.addfile(member, io.BytesIO(data))
