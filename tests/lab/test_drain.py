"""drain, undrain and watch: all containers of a host go to two others and come back, whatever goes wrong on the way."""

from __future__ import annotations

import json
import signal
from typing import Any

import pytest

from tests.lab import test_group_migrate as shop
from tests.lab import test_serve as serving
from tests.lab.counting import assert_clean, assert_never_back, counts_on, last_tick, start_counter, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host

THREE = pytest.mark.parametrize("lab_options", [{"hosts": ("a", "b", "c")}], ids=["three"])


def drained(host: Host, *words: str, code: int | None = 0, env: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """`ckpt drain` with these words; its rows by name."""
    done = host.run(["ckpt", "drain", "--format", "json", *words], check=False, timeout_s=150, env=env)
    assert code is None or done.returncode == code, done
    return {row["name"]: row for row in json.loads(done.stdout)["results"]} if code is not None else {}


@THREE
def test_a_host_is_emptied_and_filled_again(lab: Lab) -> None:
    a, b, c = lab
    names = [f"c{number}" for number in range(2)]
    for name in names:
        start_counter(a, name)
    start_counter(a, "stays", "--label", "ckpt.migratable=false")
    start_counter(a, "fails")
    for host in (b, c):
        refuse(host, a.run(["podman", "inspect", "--format", "{{.Id}}", "fails"]).stdout.strip())
    before = {name: last_tick(a, name) for name in names}

    planned = drained(a, "--to", "root@b,root@c", "--dry-run", code=100)
    assert {row["state"] for row in planned.values()} == {"planned", "skipped"} and state(a, "c0") == "running"
    # Of three that are about equal; which one is alone depends on their last pages.
    assert {row["destination"] for row in planned.values() if row["state"] == "planned"} == {"root@b", "root@c"}, planned

    stopped = a.popen(["ckpt", "drain", "--to", "root@b,root@c"], env={"CKPT_FAULT": "migrate-files:gate=/tmp/gate"})
    wait_until(lambda: a.exists("/tmp/gate.reached"), "a migration is under way")
    stopped.send_signal(signal.SIGINT)  # the gate stays shut: what waits there hears of it, and gets no further before
    _, said = stopped.communicate(timeout=150)
    assert stopped.returncode == 130 and "ckpt drain --resume" in said.decode() and all(counts_on(a, name) for name in names)

    killed = a.run(["ckpt", "drain", "--to", "root@b,root@c"], check=False, env={"CKPT_FAULT": "drain-moved:kill"}, timeout_s=150)
    assert killed.returncode in (-9, 137), killed
    rows = drained(a, "--resume", code=50)
    assert {name: rows[name]["state"] for name in names} == dict.fromkeys(names, "moved"), rows
    assert rows["fails"]["state"] == "failed" and state(a, "fails") == "running" and counts_on(a, "fails")
    assert rows["stays"]["state"] == "skipped" and counts_on(a, "stays")
    where = {name: {"root@b": b, "root@c": c}[rows[name]["destination"]] for name in names}
    for name in names:
        assert state(a, name) == ""
        wait_until(lambda name=name: counts_on(where[name], name), f"{name} counts on {where[name].name}")  # type: ignore[misc]
        assert_never_back(where[name], name, before[name])
    assert "drained" in a.run(["ckpt", "list"]).stderr
    killed = a.run(["ckpt", "undrain", "--only", names[0]], check=False, env={"CKPT_FAULT": "undrain-back:kill"}, timeout_s=150)
    assert killed.returncode in (-9, 137), killed
    back = a.run(["ckpt", "undrain", "--format", "json"], timeout_s=150).stdout
    assert {row["state"] for row in json.loads(back)["results"]} == {"returned"}
    for name in names:
        assert state(where[name], name) == ""
        wait_until(lambda name=name: counts_on(a, name), f"{name} counts on a again")  # type: ignore[misc]
        assert_never_back(a, name, before[name])
    assert "drained" not in a.run(["ckpt", "list"]).stderr
    a.write_file("/tmp/notice", "")
    words = ["--on", "test -e /tmp/notice", "--every", "100ms", "--once", "--exclude", "fails", "--format", "json", "--else-checkpoint", "store"]
    noticed = a.run(["ckpt", "watch", *words, "--to", "root@b,10.77.0.99", "--ssh-option", "ConnectTimeout=1"], check=False, timeout_s=150)
    assert noticed.returncode == 100, noticed
    rows = {row["name"]: row for row in json.loads(noticed.stdout)["results"]}
    assert {rows[name]["state"] for name in names} == {"moved"}, rows
    for name in names:
        wait_until(lambda name=name: counts_on(b, name), f"{name} counts on b")  # type: ignore[misc]
    assert_clean(a, b, c)


@pytest.mark.parametrize("lab_options", [{"runtime": "crun"}], ids=["crun"])
def test_a_group_goes_and_comes_back_as_one(lab: Lab) -> None:
    """With the connection among its members, both ways; killed when one member of two is noted."""
    shop.start(lab)
    a, b = lab
    before = last_tick(a, "client")
    killed = a.run(["ckpt", "drain", "--to", "root@b"], check=False, env={"CKPT_FAULT": "drain-moved:kill"}, timeout_s=150)
    assert killed.returncode in (-9, 137), killed
    rows = drained(a, "--resume")
    assert {name: row["state"] for name, row in rows.items()} == dict.fromkeys(shop.MEMBERS, "moved")
    shop.all_on(lab, b, at_least=before)
    before = last_tick(b, "client")
    killed = a.run(["ckpt", "undrain", "--precopy"], check=False, env={"CKPT_FAULT": "undrain-noted:kill"}, timeout_s=150)
    assert killed.returncode in (-9, 137), killed
    back = json.loads(a.run(["ckpt", "undrain", "--format", "json"], timeout_s=150).stdout)["results"]
    assert [row["state"] for row in back] == ["returned"]
    shop.all_on(lab, a, at_least=before)
    assert_clean(a, b)


@pytest.mark.parametrize("lab_options", [{"runtime": "crun"}], ids=["crun"])
def test_against_the_clock_and_over_https(lab: Lab) -> None:
    a, b = lab
    shop.start(lab)
    start_counter(a, "late")
    before = {name: last_tick(a, name) for name in ("client", "late")}
    # At 25 KiB a second none of them can be away in time; saving is quick.
    rows = drained(a, "--to", "root@b", "--deadline", "30s", "--bwlimit", "100K", "--else-checkpoint", "store", code=100)
    assert {name: row["state"] for name, row in rows.items()} == dict.fromkeys((*shop.MEMBERS, "late"), "saved"), rows
    assert not {"running", "paused"} & {state(host, name) for host in lab for name in rows}
    a.run(["ckpt", "restore", "late"])
    a.run(["ckpt", "restore", "--group", "shop"])
    assert_never_back(a, "late", before["late"])
    shop.all_on(lab, a, at_least=before["client"])

    _, fingerprint = serving.serve(lab)
    words = ["--to", serving.URL, "--fingerprint", fingerprint, "--token-file", "/root/token", "--exclude", "late"]
    serving.token(lab, "migrate")  # a group is one use
    rows = drained(a, *words, code=100)
    assert {row["state"] for name, row in rows.items() if name != "late"} == {"moved"}, rows
    shop.all_on(lab, b, at_least=before["client"])
    assert_clean(a, b)


def refuse(host: Host, container_id: str) -> None:
    """The host's runtime cannot restore this container."""
    path = host.run(["sh", "-c", "command -v crun"]).stdout.strip()
    host.run(["mv", path, f"{path}.real"])
    script = f'#!/bin/sh\ncase " $* " in *--help*) ;; *" restore "*{container_id}*) echo boom >&2; exit 1;; esac\nexec {path}.real "$@"\n'
    host.write_file(path, script, mode=0o755)
