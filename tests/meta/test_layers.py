"""The rules of the house: who may import what, and how big a room's files get."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ckpt"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
SOFT_LINES, HARD_LINES = 400, 600


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0]


def imports(path: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name_of(path)} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def importers(package: str) -> set[str]:
    return {name_of(path) for path in MODULES if any(name == package or name.startswith(package + ".") for name in imports(path))}


def test_rooms_point_one_way() -> None:
    program = Path(sysconfig.get_path("scripts")) / "lint-imports"
    if not program.exists():
        if os.environ.get("CI"):
            pytest.fail("lint-imports is not installed")
        pytest.skip("lint-imports is not installed")
    done = subprocess.run([program, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("package", "room"), [("subprocess", "host"), ("pycriu", "criu"), ("click", "cli"), ("rich", "cli")])
def test_only_one_room_imports(package: str, room: str) -> None:
    assert {name for name in importers(package) if not name.startswith(room + "/")} == set()


@pytest.mark.parametrize("room", ["engines", "transports"])
def test_siblings_do_not_know_each_other(room: str) -> None:
    """But a file knows its family: `_podman_held` belongs to `podman`, `ssh_remote` to `ssh`."""
    shared = {"base", "registry"}
    bad = []
    for path in (PACKAGE / room).glob("*.py"):
        for imported in imports(path):
            parts = imported.split(".")
            if parts[:2] != ["ckpt", room] or len(parts) < 3 or parts[2] in shared or path.stem == "registry":
                continue
            family, other = (stem.lstrip("_").partition("_")[0] for stem in (path.stem, parts[2]))
            if family != other and not parts[2].startswith("_"):
                bad.append(f"{name_of(path)} imports {imported}")
    assert bad == []


def calls(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func)


@pytest.mark.parametrize("call", ["print", "input", "exit", "quit", "breakpoint", "getpass.getpass"])
def test_nothing_below_cli_talks_to_people(call: str) -> None:
    assert [name_of(path) for path in MODULES if room_of(path) != "cli" and call in calls(path)] == []


def test_nothing_below_cli_exits() -> None:
    """`sys.exit` is for programs: the last lines of a file under `if __name__ == "__main__"`, and the command line."""
    bad = []
    for path in MODULES:
        if room_of(path) == "cli":
            continue
        tree = ast.parse(path.read_text())
        mains = [node for node in tree.body if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)]
        allowed = {id(node) for main in mains for node in ast.walk(main)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "sys.exit" and id(node) not in allowed:
                bad.append(f"{name_of(path)}:{node.lineno}")
    assert bad == []


def test_no_shell() -> None:
    bad = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                if ast.unparse(node.func) in ("os.system", "os.popen"):
                    bad.append(f"{name_of(path)}:{node.lineno}")
                if any(word.arg == "shell" and ast.unparse(word.value) != "False" for word in node.keywords):
                    bad.append(f"{name_of(path)}:{node.lineno}")
    assert bad == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_are_small(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= HARD_LINES
    if lines > SOFT_LINES:
        warnings.warn(f"{name_of(path)} has {lines} lines (soft limit {SOFT_LINES})", stacklevel=1)


def test_no_utils() -> None:
    assert [name_of(path) for path in MODULES if path.stem in ("utils", "util", "helpers", "misc", "common") and room_of(path) != "cli"] == []


def test_starting_up_imports_nothing_heavy() -> None:
    heavy = ("rich", "requests", "zstandard", "google", "pycriu", "subprocess", "ckpt.ops", "ckpt.engines", "ckpt.criu", "ckpt.archive")
    code = f"import sys, ckpt.cli.app, ckpt.cli.main; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
