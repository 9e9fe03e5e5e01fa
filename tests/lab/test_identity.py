"""A client on a third host stays connected while a container moves: every byte comes once and in order, nobody closes or resets."""

from __future__ import annotations

import json
import subprocess

import pytest

from tests.lab.counting import assert_clean, state, wait_until
from tests.lab.harness import Lab
from tests.lab.harness.host import Host, HostProcess

CLIENT = r"""
import json, os, select, socket, struct, sys, time
address, port, said = sys.argv[1:]
busy, idle = (socket.create_connection((address, int(port)), 10) for _ in range(2))
def number(at): return struct.pack("!Q", at)
idle.sendall(b"hello"); assert idle.recv(5, socket.MSG_WAITALL) == b"hello"
busy.setblocking(False); busy.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
sent = got = 0; out = back = b""; gap = 0.0; heard = due = time.monotonic()
while True:
    stop = os.path.exists(said + ".stop")
    now = time.monotonic()
    if not stop and now >= due:
        out += b"".join(number(sent + i) for i in range(8)); sent += 8; due = now + 0.002
    if stop and not out and got == sent: break
    readable, writable, _ = select.select([busy, idle], [busy] if out else [], [], 0.001)
    if idle in readable: sys.exit("the idle connection: %r" % idle.recv(100))
    if busy in writable: out = out[busy.send(out):]
    if busy in readable:
        data = busy.recv(1 << 16)
        if not data: sys.exit("the server closed the connection")
        gap = max(gap, time.monotonic() - heard); heard = time.monotonic()
        back += data
        while len(back) >= 8:
            if back[:8] != number(got): sys.exit("number %d came as %r" % (got, back[:8]))
            got += 1; back = back[8:]
        with open(said + ".part", "w") as file: json.dump({"got": got, "gap_s": gap}, file)
        os.rename(said + ".part", said)
idle.settimeout(10); idle.sendall(b"still"); assert idle.recv(5, socket.MSG_WAITALL) == b"still"
print(json.dumps({"sent": sent, "got": got, "gap_s": gap}))
"""
GATE = "/tmp/gate"
V6 = "fd77::60"
THREE = ("a", "b", "c")


class Client:
    """Connections of host c to the container."""

    def __init__(self, host: Host, address: str, port: int) -> None:
        self.host, self.file = host, f"/tmp/said-{port}"
        self.process: HostProcess = host.popen(["python3", "-c", CLIENT, address, str(port), self.file])
        wait_until(lambda: self.got() > 100 or self.process.poll() is not None, "the client talks")
        self.alive()

    def got(self) -> int:
        said = self.host.run(["cat", self.file], check=False).stdout
        return int(json.loads(said)["got"]) if said else 0

    def alive(self) -> None:
        """It has not ended, and goes on."""
        before = self.got()
        wait_until(lambda: self.got() > before + 100 or self.process.poll() is not None, f"{self.file} goes on after {before}")
        assert self.process.poll() is None, self.process.communicate(timeout=10)

    def end(self) -> float:
        """Every byte is back; the longest gap in seconds."""
        self.host.write_file(f"{self.file}.stop", "")
        out, err = self.process.communicate(timeout=30)
        assert self.process.returncode == 0, err.decode()
        said = json.loads(out)
        assert said["sent"] == said["got"] > 0
        return float(said["gap_s"])


def watch(host: Host, *addresses: str) -> None:
    """Count on the client's host, in both directions, what ends connections, and the announcements of the addresses."""
    ends, news = [], []
    for address in addresses:
        family = "ip6" if ":" in address else "ip"
        ends += [f"{family} {side} {address} tcp flags & (fin|rst) != 0 counter" for side in ("saddr", "daddr")]
        own = f"ip6 saddr {address} ip6 daddr ff02::1 icmpv6 type 136" if family == "ip6" else f"arp saddr ip {address} arp daddr ip {address}"
        table = "ip6" if family == "ip6" else "arp"
        news.append(f"table {table} news {{ chain in {{ type filter hook input priority 0; {own} counter\n}}\n}}")
    hooks = "\n".join(f"chain {hook} {{ type filter hook {hook} priority -300;\n" + "\n".join(ends) + "\n}" for hook in ("input", "output"))
    host.run(["nft", "-f", "-"], input="table inet ends {\n" + hooks + "\n}\n" + "\n".join(news) + "\n")


def counted(host: Host, table: str) -> list[int]:
    found = json.loads(host.run(["nft", "-j", "list", "ruleset"]).stdout)["nftables"]
    rules = [item["rule"] for item in found if item.get("rule", {}).get("table") == table]
    return [part["counter"]["packets"] for rule in rules for part in rule["expr"] if "counter" in part]


def macvlan(host: Host, dynamic: str) -> None:
    four = ["--subnet", "10.77.0.0/24", "--gateway", "10.77.0.254", "--ip-range", dynamic]
    host.run(["podman", "network", "create", "-d", "macvlan", "-o", "parent=eth0", *four, "--subnet", "fd77::/64", "--ipv6", "lan"])


def shared_bridge(host: Host) -> None:
    """The administrator's bridge with the host's network card in it."""
    script = f"ip link add br0 type bridge && ip link set eth0 master br0 && ip addr flush dev eth0 && ip addr add {host.address}/24 dev br0"
    host.run(["sh", "-c", f"{script} && ip link set br0 up"])
    network = ["--interface-name", "br0", "--subnet", "10.78.0.0/24", "--gateway", "10.78.0.254", "--disable-dns"]
    host.run(["podman", "network", "create", "-o", "mode=unmanaged", *network, "lan"])


def started(host: Host, network: str) -> None:
    run = ["podman", "run", "-d", "--name", "web", "--network", network, host.load_image()]
    host.run([*run, "sh", "-c", "nc -ll -p 7001 -e cat & exec echoserver 7000"])
    wait_until(lambda: ":7001" in host.run(["podman", "exec", "web", "netstat", "-lnt"]).stdout, "it listens")


@pytest.mark.parametrize("lab_options", [{"runtime": "crun", "hosts": THREE}])
def test_a_client_on_a_third_host_stays_connected(lab: Lab, record_property: pytest.RecordProperty) -> None:
    c, addresses = lab.hosts["c"], ("10.77.0.60", V6)
    c.run(["ip", "addr", "add", "fd77::3/64", "dev", "eth0", "nodad"])
    macvlan(lab.a, "10.77.0.192/27")
    macvlan(lab.b, "10.77.0.224/27")
    started(lab.a, f"lan:ip={addresses[0]},ip6={V6}")
    clients = [Client(c, addresses[0], 7000), Client(c, V6, 7001)]
    watch(c, *addresses)

    failed = lab.a.run(["ckpt", "migrate", "web", "root@b"], env={"CKPT_FAULT": "migrate-commit:fail"}, check=False)
    assert failed.returncode == 50, failed
    for client in clients:
        client.alive()
    assert min(counted(c, "news")) > 0, "its host did not call it home"

    told = counted(c, "news")
    moving = lab.a.popen(["ckpt", "migrate", "web", "root@b"], env={"CKPT_FAULT": f"migrate-commit:gate={GATE}"}, stderr=subprocess.STDOUT)
    wait_until(lambda: lab.a.exists(f"{GATE}.reached") or moving.poll() is not None, "it is restored there, held")
    assert moving.poll() is None, moving.communicate(timeout=10)
    assert counted(c, "news") == told, "the destination announced it before it was let run"
    lab.a.write_file(GATE, "")
    said, _ = moving.communicate(timeout=60)
    assert moving.returncode == 0 and b"warning" not in said, said.decode()
    for client in clients:
        client.alive()
    assert all(new > old for new, old in zip(counted(c, "news"), told, strict=True))
    assert sum(counted(c, "ends")) == 0, "somebody closed or reset a connection"
    assert state(lab.a) == ""
    record_property("gaps_s", [client.end() for client in clients])
    assert_clean(lab.a, lab.b)


@pytest.mark.parametrize("lab_options", [{"runtime": "runc", "hosts": THREE}])
def test_on_a_bridge_that_the_hosts_share(lab: Lab, record_property: pytest.RecordProperty) -> None:
    c = lab.hosts["c"]
    c.run(["ip", "addr", "add", "10.78.0.3/24", "dev", "eth0"])
    for host in (lab.a, lab.b):
        shared_bridge(host)
    started(lab.a, "lan:ip=10.78.0.60")
    client = Client(c, "10.78.0.60", 7000)
    watch(c, "10.78.0.60")
    for source, destination, mode in ((lab.a, lab.b, []), (lab.b, lab.a, ["--postcopy"]), (lab.a, lab.b, ["--precopy"])):
        source.run(["ckpt", "migrate", *mode, "web", f"root@{destination.name}"])
        client.alive()
    assert sum(counted(c, "ends")) == 0 and min(counted(c, "news")) > 0
    record_property("gaps_s", [client.end()])
    assert_clean(lab.a, lab.b)
