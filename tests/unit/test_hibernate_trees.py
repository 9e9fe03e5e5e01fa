"""Process trees of hibernate.toml: the unit that would start one cold is known, so that it can be kept from that."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ckpt.host import systemd
from ckpt.model import Container, Target
from ckpt.ops import resolve
from ckpt.ops.hibernate import selection
from ckpt.ops.hibernate.settings import Tree


@pytest.fixture
def lives_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Processes that are in a unit, and the pid of its main one."""
    monkeypatch.setattr(systemd, "running", lambda: True)

    def resolved(target: Target) -> tuple[object, Container]:
        return object(), Container(id="x", name=target.name, engine="process", state="running", pid=int(target.name))

    monkeypatch.setattr(resolve, "resolve", resolved)

    def set_up(unit: str, main: int) -> None:
        monkeypatch.setattr(systemd, "unit_of", lambda pid: unit)
        monkeypatch.setattr(systemd, "control", lambda *words: f"{main}\n")

    return set_up


def units(tree: Tree) -> tuple[str, ...]:
    return selection._tree(tree)[1].units


def test_a_unit_by_name(lives_in: Callable[[str, int], None]) -> None:
    lives_in("sim.service", 77)
    assert units(Tree("sim", unit="sim.service")) == ("sim.service",)


def test_the_main_process_of_a_unit(lives_in: Callable[[str, int], None]) -> None:
    lives_in("sim.service", 77)
    assert units(Tree("sim", pid=77)) == ("sim.service",)


def test_not_what_was_started_from_a_unit(lives_in: Callable[[str, int], None]) -> None:
    """Else ssh would not start at the boot."""
    lives_in("ssh.service", 5)
    assert units(Tree("sim", pid=77)) == ()


def test_no_scope(lives_in: Callable[[str, int], None]) -> None:
    lives_in("job.scope", 0)
    assert units(Tree("job", pid=77)) == ()
