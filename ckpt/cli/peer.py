"""`ckpt peer`: what ckpt on another host starts here over ssh. Not for people."""

from __future__ import annotations

from ckpt.cli.common import Session, verb


@verb("peer")
def command(session: Session) -> int:
    """Serve a ckpt on another host, on stdin and stdout."""
    session.need_root()
    session.reporter.results = False  # stdout belongs to the protocol
    from ckpt.ops import migrate_dest
    from ckpt.peer import server

    return server.main(migrate_dest.handlers(session.store_root), concurrent=migrate_dest.CONCURRENT)


command.hidden = True
