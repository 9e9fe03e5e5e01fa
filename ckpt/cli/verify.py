"""`ckpt verify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click

from ckpt.cli import completion
from ckpt.cli.common import Session, one_way, verb
from ckpt.cli.protection import incoming, incoming_options
from ckpt.cli.render import units
from ckpt.cli.render.rows import Row
from ckpt.errors import UsageError


@verb(
    "verify",
    examples=(
        ("ckpt verify web@2 ./web.tar.zst", "a checkpoint of the store, and an archive"),
        ("ckpt verify --deep web", "parse everything in it, too"),
        ("ckpt verify --verify-with allowed_signers ./web.tar.zst", "and that somebody known signed it"),
        ("ckpt verify --chain web", "the snapshots of web: none missing, exchanged or out of order"),
        ("ckpt verify --all", "the whole store; exit status 31 when any is damaged"),
    ),
)
@click.argument("refs", nargs=-1, metavar="[CHECKPOINT|FILE]...", shell_complete=completion.checkpoints_or_files)
@click.option("-a", "--all", "every", is_flag=True, help="Every checkpoint in the store.")
@click.option("--deep", is_flag=True, help="Parse the CRIU images, the configuration and the files as well.")
@click.option("--chain", metavar="CASE", help="The snapshots of a case, or of a container's name (ckpt snapshot), as a chain.")
@incoming_options
def command(session: Session, refs: tuple[str, ...], every: bool, deep: bool, chain: str | None, **protection: Any) -> int:
    """Verify that checkpoints and archives are whole.

    Every byte is read and compared with the digests in the manifest. An archive of podman has none: of it only the compressor's checksums
    are verified, and with --deep all that can be parsed.
    """
    if chain is not None:
        if refs or every or deep:
            raise UsageError("--chain stands for itself: no checkpoints, no --all, no --deep")
        from ckpt.ops import snapshot

        outcome = snapshot.verify_chain(chain, incoming=incoming(session, protection), store_root=session.store_root, emit=session.emit)
        return session.finish([outcome], id_of="checkpoint", table=_chains)
    one_way(refs, every=every, what="checkpoint")
    from ckpt.ops import verify as use_case

    outcomes = use_case.verify(refs, all=every, deep=deep, incoming=incoming(session, protection), store_root=session.store_root, emit=session.emit)
    return session.finish(outcomes, id_of="checkpoint", table=_lines)


def _chains(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        stats = row["stats"]
        signed = f", signed by {units.clean(stats['signature'])}" if stats["signature"] else ", signatures not checked"
        yield f"{units.clean(row['name'])}: ok, {units.plural(stats['number'], 'snapshot')}{signed}, the last is {stats['digest']}"


def _lines(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        stats = row["stats"]
        digests = "digests equal" if stats["digests"] == "equal" else "no digests"
        words = [units.plural(stats["members"], "member"), units.size(stats["size_bytes"]), digests]
        if stats["deep"]:
            words.append("content parsed")
        if stats["signature"] != "none":
            words.append(f"signature {units.clean(stats['signature'])}")
        yield f"{units.clean(row['name'])}: ok, {', '.join(words)}"
