"""What of podman's containers and pods belongs to systemd units, from the command lines that made them."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ckpt.engines import _podman_units as units
from ckpt.engines.podman import Podman
from ckpt.errors import RestoreFailed
from ckpt.model import Container, Manifest, RestoreOptions
from ckpt.ops.hibernate import sets
from ckpt.ops.hibernate.selection import Chosen

OLD, NEW = "0" * 64, "1" * 64
WEB = Manifest("m", "web", "podman", "c", 0.0)
QUADLET = ["podman", "run", "--name", "web", "--cgroups=split", "-d", "--pod-id-file", "/run/shop-pod.pod-id", "busybox"]


@pytest.mark.parametrize(
    ("words", "path", "unit"),
    [
        (QUADLET, "/run/shop-pod.pod-id", "shop-pod.service"),
        (["podman", "container", "run", "--pod-id-file=/run/pod-shop.pod-id", "busybox"], "/run/pod-shop.pod-id", "pod-shop.service"),
        (["podman", "run", "--pod-id-file=/srv/shop.id", "busybox"], "/srv/shop.id", ""),  # somebody's own file: no unit
        (["podman", "run", "--pod-id-file", "shop.pod-id"], None, ""),  # below a directory that nobody knows any more
        (["podman", "run", "--pod-id-file"], None, ""),
        (["podman", "run", "--pod", "shop", "busybox"], None, ""),
        ([], None, ""),
    ],
)
def test_the_unit_of_a_pod(words: list[str], path: str | None, unit: str) -> None:
    assert units.pod_file(words) == (Path(path) if path else None)
    assert units.pod_unit(words) == unit


@pytest.mark.parametrize(("text", "identity"), [(f"{NEW}\n", NEW), ("--all", ""), ("", ""), ("x" * 5000, ""), (None, "")])
def test_the_pod_that_is_there_now(tmp_path: Path, text: str | None, identity: str) -> None:
    path = tmp_path / "shop-pod.pod-id"
    if text is not None:
        path.write_text(text)
    assert units.pod_id(["podman", "run", "--pod-id-file", str(path)]) == identity


def packed(stage: Path, config: dict[str, Any], options: RestoreOptions) -> dict[str, Any]:
    (stage / "config.dump").write_text(json.dumps(config))
    Podman()._pack_stub(stage / "stub.tar", stage, WEB, options, {})
    with tarfile.open(stage / "stub.tar") as tar:
        member = tar.extractfile("config.dump")
        assert member is not None
        return dict(json.loads(member.read()))


@pytest.mark.parametrize("options", [RestoreOptions(), RestoreOptions(checked=True)])
def test_what_was_in_its_units_cgroup_gets_its_own(tmp_path: Path, options: RestoreOptions) -> None:
    config = {"name": "web", "pod": OLD, "cgroupsMode": "split", "cgroupParent": "machine.slice/machine-libpod_pod_0.slice"}
    assert packed(tmp_path, config, options) == {"name": "web", "pod": OLD}
    assert packed(tmp_path, {"name": "web", "cgroupsMode": "enabled", "cgroupParent": "my.slice"}, options)["cgroupParent"] == "my.slice"


def test_a_container_comes_back_into_the_pod_that_was_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Said:
        def __init__(self, ok: bool) -> None:
            self.ok = ok

    (tmp_path / "config.dump").write_text(json.dumps({"pod": OLD}))
    monkeypatch.setattr("ckpt.engines.podman.podman", lambda *words, **_: Said(words[-1] == NEW))
    assert Podman()._pod_of(tmp_path, WEB, {OLD: NEW}) == NEW
    with pytest.raises(RestoreFailed, match="pod that is not here"):
        Podman()._pod_of(tmp_path, WEB, {})


def test_pods_that_units_make_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Podman()
    monkeypatch.setattr(engine, "command_of", lambda container: QUADLET)

    def chosen(name: str, pod: str, *owners: str) -> Chosen:
        return Chosen(engine, Container("podman", name, name, "running", pod=pod, units=owners), "save", f"podman:{name}")

    mine = [chosen("a", OLD, "a.service"), chosen("b", OLD, "b.service"), chosen("c", NEW), chosen("d", "", "d.service")]
    assert sets.pod_units(mine) == ["shop-pod.service"]
