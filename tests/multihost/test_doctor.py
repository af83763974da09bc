"""`shoal doctor` on hosts with faults, each made for real: it names the fault and the mend, within a minute."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time

import pytest

from shoal.config.model_path import embedded_model_path
from tests.cluster.doctor.model_files import flip_byte, write_model
from tests.multihost.doctor_hosts import doctor, start_node
from tests.multihost.ray_hosts import ray_cluster
from tests.namespaces import connected_hosts, needs_namespaces

pytestmark = needs_namespaces

needs_nft = pytest.mark.skipif(shutil.which("nft") is None, reason="nft is missing (Debian: apt-get install nftables)")
# What is left of a doctor's work: machines, ports, and links in full; without torch, which takes seconds to load.
_WITHOUT_TORCH = ("--skip", "torch,collectives")


@pytest.fixture(scope="module")
def pair():
    """Two hosts; the first is the head of a cluster, the second is none of its nodes yet."""
    with connected_hosts(2) as network:
        start_node(network.hosts[0], network.hosts[0])
        yield network


@pytest.fixture
def firewall(pair):
    """Sets the rules for what comes to the head; they are gone after the test."""
    head = pair.hosts[0]

    def set_rules(*rules: str) -> None:
        commands = ["add table inet shoal", "add chain inet shoal in { type filter hook input priority 0; }"]
        commands += [f"add rule inet shoal in {rule}" for rule in rules]
        head.run("nft", "; ".join(commands))

    yield set_rules
    head.run("nft", "delete table inet shoal")


def address_of(network):
    return f"{network.hosts[0].address}:6379"


def test_two_machines_without_a_fault(pair):
    report = doctor(pair.hosts[1], "--address", address_of(pair), *_WITHOUT_TORCH)
    assert report.code == 0, report.described()
    assert {finding["status"] for finding in report.findings} <= {"ok", "warn", "skip"}
    # On a machine that is busy a link may be slow, which is a warning.
    assert len({finding["node"] for finding in report.findings if finding["group"] == "links"}) == 2
    assert all(link["bandwidth_bytes_per_s"] > 0 and not link["error"] for link in report.facts["links"])
    assert next(report.of("open ports"))["status"] == "ok"
    # `shoal plan` predicts with what was measured.
    links = (pair.hosts[1].home / ".cache" / "shoal" / "links.json").read_text()
    assert pair.hosts[0].address in links and '"bandwidth_bytes_per_s"' in links


def test_a_name_that_resolves_to_the_loopback(pair):
    report = doctor(pair.hosts[1], "--quick", "--address", address_of(pair))
    found = list(report.of("host name", "warn"))
    assert len(found) == 2, report.described()
    assert "node2 resolves to 127.0.1.1" in found[0]["seen"]
    assert f"put `{pair.hosts[1].address} node2` in place of 127.0.1.1" in found[0]["mend"]
    # A head by such a name is not this machine.
    report = doctor(pair.hosts[1], "--quick", "--address", "node2:6379")
    assert report.code == 1
    assert "node2 resolves to 127.0.1.1" in report.failed("answers")["seen"]


@needs_nft
def test_only_the_heads_port_is_open(pair, firewall):
    firewall("iif lo accept", "ct state established,related accept", "tcp dport 6379 accept", "drop")
    start = time.monotonic()
    report = doctor(pair.hosts[1], "--quick", "--address", address_of(pair))
    assert time.monotonic() - start < 20
    assert report.code == 1
    seen, mend = (report.failed("open ports")[key] for key in ("seen", "mend"))
    for port in (
        "6380/tcp (daemon)",
        "6381/tcp (node manager)",
        "6382/tcp (object manager)",
        "10002-10999/tcp (workers)",
    ):
        assert port in seen
    assert "a firewall drops" in seen and seen.endswith("6379/tcp (head) is open")
    assert "--dports 6380,6381,6382,10002:10999 -j ACCEPT" in mend and f"-s {pair.hosts[1].address}" in mend


@needs_nft
def test_a_port_is_dropped_or_refused_by_a_rule(pair, firewall):
    firewall("tcp dport 6381 drop", "tcp dport 6382 reject with tcp reset", "udp dport 6380 drop")
    report = doctor(pair.hosts[1], "--quick", "--address", address_of(pair))
    dropped, refused = report.of("open ports", "fail")
    assert dropped["seen"].startswith(
        "a firewall drops what comes to 6380/udp (beats), 6381/tcp (node manager): no answer"
    )
    assert "-p tcp -m multiport --dports 6381 -j ACCEPT" in dropped["mend"] and "-p udp" in dropped["mend"]
    assert refused["seen"].startswith("6382/tcp (object manager) refused")
    assert dropped["node"].startswith("node2") and "→ node1" in dropped["node"]


def test_another_token_is_refused(pair):
    report = doctor(
        pair.hosts[1], "--quick", "--address", address_of(pair), SHOAL_CLUSTER_TOKEN="another-token-than-theirs"
    )
    found = report.failed("answers")
    assert "does not take the cluster token" in found["seen"] and "copy ~/.shoal/cluster-token" in found["mend"]
    assert not list(report.of("open ports", "fail"))  # its ports are open all the same


@pytest.mark.slow
@needs_nft
def test_one_of_three_is_out_of_reach():
    """The head answers and names the third machine, whose daemon's port is shut to the second."""
    with connected_hosts(3) as network:
        head, second, third = network.hosts
        start_node(head, head)
        start_node(third, head)
        rules = "add table inet t; add chain inet t in { type filter hook input priority 0; }"
        third.run("nft", f"{rules}; add rule inet t in ip saddr {second.address} tcp dport 6380 drop")
        report = doctor(second, "--quick", "--address", address_of(network))
    assert report.failed("answers")["node"] == third.address
    found = report.failed("open ports")
    assert third.address in found["node"] and "drops what comes to 6380/tcp (daemon): no answer" in found["seen"]
    # The way between the second and the head is looked at all the same.
    assert {link["target"] for link in report.facts["links"]} == {head.address, second.address}


def test_a_port_is_taken(pair):
    code = "import socket, time; s = socket.create_server(('', 6381)); print('up', flush=True); time.sleep(600)"
    holder = pair.hosts[1].popen(sys.executable, "-c", code, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "up\n"
    try:
        report = doctor(pair.hosts[1], "--quick", "--address", address_of(pair))
    finally:
        holder.kill()
        holder.wait()
    found = report.failed("free ports")
    assert report.code == 1
    assert "port 6381/tcp (node manager) is taken by python" in found["seen"] and f"(pid {holder.pid})" in found["seen"]
    assert f"`kill {holder.pid}`" in found["mend"]


def test_of_two_interfaces_one_routes():
    with connected_hosts(2) as network:
        head, other = network.hosts
        start_node(head, head)
        network.add_dead_interface(other, "eth1", "192.168.77.2")
        report = doctor(other, "--quick", "--address", address_of(network), GLOO_SOCKET_IFNAME="eth1")
        found = report.failed("route")
        assert report.code == 1 and found["mend"] == "export GLOO_SOCKET_IFNAME=eth0"
        assert "does not answer on eth1 (192.168.77.2)" in found["seen"] and "GLOO_SOCKET_IFNAME=eth1" in found["seen"]
        assert f"does on eth0 ({other.address})" in found["seen"]
        # Without a variable it finds the one that routes.
        report = doctor(other, "--quick", "--address", address_of(network))
        assert report.code == 0, report.described()
        # Alone it cannot know which one is meant, and says so.
        report = doctor(other, "--quick")
        assert "several networks and no default route" in next(report.of("address", "warn"))["seen"]


def test_a_shard_is_missing_on_one_node_and_a_byte_is_flipped_in_another(pair):
    head, other = pair.hosts
    for host in pair.hosts:  # each under its own home, at the same path for users
        write_model(host.home / "model")
    arguments = ("~/model", "--address", address_of(pair), "--skip", "torch,links,collectives")
    report = doctor(other, *arguments)
    assert report.code == 0, report.described()
    assert "equal SHA-256 sums of 6 files on 2 nodes" in next(report.of("same files"))["seen"]

    flip_byte(head.home / "model" / "model-00002-of-00003.safetensors")
    report = doctor(other, *arguments)
    assert report.code == 1
    found = report.failed("same files")
    assert "model-00002-of-00003.safetensors is not the same everywhere" in found["seen"] and "SHA-256" in found["seen"]
    assert "shoal verify" in found["mend"] and "copy model-00002-of-00003.safetensors" in found["mend"]

    (head.home / "model" / "model-00003-of-00003.safetensors").unlink()
    report = doctor(other, *arguments, "--quick")
    found = report.failed("shards")
    assert found["node"].startswith("node1") and "model-00003-of-00003.safetensors: named in the index" in found["seen"]
    assert "rsync" in found["mend"]

    shutil.rmtree(head.home / "model")
    report = doctor(other, *arguments, "--quick")
    assert report.failed("model path")["node"].startswith("node1")


def test_shared_memory_is_too_small(pair):
    small = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=32m tmpfs /dev/shm && exec "$@"', "sh")
    report = doctor(pair.hosts[1], "--quick", "--address", address_of(pair), prefix=small)
    found = report.failed("shared memory")
    assert "/dev/shm has 32 MiB" in found["seen"] and "128 MiB for Ray's object store" in found["seen"]
    assert "--shm-size" in found["mend"] or "remount" in found["mend"]


def test_versions_and_clocks_differ(tmp_path):
    torch = tmp_path / "torch"
    torch.mkdir()
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text("__version__ = '2.11.0+cpu'\ncuda = None\n")
    (tmp_path / "torch-2.11.0.dist-info").mkdir()
    (tmp_path / "torch-2.11.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0\n"
    )
    with connected_hosts(2) as network:
        head, other = network.hosts
        start_node(head, head, clock=60, version="0.0.9", PYTHONPATH=str(tmp_path))
        report = doctor(other, "--quick", "--address", address_of(network))
    assert report.code == 1
    found = report.failed("same torch")
    assert f"torch 2.11.0+cpu on node1 ({head.address})" in found["seen"] and "pip install 'torch==" in found["mend"]
    found = report.failed("same shoal")
    assert f"shoal 0.0.9 on node1 ({head.address})" in found["seen"] and "pip install 'shoal==" in found["mend"]
    found = report.failed("clock")
    assert found["node"].startswith("node1") and "60 s ahead of" in found["seen"]
    assert "timedatectl set-ntp true" in found["mend"]


def test_a_long_way():
    with connected_hosts(2) as network:
        network.impair(network.hosts[1], seconds=0.1)
        start_node(network.hosts[0], network.hosts[0])
        report = doctor(network.hosts[1], "--quick", "--address", address_of(network))
    assert report.code == 1
    for found in report.of("delay"):
        assert (
            found["status"] == "fail"
            and re.search(r"a round trip takes [2-9]\d\d ms", found["seen"])
            and "switch" in found["mend"]
        )
    assert {"delay"} == {finding["check"] for finding in report.findings if finding["status"] == "fail"}


@pytest.mark.parametrize("loss", [0.05, pytest.param(0.2, marks=pytest.mark.slow)])
def test_packets_are_lost(loss):
    """That is what it says, and not that a firewall drops them, a token is refused or an MTU too large."""
    with connected_hosts(2) as network:
        network.impair(network.hosts[1], loss=loss)
        start_node(network.hosts[0], network.hosts[0])
        report = doctor(network.hosts[1], "--address", address_of(network), *_WITHOUT_TORCH)
    found = list(report.of("loss"))
    assert len(found) == 2 and report.code == 1, report.described()
    for finding in found:
        assert 0.4 * loss < float(finding["seen"].partition("%")[0]) / 100 < 2 * loss + 0.1
        assert "ethtool -S" in finding["mend"]
    assert {finding["check"] for finding in report.findings if finding["status"] == "fail"} == {"loss"}, (
        report.described()
    )


def test_large_packets_are_lost_on_the_way():
    """Both send 9000 bytes, and a switch between them takes 1500 and tells nobody: connections open, and stall."""
    with connected_hosts(2) as network:
        for host in network.hosts:
            network.set_mtu(host, 9000)
        network.impair(network.hosts[1], largest=1500)
        start_node(network.hosts[0], network.hosts[0])
        report = doctor(network.hosts[1], "--address", address_of(network), *_WITHOUT_TORCH)
    found = list(report.of("MTU", "fail"))
    assert len(found) == 2 and report.code == 1, report.described()
    for finding in found:
        assert "packets of 9000 bytes" in finding["seen"] and "of 1500 they do" in finding["seen"]
        assert "mtu 1500" in finding["mend"]


def test_machines_have_different_mtus():
    with connected_hosts(2) as network:
        network.set_mtu(network.hosts[0], 9000)
        start_node(network.hosts[0], network.hosts[0])
        report = doctor(network.hosts[1], "--quick", "--address", address_of(network))
    found = report.failed("same MTU")
    assert f"MTU 9000 on node1 ({network.hosts[0].address}) eth0" in found["seen"]
    assert f"`sudo ip link set eth0 mtu 1500` on node1 ({network.hosts[0].address})" in found["mend"]


@pytest.mark.slow
def test_an_all_reduce_over_bad_links_ends_with_the_reason():
    with connected_hosts(2) as network:
        for host in network.hosts:
            network.set_mtu(host, 9000)
        network.impair(network.hosts[1], largest=1500)
        start_node(network.hosts[0], network.hosts[0])
        report = doctor(network.hosts[1], "--address", address_of(network))
    assert "no answer within 12 s" in report.failed("all-reduce over Gloo")["seen"]
    assert report.failed("MTU")


@pytest.mark.slow
@pytest.mark.parametrize("fault", [{}, {"seconds": 0.1}, {"loss": 0.05}])
def test_all_that_the_doctor_does(fault):
    """Also what needs torch, within a minute."""
    with connected_hosts(2) as network:
        if fault:
            network.impair(network.hosts[1], **fault)
        start_node(network.hosts[0], network.hosts[0])
        report = doctor(network.hosts[1], "--address", address_of(network))
        assert next(report.of("all-reduce over Gloo"))["status"] == "ok", report.described()
        assert report.code == bool(fault)
        for host in network.hosts[1:]:
            host.wait_until_empty(5)


@pytest.mark.slow
def test_a_cluster_that_commands_brought_up(tmp_path):
    """Real nodes, with Ray: seen from one of them, and refused by a server there where a shard is missing."""
    with ray_cluster(2, tmp_path, num_cpus=1) as two:
        other = two.hosts[1]
        token = (other.home / ".shoal" / "cluster-token").read_text().strip()
        report = doctor(other, "--cluster", SHOAL_CLUSTER_TOKEN=token)
        assert report.code == 0, report.described()
        held = [finding["seen"] for finding in report.of("free ports", "ok")]
        assert len(held) == 2 and all("this machine's own node holds" in seen for seen in held), held
        assert next(report.of("all-reduce over Gloo"))["status"] == "ok"
        assert next(report.of("open ports"))["status"] == "ok"

        directory = write_model(tmp_path / "model")
        (directory / "model-00002-of-00003.safetensors").unlink()
        (directory / "config.json").write_text((embedded_model_path() / "config.json").read_text())
        server = two.serve("-tp", "2", "--skip-tokenizer-init", "--model", str(directory))
        assert server.exit_code(60) == 1
        assert "shards: model-00002-of-00003.safetensors: named in the index" in server.output
        assert "mend: copy it again" in server.output
