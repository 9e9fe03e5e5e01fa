"""`ckpt list`."""

from __future__ import annotations

import time

import click

from ckpt.cli import completion, drained
from ckpt.cli.common import Session, verb
from ckpt.cli.render.rows import CHECKPOINT_FIELDS, checkpoint_row
from ckpt.cli.render.tables import checkpoint_lines
from ckpt.errors import UsageError


@verb(
    "list",
    fields=CHECKPOINT_FIELDS,
    examples=(
        ("ckpt list", "all"),
        ("ckpt list web --format '{{.Ref}} {{.SizeBytes}}'", "those of web, chosen fields"),
        ("ckpt list -f tag=good -f since=2d --sort created", "tagged good and no older than two days"),
    ),
)
@click.argument("name", required=False, shell_complete=completion.checkpoints)
@click.option(
    "-f", "--filter", "filters", multiple=True, metavar="KEY=VALUE",
    help="Only those with this name, engine, runtime, host, image, container, tag, origin or pinned (* matches anything), "
    "or made since=TIME or before=TIME. Repeatable.",
)  # fmt: skip
@click.option("--sort", metavar="ORDER", default="name", help="name (default), created, size, unique or engine.")
@click.option("-r", "--reverse", is_flag=True, help="The other way round.")
def command(session: Session, name: str | None, filters: tuple[str, ...], sort: str, reverse: bool) -> int:
    """List the checkpoints in the store, by name, oldest first.

    SIZE is what a checkpoint is unpacked, ON DISK what it takes in the store, with what it shares with others.
    """
    from ckpt.ops import list_ as use_case
    from ckpt.ops.rewind import parse_time

    pairs: list[tuple[str, str]] = []
    times: dict[str, float] = {}
    for text in filters:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"{text[:64]!r} is no filter", hint="KEY=VALUE, say tag=good")
        if key in ("since", "before"):
            times[f"{key}_s"] = parse_time(value, time.time())
        else:
            pairs.append((key, value))
    listed = use_case.list_(
        store_root=session.store_root,
        name=name,
        filters=pairs,
        since_s=times.get("since_s"),
        before_s=times.get("before_s"),
        sort=sort,
        reverse=reverse,
        sizes=not session.reporter.quiet,
    )
    session.reporter.show([checkpoint_row(one.checkpoint, one.unique_bytes, one.shared_bytes) for one in listed], table=checkpoint_lines)
    for broken in use_case.broken(store_root=session.store_root):
        session.reporter.warning(f"{broken.directory} cannot be read: {broken.reason}")
    drained.warn(session)
    return 0
