"""The nouns of ckpt: frozen, without I/O. Units are in the names."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["created", "running", "paused", "exited", "unknown"]
Severity = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Target:
    """What the user names: `web` (engine None: any), `podman:web`, `runc:web`, `pid:1234`."""

    name: str
    engine: str | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """Split `ENGINE:NAME`; a text without a colon names a container of any engine."""
        head, colon, tail = text.partition(":")
        return cls(tail, head) if colon and head and tail else cls(text)

    def __str__(self) -> str:
        return f"{self.engine}:{self.name}" if self.engine else self.name


@dataclass(frozen=True, slots=True)
class ContainerImage:
    """The container image that a container was made from. `digest`: of its manifest in a registry ("sha256:HEX"), "" where that is not known."""

    id: str
    name: str
    digest: str = ""


@dataclass(frozen=True, slots=True)
class RootFs:
    """The writable root of a container. `upper_dir`/`lower_dirs` are None/() where it is a plain directory."""

    merged_dir: Path | None = None
    upper_dir: Path | None = None
    lower_dirs: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Volume:
    """A named volume: its content travels with the checkpoint."""

    name: str
    source_dir: Path
    destination: str


@dataclass(frozen=True, slots=True)
class HostMount:
    """A bind mount of the host: it does not travel and must exist on the destination."""

    source: str
    destination: str


@dataclass(frozen=True, slots=True)
class PortMapping:
    host_ip: str
    host_port: int
    container_port: int
    protocol: str = "tcp"


@dataclass(frozen=True, slots=True)
class Container:
    """A container or process tree as its engine describes it now. `pid` is its first process on this host."""

    engine: str
    id: str
    name: str
    state: State
    pid: int | None = None
    runtime: str | None = None
    container_image: ContainerImage | None = None
    rootfs: RootFs = RootFs()
    volumes: tuple[Volume, ...] = ()
    host_mounts: tuple[HostMount, ...] = ()
    ports: tuple[PortMapping, ...] = ()
    networks: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    labels: dict[str, str] = field(default_factory=dict)
    bundle_dir: Path | None = None
    terminal: bool = False
    created_s: float = 0.0
    auto_remove: bool = False
    requires: tuple[str, ...] = ()
    """Ids of containers that must be there before it (podman-run(1): --requires, shared namespaces, its pod's infra container)."""
    pod: str = ""
    """Id of its pod."""
    units: tuple[str, ...] = ()
    """systemd units that own it and would start it cold."""
    restarts: bool = False
    """Its engine starts it anew by itself as soon as it ends (podman-run(1): --restart)."""
    infra: bool = False
    """It only holds its pod's namespaces; there is nothing in it to save."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of `check`: what was looked at, how it stands, what to do."""

    check: str
    severity: Severity
    detail: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an engine can do on this host. `usable` False: `reason` says why (not an error by itself)."""

    usable: bool
    reason: str = ""
    version: str = ""
    runtimes: tuple[str, ...] = ()
    criu: bool = True
    """It dumps with CRIU, so CRIU must work here (the fake engine of the tests does not)."""
    hold: bool = False
    clone: bool = False
    pages: bool = False
    """A dump can send its memory pages to a page server."""
    lazy: bool = False
    """A restored workload can run at once, its memory brought behind it."""
    takes_frozen: bool = False
    """A dump takes a tree whose cgroup is frozen, and leaves it so."""
    early: bool = False
    """A restore can be begun before its dump is (engines.base.StartsEarly)."""
    startable: bool = False
    """Its containers can be started cold and stopped (engines.base.Startable)."""
    remakes: bool = False
    """A restore with `RestoreOptions.cold` makes a container again that is gone."""
    container_images: bool = False
    volumes: bool = False
    isolates: bool = False
    """A restored copy can be without network and with volumes of its own (`RestoreOptions.isolated`)."""


@dataclass(frozen=True, slots=True)
class DumpOptions:
    """How to dump. None means: ckpt finds out by looking at the workload and chooses."""

    leave_running: bool = False
    tcp_established: bool | None = None
    file_locks: bool | None = None
    shell_job: bool | None = None
    ignore_rootfs: bool = False
    ignore_volumes: bool = False
    timeout_s: float = 200.0
    page_server_port: int | None = None
    """CRIU sends the memory pages to a page server at this port of the loopback; its CRIU images are then without them."""
    sketched: bool = False
    """What the engine has to say of the container is in the stage already (engines.base.StartsEarly): the dump need not wait for it."""
    memory_stays: bool = False
    """Private memory is not dumped but stays in the frozen tree, where the owner reads it; the CRIU images are good for a lazy restore only."""
    sealed: bool = False
    """The stage is in memory and will be encrypted: nothing that is not on a disk already may get there in clear."""
    hooks: bool = True
    """Run what is to run before and after (ops/hooks.py)."""
    override_label: bool = False
    """Do it even if a label of the container forbids it (ops/consent.py)."""


@dataclass(frozen=True, slots=True)
class Compression:
    """Whether to compress on the way. `auto`: where it carries more than it costs; `zstd`: at `level`, but for what is incompressible."""

    mode: Literal["auto", "zstd", "none"] = "auto"
    level: int = 1


@dataclass(frozen=True, slots=True)
class Carriage:
    """How files and memory are carried to another host."""

    bwlimit_bytes_s: int | None = None
    """At most so many bytes of content a second, as they are on the link; None: as fast as it goes."""
    compress: Compression = Compression()
    streams: int = 1
    """How many connections; from 2 on, and with `direct`, they carry content alone, beside the one for calls."""
    direct: bool = False
    """By TLS straight to the other host instead of through ssh."""
    shared_limit: Path | None = None
    """The file by which several processes share that limit (peer/rate.py); None: it is this one's own."""


@dataclass(frozen=True, slots=True)
class PrecopyLimits:
    """When to stop copying memory ahead of the dump: at an estimated downtime, after so many rounds, or when a round gains nothing."""

    max_downtime_s: float = 0.3
    max_rounds: int = 8
    on_exceed: Literal["continue", "abort"] = "continue"
    """What to do when more than `max_downtime_s` is to be expected in the end."""
    auto_converge: bool = False
    """Slow the workload, step by step, when it writes faster than the link carries."""


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """How to restore. None means: as the manifest of the checkpoint says."""

    name: str | None = None
    tcp_established: bool | None = None
    file_locks: bool | None = None
    shell_job: bool | None = None
    ignore_rootfs: bool = False
    ignore_volumes: bool = False
    ignore_static_ip: bool = False
    ignore_static_mac: bool = False
    publish: tuple[str, ...] = ()
    pod: str | None = None
    pods: tuple[tuple[str, str], ...] = ()
    """Pods that were made anew since: the id of each then, and now."""
    existing_volumes: Literal["refuse", "keep", "replace"] = "refuse"
    """What becomes of a named volume that is there already; a restore in place replaces its content, a copy keeps it."""
    kept_volumes: tuple[str, ...] = ()
    """Of these "replace" keeps the content all the same: others have them mounted too."""
    checked: bool = False
    """The caller saw a moment ago that name, id and container image are as they must be: an engine need not ask while a source is frozen."""
    terse: bool = False
    """Of the restored container the caller needs id, name and first process only: an engine that would have to ask for the rest does not."""
    allow: tuple[str, ...] = ()
    """What a checkpoint from elsewhere may have beyond this host's defaults, as KIND:VALUE (see ops/policy.py)."""
    lazy: bool = False
    """Let it run at once; its memory follows. The owner has started the keeper of the memory (ckpt/ops/lazy.py) for the job."""
    on_demand: bool = False
    """With `lazy`: of its memory only that follows which it touches, so that the rest stays shared with other copies."""
    unpublished: bool = False
    """A copy without ports of the host, unless `publish` names some: the original has its own. With `checked`, nobody has its name either."""
    tcp_close: bool = False
    """Established TCP connections come back closed: the workload finds them reset, its peers hear so at their next word."""
    cold: bool = False
    """Without its processes: made again as the checkpoint says, with its files, and started anew (`Capabilities.remakes`)."""
    timeout_s: float = 200.0
    hooks: bool = True
    """Run what is to run before and after (ops/hooks.py)."""
    isolated: bool = False
    """A copy for a look into it: in a network of its own that has nothing but a loopback, and with volumes of its own."""


@dataclass(frozen=True, slots=True)
class DumpStats:
    """CRIU's stats-dump (images/stats.proto): times in microseconds, counts in pages."""

    freezing_time_us: int = 0
    frozen_time_us: int = 0
    memdump_time_us: int = 0
    memwrite_time_us: int = 0
    pages_scanned: int = 0
    pages_written: int = 0


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What decides whether a checkpoint can run on a host."""

    hostname: str = ""
    arch: str = ""
    kernel: str = ""
    criu_version: str = ""
    ckpt_version: str = ""
    cpu_flags: tuple[str, ...] = ()
    cpus: int = 0
    memory_available_bytes: int = 0
    store_free_bytes: int = 0
    boot_id: str = ""


@dataclass(frozen=True, slots=True)
class Process:
    """A process of a dumped tree; `pid` is the one inside its pid namespace."""

    pid: int
    ppid: int
    comm: str
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Evidence:
    """What makes a checkpoint a link of a chain (`ckpt snapshot`): who took it, when and why, and which one was taken before."""

    case: str
    number: int
    """From 1 on."""
    reason: str
    taken_s: float
    """When the workload was frozen for it, seconds since the epoch."""
    previous: str = ""
    """"sha256:HEX" of the manifest of the one before, as bytes; "" for the first."""
    previous_id: str = ""
    operator: str = ""
    """The user who gave the command (of `sudo`: who called it), by name."""
    uid: int = 0
    """The user that the kernel knows from the login (loginuid of the audit system), else the real one."""
    machine_id: str = ""
    command: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """`artifacts/ckpt.json` (schema 1): what a checkpoint is, and what its restore needs."""

    id: str
    name: str
    engine: str
    container_id: str
    created_s: float
    generation: int = 0
    runtime: str | None = None
    container_image: ContainerImage | None = None
    engine_version: str = ""
    host: HostFacts = HostFacts()
    tcp_established: bool = False
    file_locks: bool = False
    shell_job: bool = False
    left_running: bool = False
    processes: tuple[Process, ...] = ()
    volumes: tuple[tuple[str, str], ...] = ()
    """(volume name, destination) pairs whose content is in `volumes/NAME.tar`."""
    networks: tuple[str, ...] = ()
    addresses: tuple[str, ...] = ()
    ports: tuple[PortMapping, ...] = ()
    host_mounts: tuple[HostMount, ...] = ()
    stats: DumpStats = DumpStats()
    freeze_s: float = 0.0
    size_bytes: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    """Member path -> "sha256:HEX", for every member of the checkpoint but the manifest itself."""
    foreign: str = ""
    """Who wrote the archive when it was not ckpt ("podman"); such a manifest is made up on import."""
    open_kinds: dict[str, int] = field(default_factory=dict)
    """How many descriptors of each kind were open (file, pipe, inet, unix, tty, inotify, ...)."""
    memory_bytes: dict[str, int] = field(default_factory=dict)
    """Memory of all processes, bytes mapped by kind (private, heap, stack, file_private, file_shared, shared, other), and `image`: in the images."""
    mounts: tuple[tuple[str, str], ...] = ()
    """(mount point, type of file system) of the mounts in the dump."""
    external: dict[str, str] = field(default_factory=dict)
    """What an engine needs to find again, by its own keys (process: cwd, ...)."""
    evidence: Evidence | None = None
    """Of a snapshot: its link to the one before."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a store knows about a checkpoint beside the checkpoint itself (ckpt/store/entry.py); no archive brings it along."""

    name: str
    generation: int
    size_bytes: int = 0
    """Of all members, unpacked."""
    stored_s: float = 0.0
    """When it came into the store, seconds since the epoch."""
    origin: str = "local"
    """"local" (a workload of this host), or how it came from outside: "import", "migrate", "serve", with the place behind a colon."""
    tags: tuple[str, ...] = ()
    note: str = ""
    manifest_digest: str = ""
    """"sha256:HEX" of the manifest's bytes: a manifest that was damaged, or is another's, is not read."""
    pinned: bool = False
    """Neither `prune` nor `rm --all` takes it."""
    group: str = ""
    """NAME@N of the group that it is part of (ckpt/store/groups.py)."""

    @property
    def foreign(self) -> bool:
        """Whether it came from outside, so that this host's policy is to judge it."""
        return self.origin != "local"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in a store: its manifest and the directory (podman's archive layout, unpacked) that holds it."""

    manifest: Manifest
    directory: Path
    entry: Entry = Entry("", 0)

    @property
    def ref(self) -> str:
        """How people name it: NAME@GENERATION."""
        return f"{self.manifest.name}@{self.manifest.generation}"


@dataclass(frozen=True, slots=True)
class JobRecord:
    """One operation, under way or over, as `ckpt jobs` tells it and the store's history keeps it (schema 1)."""

    id: str
    kind: str
    """What was asked for: migrate, receive (a migration, seen from its destination), checkpoint, restore; with -group behind it for a group's."""
    state: str
    """Not over: running, waiting (for `--continue`), unconfirmed (it runs here, its source has not asked), serving (memory arrives),
    interrupted, lost (a lazy restore whose memory did not come). Over: done, rolled-back, failed, refused (nothing was begun), lost."""
    name: str = ""
    engine: str = ""
    container_id: str = ""
    source: str = ""
    destination: str = ""
    mode: str = ""
    started_s: float = 0.0
    """Seconds since the epoch, as `ended_s`."""
    ended_s: float | None = None
    settled_by: str = ""
    """Who brought it to its end when it was not the command itself: guard, sweep, keeper."""
    reason: str = ""
    next: str = ""
    """The command line to give next."""
    error: dict[str, Any] | None = None
    """`CkptError.to_json()`."""
    statistics: dict[str, Any] = field(default_factory=dict)
    """Figures by name, units in the names."""
