"""The word that `list` and `check` add on a host that was drained."""

from __future__ import annotations

from ckpt.cli.common import Session
from ckpt.cli.render import units


def warn(session: Session) -> None:
    """On stderr; nothing on a host in service, and never an error."""
    from ckpt.store import drains

    note = drains.marked(session.store_root)
    if note is not None and not session.reporter.quiet:
        what = units.plural(note["away"], "container")
        session.reporter.warning(f"this host was drained {units.when(note['t'])}: {what} moved away (ckpt undrain brings them back)")
