"""Bundles of the OCI runtimes: reading config.json (OCI runtime-spec, config.md), finding what lies below it, making new ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ckpt.errors import BusyError, RestoreFailed, UsageError
from ckpt.host.run import CommandFailed, run, which
from ckpt.model import HostMount, RootFs
from ckpt.store.job import DEFAULT_ROOT

BUNDLES: Final = DEFAULT_ROOT / "bundles"
MANAGERS: Final = ("libpod", "cri-o", "containerd", "docker")
_ID: Final = re.compile(r"[A-Za-z0-9_][\w+.-]*", re.ASCII)
_KEY: Final = re.compile(r"file\[[0-9a-f]{1,16}:[0-9a-f]{1,16}\]")
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class Stdio:
    """A file of the host that is a container's standard input or output: CRIU needs to be told of it.

    `key` is what CRIU calls it (`file[MOUNT:INODE]`, both in hexadecimal), `fds` are those of 0, 1, 2 that it is.
    """

    key: str
    path: str
    fds: tuple[int, ...]
    position: int = 0
    mode: int = 0o600
    """Permission bits: CRIU takes no file with others in its place."""
    size: int = -1
    """In bytes, as CRIU insists on it; -1 for a file that is open for appending, where it does not care."""

    @classmethod
    def parse(cls, found: object) -> Stdio | None:
        """From `config.dump`, which may come from anywhere; None when it is not what we write."""
        if not isinstance(found, dict):
            return None
        key, path, fds, position = found.get("key"), found.get("path"), found.get("fds"), found.get("position")
        if not isinstance(key, str) or not _KEY.fullmatch(key) or not isinstance(path, str) or "\0" in path:
            return None
        if not isinstance(fds, list) or not fds or any(fd not in (0, 1, 2) for fd in fds) or not isinstance(position, int) or position < 0:
            return None
        mode, size = found.get("mode"), found.get("size")
        if not isinstance(mode, int) or not isinstance(size, int):
            return None
        return cls(key, path, tuple(int(fd) for fd in fds), position, mode & 0o777, size)


def read_spec(bundle: Path) -> dict[str, Any]:
    """The bundle's config.json; {} when there is none that makes sense."""
    try:
        spec = json.loads((bundle / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return spec if isinstance(spec, dict) else {}


def managed(bundle: Path) -> bool:
    """True when an engine above the runtime (podman, CRI-O, docker, containerd) owns the bundle: it is found through that engine."""
    text = os.fspath(bundle)
    if re.search(r"/\w+-containers/[0-9a-f]{64}/userdata$", text) or "/io.containerd.runtime." in text:
        return True
    marks = read_spec(bundle).get("annotations") or {}
    return marks.get("io.container.manager") in MANAGERS or "io.kubernetes.cri-o.Name" in marks


def root_of(spec: dict[str, Any], bundle: Path) -> Path:
    """Where the root file system is (config.md: root.path, relative to the bundle)."""
    return bundle / str((spec.get("root") or {}).get("path") or "rootfs")


def host_mounts(spec: dict[str, Any], bundle: Path) -> tuple[HostMount, ...]:
    """The bind mounts of the host."""
    found = []
    for mount in spec.get("mounts") or []:
        options = mount.get("options") or []
        if mount.get("type") == "bind" or "bind" in options or "rbind" in options:
            found.append(HostMount(os.fspath(bundle / str(mount.get("source") or "")), str(mount.get("destination") or "")))
    return tuple(found)


def missing_namespace(spec: dict[str, Any]) -> str:
    """The path of a namespace that the container is to join (config-linux.md: namespaces) and that is not there, as after a boot; else ""."""
    linux = spec.get("linux")
    named = linux.get("namespaces") if isinstance(linux, dict) else None
    paths = (str(space.get("path") or "") for space in named or [] if isinstance(space, dict))
    return next((path for path in paths if path and not os.path.exists(path)), "")


def mounts() -> list[tuple[Path, str, dict[str, str]]]:
    """(mount point, file system type, super block options) of this host's mounts, in order (proc_pid_mountinfo(5))."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        kind, _, rest = after.partition(" ")
        options = dict(word.partition("=")[::2] for word in rest.rpartition(" ")[2].split(","))
        found.append((Path(_unescaped(before.split(" ")[4])), kind, {key: _unescaped(value) for key, value in options.items()}))
    return found


def _unescaped(word: str) -> str:
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), word)


def rootfs_of(root: Path) -> RootFs:
    """The root file system at `root`: with upper and lower directories when an overlay is mounted there, else a plain directory."""
    real = Path(os.path.realpath(root))
    over = [options for point, kind, options in mounts() if point == real and kind == "overlay"]
    if over and "upperdir" in over[-1]:
        lowers = tuple(Path(part) for part in over[-1].get("lowerdir", "").split(":") if part)
        return RootFs(real, Path(over[-1]["upperdir"]), lowers)
    return RootFs(real)


def outside_stdio(pid: int) -> tuple[Stdio, ...]:
    """Standard inputs and outputs of `pid` that are files of the host, not of the container's own mounts (`runc run -d c1 >log`).

    Without being told of them CRIU fails: "Can't lookup mount=.. for fd=1".
    """
    proc = Path(f"/proc/{pid}")
    found: dict[str, Stdio] = {}
    try:
        own = {line.split(" ", 1)[0] for line in (proc / "mountinfo").read_text(errors="replace").splitlines()}
    except OSError:
        return ()
    for fd in range(3):
        try:
            facts = dict(line.split(":", 1) for line in (proc / f"fdinfo/{fd}").read_text().splitlines() if ":" in line)
            status = os.stat(proc / f"fd/{fd}")
            path = os.readlink(proc / f"fd/{fd}")
        except OSError:
            continue
        mount = facts.get("mnt_id", "").strip()
        if not path.startswith("/") or not mount.isdigit() or mount in own:
            continue
        if not (stat.S_ISREG(status.st_mode) or path == os.devnull):
            continue
        key = f"file[{int(mount):x}:{status.st_ino:x}]"
        before = found.get(key)
        appends = int(facts.get("flags", "0"), 8) & os.O_APPEND
        fds = (*(before.fds if before else ()), fd)
        found[key] = Stdio(key, path, fds, int(facts.get("pos", "0")), stat.S_IMODE(status.st_mode), -1 if appends else status.st_size)
    return tuple(found.values())


def cgroup_of(pid: int | str) -> str:
    """Path of a process in the cgroup2 hierarchy as we see it ("" when there is none)."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
    except OSError:
        return ""
    return next((line[3:] for line in lines if line.startswith("0::")), "")


def cgroup_to_be(runtime: str, spec: dict[str, Any], container_id: str) -> str:
    """Where the runtime puts a container in cgroup2.

    runc goes beside our own cgroup unless the path is absolute (libcontainer/cgroups/fs2/defaultpath.go), crun begins at the root.
    """
    named = str((spec.get("linux") or {}).get("cgroupsPath") or "") or container_id
    above = os.path.dirname(cgroup_of("self")) if runtime == "runc" else ""
    return os.path.normpath(named if named.startswith("/") else os.path.join(above or "/", named))


def cgroup_exists(path: str) -> bool:
    """True when some hierarchy has this cgroup."""
    return any(directory.is_dir() for directory in _cgroups(path))


def remove_cgroup(path: str) -> None:
    """Remove a cgroup, and those in it, from every hierarchy; one that is not empty stays."""
    for top in _cgroups(path):
        for directory, _, _ in os.walk(top, topdown=False):
            with suppress(OSError):
                os.rmdir(directory)


def _cgroups(path: str) -> list[Path]:
    below = os.path.normpath("/" + path).lstrip("/")
    return [point / below for point, kind, _ in mounts() if kind in ("cgroup", "cgroup2")] if below else []


def check_id(container_id: str) -> str:
    """The id, when it is one for runc, crun and a file name. Raises UsageError."""
    if not _ID.fullmatch(container_id):
        raise UsageError(f"{container_id!r} cannot be the name of a container", hint="letters, digits, _ + - . and none of the last three in front")
    return container_id


def same_bundle(bundle: Path | None, spec: dict[str, Any]) -> bool:
    """True when the bundle is here and still describes the container that was dumped."""
    return bundle is not None and bundle.is_absolute() and bool(spec) and read_spec(bundle) == spec and root_of(spec, bundle).is_dir()


def renamed(spec: dict[str, Any], container_id: str) -> dict[str, Any]:
    """The spec for a new bundle: its own root directory and, when it names one, its own cgroup."""
    spec = json.loads(json.dumps(spec))
    spec["root"] = {**(spec.get("root") or {}), "path": "rootfs"}
    linux = spec.get("linux")
    if isinstance(linux, dict) and (path := str(linux.get("cgroupsPath") or "")):
        # systemd's form is SLICE:PREFIX:NAME (runc's and crun's --systemd-cgroup).
        head, sep, _ = path.rpartition(":" if path.count(":") == 2 else "/")
        linux["cgroupsPath"] = f"{head}{sep}{container_id}"
    return spec


def make_bundle(container_id: str, spec: dict[str, Any], below: RootFs | None) -> Path:
    """Make a new bundle, its root file system empty, or an overlay over the lower directories of `below`.

    Raises:
        BusyError: there is one with something mounted in it.
        RestoreFailed: the overlay could not be mounted.
    """
    bundle = BUNDLES / container_id
    remove_bundle(bundle)
    bundle.mkdir(mode=0o700, parents=True)
    root = bundle / "rootfs"
    root.mkdir(mode=0o755)
    if below is not None:
        for name in ("upper", "work"):
            (bundle / name).mkdir(mode=0o755)
        options = f"lowerdir={':'.join(map(os.fspath, below.lower_dirs))},upperdir={bundle / 'upper'},workdir={bundle / 'work'}"
        try:
            run([which("mount") or "mount", "-t", "overlay", "overlay", "-o", options, root])
        except CommandFailed as error:
            raise RestoreFailed(f"{container_id}: its root file system could not be mounted: {error.reason}") from error
    fd = os.open(bundle / "config.json", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as out:
        json.dump(spec, out, indent=1)
    return bundle


def remove_bundle(bundle: Path) -> None:
    """Remove a bundle that ckpt made. Raises BusyError when something is mounted in it that does not go."""
    if bundle.parent != BUNDLES or not os.path.lexists(bundle):
        return
    root = bundle / "rootfs"
    points = [point for point, _, _ in mounts()]
    for _ in range(points.count(root)):
        run([which("umount") or "umount", root], check=False)
    if left := [point for point, _, _ in mounts() if point.is_relative_to(bundle)]:
        raise BusyError(f"{left[0]} is mounted", hint=f"umount {left[0]}")
    shutil.rmtree(bundle)
