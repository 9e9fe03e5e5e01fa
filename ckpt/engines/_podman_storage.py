"""What podman keeps beside its containers: container images, volumes, networks."""

from __future__ import annotations

import json
import os
import select
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, cast

from ckpt.engines import _hold
from ckpt.engines._podman_cli import QUERY_TIMEOUT_S, podman
from ckpt.engines._podman_held import drop_volumes
from ckpt.errors import BusyError, CkptError, TransferFailed
from ckpt.host.run import PIPE, CommandFailed, Process, spawn, which
from ckpt.model import ContainerImage
from ckpt.store.job import Job


class Storage:
    """The engine's share in them."""

    @contextmanager
    def save_container_image(self, image: ContainerImage) -> Iterator[BinaryIO]:
        # docker-archive rewrites the configuration of an OCI container image, and with it the id; oci-archive that of a Docker one.
        kind = podman("image", "inspect", "--format", "{{.ManifestType}}", image.id).text
        form = "docker-archive" if "docker" in kind else "oci-archive"
        with TemporaryDirectory(prefix="ckpt-") as directory:
            # A FIFO: podman cannot write an oci-archive to /dev/stdout when that is a pipe.
            fifo = Path(directory) / "container-image"
            os.mkfifo(fifo, 0o600)
            process = spawn([which("podman") or "podman", "image", "save", "--quiet", "--format", form, "--output", fifo, image.id], stderr=PIPE)
            try:
                fd = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                with os.fdopen(fd, "rb", buffering=0) as stream:
                    poller = select.poll()
                    poller.register(fd, select.POLLIN)
                    while not poller.poll(50) and process.poll() is None:
                        pass
                    os.set_blocking(fd, True)
                    yield cast(BinaryIO, stream)
                if process.wait(timeout=QUERY_TIMEOUT_S) != 0:
                    assert process.stderr is not None
                    said = process.stderr.read().decode(errors="replace").strip().rsplit("\n", 1)[-1]
                    raise TransferFailed(f"container image {image.name} cannot be read: {said}")
            finally:
                _hold.end_process(process)

    def load_container_image(self) -> Process:
        return spawn([which("podman") or "podman", "image", "load", "--quiet"], stdin=PIPE, stdout=PIPE, stderr=PIPE)

    def name_container_image(self, image: ContainerImage) -> None:
        if image.name and not podman("image", "exists", image.name, check=False).ok:
            podman("image", "tag", image.id, image.name)

    def has_named(self, image: ContainerImage) -> bool:
        found = podman("image", "inspect", "--format", "{{.Id}}", "--", image.name or image.id, check=False)
        return found.ok and found.text.strip() == image.id

    def remove_container_image(self, image_id: str) -> None:
        # Never --force: that ends and removes the containers which use it, of another migration, say, that brought the same one.
        podman("image", "rm", image_id, check=False)

    def has_container_image(self, image_id: str) -> bool:
        """True when the container image with this very id is in podman's storage."""
        return podman("image", "exists", image_id, check=False).ok

    def image_now(self, image: ContainerImage) -> str:
        found = podman("image", "inspect", "--format", "{{.Id}}", "--", image.name, check=False)
        return found.text.strip() if found.ok else ""

    def volume_users(self, name: str) -> list[str]:
        return podman("ps", "-a", "-q", "--no-trunc", "--filter", f"volume={name}", check=False).text.split()

    def volume_names(self) -> list[str]:
        """The named volumes here."""
        return podman("volume", "ls", "--format", "{{.Name}}").text.split()

    def make_volume(self, job: Job, name: str) -> Path:
        made = list(job.facts.get("volumes_ahead", []))
        if podman("volume", "exists", name, check=False).ok:
            raise BusyError(f"volume {name} already exists here", hint="remove or rename it, or use --ignore-volumes to use it as it is")
        job.write("volume", volumes_ahead=[*made, name])
        try:
            podman("volume", "create", name)
        except CommandFailed as error:
            job.write("volume", volumes_ahead=made)  # somebody was faster: it is not ours
            raise CkptError(f"volume {name} cannot be made: {error.reason}") from error
        return Path(podman("volume", "inspect", "--format", "{{.Mountpoint}}", name).text.strip())

    def drop_volumes(self, job: Job) -> None:
        drop_volumes(job, "volumes_ahead")

    def remove_volumes(self, names: Sequence[str]) -> None:
        """Remove the named volumes that no container uses any more; one that is in use stays."""
        for name in names:
            podman("volume", "rm", name, check=False)

    def network_names(self) -> list[str]:
        """The networks here."""
        return podman("network", "ls", "--format", "{{.Name}}").text.split()

    def network_details(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Of those of these networks that are here: driver, subnets, the interface of this host below it, and whether other hosts share it."""
        result = podman("network", "inspect", *names, check=False)
        try:
            found = json.loads(result.text or "[]")
        except ValueError:
            return {}
        return {
            str(network["name"]): {
                "driver": str(network.get("driver", "")),
                "subnets": [str(subnet.get("subnet", "")) for subnet in network.get("subnets") or []],
                "interface": str(network.get("network_interface", "")),
                # podman-network-create(1): with mode unmanaged the bridge is the administrator's.
                "shared": network.get("driver") in ("macvlan", "ipvlan") or (network.get("options") or {}).get("mode") == "unmanaged",
            }
            for network in found
        }
