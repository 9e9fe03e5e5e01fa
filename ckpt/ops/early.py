"""The engine's own share of a migration's dump and restore, done while the workload still runs (`engines.base.StartsEarly`).

For podman that is half of the pause of a small container: its export on the source, and on the destination everything that it does before
the runtime restores. It is done only where the container's twin, which stands ready without a process in it, cannot be in the way of
the original: not on a network that both hosts share, where it would answer for the same addresses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from ckpt.archive import layout
from ckpt.archive import manifest as manifest_file
from ckpt.engines.base import Engine, HeldDump, SketchedDump, StartsEarly
from ckpt.errors import DumpFailed
from ckpt.model import Container, DumpOptions, HostFacts
from ckpt.ops import capture
from ckpt.peer.client import Peer
from ckpt.store.job import Job


class EarlyStart:
    """Of one migration, on the source."""

    def __init__(self, engine: Engine, container: Container) -> None:
        self._engine = engine
        self._container = container
        self.begun = False
        """The destination stands ready: the dump may be a sketched one."""
        self.digests: dict[str, str] = {}
        """Of the members that the destination has already."""

    def possible(self, report: dict[str, Any]) -> bool:
        """Whether both ends can; `report` is the destination's."""
        if not (self._engine.probe().early and report.get("early")):
            return False
        details = getattr(self._engine, "network_details", None)
        here = details(self._container.networks) if details is not None and self._container.networks else {}
        there = report.get("network_details") or {}
        return all((known.get(name) or {"shared": True})["shared"] is False for known in (here, there) for name in self._container.networks)

    def begin(self, peer: Peer, stage: Path, options: DumpOptions, host: HostFacts, job: Job, args: dict[str, Any]) -> None:
        """Sketch the container, send that, and let the destination begin.

        Raises:
            CkptError: it cannot be restored there.
        """
        if not cast(StartsEarly, self._engine).sketch(self._container, stage, job):
            return
        members = [name for name in layout.stage_members(stage) if (stage / name).is_file()]
        with peer.upload("stage") as upload:
            upload.send_stage(stage, members)
        self.digests = {name: f"sha256:{digest}" for name, digest in upload.digests.items()}
        manifest = capture.describe(stage, self._container, options, host=host, digests=self.digests)
        peer.call("prepare", {"manifest": manifest_file.dumps(manifest).decode(), **args})
        self.begun = True

    def after_dump(self, peer: Peer, held: HeldDump, stage: Path) -> None:
        """The tree is frozen: when a sketch will not do after all, go back to the whole dump.

        Raises:
            DumpFailed: the container was changed since it was sketched.
        """
        sketched = cast(SketchedDump, held)
        if self.begun and sketched.needs_more():
            self.begun = False
            peer.call("prepare", {"undo": True})
            sketched.complete(stage)
            if any(layout.digest_file(stage / name) != digest for name, digest in self.digests.items()):
                raise DumpFailed(f"{self._container.name} was changed while it was migrated", hint="try again")

    def confirm(self, held: HeldDump, stage: Path) -> None:
        """Before the point of no return: the container is still what the sketch says. Raises DumpFailed."""
        if self.begun:
            cast(SketchedDump, held).confirm(stage)
