"""What differs between two checkpoints: processes, files, open files, sockets, memory pages, configuration."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from ckpt.archive import foreign, layout, trust
from ckpt.archive import manifest as manifests
from ckpt.archive.members import Members
from ckpt.errors import ArchiveInvalid
from ckpt.events import Emit, StepDone, StepStarted
from ckpt.ops.opening import Opened, opening
from ckpt.store.job import DEFAULT_ROOT

if TYPE_CHECKING:
    from ckpt.criu.contents import Contents, Task

_FILES_CAP: Final = 2_000_000


@dataclass(frozen=True, slots=True)
class Change:
    """Something that is in one of two checkpoints, or differs. `change`: added (only in the second), removed, changed; `detail`: from, to."""

    what: str
    change: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class MemoryChange:
    """Pages of a process (pid 0: of shared memory): changed, only in the second, only in the first, the same."""

    pid: int
    comm: str
    changed_pages: int
    new_pages: int
    gone_pages: int
    same_pages: int


@dataclass(slots=True)
class Difference:
    """All that differs; every list is empty for two checkpoints of the same state."""

    a: str
    b: str
    same_container: bool
    processes: list[Change] = field(default_factory=list)
    files: list[Change] = field(default_factory=list)
    open_files: list[Change] = field(default_factory=list)
    sockets: list[Change] = field(default_factory=list)
    memory: list[MemoryChange] = field(default_factory=list)
    config: list[Change] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        memory = any(one.changed_pages or one.new_pages or one.gone_pages for one in self.memory)
        return not (self.processes or self.files or self.open_files or self.sockets or self.config or memory)


def diff(
    a: str,
    b: str,
    *,
    memory: bool = True,
    incoming: trust.Incoming = trust.ANYBODY,
    store_root: Path = DEFAULT_ROOT,
    emit: Emit,
) -> Difference:
    """Compare two checkpoints, of the store or in archive files.

    Args:
        memory: compare memory pages too (all of them are read).

    Raises:
        TargetNotFound: one of them is not there.
        ArchiveInvalid: one of them is damaged.
        FeatureMissing: pycriu is not there.
    """
    from ckpt.criu import contents as criu

    with opening(a, incoming=incoming, store_root=store_root) as one, opening(b, incoming=incoming, store_root=store_root) as two:
        found = Difference(one.label, two.label, one.manifest.container_id == two.manifest.container_id)
        left, right = criu.read(one.members), criu.read(two.members)
        found.config = _named(_config(one), _config(two))
        found.processes = _processes(left, right)
        found.open_files = _named(_open_files(left), _open_files(right))
        found.sockets = _named(_sockets(left), _sockets(right))
        emit(StepStarted(b, "compare files"))
        found.files = _files(one.members, two.members)
        emit(StepDone(b, "compare files"))
        if memory:
            emit(StepStarted(b, "compare memory"))
            found.memory = list(_memory(one.members, two.members, left, right))
            emit(StepDone(b, "compare memory"))
        return found


def _named(one: dict[str, str], two: dict[str, str]) -> list[Change]:
    found = []
    for name in sorted(one.keys() | two.keys()):
        if name not in one:
            found.append(Change(name, "added", two[name]))
        elif name not in two:
            found.append(Change(name, "removed", one[name]))
        elif one[name] != two[name]:
            found.append(Change(name, "changed", f"{one[name]} -> {two[name]}" if one[name] or two[name] else ""))
    return found


def _config(opened: Opened) -> dict[str, str]:
    """What matters of the configuration, as texts; of the environment a digest, not the value."""
    manifest = opened.manifest
    found = {f"volume {name}": at for name, at in manifest.volumes}
    found |= {f"host mount {mount.source}": mount.destination for mount in manifest.host_mounts}
    found |= {f"port {p.host_ip}:{p.host_port}/{p.protocol}": str(p.container_port) for p in manifest.ports}
    found |= {f"network {name}": "" for name in manifest.networks}
    found["container image"] = f"{manifest.container_image.name} {manifest.container_image.id[:19]}" if manifest.container_image else ""
    found["host"] = manifest.host.hostname
    found["CRIU"] = manifest.host.criu_version
    found["runtime"] = manifest.runtime or ""
    spec = _json(opened.members, layout.SPEC)
    process = spec.get("process") if isinstance(spec.get("process"), dict) else {}
    assert isinstance(process, dict)
    for word in process.get("env") or []:
        if isinstance(word, str):
            name, _, value = word.partition("=")
            found[f"environment {name}"] = f"(sha256 {hashlib.sha256(value.encode(errors='replace')).hexdigest()[:12]})"
    for mount in spec.get("mounts") or []:
        if isinstance(mount, dict):
            found[f"mount {str(mount.get('destination'))[:4096]}"] = str(mount.get("type"))[:64]
    return found


def _json(members: Members, name: str) -> dict[str, Any]:
    if name not in members.names() or members.size_bytes(name) > manifests.MAX_BYTES:
        return {}
    with members.open(name) as file:
        return manifests.json_object(b"".join(iter(lambda: file.read(layout.CHUNK_BYTES), b"")), name)


def _processes(one: Contents, two: Contents) -> list[Change]:
    def described(contents: Contents) -> dict[str, dict[str, str]]:
        return {
            f"{task.pid} {task.comm}": {
                "parent": str(task.ppid), "threads": str(task.threads), "state": task.state, "executable": task.exe, "directory": task.cwd,
                "user": "" if task.uid is None else str(task.uid),
            }
            for task in contents.tasks
        }  # fmt: skip

    left, right = described(one), described(two)
    found = [Change(name, "removed") for name in left if name not in right]
    found += [Change(name, "added") for name in right if name not in left]
    for name in left.keys() & right.keys():
        if details := [f"{key} {left[name][key]} -> {right[name][key]}" for key in left[name] if left[name][key] != right[name][key]]:
            found.append(Change(name, "changed", ", ".join(details)))
    return sorted(found, key=lambda change: (int(change.what.partition(" ")[0]), change.change))


def _open_files(contents: Contents) -> dict[str, str]:
    """Sockets have their own list; the number of a pipe is another one after each restore."""
    return {
        f"{task.pid} {task.comm} fd {file.fd}": f"{file.kind} {file.path if file.kind == 'file' else ''}".strip()
        for task in contents.tasks
        for file in task.files
        if file.kind not in ("inet", "unix")
    }


def _sockets(contents: Contents) -> dict[str, str]:
    found: dict[str, str] = {}
    for task in contents.tasks:
        for one in task.sockets:
            remote = "" if one.protocol.startswith("unix") else one.remote
            name = " ".join(filter(None, (f"{task.pid} {task.comm}", one.protocol, one.local or f"fd {one.fd}", f"-> {remote}" if remote else "")))
            found[name] = one.state
    return found


def _memory(one: Members, two: Members, left: Contents, right: Contents) -> Iterator[MemoryChange]:
    from ckpt.criu import contents as criu
    from ckpt.criu import memory

    maps = [{(p.shared, p.number): p for p in criu.pagemaps(members)} for members in (one, two)]
    names: dict[int, str] = {task.pid: task.comm for task in (*left.tasks, *right.tasks)}
    old: dict[int, Task] = {task.pid: task for task in left.tasks}
    for key in sorted(maps[0].keys() | maps[1].keys()):
        a, b = maps[0].get(key), maps[1].get(key)
        counts = memory.compare((one, a) if a else None, (two, b) if b else None)
        shared, number = key
        comm = f"shared memory {number}" if shared else names.get(number, old[number].comm if number in old else "?")
        yield MemoryChange(0 if shared else number, comm, counts.changed, counts.new, counts.gone, counts.same)


# -- files -----------------------------------------------------------------------------------------------------------


def _files(one: Members, two: Members) -> list[Change]:
    found: list[Change] = []
    tars = [name for name in dict.fromkeys([*one.names(), *two.names()]) if name == layout.ROOTFS_DIFF or name.startswith("volumes/")]
    for name in tars:
        if name.endswith("/"):
            continue
        label = (lambda path: "/" + path) if name == layout.ROOTFS_DIFF else _in_volume(name)
        left, right = (_tar(members, name) if name in members.names() else {} for members in (one, two))
        for path in sorted(left.keys() | right.keys()):
            if path not in left:
                found.append(Change(label(path), "added"))
            elif path not in right:
                found.append(Change(label(path), "removed"))
            elif left[path] != right[path]:
                details = [word for word, a, b in zip(_FACTS, left[path], right[path], strict=True) if a != b]
                found.append(Change(label(path), "changed", ", ".join(details)))
    gone = [set(foreign.deleted_files(_bytes(members, layout.DELETED_FILES))) for members in (one, two)]
    found += [Change(path, "removed", "deleted from the container image") for path in sorted(gone[1] - gone[0])]
    found += [Change(path, "added", "no longer deleted from the container image") for path in sorted(gone[0] - gone[1])]
    return found


def _in_volume(name: str) -> Callable[[str], str]:
    volume = name.removeprefix("volumes/").removesuffix(".tar")
    return lambda path: f"{volume}:/{path}"


_FACTS: Final = ("kind", "mode", "owner", "size", "content")


def _tar(members: Members, name: str) -> dict[str, tuple[str, ...]]:
    """Path -> what it is, and a digest of its content. Times do not count."""
    found: dict[str, tuple[str, ...]] = {}
    try:
        with members.open(name) as file, tarfile.open(fileobj=file, mode="r|*") as tar:
            for member in tar:
                if len(found) >= _FILES_CAP:
                    raise ArchiveInvalid(f"{name} has more than {_FILES_CAP} files")
                content = member.linkname
                if member.issparse():
                    content = f"{member.mtime} {hashlib.sha256(repr(cast(Any, member).sparse).encode()).hexdigest()}"
                elif member.isreg():
                    digest = hashlib.sha256()
                    data = tar.extractfile(member)
                    while data is not None and (piece := data.read(layout.CHUNK_BYTES)):
                        digest.update(piece)
                    content = digest.hexdigest()
                path = member.name.removeprefix("./").strip("/")
                kind = member.type.decode("ascii", "replace")
                found[path] = (kind, oct(member.mode), f"{member.uid}:{member.gid}", str(member.size), content)
                cast(Any, tar).members = []  # it keeps every header otherwise
    except (tarfile.TarError, EOFError, json.JSONDecodeError) as error:
        raise ArchiveInvalid(f"{name} is damaged: {error}") from None
    found.pop("", None)
    return found


def _bytes(members: Members, name: str) -> bytes:
    if name not in members.names():
        return b"null"
    if members.size_bytes(name) > manifests.MAX_BYTES:
        raise ArchiveInvalid(f"{name} is larger than {manifests.MAX_BYTES >> 20} MiB")
    with members.open(name) as file:
        return b"".join(iter(lambda: file.read(layout.CHUNK_BYTES), b""))
