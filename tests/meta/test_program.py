"""ckpt as it is installed: starts at once, its man pages and completions are fresh and can be read by what reads them."""

from __future__ import annotations

import os
import pty
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ckpt import __version__
from ckpt.cli import generate
from ckpt.errors import exit_code_table

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
START_LIMIT_S = 0.1


def needed(program: str) -> str:
    """The path of a program; where CI runs it has to be there."""
    path = shutil.which(program)
    if path is None:
        if os.environ.get("CI"):
            pytest.fail(f"{program} is not installed")
        pytest.skip(f"{program} is not installed")
    return path


def processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_version_is_quick() -> None:
    """By processor time, so that a busy machine does not matter; the best of some, so that a cold cache does not."""
    best = float("inf")
    for _ in range(5):
        before = processor_s()
        done = subprocess.run([sys.executable, "-m", "ckpt", "--version"], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=60, check=True)
        best = min(best, processor_s() - before)
        assert done.stdout == f"ckpt {__version__}\n"
    assert best < START_LIMIT_S


def test_generated_files_are_fresh() -> None:
    assert generate.stale(ROOT) == [], "run python -m ckpt.cli.generate"


def test_every_file_that_the_wheel_ships_is_there() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    shared = project["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    assert [path for path in shared if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "man").glob("*.1")))
def test_man_page_renders(page: str) -> None:
    done = subprocess.run(
        [needed("man"), "--warnings", "-l", str(ROOT / "man" / page)],
        capture_output=True, text=True, timeout=60, env={**ENV, "MANWIDTH": "100", "LC_ALL": "C.UTF-8", "MANPAGER": "cat", "MAN_KEEP_FORMATTING": ""},
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ""
    for section in ("NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", "EXIT STATUS"):
        assert section in done.stdout
    if page == "ckpt.1":
        assert all(f"{code}" in done.stdout and meaning.split()[0] in done.stdout for code, _, meaning in exit_code_table())


@pytest.fixture
def ckpt_on_path(tmp_path: Path) -> dict[str, str]:
    """An environment in which `ckpt` is this checkout's, with an empty store and no engines."""
    program = tmp_path / "bin" / "ckpt"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ckpt "$@"\n')
    program.chmod(0o755)
    return {**ENV, "PATH": f"{program.parent}:{os.environ['PATH']}", "CKPT_STORE": str(tmp_path / "store"), "HOME": str(tmp_path)}


def in_bash(line: str, env: dict[str, str]) -> list[str]:
    """What bash offers for a command line with the cursor at its end."""
    code = """
        source completions/ckpt.bash || exit 9
        compopt() { :; }
        COMP_LINE=$1 COMP_POINT=${#1} COMP_TYPE=9
        eval "set -- $(complete -p ckpt)"
        _ckpt_completion ckpt
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    done = subprocess.run([needed("bash"), "--norc", "-c", code, "bash", line], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_bash_completes_verbs_and_options(ckpt_on_path: dict[str, str]) -> None:
    assert in_bash("ckpt mi", ckpt_on_path) == ["migrate"]
    assert "--tcp-established" in in_bash("ckpt checkpoint --tcp", ckpt_on_path)
    offered = in_bash("ckpt ", ckpt_on_path)
    assert "restore" in offered
    assert not {"peer", "guard"} & set(offered)


def test_bash_keeps_quiet_when_nothing_can_be_found(ckpt_on_path: dict[str, str]) -> None:
    assert in_bash("ckpt checkpoint no-such-", {**ckpt_on_path, "CKPT_STORE": "not absolute"}) == []


def test_bash_starts_with_the_completions() -> None:
    done = subprocess.run([needed("bash"), "--norc", "-n", "completions/ckpt.bash"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_zsh_loads_the_completions(ckpt_on_path: dict[str, str]) -> None:
    code = "fpath=(completions $fpath); autoload -Uz compinit && compinit -u -D && source completions/_ckpt && print $_comps[ckpt]"
    done = subprocess.run([needed("zsh"), "-f", "-c", code], cwd=ROOT, env=ckpt_on_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout.strip()) == (0, "", "_ckpt_completion")


def test_fish_completes_verbs(ckpt_on_path: dict[str, str]) -> None:
    code = "source completions/ckpt.fish; complete -C 'ckpt mi'"
    done = subprocess.run([needed("fish"), "--no-config", "-c", code], cwd=ROOT, env=ckpt_on_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[:1] == ["migrate"]


def test_a_terminal_is_given_back() -> None:
    """The live display on a real terminal (a pseudo one), its steps, its end."""
    code = """
import sys
from ckpt.cli.render.reporter import Reporter
from ckpt.events import *
with Reporter("migrate", "table", ()) as r:
    r.emit(Notice("web", "podman container -> b"))
    r.emit(StepStarted("web", "check"))
    r.emit(StepDone("web", "check", "CPU flags equal"))
    r.emit(StepStarted("web", "memory"))
    r.emit(BytesMoved("web", "memory", 1 << 30, 2 << 30))
    r.show([{"name": "web"}], table=lambda rows: ["migrated web -> b"])
"""
    master, slave = pty.openpty()
    try:
        environment = {**ENV, "TERM": "xterm", "COLUMNS": "100"}
        process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=slave, stderr=slave, stdin=slave)
        os.close(slave)
        slave = -1
        seen = b""
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # EIO: the other end is closed
                break
            if not data:
                break
            seen += data
        assert process.wait(60) == 0
    finally:
        os.close(master)
        if slave >= 0:
            os.close(slave)
    text = seen.decode()
    assert "web: podman container -> b" in text
    assert "check        CPU flags equal" in text
    assert text.rstrip().endswith("migrated web -> b")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor stays hidden"
    assert "Traceback" not in text
