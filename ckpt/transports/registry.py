"""The carrier of `oci://HOST/NAME:TAG`: checkpoints in OCI registries, as artifacts or as the images that engines know.

A checkpoint is under its tag when its manifest was accepted, and that is the last thing sent. Nothing on this host's own storage of
container images is ever touched. See docs/registry.md.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from ckpt.errors import ArchiveInvalid, CkptError, DigestMismatch, RemoteRefused, TargetNotFound, TransferFailed, UsageError
from ckpt.transports import _oci_name as names
from ckpt.transports.base import CarrierOptions, Download, Location, Payload, Stored, Upload

if TYPE_CHECKING:
    from ckpt.transports._oci_blob import Parts
    from ckpt.transports._oci_blob import Upload as BlobUpload
    from ckpt.transports._oci_http import Client
    from ckpt.transports._oci_manifest import Descriptor

_REFERRER_TRIES: Final = 3
_NO_SUCH_KIND: Final = (400, 415, 422)


class Registry:
    """OCI registries."""

    schemes = (names.SCHEME,)

    def check_write(self, location: Location, options: CarrierOptions) -> None:
        """Begin an upload and drop it: the connection, the credentials and the permission to push are there, and so is the subject.

        Raises:
            UsageError, CannotConnect, RemoteRefused, TargetNotFound, KeyProblem.
        """
        from ckpt.transports._oci_blob import Parts

        with _client(_destination(location), options, "pull,push") as client:
            Parts(client, options.chunk_bytes).abort()
            client.stop.clear()
            if options.registry_subject is not None:
                if options.registry_form != "artifact":
                    raise UsageError("only an artifact has a subject", hint="leave out --subject, or --as image")
                _named_subject(client, options)

    @contextmanager
    def open_read(self, location: Location, options: CarrierOptions) -> Iterator[Download]:
        """Find the checkpoint under a tag or digest and begin to read its archive.

        Raises:
            TargetNotFound, ArchiveInvalid, DigestMismatch, RemoteRefused, CannotConnect, TransferFailed, KeyProblem.
        """
        from ckpt.transports._oci_read import Download as BlobDownload

        reference = names.parse(location.raw)
        with _client(reference, options, "pull") as client:
            download = BlobDownload(client, [(layer.digest, layer.size_bytes) for layer in _find(client)])
            try:
                yield download
            finally:
                download.close()

    @contextmanager
    def open_write(self, location: Location, options: CarrierOptions, payload: Payload) -> Iterator[Upload]:
        """Begin an upload; bytes go while they are written.

        Raises:
            UsageError, RemoteRefused, CannotConnect, TransferFailed, KeyProblem.
        """
        from ckpt.transports import _oci_manifest

        reference = _destination(location)
        _oci_manifest.check_form(options.registry_form, payload)
        with _client(reference, options, "pull,push") as client:
            writing = _Image(client, options, payload) if options.registry_form == "image" else _Artifact(client, options, payload)
            try:
                yield writing
            finally:
                writing.close()


class _Artifact:
    """A checkpoint on its way into a registry, in parts."""

    def __init__(self, client: Client, options: CarrierOptions, payload: Payload) -> None:
        from ckpt.transports._oci_blob import Parts

        self._client = client
        self._options = options
        self._payload = payload
        self._parts: Parts | None = Parts(client, options.chunk_bytes)

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Take all of `data`."""
        assert self._parts is not None
        return self._parts.write(data)

    def commit(self) -> Stored:
        """The last blobs, then the manifest: only with it there is a checkpoint under the tag."""
        from ckpt.transports import _oci_manifest as manifests
        from ckpt.transports._oci_blob import put

        assert self._parts is not None
        client, payload = self._client, self._payload
        kind = manifests.layer_type("artifact", payload)
        layers = [manifests.Descriptor(kind, digest, size_bytes) for digest, size_bytes in self._parts.finish()]
        _check_there(client, layers[-1])
        subject = _named_subject(client, self._options) or _found_subject(client, payload)
        put(client, memoryview(b"{}"))
        data = manifests.artifact(layers, payload, subject)
        try:
            accepted, knows_subject = _put_manifest(client, data, client.reference.tag, manifests.MANIFEST)
        except _NoSuchKind:
            data = manifests.artifact(layers, payload, subject, old=True)
            accepted, knows_subject = _put_manifest(client, data, client.reference.tag, manifests.MANIFEST)
        self._parts = None
        if subject is not None and not knows_subject:
            entry = manifests.Descriptor(manifests.MANIFEST, accepted, len(data))
            try:
                _refer(client, subject, entry, manifests.annotations_of(data))
            except CkptError as error:  # the checkpoint itself is safe
                self._options.notice(f"the checkpoint is stored, but not listed as belonging to its image: {error.message}")
        whole = layers[0].digest.partition(":")[2] if len(layers) == 1 else None
        return Stored(sum(layer.size_bytes for layer in layers), whole, client.reference.at(accepted))

    def close(self) -> None:
        """Without a commit: forget it."""
        if self._parts is not None:
            self._parts.abort()


class _Image:
    """A checkpoint on its way into a registry, as an image of one layer."""

    def __init__(self, client: Client, options: CarrierOptions, payload: Payload) -> None:
        from ckpt.transports._oci_blob import Upload as BlobUpload
        from ckpt.transports._oci_tar import TarDigest

        self._client = client
        self._payload = payload
        self._blob: BlobUpload | None = BlobUpload(client, options.chunk_bytes)
        self._tar = TarDigest()

    def write(self, data: bytes | bytearray | memoryview, /) -> int:
        """Take all of `data`."""
        assert self._blob is not None
        self._tar.write(data)
        return self._blob.write(data)

    def commit(self) -> Stored:
        """The blobs, then the manifest: only with it there is a checkpoint under the tag."""
        from ckpt.transports import _oci_manifest as manifests
        from ckpt.transports._oci_blob import put

        assert self._blob is not None
        client = self._client
        config = manifests.image_config(self._payload, self._tar.finish())
        digest, size_bytes = self._blob.finish()
        layer = manifests.Descriptor(manifests.layer_type("image", self._payload), digest, size_bytes)
        _check_there(client, layer)
        described = manifests.Descriptor(manifests.CONFIG, put(client, memoryview(config)), len(config))
        accepted, _ = _put_manifest(client, manifests.image(described, layer, self._payload), client.reference.tag, manifests.MANIFEST)
        self._blob = None
        return Stored(size_bytes, digest.partition(":")[2], client.reference.at(accepted))

    def close(self) -> None:
        """Without a commit: forget it."""
        self._tar.close()
        if self._blob is not None:
            self._blob.abort()


class _NoSuchKind(RemoteRefused):
    """The registry takes no manifest of this kind."""


def _destination(location: Location) -> names.Reference:
    reference = names.parse(location.raw)
    if reference.digest:
        raise UsageError("a checkpoint is written under a tag, not a digest", hint="oci://HOST/NAME:TAG")
    return reference


@contextmanager
def _client(reference: names.Reference, options: CarrierOptions, actions: str) -> Iterator[Client]:
    from ckpt.transports._oci_http import Client
    from ckpt.transports._patience import Broken

    client = Client(reference, options, actions)
    try:
        client.connect()
        yield client
    except Broken as broken:  # none is left over, but should one be, it is no bug of ours
        raise TransferFailed(f"{reference.registry}: {broken}", hint="try again") from None
    finally:
        client.close()


def _check_there(client: Client, layer: Descriptor) -> None:
    """The registry has it, not only whoever it sent us to."""
    from ckpt.transports._oci_blob import stat

    if (has := stat(client, layer.digest)) != layer.size_bytes:
        raise TransferFailed(f"{client.reference.registry} has {has or 0} bytes of {layer.size_bytes} after it took all", hint="try again")


def _get_manifest(client: Client, wanted: str, name: str) -> tuple[bytes, str]:
    """A manifest, verified, and the registry's word for its kind. Raises TargetNotFound, DigestMismatch and what `Client` raises."""
    from ckpt.transports import _oci_manifest as manifests
    from ckpt.transports._oci_http import speaking
    from ckpt.transports._patience import Broken

    retry = client.retry()
    while True:
        try:
            response = client.get(client.url(f"manifests/{wanted}"), {"Accept": manifests.ACCEPT})
            with response, speaking(client.reference.registry):
                answer = client.small(response)
            break
        except Broken as broken:
            retry.wait(broken)
    if answer.status == 404:
        raise TargetNotFound(f"{client.reference.registry} has no {name}")
    if answer.status != 200:
        raise client.refusal(answer, f"{name} cannot be read")
    said = answer.headers.get("Docker-Content-Digest", "")
    if names.is_digest(wanted):
        manifests.check_digest(answer.body, wanted, name)
    elif names.is_digest(said):
        manifests.check_digest(answer.body, said, name)
    return answer.body, manifests.media_type_of(answer.body, answer.headers.get("Content-Type", ""))


def _find(client: Client) -> tuple[Descriptor, ...]:
    """The blobs of the checkpoint that the reference names."""
    from ckpt.transports import _oci_manifest as manifests

    name = str(client.reference)
    data, kind = _get_manifest(client, client.reference.wanted, name)
    several = manifests.choices(data, kind, name)
    if several is None:
        return manifests.read(data, name).layers
    found, refused = [], None
    for entry in several:
        inner, _ = _get_manifest(client, entry.digest, name)
        try:
            found.append((entry, manifests.read(inner, name).layers))
        except ArchiveInvalid as error:
            refused = error
    if len(found) == 1:
        return found[0][1]
    if found or refused is None:
        listed = ", ".join(entry.digest for entry, _ in found)
        raise ArchiveInvalid(f"{name} is an index of several checkpoints", hint=f"name one by its digest: {listed}")
    raise refused


def _put_manifest(client: Client, data: bytes, tag: str, kind: str) -> tuple[str, bool]:
    """Put a manifest under a tag: its digest, and whether the registry knows what a subject is."""
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    what = f"{client.reference.registry} does not take the manifest"
    answer = client.patient("PUT", client.url(f"manifests/{tag}"), headers={"Content-Type": kind}, body=data)
    if answer.status in _NO_SUCH_KIND:
        raise _NoSuchKind(client.refusal(answer, what).message)
    if answer.status not in (200, 201):
        raise client.refusal(answer, what)
    said = answer.headers.get("Docker-Content-Digest", "")
    if names.is_digest(said) and said.startswith("sha256:") and said != digest:
        raise DigestMismatch(f"{client.reference.registry} stored another manifest than the one that was sent")
    return digest, bool(answer.headers.get("OCI-Subject"))


def _named_subject(client: Client, options: CarrierOptions) -> Descriptor | None:
    """What `--subject` names. Raises UsageError for another registry, TargetNotFound."""
    if options.registry_subject is None:
        return None
    text, here = options.registry_subject, client.reference
    if names.is_digest(text.removeprefix("@")):
        text = here.at(text.removeprefix("@"))
    subject = names.parse(text)
    if subject.registry != here.registry:
        raise UsageError(f"the subject is in another registry than {here.registry}", hint="a subject is a manifest of the same registry")
    data, kind = _of_other(client, options, subject)
    return _descriptor(data, kind)


def _found_subject(client: Client, payload: Payload) -> Descriptor | None:
    """The container image that it was made from, if it is in this registry under the name that it had, and still the same."""
    from ckpt.transports import _oci_manifest as manifests

    about = payload.manifest
    if payload.encrypted or about is None or about.container_image is None:
        return None
    if not about.container_image.name.startswith(f"{client.reference.registry}/"):
        return None
    try:
        subject = names.parse(about.container_image.name)
        data, kind = _of_other(client, client.options, subject)
        same = manifests.config_digest(data).partition(":")[2] == about.container_image.id.removeprefix("sha256:")
    except CkptError:
        return None
    return _descriptor(data, kind) if same else None


def _of_other(client: Client, options: CarrierOptions, subject: names.Reference) -> tuple[bytes, str]:
    if subject.repository == client.reference.repository:
        return _get_manifest(client, subject.wanted, str(subject))
    with _client(subject, options, "pull") as other:
        return _get_manifest(other, subject.wanted, str(subject))


def _descriptor(data: bytes, kind: str) -> Descriptor:
    from ckpt.transports import _oci_manifest as manifests

    return manifests.Descriptor(kind, f"sha256:{hashlib.sha256(data).hexdigest()}", len(data))


def _refer(client: Client, subject: Descriptor, entry: Descriptor, annotations: dict[str, str]) -> None:
    """List the artifact under its subject where the registry does not do that itself: an index under the tag `sha256-HEX`.

    Two who do this at once may lose one entry, so it is looked at again afterwards.
    """
    from ckpt.transports import _oci_manifest as manifests

    tag = subject.digest.replace(":", "-")
    for _ in range(_REFERRER_TRIES):
        try:
            old: bytes | None = _get_manifest(client, tag, f"the tag {tag}")[0]
        except TargetNotFound:
            old = None
        if old is not None and entry.digest.encode() in old:
            return
        _put_manifest(client, manifests.index_with(old, entry, annotations), tag, manifests.INDEX)


CARRIER = Registry()
