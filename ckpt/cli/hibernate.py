"""`ckpt hibernate`: what belongs to saving a host before it goes down; each of its verbs is a file of its own."""

from __future__ import annotations

from typing import Final

import click

from ckpt.cli.common import LazyGroup, global_options

VERBS: Final = {
    "save": "ckpt.cli.hibernate_save",
    "resume": "ckpt.cli.hibernate_resume",
    "status": "ckpt.cli.hibernate_status",
    "arm": "ckpt.cli.arm",
}


@click.group("hibernate", cls=LazyGroup, no_args_is_help=False)
@global_options
def command(**options: object) -> None:
    """Save this host's workloads before it goes down, bring them back, and tell what became of them.

    ckpt hibernate save saves, ckpt hibernate resume brings back after the boot (ckpt install-units lets units do both), and ckpt hibernate
    status tells of the newest. ckpt reboot saves and reboots. What is meant and how is said by labels (ckpt.reboot=save, stop or ignore) and
    in /etc/ckpt/hibernate.toml.
    """


assert isinstance(command, LazyGroup)
command.verbs = VERBS
