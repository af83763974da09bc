from __future__ import annotations

import json
from pathlib import Path

import pytest

from shoal.cli.plan_options import PlanOptions
from shoal.cluster.plan.devices import Machine, parse_machine
from shoal.cluster.plan.gpus import GPUS, variants
from shoal.cluster.plan.here import device_of, machine_of
from shoal.cluster.plan.links import FILE_NAME, NODE_LINKS, links_of, node_link_of, read_measured
from shoal.errors import ConfigError
from shoal.executor.ray_head import Node

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "nodes", "per_node", "name", "gib"),
    [
        ("2x4xL20-46GiB", 2, 4, "L20", 44.7),
        ("2×4×L20-48", 2, 4, "L20", 44.7),
        ("8xH100-80", 1, 8, "H100", 79.2),
        ("8xH100", 1, 8, "H100", 79.2),
        ("4xH200", 1, 4, "H200", 139.6),
        ("A100-40", 1, 1, "A100", 39.8),
        ("2xA100-80GB", 1, 2, "A100", 79.5),
        ("1xRTX-4090", 1, 1, "RTX4090", 23.8),
        ("2x8xh100-sxm5-80gb", 2, 8, "H100", 79.2),
        ("4xNVIDIA GeForce RTX 3090", 1, 4, "RTX3090", 23.9),
        ("1xH100-20GiB", 1, 1, "H100", 20.0),  # a slice
        ("1x24GB", 1, 1, "GPU of 24 GB", 22.4),
        ("3xcpu-16c-32GB", 3, 1, "cpu", 29.8),
        ("cpu-8c-64GiB", 1, 1, "cpu", 64.0),
    ],
)
def test_machines_as_people_write_them(text, nodes, per_node, name, gib):
    machine = parse_machine(text)
    assert (machine.num_nodes, machine.per_node, machine.device.name) == (nodes, per_node, name)
    assert machine.device.memory_bytes / GIB == pytest.approx(gib, abs=0.06)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is no machine; such forms are: 2x4xL20-46GiB"),
        ("8", "is no machine"),
        ("1x0GB", "without memory"),
        ("H100-0", "without memory"),
        ("0xH100", "is no machine"),
        ("2x2x2xH100", "is no machine"),
        ("2x2xcpu-16c-32GB", "is no machine"),
        ("4xFoo-48GB", "'Foo' is not known.*Known: B200, H200.*Foo-48GiB@864GB/s,119TFLOPS"),
        ("4xL21-48GB", "did you mean L20"),
        ("1xH100-200", "H100 has 80 GB, not 200"),
        ("1xL20@fast", "after @ come GB/s and TFLOPS"),
        ("1xFoo-48GiB@864GB/s", "'Foo' is not known"),
    ],
)
def test_what_is_no_machine_is_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        parse_machine(text)


def test_unknown_gpus_need_numbers_and_known_ones_take_them():
    device = parse_machine("4xFoo-48GiB@864GB/s,119TFLOPS").device
    assert (device.memory_bytes, device.bandwidth, device.bf16_rate) == (48 * GIB, 864e9, 119e12)
    assert not device.notes
    assert parse_machine("1xL20@700GB/s").device.bandwidth == 700e9
    cpu = parse_machine("2xcpu-64c-512GB@300GB/s,4TFLOPS").device
    assert (cpu.bandwidth, cpu.bf16_rate, cpu.cores, cpu.notes) == (300e9, 4e12, 64, ())


def test_what_is_assumed_is_said():
    assert "that of L4 is assumed" in parse_machine("1x24GB").device.notes[0]
    assert "44.7 GiB of the 46 GiB" in parse_machine("2x4xL20-46GiB").device.notes[0]
    assert "A100-80 says otherwise" in parse_machine("8xA100").device.notes[0]
    assert "are assumed" in parse_machine("cpu-16c-32GB").device.notes[0]
    assert not parse_machine("MI300X").device.served


def test_every_known_gpu_is_found_by_its_own_name_and_memory():
    for gpu in GPUS:
        assert gpu in variants(gpu.name)
        assert parse_machine(f"{gpu.name}-{gpu.nominal_gb}").device.memory_bytes == gpu.memory_bytes


def test_cards_as_drivers_name_them():
    assert device_of("NVIDIA H100 80GB HBM3", 81559 << 20).name == "H100"
    assert device_of("NVIDIA A100-SXM4-40GB", 40960 << 20).memory_bytes == parse_machine("A100-40").device.memory_bytes
    assert device_of("Tesla V100-SXM2-32GB", 32768 << 20).name == "V100"
    assert device_of("NVIDIA L20", 46068 << 20).name == "L20"
    strange = device_of("NVIDIA Z9", 50 << 30)
    assert strange.memory_bytes == 50 << 30 and "its speed is not known" in strange.notes[0]


def node(address: str, alive: bool = True, **resources: float) -> Node:
    named = {name.replace("__", ":"): value for name, value in resources.items()}
    return Node(node_id=address, address=address, hostname=address, alive=alive, is_head=False, resources=named)


def test_a_cluster_is_a_machine():
    nodes = [
        node("10.0.0.1", CPU=32, GPU=4, accelerator_type__L20=1),
        node("10.0.0.2", CPU=32, GPU=4, accelerator_type__L20=1),
    ]
    machine = machine_of(nodes, "10.0.0.1:6379")
    assert (machine.num_nodes, machine.per_node, machine.device.name) == (2, 4, "L20")
    assert machine.names == ("10.0.0.1", "10.0.0.2")
    uneven = machine_of([*nodes, node("10.0.0.3", GPU=2, accelerator_type__H100=1), node("10.0.0.4", CPU=4)], "head")
    assert (uneven.num_nodes, uneven.per_node, uneven.device.name) == (3, 2, "L20")
    assert any("nodes differ" in note for note in uneven.device.notes)
    assert any("without a GPU" in note for note in uneven.device.notes)
    cpus = machine_of([node("a", CPU=16, memory=20 * GIB, object_store_memory=8 * GIB)], "head")
    assert cpus.device.is_cpu and cpus.device.cores == 16 and cpus.device.memory_bytes == 28 * GIB
    with pytest.raises(ConfigError, match="no node that is alive"):
        machine_of([], "head")
    with pytest.raises(ConfigError, match=r"\(Z9\) are not known here; say what they are by --gpus"):
        machine_of([node("a", GPU=1, accelerator_type__Z9=1)], "head")


def pairs_file(directory: Path, *pairs: tuple[str, str, float, float]) -> Path:
    path = directory / FILE_NAME
    keys = ("from", "to", "bandwidth_bytes_per_s", "round_trip_s")
    path.write_text(json.dumps({"pairs": [dict(zip(keys, pair, strict=True)) for pair in pairs]}))
    return path


def two_nodes(*names: str) -> Machine:
    machine = parse_machine("2x4xL20-46GiB")
    return Machine(num_nodes=2, per_node=4, device=machine.device, text="", names=names)


def test_measured_links_count_before_the_table_and_after_what_is_said(tmp_path):
    assumed = links_of(two_nodes(), None, tmp_path)
    assert assumed.between.name == "10gbe" and "is assumed" in assumed.notes[0]
    pairs_file(tmp_path, ("a", "b", 1.1e9, 2e-4), ("b", "a", 0.9e9, 3e-4), ("a", "c", 1e6, 1.0), ("a", "a", 1.0, 9.0))
    measured = links_of(two_nodes("a", "b"), None, tmp_path)
    assert measured.between.is_measured and measured.between.bandwidth == 0.9e9
    assert measured.between.latency == pytest.approx(1.5e-4)
    assert "as shoal doctor measured" in measured.notes[0]
    assert links_of(two_nodes(), None, tmp_path).between.bandwidth == 1e6  # nobody is named: the slowest of all
    assert links_of(two_nodes("x", "y"), None, tmp_path).between.name == "10gbe"
    assert links_of(two_nodes("a", "b"), "25gbe", tmp_path).between.name == "25gbe"


@pytest.mark.parametrize("content", ["{", "[]", '{"pairs": [{"from": "a"}]}', '{"pairs": [1]}'])
def test_a_broken_file_of_links_is_refused(content, tmp_path):
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(ConfigError, match="is not as shoal doctor writes it.*or give --node-link"):
        read_measured(tmp_path / FILE_NAME, (), is_cpu=False)
    pairs_file(tmp_path, ("a", "b", 0.0, 0.1))
    with pytest.raises(ConfigError, match="bandwidth must be above 0"):
        read_measured(tmp_path / FILE_NAME, (), is_cpu=False)


def test_every_link_that_is_offered_is_known():
    help_text = PlanOptions.__dataclass_fields__["node_link"].metadata["help"]
    for name in NODE_LINKS:
        assert name in help_text
        assert node_link_of(name.upper(), is_cpu=False).name == name
    with pytest.raises(ConfigError, match="'token-ring' is not known; known: 1gbe"):
        node_link_of("token-ring", is_cpu=False)
