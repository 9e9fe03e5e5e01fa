"""What a reference means: NAME, NAME@N, NAME@TAG, an id."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Final

from ckpt.errors import TargetNotFound
from ckpt.model import Checkpoint

MIN_PREFIX: Final = 4
"""An id may be shortened to this many characters where that is unique."""


def find(known: Sequence[Checkpoint], ref: str) -> Checkpoint:
    """The body of `Catalog.find`; `known` as `Catalog.all` gives it."""
    exact = [c for c in known if c.manifest.name == ref]
    if exact:
        return exact[-1]
    name, at, generation = ref.rpartition("@")
    if at:
        versions = [c for c in known if c.manifest.name == name]
        if versions and generation == "latest":
            return versions[-1]
        tagged = [c for c in versions if generation in c.entry.tags]
        if tagged:
            return tagged[-1]
        if versions and generation.isascii() and generation.isdigit():
            for candidate in versions:
                if candidate.manifest.generation == int(generation):
                    return candidate
        if versions:
            there = ", ".join(c.ref for c in versions)
            raise TargetNotFound(f"there is no checkpoint {ref!r} in the store", hint=f"there is: {there}")
    if len(ref) >= MIN_PREFIX and re.fullmatch(r"[0-9a-f]+", ref):
        begins = [c for c in known if c.manifest.id.startswith(ref)]
        if len(begins) == 1:
            return begins[0]
        if begins:
            raise TargetNotFound(f"{ref!r} is ambiguous: {', '.join(f'{c.manifest.id} ({c.ref})' for c in begins)}")
    close = difflib.get_close_matches(name or ref, sorted({c.manifest.name for c in known}))
    hint = f"did you mean {' or '.join(close)}?" if close else "ckpt list shows what is there"
    raise TargetNotFound(f"there is no checkpoint {ref!r} in the store", hint=hint)
