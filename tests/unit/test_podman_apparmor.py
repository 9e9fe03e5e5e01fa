"""The AppArmor profile of a container that is to be restored: loaded when a boot left it unloaded, nothing without AppArmor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ckpt.engines import _podman_apparmor as apparmor
from ckpt.errors import RestoreFailed


class Kernel:
    def __init__(self, directory: Path) -> None:
        self.enabled, self.profiles, self.spec = directory / "enabled", directory / "profiles", directory / "spec.dump"
        self.loads = 0
        self.enabled.write_text("Y\n")
        self.profiles.write_text("/usr/bin/man (enforce)\n")
        self.wants("containers-default-0.62.2")

    def wants(self, profile: str) -> None:
        self.spec.write_text(json.dumps({"process": {"apparmorProfile": profile}}))

    def load(self) -> None:
        self.loads += 1
        with self.profiles.open("a") as out:
            out.write("containers-default-0.62.2 (enforce)\n")


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(tmp_path)
    monkeypatch.setattr(apparmor, "ENABLED", made.enabled)
    monkeypatch.setattr(apparmor, "PROFILES", made.profiles)
    return made


def test_podmans_own_is_loaded_once(kernel: Kernel) -> None:
    apparmor.ensure(kernel.spec, kernel.load)
    apparmor.ensure(kernel.spec, kernel.load)
    assert kernel.loads == 1


def test_anothers_is_named(kernel: Kernel) -> None:
    kernel.wants("hand-made")
    with pytest.raises(RestoreFailed, match="hand-made"):
        apparmor.ensure(kernel.spec, kernel.load)
    assert kernel.loads == 0


@pytest.mark.parametrize("profile", ["", "unconfined", "/usr/bin/man"])
def test_nothing_to_load(kernel: Kernel, profile: str) -> None:
    kernel.wants(profile)
    apparmor.ensure(kernel.spec, kernel.load)
    assert kernel.loads == 0


def test_without_apparmor(kernel: Kernel) -> None:
    kernel.enabled.write_text("N\n")
    apparmor.ensure(kernel.spec, kernel.load)
    kernel.enabled.unlink()
    apparmor.ensure(kernel.spec, kernel.load)
    assert kernel.loads == 0
