"""`ckpt reboot`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli.common import Session, verb
from ckpt.cli.hibernate_save import PLAN_FIELDS, make_wish, save_options, show_plan, show_saved
from ckpt.cli.render.rows import OUTCOME_FIELDS
from ckpt.errors import UsageError

if TYPE_CHECKING:
    from ckpt.host.systemd import Kind


@verb(
    "reboot",
    fields=(*OUTCOME_FIELDS, *(field for field in PLAN_FIELDS if field not in OUTCOME_FIELDS)),
    examples=(
        ("ckpt reboot", "save all, reboot; after the boot all of it goes on"),
        ("ckpt reboot --dry-run", "what would be saved, and what stands in the way"),
        ("ckpt reboot --kexec", "into the kernel that kexec -l has loaded"),
        ("ckpt reboot --best-effort", "reboot even if something cannot be saved"),
        ("ckpt reboot --no-reboot web", "save web for the next boot, whoever lets it come"),
    ),
)
@partial(save_options, verify=True)
@click.option("--kexec", is_flag=True, help="By kexec, into the kernel that is loaded for it.")
@click.option("--poweroff", is_flag=True, help="Switch the host off instead; all comes back when it is started again.")
@click.option("--no-reboot", is_flag=True, help="Save only.")
def command(session: Session, kexec: bool, poweroff: bool, no_reboot: bool, **given: Any) -> int:
    """Reboot this host, and lose nothing: its containers and process trees are saved, and go on after the boot.

    All of them are looked at first, and saved side by side, as ckpt hibernate save does it. When something cannot be saved nothing is
    touched and there is no reboot (exit status 20), unless --best-effort. After the boot a unit (ckpt install-units) brings everything back
    before anything can start it anew; ckpt hibernate status tells what became of each.
    """
    if sum((kexec, poweroff, no_reboot)) > 1:
        raise UsageError("give one of --kexec, --poweroff and --no-reboot")
    kind: Kind = "kexec" if kexec else "poweroff" if poweroff else "reboot"
    wish, settings = make_wish(session, "manual" if no_reboot else kind, given)
    if given["dry_run"]:
        return show_plan(session, wish, settings)
    if no_reboot:
        from ckpt.ops.hibernate import save

        saved = save.save(wish, settings=settings, store_root=session.store_root, emit=session.emit)
    else:
        from ckpt.ops.hibernate import reboot

        saved = reboot.reboot(wish, kind, settings=settings, store_root=session.store_root, emit=session.emit)
    return show_saved(session, saved, wish)
