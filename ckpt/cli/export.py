"""`ckpt export`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, Literal

import click

from ckpt.cli import completion, protection
from ckpt.cli.common import F, Session, dump_options, state_options, verb
from ckpt.errors import CkptError, UsageError


def compress_options(function: F) -> F:
    function = click.option("--level", type=click.IntRange(0, 22), metavar="N", help="Compression level.")(function)
    kinds = click.Choice(["zstd", "gzip", "none"], case_sensitive=False)
    return click.option("-c", "--compress", type=kinds, help="How to pack (default zstd).")(function)


def destination(session: Session, output: str) -> Path | Literal["-"]:
    """The file that was named, or stdout, which then carries the archive and no results. Raises UsageError for a terminal."""
    if output != "-":
        return Path(output)
    if sys.stdout.isatty():
        raise UsageError("an archive is nothing for a terminal", hint="redirect stdout, or name a file")
    session.reporter.results = False
    return "-"


def _need_root_for_container(session: Session, ref: str) -> None:
    """A checkpoint in one's own store can be read by anybody; what else `ref` may be the engines tell, and those are root's."""
    if os.geteuid() == 0:
        return
    from ckpt.store.catalog import Catalog

    try:
        Catalog(session.store_root).find(ref)
    except (CkptError, OSError):
        session.need_root()


@verb(
    "export",
    examples=(
        ("ckpt export web@2 -o web.tar.zst", "write a checkpoint of the store as an archive"),
        ("ckpt export -R podman:web -o web.tar.zst", "save a running container straight to an archive"),
        ("ckpt export web -o - | ssh b ckpt import -", "to the store of another host"),
        ("ckpt export web -o web.age --encrypt age:age1...", "encrypted: age -d opens it, and so does ckpt"),
    ),
)
@click.argument("ref", metavar="CHECKPOINT|TARGET", shell_complete=completion.both)
@click.option("-o", "--output", required=True, metavar="FILE", type=click.Path(), help="The archive; - for stdout.")
@compress_options
@protection.outgoing_options
@click.option("-R", "--leave-running", is_flag=True, help="Let a running container run on.")
@state_options()
def command(session: Session, ref: str, output: str, compress: str | None, level: int | None, leave_running: bool, **state: Any) -> int:
    """Write a checkpoint as one file that podman restores too.

    A checkpoint in the store is written as it is. The name of a running container saves it on the way: it ends (unless -R) when the
    archive is safely on the disk.

    With --encrypt the archive is an age file. Of a container that runs, nothing is on a disk in clear on the way there.
    """
    outgoing = protection.outgoing(session, protection.take(state, protection.OUTGOING))
    place = destination(session, output)
    if "@" not in ref:
        _need_root_for_container(session, ref)
    from ckpt.ops import export as use_case

    outcome = use_case.export(
        ref,
        place,
        compress=(compress or session.settings.compress).lower(),
        level=level,
        leave_running=leave_running,
        options=dump_options(session, leave_running=leave_running, **state),
        outgoing=outgoing,
        store_root=session.store_root,
        emit=session.emit,
    )
    return session.finish([outcome], id_of="checkpoint")
