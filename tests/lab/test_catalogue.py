"""The store as a catalogue, with podman for real: rewind, tags, prune, a store on a network mount."""

from __future__ import annotations

import json

from tests.lab.counting import assert_clean, counts_on, last_tick, start_counter, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host


def refs(host: Host, *options: str) -> list[str]:
    return [row["ref"] for row in json.loads(host.run(["ckpt", *options, "list", "--format", "json"]).stdout)["results"]]


def test_rewind_tags_and_prune(lab: Lab) -> None:
    start_counter(lab.a)
    lab.a.run(["ckpt", "checkpoint", "-R", "--tag", "good", "--note", "the first", "web"])
    first = last_tick(lab.a)
    wait_until(lambda: last_tick(lab.a) > first + 20, "web counts on")
    lab.a.run(["ckpt", "checkpoint", "-R", "web"])
    lab.a.run(["ckpt", "rewind", "web@good"])
    # The file came back with the memory: the count goes on from the first checkpoint, and what ran before was kept.
    assert last_tick(lab.a) < first + 20
    assert counts_on(lab.a)
    assert refs(lab.a) == ["web@1", "web@2", "web@3"]
    # The second one holds little that the first one has not.
    rows = json.loads(lab.a.run(["ckpt", "list", "--format", "json"]).stdout)["results"]
    assert rows[1]["unique_bytes"] < rows[1]["size_bytes"] / 2, rows
    would = lab.a.run(["ckpt", "prune", "--keep-last", "1", "--keep-tag", "good", "--dry-run"]).stdout
    assert "would go" in would and refs(lab.a) == ["web@1", "web@2", "web@3"]
    lab.a.run(["ckpt", "prune", "--keep-last", "1", "--keep-tag", "good"])
    assert refs(lab.a) == ["web@1", "web@3"]
    lab.a.run(["ckpt", "rewind", "--discard", "web@before-rewind"])
    assert last_tick(lab.a) > first + 20 and counts_on(lab.a)
    assert_clean(lab.a)


def test_a_store_on_a_network_mount(lab: Lab) -> None:
    """sshfs: no hard links, no locks of other hosts, its own ideas of rename and of what is on the disk."""
    start_counter(lab.a)
    lab.a.run(["mkdir", "-p", "/mnt/net"])
    lab.b.run(["mkdir", "-m", "700", "-p", "/srv/store"])
    lab.a.run(["sshfs", "b:/srv/store", "/mnt/net"])
    try:
        store = ["--store", "/mnt/net/ckpt"]
        lab.a.run(["ckpt", *store, "checkpoint", "-R", "web"])
        lab.a.run(["ckpt", *store, "checkpoint", "web"])
        assert refs(lab.a, *store) == ["web@1", "web@2"]
        lab.a.run(["ckpt", *store, "verify", "--all"])
        lab.a.run(["ckpt", *store, "copy", "web@2", "--to", "/var/lib/ckpt"])
        lab.a.run(["ckpt", *store, "prune", "--keep-last", "1", "--orphans"])
        lab.a.run(["ckpt", *store, "restore", "web"])
        assert counts_on(lab.a)
    finally:
        lab.a.run(["umount", "-l", "/mnt/net"], check=False)
    assert refs(lab.a) == ["web@1"]
    assert_clean(lab.a)
