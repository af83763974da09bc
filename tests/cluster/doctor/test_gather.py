"""What is read from files and from what programs print."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import sys

import pytest

from shoal.cluster.doctor.facts import GpuLink
from shoal.cluster.doctor.gather import gather_node
from shoal.cluster.doctor.gather.gpus import parse_gpus, parse_links
from shoal.cluster.doctor.gather.model import gather_model
from shoal.cluster.doctor.gather.network import gather_network
from shoal.cluster.doctor.gather.ports import gather_ports
from shoal.cluster.doctor.gather.system import resolve
from shoal.cluster.doctor.gather.versions import probe_torch
from shoal.cluster.ports import NodePorts
from shoal.errors import StartupError
from shoal.network import listen
from tests.cluster.doctor.model_files import write_model


def test_gpus_as_nvidia_smi_lists_them():
    name = "NVIDIA H100 80GB HBM3"
    listed = f"0, GPU-1a, {name}, 81559, 4, 570.86.15\n1, GPU-2b, {name}, 81559, 40000, 570.86.15\n"
    held = "GPU-2b, 1, /usr/bin/python3, 39000\nGPU-2b, 4194304, [Not Found], [N/A]\n"
    gpus, driver = parse_gpus(listed, held)
    assert driver == "570.86.15" and [gpu.name for gpu in gpus] == [name] * 2
    assert gpus[0].total_bytes == 81559 << 20 and gpus[0].processes == []
    assert [(each.pid, each.name, each.used_bytes) for each in gpus[1].processes] == [
        (1, "python3", 39000 << 20),
        (4194304, "", 0),
    ]


def test_links_as_nvidia_smi_draws_them():
    text = (
        "\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
        "GPU0\t X \tNV18\tSYS\tPIX\t0-51\t0\t\tN/A\n"
        "GPU1\tNV18\t X \tSYS\tNODE\t0-51\t0\t\tN/A\n"
        "GPU2\tSYS\tSYS\t X \tSYS\t52-103\t1\t\tN/A\n"
        "NIC0\tPIX\tNODE\tSYS\t X \t\t\t\t\n\nLegend:\n\n  X    = Self\n"
    )
    assert parse_links(text) == [GpuLink(0, 1, "NV18"), GpuLink(0, 2, "SYS"), GpuLink(1, 2, "SYS")]


def test_a_whole_model(tmp_path):
    facts = gather_model(str(write_model(tmp_path / "model")))
    assert (facts.missing, facts.strays, facts.error) == ([], [], "")
    assert len(facts.weights) == 3 and facts.weight_bytes > 3 * 8192
    assert {file.size - file.expected_bytes for file in facts.files if file.name in facts.weights} == {0}


@pytest.mark.parametrize(("content", "problem"), [(b"{", "is not JSON"), (b"[]", "no JSON object"), (b"{}", "")])
def test_a_config(tmp_path, content, problem):
    directory = write_model(tmp_path / "model")
    (directory / "config.json").write_bytes(content)
    (found,) = [file.problem for file in gather_model(str(directory)).files if file.name == "config.json"]
    assert problem in found and bool(problem) == bool(found)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no header"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\xff" * 64, "header would be too long"),
        ((40).to_bytes(8, "little") + b"{}", "cut short within its header"),
        ((2).to_bytes(8, "little") + b"no", "header is damaged"),
        ((2).to_bytes(8, "little") + b"[]", "header is damaged"),
    ],
)
def test_a_file_that_is_none_of_weights(tmp_path, content, problem):
    directory = write_model(tmp_path / "model")
    (directory / "model-00002-of-00003.safetensors").write_bytes(content)
    found = {file.name: file.problem for file in gather_model(str(directory)).files}
    assert problem in found["model-00002-of-00003.safetensors"]
    assert not found["model-00001-of-00003.safetensors"]


def test_a_model_that_is_not_whole(tmp_path):
    directory = write_model(tmp_path / "model")
    cut, gone = (directory / f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    cut.write_bytes(cut.read_bytes()[:-100])
    gone.unlink()
    facts = gather_model(str(directory))
    assert facts.missing == [gone.name]
    assert [file.name for file in facts.files if 0 <= file.size < file.expected_bytes] == [cut.name]
    # Shards of two downloads, mixed.
    cut.write_bytes((directory / "model-00003-of-00003.safetensors").read_bytes())
    assert gather_model(str(directory)).strays[0].startswith("model.layers.1.")
    (directory / "model.safetensors.index.json").unlink()
    assert gather_model(str(directory)).missing == ["model.safetensors.index.json"]
    assert "does not exist" in gather_model(str(tmp_path / "other")).error


def listen_on_two():
    """The head's port and the daemon's of some cluster, below those that connections out are given."""
    for number in random.Random().sample(range(20000, 30000), 50):
        numbers = NodePorts(head=number)
        with contextlib.ExitStack() as stack, contextlib.suppress(StartupError):
            for port in (numbers.head, numbers.daemon):
                stack.enter_context(contextlib.closing(listen("127.0.0.1", port)))
            return numbers, stack.pop_all()
    raise AssertionError("no two ports are free")


def test_who_holds_a_port():
    numbers, held = listen_on_two()
    with held:
        uses = {(use.name, use.protocol): use for use in gather_ports(numbers, is_head=True)}
        assert "head" not in {use.name for use in gather_ports(numbers, is_head=False)}
    assert uses["daemon", "tcp"].state == uses["head", "tcp"].state == "taken"
    assert f"(pid {os.getpid()})" in uses["daemon", "tcp"].holder
    assert uses["beats", "udp"].state == "free"


def test_torch_that_is_missing_broken_or_hangs(tmp_path):
    program = tmp_path / "python"

    def probe(script, timeout=20.0):
        program.write_text(f"#!{sys.executable}\n{script}\n")
        program.chmod(0o755)
        return probe_torch(str(program), timeout)

    missing = probe("import sys; sys.exit(\"ModuleNotFoundError: No module named 'torch'\")")
    assert missing.state == "missing"
    broken = probe("import sys; sys.exit('OSError: libcudart.so.12: cannot open shared object file')")
    assert broken.state == "broken" and "libcudart.so.12" in broken.reason
    assert probe("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").state == "broken"
    hanging = probe("import time; time.sleep(60)", timeout=0.5)
    assert hanging.state == "broken" and "did not end within 0.5 s" in hanging.reason


def test_this_machine_without_torch():
    facts = gather_node(load_torch=False)
    assert facts.hostname == socket.gethostname() and facts.versions.python == sys.version.split()[0]
    assert facts.system.memory_bytes > 1 << 28 and "nofile" in facts.system.limits
    assert any(each.kind == "loopback" for each in facts.network.interfaces)
    assert facts.model is None and {use.protocol for use in facts.ports} == {"tcp", "udp"}


def test_names(monkeypatch):
    assert "127.0.0.1" in resolve("localhost")[0]
    addresses, trouble = resolve("no-such-name.invalid")
    assert addresses == [] and trouble


def test_an_address_that_is_none_of_this_machine(monkeypatch):
    monkeypatch.setenv("SHOAL_HOST_IP", "192.0.2.77")
    facts = gather_network(None)
    assert facts.address == "" and "SHOAL_HOST_IP" in facts.error
    monkeypatch.setenv("SHOAL_HOST_IP", "127.0.0.1")
    facts = gather_network(None)
    assert (facts.address, facts.named, facts.interface) == ("127.0.0.1", "SHOAL_HOST_IP=127.0.0.1", "lo")
