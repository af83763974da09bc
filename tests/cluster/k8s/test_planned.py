"""Manifests whose layout and requests come from a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal.cli.main import main
from shoal.cluster.k8s.planned import plan_pods
from shoal.errors import ConfigError
from tests.cluster.k8s.schemas import check

CONFIGS = Path(__file__).parents[1] / "plan" / "configs"
GIB = 1 << 30


def plan(model: str, machine: str) -> Any:
    return plan_pods(str(CONFIGS / model), machine, max_model_len=4096, shm_size="2Gi")


def test_a_model_over_two_machines() -> None:
    found = plan("Llama-3.1-405B", "2x8xH100-80")
    assert (found.gpus_per_pod, found.pods_per_replica) == (8, 2)
    assert found.tensor_size * found.pipeline_size * found.data_size == 16
    # A process a GPU, the server, /dev/shm.
    assert found.memory == f"{4 + 8 * 6 + 2}Gi" and found.cpus == "18" and found.kv_cache_memory is None
    assert f"TP {found.tensor_size} × PP {found.pipeline_size}" in found.why


def test_machines_without_gpus() -> None:
    found = plan("Llama-3.1-8B", "cpu-16c-64GB")
    assert (found.gpus_per_pod, found.pods_per_replica, found.cpus) == (0, 1, "16")
    memory = int(found.memory.removesuffix("Gi"))
    weights = 16.06e9
    assert weights + found.kv_cache_memory + 4 * GIB < memory * GIB <= 64e9 + 2 * GIB  # reserve, and /dev/shm


@pytest.mark.parametrize(
    ("model", "machine", "message"),
    [
        ("Llama-3.1-405B", "4xL20-46GiB", "fits 4 × .*L20.* in no layout"),
        ("Llama-3.1-8B", "2x8xH100-80", "1 of the 2 machines of 2x8xH100-80 would do .* --replicas"),
        ("Llama-3.1-8B", "two boxes", "--gpus 'two boxes': the GPU 'two boxes' is not known"),
    ],
)
def test_what_cannot_be_is_refused(model: str, machine: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(model, machine)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["k8s", "render", "/models/llama", "--image", "i", "--claim", "c", "--gpus", "2x8xH100-80"]
    assert main(command) == 2
    assert "--config-from DIRECTORY says where it is here" in capsys.readouterr().err
    command += ["--config-from", str(CONFIGS / "Llama-3.1-405B")]
    assert main([*command, "-tp", "8"]) == 2
    assert "--tensor-parallel-size and --gpus both say" in capsys.readouterr().err
    assert main(command) == 2
    assert "a Deployment's pods are independent" in capsys.readouterr().err
    assert main([*command, "--form", "lws", "--memory", "64Gi"]) == 0
    manifests = list(yaml.safe_load_all(capsys.readouterr().out))
    for manifest in manifests:
        check(manifest)
    (group,) = [each for each in manifests if each["kind"] == "LeaderWorkerSet"]
    template = group["spec"]["leaderWorkerTemplate"]
    (container,) = template["leaderTemplate"]["spec"]["containers"]
    assert template["size"] == 2 and "--nnodes=2" in container["args"]
    assert container["resources"]["requests"] == {"cpu": "18", "memory": "64Gi", "nvidia.com/gpu": 8}


def test_the_embedded_model_on_cpus(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["k8s", "render", "shoal-tiny", "--image", "i", "--gpus", "cpu-2c-8GB"]) == 0
    out = capsys.readouterr().out
    assert "--kv-cache-memory=" in out and "--device=cpu" in out
