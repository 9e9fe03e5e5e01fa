"""What is offered for names, and that nothing goes wrong aloud."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from ckpt.cli import completion
from ckpt.cli.app import app
from ckpt.model import Checkpoint, Container, Manifest

PARAM = click.Argument(["target"])


class Engine:
    def __init__(self, prefix: str, names: list[str], *, broken: bool = False) -> None:
        self.prefixes = (prefix,)
        self.names = names
        self.broken = broken

    def containers(self) -> list[Container]:
        if self.broken:
            raise OSError("no engine")
        return [Container(self.prefixes[0], "0123456789abcdef", name, "running") for name in self.names]


@pytest.fixture(autouse=True)
def engines(monkeypatch: pytest.MonkeyPatch) -> None:
    found = (Engine("runc", [], broken=True), Engine("podman", ["web", "webmail", "db", ""]))
    monkeypatch.setattr("ckpt.engines.registry.engines", lambda: found)


def values(items: list[click.shell_completion.CompletionItem]) -> list[str]:
    return [item.value for item in items]


def test_containers() -> None:
    context = click.Context(app)
    assert values(completion.containers(context, PARAM, "we")) == ["web", "webmail"]
    assert values(completion.containers(context, PARAM, "0")) == ["0123456789ab"]
    assert values(completion.containers(context, PARAM, "podman:w")) == ["podman:web", "podman:webmail"]


def test_checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stored = [Checkpoint(Manifest("id", "web", "podman", "c", 0.0, generation=n), tmp_path) for n in (1, 2)]
    monkeypatch.setattr("ckpt.store.catalog.Catalog", lambda root: SimpleNamespace(all=lambda: stored))
    assert values(completion.checkpoints(click.Context(app), PARAM, "we")) == ["web", "web@1", "web@2"]
    assert [item.type for item in completion.checkpoints_or_files(click.Context(app), PARAM, "./x")] == ["file"]


def test_slow_engines_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "_LIMIT_S", 0.05)

    def slow() -> Iterator[str]:
        yield "first"
        time.sleep(30)
        yield "second"

    assert completion._in_time(slow) == ["first"]


@pytest.mark.parametrize(
    ("line", "words", "incomplete", "answer", "replaced"),
    [
        ("ckpt checkpoint we", ["checkpoint"], "we", "web", "web"),
        ("ckpt restore web@", ["restore"], "web@", "web@2", "2"),
        ("ckpt checkpoint podman:w", ["checkpoint"], "podman:w", "podman:web", "web"),
        ("ckpt export web --compress=zs", ["export", "web"], "--compress=zs", "zstd", "zstd"),
        ("ckpt list ", ["list"], "", "web", "web"),
    ],
)
def test_bash_words(monkeypatch: pytest.MonkeyPatch, line: str, words: list[str], incomplete: str, answer: str, replaced: str) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    monkeypatch.setenv("COMP_BREAKS", " \t\n\"'@><=;|&(:")
    shell = completion.BashComplete(app, {}, "ckpt", "_CKPT_COMPLETE")
    assert shell.get_completion_args() == (words, incomplete)
    assert shell.format_completion(click.shell_completion.CompletionItem(answer)) == f"plain,{replaced}"
