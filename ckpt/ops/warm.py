"""Heavy libraries, imported while an operation still waits for other programs."""

from __future__ import annotations

import importlib
import threading
from contextlib import suppress
from typing import Final

INTO_CHUNKS: Final = ("ckpt.store.sink", "ckpt.store.base", "cryptography.hazmat.primitives.ciphers.aead", "zstandard", "xxhash")
OUT_OF_CHUNKS: Final = ("ckpt.store.materialize", "zstandard", "xxhash")
LAZILY: Final = ("ckpt.criu.pagechunks",)


def imports(*names: str) -> None:
    """Import these in a thread. What cannot be imported is told by whoever needs it."""

    def body() -> None:
        for name in names:
            with suppress(Exception):
                importlib.import_module(name)

    threading.Thread(target=body, name="ckpt-imports").start()
