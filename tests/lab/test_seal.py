"""Encrypted and signed archives of a live container: nothing in clear on a disk, nothing wrong let in, and podman takes what comes out."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from tests.lab.counting import assert_clean, assert_never_back, counts_on, last_tick, leftovers, start_counter, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host

# What has no disk below it: the kernel's own, and memory.
_NO_DISKS = {"proc", "sys", "dev", "run", "tmp"}


def disks_hold(host: Host, needles: dict[str, bytes]) -> set[str]:
    """Which of the needles are in a file on one of the host's disks (as seen from outside: what is deleted but open is not)."""
    found: set[str] = set()
    for directory, below, names in os.walk(host.root):
        here = Path(directory)
        if here == host.root:
            below[:] = [name for name in below if name not in _NO_DISKS and name != "usr"]
        for name in names:
            path = here / name
            try:
                if path.is_symlink() or not path.is_file():
                    continue
                data = path.read_bytes()
            except OSError:
                continue
            found |= {f"{what} in /{path.relative_to(host.root)}" for what, needle in needles.items() if needle in data}
    return found


def looked_at(host: Host, argv: list[str], step: str, needles: dict[str, bytes]) -> set[str]:
    """Run a command; when it has reached `step`, and at its end, look at the disks, and in between at everybody's command line."""
    process = host.popen(argv, env={"CKPT_FAULT": f"{step}:gate=/run/gate"})
    try:
        wait_until((host.root / "run/gate.reached").exists, f"{argv[1]} reaches {step}")
        found = disks_hold(host, needles)
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                line = path.read_bytes()
                found |= {f"{what} on a command line" for what, needle in needles.items() if needle in line}
        assert in_memory(host)
        (host.root / "run/gate").touch()
        assert process.wait(60) == 0
    finally:
        process.kill_session()
        process.wait()
        for name in ("gate", "gate.reached"):
            (host.root / "run" / name).unlink(missing_ok=True)
    assert not in_memory(host)
    return found | disks_hold(host, needles)


def in_memory(host: Host) -> list[Path]:
    """What is left of drafts in memory."""
    return [path for place in ("run", "dev/shm") for path in (host.root / place / "ckpt-sealed/tmp").glob("*")]


def secret_of(host: Host) -> bytes:
    """What the counter has in its memory (its environment, made by its own shell) and nobody else has."""
    pid = host.run(["podman", "inspect", "-f", "{{.State.Pid}}", "web"]).stdout.strip()
    data = host.run(["sh", "-c", f"tr '\\0' '\\n' < /proc/{pid}/environ"]).stdout
    found = re.search(r"^SECRET=([0-9a-f]{64})$", data, re.MULTILINE)
    assert found is not None, data
    return found[1].encode()


def test_encrypted_and_signed_from_a_live_container(lab: Lab) -> None:
    a, b = lab.a, lab.b
    a.run(["sh", "-c", "age-keygen -o /root/key.txt && age-keygen -o /root/other.txt && chmod 600 /root/*.txt"])
    for name in ("signer", "stranger"):
        a.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"/root/{name}"])
    a.run(["sh", "-c", "echo ops@example $(cat /root/signer.pub) > /root/allowed; echo x@example $(cat /root/stranger.pub) > /root/strangers"])
    recipient = a.run(["age-keygen", "-y", "/root/key.txt"]).stdout.strip()
    a.write_file("/root/passphrase", "a very secret passphrase\n", mode=0o600)
    start_counter(a, before="export SECRET=$(head -c 64 /dev/urandom | sha256sum | cut -c 1-64)")
    needles = {"the secret": secret_of(a), "the passphrase": b"a very secret passphrase"}

    # Of the running container: encrypted to a key and to a passphrase; the disks are looked at all the while.
    os.unlink(a.root / "root/passphrase")
    a.write_file("/run/passphrase", "a very secret passphrase\n", mode=0o600)
    killed = ["ckpt", "export", "podman:web", "-o", "/root/killed.age", "--encrypt", f"age:{recipient}"]
    assert a.run(killed, env={"CKPT_FAULT": "described:kill"}, check=False).returncode != 0
    wait_until(lambda: leftovers(a) == [] and not in_memory(a), "the guard has tidied up")
    assert counts_on(a) and not (a.root / "root/killed.age").exists()
    export = ["ckpt", "export", "-R", "podman:web", "-o", "/root/pass.age", "--passphrase-file", "/run/passphrase"]
    assert not looked_at(a, export, "described", needles)
    at = last_tick(a)
    export = ["ckpt", "export", "podman:web", "-o", "/root/web.age", "--encrypt", f"age:{recipient}", "--sign", "/root/signer"]
    assert not looked_at(a, export, "stored", needles)
    assert state(a) == "exited"

    # Age's and ssh's own programs agree.
    a.run(["sh", "-c", "mkdir /run/x && age -d -i /root/key.txt /root/web.age | zstd -d | tar -x -C /run/x artifacts config.dump"])
    verify = "ssh-keygen -Y verify -f /root/allowed -I ops@example -n manifest@ckpt -s /run/x/artifacts/ckpt.json.sig < /run/x/artifacts/ckpt.json"
    a.run(["sh", "-c", verify])
    a.run(["sh", "-c", "age -d -i /root/key.txt /root/web.age | age -R /root/signer.pub -a -o /root/theirs.age"])
    a.run(["ckpt", "import", "/root/theirs.age", "--identity", "/root/signer", "--verify-with", "/root/allowed"])

    # On the other host nothing wrong is taken, and the store is as if nothing had been tried.
    lab.a.run(["sh", "-c", f"podman save {a.load_image()} | ssh b podman load"])
    a.run(["sh", "-c", "scp -q /root/web.age /root/pass.age /root/key.txt /root/other.txt /root/allowed /root/strangers b:/root/"])
    size = (b.root / "root/web.age").stat().st_size
    altered = f"cp /root/web.age /root/bad.age; printf '\\377' | dd of=/root/bad.age bs=1 seek={size // 2} conv=notrunc status=none"
    b.run(["sh", "-c", f"{altered}; head -c {size - 1} /root/web.age > /root/cut.age; age -d -i /root/key.txt /root/web.age > /root/plain"])
    for file, options, code in (
        ("web.age", [], 32),
        ("web.age", ["--identity", "/root/other.txt"], 32),
        ("web.age", ["--identity", "/root/key.txt", "--verify-with", "/root/strangers"], 31),
        ("bad.age", ["--identity", "/root/key.txt"], 31),
        ("cut.age", ["--identity", "/root/key.txt"], 31),
        ("pass.age", ["--passphrase-command", "echo a very secret passphrase", "--verify-with", "/root/allowed"], 31),
    ):
        for verb in (["import", f"/root/{file}"], ["restore", "--import", f"/root/{file}"]):
            assert b.run(["ckpt", *verb, *options], check=False).returncode == code, (file, verb, options)
    assert b.run(["ckpt", "list", "-q"]).stdout == ""
    assert b.run(["podman", "ps", "-aq"]).stdout == ""

    # With the right key it goes on where it was, and what the store gives out again is still signed.
    b.run(["ckpt", "import", "/root/web.age", "--identity", "/root/key.txt", "--verify-with", "/root/allowed"])
    b.run(["ckpt", "export", "web", "-o", "/root/again.tar.zst"])
    b.run(["ckpt", "restore", "web", "--verify-with", "/root/allowed"])
    assert counts_on(b)
    assert_never_back(b, at_least=at)
    assert secret_of(b) == needles["the secret"]
    b.run(["podman", "rm", "-f", "-t", "0", "web"])
    b.run(["ckpt", "restore", "--import", "/root/again.tar.zst", "--verify-with", "/root/allowed"])
    assert counts_on(b)
    b.run(["podman", "rm", "-f", "-t", "0", "web"])
    b.run(["sh", "-c", "ckpt rm web; rm /root/again.tar.zst; mv /root/plain /run/plain"])
    back = ["ckpt", "restore", "--import", "/root/web.age", "--identity", "/root/key.txt"]
    assert not looked_at(b, back, "restored", {"the secret": needles["the secret"]})
    assert counts_on(b)
    b.run(["podman", "rm", "-f", "-t", "0", "web"])

    # podman takes what age gives.
    b.run(["podman", "container", "restore", "--import", "/run/plain"])
    wait_until(lambda: last_tick(b) > at, "it counts")
    assert_never_back(b, at_least=at)
    assert_clean(a)
