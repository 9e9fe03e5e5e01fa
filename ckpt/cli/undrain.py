"""`ckpt undrain`."""

from __future__ import annotations

from typing import Any

import click

from ckpt.cli import moving
from ckpt.cli.common import Session, verb
from ckpt.cli.drain import DRAIN_FIELDS, show
from ckpt.errors import UsageError


@verb(
    "undrain",
    fields=DRAIN_FIELDS,
    examples=(
        ("ckpt undrain", "bring back all that ckpt drain moved away"),
        ("ckpt undrain --only web --precopy", "only web, with little downtime"),
        ("ckpt undrain --dry-run", "say what would come back from where"),
    ),
)
@click.option("--only", multiple=True, metavar="NAME", help="Only this one. Repeatable.")
@click.option("--parallel", type=click.IntRange(1, 64), default=4, metavar="N", help="So many at a time (default 4).")
@click.option("--allow", multiple=True, metavar="KIND:VALUE", help="What they may have here beyond this host's policy: cap:SYS_ADMIN. Repeatable.")
@click.option("--dry-run", is_flag=True, help="Say what would come back, do nothing.")
@moving.options
def command(session: Session, only: tuple[str, ...], parallel: int, allow: tuple[str, ...], dry_run: bool, **given: Any) -> int:
    """Bring back what ckpt drain moved away from this host.

    This host fetches each container over its own ssh to the host where it is: that one needs no way to this one. It is a migration like
    every other: one live copy, and when it fails the container runs on where it is. What comes is judged by this host's policy, as a
    checkpoint from elsewhere is; --allow lets it have more. What was removed or renamed there is told and left.

    After an interruption give the same command again. --bwlimit holds for each container.
    """
    taken = moving.take(given)
    moving.migrate_options(session, taken)
    if moving.reached(session, None, taken) is not None or taken["direct"] or taken["streams"] > 1:
        raise UsageError("--direct and --streams do not go with undrain: each container comes over one ssh")
    if allow:
        from ckpt.ops import policy

        policy.Allowed.parse(allow)
    session.need_root()
    from ckpt.ops import undrain as use_case

    passed, this = {**taken, "bwlimit_bytes_s": None, "ssh_options": ()}, click.get_current_context().command
    request = use_case.UndrainRequest(
        only,
        parallel,
        taken["bwlimit_bytes_s"] or None,
        tuple(moving.words(this, passed, server=False)),
        tuple(moving.words(this, moving.for_group(passed), server=False)),
        (*session.settings.ssh_options, *taken["ssh_options"]),
        allow,
    )
    return show(session, use_case.undrain(request, dry_run=dry_run, store_root=session.store_root, emit=session.emit))
