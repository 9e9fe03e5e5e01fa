"""`python -m tests.fuzz [TARGET ...]`: coverage-guided fuzzing of each target for FUZZ_SECONDS (15), one after the other.

What breaks one is kept in FUZZ_DIR (a directory outside the checkout); the exit status is 1 then. `--one TARGET` is one target in this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SECONDS = int(os.environ.get("FUZZ_SECONDS", "15"))
MEMORY_MIB, SLOW_S, LARGEST = 2048, 10, 1 << 16


def one(name: str, corpus: Path, findings: Path) -> None:
    """Fuzz a target until its time is over; libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["ckpt"]):
        from ckpt.errors import CkptError
        from tests.fuzz.targets import TARGETS

    chosen = TARGETS[name]
    for seed in chosen.seeds():
        (corpus / hashlib.sha256(seed).hexdigest()).write_bytes(seed)

    def run(data: bytes) -> None:
        with contextlib.suppress(CkptError):
            chosen.run(data)

    options = [f"-max_total_time={SECONDS}", f"-rss_limit_mb={MEMORY_MIB}", f"-timeout={SLOW_S}", f"-max_len={LARGEST}",
               f"-artifact_prefix={findings}/{name}-", "-print_final_stats=1", str(corpus)]  # fmt: skip
    atheris.Setup([sys.argv[0], *options], run)
    atheris.Fuzz()


def main() -> int:
    import tests.conftest  # noqa: F401  (offers pycriu)

    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
        return 0
    from tests.fuzz.targets import TARGETS

    findings = Path(os.environ.get("FUZZ_DIR") or tempfile.mkdtemp(prefix="ckpt-fuzz-"))
    findings.mkdir(parents=True, exist_ok=True)
    broken = []
    for name in sys.argv[1:] or TARGETS:
        with tempfile.TemporaryDirectory(prefix="ckpt-fuzz-corpus-") as corpus:
            argv = [sys.executable, "-m", "tests.fuzz", "--one", name, corpus, str(findings)]
            with (findings / f"{name}.log").open("wb") as log:
                try:
                    code = subprocess.run(argv, stdout=log, stderr=log, timeout=SECONDS * 4 + 120).returncode
                except subprocess.TimeoutExpired:
                    code = -1
        said = (findings / f"{name}.log").read_text(errors="replace")
        runs = next((line.split()[-1] for line in said.splitlines() if line.startswith("stat::number_of_executed_units")), "?")
        print(f"{name}: {'ok' if code == 0 else 'BROKEN'}, {runs} runs", flush=True)
        if code != 0:
            broken.append(name)
    if broken:
        print(f"broken: {', '.join(broken)}; see {findings}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
