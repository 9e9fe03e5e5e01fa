"""`ckpt inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, one_way, verb
from ckpt.cli.protection import decrypting_options, incoming
from ckpt.cli.render.rows import FOUND_FIELDS, INSPECT_FIELDS, Row, found_row, inspection_row
from ckpt.errors import UsageError

if TYPE_CHECKING:
    from ckpt.archive.trust import Incoming


@verb(
    "inspect",
    fields=(*INSPECT_FIELDS, *(name for name in FOUND_FIELDS if name not in INSPECT_FIELDS)),
    examples=(
        ("ckpt inspect web@2", "a checkpoint of the store"),
        ("ckpt inspect -a ./web.tar.zst", "an archive, with everything but its environment"),
        ("ckpt inspect ./web.tar.zst --format json", "for a program"),
        ("ckpt inspect web --search 'BEGIN PRIVATE KEY'", "where a text is in the memory of its processes"),
    ),
)
@click.argument("refs", nargs=-1, metavar="CHECKPOINT|FILE...", shell_complete=completion.checkpoints_or_files)
@click.option("--files", is_flag=True, help="Open files of each process.")
@click.option("--sockets", is_flag=True, help="Sockets of each process.")
@click.option("--mounts", is_flag=True, help="Mounts.")
@click.option("--members", is_flag=True, help="Members and their sizes.")
@click.option("-a", "--all", "everything", is_flag=True, help="All of these.")
@click.option("--env", "environment", is_flag=True, help="Command lines and environments, from memory; they may hold secrets.")
@click.option("--search", "text", metavar="TEXT", help="Find a text in the memory of the processes.")
@click.option("--search-hex", "hexadecimal", metavar="BYTES", help="Find bytes ('de ad be ef').")
@click.option("--search-regex", "regex", metavar="REGEX", help="Find what matches a regular expression.")
@click.option("-p", "--pid", type=click.IntRange(min=1), metavar="PID", help="Search in this process only.")
@click.option("--max-matches", type=click.IntRange(min=1), default=100, metavar="N", help="Stop after so many matches (default 100).")
@decrypting_options
def command(
    session: Session,
    refs: tuple[str, ...],
    everything: bool,
    environment: bool,
    text: str | None,
    hexadecimal: str | None,
    regex: str | None,
    pid: int | None,
    max_matches: int,
    **more: Any,
) -> int:
    """Show what is in a checkpoint or an archive.

    Its processes and their memory, what was open, the sizes, and what a restore needs. Memory pages are not read, unless --env or a
    search needs them. JSON has all parts always (environments only with --env). A text with a / in it is always a file.
    """
    one_way(refs, what="checkpoint")
    from ckpt.cli.render.contents import PARTS, inspect_lines
    from ckpt.ops import inspect as use_case

    wanted = [(how, value) for how, value in (("text", text), ("hex", hexadecimal), ("regex", regex)) if value is not None]
    if len(wanted) > 1:
        raise UsageError("give one of --search, --search-hex and --search-regex")
    if wanted:
        return _search(session, refs, wanted[0], pid, max_matches, incoming(session, more))
    if pid is not None:
        raise UsageError("--pid is for a search", hint="give --search TEXT as well")
    chosen = [name for name in PARTS if more.get(name) or (everything and name in more)]
    if environment:
        chosen.append("environment")
    opens = incoming(session, more)
    rows = [inspection_row(use_case.inspect(ref, environment=environment, incoming=opens, store_root=session.store_root)) for ref in refs]

    def lines(rows: Sequence[Row]) -> Iterator[str]:
        for row in rows:
            yield from inspect_lines(row, chosen)

    session.reporter.show(rows, table=lines)
    return 0


def _search(session: Session, refs: Sequence[str], wanted: tuple[str, str], pid: int | None, max_matches: int, opens: Incoming) -> int:
    from ckpt.cli.render.contents import found_lines
    from ckpt.ops import inspect as use_case

    how, pattern = wanted
    rows: list[Row] = []
    for ref in refs:
        left = max_matches - len(rows)
        if left:
            found = use_case.search(ref, pattern, how=how, pid=pid, max_matches=left, incoming=opens, store_root=session.store_root)
            rows += [found_row(ref, one) for one in found]

    def lines(rows: Sequence[Row]) -> Iterator[str]:
        for row in rows:
            yield from found_lines(row)

    session.reporter.show(rows, table=lines)
    if len(rows) == max_matches:
        session.reporter.warning(f"stopped after {max_matches} matches (--max-matches)")
    elif not rows and session.reporter.kind == "table":
        session.reporter.warning("not found")
    return 0
