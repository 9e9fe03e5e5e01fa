"""What the user names is exactly one thing, or an error that says what else there is."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckpt.engines import registry
from ckpt.errors import EngineUnavailable, TargetNotFound, UsageError
from ckpt.model import Capabilities, Container, Target
from ckpt.ops import resolve


class Engine:
    def __init__(self, name: str, *names: str, prefixes: tuple[str, ...] = (), usable: bool = True) -> None:
        self.name, self.prefixes, self._usable = name, prefixes or (name,), usable
        self._all = [
            Container(name, f"{name}{label}".ljust(12, "0"), label, "running" if n % 2 == 0 else "exited", created_s=float(n + len(name)))
            for n, label in enumerate(names)
        ]

    def probe(self) -> Capabilities:
        return Capabilities(self._usable, reason="" if self._usable else "not installed")

    def containers(self) -> list[Container]:
        return self._all

    def find(self, name: str) -> list[Container]:
        return [c for c in self._all if c.name == name or c.id.startswith(name)]

    def describe(self, container: Container) -> Container:
        return container


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(*made: Engine) -> None:
        monkeypatch.setattr(registry, "engines", lambda: made)

    return use


def test_one_match(engines: Any) -> None:
    engines(Engine("podman", "web", "db"), Engine("runc", "cache"), Engine("docker", usable=False))
    assert resolve.resolve(Target.parse("cache"))[1].engine == "runc"
    assert resolve.resolve(Target.parse("podman:web"))[1].name == "web"
    assert resolve.resolve(Target.parse("podmand"))[1].name == "db"


def test_ambiguous_lists_how_to_name_each(engines: Any) -> None:
    engines(Engine("podman", "web"), Engine("runc", "web"))
    with pytest.raises(TargetNotFound, match="ambiguous: podman:web, runc:web"):
        resolve.resolve(Target.parse("web"))
    assert resolve.resolve(Target.parse("runc:web"))[1].engine == "runc"
    with pytest.raises(TargetNotFound, match="ambiguous"):
        engines(Engine("podman", "web", "wax"))
        resolve.resolve(Target.parse("podmanw"))


def test_a_whole_name_wins_over_the_beginning_of_an_id(engines: Any) -> None:
    engines(Engine("a", "bc"), Engine("runc", "abc"))
    assert resolve.resolve(Target.parse("abc"))[1].engine == "runc"


def test_unknown_says_what_is_close(engines: Any) -> None:
    engines(Engine("podman", "webserver"))
    with pytest.raises(TargetNotFound) as caught:
        resolve.resolve(Target.parse("webservre"))
    assert caught.value.hint == "did you mean webserver?"
    with pytest.raises(TargetNotFound) as caught:
        resolve.resolve(Target.parse("zzz"))
    assert "webserver" in (caught.value.hint or "")


def test_processes_are_named_with_their_prefix_only(engines: Any) -> None:
    engines(Engine("podman", "web"), Engine("process", "1234", prefixes=("pid", "process")))
    with pytest.raises(TargetNotFound) as caught:
        resolve.resolve(Target.parse("1234"))
    assert "pid:1234" in (caught.value.hint or "")
    assert resolve.resolve(Target.parse("pid:1234"))[1].engine == "process"
    assert [c.name for _, c in resolve.all_running()] == ["web"]


def test_no_engine(engines: Any) -> None:
    engines(Engine("podman", usable=False), Engine("process", prefixes=("pid",)))
    with pytest.raises(EngineUnavailable) as caught:
        resolve.resolve(Target.parse("web"))
    assert "podman: not installed" in (caught.value.hint or "")
    with pytest.raises(EngineUnavailable):
        resolve.resolve(Target.parse("podman:web"))
    with pytest.raises(UsageError):
        resolve.resolve(Target.parse("nope:web"))


def test_all_and_latest(engines: Any) -> None:
    engines(Engine("podman", "a", "b", "c"), Engine("runc", "d"))
    assert [c.name for _, c in resolve.all_running()] == ["d", "a", "c"]
    assert resolve.latest()[1].name == "c"
    engines(Engine("podman"))
    with pytest.raises(TargetNotFound):
        resolve.latest()


def test_registry_finds_modules_and_entry_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "class E:\n    name = 'strange'\n    prefixes = ('strange',)\nclass P(E):\n    name = 'podman'\nENGINES = [E, P]\n"
    (tmp_path / "stranger.py").write_text(code)
    info = tmp_path / "stranger-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: stranger\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[ckpt.engines]\nstrange = stranger\nbroken = not_there_at_all\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    registry.engines.cache_clear()
    try:
        found = {engine.name: engine for engine in registry.engines()}
    finally:
        registry.engines.cache_clear()
    assert "strange" in found
    assert type(found["podman"]).__module__.startswith("ckpt.engines."), "a stranger must not replace one of ours"
    assert all(engine.prefixes for engine in found.values())


def test_offered() -> None:
    assert registry.offered(SimpleNamespace()) == ()  # type: ignore[arg-type]
    assert registry.offered(SimpleNamespace(ENGINE=int)) == (int,)  # type: ignore[arg-type]
    assert registry.offered(SimpleNamespace(ENGINES=[int, str])) == (int, str)  # type: ignore[arg-type]
