"""`ckpt diff`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, verb
from ckpt.cli.protection import decrypting_options, incoming
from ckpt.cli.render import units
from ckpt.cli.render.rows import Row, plain

_FIELDS: Final = ("a", "b", "same", "same_container", "processes", "files", "open_files", "sockets", "memory", "config")
_TITLES: Final = (("config", "configuration"), ("processes", "processes"), ("files", "files"), ("open_files", "open files"), ("sockets", "sockets"))
_MARKS: Final = {"added": "+", "removed": "-", "changed": "~"}
_PAGE_BYTES: Final = 4096


@verb(
    "diff",
    fields=_FIELDS,
    examples=(("ckpt diff web@1 web@2", "two checkpoints of the store"), ("ckpt diff web@2 ./web.tar.zst --format json", "and an archive")),
)
@click.argument("a", metavar="CHECKPOINT|FILE", shell_complete=completion.checkpoints_or_files)
@click.argument("b", metavar="CHECKPOINT|FILE", shell_complete=completion.checkpoints_or_files)
@click.option("--memory/--no-memory", default=True, help="Compare memory pages too (default: yes).")
@decrypting_options
def command(session: Session, a: str, b: str, memory: bool, **protection: Any) -> int:
    """Show what differs between two checkpoints.

    Processes, files (by their content, not their times), open files, sockets, configuration, and how many memory pages of each process
    changed. + is only in the second, - only in the first, ~ differs.
    """
    from ckpt.ops import diff as use_case

    found = use_case.diff(a, b, memory=memory, incoming=incoming(session, protection), store_root=session.store_root, emit=session.emit)
    session.reporter.show([{**plain(found), "same": found.same}], table=_lines)
    return 0


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        yield f"{units.clean(row['a'])} -> {units.clean(row['b'])}" + ("" if row["same_container"] else " (of different containers)")
        if row["same"]:
            yield "  nothing differs"
        for key, title in _TITLES:
            if row[key]:
                yield f"  {title}"
            for change in row[key]:
                yield f"    {_MARKS[change['change']]} {units.clean(change['what'])}  {units.clean(change['detail'])}".rstrip()
        changed = [one for one in row["memory"] if one["changed_pages"] or one["new_pages"] or one["gone_pages"]]
        if changed:
            yield "  memory"
        for one in changed:
            words = [f"{one[f'{word}_pages']} {word}" for word in ("changed", "new", "gone", "same")]
            size = units.size((one["changed_pages"] + one["new_pages"]) * _PAGE_BYTES)
            yield f"    ~ {one['pid']} {units.clean(one['comm'])}  pages: {', '.join(words)} ({size})"
