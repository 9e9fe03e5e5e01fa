"""migrate: root file system and volumes go over while the workload writes to them; in the pause goes what changed, and all is the same there."""

from __future__ import annotations

import json

import pytest

from tests.lab.counting import assert_clean, assert_never_back, last_tick, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host

GATE = "/tmp/gate"
MOVE = ["ckpt", "migrate", "web", "root@b"]


def writer(volume_mib: int, root_mib: int) -> str:
    """A program that appends, overwrites, renames, links and deletes in both."""
    return f"""
dd if=/dev/urandom of=/vol/db bs=1M count={volume_mib}; dd if=/dev/urandom of=/data/big bs=1M count={root_mib}
mkdir -p /data/many /vol/dir; ln /vol/db /vol/dir/same; ln -s db /vol/link; busybox mkfifo /vol/fifo; busybox chmod 4711 /data/big
busybox truncate -s 64M /vol/sparse; rm -r /etc/passwd; i=0
while [ $i -lt 400 ]; do echo $i >/data/many/$i; i=$((i+1)); done
touch /ready
while :; do
    i=$((i+1))
    for at in /vol /data; do
        dd if=/dev/urandom of=$at/log bs=16k count=1 oflag=append conv=notrunc
        echo $i >$at/new; mv $at/new $at/renamed.$((i % 7)); rm -f $at/renamed.$(((i + 3) % 7))
    done
    dd if=/dev/urandom of=/vol/db bs=4k count=1 seek=$((i * 7919 % {volume_mib * 256})) conv=notrunc
    dd if=/dev/urandom of=/data/big bs=4k count=1 seek=$((i * 7919 % {root_mib * 256})) conv=notrunc
    [ $((i % 40)) != 0 ] || {{ mv /vol/log /vol/log.1; mv /data/many /data/lots; mkdir /data/many; rm -r /data/lots; busybox chmod 1777 /vol; }}
    sleep 0.05
done
"""


LIST = r"""
import hashlib, os, stat, sys
for top in sys.argv[1:]:
    first = {}
    for here, directories, files in os.walk(top):
        directories.sort()
        for name in [""] * (here == top) + sorted(directories + files):
            path = os.path.join(here, name)
            s = os.lstat(path)
            if stat.S_ISSOCK(s.st_mode):
                continue
            what = ""
            if stat.S_ISREG(s.st_mode):
                with open(path, "rb") as file:
                    what = hashlib.file_digest(file, "sha256").hexdigest()
            elif stat.S_ISLNK(s.st_mode):
                what = os.readlink(path)
            same = first.setdefault((s.st_dev, s.st_ino), path) if not stat.S_ISDIR(s.st_mode) else ""
            xattrs = {k: os.getxattr(path, k, follow_symlinks=False) for k in os.listxattr(path, follow_symlinks=False)}
            print(path[len(top):], oct(s.st_mode), s.st_uid, s.st_gid, s.st_rdev, s.st_mtime_ns, same[len(top):], what, xattrs)
"""


def start_writer(host: Host, script: str) -> int:
    image = host.load_image()
    run = ["podman", "run", "-d", "--name", "web", "-v", "data:/vol", image, "sh", "-c"]
    host.run([*run, f"mkdir -p /data; ({script}) >/dev/null 2>&1 & exec counter /data/ticks"])
    wait_until(lambda: host.run(["podman", "exec", "web", "test", "-e", "/ready"], check=False).returncode == 0, "it writes")
    wait_until(lambda: last_tick(host) > 10, "it counts")
    return last_tick(host)


def files(host: Host) -> list[str]:
    """Every file of the container, with all that belongs to it, read on its host: the container need not run."""
    mounts = host.read_file("/proc/self/mounts").decode().splitlines()
    merged = [line.split()[1] for line in mounts if line.split()[1].startswith("/var/lib/containers/storage/overlay/")]
    roots = [path for path in merged if path.endswith("/merged")]
    assert len(roots) == 1, merged
    volume = "/var/lib/containers/storage/volumes/data/_data"
    return host.run(["python3", "-c", LIST, volume, *roots]).stdout.splitlines()


@pytest.mark.parametrize(("flags", "volume_mib", "root_mib"), [([], 300, 200), (["--precopy"], 60, 40)], ids=["plain", "precopy"])
def test_all_is_the_same_and_little_of_it_goes_in_the_pause(lab: Lab, flags: list[str], volume_mib: int, root_mib: int) -> None:
    at = start_writer(lab.a, writer(volume_mib, root_mib))
    moving = lab.a.popen([*MOVE, *flags, "--format", "json"], env={"CKPT_FAULT": f"migrate-commit:gate={GATE}"})
    wait_until(lambda: lab.a.exists(f"{GATE}.reached") or moving.poll() is not None, "both ends are held", limit_s=120)
    assert moving.poll() is None, moving.communicate()
    here, there = files(lab.a), files(lab.b)
    assert here == there
    assert all(any(line.startswith(f"/{name} ") for line in here) for name in ("sparse", "fifo", "dir/same", "data/big", "data/many"))
    lab.a.write_file(GATE, "")
    said, _ = moving.communicate(timeout=60)
    assert moving.returncode == 0
    stats = json.loads(said)["results"][0]["stats"]
    assert stats["files_ahead_bytes"] > (volume_mib + root_mib) << 20
    assert stats["files_paused_bytes"] < (volume_mib + root_mib) << 20 >> 4, stats
    wait_until(lambda: last_tick(lab.b) > at + 20, "it counts there")
    assert_never_back(lab.b, at_least=at)
    assert not lab.a.run(["podman", "volume", "ls", "-q"]).stdout
    assert_clean(lab.a, lab.b)


SMALL = "dd if=/dev/urandom of=/vol/db bs=1M count=8; touch /ready; while :; do date >/vol/now; sleep 0.1; done"


def untouched(lab: Lab, at: int) -> None:
    """The source goes on, on the destination nothing is left."""
    for host in lab:
        wait_until(lambda host=host: not host.run(["pgrep", "-f", "guard_main"], check=False).stdout, "the guard is through")  # type: ignore[misc]
    wait_until(lambda: last_tick(lab.a) > at, "it goes on")
    assert_never_back(lab.a, at_least=at)
    assert state(lab.b) == ""
    assert not lab.b.run(["podman", "volume", "ls", "-q"]).stdout
    assert_clean(lab.a, lab.b)


@pytest.mark.parametrize("where", ["source", "destination"])
def test_an_end_in_a_round_leaves_nothing(lab: Lab, where: str) -> None:
    at = start_writer(lab.a, SMALL)
    if where == "source":
        for end in ("kill", "fail", "enospc"):
            for step in ("files-round-1", "capture"):
                failed = lab.a.run(MOVE, env={"CKPT_FAULT": f"migrate-{step}:{end}"}, check=False)
                assert failed.returncode not in (0, 70), failed
                untouched(lab, at)
        return
    lab.b.run(["sh", "-c", "mv /usr/local/bin/ckpt /usr/local/bin/ckpt.real"])
    for end in ("kill", "fail", "enospc"):
        lab.b.write_file("/usr/local/bin/ckpt", f'#!/bin/sh\nCKPT_FAULT=destination-tree:{end} exec /usr/local/bin/ckpt.real "$@"\n', mode=0o755)
        failed = lab.a.run(MOVE, check=False)
        assert failed.returncode in (50, 60) and "running here" in failed.stderr, failed
        untouched(lab, at)


def test_no_room_for_a_volume(lab: Lab) -> None:
    at = start_writer(lab.a, SMALL)
    moving = lab.a.popen(MOVE, env={"CKPT_FAULT": f"migrate-files:gate={GATE}"})
    wait_until(lambda: lab.a.exists(f"{GATE}.reached"), "the check is over")
    lab.b.run(["sh", "-c", "dd if=/dev/zero of=/var/lib/containers/full bs=1M 2>/dev/null; truncate -s -4M /var/lib/containers/full"])
    lab.a.write_file(GATE, "")
    _, said = moving.communicate(timeout=60)
    lab.b.run(["rm", "/var/lib/containers/full"])
    assert moving.returncode in (50, 60) and b"space" in said, said
    untouched(lab, at)


def test_volumes_are_left_alone_when_asked(lab: Lab) -> None:
    at = start_writer(lab.a, SMALL)
    lab.b.run(["podman", "volume", "create", "data"])
    refused = lab.a.run(MOVE, check=False)
    assert refused.returncode != 0 and "data" in refused.stderr
    lab.b.write_file("/var/lib/containers/storage/volumes/data/_data/mine", "mine")
    lab.a.run([*MOVE, "--ignore-volumes"])
    wait_until(lambda: last_tick(lab.b) > at, "it counts there")
    assert lab.b.run(["podman", "exec", "web", "cat", "/vol/mine"]).stdout == "mine"
    assert lab.b.run(["podman", "exec", "web", "ls", "/vol"]).stdout.split() in (["mine"], ["mine", "now"])


def test_volumes_outlive_an_early_start_that_comes_to_nothing(lab: Lab) -> None:
    """The destination's engine made ready for a container without files in /dev/shm; then it got one, and begins anew."""
    at = start_writer(lab.a, "mkdir /vol/kept; echo content >/vol/kept/file; touch /ready")
    moving = lab.a.popen([*MOVE, "--format", "json"], env={"CKPT_FAULT": f"migrate-dump:gate={GATE}"})
    wait_until(lambda: lab.a.exists(f"{GATE}.reached"), "the destination stands ready")
    lab.a.run(["podman", "exec", "web", "sh", "-c", "echo shared >/dev/shm/file"])
    lab.a.write_file(GATE, "")
    _, said = moving.communicate(timeout=60)
    assert moving.returncode == 0, said
    wait_until(lambda: last_tick(lab.b) > at, "it counts there")
    assert lab.b.run(["podman", "exec", "web", "cat", "/vol/kept/file", "/dev/shm/file"]).stdout == "content\nshared\n"
    assert_clean(lab.a, lab.b)
