"""`ckpt peer`: what ckpt on another host starts here over ssh. Not for people."""

from __future__ import annotations

import click

from ckpt.cli.common import Session, verb


@verb("peer")
@click.option("--join", "path", metavar="SOCKET", help="Carry content for the peer that listens on this socket.")
@click.option("--both", is_flag=True, help="With --join: be a link of a ckpt migrate that listens there, which writes, too.")
@click.option("--ask", is_flag=True, help="Answer questions only.")
@click.option("--guest", is_flag=True, help="Who asks is not root here: this host's policy judges what comes.")
@click.option("--allow", multiple=True, metavar="KIND:VALUE", help="What that policy lets it have besides.")
def command(session: Session, path: str | None, both: bool, ask: bool, guest: bool, allow: tuple[str, ...]) -> int:
    """Serve a ckpt on another host, on stdin and stdout."""
    session.need_root()
    session.reporter.results = False  # stdout belongs to the protocol
    if path is not None:
        from ckpt.peer import streams

        return streams.lend(path, both=both)
    from ckpt.ops import migrate_dest
    from ckpt.peer import server

    handlers = migrate_dest.handlers(session.store_root, trusted=not guest, allow=(*session.settings.allow, *allow))
    if ask:
        handlers = {name: handler for name, handler in handlers.items() if name in migrate_dest.QUESTIONS}
    return server.main(handlers, concurrent=migrate_dest.CONCURRENT)


command.hidden = True
