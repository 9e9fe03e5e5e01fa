"""`python -m ckpt`: the same as the command `ckpt`."""

from __future__ import annotations

import sys

from ckpt.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
