"""Chunks that nothing needs any more, in packs that are still needed: said so on the disk before their bytes go.

`packs/ID.dead`: numbers of chunks, 4 bytes each, sorted, then SHA-256 of them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import numpy as np

from ckpt.store import durable
from ckpt.store.pages import Places

SUFFIX: Final = ".dead"


def load_dead(packs: Path, name: str, chunks: int) -> Places:
    """The dead chunks of a pack. A file that cannot be trusted says: all of them (nothing new refers to them then)."""
    try:
        data = (packs / (name + SUFFIX)).read_bytes()
    except FileNotFoundError:
        return np.zeros(0, np.int64)
    if len(data) < 32 or len(data) % 4 or hashlib.sha256(data[:-32]).digest() != data[-32:]:
        return np.arange(chunks, dtype=np.int64)
    found = np.frombuffer(data[:-32], "<u4").astype(np.int64)
    return found[found < chunks]


def save_dead(packs: Path, name: str, dead: Places) -> None:
    """Keep the list, whole or not at all."""
    data = np.sort(dead).astype("<u4").tobytes()
    durable.write_file(packs / (name + SUFFIX), data + hashlib.sha256(data).digest())
