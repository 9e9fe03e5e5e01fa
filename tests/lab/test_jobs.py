"""`ckpt jobs`: what both hosts tell of a migration, of one that was killed, and of one that waits."""

from __future__ import annotations

import json
import re
from typing import Any

from tests.lab.counting import assert_clean, start_counter, the_live_one, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host


def listed(host: Host, *words: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(host.run(["ckpt", "jobs", *words, "--format", "json"]).stdout)["results"]
    return found


def test_jobs_on_both_hosts(lab: Lab) -> None:
    start_counter(lab.a)
    moved = json.loads(lab.a.run(["ckpt", "migrate", "--precopy", "web", "root@b", "--format", "json"]).stdout)["results"][0]
    (sent,), (received,) = listed(lab.a), listed(lab.b)
    assert sent["id"] == moved["job"]["id"] and sent["statistics"] == moved["job"]["statistics"] and sent["schema"] == 1
    assert (sent["kind"], sent["state"], sent["name"], sent["destination"], sent["mode"]) == ("migrate", "done", "web", "root@b", "pre-copy")
    assert (received["kind"], received["state"], received["name"]) == ("receive", "done", "web")
    assert received["container_id"] == moved["container_id"]
    assert 0 < sent["freeze_s"] < sent["downtime_s"] < sent["total_s"] and sent["downtime_s"] == round(moved["downtime_s"], 6)
    figures = sent["statistics"]
    assert len(figures["rounds"]) == moved["stats"]["rounds"] and figures["memory_bytes"] > 0
    assert {"memory_ahead", "memory", "files_ahead", "criu_images"} <= figures["bytes"].keys()
    assert figures["compression"] and 0 < figures["wire_bytes"]["precopy"] < figures["sent_bytes"]
    assert figures["versions"]["source"]["criu"] == figures["versions"]["destination"]["criu"] != ""
    shown = lab.a.run(["ckpt", "jobs", "show", sent["id"].partition("-")[2][:6]]).stdout
    assert re.search(r"downtime +\d.*s\n", shown) and "round 1" in shown

    # Killed before its commit: its guard leaves the record. Killed after it: the list says what to do.
    lab.b.run(["ckpt", "migrate", "web", "root@a"], env={"CKPT_FAULT": "migrate-restore:kill"}, check=False)
    wait_until(lambda: [job["state"] for job in listed(lab.b)] == ["done", "rolled-back"], "the guard settled it")
    assert listed(lab.b)[-1]["settled_by"] == "guard"
    wait_until(lambda: [job["state"] for job in listed(lab.a)] == ["done", "rolled-back"], "the other end has undone it")
    assert the_live_one(lab) is lab.b

    lab.b.run(["ckpt", "migrate", "web", "root@a"], env={"CKPT_FAULT": "migrate-committed:kill"}, check=False)
    (waiting,) = listed(lab.b, "--running")
    assert waiting["state"] == "waiting" and waiting["next"] == f"ckpt migrate --continue {waiting['id']}"
    assert waiting["next"] in lab.b.run(["ckpt", "jobs"]).stdout
    lab.b.run(waiting["next"].split(), check=False)
    assert [job["state"] for job in listed(lab.b, "-l")] == ["rolled-back"]
    assert listed(lab.b, "--running") == [] and len(listed(lab.b, "--all")) == 3
    the_live_one(lab)
    assert_clean(lab.a, lab.b)
