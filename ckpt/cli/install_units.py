"""`ckpt install-units`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import click

from ckpt.cli.common import Session, verb
from ckpt.cli.render.rows import Row
from ckpt.errors import UsageError

FIELDS: Final = ("path", "changed")


@verb(
    "install-units",
    fields=FIELDS,
    examples=(
        ("ckpt install-units --enable", "from now on a bare reboot saves what runs, and the boot brings it back"),
        ("ckpt install-units --print", "show them, write nothing"),
        ("ckpt install-units --uninstall", "take them away again"),
        ("ckpt install-units --root /mnt/img --prefix /usr", "for a package, or the disk of a machine to be"),
    ),
)
@click.option("--enable", is_flag=True, help="Also enable them, and let them work from now on.")
@click.option("--print", "show", is_flag=True, help="Print the units, write nothing.")
@click.option("--uninstall", is_flag=True, help="Disable and remove what this command, ckpt arm and ckpt hibernate installed.")
@click.option("--root", type=click.Path(file_okay=False), metavar="DIR", help="Work on the tree below DIR, not on this host's own.")
@click.option("--prefix", metavar="DIR", help="Put them into DIR/lib/systemd/system, as packages do, not into /etc/systemd/system.")
@click.option("--unguard", is_flag=True, hidden=True)
def command(session: Session, enable: bool, show: bool, uninstall: bool, root: str | None, prefix: str | None, unguard: bool) -> int:
    """Install systemd units that save what runs when this host goes down, and bring it back when it is up again.

    ckpt-hibernate.service saves at shutdown (a bare reboot, the power button), ckpt-resume.service restores at boot, before anything can
    start the containers cold; ckpt-arm@.timer is for ckpt arm. Drop-ins keep the containers' scopes, and the units that own containers,
    from being stopped before the save. Run it again after changing /etc/ckpt/hibernate.toml, or when other units own containers: it is
    the same as once. Files that are not ckpt's own are never touched.
    """
    if sum((enable, show, uninstall, unguard)) > 1:
        raise UsageError("give one of --enable, --print and --uninstall")
    if prefix is not None and not Path(prefix).is_absolute():
        raise UsageError(f"--prefix: {prefix!r} is no absolute path")
    if root is not None and not Path(root).is_dir():
        raise UsageError(f"--root: {root!r} is no directory")
    from ckpt.ops import install_units as use_case

    place = use_case.Place(Path(root).resolve() if root else Path("/"), Path(prefix) if prefix else None)
    if show:
        rows = [{"path": str(path), "changed": False, "text": text} for path, text in use_case.files(place, session.store_root).items()]
        session.reporter.show(rows, table=_texts)
        return 0
    if root is None:
        session.need_root()
    if unguard:
        from ckpt.ops.hibernate import guards

        guards.unguard_units()
        return 0
    if uninstall:
        from ckpt.ops import arm

        if place.live:
            arm.disarm(tuple(arm.load(session.store_root)), store_root=session.store_root)
        done = use_case.uninstall(place)
    else:
        done = use_case.install(place, session.store_root, enable=enable, emit=session.emit)
    session.reporter.show([{"path": str(path), "changed": path in done.changed} for path in done.paths], table=_paths)
    return 0


def _paths(rows: Sequence[Row]) -> Iterator[str]:
    return (row["path"] for row in rows)


def _texts(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        yield f"# {row['path']}"
        yield row["text"]
