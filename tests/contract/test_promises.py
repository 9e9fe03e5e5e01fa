"""What every engine promises, whatever it drives. A counter tells: it goes on, at the number where it was, or it does not."""

from __future__ import annotations

import pytest

from tests.contract.subject import Subject, Unsupported, wait_until

UNSAFE_STEPS = ("dumping", "held", "captured", "described", "stored")
"""Steps of a checkpoint before its journal says commit: whoever dies there, the container goes on."""
SAFE_STEPS = ("commit", "ended")


def counts_on(subject: Subject, target: str, beyond: int) -> bool:
    return wait_until(lambda: subject.ticks(target) > beyond)


def state(subject: Subject, target: str) -> str:
    return str(subject.drive("state", target).get("state", "gone"))


def start(subject: Subject, name: str, broken: str = "") -> str:
    try:
        return subject.start_counter(name, broken=broken)
    except Unsupported as reason:
        pytest.skip(str(reason))


def test_counter_goes_on_after_checkpoint_and_restore(subject: Subject) -> None:
    target = start(subject, "web")
    assert wait_until(lambda: subject.ticks(target) > 20)
    saved = subject.drive("checkpoint", target)
    assert saved["ok"], saved
    assert saved["ref"].endswith("@1")
    assert {"Frozen", "StepDone"} <= set(saved["events"])
    assert saved["stats"]["freeze_s"] > 0
    at = subject.ticks(target)
    assert at > 20
    assert state(subject, target) != "running"
    back = subject.drive("restore", saved["ref"])
    assert back["ok"], back
    assert back["state"] == "running"
    assert counts_on(subject, target, at)
    # Had it begun anew it would be far from there.
    assert at < subject.ticks(target)


def test_leave_running(subject: Subject) -> None:
    target = start(subject, "web")
    saved = subject.drive("checkpoint", target, "--leave-running")
    assert saved["ok"], saved
    assert "Thawed" in saved["events"]
    assert state(subject, target) == "running"
    assert counts_on(subject, target, subject.ticks(target))


def test_generations(subject: Subject) -> None:
    target = start(subject, "web")
    refs = [subject.drive("checkpoint", target, "--leave-running")["ref"] for _ in range(2)]
    assert [ref.rpartition("@")[2] for ref in refs] == ["1", "2"]


def test_restore_in_place_refuses_a_running_container(subject: Subject) -> None:
    target = start(subject, "web")
    saved = subject.drive("checkpoint", target, "--leave-running")
    refused = subject.drive("restore", saved["ref"])
    assert refused["code"] == 11, refused
    assert counts_on(subject, target, subject.ticks(target))


def test_restore_twice_from_the_same_checkpoint(subject: Subject) -> None:
    """Unlike podman's own, a checkpoint is not used up by its restore."""
    target = start(subject, "web")
    first = subject.drive("checkpoint", target)
    assert subject.drive("restore", first["ref"])["ok"]
    second = subject.drive("checkpoint", target)
    assert second["ok"], second
    assert subject.drive("restore", first["ref"])["ok"]
    assert counts_on(subject, target, subject.ticks(target))


def test_started_cold_it_begins_anew(subject: Subject) -> None:
    """What a boot's last resort is: ended and started by the engine alone, with the root file system that it had."""
    target = start(subject, "web")
    assert wait_until(lambda: subject.ticks(target) > 600)  # the new one must be seen before it gets there
    done = subject.drive("start", target)
    if done.get("startable") is False:
        assert subject.engine == "process", done
        assert counts_on(subject, target, subject.ticks(target))
        return
    assert done["ok"], done
    assert set(done["stopped"]) <= {"exited"}
    assert done["state"] == "running"
    assert wait_until(lambda: 0 < subject.ticks(target) < 600)
    assert counts_on(subject, target, subject.ticks(target))


def test_failed_dump_leaves_it_running(subject: Subject) -> None:
    target = start(subject, "web", broken="dump")
    failed = subject.drive("checkpoint", target)
    assert failed["code"] in (13, 20), failed
    assert "running" in failed["where"]
    assert state(subject, target) == "running"
    assert counts_on(subject, target, subject.ticks(target))


def test_resume_after_held_dump(subject: Subject) -> None:
    target = start(subject, "web")
    held = subject.drive("hold", target)
    assert held["ok"], held
    assert held["inventory"]
    assert held["state"] == "running"
    assert counts_on(subject, target, subject.ticks(target))


def test_abort_of_a_held_restore_leaves_nothing(subject: Subject) -> None:
    target = start(subject, "web")
    saved = subject.drive("checkpoint", target)
    aborted = subject.drive("hold-restore", saved["ref"])
    assert aborted["ok"], aborted
    assert aborted["left"] == []
    assert subject.drive("restore", saved["ref"])["ok"], "the checkpoint must be as good as before"


@pytest.mark.parametrize("step", ["held", "captured", "described", "stored"])
@pytest.mark.parametrize("action", ["fail", "enospc"])
def test_failure_before_commit_leaves_it_running(subject: Subject, step: str, action: str) -> None:
    target = start(subject, "web")
    failed = subject.drive("checkpoint", target, fault=f"{step}:{action}")
    assert failed["code"] == (60 if action == "enospc" else 20), failed
    assert "running" in failed["where"]
    assert state(subject, target) == "running"
    assert counts_on(subject, target, subject.ticks(target))


@pytest.mark.parametrize("step", UNSAFE_STEPS)
def test_killed_before_commit(subject: Subject, step: str) -> None:
    """kill -9: the container goes on by itself, the store is whole, the next checkpoint works."""
    if not subject.killable:
        pytest.skip("not here")
    target = start(subject, "web")
    assert subject.drive("checkpoint", target, fault=f"{step}:kill").get("killed")
    assert counts_on(subject, target, subject.ticks(target))
    assert state(subject, target) == "running"
    again = subject.drive("checkpoint", target)
    assert again["ok"], again
    assert again["ref"].endswith("@2" if step == "stored" else "@1")


@pytest.mark.parametrize("step", SAFE_STEPS)
def test_killed_after_commit(subject: Subject, step: str) -> None:
    """kill -9 once the checkpoint is safe: it is finished by the guard, the container ends, the checkpoint restores."""
    if not subject.killable:
        pytest.skip("not here")
    target = start(subject, "web")
    assert subject.drive("checkpoint", target, fault=f"{step}:kill").get("killed")
    assert wait_until(lambda: state(subject, target) not in ("running", "paused"))
    at = subject.ticks(target)
    subject.drive("sweep")
    # The process engine calls it otherwise; it is the only one.
    back = subject.drive("restore-latest")
    assert back["ok"], back
    assert counts_on(subject, target, at)


@pytest.mark.parametrize("step", ["verified", "removed", "restoring", "restored"])
def test_restore_killed_before_commit(subject: Subject, step: str) -> None:
    """kill -9 in a restore: nothing half-made stays, the checkpoint is still there and restores."""
    if not subject.killable:
        pytest.skip("not here")
    target = start(subject, "web")
    saved = subject.drive("checkpoint", target)
    assert saved["ok"], saved
    at = subject.ticks(target)
    died = subject.drive("restore", saved["ref"], fault=f"{step}:kill")
    if step == "removed" and died["ok"]:
        pytest.skip("an ended process tree leaves nothing to be removed")
    assert died.get("killed"), died
    assert wait_until(lambda: state(subject, target) in ("gone", "exited", "created"))

    def restored() -> bool:
        return bool(subject.drive("restore", saved["ref"])["ok"])

    # The guard may still be at it.
    assert wait_until(restored)
    assert counts_on(subject, target, at)


def test_restore_killed_after_commit(subject: Subject) -> None:
    """kill -9 after the decision that it runs: it runs."""
    if not subject.killable:
        pytest.skip("not here")
    target = start(subject, "web")
    saved = subject.drive("checkpoint", target)
    assert saved["ok"], saved
    at = subject.ticks(target)
    assert subject.drive("restore", saved["ref"], fault="restore-commit:kill").get("killed")
    assert wait_until(lambda: state(subject, target) == "running")
    assert counts_on(subject, target, at)


def test_a_tree_that_is_not_what_was_dumped_is_not_let_run(subject: Subject) -> None:
    target = start(subject, "web", broken="tree")
    saved = subject.drive("checkpoint", target)
    assert saved["ok"], saved
    failed = subject.drive("restore", saved["ref"])
    assert failed["code"] == 21, failed
    assert "nothing is running" in failed["where"]
    assert saved["ref"] in failed["where"]
    assert state(subject, target) != "running"
