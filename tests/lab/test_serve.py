"""Two hosts without ssh between them, and a `ckpt serve`; a key of ssh that is for ckpt only."""

from __future__ import annotations

import json
import signal

from tests.lab.counting import assert_clean, assert_never_back, counts_on, last_tick, start_counter, state, the_live_one, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import HostResult

GATE = "/tmp/gate"
URL = "https://b:7443"
SAID = "/tmp/serve.out"


def token(lab: Lab, allow: str, uses: int = 1) -> None:
    made = lab.b.run(["ckpt", "serve", "token", "new", "--allow", allow, "--uses", str(uses)]).stdout
    lab.a.write_file("/root/token", made, mode=0o600)


def serve(lab: Lab) -> tuple[object, str]:
    """A server on b; its process and the fingerprint that it printed."""
    process = lab.b.popen(["sh", "-c", f"exec ckpt serve >{SAID} 2>/tmp/serve.log"])
    wait_until(lambda: "fingerprint" in lab.b.run(["cat", SAID], check=False).stdout, "ckpt serve listens")
    return process, lab.b.run(["sed", "-n", "s/^fingerprint //p", SAID]).stdout.strip()


def migrate(lab: Lab, *flags: str, fault: str = "") -> HostResult:
    words = ["ckpt", "migrate", "--token-file", "/root/token", *flags, "web", URL, "--format", "json"]
    return lab.a.run(words, check=False, timeout_s=120, env={"CKPT_FAULT": fault} if fault else {})


def test_hosts_without_ssh(lab: Lab) -> None:
    for host in lab:
        host.write_file("/etc/ckpt/ckpt.toml", "link_timeout_s = 4\n")
    lab.b.run(["nft", "add table inet wall; add chain inet wall in { type filter hook input priority 0; }; add rule inet wall in tcp dport 22 drop"])
    start_counter(lab.a)
    before = last_tick(lab.a)
    server, fingerprint = serve(lab)

    token(lab, "migrate")
    stranger = migrate(lab)
    assert stranger.returncode == 43 and "not trusted" in stranger.stderr and "web is running, untouched" in stranger.stderr, stranger
    lab.a.run(["ckpt", "check", "web", "--to", URL, "--fingerprint", fingerprint, "--token-file", "/root/token"])
    assert lab.a.run(["stat", "-c", "%a", "/root/.config/ckpt/known_servers"]).stdout.strip() == "600"

    # Archives, there and back; the server is known by now.
    token(lab, "upload,download", uses=2)
    lab.a.run(["ckpt", "checkpoint", "-R", "web"])
    lab.a.run(["ckpt", "export", "web@1", f"{URL}/kept.tar.zst", "--token-file", "/root/token"])
    assert "kept@1" in lab.b.run(["ckpt", "list"]).stdout
    lab.a.run(["ckpt", "import", f"{URL}/checkpoints/kept@1", "--token-file", "/root/token", "-n", "back"])
    assert "back@1" in lab.a.run(["ckpt", "list"]).stdout
    again = lab.a.run(["ckpt", "export", "web@1", URL, "--token-file", "/root/token"], check=False)
    assert again.returncode == 43 and "used up" in again.stderr, again

    token(lab, "migrate", uses=3)
    # Cut at the switchover: the destination never heard of it, and undoes what it has. The source asks it as soon as it can.
    moving = lab.a.popen(["ckpt", "migrate", "--token-file", "/root/token", "web", URL], env={"CKPT_FAULT": f"migrate-resume:gate={GATE}"})
    wait_until(lambda: lab.a.exists(f"{GATE}.reached"), "the switchover")
    lab.cut_link()
    lab.a.write_file(GATE, "")
    wait_until(lambda: not lab.b.run(["pgrep", "-f", "[c]kpt.cli.main import main.*peer"], check=False).stdout, "the peer on b gives up")
    lab.restore_link()
    _, said = moving.communicate(timeout=100)
    assert moving.returncode == 50, said.decode()
    assert the_live_one(lab) is lab.a

    # Killed after its point of no return; what it left frozen goes on with --continue, which finds the server and the token again.
    killed = migrate(lab, fault="migrate-committed:kill")
    assert killed.returncode in (-9, 137), killed
    (job,) = lab.a.run(["ls", "/var/lib/ckpt/jobs"]).stdout.split()
    lab.a.run(["ckpt", "migrate", "--continue", job])
    assert the_live_one(lab) is lab.a
    wait_until(lambda: not lab.b.run(["ls", "/var/lib/ckpt/jobs"], check=False).stdout.split(), "b has undone it")

    done = migrate(lab)
    assert done.returncode == 0, done
    assert json.loads(done.stdout)["results"][0]["stats"]["carrier"] == "https"
    assert the_live_one(lab) is lab.b
    assert_never_back(lab.b, at_least=before)
    assert state(lab.a) == ""
    spent = migrate(lab)
    assert spent.returncode in (10, 43), spent
    assert_clean(lab.a, lab.b)

    server.send_signal(signal.SIGTERM)  # type: ignore[attr-defined]
    server.communicate(timeout=40)  # type: ignore[attr-defined]
    assert server.returncode == 0, lab.b.run(["cat", "/tmp/serve.log"]).stdout  # type: ignore[attr-defined]
    assert counts_on(lab.b), "the container outlives the server"
    secret = lab.a.run(["cat", "/root/token"]).stdout.strip()
    assert secret not in lab.b.run(["cat", "/tmp/serve.log", SAID]).stdout


def test_a_key_that_is_for_ckpt_only(lab: Lab) -> None:
    keys = "/root/.ssh/authorized_keys"
    own = lab.b.run(["cat", keys]).stdout.strip()

    def forced(flags: str) -> None:
        lab.b.write_file(keys, f'command="/usr/local/bin/ckpt serve --stdio {flags}",restrict {own}\n', mode=0o600)

    def over_ssh(command: str) -> HostResult:
        return lab.a.run(["ssh", "-o", "BatchMode=yes", "root@b", command], check=False)

    start_counter(lab.a)
    lab.a.run(["ckpt", "checkpoint", "-R", "web"])
    forced("--restrict-to-path /srv/kept --write-only")
    sent = lab.a.run(["sh", "-c", "ckpt export web@1 - | ssh root@b ckpt import -"], check=False)
    assert sent.returncode == 0, sent
    assert lab.b.run(["ckpt", "list", "--store", "/srv/kept", "-q"]).stdout.strip()
    for command in ("", "id", "ckpt list", "ckpt export web@1 -o -", "ckpt peer", "ckpt peer; id", "cat /etc/shadow"):
        refused = over_ssh(command) if command else lab.a.run(["ssh", "-T", "root@b"], check=False)
        assert refused.returncode == 43 and refused.stdout == "", (command, refused)
    refused = lab.a.run(["ckpt", "migrate", "web", "root@b"], check=False)
    assert refused.returncode in (40, 43) and "does not allow migrate" in refused.stderr and counts_on(lab.a), refused

    forced("--restrict-to-path /srv/kept --read-only")
    lab.a.run(["sh", "-c", "ssh root@b ckpt export web@1 - | ckpt import -n back -"])
    forced("")
    lab.a.run(["ckpt", "migrate", "web", "root@b"])
    assert the_live_one(lab) is lab.b
    assert_never_back(lab.b)
    assert_clean(lab.a, lab.b)
