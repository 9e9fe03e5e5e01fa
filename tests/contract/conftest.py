"""The engines that the suite is run with: one line each in SUBJECTS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.subject import FakeSubject, Subject

SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "fake": FakeSubject,
}


@pytest.fixture(params=sorted(SUBJECTS))
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Subject]:
    """A world with one engine, ended after the test."""
    made = SUBJECTS[request.param](tmp_path)
    try:
        yield made
    finally:
        made.close()
