"""Predictions against what was measured. Sources: benchmarks/gpu_results.md (Shoal on H100 80GB HBM3, 2026-11-26;
lat70b of earlier code) and, on H200s (4.3 TB/s), the limits that the same rows have there: weight bytes read once."""

from __future__ import annotations

import dataclasses

import pytest

from shoal.benchmark.presets import PRESETS
from shoal.cluster.plan.cost import CostModel
from shoal.cluster.plan.devices import parse_machine
from shoal.cluster.plan.families import read_shape
from shoal.cluster.plan.links import Link, Links, links_of, node_link_of
from shoal.cluster.plan.memory import Load
from shoal.cluster.plan.placement import Layout, partition, place
from tests.cluster.plan.models import path_of


def model_of(path: str, machine: str, concurrency: int = 1, links: Links | None = None) -> CostModel:
    shape, _ = read_shape(path)
    load = Load(
        max_model_len=8192,
        concurrency=concurrency,
        dtype=shape.config.dtype,
        kv_dtype=shape.config.dtype,
        utilization=0.9,
        num_seqs=256,
        num_batched_tokens=8192,
    )
    parsed = parse_machine(machine)
    return CostModel(shape, parsed.device, links or links_of(parsed, "10gbe"), load)


def layout_of(path: str, machine: str, tensor_size: int = 1, pipeline_size: int = 1, data_size: int = 1) -> Layout:
    shape, _ = read_shape(path)
    layout = Layout(
        tensor_size=tensor_size,
        pipeline_size=pipeline_size,
        data_size=data_size,
        crossings=(False,) * (pipeline_size - 1),
    )
    placed = place(parse_machine(machine), layout)
    assert placed is not None
    return dataclasses.replace(placed, partition=partition(shape, pipeline_size))


@pytest.fixture
def preset(tmp_path):
    def written(name: str) -> str:
        PRESETS[name].shape.write(tmp_path)
        return str(tmp_path)

    return written


# ms/token of `shoal bench latency`, its prompt counted in.
MEASURED_ON_H100 = {"lat8b": 5.53, "small1": 0.83, "lat8b-tp2": 3.18, "lat70b": 14.19}


@pytest.mark.parametrize("name", MEASURED_ON_H100)
def test_decode_latency_is_within_a_quarter_of_what_was_measured(name, preset):
    path, workload = preset(name), PRESETS[name].workload
    layout = layout_of(path, "8xH100-80", PRESETS[name].tensor_parallel_size)
    prompt, output = workload.prompt_tokens[0], workload.output_tokens[0]
    seconds = model_of(path, "8xH100-80").request_seconds(layout, prompt, output)
    assert 1e3 * seconds / output == pytest.approx(MEASURED_ON_H100[name], rel=0.25)


# What the bytes of the weights take on H200s, and what the same row is predicted there: no less than that.
LIMITS_ON_H200 = {"small1": 0.28, "lat8b": 3.5, "lat8b-tp2": 1.75, "lat70b": 8.2}


@pytest.mark.parametrize("name", LIMITS_ON_H200)
def test_limits_on_h200s_are_those_of_the_bytes(name, preset):
    path = preset(name)
    layout = layout_of(path, "4xH200", PRESETS[name].tensor_parallel_size)
    predicted = model_of(path, "4xH200").predict(layout, capacity=1, context=256)
    assert 1e3 * predicted.decode_limit == pytest.approx(LIMITS_ON_H200[name], rel=0.05)
    assert predicted.decode_alone > predicted.decode_limit


@pytest.mark.parametrize("name", ["lat8b", "lat70b"])
def test_large_models_on_h200s_are_within_a_quarter_of_their_limit(name, preset):
    path = preset(name)
    layout = layout_of(path, "4xH200", PRESETS[name].tensor_parallel_size)
    predicted = model_of(path, "4xH200").predict(layout, capacity=1, context=256)
    assert 1e3 * predicted.decode_alone == pytest.approx(LIMITS_ON_H200[name], rel=0.25)


def test_the_limit_of_a_gptq_model_is_that_of_its_bytes():
    path = path_of("Qwen2.5-32B-Instruct-GPTQ-Int4")
    predicted = model_of(path, "4xH200").predict(layout_of(path, "4xH200"), capacity=1)
    assert 1e3 * predicted.decode_limit == pytest.approx(4.4, rel=0.1)
    assert predicted.decode_alone > predicted.decode_limit


def test_a_full_batch_takes_what_was_measured(preset):
    """batch8b at step 200 on an H100: 186 requests of about 760 tokens, 14.0 ms; nano: 190, 8.37 ms, 7.2 of them in
    attention, which reads 2.67 TB/s."""
    path = preset("batch8b")
    predicted = model_of(path, "8xH100-80", concurrency=186).predict(layout_of(path, "8xH100-80"), 186, context=760)
    assert 1e3 * predicted.decode_loaded == pytest.approx(14.0, rel=0.1)
    assert predicted.running == 186 and predicted.output_rate == pytest.approx(186 / predicted.decode_loaded)


@pytest.mark.parametrize(("name", "tensor_size", "rate"), [("prefill8b", 1, 40810), ("prefill8b", 2, 66800)])
def test_prefill_is_as_quick_as_measured(name, tensor_size, rate, preset):
    path = preset(name)
    model = model_of(path, "8xH100-80", concurrency=32)
    predicted = model.predict(layout_of(path, "8xH100-80", tensor_size), 32)
    assert predicted.prefill_rate == pytest.approx(rate, rel=0.1)


@pytest.mark.parametrize(("tensor_size", "milliseconds"), [(1, 9.6), (2, 7.1)])
def test_first_tokens_come_as_measured(tensor_size, milliseconds, preset):
    path = preset("lat8b")
    layout = layout_of(path, "8xH100-80", tensor_size)
    seconds = model_of(path, "8xH100-80").request_seconds(layout, 128, 1)
    assert 1e3 * seconds == pytest.approx(milliseconds, rel=0.15)


def test_slow_links_cost_tensor_parallelism_more_than_stages():
    path, machine = path_of("Llama-3.1-8B"), "2x1xL20-46GiB"
    model = model_of(path, machine, 16)
    tensor, stages = layout_of(path, machine, 2, 1), layout_of(path, machine, 1, 2)
    assert tensor.tensor_nodes == 2 and stages.crossings == (True,)
    by_tensor, by_stages = model.predict(tensor, 16), model.predict(stages, 16)
    assert by_tensor.decode_loaded > by_stages.decode_loaded
    assert by_tensor.prefill_rate < by_stages.prefill_rate / 2


def test_a_quicker_link_is_never_slower():
    path, machine = path_of("Llama-3.1-8B"), "2x1xL20-46GiB"
    layout = layout_of(path, machine, 2, 1)
    inside = links_of(parse_machine(machine), "10gbe").inside
    times = []
    for name in ("1gbe", "10gbe", "25gbe", "100gbe", "100g-rdma", "400g-rdma"):
        links = Links(inside=inside, between=node_link_of(name, is_cpu=False))
        times.append(model_of(path, machine, 32, links).predict(layout, 32).decode_loaded)
    assert times == sorted(times, reverse=True)


def test_few_tokens_touch_few_experts():
    """Of 128 experts a token reads 8: alone a fraction of the model's bytes, a large batch all of them."""
    path = path_of("Qwen3-30B-A3B")
    shape, _ = read_shape(path)
    alone = model_of(path, "4xH200").predict(layout_of(path, "4xH200"), 1, context=1)
    active = 2 * (shape.num_active_parameters - shape.config.vocab_size * shape.config.hidden_size)
    assert alone.decode_limit == pytest.approx(active / (4.8e12 * 0.9), rel=0.02)
    many = model_of(path, "4xH200", 256).predict(layout_of(path, "4xH200"), 256, context=1)
    assert many.decode_loaded > 2 * shape.num_parameters / (4.8e12 * 0.9)


def test_a_pipeline_that_is_full_is_as_quick_as_its_slowest_stage():
    path, machine = path_of("Llama-3.1-8B"), "8xH100-80"
    alone = model_of(path, machine, 1).predict(layout_of(path, machine, 1, 4), 1)
    full = model_of(path, machine, 64).predict(layout_of(path, machine, 1, 4), 64)
    single = model_of(path, machine, 64).predict(layout_of(path, machine), 64)
    # Alone a token passes all stages; full, four batches are in flight, and the rate is above one device's.
    assert alone.decode_alone > single.decode_alone
    assert full.output_rate > 1.8 * single.output_rate


def test_sums_take_what_was_measured():
    """benchmarks/gpu_results.md: joined with the norm 2.7 µs at 8 KiB on two H100s; 0.64 ms for two sums of 8192 tokens
    of 4096."""
    inside: Link = links_of(parse_machine("2xH100-80"), None).inside
    assert 1e6 * inside.all_reduce(8192, 2) == pytest.approx(2.7, rel=0.25)
    assert 1e3 * inside.all_reduce(8192 * 8192, 2) == pytest.approx(0.32, rel=0.1)
    assert inside.all_reduce(8192, 1) == 0
