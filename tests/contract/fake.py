"""A fake engine that keeps every promise of `ckpt.engines.base` without CRIU: a container is a counter, a process of its own.

A dump stops it (SIGSTOP) and notes how far it has counted, a restore starts a new one there, stopped. Both are held by the real
action-script, so what happens when owners die is what happens with CRIU.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from ckpt.archive.wants import Profile
from ckpt.engines import registry
from ckpt.engines.base import MutateFs
from ckpt.errors import BusyError, DumpFailed, RestoreFailed, StateUnknown, TargetNotFound
from ckpt.host import marked
from ckpt.host.run import Result, spawn
from ckpt.model import Capabilities, Container, DumpOptions, Finding, Manifest, Process, RestoreOptions, RootFs, Volume
from ckpt.store.job import Job

WORLD = "CKPT_FAKE_WORLD"
CHECKOUT = Path(__file__).resolve().parent.parent.parent
LIMIT_S = 20.0

_COUNTER = """
import os, signal, sys, time
path, number, tag = sys.argv[1], int(sys.argv[2]), sys.argv[3]
if number >= 0:
    os.kill(os.getpid(), signal.SIGSTOP)
number = max(number, 0)
while True:
    number += 1
    with open(path + ".part", "w") as out:
        out.write(str(number))
    os.rename(path + ".part", path)
    time.sleep(0.005)
"""


def wait(condition: Callable[[], bool]) -> bool:
    """Wait until it is true; False when it never is."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def process_state(pid: int) -> str:
    """The letter of /proc/PID/stat, "" when it is gone (a zombie is gone)."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return ""
    return "" if letter in "ZX" else letter


class FakeHeldDump:
    def __init__(self, job: Job, pid: int) -> None:
        self.job, self.pid = job, pid

    def resume(self) -> None:
        self.job.decide("1")
        if not wait(lambda: process_state(self.pid) in ("R", "S", "D")):
            raise StateUnknown("the counter does not go on")

    def end(self) -> None:
        self.job.decide("0")
        if not wait(lambda: not process_state(self.pid)):
            raise StateUnknown("the counter does not end")


class FakeHeldRestore:
    def __init__(self, engine: FakeEngine, job: Job, container: Container) -> None:
        self.engine, self.job, self.container = engine, job, container
        self.init_pid = container.pid or 0

    def resume(self) -> Container:
        self.job.decide("0")
        if not wait(lambda: process_state(self.container.pid or 0) in ("R", "S", "D")):
            raise RestoreFailed("the counter does not go on")
        return self.engine.describe(self.container)

    def abort(self) -> None:
        self.engine.rollback(self.job)


class FakeEngine:
    """Containers are files in the directory that the environment names."""

    name = "fake"
    prefixes = ("fake",)

    def __init__(self, world: Path | None = None) -> None:
        self.world = world or Path(os.environ[WORLD])
        self.streams = False
        """Its dumps send their pages to a page server, as CRIU 4.2 does."""
        self.page = lambda number: str(number).encode().ljust(4096, b"\0")

    # -- for tests -----------------------------------------------------------------------------------------------

    def start(
        self, name: str | Container, *, broken: str = "", volumes: tuple[str, ...] = (), labels: Mapping[str, str] | None = None
    ) -> Container:
        """Start a counter. `broken`: "dump" or "restore" of it fails. Given a container: the engine's `start`."""
        if isinstance(name, Container):
            (self.world / name.id / "ticks").unlink(missing_ok=True)
            self._save(name.id, **{**self._load(name.id), "pid": self._spawn(name.id, -1)})
            assert wait(lambda: self.ticks(name.id) > 0)  # before that nobody would know it for a counter
            return self.describe(name)
        identity = secrets.token_hex(32)
        upper = self.world / identity / "upper"
        upper.mkdir(parents=True)
        (upper / "written").write_text(name)
        for volume in volumes:
            (self.world / "volumes" / volume).mkdir(parents=True, exist_ok=True)
        pid = self._spawn(identity, -1)
        self._save(identity, name=name, pid=pid, broken=broken, volumes=list(volumes), created_s=time.time(), labels=dict(labels or {}))
        assert wait(lambda: self.ticks(identity) > 0)
        return self.describe(Container("fake", identity, name, "running"))

    def ticks(self, identity: str) -> int:
        try:
            return int((self.world / identity / "ticks").read_text() or "0")
        except FileNotFoundError:
            return 0

    def end_all(self) -> None:
        """End every counter of this world, by its pid."""
        for container in self.containers():
            if container.pid and self._is_counter(container.pid, container.id):
                os.kill(container.pid, signal.SIGKILL)

    # -- the engine's promise ------------------------------------------------------------------------------------

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
        """Inside of a counter is its directory."""
        inside = {**(env or {}), "INSIDE": str(self.world / container.id)}
        return marked.run(argv, mark=mark or marked.new_mark(), timeout_s=timeout_s, env=inside, alone=alone)

    def profile(self) -> Profile:
        return Profile(seccomp=None, namespaces=frozenset(), masked=(), read_only=())

    def probe(self) -> Capabilities:
        can = Capabilities(True, version="1.0", runtimes=("fake",), criu=False, hold=True, clone=True, volumes=True)
        return replace(can, pages=self.streams, startable=True, remakes=True)

    def containers(self) -> list[Container]:
        found = []
        for path in sorted(self.world.glob("*/container.json")):
            with suppress(TargetNotFound):  # another thread, or a guard, removes it as we look
                found.append(self._container(path.parent.name))
        return found

    def find(self, name: str) -> list[Container]:
        everything = self.containers()
        return [c for c in everything if c.name == name] or [c for c in everything if len(name) >= 2 and c.id.startswith(name)]

    def describe(self, container: Container) -> Container:
        return self._container(container.id)

    def preflight(self, container: Container, options: DumpOptions) -> list[Finding]:
        if self._load(container.id)["broken"] == "preflight":
            return [Finding("runtime", "error", "the runtime has no CRIU support", "use another one")]
        return [Finding("runtime", "ok", "fake")]

    def dump(self, container: Container, stage: Path, options: DumpOptions, job: Job) -> FakeHeldDump:
        pid = container.pid or 0
        os.kill(pid, signal.SIGSTOP)
        assert wait(lambda: process_state(pid) == "T")
        if self._load(container.id)["broken"] == "dump":
            os.kill(pid, signal.SIGCONT)
            log = job.directory / "dump.log"
            log.write_text("Error (fake): cannot dump\n")
            raise DumpFailed(f"{container.name} cannot be checkpointed: it is broken", log=f"{log}:1")
        images = stage / "checkpoint"
        images.mkdir(mode=0o700)
        (images / "inventory.img").write_bytes(secrets.token_bytes(16))
        if options.page_server_port is None:
            (images / "pages-1.img").write_text(str(self.ticks(container.id)))
        else:
            try:
                self._send_pages(options.page_server_port, self.page(self.ticks(container.id)), whole=self._load(container.id)["broken"] != "pages")
            except OSError as error:
                os.kill(pid, signal.SIGCONT)
                raise DumpFailed(f"{container.name} cannot be checkpointed: {error}") from error
        comm = Path(f"/proc/{pid}/comm").read_text().strip()
        tree = [[1, 0, comm, 1]] + ([[2, 1, "lost", 1]] if self._load(container.id)["broken"] == "tree" else [])
        (images / "pstree.img").write_text(json.dumps(tree))
        (stage / "config.dump").write_text(json.dumps({"id": container.id, "name": container.name, "labels": container.labels}))
        (stage / "spec.dump").write_text("{}")
        self._hold("post-dump", job, pid)
        return FakeHeldDump(job, pid)

    def restore(
        self, stage: Path, manifest: Manifest, options: RestoreOptions, job: Job, *, rootfs_ready: MutateFs, volume_ready: Callable[[str, Path], None]
    ) -> FakeHeldRestore:
        identity = secrets.token_hex(32) if options.name else manifest.container_id
        name = options.name or manifest.name
        if (self.world / identity / "container.json").exists():
            raise BusyError(f"there is a container {name}")
        job.write("creating", new_container_id=identity)
        try:
            upper = self.world / identity / "upper"
            upper.mkdir(parents=True, exist_ok=True)
            for volume, _ in manifest.volumes:
                directory = self.world / "volumes" / volume
                if volume in options.kept_volumes and directory.is_dir():
                    continue
                directory.mkdir(parents=True, exist_ok=True)
                volume_ready(volume, directory)
            rootfs_ready(upper)
            broken = os.environ.get("CKPT_FAKE_BROKEN", "")
            if (broken == "restore" or name in broken.split(",")) and not options.cold:
                raise RestoreFailed(f"{name} cannot be restored: it is broken")
            labels = json.loads((stage / "config.dump").read_text()).get("labels", {})
            pid = self._spawn(identity, 0 if options.cold else int(next((stage / "checkpoint").glob("pages-*.img")).read_bytes().rstrip(b"\0")))
            assert wait(lambda: process_state(pid) == "T")
            self._save(identity, name=name, pid=pid, broken="", volumes=[v for v, _ in manifest.volumes], created_s=time.time(), labels=labels)
            self._hold("post-restore", job, pid)
        except BaseException:
            self._forget(identity)
            raise
        return FakeHeldRestore(self, job, self._container(identity))

    def stop(self, container: Container, timeout_s: float) -> None:
        if pid := self.describe(container).pid:
            os.kill(pid, signal.SIGKILL)
            assert wait(lambda: not process_state(pid))

    def remove(self, container: Container) -> None:
        if self.describe(container).state in ("running", "paused"):
            raise BusyError(f"{container.name} is running")
        self._forget(container.id)

    def rollback(self, job: Job) -> None:
        facts = job.facts
        if facts["kind"] == "checkpoint":
            pid = int(self._load(facts["container_id"])["pid"])
            job.decide("1")
            if process_state(pid) == "T" and not job.held_path.exists():
                os.kill(pid, signal.SIGCONT)
            wait(lambda: process_state(pid) != "T")
        elif facts.get("new_container_id"):
            job.decide("1")
            self._forget(facts["new_container_id"])

    def _send_pages(self, port: int, pages: bytes, *, whole: bool) -> None:
        """One image of process 1, lazy pages; broken off in the middle unless `whole`."""
        with socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S) as server:
            image, header = 1 << 8 | 1, struct.Struct("=I4xQQQ")
            server.sendall(header.pack(4, 0, 0, image))
            server.recv(1)
            server.sendall(header.pack(6 | 6 << 16, len(pages) // 4096, 0x10000, image) + pages[: len(pages) if whole else len(pages) // 2])
            if not whole:
                raise OSError("it was killed")
            server.sendall(header.pack(0x1024, 0, 0, 0))
            if len(server.recv(4, socket.MSG_WAITALL)) < 4:
                raise OSError("the page server is gone")

    # -- inside --------------------------------------------------------------------------------------------------

    def _spawn(self, identity: str, number: int) -> int:
        argv = [sys.executable, "-I", "-S", "-c", _COUNTER, self.world / identity / "ticks", str(number), identity]
        process = spawn(argv, new_session=True)
        process.returncode = 0  # its end is nobody's business here; keeps Popen from warning
        return process.pid

    def _hold(self, action: str, job: Job, pid: int) -> None:
        job.held_path.unlink(missing_ok=True)
        argv = [sys.executable, "-I", "-S", Path(__file__).with_name("_fake_runtime.py"), action, job.directory, str(pid), CHECKOUT]
        spawn(argv, new_session=True).returncode = 0
        assert wait(job.held_path.exists)

    def _forget(self, identity: str) -> None:
        import shutil

        try:
            pid = int(self._load(identity)["pid"])
        except (TargetNotFound, KeyError):
            pid = 0
        if pid and self._is_counter(pid, identity):
            os.kill(pid, signal.SIGKILL)
            wait(lambda: not process_state(pid))
        shutil.rmtree(self.world / identity, ignore_errors=True)

    def _is_counter(self, pid: int, identity: str) -> bool:
        try:
            return identity in Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            return False

    def _save(self, identity: str, **facts: Any) -> None:
        path = self.world / identity / "container.json"
        path.with_suffix(".part").write_text(json.dumps(facts))
        path.with_suffix(".part").rename(path)

    def _load(self, identity: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.world / identity / "container.json").read_text())
        except OSError:
            raise TargetNotFound(f"there is no container {identity}") from None
        return found

    def _container(self, identity: str) -> Container:
        facts = self._load(identity)
        letter = process_state(facts["pid"]) if self._is_counter(facts["pid"], identity) else ""
        return Container(
            "fake",
            identity,
            facts["name"],
            "exited" if not letter else "paused" if letter == "T" else "running",
            pid=facts["pid"] if letter else None,
            runtime="fake",
            rootfs=RootFs(upper_dir=self.world / identity / "upper"),
            volumes=tuple(Volume(name, self.world / "volumes" / name, f"/{name}") for name in facts["volumes"]),
            created_s=facts["created_s"],
            labels=facts.get("labels", {}),
        )


def process_tree(images_dir: Path) -> tuple[Process, ...]:
    """Stands in for `ckpt.criu.images.process_tree`: the fake's images are JSON."""
    return tuple(Process(pid, ppid, comm, threads) for pid, ppid, comm, threads in json.loads((images_dir / "pstree.img").read_text()))


def install(world: Path, patch: Callable[[Any, str, Any], None] = setattr) -> FakeEngine:
    """Make the fake the only engine of this process, guards that it starts included. `patch`: monkeypatch.setattr, to undo it."""
    from ckpt.criu import images
    from ckpt.ops import capture, recover

    engine = FakeEngine(world)
    driver = str(Path(__file__).with_name("driver.py"))
    patch(registry, "engines", lambda: (engine,))
    patch(images, "process_tree", process_tree)
    patch(capture, "_criu_version", lambda: "0")
    patch(recover, "guard_argv", lambda directory: [sys.executable, driver, "fake", str(world), "guard", str(directory)])
    return engine
