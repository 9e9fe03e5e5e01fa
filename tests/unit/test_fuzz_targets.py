"""The targets of `make fuzz`, for a moment, without a fuzzer: seeds that are bent at random."""

from __future__ import annotations

import random
import time

import pytest

from ckpt.criu.bindings import load
from ckpt.errors import FeatureMissing

try:
    load("images.magic")
except FeatureMissing:
    pytest.skip("pycriu is not installed", allow_module_level=True)

from tests.fuzz.targets import TARGETS, one

SECONDS = 0.3


def bent(seed: bytes, generator: random.Random) -> bytes:
    """A seed with some bytes changed, removed, doubled or made up."""
    data = bytearray(seed)
    for _ in range(generator.choice((1, 1, 2, 5))):
        at = generator.randrange(len(data) + 1)
        match generator.randrange(5):
            case 0 if data:
                data[at % len(data)] ^= 1 << generator.randrange(8)
            case 1:
                del data[at : at + generator.choice((1, 4, 600))]
            case 2:
                data[at:at] = data[at : at + generator.choice((1, 8, 512))]
            case 3:
                data[at : at + 8] = generator.choice((b"\xff" * 8, bytes(8), b"\x7f" + b"\xff" * 7, b"-1", b'"\\ud800"', b"[" * 50, b"1e999"))
            case _:
                data[at : at + 2] = generator.randbytes(2)
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.timeout(60)
def test_it_answers(name: str) -> None:
    seeds = TARGETS[name].seeds()
    good = [one(name, seed) for seed in seeds]
    assert any(good), "no seed gets through: nothing behind the first check is tried"
    number = random.randrange(1 << 32)
    generator = random.Random(number)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        data = bent(generator.choice(seeds), generator)
        try:
            one(name, data)
        except Exception as error:
            raise AssertionError(f"{name}: {data[:2000]!r} (of {len(data)} bytes, seed {number})") from error
