"""A container image on its way in: everything but its names."""

from __future__ import annotations

import io
import json
import random
import tarfile
from typing import Any

import pytest

from ckpt.archive.untagged import Untagged
from ckpt.errors import ArchiveInvalid

LAYER = random.Random(1).randbytes(70_000)


def tar(members: dict[str, bytes | tarfile.TarInfo], **options: Any) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=options.get("format", tarfile.USTAR_FORMAT)) as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                info.pax_headers = options.get("pax", {})
                archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def passed(data: bytes, step: int = 1000) -> dict[str, bytes]:
    out = io.BytesIO()
    untagged = Untagged(out)
    for at in range(0, len(data), step):
        assert untagged.write(memoryview(data)[at : at + step]) == len(data[at : at + step])
    untagged.close()
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        return {m.name: found.read() for m in archive.getmembers() if (found := archive.extractfile(m))}


OCI = {
    "blobs/sha256/" + "a" * 64: LAYER,
    "index.json": json.dumps(
        {"schemaVersion": 2, "manifests": [{"digest": "sha256:aa", "annotations": {"org.opencontainers.image.ref.name": "nginx:latest", "x": "y"}}]}
    ).encode(),
    "oci-layout": b"{}",
}
DOCKER = {
    "repositories": b'{"nginx": {"latest": "aa"}}',
    "manifest.json": json.dumps([{"Config": "aa.json", "RepoTags": ["nginx:latest"], "Layers": ["aa.tar"]}]).encode(),
    "aa.tar": LAYER,
}


@pytest.mark.parametrize("step", [1, 511, 512, 513, 10_000, 1 << 20])
def test_names_stay_behind_and_nothing_else(step: int) -> None:
    found = passed(tar(OCI), step)
    assert json.loads(found["index.json"])["manifests"] == [{"digest": "sha256:aa", "annotations": {"x": "y"}}]
    assert found["blobs/sha256/" + "a" * 64] == LAYER and found["oci-layout"] == b"{}"
    found = passed(tar(DOCKER), step)
    assert json.loads(found["manifest.json"]) == [{"Config": "aa.json", "RepoTags": None, "Layers": ["aa.tar"]}]
    assert json.loads(found["repositories"]) == {} and found["aa.tar"] == LAYER
    assert b"nginx" not in b"".join(found.values())


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


@pytest.mark.parametrize(
    "data",
    [
        b"x" * 2000,
        tar(OCI)[:3000],
        tar({"index.json": link("index.json", "blobs/sha256/" + "a" * 64)}),
        tar({"./index.json": b"[]"}),
        tar({"//manifest.json": b"{}"}),
        tar({"manifest.json": b'[{"RepoTags": ["x"]'}),
        tar({"harmless": b"x"}, format=tarfile.PAX_FORMAT, pax={"path": "index.json"}),
        tar({"y" * 200: b"x"}, format=tarfile.GNU_FORMAT),
    ],
)
def test_what_could_hide_a_name_is_refused(data: bytes) -> None:
    with pytest.raises(ArchiveInvalid):
        passed(data)


def test_a_large_layer_may_have_its_size_in_an_extended_header() -> None:
    assert passed(tar({"aa.tar": LAYER}, format=tarfile.PAX_FORMAT, pax={"mtime": "1.5"}))["aa.tar"] == LAYER
