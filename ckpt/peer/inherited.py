"""A link that was there before us: our standard input and output, with a `ckpt peer` at its other end.

So a host fetches a workload with nothing but its own ssh to the other one: it starts `ckpt migrate --stdio` there, and a `ckpt peer` here, and
puts the two together. The link is one for the life of this process; when it has ended, whoever started us asks again.
"""

from __future__ import annotations

import os
import sys
from typing import Final

from ckpt.errors import CannotConnect, UsageError

DESTINATION: Final = "stdio:"
"""How a destination at the other end of our standard input and output is named, in journals too."""
_ways: list[int] = []


def take_over() -> None:
    """From now on standard input and output are the link. Input is empty afterwards, and what is written to output goes to stderr.

    Raises:
        UsageError: somebody sits there.
    """
    if os.isatty(0) or os.isatty(1):
        raise UsageError("--stdio is for ckpt on another host", hint="see ckpt undrain")
    sys.stdout.flush()
    _ways[:] = [os.dup(0), os.dup(1)]
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)


def ends() -> tuple[int, int]:
    """The link's descriptors, which are the caller's then.

    Raises:
        CannotConnect: they were taken already, or there never were any.
    """
    if not _ways:
        raise CannotConnect("the link to the host that fetches it is over", hint="ckpt undrain there, once more")
    inp, out = _ways
    _ways.clear()
    return inp, out
