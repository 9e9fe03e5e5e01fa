"""The engines that the suite is run with: one line each in SUBJECTS. The real ones need the lab: `-m lab`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.contract.real import Hosts
from tests.contract.real import subject as real_subject
from tests.contract.subject import FakeSubject, Subject
from tests.lab.harness import LabUnavailable

REAL = pytest.mark.lab


def real(name: str) -> Callable[[Path, Hosts], Subject]:
    return lambda directory, hosts: real_subject(name, hosts.get())


SUBJECTS = [
    pytest.param(lambda directory, hosts: FakeSubject(directory), id="fake"),
    pytest.param(real("podman-crun"), id="podman-crun", marks=REAL),
    pytest.param(real("podman-runc"), id="podman-runc", marks=REAL),
    pytest.param(real("runc"), id="runc", marks=REAL),
    pytest.param(real("crun"), id="crun", marks=REAL),
    pytest.param(real("process"), id="process", marks=REAL),
]


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """The lab host that the real engines share."""
    made = Hosts()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest, tmp_path: Path, hosts: Hosts) -> Iterator[Subject]:
    """A world with one engine, its workloads ended after the test."""
    try:
        made: Subject = request.param(tmp_path, hosts)
    except LabUnavailable as error:
        if os.environ.get("CI"):
            pytest.fail(f"the lab is not available: {error}")
        pytest.skip(f"the lab is not available: {error}")
    try:
        yield made
    finally:
        made.close()
