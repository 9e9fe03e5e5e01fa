"""Save everything, then let the host go down: by a reboot, by kexec into the next kernel, or for good."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from ckpt.errors import CkptError, FeatureMissing
from ckpt.events import Emit, Notice
from ckpt.host import systemd
from ckpt.ops import faults
from ckpt.ops.hibernate.plan import Wish
from ckpt.ops.hibernate.save import Saved, save
from ckpt.ops.hibernate.settings import HibernateSettings
from ckpt.store.job import DEFAULT_ROOT

KEXEC_LOADED: Final = Path("/sys/kernel/kexec_loaded")
RESUME_UNIT: Final = "ckpt-resume.service"


def ready(kind: systemd.Kind, settings: HibernateSettings, emit: Emit) -> None:
    """Whether this host can go down so, and brings everything back when it is up again; asked before anything is touched.

    Raises:
        FeatureMissing: no systemd, or no kernel loaded for kexec.
    """
    systemd.need()
    if kind == "kexec" and _text(KEXEC_LOADED) != "1":
        raise FeatureMissing("no kernel is loaded for kexec", where="nothing was touched", hint="kexec -l KERNEL --initrd=… --reuse-cmdline")
    try:
        systemd.control("is-enabled", "--quiet", RESUME_UNIT)
        comes_back = settings.on_boot == "restore"
    except CkptError:
        comes_back = False
    if not comes_back:
        said = "nothing will come back by itself after the boot: ckpt hibernate resume does it (ckpt install-units: at every boot)"
        emit(Notice("", said, warning=True))


def reboot(
    wish: Wish, kind: systemd.Kind, *, settings: HibernateSettings, store_root: Path = DEFAULT_ROOT, emit: Emit
) -> Saved:
    """Save what is meant and go down.

    Raises:
        CkptError: as `save` and `ready`; or all is saved, and the host refuses to go down.
    """
    ready(kind, settings, emit)
    saved = save(wish, settings=settings, store_root=store_root, emit=emit)
    faults.point("hibernate-reboot")
    try:
        systemd.reboot(kind)
    except CkptError as error:
        raise type(error)(
            f"everything is saved, but this host does not go down: {error.message}",
            where=f"hibernation {saved.hibernation} waits for the next boot",
            hint=f"systemctl {kind}; or take it back: ckpt hibernate resume --same-boot",
        ) from error
    return saved


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
