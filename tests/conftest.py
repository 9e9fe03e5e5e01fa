"""For all tests: pycriu, which is not on PyPI, comes from the lab's root file system when the machine's Python has none."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

from tests.lab.harness.cache import build_once, cache_directory
from tests.lab.harness.rootfs import rootfs_digest


def _offer_pycriu() -> None:
    packages = cache_directory() / f"rootfs-{rootfs_digest()}" / "usr/lib/python3/dist-packages"
    if importlib.util.find_spec("pycriu") is not None or not (packages / "pycriu").is_dir():
        return
    # A directory with this one package: the others there belong to another Python.
    alone = str(build_once(f"pycriu-{rootfs_digest()}", lambda into: _copy(packages / "pycriu", into / "pycriu")))
    sys.path.append(alone)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), alone]))


def _copy(source: os.PathLike[str], target: os.PathLike[str]) -> None:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))


try:
    _offer_pycriu()
except OSError:
    pass  # a cache that is not ours to write: the tests that need pycriu say so
