"""The command as a process: signals, closed pipes, the terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A ckpt whose `rm` waits for a signal and undoes when it comes.
_WAITING = """
import sys, time
import ckpt.ops.rm
def rm(*args, **kwargs):
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        print("undone", flush=True)
ckpt.ops.rm.rm = rm
from ckpt.cli.main import main
sys.exit(main(["rm", "web"]))
"""


def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "CKPT_LOG_DIR": str(tmp_path), "CKPT_STORE": str(tmp_path / "store")}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_undo(signum: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", _WAITING], env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert out == "undone\n"
    assert process.returncode == 128 + signum
    assert signum.name in err
    assert "Traceback" not in err


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    """As with nohup."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + _WAITING],
        env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("args", "code"), [("list", 0), ("--version", 0), ("list --format json", 0), ("list --format jsonl", 0), ("--help", 128 + signal.SIGPIPE)]
)
def test_a_closed_pipe_is_no_error(args: str, code: int, tmp_path: Path) -> None:
    """Work is not undone for want of a reader."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "ckpt", *args.split()],
        env=environment(tmp_path),
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_full_disk_behind_stdout_is_told(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ckpt", "list"], env=environment(tmp_path), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 60
    assert done.stderr.startswith("error: ")
