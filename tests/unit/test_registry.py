"""Checkpoints in registries: uploads and downloads that break at any byte, answers that lie, credentials that must not leak."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ckpt.errors import (
    ArchiveInvalid,
    CannotConnect,
    DigestMismatch,
    KeyProblem,
    RemoteRefused,
    TargetNotFound,
    TransferFailed,
    UsageError,
)
from ckpt.model import ContainerImage, HostFacts, Manifest
from ckpt.transports import _oci_auth, _oci_credentials, _oci_http, _oci_manifest, _oci_name, _oci_read, _oci_tls, registry
from ckpt.transports.base import CarrierOptions, Location, Payload, Stored
from tests.unit.fake_registry import FakeRegistry, Handler

CHUNK = 64 << 10
DATA = random.Random(4).randbytes(5 * CHUNK + 777)
OPTIONS = CarrierOptions(chunk_bytes=CHUNK, retry_limit_s=5.0, idle_timeout_s=5.0)
IMPATIENT = replace(OPTIONS, retry_limit_s=0.3, idle_timeout_s=0.5)
ABOUT = Manifest(
    id="1" * 64, name="web", engine="podman", container_id="c" * 64, created_s=1.7e9, runtime="/usr/bin/crun", engine_version="5.4.2",
    container_image=ContainerImage("d" * 64, "localhost/web:1"), host=HostFacts(arch="x86_64", kernel="6.12", criu_version="4.2.1"),
)  # fmt: skip
PODMAN = "io.podman.annotations.checkpoint."


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No credentials of whoever runs the tests."""
    for name in ("REGISTRY_AUTH_FILE", "XDG_CONFIG_HOME", "DOCKER_CONFIG", "https_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""The system's authorities take a while to be read."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeRegistry]:
    real = _oci_http.tls
    monkeypatch.setattr(_oci_http, "tls", lambda where, options: real(where, options) if options.ca_file else NO_TLS)
    with FakeRegistry() as made:
        yield made


def at(fake: FakeRegistry, what: str = "ns/web:1") -> Location:
    return Location.parse(f"oci://{fake.name}/{what}")


def push(fake: FakeRegistry, data: bytes = DATA, options: CarrierOptions = OPTIONS, payload: Payload | None = None, form: Any = None) -> Stored:
    if form:
        options, payload = replace(options, registry_form=form), Payload(manifest=ABOUT)
    with registry.CARRIER.open_write(at(fake), options, payload or Payload()) as upload:
        for start in range(0, len(data), 10_000):
            upload.write(data[start : start + 10_000])
        return upload.commit()


def pull(fake: FakeRegistry, what: str = "ns/web:1", options: CarrierOptions = OPTIONS) -> bytes:
    with registry.CARRIER.open_read(at(fake, what), options) as download:
        return b"".join(iter(lambda: download.read(7_777), b""))


def sent(fake: FakeRegistry) -> int:
    """Bytes of content that went out, as often as they did."""
    seen = [*fake.requests("PATCH"), *fake.requests("PUT", "uploads")]
    return sum(size for one in seen if (size := int(one.headers["Content-Length"])) != 2) - config_bytes(fake)


def config_bytes(fake: FakeRegistry) -> int:
    return sum(len(data) for data in fake.blobs.values() if b'"diff_ids"' in data)


def manifest_of(fake: FakeRegistry, tag: str = "1") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(fake.manifests["ns/web", tag][0])
    return found


def assert_nothing_left(fake: FakeRegistry) -> None:
    assert fake.manifests == {} and fake.uploads == {}


FORMS = pytest.mark.parametrize("form", ["artifact", "image"])


# -- up and down -----------------------------------------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("size", [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, len(DATA)])
def test_up_and_down(fake: FakeRegistry, size: int, form: str) -> None:
    stored = push(fake, DATA[:size], form=form)
    whole = hashlib.sha256(DATA[:size]).hexdigest()
    assert (stored.size_bytes, stored.sha256) == (size, whole if form == "image" or size <= CHUNK else None)
    assert pull(fake) == DATA[:size]
    assert stored.reference is not None
    assert pull(fake, "ns/web@" + stored.reference.partition("@")[2]) == DATA[:size]
    assert fake.uploads == {}


def test_nothing_is_something_too(fake: FakeRegistry) -> None:
    assert push(fake, b"").size_bytes == 0
    assert pull(fake) == b""


@FORMS
def test_bytes_go_while_more_are_made(fake: FakeRegistry, form: Any) -> None:
    with registry.CARRIER.open_write(at(fake), replace(OPTIONS, registry_form=form), Payload(manifest=ABOUT)) as upload:
        upload.write(DATA[: 2 * CHUNK])
        end = time.monotonic() + 10
        while fake.patched_bytes < 2 * CHUNK:
            assert time.monotonic() < end, "nothing goes before the end"
            time.sleep(0.005)
        assert fake.manifests == {}
        upload.commit()
    assert pull(fake) == DATA[: 2 * CHUNK]


def test_what_is_not_committed_is_not_there(fake: FakeRegistry) -> None:
    with pytest.raises(ZeroDivisionError), registry.CARRIER.open_write(at(fake), OPTIONS, Payload()) as upload:
        upload.write(DATA)
        _ = 1 / 0
    assert_nothing_left(fake)
    assert threading.active_count() < 20 and not [t for t in threading.enumerate() if t.name == "ckpt-registry"]


def test_the_check_before_anything_is_frozen(fake: FakeRegistry) -> None:
    registry.CARRIER.check_write(at(fake), OPTIONS)
    assert_nothing_left(fake)
    fake.hook = lambda h: h.command == "POST" and (h.error(403, "DENIED") or True)
    with pytest.raises(RemoteRefused, match="DENIED"):
        registry.CARRIER.check_write(at(fake), OPTIONS)
    with pytest.raises(UsageError, match="under a tag"):
        registry.CARRIER.check_write(at(fake, "ns/web@sha256:" + "0" * 64), OPTIONS)


@FORMS
@pytest.mark.parametrize("seed", range(50))
def test_an_upload_cut_at_a_random_byte(fake: FakeRegistry, seed: int, form: str) -> None:
    chance = random.Random(seed)
    fake.cuts.extend([-1] * chance.randrange(6))
    fake.cuts.append(chance.randrange(CHUNK))
    stored = push(fake, form=form)
    assert pull(fake) == DATA and stored.sha256 in (None, hashlib.sha256(DATA).hexdigest())
    assert sent(fake) - len(DATA) <= CHUNK


def test_an_upload_cut_fifty_times(fake: FakeRegistry) -> None:
    chance = random.Random(7)
    fake.cuts.extend(chance.randrange(1, 6_000) for _ in range(50))
    push(fake, form="image")
    assert pull(fake) == DATA
    assert fake.patched_bytes == len(DATA) + config_bytes(fake)


def test_every_part_is_cut_twice(fake: FakeRegistry) -> None:
    fake.cuts.extend([1000, CHUNK // 2, -1] * 6)
    push(fake)
    assert pull(fake) == DATA
    assert len(manifest_of(fake)["layers"]) == 6 and len(fake.blobs) == 7


@FORMS
@pytest.mark.parametrize("seed", range(50))
def test_a_download_cut_at_a_random_byte(fake: FakeRegistry, seed: int, form: str) -> None:
    push(fake, form=form)
    chance = random.Random(seed)
    fake.read_cuts.extend([-1] * (before := chance.randrange(6) if form == "artifact" else 0))
    fake.read_cuts.append(chance.randrange(777 if before == 5 else CHUNK))
    assert pull(fake) == DATA
    assert len(fake.requests("GET", "/blobs/sha256")) == (7 if form == "artifact" else 2)


def test_a_download_from_one_who_knows_no_ranges(fake: FakeRegistry) -> None:
    push(fake, form="image")
    fake.ranges = False
    fake.read_cuts.extend([100_000, 150_000])
    assert pull(fake) == DATA


def test_a_small_container_of_data_is_bounded(fake: FakeRegistry) -> None:
    fake.min_chunk = 2 * CHUNK
    push(fake, form="image")
    sizes = [int(seen.headers["Content-Length"]) for seen in fake.requests("PATCH")]
    assert max(sizes) == 2 * CHUNK and sizes[0] == 2 * CHUNK
    fake.min_chunk = 1 << 40
    with pytest.raises(RemoteRefused, match="wants chunks"):
        push(fake, form="image")


def once(status: int, method: str = "PUT", times: int = 1, **headers: str) -> Callable[[Handler], bool]:
    left = [times]

    def hook(handler: Handler) -> bool:
        if handler.command != method or left[0] == 0:
            return False
        left[0] -= 1
        handler.body()
        handler.error(status, "SO", **headers)
        return True

    return hook


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
@pytest.mark.parametrize(("method", "form"), [("POST", "artifact"), ("PATCH", "image"), ("PUT", "artifact"), ("HEAD", "image")])
def test_a_busy_registry_is_asked_again(fake: FakeRegistry, status: int, method: str, form: str) -> None:
    fake.hook = once(status, method, 2)
    push(fake, form=form)
    assert pull(fake) == DATA


def test_retry_after_is_heeded_but_not_for_long(fake: FakeRegistry) -> None:
    fake.hook = once(429, **{"Retry-After": "1"})
    began = time.monotonic()
    push(fake)
    assert 1.0 <= time.monotonic() - began < 4.0
    fake.hook = once(503, **{"Retry-After": "86400"})
    began = time.monotonic()
    with pytest.raises(TransferFailed):
        push(fake)
    assert time.monotonic() - began < 4.0


def test_for_ever_busy(fake: FakeRegistry) -> None:
    fake.hook = once(503, times=-1)
    with pytest.raises(TransferFailed, match="503") as caught:
        push(fake, options=IMPATIENT)
    assert caught.value.exit_code == 41
    assert_nothing_left(fake)


@FORMS
def test_too_large_a_chunk_is_made_smaller(fake: FakeRegistry, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    from ckpt.transports import _oci_blob

    monkeypatch.setattr(_oci_blob, "_SMALL_PIECE", 30_000)
    fake.max_body = 31_000
    push(fake, form=form)
    assert pull(fake) == DATA
    fake.max_body = 20_000
    with pytest.raises(RemoteRefused, match="413") as caught:
        push(fake, form=form)
    assert caught.value.exit_code == 43


def test_a_registry_that_forgot_the_upload(fake: FakeRegistry) -> None:
    def forget(handler: Handler) -> bool:
        if handler.command == "PATCH" and fake.patched_bytes >= 3 * CHUNK:
            fake.uploads.clear()
        return False

    fake.hook = forget
    with pytest.raises(TransferFailed, match="forgotten"):
        push(fake, form="image")
    assert fake.manifests == {}


@pytest.mark.parametrize("says", ["0-999999999", "0-5", "nonsense"])
def test_a_registry_that_lies_about_what_it_has(fake: FakeRegistry, says: str) -> None:
    def lie(handler: Handler) -> bool:
        if handler.command != "PATCH" or fake.patched_bytes < 2 * CHUNK:
            return False
        fake.patched_bytes += len(handler.body())
        handler.answer(202, {"Location": handler.path, "Range": says})
        return True

    fake.hook = lie
    with pytest.raises((RemoteRefused, DigestMismatch)):
        push(fake, options=IMPATIENT, form="image")
    assert fake.manifests == {}


@FORMS
def test_the_answer_to_the_last_word_is_lost(fake: FakeRegistry, form: str) -> None:
    def lose(handler: Handler) -> bool:
        if handler.command != "PUT" or "uploads" not in handler.path:
            return False
        fake.hook = lambda h: False
        number = handler.path.partition("?")[0].rpartition("/")[2]
        fake.add_blob(bytes(fake.uploads.pop(number)) + handler.body())
        handler.reset()
        return True

    fake.hook = lose
    push(fake, form=form)
    assert pull(fake) == DATA


@pytest.mark.parametrize("part", ["uploads", "manifests"])
def test_something_else_was_stored(fake: FakeRegistry, part: str) -> None:
    def other(handler: Handler) -> bool:
        if handler.command != "PUT" or part not in handler.path:
            return False
        handler.body()
        handler.answer(201, {"Docker-Content-Digest": "sha256:" + "0" * 64})
        return True

    fake.hook = other
    with pytest.raises(DigestMismatch) as caught:
        push(fake)
    assert caught.value.exit_code == 31
    assert fake.manifests == {}


def test_a_registry_of_before_artifacts(fake: FakeRegistry) -> None:
    def old(handler: Handler) -> bool:
        if handler.command != "PUT" or "manifests" not in handler.path:
            return False
        fake.hook = lambda h: False
        handler.body()
        handler.error(400, "MANIFEST_INVALID")
        return True

    fake.hook = old
    push(fake)
    assert "artifactType" not in manifest_of(fake)
    assert pull(fake) == DATA


# -- what comes down is not believed ---------------------------------------------------------------------------------------------------


def test_damaged_content(fake: FakeRegistry) -> None:
    push(fake)
    layer = manifest_of(fake)["layers"][2]["digest"]
    right = fake.blobs[layer]
    for wrong in (right[:-1] + bytes([right[-1] ^ 1]), right[:-1], right + b"x"):
        fake.blobs[layer] = wrong
        with pytest.raises(DigestMismatch), registry.CARRIER.open_read(at(fake), OPTIONS) as download:
            while download.read(1000):
                pass
    del fake.blobs[layer]
    with pytest.raises(TargetNotFound):
        pull(fake)


def test_content_that_never_ends(fake: FakeRegistry) -> None:
    push(fake)

    def endless(handler: Handler) -> bool:
        if "/blobs/sha256" not in handler.path:
            return False
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(65536))

    fake.hook = endless
    with pytest.raises(DigestMismatch, match="more than"):
        pull(fake)


LAYER = {"mediaType": _oci_manifest.LAYER + "+gzip", "digest": "sha256:" + "1" * 64, "size": 10}
IMAGE = {
    "schemaVersion": 2, "mediaType": _oci_manifest.MANIFEST, "layers": [LAYER], "annotations": {PODMAN + "runtime.name": "crun"},
    "config": {"mediaType": _oci_manifest.CONFIG, "digest": "sha256:" + "2" * 64, "size": 10},
}  # fmt: skip
FOREIGN_LAYER = {**LAYER, "mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip", "urls": ["http://evil/"]}
INDEX = {"schemaVersion": 2, "mediaType": _oci_manifest.INDEX}


@pytest.mark.parametrize(
    ("plain", "text"),
    [
        (b"[]", "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b"\xff", "not a JSON object"),
        ({**IMAGE, "annotations": {}}, "not a checkpoint"),
        ({**IMAGE, "annotations": {PODMAN + "runtime.name": 7}}, "not a checkpoint"),
        ({**IMAGE, "annotations": {}, "mediaType": _oci_manifest.DOCKER_MANIFEST}, "docker's format"),
        ({**IMAGE, "annotations": {}, "artifactType": "application/x.other"}, "another kind"),
        ({**IMAGE, "layers": [LAYER, LAYER]}, "2 layers"),
        ({**IMAGE, "layers": []}, "0 layers"),
        ({**IMAGE, "layers": [FOREIGN_LAYER]}, "not read"),
        ({**IMAGE, "artifactType": _oci_manifest.ARTIFACT}, "not read"),
        ({**IMAGE, "artifactType": _oci_manifest.ARTIFACT, "layers": []}, "0 layers"),
        ({**IMAGE, "layers": [{**LAYER, "digest": "md5:123"}]}, "not verified"),
        ({**IMAGE, "layers": [{**LAYER, "digest": "sha256:../../x"}]}, "not verified"),
        ({**IMAGE, "layers": [{**LAYER, "size": -1}]}, "damaged"),
        ({**IMAGE, "layers": [{**LAYER, "size": True}]}, "damaged"),
        ({**IMAGE, "layers": [7]}, "not read"),
        ({**IMAGE, "layers": 7}, "damaged"),
        ({**IMAGE, "schemaVersion": 1}, "unknown kind"),
        ({**IMAGE, "mediaType": "text/html"}, "unknown kind"),
        ({**INDEX, "manifests": []}, "without any manifest"),
        ({**INDEX, "manifests": 7}, "damaged"),
    ],
)
def test_manifests_that_are_refused(fake: FakeRegistry, plain: Any, text: str) -> None:
    fake.add_manifest("ns/web", "1", plain)
    with pytest.raises(ArchiveInvalid, match=text):
        pull(fake)
    assert fake.requests("GET", "/blobs/") == []


def test_a_huge_manifest(fake: FakeRegistry) -> None:
    fake.add_manifest("ns/web", "1", b" " * (5 << 20))
    with pytest.raises(RemoteRefused, match="4 MiB"):
        pull(fake)


def test_a_manifest_that_is_not_what_its_digest_says(fake: FakeRegistry) -> None:
    digest = fake.add_manifest("ns/web", "1", IMAGE)
    fake.manifests["ns/web", digest] = (b"{}", _oci_manifest.MANIFEST)
    with pytest.raises(DigestMismatch):
        pull(fake, f"ns/web@{digest}")


def test_no_such_tag(fake: FakeRegistry) -> None:
    with pytest.raises(TargetNotFound, match="ns/web:2") as caught:
        pull(fake, "ns/web:2")
    assert caught.value.exit_code == 10


def test_an_index(fake: FakeRegistry) -> None:
    push(fake)
    data, kind = fake.manifests["ns/web", "1"]
    ours = {"mediaType": kind, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data), "artifactType": _oci_manifest.ARTIFACT}
    other = fake.add_manifest("ns/web", "other", {**IMAGE, "annotations": {}})
    theirs = {"mediaType": kind, "digest": other, "size": 1, "platform": {"architecture": "s390x", "os": "linux"}}
    fake.add_manifest("ns/web", "2", {**INDEX, "manifests": [theirs, ours]}, _oci_manifest.INDEX)
    assert pull(fake, "ns/web:2") == DATA
    plain = {key: value for key, value in ours.items() if key != "artifactType"}
    fake.add_manifest("ns/web", "3", {**INDEX, "manifests": [{**theirs, "platform": {}}, plain]}, _oci_manifest.INDEX)
    assert pull(fake, "ns/web:3") == DATA
    push(fake, b"another")
    data, _ = fake.manifests["ns/web", "1"]
    two = {**ours, "digest": f"sha256:{hashlib.sha256(data).hexdigest()}", "size": len(data)}
    fake.add_manifest("ns/web", "4", {**INDEX, "manifests": [ours, two]}, _oci_manifest.INDEX)
    with pytest.raises(ArchiveInvalid, match="several") as caught:
        pull(fake, "ns/web:4")
    assert caught.value.hint and ours["digest"] in caught.value.hint


# -- forms -----------------------------------------------------------------------------------------------------------------------------


def test_an_image(fake: FakeRegistry) -> None:
    import zstandard

    tar = bytes(1 << 20) + DATA
    packed = zstandard.compress(tar[: 1 << 20]) + zstandard.compress(tar[1 << 20 :])
    push(fake, packed, replace(OPTIONS, registry_form="image"), Payload(compression="zstd", manifest=ABOUT))
    found = manifest_of(fake)
    assert found["layers"][0]["mediaType"] == "application/vnd.oci.image.layer.v1.tar+zstd"
    config = json.loads(fake.blobs[found["config"]["digest"]])
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(tar).hexdigest()}"]
    assert (config["architecture"], config["os"]) == ("amd64", "linux")
    notes = found["annotations"]
    assert notes[PODMAN + "runtime.name"] == "crun"
    assert notes[PODMAN + "criu.version"] == "40201"
    assert notes["io.kubernetes.cri-o.annotations.checkpoint.name"] == notes["org.criu.checkpoint.container.name"] == "web"
    assert pull(fake) == packed


def test_what_cannot_be_an_image(fake: FakeRegistry) -> None:
    options = replace(OPTIONS, registry_form="image")
    for payload in (Payload(encrypted=True), Payload(), Payload(manifest=replace(ABOUT, engine="process"))):
        with pytest.raises(UsageError, match="image"):
            push(fake, options=options, payload=payload)
    with pytest.raises((TransferFailed, ArchiveInvalid)):
        push(fake, b"\x28\xb5\x2f\xfd" + DATA, options, Payload(compression="zstd", manifest=ABOUT))
    assert_nothing_left(fake)


def test_an_artifact(fake: FakeRegistry) -> None:
    push(fake, payload=Payload(compression="zstd", manifest=ABOUT))
    found = manifest_of(fake)
    assert found["artifactType"] == "application/vnd.ckpt.checkpoint.v1"
    assert found["layers"][0]["mediaType"] == "application/vnd.ckpt.checkpoint.v1.tar+zstd"
    assert found["annotations"]["org.criu.checkpoint.container.name"] == "web"
    assert not [key for key in found["annotations"] if key.startswith(PODMAN)]


def test_an_encrypted_one_says_nothing(fake: FakeRegistry) -> None:
    push(fake, payload=Payload(compression="zstd", encrypted=True, manifest=ABOUT))
    assert manifest_of(fake)["layers"][0]["mediaType"] == "application/vnd.ckpt.checkpoint.v1.encrypted"
    assert "web" not in json.dumps(manifest_of(fake))
    assert pull(fake) == DATA


def base_image(fake: FakeRegistry, repository: str = "ns/web") -> str:
    config = {**IMAGE["config"], "digest": "sha256:" + "d" * 64}  # type: ignore[dict-item]
    return fake.add_manifest(repository, "base", {**IMAGE, "config": config, "annotations": {}})


@pytest.mark.parametrize("how", ["{host}/ns/web:base", "oci://{host}/ns/web:base", "{digest}", "@{digest}"])
def test_a_named_subject(fake: FakeRegistry, how: str) -> None:
    digest = base_image(fake)
    push(fake, options=replace(OPTIONS, registry_subject=how.format(host=fake.name, digest=digest)))
    assert manifest_of(fake)["subject"]["digest"] == digest
    (entry,) = manifest_of(fake, digest.replace(":", "-"))["manifests"]
    assert entry["artifactType"] == _oci_manifest.ARTIFACT
    push(fake, b"more", options=replace(OPTIONS, registry_subject=digest))
    assert len(manifest_of(fake, digest.replace(":", "-"))["manifests"]) == 2


def test_a_registry_that_knows_referrers_keeps_the_list_itself(fake: FakeRegistry) -> None:
    fake.referrers = True
    digest = base_image(fake)
    push(fake, options=replace(OPTIONS, registry_subject=digest))
    assert ("ns/web", digest.replace(":", "-")) not in fake.manifests


@pytest.mark.parametrize("same", [True, False])
def test_the_subject_is_found_if_it_is_still_the_same(fake: FakeRegistry, same: bool) -> None:
    digest = base_image(fake, "ns/base")
    about = replace(ABOUT, container_image=ContainerImage(("d" if same else "e") * 64, f"{fake.name}/ns/base:base"))
    push(fake, payload=Payload(manifest=about))
    assert manifest_of(fake).get("subject", {}).get("digest") == (digest if same else None)


def test_subjects_that_are_refused(fake: FakeRegistry) -> None:
    for subject, kind in (("other.example/ns/web:1", UsageError), ("sha256:" + "0" * 64, TargetNotFound)):
        with pytest.raises(kind):
            registry.CARRIER.check_write(at(fake), replace(OPTIONS, registry_subject=subject))


def test_a_referrers_tag_that_is_something_else_is_left_alone(fake: FakeRegistry) -> None:
    digest, said = base_image(fake), []
    fake.add_manifest("ns/web", digest.replace(":", "-"), {**IMAGE})
    push(fake, options=replace(OPTIONS, registry_subject=digest, notice=said.append))
    assert len(said) == 1 and "stored" in said[0]
    assert manifest_of(fake, digest.replace(":", "-")) == IMAGE
    assert pull(fake) == DATA


# -- who we are ------------------------------------------------------------------------------------------------------------------------


def log_in(tmp_path: Path, auths: dict[str, Any], **more: Any) -> None:
    (tmp_path / ".docker").mkdir(exist_ok=True)
    (tmp_path / ".docker/config.json").write_text(json.dumps({"auths": auths, **more}))


def entry(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def test_basic(fake: FakeRegistry, tmp_path: Path) -> None:
    fake.user = ("joe", "geheim")
    with pytest.raises(RemoteRefused, match="without credentials") as caught:
        push(fake)
    assert caught.value.hint == f"podman login {fake.name}"
    log_in(tmp_path, {fake.name: entry("joe", "wrong")})
    with pytest.raises(RemoteRefused, match="config.json"):
        push(fake)
    log_in(tmp_path, {fake.name: entry("joe", "geheim")})
    push(fake)
    assert pull(fake) == DATA


@FORMS
def test_a_token_that_ends_in_the_middle(fake: FakeRegistry, form: str) -> None:
    fake.realm = f"http://{fake.name}/token"
    ended = []

    def end(handler: Handler) -> bool:
        if handler.command in ("PATCH", "PUT") and fake.patched_bytes >= 3 * CHUNK and not ended:
            ended.append(True)
            fake.tokens = set()
        return False

    fake.hook = end
    push(fake, form=form)
    fake.hook = lambda h: False
    assert ended and pull(fake) == DATA
    assert sent(fake) - len(DATA) <= CHUNK
    assert "push" in fake.requests("GET", "/token")[0].query


def test_the_scope_is_ours_when_nobody_says(fake: FakeRegistry) -> None:
    fake.realm, fake.challenge_scope = f"http://{fake.name}/token?a=b", False
    push(fake)
    query = fake.requests("GET", "/token")[0].query
    assert "a=b&" in query and "scope=repository%3Ans%2Fweb%3Apull%2Cpush" in query


def test_an_identity_token(fake: FakeRegistry, tmp_path: Path) -> None:
    fake.realm = f"http://{fake.name}/token"
    bodies: list[bytes] = []

    def oauth(handler: Handler) -> bool:
        if handler.command == "POST" and handler.path.startswith("/token"):
            bodies.append(handler.body())
            fake.tokens = {"t"}
            handler.answer(200, body=b'{"access_token": "t"}')
            return True
        return False

    fake.hook = oauth
    log_in(tmp_path, {fake.name: {"identitytoken": "refresh"}})
    push(fake)
    assert b"grant_type=refresh_token" in bodies[0] and b"refresh_token=refresh" in bodies[0]


@pytest.mark.parametrize("body", [b"", b"[]", b'{"token": 7}', b'{"token": "a\\r\\nX: y"}', b'{"token": ""}'])
def test_no_token(fake: FakeRegistry, body: bytes) -> None:
    fake.realm = f"http://{fake.name}/token"
    fake.hook = lambda h: h.path.startswith("/token") and (h.answer(200, body=body) or True)
    with pytest.raises(RemoteRefused, match="no token"):
        push(fake)


def test_tokens_are_renewed_before_their_end() -> None:
    now = [0.0]

    class Said:
        status, body = 200, b'{"token": "t", "expires_in": 60}'

    asked: list[str] = []

    def fetch(method: str, url: str, headers: dict[str, str], body: bytes | None) -> Said:
        asked.append(url)
        return Said()

    auth = _oci_auth.Authorizer("r", "ns/web", "pull", lambda: None, fetch, clock=lambda: now[0])
    assert auth.header() == ""
    assert auth.answer('Bearer realm="https://auth.example/token",service="s",scope="repository:ns/web:pull"')
    assert auth.header() == "Bearer t" and len(asked) == 1
    now[0] = 55.0
    assert auth.header() == "Bearer t" and len(asked) == 2


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ('Bearer realm="https://a/b?x=1,2",service="x \\"y\\""', [("bearer", {"realm": "https://a/b?x=1,2", "service": 'x "y"'})]),
        ('Negotiate abc==, Basic realm="x"', [("basic", {"realm": "x"})]),
        ("basic", [("basic", {})]),
        ('Digest realm="d", nonce="n", Bearer realm=plain', [("bearer", {"realm": "plain"})]),
        ("", []),
        (",,,===", []),
    ],
)
def test_challenges(header: str, wanted: list[tuple[str, dict[str, str]]]) -> None:
    assert _oci_auth.challenges(header) == wanted


REFERENCE = _oci_name.parse("oci://reg.example:5000/ns/web:1")


def test_the_most_specific_key_wins(tmp_path: Path) -> None:
    log_in(tmp_path, {"reg.example:5000": entry("host", "x"), "reg.example:5000/ns": entry("ns", "x"), "other": entry("no", "x")})
    found = _oci_credentials.find(REFERENCE)
    assert found is not None and (found.user, found.password) == ("ns", "x")
    assert "x" not in repr(found)
    log_in(tmp_path, {"https://reg.example:5000/v2/": entry("url", "a:b")})
    found = _oci_credentials.find(REFERENCE)
    assert found is not None and (found.user, found.password) == ("url", "a:b")
    hub = _oci_name.parse("oci://docker.io/web")
    log_in(tmp_path, {"https://index.docker.io/v1/": entry("hub", "x")})
    found = _oci_credentials.find(hub)
    assert found is not None and found.user == "hub" and hub.repository == "library/web"


def test_the_order_of_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "reg.example:5000"
    places = [tmp_path / ".docker/config.json", tmp_path / ".config/containers/auth.json", tmp_path / "run/containers/auth.json", tmp_path / "mine"]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps({"auths": {key: entry(place.name + str(len(str(place))), "x")}}))
        if place.name == "mine":
            monkeypatch.setenv("REGISTRY_AUTH_FILE", str(place))
        found = _oci_credentials.find(REFERENCE)
        assert found is not None and found.origin == str(place)


def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "docker-credential-test"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_credential_helpers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(tmp_path, monkeypatch, 'read s; echo "{\\"Username\\": \\"$1\\", \\"Secret\\": \\"$s\\"}"')
    for config in ({"credHelpers": {"reg.example:5000": "test"}}, {"credsStore": "test"}):
        log_in(tmp_path, {}, **config)
        found = _oci_credentials.find(REFERENCE)
        assert found is not None and (found.user, found.password) == ("get", "reg.example:5000")
    helper(tmp_path, monkeypatch, "echo credentials not found in native keychain; exit 1")
    assert _oci_credentials.find(REFERENCE) is None
    helper(tmp_path, monkeypatch, "sleep 5; true")
    monkeypatch.setattr(_oci_credentials, "_HELPER_LIMIT_S", 0.2)
    began = time.monotonic()
    with pytest.raises(KeyProblem, match="no answer"):
        _oci_credentials.find(REFERENCE)
    assert time.monotonic() - began < 4, "its own child held it up"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"auths": {"reg.example:5000": {"auth": "%%%"}}}', '{"credsStore": "../x"}', '{"credsStore": "is-not-there"}']
)
def test_damaged_credentials(tmp_path: Path, text: str) -> None:
    log_in(tmp_path, {})
    (tmp_path / ".docker/config.json").write_text(text)
    with pytest.raises(KeyProblem) as caught:
        _oci_credentials.find(REFERENCE)
    assert caught.value.exit_code == 32


def test_odd_credentials_are_none(tmp_path: Path) -> None:
    for text in ('{"auths": 7, "credHelpers": []}', '{"auths": {"reg.example:5000": 7}}', '{"auths": {"reg.example:5000": {}}}', ""):
        log_in(tmp_path, {})
        (tmp_path / ".docker/config.json").write_text(text)
        assert _oci_credentials.find(REFERENCE) is None


# -- where we go -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that is its own authority, and its key."""
    import datetime
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "lab")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(7)
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    place = tmp_path_factory.mktemp("tls")
    (place / "ca.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (place / "key.pem").write_bytes(secret)
    return place / "ca.crt", place / "key.pem"


@pytest.fixture
def secure(authority: tuple[Path, Path]) -> Iterator[FakeRegistry]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority)
    with FakeRegistry(context=context) as made:
        yield made


def test_tls(secure: FakeRegistry, authority: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RemoteRefused, match="not trusted") as caught:
        push(secure)
    assert "certs.d" in (caught.value.hint or "")
    assert secure.seen == []
    push(secure, options=replace(OPTIONS, ca_file=authority[0]))
    place = tmp_path / "certs.d" / secure.name
    place.mkdir(parents=True)
    (place / "ca.crt").write_bytes(authority[0].read_bytes())
    monkeypatch.setattr(_oci_tls, "_CERTS_D", (tmp_path / "certs.d",))
    assert pull(secure) == DATA
    (place / "ca.crt").write_text("nonsense")
    with pytest.raises(KeyProblem):
        pull(secure)


def test_a_certificate_known_by_its_fingerprint(secure: FakeRegistry, authority: tuple[Path, Path]) -> None:
    der = ssl.PEM_cert_to_DER_cert(authority[0].read_text())
    push(secure, options=replace(OPTIONS, fingerprint=f"sha256:{hashlib.sha256(der).hexdigest()}"))
    with pytest.raises(RemoteRefused, match="another certificate"):
        push(secure, options=replace(OPTIONS, fingerprint="sha256:" + "0" * 64, ca_file=authority[0]))


def test_clear_text_only_where_it_is_allowed(fake: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_oci_name.Reference, "is_loopback", False)
    with pytest.raises(RemoteRefused, match="no TLS"):
        push(fake)
    assert fake.requests("POST") == []
    push(fake, options=replace(OPTIONS, insecure=True))


def test_a_token_server_in_clear_text_gets_nothing(
    secure: FakeRegistry, fake: FakeRegistry, authority: tuple[Path, Path], tmp_path: Path
) -> None:
    log_in(tmp_path, {secure.name: entry("joe", "geheim")})
    secure.realm = f"http://{fake.name}/token"
    with pytest.raises(RemoteRefused, match="clear text"):
        push(secure, options=replace(OPTIONS, ca_file=authority[0]))
    assert fake.seen == []


def redirect(to: str, part: str = "/blobs/sha256", status: int = 307) -> Callable[[Handler], bool]:
    def hook(handler: Handler) -> bool:
        if part not in handler.path or handler.command == "HEAD":
            return False
        handler.body()
        handler.answer(status, {"Location": to.format(path=handler.path)})
        return True

    return hook


def test_an_endless_answer_to_what_is_sent_on(fake: FakeRegistry) -> None:
    push(fake)

    def endless(handler: Handler) -> bool:
        if "/blobs/sha256" not in handler.path:
            return False
        handler.send_response(307)
        handler.send_header("Location", "https://127.0.0.1:1/")
        handler.send_header("Set-Cookie", "a=b")
        handler.end_headers()
        while True:
            handler.wfile.write(bytes(65536))

    fake.hook = endless
    with pytest.raises(CannotConnect):
        pull(fake, options=IMPATIENT)


def test_the_content_may_be_elsewhere_without_our_credentials(
    secure: FakeRegistry, authority: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, ca_file=authority[0])
    secure.user = ("joe", "geheim")
    log_in(tmp_path, {secure.name: entry("joe", "geheim")})
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login joe password geheim\n")
    push(secure, options=options)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority)
    with FakeRegistry(context=context) as storage:
        storage.blobs = secure.blobs
        secure.hook = redirect(f"https://{storage.name}{{path}}?signature=top-secret")
        storage.read_cuts.append(30_000)
        assert pull(secure, options=options) == DATA
        assert len(storage.seen) == 7 and {seen.authorization for seen in storage.seen} == {""}
        assert not [seen for seen in storage.seen if "Cookie" in seen.headers]
        storage.hook = lambda h: h.answer(403, body=b"signature=top-secret") or True
        with pytest.raises(RemoteRefused) as caught:
            pull(secure, options=options)
        assert "top-secret" not in json.dumps(caught.value.to_json())


@pytest.mark.parametrize(
    "to", ["http://127.0.0.1:1/x", "file:///etc/shadow", "ftp://x/y", "https://joe:geheim@127.0.0.1/", "//[", "", "{path}"]
)
def test_redirects_that_are_not_followed(secure: FakeRegistry, authority: tuple[Path, Path], to: str) -> None:
    options = replace(IMPATIENT, ca_file=authority[0])
    push(secure, options=options)
    secure.hook = redirect(to)
    with pytest.raises(RemoteRefused) as caught:
        pull(secure, options=options)
    assert "geheim" not in json.dumps(caught.value.to_json())


@pytest.mark.parametrize("part", ["/blobs/uploads/", "/v2/"])
def test_no_redirect_of_what_is_written(fake: FakeRegistry, part: str) -> None:
    fake.hook = redirect("http://127.0.0.1:1/", part)
    with pytest.raises(RemoteRefused):
        push(fake, options=IMPATIENT)


def test_an_upload_location_elsewhere_gets_no_credentials(
    secure: FakeRegistry, authority: tuple[Path, Path], tmp_path: Path
) -> None:
    secure.user = ("joe", "geheim")
    log_in(tmp_path, {secure.name: entry("joe", "geheim")})
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority)
    with FakeRegistry(context=context) as other:

        def away(handler: Handler) -> bool:
            if handler.command != "POST" or not handler.headers.get("Authorization"):
                return False
            handler.answer(202, {"Location": f"https://{other.name}/v2/ns/web/blobs/uploads/{other.new_upload()}"})
            return True

        secure.hook = away
        with pytest.raises(TransferFailed, match="0 bytes"):  # the two of them don't share what they store
            push(secure, options=replace(IMPATIENT, ca_file=authority[0]))
        assert other.seen and {seen.authorization for seen in other.seen} == {""}


def test_nobody_there(fake: FakeRegistry) -> None:
    with FakeRegistry() as gone:
        pass
    with pytest.raises(CannotConnect, match="refused") as caught:
        push(gone, options=IMPATIENT)
    assert caught.value.exit_code == 40


@FORMS
def test_a_slow_link_is_no_dead_one(fake: FakeRegistry, form: str) -> None:
    fake.slow_s = 0.02
    data = random.Random(5).randbytes(8 << 20)
    push(fake, data, replace(IMPATIENT, chunk_bytes=8 << 20, connect_timeout_s=0.5, idle_timeout_s=2.0), form=form)
    fake.slow_s = 0.0
    assert sent(fake) == len(data) and pull(fake) == data


def test_no_registry(fake: FakeRegistry) -> None:
    fake.hook = lambda h: h.answer(404, body=b"<html>") or True
    with pytest.raises(RemoteRefused, match="no registry"):
        push(fake)


@pytest.mark.parametrize("part", ["/v2/ns/web/blobs/uploads/", "/v2/ns/web/manifests/"])
def test_one_who_falls_silent(fake: FakeRegistry, part: str) -> None:
    release = threading.Event()

    def silent(handler: Handler) -> bool:
        if handler.path.startswith(part) and handler.command in ("POST", "GET"):
            release.wait(20)
        return False

    fake.hook = silent
    try:
        with pytest.raises(TransferFailed, match="silent"):
            push(fake, options=IMPATIENT) if "uploads" in part else pull(fake, options=IMPATIENT)
    finally:
        release.set()


@pytest.mark.parametrize("part", ["/blobs/sha256", "/manifests/", "head"])
def test_one_who_sends_a_byte_now_and_then(fake: FakeRegistry, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_oci_read, "LEAST_BYTES_S", 1 << 30)
    push(fake)
    release = threading.Event()

    def drip(handler: Handler) -> bool:
        if part not in handler.path and part != "head":
            return False
        if part != "head":
            handler.send_response(200)
            handler.send_header("Content-Length", str(CHUNK))
            handler.end_headers()
        while not release.wait(0.1):
            handler.wfile.write(b"H")
        return True

    fake.hook = drip
    began = time.monotonic()
    try:
        with pytest.raises(TransferFailed, match="broke|silent"):
            pull(fake, options=replace(IMPATIENT, connect_timeout_s=0.3))
    finally:
        release.set()
    assert time.monotonic() - began < 10


def test_what_the_registry_says_is_shown_without_control_characters(fake: FakeRegistry) -> None:
    body = json.dumps({"errors": [{"code": "DENIED", "message": "no\x1b[31m\n https://x/?token=secret"}]}).encode()
    fake.hook = lambda h: h.command == "POST" and (h.answer(403, body=body) or True)
    with pytest.raises(RemoteRefused) as caught:
        push(fake)
    assert "\x1b" not in caught.value.message and "secret" not in caught.value.message and "DENIED: no" in caught.value.message


# -- names -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("oci://reg:5000/ns/web:tag", ("reg:5000", "ns/web", "tag", "")),
        ("oci://reg.example/web", ("reg.example", "web", "latest", "")),
        ("reg/a/b__c/d-e.f@sha256:" + "a" * 64, ("reg", "a/b__c/d-e.f", "latest", "sha256:" + "a" * 64)),
        ("oci://[::1]:5000/web:1@sha256:" + "a" * 64, ("[::1]:5000", "web", "1", "sha256:" + "a" * 64)),
    ],
)
def test_names(text: str, wanted: tuple[str, ...]) -> None:
    found = _oci_name.parse(text)
    assert (found.registry, found.repository, found.tag, found.digest) == wanted


@pytest.mark.parametrize(
    "text",
    [
        "oci://", "oci://reg", "oci://reg/", "oci://reg/Web", "oci://reg/a//b", "oci://reg/../x", "oci://reg/web:", "oci://reg/web:a b",
        "oci://reg/web@sha256:12", "oci://joe:pw@reg/web", "oci://reg/web?x=1", "oci://reg/web#x", "oci://reg:0/web", "oci://reg:99999/web",
        "oci://reg/web:1\n", "oci://-reg/web", "oci://reg/" + "a" * 300,
    ],
)  # fmt: skip
def test_bad_names(text: str) -> None:
    with pytest.raises(UsageError):
        _oci_name.parse(text)


def test_what_is_this_host() -> None:
    assert all(_oci_name.parse(f"oci://{host}/x").is_loopback for host in ("localhost:5000", "127.0.0.1", "127.8.8.8:1", "[::1]:5000"))
    assert not any(_oci_name.parse(f"oci://{host}/x").is_loopback for host in ("reg", "10.0.0.1:5000", "localhost.example", "127.0.0.1.example"))
