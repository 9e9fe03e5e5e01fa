"""Where pycriu comes from: Debian's `python3-pycriu`, Fedora's `python3-criu`; only its protobuf modules are used.

pycriu's own client class has no notifications, no feature check and hides errors, so `swrk.py` speaks the RPC itself.
"""

from __future__ import annotations

import importlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, Final

from ckpt.errors import FeatureMissing

DISTRIBUTION_DIRS: Final = (Path("/usr/lib/python3/dist-packages"), Path("/usr/lib/python3/site-packages"))
"""Looked at when ckpt runs in a virtual environment that does not see the system's packages."""


def load(module: str) -> Any:
    """The module `pycriu.<module>`.

    Raises:
        FeatureMissing: pycriu, or the protobuf that it needs, is not there.
    """
    try:
        return importlib.import_module(f"pycriu.{module}")
    except ModuleNotFoundError as error:
        if error.name == "pycriu" and _adopt():
            return load(module)
        raise FeatureMissing(f"Python's {error.name} is missing: ckpt cannot talk to CRIU", hint=_HINT) from error
    except (ImportError, TypeError) as error:
        raise FeatureMissing(f"pycriu does not load: {error}", hint=_HINT) from error


_HINT: Final = "install pycriu: apt install python3-pycriu, or dnf install python3-criu"


def _adopt() -> bool:
    """Import only pycriu from the system's packages, without putting the whole directory on the path."""
    for folder in DISTRIBUTION_DIRS:
        init = folder / "pycriu" / "__init__.py"
        if not init.is_file():
            continue
        spec = spec_from_file_location("pycriu", init, submodule_search_locations=[str(init.parent)])
        if spec is None or spec.loader is None:
            continue
        sys.modules["pycriu"] = module = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception:
            del sys.modules["pycriu"]
            raise
        return True
    return False
