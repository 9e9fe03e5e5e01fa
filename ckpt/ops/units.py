"""The texts of ckpt's systemd units and drop-ins (systemd.unit(5), systemd.service(5), systemd.timer(5)).

At shutdown systemd stops in the reverse order of starting: what is `Before=ckpt-hibernate.service` is stopped after it has saved.
The scopes that the engines make are transient and have no file of their own; a drop-in for the beginning of their names
(`libpod-.scope.d`) reaches them all, also those that run already.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from ckpt.ops.hibernate.settings import HibernateSettings

HEADER: Final = "# made by ckpt install-units"
"""The first line of every file: what lacks it is not ours."""
HIBERNATE: Final = "ckpt-hibernate.service"
RESUME: Final = "ckpt-resume.service"
UNGUARD: Final = "ckpt-unguard.service"
ARM_SERVICE: Final = "ckpt-arm@.service"
ARM_TIMER: Final = "ckpt-arm@.timer"
DROP_IN: Final = "10-ckpt.conf"
MARGIN_S: Final = 60.0
"""On top of shutdown_timeout_s: for what was begun just before it is over, and for ckpt's own start."""
JOB_LIMIT_S: Final = 1800.0
"""systemd's own reboot.target and poweroff.target force the machine down after 30 minutes (JobTimeoutSec=)."""
RESUME_LIMIT_S: Final = 900.0
SCOPES: Final = ("libpod-", "runc-", "crun-", "ckpt-")
"""How the scopes begin that podman (also conmon's), runc and crun with systemd's cgroups, and ckpt itself make."""
SERVICES: Final = ("container-", "pod-")
"""How the units of `podman generate systemd` begin."""
QUADLET: Final = Path("etc/containers/systemd")
"""podman-systemd.unit(5): here container.d and pod.d have drop-ins for all *.container and *.pod units."""

_ENGINES: Final = "podman.service docker.service containerd.service crio.service"
_COLD: Final = "podman-restart.service podman-auto-update.service podman.service"
"""What starts containers by itself after a boot (units with containers of their own get a drop-in when they are saved)."""


def quoted(word: str) -> str:
    """A word of a command line in a unit: specifiers and variables are no such, blanks stay inside (systemd.service(5), COMMAND LINES)."""
    made = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{made}"' if made == "" or any(char in " \t'\";" for char in word) else made


def command(argv: Sequence[str], *words: str) -> str:
    """A command line for `ExecStart=`; `words` may have specifiers."""
    return " ".join([*(quoted(word) for word in argv), *words])


def stop_limit_s(settings: HibernateSettings) -> float:
    """How long systemd must let the save take."""
    return settings.shutdown_timeout_s + settings.stop_timeout_s + MARGIN_S


def resume_limit_s(settings: HibernateSettings) -> float:
    """How long the boot waits for the resume at most; while it goes on well it asks for more."""
    return max(RESUME_LIMIT_S, settings.shutdown_timeout_s * 2)


def _paths(paths: Sequence[Path]) -> str:
    return " ".join(quoted(str(path)) for path in paths)


def hibernate(argv: Sequence[str], environment: str, settings: HibernateSettings, mounts: Sequence[Path]) -> str:
    """The safety net: does nothing until the host goes down, then saves. A stop or restart of this unit alone saves nothing."""
    return f"""{HEADER}
[Unit]
Description=Save running containers and process trees when this host goes down
Documentation=man:ckpt-hibernate(1)
# Stopped before all of these, so that they are still there for the save.
After=local-fs.target remote-fs.target network.target network-online.target dbus.socket dbus.service
After={_ENGINES} podman-restart.service {RESUME}
RequiresMountsFor={_paths(mounts)}

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStop={command(argv, "hibernate", "save", "--at-shutdown")}
{environment}TimeoutStopSec={stop_limit_s(settings):.0f}
NotifyAccess=all
# What watches over a dump must outlive the one that it watches.
KillMode=process
TasksMax=infinity

[Install]
WantedBy=multi-user.target
"""


def resume(argv: Sequence[str], environment: str, settings: HibernateSettings, mounts: Sequence[Path]) -> str:
    """Brings back what was saved, before anything can start it cold."""
    return f"""{HEADER}
[Unit]
Description=Bring back the containers and process trees that were saved before this boot
Documentation=man:ckpt-hibernate(1)
Wants=network-online.target
After=local-fs.target remote-fs.target network-online.target nss-lookup.target dbus.socket
After=apparmor.service nftables.service firewalld.service ufw.service podman-clean-transient.service
After=docker.service containerd.service crio.service
Before={_COLD}
RequiresMountsFor={_paths(mounts)}

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart={command(argv, "hibernate", "resume", "--at-boot")}
# 100: done, with warnings.
SuccessExitStatus=100
{environment}TimeoutStartSec={resume_limit_s(settings):.0f}
NotifyAccess=all
# What was restored, and what watches over it, stays when this fails or ends.
KillMode=process
Delegate=yes
TasksMax=infinity

[Install]
WantedBy=multi-user.target
"""


def unguard(argv: Sequence[str], environment: str) -> str:
    """Removes the drop-ins of a resume when the boot is over: until then the units that wait for it must be skipped."""
    return f"""{HEADER}
[Unit]
Description=Let units start again whose containers ckpt has brought back
Documentation=man:ckpt-install-units(1)
After={RESUME} multi-user.target graphical.target default.target

[Service]
Type=oneshot
ExecStart={command(argv, "install-units", "--unguard")}
{environment}TimeoutStartSec=60
"""


def arm_service(argv: Sequence[str], environment: str) -> str:
    """One periodic checkpoint; the instance is the target, as systemd-escape(1) has it."""
    return f"""{HEADER}
[Unit]
Description=Checkpoint of %I while it runs on
Documentation=man:ckpt-arm(1)
After={RESUME} local-fs.target

[Service]
Type=oneshot
ExecStart={command(argv, "arm", "--run", "%I")}
# Broken off, as at a shutdown.
SuccessExitStatus=143
{environment}TimeoutStartSec=3600
NotifyAccess=all
KillMode=process
Nice=5
"""


def arm_timer() -> str:
    """The times of an instance are in its drop-in; these are for one that was started by hand."""
    return f"""{HEADER}
[Unit]
Description=Periodic checkpoints of %I
Documentation=man:ckpt-arm(1)

[Timer]
OnActiveSec=1s
OnUnitActiveSec=15min
AccuracySec=1s

[Install]
WantedBy=timers.target
"""


def arm_times(every_s: float) -> str:
    """The drop-in of one target's timer: at once (after a boot: when its start is over), then every so often."""
    return f"{HEADER}\n[Timer]\nOnActiveSec=\nOnActiveSec=1s\nOnUnitActiveSec={every_s:.0f}s\n"


def stopped_later() -> str:
    """The drop-in for what must still run when ckpt-hibernate.service saves."""
    return f"{HEADER}\n[Unit]\nBefore={HIBERNATE}\n"


def quadlet() -> str:
    """The drop-in for all of podman's *.container units: they start when the resume is over, and are stopped after the save."""
    return f"{HEADER}\n[Unit]\nAfter={RESUME}\nBefore={HIBERNATE}\n"
