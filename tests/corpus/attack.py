"""What an attack is, and the list of all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Where = Literal["import", "restore", "apply"]
INVALID, MISMATCH, POLICY = 30, 31, 34


@dataclass(frozen=True)
class Attack:
    """`build` gives the archive; for `apply` a tar of a root file system and a list of deleted files.

    `at`: "import" is refused by `ckpt import` and by `ckpt restore -i`; "restore" may lie in a store, and is refused when it is to run.
    """

    name: str
    stands_for: str
    at: Where
    codes: tuple[int, ...]
    build: Callable[[], bytes | tuple[bytes, bytes]]


ALL: list[Attack] = []


def attack(name: str, stands_for: str, at: Where = "import", *codes: int) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Register a function as an attack."""

    def add(build: Callable[[], object]) -> Callable[[], object]:
        register(name, stands_for, at, build, *codes)
        return build

    return add


def register(name: str, stands_for: str, at: Where, build: Callable[[], object], *codes: int) -> None:
    """Add one to the list."""
    assert all(one.name != name for one in ALL), name
    default = {"import": (INVALID, MISMATCH), "restore": (POLICY,), "apply": (INVALID,)}[at]
    ALL.append(Attack(name, stands_for, at, codes or default, build))  # type: ignore[arg-type]
