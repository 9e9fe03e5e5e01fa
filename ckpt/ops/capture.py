"""What ops add to a stage while its dump is held: root file system, volumes, and the manifest that describes it all."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final, cast

from ckpt import __version__
from ckpt.archive import layout
from ckpt.errors import ArchiveInvalid, CkptError
from ckpt.events import Emit, StepDone, ignore
from ckpt.model import Container, DumpOptions, DumpStats, HostFacts, Manifest, Process

if TYPE_CHECKING:
    from ckpt.store.sink import Sink

VOLUMES: Final = "volumes"


def complete_stage(
    stage: Path,
    container: Container,
    options: DumpOptions,
    *,
    host: HostFacts | None = None,
    engine_version: str = "",
    freeze_s: float = 0.0,
    emit: Emit = ignore,
    label: str = "",
) -> Manifest:
    """Add root file system, volumes and manifest to the stage of a held dump: `frozen_parts`, then `describe`.

    Args:
        options: with nothing left open (no None), as given to the engine.
        host: facts of this host; looked up when not given.
        label: what events name as their target (default: the container's name).

    Returns:
        The manifest, without generation and size (the store gives these); its file is not written.

    Raises:
        CkptError, NoSpace: the dump is still held, the caller resumes it.
    """
    frozen_parts(stage, container, options, emit=emit, label=label)
    return describe(stage, container, options, host=host, engine_version=engine_version, freeze_s=freeze_s)


def frozen_parts(
    stage: Path,
    container: Container,
    options: DumpOptions,
    *,
    emit: Emit = ignore,
    label: str = "",
    sink: Callable[[str], Sink] | None = None,
) -> None:
    """Add what must be read while nothing changes: the root file system's difference and the named volumes.

    Args:
        sink: makes the place for a member (`Draft.sink`); without it they are files in the stage.

    Raises:
        CkptError, NoSpace: something could not be read or written.
    """
    from ckpt.archive import rootfs

    target = label or container.name or container.id

    def add(name: str, what: str, capture: Callable[[Path | BinaryIO], object]) -> None:
        began = time.monotonic()
        if sink is None:
            (stage / name).parent.mkdir(mode=0o700, exist_ok=True)
            capture(stage / name)
            size_bytes = (stage / name).stat().st_size
        else:
            with sink(name) as out:
                capture(cast(BinaryIO, out))
            size_bytes = out.size_bytes
        emit(StepDone(target, what, _size_text(size_bytes), time.monotonic() - began))

    if not options.ignore_rootfs:
        upper, merged = container.rootfs.upper_dir, container.rootfs.merged_dir
        if upper is not None:
            add(layout.ROOTFS_DIFF, "root file system", lambda out: rootfs.capture(container.rootfs, out, stage / layout.DELETED_FILES))
        elif merged is not None:
            # A plain directory has nothing below it to differ from: the whole of it travels.
            add(layout.ROOTFS_DIFF, "root file system", lambda out: rootfs.capture_tree(merged, out))
    if not options.ignore_volumes:
        for volume in container.volumes:
            add(f"{VOLUMES}/{volume.name}.tar", f"volume {volume.name}", partial(rootfs.capture_tree, volume.source_dir))


def describe(
    stage: Path,
    container: Container,
    options: DumpOptions,
    *,
    host: HostFacts | None = None,
    engine_version: str = "",
    freeze_s: float = 0.0,
    digests: dict[str, str] | None = None,
    look: bool = False,
) -> Manifest:
    """The manifest of a complete stage; reads every byte for the digests, so it may be done after the workload goes on.

    Args:
        digests: of the members, where they are known already or come later (a migration computes them while it sends).

        look: tell what was open, memory by kind and mounts, too; it takes some milliseconds a process.

    Raises:
        CkptError: the CRIU images make no sense.
    """
    kinds, memory, mounts = _look(stage) if look else ({}, {}, ())
    return Manifest(
        id="draft",
        name=container.name or container.id,
        engine=container.engine,
        container_id=container.id,
        created_s=time.time(),
        runtime=container.runtime,
        container_image=container.container_image,
        engine_version=engine_version,
        host=host or host_facts(),
        tcp_established=bool(options.tcp_established),
        file_locks=bool(options.file_locks),
        shell_job=bool(options.shell_job),
        left_running=options.leave_running,
        processes=processes(stage),
        volumes=() if options.ignore_volumes else tuple((v.name, v.destination) for v in container.volumes),
        networks=container.networks,
        addresses=container.addresses,
        ports=container.ports,
        host_mounts=container.host_mounts,
        stats=dump_stats(stage),
        freeze_s=freeze_s,
        digests=layout.digest_members(stage) if digests is None else digests,
        open_kinds=kinds,
        memory_bytes=memory,
        mounts=mounts,
    )


def _look(stage: Path) -> tuple[dict[str, int], dict[str, int], tuple[tuple[str, str], ...]]:
    """What is good to know at a glance; a dump without it is as good."""
    from ckpt.archive.members import StageMembers
    from ckpt.criu import contents

    try:
        found = contents.read(StageMembers(stage))
    except (CkptError, ImportError):
        return {}, {}, ()
    memory: dict[str, int] = {"image": sum(task.memory.image_bytes for task in found.tasks) + found.shared_bytes}
    for task in found.tasks:
        for kind, count in task.memory.by_kind_bytes.items():
            memory[kind] = memory.get(kind, 0) + count
    return found.kinds, memory, tuple((mount.mountpoint, mount.fstype) for mount in found.mounts)


def processes(stage: Path) -> tuple[Process, ...]:
    """The process tree in the CRIU images; () when CRIU's Python bindings are not there to read them.

    Raises:
        ArchiveInvalid: the images are there and make no sense.
    """
    from ckpt.criu import images

    directory = stage / "checkpoint"
    if not (directory / "pstree.img").exists():
        return ()
    try:
        return images.process_tree(directory)
    except ArchiveInvalid:
        raise
    except (CkptError, ImportError):
        return ()  # without pycriu a dump is as good, only its restore cannot be compared with it


def dump_stats(stage: Path, *more: Path) -> DumpStats:
    """CRIU's statistics of the dump where they are there already: CRIU writes them when the dump is no longer held."""
    from ckpt.criu import images

    for path in (stage / layout.STATS, stage / "checkpoint" / layout.STATS, *more):
        if path.exists():
            try:
                return images.stats(path)
            except (CkptError, ImportError):
                continue
    return DumpStats()


def host_facts() -> HostFacts:
    """What decides whether a checkpoint made here can run elsewhere. Never raises: an unknown fact is empty."""
    machine = os.uname()
    flags, cpus = _cpu()
    return HostFacts(
        hostname=socket.gethostname(),
        arch=machine.machine,
        kernel=machine.release,
        criu_version=_criu_version(),
        ckpt_version=__version__,
        cpu_flags=flags,
        cpus=cpus,
        memory_available_bytes=_memory_available_bytes(),
        boot_id=_first_line("/proc/sys/kernel/random/boot_id"),
    )


def store_free_bytes(facts: HostFacts, root: Path) -> HostFacts:
    """The facts with the free space of the file system that `root` is (or will be) on."""
    at = root
    while not at.exists() and at != at.parent:
        at = at.parent
    try:
        space = os.statvfs(at)
    except OSError:
        return facts
    return replace(facts, store_free_bytes=space.f_bavail * space.f_frsize)


@cache
def _criu_version() -> str:
    try:
        from ckpt.criu import features

        return features.version_text()
    except Exception:  # whatever it is: the version is good to know, not needed
        return ""


def _cpu() -> tuple[tuple[str, ...], int]:
    flags: tuple[str, ...] = ()
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as source:
            for line in source:
                if line.startswith(("flags", "Features")):
                    flags = tuple(sorted(line.partition(":")[2].split()))
                    break
    except OSError:
        pass
    return flags, os.cpu_count() or 0


def _memory_available_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as source:
            for line in source:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as source:
            return source.readline().strip()
    except OSError:
        return ""


def _size_text(size_bytes: int) -> str:
    size = float(size_bytes)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
