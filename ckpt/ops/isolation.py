"""`ckpt restore --isolated`: what a copy for analysis must not share with anybody."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ckpt.archive.layout import SPEC
from ckpt.archive.manifest import json_object
from ckpt.archive.wants import want
from ckpt.errors import PolicyRefused, UsageError
from ckpt.model import Capabilities, Manifest, RestoreOptions
from ckpt.ops.policy import Allowed


def settled(options: RestoreOptions, manifest: Manifest, can: Capabilities) -> RestoreOptions:
    """The options of an isolated restore with what follows from that: a name, no hooks, connections closed.

    Raises:
        UsageError: something was asked for that does not go with it.
    """
    if not options.isolated:
        return options
    if not can.isolates:
        raise UsageError(f"{manifest.engine} cannot restore without network", hint="--isolated is for containers of podman")
    if options.publish or options.pod or options.tcp_established:
        raise UsageError("--isolated is without network: it does not go with --publish, --pod and --tcp-established")
    return replace(options, name=options.name or f"{manifest.name}-isolated", hooks=False, tcp_close=True, tcp_established=None)


def require(stage: Path, options: RestoreOptions, manifest: Manifest) -> None:
    """Refuse directories of this host that the copy could write to, unless `--allow mount:DIR` says so.

    Raises:
        PolicyRefused: there is one; nothing was touched.
    """
    if not options.isolated:
        return
    allowed = Allowed.parse(options.allow)
    spec = json_object((stage / SPEC).read_bytes(), SPEC)
    read_only = {str(mount.get("destination")) for mount in spec.get("mounts") or [] if "ro" in (mount.get("options") or [])}
    for mount in manifest.host_mounts:
        if mount.destination not in read_only and not allowed.covers(want("mount", mount.source, "", "")):
            raise PolicyRefused(
                f"an isolated {manifest.name} could write to {mount.source} of this host ({mount.destination})",
                where="nothing was touched",
                hint=f"--allow mount:{mount.source} shares it nevertheless",
            )
