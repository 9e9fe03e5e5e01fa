"""The promise of an engine: the protocol that every file in this room fulfils (tests/contract checks it)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from ckpt.archive.wants import Profile
from ckpt.host.run import Process, Result
from ckpt.model import Capabilities, Container, ContainerImage, DumpOptions, Finding, Manifest, RestoreOptions
from ckpt.store.job import Job

MutateFs = Callable[[Path], None]


class HeldDump(Protocol):
    """A dump held at CRIU's `post-dump`: the tree is frozen, its network locked, every CRIU image is written.

    Exactly one of `resume` and `end` is called. A held dump whose owner dies is decided by the job's journal.
    """

    def resume(self) -> None:
        """The source goes on as if nothing had been. Raises StateUnknown when it cannot be made sure."""

    def end(self) -> None:
        """The source ends (SIGKILL by CRIU); the engine knows it as exited. Returns when it is gone."""


class HeldRestore(Protocol):
    """A restore held at CRIU's `post-restore`: the tree is there, frozen, its network locked."""

    init_pid: int
    """Its first process as this host numbers it; 0 where that cannot be told."""

    def resume(self) -> Container:
        """Let it run; returns the running container. Raises RestoreFailed when it ended instead."""

    def abort(self) -> None:
        """Kill the restored tree and remove all that the restore made. Never raises for what is gone already."""


class Engine(Protocol):
    """One kind of workload on *this* host. Stateless: every call asks the real engine.

    The *stage* is a directory in podman's archive layout, unpacked (facts: podman's `--export`): `checkpoint/` (CRIU
    images), `config.dump`, `spec.dump`, `network.status`, `devshm-checkpoint.tar`, `stats-dump`, `rootfs-diff.tar`,
    `deleted.files`, `volumes/NAME.tar`, `artifacts/ckpt.json`. `dump` writes what only the engine knows (`checkpoint/`,
    `*.dump`, `network.status`, devshm, `ctr.log`); rootfs diff, volumes and manifest are written by ops while the dump is held.
    """

    name: str

    def probe(self) -> Capabilities:
        """What can be done here; never raises."""

    def containers(self) -> list[Container]:
        """All containers of this engine, cheap fields only (engine, id, name, state)."""

    def find(self, name: str) -> list[Container]:
        """Containers whose name is `name` or whose id begins with it (several: ambiguous)."""

    def describe(self, container: Container) -> Container:
        """The container with every field filled. Raises TargetNotFound when it is gone."""

    def preflight(self, container: Container, options: DumpOptions) -> list[Finding]:
        """What only this engine knows about being dumpable (runtime able to checkpoint, --rm, dependencies); touches nothing."""

    def dump(self, container: Container, stage: Path, options: DumpOptions, job: Job) -> HeldDump:
        """Freeze and dump into `stage`, return held. Raises DumpFailed with the container running again."""

    def adopt(self, container: Container, job: Job) -> HeldDump:
        """The held dump of a job whose first owner is gone (`migrate --continue`)."""

    def restore(
        self, stage: Path, manifest: Manifest, options: RestoreOptions, job: Job, *, rootfs_ready: MutateFs, volume_ready: Callable[[str, Path], None]
    ) -> HeldRestore:
        """Restore from `stage` and return held.

        Args:
            rootfs_ready: called with the container's mounted root before CRIU starts; applies the rootfs diff.
            volume_ready: called with (name, directory) for each named volume that was created; fills it.

        Raises:
            RestoreFailed: with everything it made removed again.
        """

    def remove(self, container: Container) -> None:
        """Remove a container that does not run. Raises BusyError when it does."""

    def rollback(self, job: Job) -> None:
        """Undo what a dead owner of `job` left behind in the engine (held trees, half-made containers). Idempotent."""


class EarlyRestore(Protocol):
    """A restore that stands ready, but for what the dump brings."""

    def root(self) -> Path:
        """The container's mounted root: what is not the dump's can be brought there before `hold`."""

    def hold(self, rootfs_ready: MutateFs) -> HeldRestore:
        """The rest of `Engine.restore`; the stage is complete now."""

    def abort(self) -> None:
        """Remove all that it made. Idempotent."""


class SketchedDump(Protocol):
    """What a held dump with `DumpOptions.sketched` offers besides."""

    def needs_more(self) -> bool:
        """Whether the container has by now what a sketch cannot have (files in /dev/shm); asked once, right after the dump."""

    def complete(self, stage: Path) -> None:
        """Wait for the engine, and write into the stage what it says now. Raises DumpFailed."""

    def confirm(self, stage: Path) -> None:
        """Wait for the engine. Raises DumpFailed when what it says is not what the sketch in the stage says."""


class StartsEarly(Protocol):
    """What an engine with `Capabilities.early` offers besides: its own share of dump and restore is done while the workload still runs."""

    def sketch(self, container: Container, stage: Path, job: Job) -> bool:
        """Write into the stage what only the engine knows, without a dump. False: this container cannot be restored from that."""

    def begin_restore(
        self, stage: Path, manifest: Manifest, options: RestoreOptions, job: Job, *, volume_ready: Callable[[str, Path], None]
    ) -> EarlyRestore:
        """`Engine.restore` as far as a sketch goes. Raises RestoreFailed, with everything it made removed again."""


@runtime_checkable
class Startable(Protocol):
    """What an engine with `Capabilities.startable` offers besides: its containers can be started anew, and ended, without a checkpoint."""

    def start(self, container: Container) -> Container:
        """Start it cold, as its engine does after a boot: from its beginning, with the root file system that it has.

        Raises:
            RestoreFailed: it could not be started; it is as before.
        """

    def stop(self, container: Container, timeout_s: float) -> None:
        """End it as its engine does: its stop signal, and SIGKILL after `timeout_s`. Returns when it has ended; nothing for one that has.

        Raises:
            StateUnknown: it is still there.
        """


@runtime_checkable
class ChecksHealth(Protocol):
    """What an engine offers besides whose containers may bring a check of their health (`healthcheck` in config.dump)."""

    def healthy(self, container: Container) -> bool:
        """Run that check once, in the container."""


@runtime_checkable
class RunsNew(Protocol):
    """What an engine offers besides that starts a container from nothing, by arguments of its own command line."""

    def run_command(self, name: str, arguments: Sequence[str], publish: Sequence[str]) -> list[str]:
        """The command line that starts it in the background."""

    def run_new(self, name: str, command: Sequence[str]) -> Container:
        """Start it by a command line of `run_command`. Raises RestoreFailed, with everything it made removed again."""

    def command_of(self, container: Container) -> list[str]:
        """The command line that made a container; [] where the engine does not know."""

    def command_in(self, config: bytes) -> list[str]:
        """The same, of a checkpoint's `config.dump`."""

    def image_now(self, image: ContainerImage) -> str:
        """The id of the container image that this one's name means now; "" for none."""

    def log_command(self, container: Container) -> list[str]:
        """The command that follows its log, from the first line on, on standard output and error."""

    def last_words(self, container: Container, lines: int) -> str:
        """The last lines of its log; best effort."""

    def discard(self, container: Container) -> None:
        """End it at once and remove it. Raises StateUnknown."""


@runtime_checkable
class HasProfile(Protocol):
    """What an engine offers besides whose defaults for containers are known."""

    def profile(self) -> Profile:
        """What this host gives to a container that asks for nothing."""


@runtime_checkable
class StaysEnded(Protocol):
    """What an engine offers besides that starts containers anew by itself when they end."""

    def stay_ended(self, container: Container) -> None:
        """Let this one alone when it ends, until it is restored. Best effort, never raises."""


@runtime_checkable
class DescribesMany(Protocol):
    """What an engine offers besides that can be asked for several containers in one call."""

    def describe_many(self, containers: Sequence[Container]) -> list[Container]:
        """`Engine.describe` of each; those that are gone by now are left out."""


@runtime_checkable
class NamesContainerImages(Protocol):
    """What an engine with `Capabilities.container_images` offers besides whose containers are made from a container image by its name."""

    def has_named(self, image: ContainerImage) -> bool:
        """True when the container image with this very id is there, and its name means it."""


class CarriesContainerImages(Protocol):
    """What an engine with `Capabilities.container_images` offers besides."""

    def save_container_image(self, image: ContainerImage) -> AbstractContextManager[BinaryIO]:
        """A stream of the container image, its id unchanged. Raises TransferFailed at the block's end when it is not whole."""

    def load_container_image(self) -> Process:
        """A process that reads a container image from its stdin; the caller writes, closes and waits."""

    def has_container_image(self, image_id: str) -> bool:
        """True when the container image with this very id is there."""

    def name_container_image(self, image: ContainerImage) -> None:
        """Give a loaded container image its name, unless that name already means another one."""

    def remove_container_image(self, image_id: str) -> None:
        """Remove a container image that nothing uses; best effort."""


@runtime_checkable
class HasPods(Protocol):
    """What an engine offers besides that knows pods."""

    def pod(self, name: str) -> tuple[str, str] | None:
        """The ids of a pod (by name or id) and of its infra container ("" for none); None when there is no such pod."""

    def start_pod(self, name: str) -> None:
        """Let its infra container run, and nothing else of it: what its containers share is there then. Nothing for one that runs, or has none.

        Raises:
            RestoreFailed: it could not be started.
        """


@runtime_checkable
class RemakesPods(Protocol):
    """What an engine offers besides whose pods a systemd unit may make, each time anew: another one, by the same name."""

    def command_of(self, container: Container) -> list[str]:
        """The command line that it was made with, [] when that is not known."""

    def command_in(self, config: bytes) -> list[str]:
        """The same, from what a checkpoint holds."""

    def pod_unit(self, command: Sequence[str]) -> str:
        """The unit that makes the pod of a container which was made by `command`; "" for none."""

    def pod_now(self, command: Sequence[str]) -> str:
        """The id of the pod that this unit has made last, "" when there is none."""


@runtime_checkable
class SharesVolumes(Protocol):
    """What an engine offers besides whose containers can have a named volume together."""

    def volume_users(self, name: str) -> list[str]:
        """Ids of the containers that have it, running or not."""


class CarriesVolumes(Protocol):
    """What an engine with named volumes offers besides: they are filled before the container comes."""

    def make_volume(self, job: Job, name: str) -> Path:
        """Make a named volume that is not there, journalled in `job` (`volumes_ahead`), so that it goes when the job is undone.

        It does not go with a restore of that job that is undone: that may be tried again.

        Returns:
            Its directory, for its content.

        Raises:
            BusyError: there is one of this name.
        """

    def drop_volumes(self, job: Job) -> None:
        """Remove the volumes of `make_volume`, unless a container uses them by now. Idempotent."""


@runtime_checkable
class ExecsInside(Protocol):
    """What an engine offers besides that can run a command inside of a running container."""

    def exec_in(
        self,
        container: Container,
        argv: Sequence[str],
        timeout_s: float,
        *,
        env: Mapping[str, str] | None = None,
        mark: str = "",
        alone: bool = False,
    ) -> Result:
        """Run a command inside, as the user and with the environment of the container's first process.

        Args:
            env: added to that environment.
            mark: of host.marked, by which what it starts is found again.
            alone: it is over when all that it started is over too: nothing of it is in a dump that follows.

        Returns:
            Its exit status, whatever it is, and its output (both streams, cut) as `stdout`.

        Raises:
            CommandFailed: it could not be started, or was not over in time: then it was killed, with what it started.
            EngineUnavailable: there is no runtime.
        """
