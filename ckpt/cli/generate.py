"""`python -m ckpt.cli.generate DIR`: writes man/ and completions/ below DIR from the command tree; `--check` only says what is stale."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

_FILES = {"bash": "ckpt.bash", "zsh": "_ckpt", "fish": "ckpt.fish"}


def generated() -> dict[str, str]:
    """Every generated file: path relative to the project, content."""
    from ckpt.cli import completion, man

    files = {f"completions/{name}": completion.script(shell) for shell, name in _FILES.items()}
    files.update({f"man/{name}": text for name, text in man.pages().items()})
    return files


def stale(root: Path) -> list[str]:
    """Paths that are missing, differ, or should not be there."""
    files = generated()
    bad = [path for path, text in files.items() if not (root / path).is_file() or (root / path).read_text() != text]
    there = [path.relative_to(root).as_posix() for folder in ("man", "completions") for path in (root / folder).glob("*")]
    return sorted(bad + [path for path in there if path not in files])


def main(args: Sequence[str]) -> int:
    root = Path(next((arg for arg in args if not arg.startswith("-")), "."))
    if "--check" in args:
        bad = stale(root)
        for path in bad:
            sys.stderr.write(f"{path} is stale: run python -m ckpt.cli.generate\n")
        return 1 if bad else 0
    for path, text in generated().items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
