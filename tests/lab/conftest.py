"""Fixtures of the lab. A missing prerequisite skips the tests, except in CI (environment variable CI), where it fails them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests.lab.harness import Lab, LabUnavailable
from tests.lab.harness.lab import prepare
from tests.lab.harness.wheel import build_wheel

TOP = Path(__file__).resolve().parents[2]


def _unavailable(error: LabUnavailable) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(f"the lab is not available: {error}")
    pytest.skip(f"the lab is not available: {error}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.lab)


@pytest.fixture(scope="session")
def lab_ready() -> None:
    """The lab can be had on this machine, and what it is made of is built."""
    try:
        prepare()
    except LabUnavailable as error:
        _unavailable(error)


@pytest.fixture(scope="session")
def wheel(lab_ready: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ckpt's wheel, built from the checkout once per session."""
    return build_wheel(TOP, tmp_path_factory.mktemp("wheel"))


@pytest.fixture
def lab_options() -> dict[str, Any]:
    """Arguments of Lab; override the fixture or parametrize it (`@pytest.mark.parametrize("lab_options", [...])`)."""
    return {}


@pytest.fixture
def lab(wheel: Path, lab_options: dict[str, Any]) -> Iterator[Lab]:
    """Fresh hosts a and b with ckpt installed. With CKPT_LAB_SOURCE=1 they use the checkout's package in place."""
    made = Lab(source=TOP, **lab_options) if os.environ.get("CKPT_LAB_SOURCE") else Lab(wheel=wheel, **lab_options)
    with made:
        yield made


@pytest.fixture
def bare_lab(lab_ready: None, lab_options: dict[str, Any]) -> Iterator[Lab]:
    """Fresh hosts a and b without ckpt."""
    with Lab(**lab_options) as made:
        yield made
