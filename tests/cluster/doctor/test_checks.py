"""Each check finds its fault in facts that have it, names a mend, and finds none in facts without."""

from __future__ import annotations

import msgspec
import pytest

from shoal.cluster.doctor import collectives, containers, gpus, links, model, network, ports, system, versions
from shoal.cluster.doctor.examination import examine, examine_node
from shoal.cluster.doctor.facts import (
    ClockFacts,
    ClusterFacts,
    CollectiveFacts,
    ContainerFacts,
    GpuFacts,
    GpuLink,
    GpuProcess,
    InterfaceFacts,
    LayoutFacts,
    Limit,
    LinkFacts,
    ModelFile,
    PortReach,
    PortUse,
    TorchFacts,
    WayFacts,
)
from shoal.cluster.doctor.findings import has_failed
from tests.cluster.doctor.sound import GIB, change, gpu, node

NODE = node()


def only(findings, check, status):
    """The one finding of a check, which must be of this status; all that is not well says how it is mended."""
    for finding in findings:
        assert finding.seen and bool(finding.mend) == (finding.status in ("warn", "fail")) or finding.status == "skip"
    found = [finding for finding in findings if finding.check == check]
    assert len(found) == 1 and found[0].status == status, findings
    return found[0]


def test_nothing_is_found_where_nothing_is_wrong():
    facts = ClusterFacts(nodes=[node(1), node(2)])
    findings = examine(facts, has_peers=True)
    assert {finding.status for finding in findings} == {"ok"}, findings
    assert not has_failed(findings)


def test_a_machine_without_torch_ray_and_gpus_is_skipped_not_failed():
    bare = change(NODE, "versions", torch=TorchFacts(), packages={"ray": None}, driver="", driver_cuda="")
    bare = change(bare, "gpus", state="none", gpus=[], links=[])
    findings = examine_node(bare)
    assert {finding.check for finding in findings if finding.status == "skip"} == {"torch", "ray", "gpus"}
    assert {finding.status for finding in findings} == {"ok", "skip"}


# --- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch", "seen", "mend"),
    [
        ({"state": "broken", "reason": "libcudart.so.12: cannot open"}, "libcudart.so.12", "--force-reinstall"),
        ({"cuda": "", "nccl": ""}, "is a CPU build, and there are 2 GPUs", "CUDA build"),
        ({"cuda": "13.0"}, "built for CUDA 13.0, and driver 570.86.15 runs CUDA 12.8 at most", "built for CUDA 12"),
        ({"cuda_usable": False, "cuda_reason": "no CUDA-capable device"}, "no CUDA-capable device", "nvidia-smi"),
    ],
)
def test_torch_does_not_fit_the_machine(torch, seen, mend):
    facts = msgspec.structs.replace(NODE.versions.torch, **torch)
    found = only(versions.check(change(NODE, "versions", torch=facts)), "torch", "fail")
    assert seen in found.seen and mend in found.mend


def test_a_driver_a_little_older_than_torch_is_a_warning():
    found = only(versions.check(change(NODE, "versions", driver_cuda="12.4")), "torch", "warn")
    assert "12.8" in found.seen and "12.4" in found.seen


def test_versions_differ_and_the_one_that_most_have_counts():
    torch = msgspec.structs.replace(NODE.versions.torch, version="2.11.0")
    nodes = [node(1), node(2), change(node(3), "versions", torch=torch)]
    found = only(versions.check_equal(nodes), "same torch", "fail")
    assert "torch 2.11.0 on node3 (10.0.0.3)" in found.seen
    assert found.mend == "pip install 'torch==2.12.0' on node3 (10.0.0.3)"
    nodes = [node(1), change(node(2), "versions", shoal="0.9.0", driver="535.1")]
    findings = versions.check_equal(nodes)
    assert "pip install 'shoal==1.0.0' on node2" in only(findings, "same shoal", "fail").mend
    assert only(findings, "same NVIDIA driver", "warn")
    # What is installed on some alone is no difference: torch is an extra.
    assert not has_failed(versions.check_equal([node(1), change(node(2), "versions", torch=TorchFacts())]))


# --- GPUs ------------------------------------------------------------------------------------------------------------


def test_memory_of_a_gpu_is_in_use():
    held = gpu(1, used=30 * GIB, processes=[GpuProcess(4711, "python3", 29 * GIB)])
    findings = gpus.check(change(NODE, "gpus", gpus=[gpu(0), held]))
    found = only(findings, "gpu memory", "fail")
    assert "GPU 1: 30 GiB of 46 GiB are in use by pid 4711 (python3, 29 GiB)" in found.seen
    assert "`kill 4711`" in found.mend and "--gpu-memory-utilization 0.34" in found.mend
    # What is left is enough for what is wanted.
    findings = gpus.check(change(NODE, "gpus", gpus=[gpu(0), held]), utilization=0.3)
    assert only(findings, "gpu memory", "warn")
    # A process outside of the container cannot be ended from here.
    outside = gpu(0, used=40 * GIB, processes=[GpuProcess(4711, "", 40 * GIB)])
    found = only(gpus.check(change(NODE, "gpus", gpus=[outside])), "gpu memory", "fail")
    assert "outside of this container" in found.seen and "kill 4711" not in found.mend
    own = gpu(0, used=40 * GIB, processes=[GpuProcess(4711, "python3", 40 * GIB, is_shoal=True)])
    assert "a model of Shoal's own" in only(gpus.check(change(NODE, "gpus", gpus=[own])), "gpu memory", "warn").seen
    hidden = change(NODE, "gpus", gpus=[gpu(0), held], visible=["0"])
    assert only(gpus.check(hidden), "gpu memory", "ok")


def test_gpus_that_cannot_be_used():
    broken = msgspec.structs.replace(NODE, gpus=GpuFacts(state="broken", reason="Driver/library version mismatch"))
    assert "mismatch" in only(gpus.check(broken), "gpus", "fail").seen
    in_container = msgspec.structs.replace(broken, container=ContainerFacts(kind="docker"))
    assert "--gpus all" in only(gpus.check(in_container), "gpus", "fail").mend
    found = only(gpus.check(change(NODE, "gpus", visible=["7"])), "gpus", "fail")
    assert "CUDA_VISIBLE_DEVICES=0,1" in found.mend
    assert only(gpus.check(change(NODE, "gpus", gpus=[gpu(0), gpu(1, name="NVIDIA A10")])), "gpus", "warn")


def test_links_between_gpus():
    found = only(gpus.check(NODE), "gpu links", "ok")
    assert "one PCIe switch (PIX): all pairs" in found.seen
    mixed = [GpuLink(0, 1, "NV18"), GpuLink(0, 2, "SYS"), GpuLink(1, 2, "SYS")]
    facts = change(NODE, "gpus", gpus=[gpu(0), gpu(1), gpu(2)], links=mixed)
    found = only(gpus.check(facts), "gpu links", "warn")
    assert "NVLink (NV18): 0–1" in found.seen and "0–2, 1–2" in found.seen
    switched_off = change(NODE, "network", variables={"NCCL_P2P_DISABLE": "1"})
    assert "NCCL_P2P_DISABLE=1" in only(gpus.check(switched_off), "gpu links", "warn").seen


# --- system ----------------------------------------------------------------------------------------------------------


def test_shared_memory():
    small = change(NODE, "system", shm_bytes=64 << 20, shm_free_bytes=64 << 20)
    found = only(system.check(small), "shared memory", "fail")
    assert "/dev/shm has 64 MiB" in found.seen and "1 GiB for NCCL" in found.seen and "remount,size=" in found.mend
    docker = msgspec.structs.replace(small, container=ContainerFacts(kind="docker"))
    assert "--ipc=host" in only(system.check(docker), "shared memory", "fail").mend
    pod = msgspec.structs.replace(small, container=ContainerFacts(kind="kubernetes"))
    assert "emptyDir" in only(system.check(pod), "shared memory", "fail").mend
    # A node that runs has taken its part already.
    runs = msgspec.structs.replace(
        change(small, "gpus", gpus=[gpu(0)]), ports=[PortUse("object manager", 6382, "tcp", "ours")]
    )
    assert only(system.check(runs), "shared memory", "warn")


@pytest.mark.parametrize(
    ("limits", "rdma", "status", "word"),
    [
        ({"nofile": Limit(256, 1 << 20)}, [], "fail", "ulimit -n 65536"),
        ({"nofile": Limit(1024, 1 << 20)}, [], "warn", "ulimit -n 65536"),
        ({"nofile": Limit(1024, 4096)}, [], "warn", "limits.conf"),
        ({"nproc": Limit(1024, 1024)}, [], "warn", "ulimit -u"),
        ({"memlock": Limit(64 << 10, 64 << 10)}, ["mlx5_0"], "fail", "ulimit -l unlimited"),
        ({"memlock": Limit(64 << 10, 64 << 10)}, [], "ok", ""),
        ({"nofile": Limit(-1, -1)}, [], "ok", ""),
    ],
)
def test_limits(limits, rdma, status, word):
    facts = change(change(NODE, "system", limits=limits), "network", rdma_devices=rdma)
    assert word in only(system.check(facts), "limits", status).mend


def test_a_host_name_that_leads_to_the_loopback():
    facts = change(NODE, "system", host_addresses=["127.0.1.1"])
    found = only(system.check(facts, has_peers=True), "host name", "warn")
    assert "node1 resolves to 127.0.1.1" in found.seen and "`10.0.0.1 node1` in place of 127.0.1.1" in found.mend
    unknown = change(NODE, "system", host_addresses=[], resolve_error="Name or service not known")
    assert "10.0.0.1 node1" in only(system.check(unknown), "host name", "warn").mend


@pytest.mark.parametrize(
    ("offset", "trip", "status"),
    [(60, 0.001, "fail"), (-60, 0.001, "fail"), (2, 0.001, "warn"), (0.4, 0.001, "ok"), (-1.2, 1.0, "ok")],
)
def test_clocks(offset, trip, status):
    found = only(system.check_clocks([ClockFacts("node2", offset, trip)], "node1"), "clock", status)
    assert ("ahead of" if offset > 0 else "behind") in found.seen and found.node == "node2"


# --- network ---------------------------------------------------------------------------------------------------------

_ETH1 = InterfaceFacts("eth1", ["192.168.7.1"], 1500, 1000, "physical")
_TWO = [*NODE.network.interfaces, _ETH1]


def ways(first, second):
    return [WayFacts("10.0.0.1", "eth0", first), WayFacts("192.168.7.1", "eth1", second)]


def test_the_address_that_is_named_leads_nowhere():
    changes = {"interfaces": _TWO, "address": "192.168.7.1", "interface": "eth1", "head": "10.0.0.9:6379"}
    for named, mend in (
        ("NCCL_SOCKET_IFNAME=eth1", "export NCCL_SOCKET_IFNAME=eth0"),
        ("SHOAL_HOST_IP=192.168.7.1", "export SHOAL_HOST_IP=10.0.0.1"),
    ):
        facts = change(NODE, "network", **changes, named=named, why=f"named by {named}", ways=ways("open", "dropped"))
        found = only(network.check(facts, has_peers=True), "route", "fail")
        assert found.mend == mend and "eth1 (192.168.7.1)" in found.seen
    # A refusal comes back too.
    facts = change(NODE, "network", **changes, ways=ways("dropped", "refused"))
    assert only(network.check(facts), "route", "ok")
    facts = change(NODE, "network", **changes, ways=ways("dropped", "dropped"))
    assert "does a firewall" in only(network.check(facts), "route", "fail").mend
    facts = change(NODE, "network", **changes, ways=ways("unreachable", "unreachable"))
    assert "ip route" in only(network.check(facts), "route", "fail").mend


def test_no_address_can_be_told():
    facts = change(NODE, "network", address="", interface="", error="several networks", interfaces=_TWO)
    found = only(network.check(facts, has_peers=True), "address", "fail")
    assert found.mend.startswith("export SHOAL_HOST_IP=10.0.0.1")  # the fastest
    assert only(network.check(facts), "address", "warn")
    alone = change(NODE, "network", address="127.0.0.1", interface="lo", interfaces=NODE.network.interfaces[:1])
    assert only(network.check(alone, has_peers=True), "address", "fail")
    assert only(network.check(alone), "address", "ok")


def test_variables_and_speed():
    facts = change(NODE, "network", variables={"NCCL_SOCKET_IFNAME": "ib0"})
    assert "names no interface" in only(network.check(facts), "variables", "fail").seen
    facts = change(
        NODE, "network", variables={"NCCL_SOCKET_IFNAME": "eth0", "GLOO_SOCKET_IFNAME": "eth1"}, interfaces=_TWO
    )
    assert "differ" in only(network.check(facts), "variables", "warn").seen
    wrong = {"NCCL_SOCKET_IFNAME": "eth9", "GLOO_SOCKET_IFNAME": "lo"}
    facts = change(NODE, "network", variables=wrong, address="127.0.0.1", interface="lo")
    found = [finding for finding in network.check(facts) if finding.check == "variables"]
    assert [finding.mend for finding in found] == ["export NCCL_SOCKET_IFNAME=eth0, or unset it"]
    for fine in ("^docker,lo", "=eth0", "eth"):
        facts = change(NODE, "network", variables={"NCCL_SOCKET_IFNAME": fine})
        assert {finding.status for finding in network.check(facts)} == {"ok"}
    slow = [InterfaceFacts("eth0", ["10.0.0.1"], 1500, 100, "physical")]
    assert "100 Mbit/s" in only(network.check(change(NODE, "network", interfaces=slow)), "speed", "warn").seen


def test_rdma():
    facts = change(NODE, "network", rdma_devices=["mlx5_0"])
    assert "RDMA over mlx5_0" in only(network.check(facts), "transport", "ok").seen
    facts = change(facts, "network", variables={"NCCL_IB_DISABLE": "1"})
    assert "NCCL_IB_DISABLE=1" in only(network.check(facts), "transport", "warn").seen


def test_mtus_differ():
    jumbo = [InterfaceFacts("eth0", ["10.0.0.2"], 9000, 25000, "physical")]
    found = only(network.check_mtus([node(1), change(node(2), "network", interfaces=jumbo)]), "same MTU", "fail")
    assert "`sudo ip link set eth0 mtu 1500` on node2 (10.0.0.2)" in found.mend


# --- ports -----------------------------------------------------------------------------------------------------------


def test_ports_that_are_taken():
    uses = [
        PortUse("daemon", 6380, "tcp", "ours"),
        PortUse("node manager", 6381, "tcp", "taken", "redis-server (pid 99)"),
        PortUse("workers", 10100, "tcp", "taken", "nginx (pid 7)"),
    ]
    taken, worker = ports.check(msgspec.structs.replace(NODE, ports=uses))
    assert taken.status == "fail" and "6381/tcp (node manager) is taken by redis-server (pid 99)" in taken.seen
    assert "`kill 99`" in taken.mend and worker.status == "warn"


def reach(state, *names, is_held=True):
    numbers = {"head": 6379, "daemon": 6380, "workers": 10002}
    return [PortReach("node2", "node1", name, numbers[name], "tcp", state, is_held) for name in names]


def test_ports_that_cannot_be_reached():
    addresses = {"node2": "10.0.0.2", "node1": "10.0.0.1"}
    found = only(
        ports.check_reach(reach("open", "head") + reach("dropped", "daemon", "workers"), addresses),
        "open ports",
        "fail",
    )
    assert "drops what comes to 6380/tcp (daemon), 10002-10999/tcp (workers)" in found.seen
    assert "iptables -I INPUT -s 10.0.0.2 -p tcp -m multiport --dports 6380,10002:10999 -j ACCEPT" in found.mend
    found = only(ports.check_reach(reach("dropped", "head", "daemon"), addresses), "open ports", "fail")
    assert "down or cut off" in found.seen
    found = only(ports.check_reach(reach("refused", "daemon"), addresses), "open ports", "fail")
    assert "shoal node start" in found.mend
    assert only(ports.check_reach(reach("refused", "workers", is_held=False), addresses), "open ports", "ok")
    assert "no route" in only(ports.check_reach(reach("unreachable", "head"), addresses), "open ports", "fail").seen


# --- links -----------------------------------------------------------------------------------------------------------

_LINK = LinkFacts(
    source="10.0.0.1",
    target="10.0.0.2",
    round_trip_seconds=0.0002,
    bandwidth_bytes_per_s=1.1e9,
    num_sent=400,
    num_arrived=400,
    num_answered=400,
    mtu=1500,
    largest_packet=1500,
)


@pytest.mark.parametrize(
    ("changes", "check", "status", "seen"),
    [
        ({}, "link", "ok", "8.8 Gbit/s"),
        ({"round_trip_seconds": 0.2}, "delay", "fail", "200 ms"),
        ({"round_trip_seconds": 0.01}, "delay", "warn", "10 ms"),
        ({"num_arrived": 380}, "loss", "fail", "5.0% of packets are lost (20 of 400)"),
        ({"num_arrived": 394}, "loss", "warn", "1.5%"),
        ({"num_arrived": 0, "largest_packet": 0}, "loss", "warn", "UDP does not arrive"),
        ({"mtu": 9000}, "MTU", "fail", "of 1500 they do"),
        ({"mtu": 9000, "largest_packet": 0}, "MTU", "fail", "no packet"),
        ({"bandwidth_bytes_per_s": 1e7}, "bandwidth", "warn", "80 Mbit/s"),
        ({"error": "10.0.0.2:4711 does not answer: a firewall"}, "link", "fail", "firewall"),
    ],
)
def test_links(changes, check, status, seen):
    findings = links.check([msgspec.structs.replace(_LINK, **changes)], {"10.0.0.1": "a", "10.0.0.2": "b"})
    found = only(findings, check, status)
    assert seen in found.seen and found.node == "a → b" and len(findings) == 1


def test_what_mends_a_link_that_could_not_be_measured():
    for error, mend in (
        ("10.0.0.2:4711 does not answer: a firewall drops", "sudo ufw allow from 10.0.0.1"),
        ("10.0.0.2:4711 takes connections, but most of what is sent is lost on the way", "ethtool -S"),
        ("a stream to 10.0.0.2 stalls: large ones are lost on the way (MTU)", "mtu 1400"),
    ):
        link = msgspec.structs.replace(_LINK, largest_packet=1400, mtu=1400, error=error)
        assert mend in only(links.check([link], {}), "link", "fail").mend


def test_a_link_slower_than_the_others():
    slow = msgspec.structs.replace(_LINK, target="10.0.0.3", bandwidth_bytes_per_s=2e8)
    findings = links.check([_LINK, msgspec.structs.replace(_LINK, source="10.0.0.4"), slow], {})
    assert [finding.status for finding in findings] == ["ok", "ok", "warn"]
    assert "where most ways have 8.8 Gbit/s" in findings[2].seen


# --- collectives -----------------------------------------------------------------------------------------------------


def test_all_reduces():
    names = ["node1", "node2"]
    worked = CollectiveFacts("gloo", "ok", names, "", 2, 4 << 20, 0.01)
    assert "4 MiB summed in 10 ms" in only(collectives.check([worked]), "all-reduce over Gloo", "ok").seen
    failed = CollectiveFacts("gloo", "failed", names, "rank 1 did not come within 12 s", 2)
    assert "rank 1 did not come" in only(collectives.check([failed]), "all-reduce over Gloo", "fail").seen
    skipped = CollectiveFacts("nccl", "skipped", names, "no GPUs")
    assert only(collectives.check([skipped]), "all-reduce over NCCL", "skip")
    rdma = CollectiveFacts("nccl", "ok", names, "", 4, 4 << 20, 0.001, "RDMA")
    tcp = CollectiveFacts("nccl", "ok", names, "", 4, 4 << 20, 0.004, "TCP")
    findings = collectives.check([rdma, tcp])
    assert "4.0 times as fast" in [finding for finding in findings if finding.check == "RDMA or TCP"][0].seen
    broken = msgspec.structs.replace(rdma, state="failed", reason="ibv_create_qp failed")
    assert "NCCL_IB_DISABLE=1" in only(collectives.check([broken, tcp]), "RDMA or TCP", "warn").mend


# --- containers ------------------------------------------------------------------------------------------------------


def test_containers():
    assert only(containers.check(NODE), "container", "ok")
    bridged = msgspec.structs.replace(NODE, container=ContainerFacts(kind="docker", is_bridged=True))
    assert "--network host" in only(containers.check(bridged, is_reached=False), "host network", "fail").mend
    assert only(containers.check(bridged), "host network", "warn")
    assert only(containers.check(bridged, is_reached=True), "container", "ok")
    limited = msgspec.structs.replace(NODE, container=ContainerFacts(kind="kubernetes", cpu_limit=4.0))
    assert "OMP_NUM_THREADS=4" in only(containers.check(limited), "cpu limit", "warn").mend
    assert only(containers.check(limited, num_threads=4), "container", "ok")
    hidden = msgspec.structs.replace(NODE, container=ContainerFacts(kind="docker", host_rdma_devices=["mlx5_0"]))
    assert "--device /dev/infiniband" in only(containers.check(hidden), "devices", "warn").mend


# --- model -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "check", "seen"),
    [
        ({"path": "", "error": "/models/m does not exist"}, "model path", "does not exist"),
        ({"missing": ["model-00002-of-00003.safetensors"]}, "shards", "named in the index of /models/m, and missing"),
        (
            {"files": [ModelFile("model.safetensors", 900, 1000)]},
            "shards",
            "cut short: 900 bytes, and by its header 1000",
        ),
        ({"files": [ModelFile("model.safetensors", 9, problem="git-lfs")]}, "shards", "git-lfs"),
        ({"strays": ["w (a.safetensors)"]}, "shards", "do not belong together"),
        ({"files": [], "weights": []}, "shards", "has no weights"),
    ],
)
def test_a_model_that_is_not_whole(changes, check, seen):
    facts = change(NODE, "model", **changes)
    assert seen in only(model.check(facts), check, "fail").seen


_TOKENIZER = ModelFile("tokenizer.json", 10)


@pytest.mark.parametrize(
    ("files", "seen"),
    [
        ([_TOKENIZER], "there is no config.json"),
        ([_TOKENIZER, ModelFile("config.json", 3, problem="is not JSON")], "config.json is not JSON"),
    ],
)
def test_a_model_without_a_config(files, seen):
    facts = change(NODE, "model", files=[ModelFile("model.safetensors", 1000, 1000), *files])
    assert seen in only(model.check(facts), "model path", "fail").seen
    assert seen in only(model.check_memory([facts], LayoutFacts("unknown", "why")), "memory", "skip").seen


def test_a_model_without_a_tokenizer():
    files = [file for file in NODE.model.files if file != _TOKENIZER]
    assert "has no tokenizer" in only(model.check(change(NODE, "model", files=files)), "tokenizer", "warn").seen
    assert {finding.status for finding in model.check(NODE)} == {"ok"}


def with_sums(number, **sums):
    files = [ModelFile(name, 10, sha256=digest) for name, digest in sums.items()]
    return change(node(number), "model", files=files)


def test_files_differ_between_machines():
    nodes = [with_sums(1, a="x" * 64, b="y" * 64), with_sums(2, a="x" * 64, b="y" * 64), with_sums(3, a="z" * 64)]
    first, second = model.check_equal(nodes)
    assert first.status == second.status == "fail"
    assert "a is not the same everywhere, node3 (10.0.0.3) differs from the rest" in first.seen
    assert "missing on node3" in second.seen and "copy b to node3 (10.0.0.3) from node1" in second.mend
    tie = model.check_equal([nodes[0], nodes[2]])
    assert "one of them is wrong" in tie[0].seen
    assert only(model.check_equal(nodes[:2]), "same files", "ok")


def test_memory_for_the_model():
    large = change(NODE, "model", weight_bytes=200 * GIB)
    found = only(model.check_memory([large], None), "memory", "fail")
    assert "200 GiB of weights; 2 GPUs have 92 GiB" in found.seen
    assert only(model.check_memory([large, node(2), node(3), node(4)], None), "memory", "ok")
    assert only(model.check_memory([change(NODE, "model", weight_bytes=85 * GIB)], None), "memory", "warn")
    cpu = change(change(large, "gpus", gpus=[]), "system", memory_bytes=32 * GIB)
    assert "32 GiB of memory" in only(model.check_memory([cpu], None), "memory", "fail").seen
    limited = msgspec.structs.replace(
        change(cpu, "system", memory_bytes=512 * GIB), container=ContainerFacts(memory_limit_bytes=16 * GIB)
    )
    assert "16 GiB" in only(model.check_memory([limited], None), "memory", "fail").seen
    assert model.check_memory([change(NODE, "model", weight_bytes=0)], None) == []
    # A plan knows better.
    fits, none = LayoutFacts("fits", "TP 4 × PP 2"), LayoutFacts("none", "nothing fits; 2 × H100 would")
    assert only(model.check_memory([large], fits), "memory", "ok").seen == "TP 4 × PP 2"
    assert "2 × H100 would" in only(model.check_memory([NODE], none), "memory", "fail").seen
    found = only(model.check_memory([NODE], LayoutFacts("unknown", "the architecture is not known")), "memory", "ok")
    assert "the architecture is not known" in found.seen


def test_a_node_that_does_not_answer():
    facts = ClusterFacts(nodes=[NODE], silent={"10.0.0.2": "the daemon at 10.0.0.2:6380 is of Shoal 0.9 (wire 2)"})
    found = only(examine(facts, has_peers=True), "answers", "fail")
    assert found.node == "10.0.0.2" and "pip install 'shoal==" in found.mend
