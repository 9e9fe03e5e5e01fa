"""How much memory CRIU can leave in pipes."""

from __future__ import annotations

import pytest

from ckpt.host import limits


@pytest.mark.parametrize(
    "exceed, files, pipe, expected_gib", [(False, 1024, 1 << 20, 0.39), (False, 1024, 64 << 20, 1.59), (True, 1 << 20, 4 << 20, 1638)]
)
def test_by_descriptors_and_pipes(monkeypatch: pytest.MonkeyPatch, exceed: bool, files: int, pipe: int, expected_gib: float) -> None:
    monkeypatch.setattr(limits, "may_exceed", lambda: exceed)
    monkeypatch.setattr(limits, "descriptors", lambda: files)
    monkeypatch.setattr(limits, "pipe_bytes", lambda: min(pipe, 4 << 20))
    assert limits.piped_memory_bytes() / (1 << 30) == pytest.approx(expected_gib, rel=0.05)


def test_of_this_host() -> None:
    assert limits.descriptors() > 3
    assert limits.pipe_bytes() >= 4096
