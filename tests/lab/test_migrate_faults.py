"""migrate, with everything going wrong at every step of its plan: exactly one live copy, its count goes on, nothing is left."""

from __future__ import annotations

import signal

import pytest

from ckpt.ops.migrate import STEPS
from tests.lab.counting import assert_clean, assert_never_back, last_tick, start_counter, state, the_live_one, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import HostResult

DESTINATION_STEPS = ("begin", "container-image", "tree", "pages", "prepare", "stage", "prepared", "commit", "committed", "running")
WAYS = [
    pytest.param({"runtime": "crun"}, (), id="crun"),
    pytest.param({"runtime": "runc"}, ("--precopy", "--lazy"), id="runc-precopy"),
    pytest.param({"runtime": "crun"}, ("--postcopy",), id="crun-postcopy"),
]
EVERY_WAY = pytest.mark.parametrize(("lab_options", "way"), WAYS)
ONE_WAY = pytest.mark.parametrize(("lab_options", "way"), WAYS[:1])
"""For what does not depend on how the memory goes."""
GATE = "/tmp/gate"
COMMIT = STEPS.index("commit")


def migrate(lab: Lab, way: tuple[str, ...], *, fault: str = "", env: dict[str, str] | None = None, limit_s: float = 120.0) -> HostResult:
    return lab.a.run(
        ["ckpt", "migrate", *way, "web", "root@b"], check=False, timeout_s=limit_s, env={**(env or {}), **({"CKPT_FAULT": fault} if fault else {})}
    )


def fault_on_b(lab: Lab, fault: str) -> None:
    """Every ckpt on b, so also the peer, meets the fault."""
    lab.b.run(["sh", "-c", "mv /usr/local/bin/ckpt /usr/local/bin/ckpt.real"])
    lab.b.write_file("/usr/local/bin/ckpt", f'#!/bin/sh\nCKPT_FAULT={fault} exec /usr/local/bin/ckpt.real "$@"\n', mode=0o755)


def no_fault_on_b(lab: Lab) -> None:
    lab.b.run(["sh", "-c", "[ ! -e /usr/local/bin/ckpt.real ] || mv /usr/local/bin/ckpt.real /usr/local/bin/ckpt"])


def settled(lab: Lab, before: int) -> None:
    """One live copy after all, `--continue`d where it is frozen; and nothing left behind."""
    no_fault_on_b(lab)
    wait_until(lambda: not lab.a.run(["pgrep", "-f", "guard_main"], check=False).stdout, "the guards on a are through")
    wait_until(lambda: not lab.b.run(["pgrep", "-f", "guard_main"], check=False).stdout, "the guards on b are through")
    jobs = lab.a.run(["sh", "-c", "ls /var/lib/ckpt/jobs 2>/dev/null || true"]).stdout.split()
    for job in jobs:
        lab.a.run(["ckpt", "migrate", "--continue", job])
    host = the_live_one(lab)
    other = lab.b if host is lab.a else lab.a
    assert state(other) in ("", "exited"), f"{other.name} still has it: {state(other)}"
    assert_never_back(host, at_least=before)
    assert_clean(lab.a, lab.b)
    if host is lab.a:
        assert state(lab.b) == ""
        assert not lab.b.run(["podman", "images", "-q"]).stdout.split(), "a container image was left on b"


@EVERY_WAY
@pytest.mark.parametrize("step", STEPS)
def test_kill_9_of_ckpt_on_the_source(lab: Lab, way: tuple[str, ...], step: str) -> None:
    start_counter(lab.a)
    before = last_tick(lab.a)
    result = migrate(lab, way, fault=f"migrate-{step}:kill")
    assert result.returncode in (-9, 137), result
    settled(lab, before)


@EVERY_WAY
@pytest.mark.parametrize("step", DESTINATION_STEPS)
def test_kill_9_of_the_peer(lab: Lab, way: tuple[str, ...], step: str) -> None:
    start_counter(lab.a)
    before = last_tick(lab.a)
    fault_on_b(lab, f"destination-{step}:kill")
    result = migrate(lab, way)
    settled(lab, before)
    if step == "pages" and "--postcopy" in way:
        assert result.returncode == 0, "no memory goes over before the switchover"
    elif step in ("committed", "running"):
        assert result.returncode in (0, 51), result
    else:
        assert result.returncode == 50, result
        assert "running here" in result.stderr
        assert state(lab.a) == "running"


@EVERY_WAY
@pytest.mark.parametrize("step", [step for step in STEPS if step not in ("check", "remove")])
def test_cut_link(lab: Lab, way: tuple[str, ...], step: str) -> None:
    start_counter(lab.a)
    before = last_tick(lab.a)
    for host in lab:
        host.write_file("/etc/ckpt/ckpt.toml", "link_timeout_s = 4\n")
    moving = lab.a.popen(["ckpt", "migrate", *way, "web", "root@b"], env={"CKPT_FAULT": f"migrate-{step}:gate={GATE}"})
    wait_until(lambda: lab.a.exists(f"{GATE}.reached"), f"step {step}")
    lab.cut_link()
    lab.a.write_file(GATE, "")
    _, said = moving.communicate(timeout=150)
    if STEPS.index(step) <= COMMIT:
        # Where it is not known who has it, the source must stay frozen until it is asked again.
        assert moving.returncode in ((50,) if STEPS.index(step) < COMMIT else (50, 51)), said.decode()
    lab.restore_link()
    settled(lab, before)


@ONE_WAY
@pytest.mark.parametrize("offset", [10, 1_000, 20_000, 90_000])
def test_corrupted_byte_on_the_wire(lab: Lab, way: tuple[str, ...], offset: int) -> None:
    start_counter(lab.a)
    before = last_tick(lab.a)
    relay = (
        "import subprocess, sys\n"
        "far = subprocess.Popen(['ssh', *sys.argv[1:]], stdin=subprocess.PIPE)\n"
        f"left = {offset}\n"
        "while data := bytearray(sys.stdin.buffer.raw.read(65536)):\n"
        "    if 0 <= left < len(data): data[left] ^= 0x40\n"
        "    left -= len(data)\n"
        "    try: far.stdin.write(data); far.stdin.flush()\n"
        "    except OSError: break\n"
        "try: far.stdin.close()\n"
        "except OSError: pass\n"
        "sys.exit(far.wait())\n"
    )
    lab.a.write_file("/root/relay.py", relay)
    result = migrate(lab, way, env={"CKPT_SSH": "python3 /root/relay.py"})
    assert result.returncode not in (0, 70), result
    settled(lab, before)
    assert state(lab.a) == "running"


@EVERY_WAY
@pytest.mark.parametrize("where", ["a", "b"])
def test_full_disk(lab: Lab, way: tuple[str, ...], where: str) -> None:
    """The disk fills up behind the check's back."""
    start_counter(lab.a, before="head -c 8000000 /dev/urandom > /data/blob")
    before = last_tick(lab.a)
    moving = lab.a.popen(["ckpt", "migrate", *way, "web", "root@b"], env={"CKPT_FAULT": f"migrate-dump:gate={GATE}"})
    wait_until(lambda: lab.a.exists(f"{GATE}.reached"), "the dump")
    host = lab.hosts[where]
    host.run(["sh", "-c", "dd if=/dev/zero of=/var/lib/ckpt/full bs=1M 2>/dev/null; true"])
    lab.a.write_file(GATE, "")
    _, said = moving.communicate(timeout=120)
    host.run(["rm", "/var/lib/ckpt/full"])
    assert moving.returncode in (50, 60), said.decode()
    assert "space" in said.decode()
    settled(lab, before)
    assert state(lab.a) == "running"


@EVERY_WAY
def test_restore_that_fails_on_the_destination(lab: Lab, way: tuple[str, ...], lab_options: dict[str, str]) -> None:
    runtime = lab_options["runtime"]
    start_counter(lab.a)
    before = last_tick(lab.a)
    path = lab.b.run(["sh", "-c", f"command -v {runtime}"]).stdout.strip()
    lab.b.run(["mv", path, f"{path}.real"])
    script = f'#!/bin/sh\ncase " $* " in *--help*) ;; *" restore "*) echo boom >&2; exit 1;; esac\nexec {path}.real "$@"\n'
    lab.b.write_file(path, script, mode=0o755)
    result = migrate(lab, way)
    assert result.returncode == 50, result
    assert "where:" in result.stderr and "running here" in result.stderr
    log = result.stderr.split("log:")[1].split()[0]
    assert log.startswith("b:"), log
    assert lab.b.exists(log.removeprefix("b:").split(":")[0]), f"{log} is not kept"
    settled(lab, before)
    assert state(lab.a) == "running"


@ONE_WAY
@pytest.mark.parametrize("step", [step for step in STEPS[: COMMIT + 1] if step != "check"])
def test_ctrl_c_before_the_switchover(lab: Lab, way: tuple[str, ...], step: str) -> None:
    start_counter(lab.a)
    before = last_tick(lab.a)
    moving = lab.a.popen(["ckpt", "migrate", *way, "web", "root@b"], env={"CKPT_FAULT": f"migrate-{step}:gate={GATE}"})
    wait_until(lambda: lab.a.exists(f"{GATE}.reached"), f"step {step}")
    moving.send_signal(signal.SIGINT)
    lab.a.write_file(GATE, "")
    moving.communicate(timeout=90)
    assert moving.returncode == 130
    settled(lab, before)
    assert state(lab.a) == "running"
