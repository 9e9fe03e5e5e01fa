"""Manifests of checkpoints in a registry: ours (image or artifact), and what is read of anybody's. What is read is hostile.

An image is what podman, CRI-O and checkpointctl know: one layer with the members of the archive at its root, annotations that say so.
An artifact (OCI image-spec 1.1) is the archive cut into blobs, to be put together in order: no engine runs it by accident.

Sources: podman define/annotations.go, checkpointctl lib/annotations.go,
CRI-O server/container_restore.go; image-spec 1.1 manifest.md, image-index.md, config.md.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, Final

from ckpt import __version__
from ckpt.errors import ArchiveInvalid, DigestMismatch, UsageError
from ckpt.model import Manifest
from ckpt.transports._oci_name import is_digest
from ckpt.transports.base import Payload

MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
INDEX: Final = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST: Final = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST: Final = "application/vnd.docker.distribution.manifest.list.v2+json"
ACCEPT: Final = ", ".join((MANIFEST, INDEX, DOCKER_MANIFEST, DOCKER_LIST))

ARTIFACT: Final = "application/vnd.ckpt.checkpoint.v1"
ARCHIVE: Final = f"{ARTIFACT}.tar"
SEALED: Final = f"{ARTIFACT}.encrypted"
EMPTY: Final = "application/vnd.oci.empty.v1+json"
CONFIG: Final = "application/vnd.oci.image.config.v1+json"
LAYER: Final = "application/vnd.oci.image.layer.v1.tar"

_SUFFIX: Final = {"none": "", "gzip": "+gzip", "zstd": "+zstd"}
_ARTIFACT_LAYERS: Final = frozenset({SEALED, *(ARCHIVE + suffix for suffix in _SUFFIX.values())})
_IMAGE_LAYERS: Final = frozenset({*(LAYER + suffix for suffix in _SUFFIX.values()), "application/vnd.docker.image.rootfs.diff.tar.gzip"})

_PODMAN: Final = "io.podman.annotations.checkpoint."
_CRIU: Final = "org.criu.checkpoint."
_CRIO: Final = "io.kubernetes.cri-o.annotations.checkpoint.name"
_OPEN: Final = "org.opencontainers.image."
_MAX_ITEMS: Final = 1000
_MAX_PARTS: Final = 30_000
_MAX_CHOICES: Final = 8
_ARCHITECTURES: Final = {
    "x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386", "i386": "386", "loongarch64": "loong64",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Descriptor:
    """A blob or manifest: what it is, by digest and size in bytes."""

    media_type: str
    digest: str
    size_bytes: int

    def plain(self) -> dict[str, Any]:
        """As it stands in a manifest."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size_bytes}


@dataclass(frozen=True, slots=True)
class Found:
    """A manifest that is a checkpoint: the blobs that make up its archive, one after the other, and in what form."""

    layers: tuple[Descriptor, ...]
    form: str
    annotations: dict[str, str] = field(default_factory=dict)


# -- what is written -------------------------------------------------------------------------------------------------------------------


def check_form(form: str, payload: Payload) -> None:
    """Whether what is to be written can have this form.

    Raises:
        UsageError: it cannot.
    """
    if form == "artifact":
        return
    if payload.encrypted:
        raise UsageError("an encrypted archive cannot be an image: engines could not read it", hint="--as artifact")
    if payload.manifest is None or payload.manifest.engine not in ("podman", "cri"):
        engine = payload.manifest.engine if payload.manifest else "nobody knows what"
        raise UsageError(f"only a checkpoint of podman can be an image, this is one of {engine}", hint="--as artifact")


def layer_type(form: str, payload: Payload) -> str:
    """The media type of the blob."""
    if payload.encrypted:
        return SEALED
    return (LAYER if form == "image" else ARCHIVE) + _SUFFIX.get(payload.compression, "")


def image_config(payload: Payload, diff_id: str) -> bytes:
    """The config of an image with one layer; `diff_id` is the digest of the layer's tar before it was compressed."""
    about = payload.manifest
    machine = about.host.arch if about and about.host.arch else platform.machine()
    when = _when(about)
    return _json(
        {
            "created": when,
            "architecture": _ARCHITECTURES.get(machine, machine),
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
            "history": [{"created": when, "created_by": f"ckpt {__version__}", "comment": "a checkpoint, not to be run"}],
        }
    )


def image(config: Descriptor, layer: Descriptor, payload: Payload) -> bytes:
    """The manifest of a checkpoint as an image."""
    return _json(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config.plain(),
            "layers": [layer.plain()],
            "annotations": {**_about(payload), **_engines(payload.manifest)},
        }
    )


def artifact(layers: Sequence[Descriptor], payload: Payload, subject: Descriptor | None, *, old: bool = False) -> bytes:
    """The manifest of a checkpoint as an artifact; its config is the empty one, `{}`.

    `old`: for registries of before image-spec 1.1 that take no `artifactType`: the config's media type says it instead.
    """
    title = "checkpoint.tar" + {"gzip": ".gz", "zstd": ".zst"}.get(payload.compression, "") + (".age" if payload.encrypted else "")
    titles = [title] if len(layers) == 1 else [f"{title}.{number:05}" for number in range(len(layers))]
    found: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        **({} if old else {"artifactType": ARTIFACT}),
        "config": {**empty().plain(), **({"mediaType": ARTIFACT} if old else {"data": "e30="})},
        "layers": [{**item.plain(), "annotations": {f"{_OPEN}title": name}} for item, name in zip(layers, titles, strict=True)],
        "annotations": {**_about(payload), **({} if payload.encrypted else _neutral(payload.manifest))},
    }
    if subject is not None:
        found["subject"] = subject.plain()
    return _json(found)


def empty() -> Descriptor:
    """The empty config."""
    return Descriptor(EMPTY, f"sha256:{hashlib.sha256(b'{}').hexdigest()}", 2)


def index_with(old: bytes | None, entry: Descriptor, annotations: dict[str, str]) -> bytes:
    """The index that stands in for the referrers API (distribution-spec, "Referrers tag schema"), with one entry more.

    Raises:
        ArchiveInvalid: there is something else under the tag.
    """
    entries: list[Any] = []
    if old is not None:
        plain = _object(old)
        found = plain.get("manifests")
        if plain.get("mediaType", INDEX) != INDEX or not isinstance(found, list) or len(found) > _MAX_ITEMS:
            raise ArchiveInvalid("the tag for referrers holds something else than an index")
        entries = [item for item in found if not (isinstance(item, dict) and item.get("digest") == entry.digest)]
    entries.append({**entry.plain(), "artifactType": ARTIFACT, "annotations": annotations})
    return _json({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries})


def annotations_of(manifest: bytes) -> dict[str, str]:
    """The annotations of a manifest of ours."""
    return _annotations(_object(manifest))


def _about(payload: Payload) -> dict[str, str]:
    """What may be known of any checkpoint; of an encrypted one only when it came here."""
    return {f"{_OPEN}created": _when(None if payload.encrypted else payload.manifest), "org.criu.checkpoint.engine.name": "ckpt"} | (
        {} if payload.encrypted or payload.manifest is None else {f"{_OPEN}title": payload.manifest.name}
    )


def _neutral(about: Manifest | None) -> dict[str, str]:
    """checkpointctl's names, the same for all engines. The engine is the container's own, as checkpointctl writes it."""
    if about is None:
        return {}
    image = about.container_image
    return _filled(
        {
            "engine.name": {"cri": "cri-o"}.get(about.engine, about.engine),
            "engine.version": about.engine_version,
            "container.name": about.name,
            "rootfsImageName": image.name if image else "",
            "rawImageName": image.name if image else "",
            "rootfsImageID": image.id if image else "",
            "runtime.name": PurePath(about.runtime or "").name,
            "criu.version": about.host.criu_version,
            "host.arch": about.host.arch,
            "host.kernel": about.host.kernel,
        },
        _CRIU,
    )


def _engines(about: Manifest | None) -> dict[str, str]:
    """What engines recognise a checkpoint by: podman `runtime.name` (equal to the host's), CRI-O its name, containerd `container.name`."""
    if about is None:
        return {}
    image = about.container_image
    podman = {
        "name": about.name,
        "rawImageName": image.name if image else "",
        "rootfsImageName": image.name if image else "",
        "rootfsImageID": image.id if image else "",
        "podman.version": about.engine_version,
        "criu.version": _criu_number(about.host.criu_version),
        "runtime.name": PurePath(about.runtime or "").name,
        "host.arch": _ARCHITECTURES.get(about.host.arch, about.host.arch),
        "host.kernel": about.host.kernel,
    }
    return {**_neutral(about), **(_filled(podman, _PODMAN) if about.engine == "podman" else {}), _CRIO: about.name}


def _filled(values: dict[str, str], prefix: str) -> dict[str, str]:
    return {prefix + key: value for key, value in values.items() if value}


def _criu_number(version: str) -> str:
    """CRIU's own way to write a version as one number: 4.2.1 is 40201."""
    parts = version.split(".")
    if not parts[0].isdigit():
        return ""
    numbers = [int(part) if part.isdigit() else 0 for part in [*parts, "0", "0"][:3]]
    return str(numbers[0] * 10000 + numbers[1] * 100 + numbers[2])


def _when(about: Manifest | None) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(about.created_s if about and 0 < about.created_s < 1e11 else time.time()))


def _json(plain: dict[str, Any]) -> bytes:
    return json.dumps(plain, separators=(",", ":"), sort_keys=False).encode()


# -- what is read ----------------------------------------------------------------------------------------------------------------------


def check_digest(data: bytes, digest: str, what: str) -> None:
    """Raise DigestMismatch unless the digest is that of the bytes."""
    algorithm, _, value = digest.partition(":")
    if hashlib.new(algorithm, data).hexdigest() != value:
        raise DigestMismatch(f"{what} is not what its digest says")


def choices(data: bytes, media_type: str, name: str) -> list[Descriptor] | None:
    """The manifests among which an index lets choose, checkpoints of ours first; None for what is no index.

    Raises:
        ArchiveInvalid: it is damaged, or has so many that one must be named.
    """
    plain = _object(data)
    if plain.get("mediaType", media_type) not in (INDEX, DOCKER_LIST):
        return None
    entries = plain.get("manifests")
    if not isinstance(entries, list) or len(entries) > _MAX_ITEMS:
        raise ArchiveInvalid(f"{name} is a damaged index")
    marked: list[Descriptor] = []
    others: list[Descriptor] = []
    machine = _ARCHITECTURES.get(platform.machine(), platform.machine())
    for entry in entries:
        if not isinstance(entry, dict) or entry.get("mediaType") not in (MANIFEST, DOCKER_MANIFEST):
            continue
        found = _descriptor(entry, name)
        where = entry.get("platform")
        fits = not isinstance(where, dict) or where.get("architecture") in (machine, "unknown", None)
        if entry.get("artifactType") == ARTIFACT or _is_marked(_annotations(entry)):
            marked.append(found)
        elif fits:
            others.append(found)
    found_here = marked or others
    if not found_here:
        raise ArchiveInvalid(f"{name} is an index without any manifest for this host")
    if len(found_here) > (1 if marked else _MAX_CHOICES):
        listed = ", ".join(item.digest for item in found_here[:_MAX_CHOICES])
        raise ArchiveInvalid(f"{name} is an index of several checkpoints", hint=f"name one by its digest: {listed}")
    return found_here


def read(data: bytes, name: str) -> Found:
    """What a manifest holds, if it is a checkpoint.

    Raises:
        ArchiveInvalid: it is none, or not one that ckpt can read.
    """
    plain = _object(data)
    if plain.get("schemaVersion") != 2 or plain.get("mediaType", MANIFEST) not in (MANIFEST, DOCKER_MANIFEST):
        raise ArchiveInvalid(f"{name} has a manifest of an unknown kind")
    layers, config = plain.get("layers"), plain.get("config")
    if not isinstance(layers, list) or len(layers) > _MAX_PARTS or not isinstance(config, dict):
        raise ArchiveInvalid(f"{name} has a damaged manifest")
    annotations = _annotations(plain)
    kind = plain.get("artifactType") or config.get("mediaType")
    form = "artifact" if kind == ARTIFACT else "image"
    if form == "image":
        if plain.get("mediaType") == DOCKER_MANIFEST and not annotations:
            raise ArchiveInvalid(f"{name} is an image in docker's format, which cannot say that it is a checkpoint",
                                 hint="push the checkpoint with --format oci")  # fmt: skip
        if not _is_marked(annotations):
            what = "an artifact of another kind" if plain.get("artifactType") else "a container image"
            raise ArchiveInvalid(f"{name} is {what}, not a checkpoint", hint="ckpt export makes one, podman container checkpoint --create-image too")
    if not layers or (len(layers) > 1 and form == "image"):
        raise ArchiveInvalid(f"{name} has {len(layers)} layers, a checkpoint image has one", hint="build it squashed")
    kinds = {item.get("mediaType") if isinstance(item, dict) else None for item in layers}
    if len(kinds) != 1 or not kinds <= (_ARTIFACT_LAYERS if form == "artifact" else _IMAGE_LAYERS):
        raise ArchiveInvalid(f"{name} has a layer of a kind that is not read")
    return Found(tuple(_descriptor(item, name) for item in layers), form, annotations)


def config_digest(data: bytes) -> str:
    """The digest of the config of an image: podman's image id. "" when there is none."""
    config = _object(data).get("config")
    digest = config.get("digest") if isinstance(config, dict) else None
    return digest if isinstance(digest, str) and is_digest(digest) else ""


def media_type_of(data: bytes, header: str) -> str:
    """What a manifest says of itself, else what the registry says of it."""
    said = _object(data).get("mediaType")
    return said if isinstance(said, str) else header.partition(";")[0].strip()


def _object(data: bytes) -> dict[str, Any]:
    try:
        plain = json.loads(data)
    except (ValueError, RecursionError):
        plain = None
    if not isinstance(plain, dict):
        raise ArchiveInvalid("the registry has a manifest that is not a JSON object")
    return plain


def _descriptor(plain: dict[str, Any], name: str) -> Descriptor:
    kind, digest, size = plain.get("mediaType"), plain.get("digest"), plain.get("size")
    if not isinstance(kind, str) or not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 62:
        raise ArchiveInvalid(f"{name} has a manifest with a damaged entry")
    if not isinstance(digest, str) or not is_digest(digest):
        raise ArchiveInvalid(f"{name} has a manifest with a digest of a kind that is not verified")
    return Descriptor(kind, digest, size)


def _annotations(plain: dict[str, Any]) -> dict[str, str]:
    found = plain.get("annotations")
    return {k: v for k, v in found.items() if isinstance(v, str)} if isinstance(found, dict) and len(found) <= _MAX_ITEMS else {}


def _is_marked(annotations: dict[str, str]) -> bool:
    return any(key.startswith((_PODMAN, _CRIU)) or key == _CRIO for key in annotations)
