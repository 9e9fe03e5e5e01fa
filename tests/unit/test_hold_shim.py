"""The program that stands in for an OCI runtime."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckpt.engines import _hold


def test_several_at_once_write_it_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Restores in several threads begin on a host that has none yet."""
    both, chmod = threading.Barrier(2), Path.chmod

    def meet(path: Path, mode: int) -> None:
        both.wait(10)
        chmod(path, mode)

    monkeypatch.setattr(Path, "chmod", meet)
    with ThreadPoolExecutor(2) as pool:
        made = [one.result(30) for one in [pool.submit(_hold.shim_script, "crun", tmp_path / "shim") for _ in range(2)]]
    assert made[0] == made[1] and os.access(made[0], os.X_OK) and os.listdir(tmp_path / "shim") == ["crun"]
