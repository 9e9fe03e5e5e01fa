"""Labels of containers: read strictly, honoured, and overridden only aloud."""

from __future__ import annotations

import pytest

from ckpt.errors import PolicyRefused, UsageError
from ckpt.events import Event, Notice
from ckpt.model import Container
from ckpt.ops import consent
from ckpt.ops.consent import InsideHook, Labels


def container(**labels: str) -> Container:
    return Container("podman", "0123", "web", "running", labels={key.replace("__", "."): value for key, value in labels.items()})


def labelled(key: str, value: str) -> Container:
    return Container("podman", "0123", "web", "running", labels={key: value, "other": "anything"})


def test_without_labels_everything_may_be_done() -> None:
    assert consent.labels(container()) == Labels()
    for verb in ("checkpoint", "migrate", "arm"):
        assert consent.require(container(), verb) == Labels()  # type: ignore[arg-type]


def test_all_labels() -> None:
    found = consent.parse(
        {
            "ckpt.reboot": "save",
            "ckpt.checkpoint": "allow",
            "ckpt.migratable": "false",
            "ckpt.after": "db, cache",
            "ckpt.group": "shop",
            "ckpt.hook.pre-checkpoint": "sh -c 'echo a b'",
            "ckpt.hook.pre-checkpoint.timeout": "500ms",
            "ckpt.hook.post-restore": '["touch", "/a b"]',
            "ckpt.hook.post-restore.on-failure": "ignore",
            "ckpt.hook.post-restore.timeout": "2m",
            "io.podman": "x",
        },
        "web",
    )
    assert found.reboot == "save" and found.after == ("db", "cache") and found.group == "shop" and not found.migratable
    assert found.hooks["pre-checkpoint"] == InsideHook(("sh", "-c", "echo a b"), 0.5, "abort")
    assert found.hooks["post-restore"] == InsideHook(("touch", "/a b"), 120.0, "ignore")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ckpt.reboot", "sav"),
        ("ckpt.checkpoint", "false"),
        ("ckpt.migratable", "no"),
        ("ckpt.after", "db,,cache"),
        ("ckpt.after", "db;rm"),
        ("ckpt.group", "a b"),
        ("ckpt.migratible", "false"),
        ("ckpt.hook.pre-checkpoint", ""),
        ("ckpt.hook.pre-checkpoint", "echo 'a"),
        ("ckpt.hook.pre-checkpoint", "[1]"),
        ("ckpt.hook.pre-checkpoint", "[" * 4000),
        ("ckpt.hook.pre-checkpoint", "x" * 5000),
        ("ckpt.hook.pre-restore", "true"),
        ("ckpt.hook.pre-checkpoint.timeout", "10s"),
        ("ckpt.hook.post-restore.on-failure", "abort"),
        ("ckpt.hook.pre-checkpoint.on-failure", "retry"),
    ],
)
def test_a_value_that_means_nothing_is_one_error(key: str, value: str) -> None:
    with pytest.raises(UsageError, match=r"ckpt\.") as caught:
        consent.require(labelled(key, value), "checkpoint")
    assert caught.value.exit_code == 2
    assert caught.value.where == "web is untouched"
    said: list[Event] = []
    assert consent.require(labelled(key, value), "checkpoint", override=True, emit=said.append) == Labels(overridden="labels")
    assert [isinstance(event, Notice) and event.warning for event in said] == [True]


@pytest.mark.parametrize("text", ["0", "-1s", "1e3", "2h", "ten", "", "3601s", "٣s"])
def test_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="no time"):
        consent.seconds(text)


def test_what_is_forbidden() -> None:
    deny, stay = labelled("ckpt.checkpoint", "deny"), labelled("ckpt.migratable", "false")
    for verb in ("checkpoint", "export", "migrate", "arm", "hibernate", "drain", "snapshot"):
        with pytest.raises(PolicyRefused, match="ckpt.checkpoint=deny"):
            consent.require(deny, verb)  # type: ignore[arg-type]
    with pytest.raises(PolicyRefused, match="ckpt.migratable=false") as caught:
        consent.require(stay, "migrate")
    assert caught.value.exit_code == 34
    assert consent.require(stay, "checkpoint").migratable is False
    said: list[Event] = []
    assert consent.require(deny, "export", override=True, emit=said.append).checkpoint == "allow"
    assert len(said) == 1 and isinstance(said[0], Notice) and said[0].warning and "--override-label" in said[0].text


def test_at_a_reboot_what_may_not_be_saved_is_stopped() -> None:
    assert Labels(checkpoint="deny").at_reboot("save") == "stop"
    assert Labels(reboot="save", checkpoint="deny").at_reboot("ignore") == "stop"
    assert Labels(reboot="ignore", checkpoint="deny").at_reboot("save") == "ignore"
    assert Labels(reboot="save").at_reboot("stop") == "save"
    assert Labels().at_reboot("save") == "save"
