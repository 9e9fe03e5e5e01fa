"""ckpt as a wheel: built once, installed once, as an overlay layer over the hosts' root."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from .cache import build_once, digest, prune
from .rootfs import rootfs, rootfs_digest

LAYERS_KEPT = 4


class WheelError(Exception):
    """ckpt's wheel does not build or install: a failure of the project, not of the machine."""


def build_wheel(source: Path, into: Path) -> Path:
    """Build the wheel of the checkout `source` into the directory `into`, leaving nothing in the checkout.

    Raises:
        WheelError: the build failed; its output is in the message.
    """
    argv = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-w", str(into), str(source)]
    done = subprocess.run(argv, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or not wheels:
        raise WheelError(f"the wheel does not build:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return wheels[-1]


def wheel_layer(wheel: Path) -> Path:
    """The directory with what pip makes of the wheel in the hosts' /usr/local.

    Raises:
        WheelError: pip refused it.
    """
    name = f"wheel-{digest(hashlib.sha256(wheel.read_bytes()).digest(), rootfs_digest().encode())}"
    layer = build_once(name, lambda into: _install(wheel, into))
    prune("wheel-", LAYERS_KEPT)
    return layer


def _install(wheel: Path, into: Path) -> None:
    upper, work, merged = (into / part for part in ("upper", "work", "merged"))
    for part in (upper, work, merged):
        part.mkdir(mode=0o755)
    shutil.copy(wheel, upper / wheel.name)
    script = (
        f"mount -t overlay -o lowerdir={rootfs()},upperdir={upper},workdir={work} lab {merged} && mount -t proc proc {merged}/proc && "
        f"exec chroot {merged} python3 -m pip install --no-deps --no-index --no-cache-dir --break-system-packages --root-user-action ignore "
        f"--disable-pip-version-check /{wheel.name}"
    )
    done = subprocess.run(["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)
    if done.returncode:
        raise WheelError(f"pip cannot install {wheel.name} on a host:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    shutil.move(upper / "usr", into / "usr")  # only /usr/local was written; /tmp, /root and the wheel itself stay behind
    for part in (upper, work, merged):
        with contextlib.suppress(OSError):
            shutil.rmtree(part)
