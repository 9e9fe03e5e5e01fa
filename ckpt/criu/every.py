"""Whether a CRIU image parses, whatever kind it is: by its magic, with pycriu's table of kinds."""

from __future__ import annotations

import struct
from typing import Any, Final

from ckpt.criu.bindings import load
from ckpt.criu.contents import Source, entries
from ckpt.errors import ArchiveInvalid

_HEAD_BYTES: Final = 8


def check(source: Source, name: str) -> bool:
    """Parse one image ("checkpoint/core-1.img"); False when its kind is not known here, or has other things between its entries.

    Raises:
        ArchiveInvalid: it is damaged.
        FeatureMissing: pycriu is not there.
    """
    magics: Any = load("images.magic")
    with source.open(name) as file:
        head = file.read(_HEAD_BYTES)
    words = struct.unpack(f"<{len(head) // 4}I", head[: len(head) // 4 * 4])
    if words and words[0] in (magics.by_name["IMG_COMMON"], magics.by_name["IMG_SERVICE"]):
        words = words[1:]
    kind = magics.by_val.get(words[0]) if words else None
    if kind is None:
        return False
    handler = load("images.images").handlers.get(kind)
    payload = getattr(handler, "payload", None)
    if kind == "PAGEMAP":
        return True  # contents.pagemaps reads those, with all that must hold
    if payload is None or getattr(handler, "extra_handler", None) is not None:
        return False
    leaf, module = name.rpartition("/")[2], payload.__module__.rpartition(".")[2]
    try:
        for _ in entries(source, leaf, kind, module, payload.__name__):
            pass
    except AttributeError as error:
        raise ArchiveInvalid(f"{leaf} cannot be read: {error}") from None
    return True
