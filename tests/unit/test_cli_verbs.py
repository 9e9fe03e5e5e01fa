"""The verbs with the use cases replaced: what they pass on, what they print, how they exit."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt.cli.main import main
from ckpt.errors import BusyError, CkptError, DumpFailed, NeedsContinue, TargetNotFound
from ckpt.events import BytesMoved, Notice, StepDone, StepStarted
from ckpt.model import Carriage, Checkpoint, Compression, Container, ContainerImage, DumpOptions, Finding, Manifest, Process, Target
from ckpt.ops.list_ import Listed
from ckpt.ops.result import Outcome, failure
from ckpt.transports.base import Location

MANIFEST = Manifest(
    id="c0ffee" * 5, name="web", engine="podman", container_id="ab" * 32, created_s=1.7e9, generation=2, size_bytes=1 << 20, freeze_s=0.212,
    container_image=ContainerImage("sha256:9de0", "docker.io/library/busybox"), processes=(Process(1, 0, "httpd", 4),), volumes=(("data", "/data"),),
)  # fmt: skip
CHECKPOINT = Checkpoint(MANIFEST, Path("/var/lib/ckpt/checkpoints/c0ffee"))
CONTAINER = Container("podman", "ab" * 32, "web", "running")
DONE = Outcome("web", True, CHECKPOINT, CONTAINER, stats={"freeze_s": 0.212, "pages_written": 7})

Fake = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Root, without anybody's configuration."""
    for name in list(os.environ):
        if name.startswith("CKPT_") or name == "_CKPT_COMPLETE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("CKPT_LOG_DIR", str(tmp_path / "log"))
    monkeypatch.setattr("ckpt.cli.main._catch_signals", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Replace a use case: `fake("rm.rm", result)`. Returns the dict that its arguments appear in."""

    def replace(path: str, result: Any = None, *, events: tuple[Any, ...] = (), error: BaseException | None = None) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def use_case(*args: Any, **kwargs: Any) -> Any:
            seen.update(kwargs, args=args)
            for event in events:
                kwargs["emit"](event)
            if error is not None:
                raise error
            return result

        module, _, function = path.partition(".")
        monkeypatch.setattr(importlib.import_module(f"ckpt.ops.{module}"), function, use_case)
        return seen

    return replace


def test_checkpoint_prints_the_name_that_was_typed(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    seen = fake("checkpoint.checkpoint", [Outcome("podman:web", True, CHECKPOINT)])
    assert main(["checkpoint", "podman:web", "-R", "--tcp-established", "--no-file-locks", "--timeout", "7"]) == 0
    assert capsys.readouterr() == ("podman:web\n", "")
    assert seen["args"] == ([Target("web", "podman")],)
    assert seen["options"] == DumpOptions(leave_running=True, tcp_established=True, file_locks=False, timeout_s=7.0)
    assert (seen["all"], seen["latest"], seen["keep_going"]) == (False, False, True)
    assert seen["store_root"] == Path("/var/lib/ckpt")


def test_checkpoint_finds_out_what_is_not_said(fake: Fake) -> None:
    seen = fake("checkpoint.checkpoint", [])
    assert main(["checkpoint", "-a"]) == 0
    assert seen["options"] == DumpOptions()


@pytest.mark.parametrize(
    ("args", "store"),
    [(["--store", "/s", "list"], "/s"), (["list", "--store", "/s"], "/s"), (["--store", "/a", "list", "--store", "/s"], "/s"), (["list"], "/e")],
)
def test_the_store_by_option_or_environment(fake: Fake, monkeypatch: pytest.MonkeyPatch, args: list[str], store: str) -> None:
    monkeypatch.setenv("CKPT_STORE", "/e")
    fake("list_.broken", ())
    seen = fake("list_.list_", [])
    assert main(args) == 0
    assert seen["store_root"] == Path(store)


def test_quiet_gives_ids_and_no_progress(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake("checkpoint.checkpoint", [DONE], events=(StepDone("web", "dump"),))
    assert main(["-q", "checkpoint", "web"]) == 0
    assert capsys.readouterr() == (MANIFEST.id + "\n", "")
    fake("restore.restore", [DONE])
    assert main(["restore", "web", "-q"]) == 0
    assert capsys.readouterr().out == CONTAINER.id + "\n"


def test_progress_goes_to_stderr(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake("checkpoint.checkpoint", [DONE], events=(StepStarted("web", "dump"), StepDone("web", "dump", "1 GiB"), Notice("web", "odd", warning=True)))
    main(["checkpoint", "web"])
    assert capsys.readouterr() == ("web\n", "web: dump: ok, 1 GiB\nwarning: web: odd\n")


def test_json(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    error = DumpFailed("db cannot be checkpointed", where="db is running", hint="stop it", log="/l:1")
    fake("checkpoint.checkpoint", [DONE, failure("db", error)])
    assert main(["checkpoint", "web", "db", "--format", "json"]) == 20
    document = json.loads(capsys.readouterr().out)
    assert (document["schema"], document["verb"], document["exit_code"]) == (1, "checkpoint", 20)
    web, db = document["results"]
    assert (web["name"], web["ref"], web["id"], web["ok"], web["freeze_s"]) == ("web", "web@2", MANIFEST.id, True, 0.212)
    assert web["stats"]["pages_written"] == 7
    assert db["ok"] is False
    assert db["error"] == {
        "code": "dump-failed", "exit_code": 20, "message": "db cannot be checkpointed", "where": "db is running", "hint": "stop it", "log": "/l:1",
    }  # fmt: skip


def test_jsonl_has_events_and_results(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake("checkpoint.checkpoint", [DONE], events=(StepStarted("web", "dump"), BytesMoved("web", "dump", 3, None)))
    assert main(["checkpoint", "web", "--format", "jsonl"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["event"] for line in lines] == ["step_started", "bytes_moved", "result"]
    assert all(line["schema"] == 1 for line in lines)
    assert err == ""


def test_json_of_a_failure_as_a_whole(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake("inspect.inspect", error=TargetNotFound("there is no web"))
    assert main(["inspect", "web", "--format", "json"]) == 10
    out, err = capsys.readouterr()
    assert json.loads(out)["error"]["code"] == "no-such-target"
    assert err == "error: there is no web\n"


def test_templates(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake("list_.broken", ())
    fake("list_.list_", [Listed(CHECKPOINT)])
    assert main(["list", "--format", r"{{.Name}}\t{{.ID}} {{ .ContainerImage.Name }}"]) == 0
    assert capsys.readouterr().out == f"web\t{MANIFEST.id} docker.io/library/busybox\n"


def test_a_wrong_template_is_told_before_anything_is_done(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    seen = fake("checkpoint.checkpoint", [DONE])
    assert main(["checkpoint", "web", "--format", "{{.Nmae}}"]) == 2
    assert seen == {}
    assert "no field .Nmae" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args",
    [
        ["chekpoint"], ["checkpoint"], ["checkpoint", "web", "--bogus"], ["checkpoint", "-a", "web"], ["checkpoint", "-a", "-l"], ["checkpoint", ""],
        ["checkpoint", "web", "-c", "gzip"], ["checkpoint", "-e", "x.tar", "a", "b"], ["checkpoint", "-e", "x.tar", "-a"],
        ["checkpoint", "web", "--timeout", "0"],
        ["restore"], ["restore", "web", "-i", "f"], ["restore", "-i", "f", "-a"], ["restore", "a", "b", "-n", "c"], ["export", "web"],
        ["import"], ["import", "f", "-n", " "], ["migrate"], ["migrate", "web"], ["migrate", "web", "b", "--continue", "id"], ["check"],
        *(["migrate", "web", "b", "--bwlimit", rate] for rate in ("", "fast", "-1", "1iB", "50", "8Mbit", "1e3", "5M5", "9999999T", "٣M", "nan")),
        *(["migrate", "web", "b", "--compress", how] for how in ("", "gzip", "zstd:", "zstd:0", "zstd:20", "zstd:٣", "auto:1", "none:", "ZSTD")),
        *(["migrate", "web", "b", "--streams", count] for count in ("", "0", "17", "-1", "2.5", "many")),
        ["inspect"], ["rm"], ["rm", "-a", "web"], ["list", "--format", "xml"], ["list", "a", "b"], ["--store", "/x"],
        [], ["--log-level", "loud", "list"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_wrong_usage_exits_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("error:") == 1 or not args


@pytest.mark.parametrize(
    "args", [["checkpoint", "web"], ["restore", "web"], ["migrate", "web", "b"], ["check", "web"], ["export", "podman:web", "-o", "f"]]
)
def test_engines_are_for_root(args: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main([*args, "--store", str(tmp_path)]) == 14
    assert "where: nothing was touched" in capsys.readouterr().err


def test_the_store_is_for_its_owner(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    fake("list_.broken", ())
    fake("list_.list_", [])
    assert main(["list"]) == 0


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([DONE], 0),
        ([DONE, failure("a", BusyError("x")), failure("b", DumpFailed("y"))], 11),
        ([failure("a", BusyError("x")), failure("b", NeedsContinue("y"))], 51),
        ([Outcome("a", True, warnings=("left behind",))], 100),
        ([Outcome("a", True, warnings=("left behind",)), failure("b", DumpFailed("y"))], 20),
        ([Outcome("a", False)], 1),
        ([], 0),
    ],
)
def test_exit_codes_of_several(fake: Fake, outcomes: list[Outcome], code: int) -> None:
    fake("rm.rm", outcomes)
    assert main(["rm", "a", "b"]) == code


def test_the_four_lines(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake("rm.rm", error=DumpFailed("db cannot\x1b[31m", where="db is running, untouched", hint="try again", log="/log:812"))
    assert main(["rm", "db"]) == 20
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["error: db cannot\N{REPLACEMENT CHARACTER}[31m", "  where: db is running, untouched", "  next:  try again", "  log:   /log:812"]


def test_a_bug_stays_off_the_terminal(fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    fake("rm.rm", error=ZeroDivisionError("division by zero"))
    assert main(["rm", "db"]) == 70
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    (log,) = (tmp_path / "log").iterdir()
    assert str(log) in err
    assert "Traceback" in log.read_text()
    assert log.stat().st_mode & 0o777 == 0o600


def test_no_space_is_no_bug(fake: Fake) -> None:
    fake("rm.rm", error=OSError(28, "No space left on device"))
    assert main(["rm", "db"]) == 60


def test_ctrl_c(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake("rm.rm", error=KeyboardInterrupt())
    assert main(["rm", "db"]) == 130
    assert "SIGINT" in capsys.readouterr().err


def test_a_wrong_configuration(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CKPT_TIMEOUT_S", "soon")
    assert main(["list"]) == 3
    assert "CKPT_TIMEOUT_S" in capsys.readouterr().err


def test_checkpoint_to_an_archive(fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("ckpt.cli.checkpoint._qualified", lambda target: f"podman:{target}")
    seen = fake("export.export", Outcome("podman:web", True, None, CONTAINER))
    assert main(["checkpoint", "web", "-e", "w.tar.gz", "-c", "GZIP", "--level", "3", "-R"]) == 0
    assert seen["args"] == ("podman:web", Location.parse("w.tar.gz"))
    assert (seen["compress"], seen["level"], seen["leave_running"]) == ("gzip", 3, True)
    assert capsys.readouterr().out == "web\n"


def test_checkpoint_several_to_a_directory(fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written: list[Location] = []

    def export(ref: str, output: Location, **kwargs: Any) -> Outcome:
        written.append(output)
        if ref == "podman:a":
            raise DumpFailed("a cannot")
        return Outcome(ref, True)

    monkeypatch.setattr("ckpt.ops.export.export", export)
    assert main(["checkpoint", "podman:a", "runc:b", "-e", str(tmp_path)]) == 20
    assert [one.path for one in written] == [tmp_path / "a.tar.zst", tmp_path / "b.tar.zst"]
    assert capsys.readouterr() == ("runc:b\n", "error: a cannot\n")
    written.clear()
    assert main(["checkpoint", "podman:a", "runc:b", "-e", str(tmp_path), "--fail-fast"]) == 20
    assert len(written) == 1


def test_export_to_stdout_prints_nothing_else_there(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    seen = fake("export.export", DONE, events=(StepDone("web", "archive"),))
    assert main(["export", "web@2", "-o", "-", "--format", "jsonl"]) == 0
    assert seen["args"] == ("web@2", Location.parse("-"))
    assert capsys.readouterr().out == ""


def test_import_prints_the_new_name(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    seen = fake("import_.import_", Outcome("web.tar.zst", True, CHECKPOINT))
    assert main(["import", "web.tar.zst", "-n", "web"]) == 0
    assert (seen["args"], seen["name"]) == ((Location.parse("web.tar.zst"),), "web")
    assert capsys.readouterr().out == "web@2\n"


def test_export_takes_its_destination_either_way(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    seen = fake("export.export", DONE)
    assert main(["export", "web@2", "b:web.tar", "--ssh-option", "Port=2222"]) == 0
    assert seen["args"] == ("web@2", Location.parse("b:web.tar")) and seen["carrier"].ssh_options == ("Port=2222",)
    for bad in (["export", "web@2"], ["export", "web@2", "x", "-o", "y"], ["export", "web@2", "ftp://x/y"], ["export", "web@2", "https://x/?a#b"]):
        assert main(bad) == 2
        assert capsys.readouterr().err.count("error: ") == 1


def test_how_to_reach_a_server(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config/ckpt").mkdir(parents=True)
    (tmp_path / "config/ckpt/ckpt.toml").write_text(
        '[http."https://b:7443"]\ntoken_file = "/etc/b"\nca_file = "/etc/ca"\n[http."https://b:7443/in"]\ntoken_command = ["pass", "b"]\n'
    )
    seen = fake("import_.import_", Outcome("x", True, CHECKPOINT))
    for url, file, command, ca in (
        ("https://b:7443/web.tar", Path("/etc/b"), (), Path("/etc/ca")),
        ("https://b:7443/in/web.tar", None, ("pass", "b"), None),
        ("https://b:7443/inner", Path("/etc/b"), (), Path("/etc/ca")),
        ("https://b/web.tar", None, (), None),
        ("https://b:7443@c/web.tar", None, (), None),
    ):
        assert main(["import", url]) == 0
        assert (seen["carrier"].token_file, seen["carrier"].token_command, seen["carrier"].ca_file) == (file, command, ca)
    assert main(["import", "https://b:7443/x", "--token-command", "pass 'my b'", "--insecure", "--digest", "sha256:" + "AB" * 32]) == 0
    assert (seen["carrier"].token_file, seen["carrier"].token_command, seen["carrier"].insecure) == (None, ("pass", "my b"), True)
    assert seen["digest"] == "ab" * 32
    for bad in (["--digest", "md5:00"], ["--token-command", "'"], ["--token-command", "a", "--token-file", "b"], ["--client-key", "k"]):
        assert main(["import", "https://b/x", *bad]) == 2


def test_a_bug_s_log_has_no_secrets(fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    url = "https://me:" + "sesame" + "@b/x?X-Amz-Signature=" + "sesame"

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"about {url}")

    import ckpt.ops.import_

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(ckpt.ops.import_, "import_", broken)
        assert main(["import", url]) == 70
    [log] = (tmp_path / "log").iterdir()
    assert "sesame" not in capsys.readouterr().err
    shown = log.read_text()
    assert "sesame" not in shown.replace('"sesame"', "") and "https://b/x?..." in shown


def test_restore_options(fake: Fake) -> None:
    seen = fake("restore.restore", [])
    args = ["restore", "web@2", "-n", "w2", "-p", "80:80", "-p", "81:81", "-k", "--pod", "p", "--ignore-static-ip", "--ignore-rootfs"]
    assert main(args) == 0
    options = seen["options"]
    assert (seen["args"], seen["keep"], seen["import_from"]) == ((("web@2",),), True, None)
    assert (options.name, options.publish, options.pod) == ("w2", ("80:80", "81:81"), "p")
    assert (options.ignore_static_ip, options.ignore_static_mac, options.ignore_rootfs, options.tcp_established) == (True, False, True, None)


def test_podmans_statistics(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake("checkpoint.checkpoint", [DONE])
    assert main(["checkpoint", "web", "--print-stats"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["podman_checkpoint_duration"] >= 0
    (entry,) = document["container_statistics"]
    assert (entry["Id"], entry["runtime_checkpoint_duration"]) == (CONTAINER.id, 212000)
    assert entry["criu_statistics"]["pages_written"] == 7
    fake("restore.restore", [Outcome("web", True, CHECKPOINT, CONTAINER, stats={"restore_s": 1.5})])
    assert main(["restore", "web", "--print-stats"]) == 0
    assert json.loads(capsys.readouterr().out)["container_statistics"][0]["runtime_restore_duration"] == 1500000


def test_migrate_closes_with_its_line(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    stats = {"total_s": 7.4, "downtime_s": 0.212, "sent_bytes": 1406600000, "rounds": 3, "transfer_s": 7.536, "container_id": "new"}
    seen = fake("migrate.migrate", Outcome("web", True, None, CONTAINER, stats=stats))
    assert main(["migrate", "web", "root@b", "--keep-source", "--ssh-option", "Port=22"]) == 0
    assert capsys.readouterr().out == "migrated web -> b: total 7.4 s, downtime 212 ms, 1.31 GiB sent (3 rounds, 178 MiB/s)\n"
    assert seen["args"] == (Target("web"), "root@b")
    assert (seen["options"].keep_source, seen["options"].ssh_options) == (True, ("Port=22",))
    assert main(["-q", "migrate", "web", "root@b"]) == 0
    assert capsys.readouterr().out == "new\n"


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("50M", 50 << 20),
        ("50MiB", 50 << 20),
        ("50m/s", 50 << 20),
        ("100MB", 10**8),
        ("1.5G", 3 << 29),
        ("65536", 65536),
        ("800k", 800 << 10),
        ("0", None),
    ],
)
def test_migrate_bwlimit(fake: Fake, text: str, rate: int | None) -> None:
    seen = fake("migrate.migrate", Outcome("web", True, None, CONTAINER))
    assert main(["migrate", "web", "b", "--bwlimit", text]) == 0
    assert seen["options"].carriage == Carriage(rate, Compression("auto"))


@pytest.mark.parametrize(("text", "mode", "level"), [("auto", "auto", 1), ("none", "none", 1), ("zstd", "zstd", 1), ("zstd:19", "zstd", 19)])
def test_migrate_compress(fake: Fake, text: str, mode: str, level: int) -> None:
    seen = fake("migrate.migrate", Outcome("web", True, None, CONTAINER))
    assert main(["migrate", "web", "b", "--compress", text]) == 0
    assert seen["options"].carriage == Carriage(None, Compression(mode, level))  # type: ignore[arg-type]


def test_migrate_streams(fake: Fake) -> None:
    seen = fake("migrate.migrate", Outcome("web", True, None, CONTAINER))
    assert main(["migrate", "web", "b", "--streams", "16", "--direct"]) == 0
    assert (seen["options"].carriage.streams, seen["options"].carriage.direct) == (16, True)


def test_migrate_dry_run_and_continue(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake("migrate.plan", [("check", "both hosts"), ("dump", "held")])
    assert main(["migrate", "--dry-run", "web", "b"]) == 0
    assert capsys.readouterr().out == "  check            both hosts\n  dump             held\n"
    seen = fake("migrate.continue_", Outcome("web", True))
    assert main(["migrate", "--continue", "job1"]) == 0
    assert seen["args"] == ("job1",)
    assert capsys.readouterr().out == "web\n"


def test_check(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    from ckpt.ops.check import CheckReport

    good = CheckReport("web", (Finding("CRIU", "ok", "4.2.1"),))
    bad = CheckReport("db", (Finding("io_uring", "error", "process 812 holds one", "turn it off"),))
    seen = fake("check.check", [good, bad])
    assert main(["check", "web", "db", "--to", "b"]) == 1
    assert seen["to"] == "b"
    assert capsys.readouterr().out.splitlines() == [
        "web: can be checkpointed",
        "  ok  CRIU         4.2.1",
        "db: cannot be checkpointed",
        "  --  io_uring     process 812 holds one",
        "                   next: turn it off",
    ]
    fake("check.check", [good])
    assert main(["check", "web", "--format", "{{.Name}} {{.Ok}}"]) == 0
    assert capsys.readouterr().out == "web true\n"


def test_list_and_inspect_for_people(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    from ckpt.ops.inspect import Inspection

    fake("list_.broken", ())
    fake("list_.list_", [Listed(CHECKPOINT)])
    assert main(["list"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["CHECKPOINT", "ID"]
    assert line.split()[:3] == ["web@2", MANIFEST.id[:12], "podman"]
    assert "1 MiB" in line
    fake("inspect.inspect", Inspection(MANIFEST, {"checkpoint/pages-1.img": 4096}, False))
    assert main(["inspect", "web"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("web@2\n")
    assert "data at /data" in out
    assert "httpd  4 threads" in out
    assert main(["inspect", "web", "--format", "{{json .Processes}}"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"pid": 1, "ppid": 0, "comm": "httpd", "threads": 4}]


def test_errors_of_all_kinds_keep_their_code(fake: Fake) -> None:
    kinds = [CkptError]
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        fake("rm.rm", [failure("x", kind("failed"))])
        assert main(["rm", "x"]) == kind.exit_code
