"""hibernate.toml: strict, in ckpt's words and in libvirt-guests'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ckpt.errors import ConfigError
from ckpt.ops.hibernate.settings import HibernateSettings, Tree, load, parse


def test_nothing_is_as_good_as_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty.toml").write_text("")
    assert load(tmp_path / "none.toml") == load(tmp_path / "empty.toml") == HibernateSettings()
    assert HibernateSettings().parallel_shutdown >= 2


def test_all_of_it(tmp_path: Path) -> None:
    (tmp_path / "h.toml").write_text(
        'on_shutdown = "stop"\nladder = ["restore", "cold", "leave"]\nkeep_last = 3\n[[tree]]\nname = "sim"\npidfile = "/run/sim.pid"\n'
        '[[tree]]\nname = "job"\nunit = "job"\n[workload."podman:web"]\naction = "ignore"\nladder = ["cold"]\n[workload.db]\nafter = ["web"]\n'
    )
    found = load(tmp_path / "h.toml")
    assert found.on_shutdown == "stop" and found.keep_last == 3
    assert found.trees == (Tree("sim", pidfile=Path("/run/sim.pid")), Tree("job", unit="job.service"))
    assert found.ladder_of("podman:web", "web") == ("cold",) and found.ladder_of("podman:db", "db") == ("restore", "cold", "leave")
    assert found.workload("podman:db", "db").after == ("web",)


def test_libvirts_words() -> None:
    found = parse({"ON_SHUTDOWN": "suspend", "ON_BOOT": "ignore", "PARALLEL_SHUTDOWN": 0, "SHUTDOWN_TIMEOUT": 60}, "f")
    assert (found.on_shutdown, found.on_boot, found.parallel_shutdown, found.shutdown_timeout_s) == ("save", "ignore", 1, 60.0)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"on_shutdwon": "save"}, "on_shutdwon"),
        ({"on_shutdown": "suspend"}, "on_shutdown"),
        ({"ON_SHUTDOWN": "save"}, "ON_SHUTDOWN"),
        ({"ON_SHUTDOWN": ["suspend"]}, "ON_SHUTDOWN"),
        ({"on_boot": "restore", "ON_BOOT": "start"}, "ON_BOOT"),
        ({"parallel_shutdown": True}, "parallel_shutdown"),
        ({"shutdown_timeout_s": -1}, "shutdown_timeout_s"),
        ({"ladder": ["leave", "cold"]}, "ladder"),
        ({"ladder": []}, "ladder"),
        ({"canary": "yes"}, "canary"),
        ({"tree": [{"name": "a"}]}, "one of pidfile, unit and pid"),
        ({"tree": [{"name": "a", "pid": 5, "unit": "b"}]}, "one of pidfile, unit and pid"),
        ({"tree": [{"name": "a", "pid": 5}, {"name": "a", "pid": 6}]}, "twice"),
        ({"tree": [{"name": "a/b", "pid": 5}]}, "name"),
        ({"tree": [{"name": "a", "pidfile": "run/x"}]}, "pidfile"),
        ({"workload": {"web": {"acton": "save"}}}, "acton"),
        ({"workload": 5}, "workload"),
    ],
)
def test_what_makes_no_sense_is_named(values: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match="/etc/x") as caught:
        parse(values, "/etc/x")
    assert named in caught.value.message and caught.value.exit_code == 3


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "h.toml").write_text("on_shutdown = \n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "h.toml")
