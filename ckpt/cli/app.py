"""The top of the command tree. Verbs are loaded when they are used."""

from __future__ import annotations

from typing import Final

import click

from ckpt import __version__
from ckpt.cli.common import LazyGroup, global_options

VERBS: Final = {
    "checkpoint": "ckpt.cli.checkpoint",
    "restore": "ckpt.cli.restore",
    "export": "ckpt.cli.export",
    "import": "ckpt.cli.import_",
    "migrate": "ckpt.cli.migrate",
    "drain": "ckpt.cli.drain",
    "undrain": "ckpt.cli.undrain",
    "watch": "ckpt.cli.watch",
    "check": "ckpt.cli.check",
    "list": "ckpt.cli.list_",
    "inspect": "ckpt.cli.inspect",
    "verify": "ckpt.cli.verify",
    "diff": "ckpt.cli.diff",
    "snapshot": "ckpt.cli.snapshot",
    "rewind": "ckpt.cli.rewind",
    "clone": "ckpt.cli.clone",
    "run": "ckpt.cli.run",
    "reboot": "ckpt.cli.reboot",
    "hibernate": "ckpt.cli.hibernate",
    "copy": "ckpt.cli.copy",
    "prune": "ckpt.cli.prune",
    "tag": "ckpt.cli.tag",
    "note": "ckpt.cli.note",
    "pin": "ckpt.cli.pin",
    "arm": "ckpt.cli.arm",
    "disarm": "ckpt.cli.disarm",
    "install-units": "ckpt.cli.install_units",
    "serve": "ckpt.cli.serve",
    "jobs": "ckpt.cli.jobs",
    "rm": "ckpt.cli.rm",
    "peer": "ckpt.cli.peer",
    "guard": "ckpt.cli.guard",
}
"""Verb -> module, in the order of the help. The module's `command` is the verb."""
HIDDEN: Final = frozenset({"peer", "guard"})


@click.group(cls=LazyGroup, no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@global_options
@click.version_option(__version__, "-V", "--version", prog_name="ckpt", message="%(prog)s %(version)s")
def app(**options: object) -> None:
    """Save running containers and process trees with CRIU, bring them back, and move them between hosts.

    A TARGET is a container's name or id (web), with its engine where that is not clear (podman:web, runc:web), or a process tree
    (pid:1234). A CHECKPOINT in the store is web (the newest of web), web@2, or an id.
    """


assert isinstance(app, LazyGroup)
app.verbs, app.hidden_verbs = VERBS, HIDDEN
