from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config.engine_config import EngineConfig
from shoal.config.parallel import balance, virtual_shards
from shoal.config.resolve import make_engine_config, resolve
from shoal.config.sources import options_from_kwargs
from shoal.errors import ConfigError
from tests.config.model_directory import write_model_directory


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(write_model_directory(tmp_path / "model", num_hidden_layers=6))


def make(model: str, **kwargs) -> EngineConfig:
    return make_engine_config(**{"model": model, "device": "cpu", **kwargs})


def test_one_rank_needs_nothing(model):
    parallel = make(model).parallel
    assert (parallel.world_size, parallel.backend, parallel.output_rank) == (1, "uni", 0)
    assert make(model, tensor_parallel_size=1, pipeline_parallel_size=1, data_parallel_size=1).parallel == parallel


def test_a_config_survives_the_way_to_the_core(model):
    config = make(model, tensor_parallel_size=2, pipeline_parallel_size=2, pipeline_layer_partition="4,2")
    assert EngineConfig.from_json(config.to_json()) == config
    assert config.parallel.layer_partition == (4, 2)
    assert (config.parallel.world_size, config.parallel.output_rank) == (4, 2)


@pytest.mark.parametrize("partition", ["4,2", [4, 2], (4, 2)])
def test_layers_of_stages_as_text_and_as_numbers(model, partition):
    config = make(model, pipeline_parallel_size=2, pipeline_layer_partition=partition)
    assert config.parallel.layer_partition == (4, 2)


def test_several_ranks_are_subprocesses_where_nothing_else_is_said(model, monkeypatch):
    assert make(model, tensor_parallel_size=2).parallel.backend == "mp"
    assert make(model, tensor_parallel_size=2, distributed_executor_backend="ray").parallel.backend == "ray"


def test_replicas_run_here_while_there_are_gpus_for_them(model, monkeypatch):
    def backend(**options):
        return make(model, device="cuda", dtype="float32", **options).parallel.backend

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert backend(data_parallel_size=2) == "uni"
    assert backend(data_parallel_size=3) == "ray"
    assert backend(data_parallel_size=2, tensor_parallel_size=2) == "ray"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert backend() == "uni", "which then says that it finds no GPU"
    assert make(model, device="cpu", data_parallel_size=500).parallel.backend == "uni"


def test_what_does_not_fit_goes_to_the_cluster_that_this_machine_belongs_to(model, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    options = options_from_kwargs({"model": model, "device": "cpu", "pipeline_parallel_size": 4})
    assert resolve(*options).parallel.backend == "mp"
    assert resolve(*options, is_node=True).parallel.backend == "ray"
    options = options_from_kwargs({"model": model, "device": "cpu", "pipeline_parallel_size": 2})
    assert resolve(*options, is_node=True).parallel.backend == "mp"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tensor_parallel_size": 3}, r"tensor_parallel_size 3 does not fit .*these work: 1, 2"),
        ({"pipeline_parallel_size": 7}, "more than the model's 6 layers; 1 to 6 work"),
        ({"pipeline_parallel_size": 2, "pipeline_layer_partition": "4,3"}, r"4,3 must give .* 3,3 works"),
        ({"pipeline_parallel_size": 2, "pipeline_layer_partition": "4;2"}, "numbers of layers such as"),
        ({"pipeline_parallel_size": 2, "pipeline_layer_partition": [4, 2.0]}, r"such as 10,11,11; got \[4, 2.0\]"),
        ({"pipeline_parallel_size": 2, "pipeline_layer_partition": []}, "numbers of layers such as"),
        ({"pipeline_parallel_size": 2, "pipeline_layer_partition": 6}, r"a string or a list; got 6 \(int\)"),
        ({"tensor_parallel_size": 2, "distributed_executor_backend": "uni"}, "uni runs one rank"),
        ({"node_rank": 1}, "needs nnodes"),
        ({"nnodes": 2, "tensor_parallel_size": 2}, "master_addr"),
        ({"nnodes": 2, "master_addr": "10.0.0.1", "node_rank": 2, "tensor_parallel_size": 2}, "0 to 1"),
        ({"nnodes": 2, "master_addr": "10.0.0.1", "pipeline_parallel_size": 3}, "evenly over 2 nodes"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(model, options, message):
    with pytest.raises(ConfigError, match=message):
        make(model, **options)


def test_customary_variables_are_our_deadlines(model, monkeypatch):
    monkeypatch.setenv("NCCL_TIMEOUT", "77")
    monkeypatch.setenv("TORCH_DISTRIBUTED_INIT_TIMEOUT", "33")
    parallel = make(model).parallel
    assert (parallel.step_timeout, parallel.startup_timeout) == (77.0, 33.0)
    assert make(model, step_timeout=5).parallel.step_timeout == 5.0
    monkeypatch.setenv("NCCL_TIMEOUT", "soon")
    with pytest.raises(ConfigError, match="NCCL_TIMEOUT must be a number of seconds"):
        make(model)


def test_virtual_shards():
    assert [virtual_shards(size) for size in (896, 4864, 12, 6, 7)] == [8, 8, 4, 2, 1]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), st.data())
def test_balance_is_the_best_cut(costs, data):
    """Against all cuts, by brute force."""
    num_stages = data.draw(st.integers(1, len(costs)))
    first, last = data.draw(st.floats(0, 5)), data.draw(st.floats(0, 20))

    def slowest(lengths: tuple[int, ...]) -> float:
        sums, start = [], 0
        for length in lengths:
            sums.append(sum(costs[start : start + length]))
            start += length
        sums[0] += first
        sums[-1] += last
        return max(sums)

    def cuts(left: int, stages: int):
        if stages == 1:
            yield (left,)
            return
        for length in range(1, left - stages + 2):
            for rest in cuts(left - length, stages - 1):
                yield (length, *rest)

    found = balance(costs, num_stages, first=first, last=last)
    assert sum(found) == len(costs) and len(found) == num_stages and min(found) >= 1
    assert slowest(found) == pytest.approx(min(slowest(cut) for cut in cuts(len(costs), num_stages)))


def test_a_large_head_takes_layers_off_the_last_stage():
    assert balance([1.0] * 32, 2, last=4.0) == (18, 14)
