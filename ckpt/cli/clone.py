"""`ckpt clone`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, dump_options, timeout_option, verb
from ckpt.model import RestoreOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ckpt.ops.clone import Copy


@verb(
    "clone",
    examples=(
        ("ckpt clone web -n web-{1..8}", "eight copies of web as it is now; it runs on"),
        ("ckpt clone web --count 8", "the same"),
        ("ckpt clone web@warm -n a -n b", "two copies of a checkpoint"),
        ("ckpt clone web --count 8 -p 8080-8087:80", "each with a port of the host"),
    ),
)
@click.argument("ref", metavar="NAME|CHECKPOINT", shell_complete=completion.checkpoints)
@click.argument("more", nargs=-1, metavar="[COPY]...")
@click.option("-n", "--name", "given", multiple=True, metavar="NAME", help="The name of a copy; braces are expanded. Can be repeated.")
@click.option("--count", type=int, metavar="N", help="N copies: NAME-1 to NAME-N.")
@click.option(
    "-p", "--publish", multiple=True, metavar="PORTS",
    help="Publish a port of each copy: [IP:]8080-8087:80[/PROTOCOL], one port of the host for each; 80: ports that are free. Default: none.",
)  # fmt: skip
@click.option("--whole", is_flag=True, help="Restore all memory at once, not shared with the other copies.")
@click.option("--fill", is_flag=True, help="Start each copy at once and bring all its memory behind it, not only what it touches.")
@click.option("--parallel", type=click.IntRange(1, 64), metavar="N", help="So many at a time (default: two for each processor).")
@click.option("--fail-fast", is_flag=True, help="All or none: when one copy fails, remove those that came.")
@timeout_option
def command(
    session: Session,
    ref: str,
    more: tuple[str, ...],
    given: tuple[str, ...],
    count: int | None,
    publish: tuple[str, ...],
    whole: bool,
    fill: bool,
    parallel: int | None,
    fail_fast: bool,
    timeout_s: float | None,
) -> int:
    """Make copies of a running container, or of a checkpoint.

    A running container is saved first (tagged clone) and runs on. The copies come side by side, with new names and addresses, the
    original's host name, and no published ports but those of -p. Their established TCP connections are closed; volumes are shared.

    A copy starts at once, and gets of its memory only what it touches: the rest stays in one place for all copies.
    """
    from ckpt.errors import UsageError
    from ckpt.ops import copies

    if whole and fill:
        raise UsageError("--whole and --fill exclude each other")
    typed = (*given, *more)  # `-n web-{1..8}`, unquoted, is one option and seven words
    if more and not given:
        raise UsageError(f"what is {more[0]!r}?", hint="-n goes before the copies' names")
    copies.names(typed, "copy", count)  # before anything is touched
    session.need_root()
    from ckpt.ops import clone as use_case

    def wanted(original: str) -> Sequence[Copy]:
        names = copies.names(typed, original, count)
        return [use_case.Copy(name, ports) for name, ports in zip(names, copies.ports(publish, len(names)), strict=True)]

    wanted("copy")
    dump = dump_options(session, timeout_s=timeout_s)
    options = RestoreOptions(lazy=not whole, on_demand=not whole and not fill, timeout_s=dump.timeout_s, allow=tuple(session.settings.allow))
    outcomes = use_case.clone(
        ref, wanted, dump=dump, options=options, width=parallel or 0, all_or_none=fail_fast, store_root=session.store_root, emit=session.emit
    )
    return session.finish(outcomes)
