"""Layouts, capacity, the choice and refusals, on the published configs."""

from __future__ import annotations

import dataclasses
import shlex

import pytest

from shoal.cli.client_options import NodeStartOptions
from shoal.cli.plan_options import PlanOptions
from shoal.cluster.plan.as_json import plan_dict
from shoal.cluster.plan.choice import Family, family_of
from shoal.cluster.plan.devices import parse_machine
from shoal.cluster.plan.memory import token_cache_bytes
from shoal.cluster.plan.placement import Layout, Rejection, layouts, partition, place
from shoal.cluster.plan.planner import Wish, make_plan
from shoal.cluster.plan.report import refusal_text
from shoal.cluster.plan.smallest import capacity
from shoal.config.model_config import load_model_config
from shoal.config.options import CacheOptions, RouterOptions
from shoal.config.parallel import ParallelConfig, balance_layers, check_degrees
from shoal.config.sources import SERVE_SECTIONS, options_from_arguments
from shoal.errors import ConfigError, ModelError
from tests.cluster.plan.models import MACHINES, MODELS, path_of, plan_of, write_config

# (TP, PP, DP, family) where a model fits; else the refusal's smallest machine.
CHOICES = {
    ("Llama-3.1-8B", "8xH100-80"): (1, 1, 8, Family.REPLICAS),
    ("Llama-3.1-8B", "2x4xL20-46GiB"): (1, 1, 8, Family.REPLICAS),
    ("Llama-3.1-8B", "4xH200"): (1, 1, 4, Family.REPLICAS),
    ("Llama-3.1-8B", "1x24GB"): (1, 1, 1, Family.REPLICAS),
    ("Llama-3.1-8B", "3xcpu-16c-32GB"): (1, 1, 3, Family.REPLICAS),
    ("Llama-3.1-70B", "8xH100-80"): (8, 1, 1, Family.TENSOR_IN_NODE),
    ("Llama-3.1-70B", "2x4xL20-46GiB"): (4, 1, 2, Family.TENSOR_IN_NODE),
    ("Llama-3.1-70B", "4xH200"): (4, 1, 1, Family.TENSOR_IN_NODE),
    ("Llama-3.1-405B", "2x8xH100-80"): (8, 2, 1, Family.STAGES_OVER_NODES),
    ("Qwen2.5-32B-Instruct", "2x4xL20-46GiB"): (4, 1, 2, Family.TENSOR_IN_NODE),
    ("Qwen2.5-32B-Instruct", "3xcpu-16c-32GB"): (1, 3, 1, Family.STAGES_OVER_NODES),
    ("Qwen2.5-32B-Instruct-GPTQ-Int4", "8xH100-80"): (1, 1, 8, Family.REPLICAS),
    ("Qwen3-30B-A3B", "3xcpu-16c-32GB"): (1, 3, 1, Family.STAGES_OVER_NODES),
    ("DeepSeek-V3", "2x8xH100-80"): (8, 2, 1, Family.STAGES_OVER_NODES),
}
REFUSALS = {
    ("Llama-3.1-405B", "8xH100-80"): "2 nodes of 8 × H100",
    ("Llama-3.1-405B", "4xH200"): "8 × H200",
    ("Llama-3.1-405B", "3xcpu-16c-32GB"): "30 nodes of 16 cores",
    ("Llama-3.1-70B", "1x24GB"): "2 nodes of 8 × GPU of 24 GB",
    ("Llama-3.1-70B", "3xcpu-16c-32GB"): "6 nodes of 16 cores",
    ("DeepSeek-V3", "8xH100-80"): "8 × H200",
    ("DeepSeek-V3", "4xH200"): "8 × H200",
    ("DeepSeek-V3", "1x24GB"): "8 × H200",
    ("Qwen2.5-32B-Instruct-GPTQ-Int4", "1x24GB"): "4 × GPU of 24 GB",
}


@pytest.mark.parametrize(("model", "machine"), CHOICES)
def test_choices_follow_the_rules(model, machine):
    plan = plan_of(model, machine)
    assert plan.choice is not None
    layout = plan.choice.candidate.layout
    found = (layout.tensor_size, layout.pipeline_size, layout.data_size, family_of(plan.choice.candidate))
    assert found == CHOICES[model, machine]
    assert plan.choice.reason.endswith(".") and plan.choice.reason.count(". ") == 0


@pytest.mark.parametrize(("model", "machine"), REFUSALS)
def test_refusals_name_the_smallest_machine_that_would_do(model, machine):
    plan = plan_of(model, machine)
    assert plan.choice is None and not plan.candidates and plan.commands() == []
    text = refusal_text(plan)
    assert "nothing fits: the weights are" in text and REFUSALS[model, machine] in text
    for larger, held in plan.refusal.machines:
        assert held == capacity(plan.shape, larger, plan.load) >= 1
        # One node less, or half the devices of one, does not do.
        less = dataclasses.replace(larger, num_nodes=larger.num_nodes - 1)
        if larger.num_nodes == 1:
            less = dataclasses.replace(larger, per_node=larger.per_node // 2)
        wanted = 1 if larger.device.is_cpu else plan.load.concurrency
        assert less.num_devices == 0 or capacity(plan.shape, less, plan.load) < wanted


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("machine", MACHINES)
def test_every_plan_adds_up(model, machine):
    plan = plan_of(model, machine)
    report = plan_dict(plan)
    assert report["weights"]["total_bytes"] == sum(report["weights"]["components"].values())
    assert (report["choice"] is None) == (report["refusal"] is not None) == (not report["layouts"])
    for each in report["layouts"]:
        memory = each["memory"]
        assert all(type(size) is int and size >= 0 for size in memory.values())
        parts = ("weight_bytes", "activation_bytes", "graph_bytes", "overhead_bytes", "cache_bytes", "left_bytes")
        assert sum(memory[part] for part in parts) == memory["budget_bytes"] <= plan.machine.device.memory_bytes
        ranks = each["tensor_parallel_size"] * each["pipeline_parallel_size"] * each["data_parallel_size"]
        assert ranks <= plan.machine.num_devices
        assert sum(each["layer_partition"]) == plan.shape.config.num_layers
        assert each["capacity_requests"] >= each["data_parallel_size"]
        predicted = each["prediction"]
        assert 0 < predicted["decode_limit"] < predicted["decode_alone"] <= predicted["decode_loaded"]
        assert predicted["running"] == min(plan.load.concurrency, each["capacity_requests"])


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "Qwen2.5-32B-Instruct"])
def test_degrees_are_those_that_the_engine_takes(name):
    plan = plan_of(name, "8xH100-80")
    config = load_model_config(path_of(name))
    refused = {each.tensor_size for each in plan.rejected if not each.reason.startswith("a rank has")}
    for degree in range(1, 9):
        try:
            check_degrees(config, ParallelConfig(tensor_size=degree), deterministic=False)
            assert degree not in refused
        except ConfigError as error:
            assert str(error) in {each.reason for each in plan.rejected if each.tensor_size == degree}
    for stages in (2, 3, 8):
        assert partition(plan.shape, stages) == balance_layers(config, stages)


def test_all_layouts_of_a_machine_are_there_once():
    plan = plan_of("Llama-3.1-8B", "4xH200")
    found = [(each.layout.tensor_size, each.layout.pipeline_size, each.layout.data_size) for each in plan.candidates]
    expected = [
        (tensor, stages, replicas)
        for tensor in (1, 2, 4)
        for stages in (1, 2, 3, 4)
        for replicas in (1, 2, 3, 4)
        if tensor * stages * replicas <= 4
    ]
    assert sorted(found) == sorted(expected)


def test_the_load_decides_what_holds_it():
    light = make_plan(Wish(model=path_of("Llama-3.1-70B"), concurrency=8), parse_machine("4xH100-80"))
    heavy = make_plan(
        Wish(model=path_of("Llama-3.1-70B"), max_model_len=131072, concurrency=64), parse_machine("4xH100-80")
    )
    assert light.choice is not None and light.choice.holds_load
    assert heavy.choice is not None and not heavy.choice.holds_load
    assert any("no layout holds 64 requests of 131072 tokens" in note for note in heavy.notes)
    candidate = heavy.choice.candidate
    token = token_cache_bytes(heavy.shape.layers, 2, candidate.layout.tensor_size)
    assert candidate.capacity == candidate.cache_bytes // token // 131072 >= 1
    assert candidate.prediction.running == candidate.capacity


def test_latency_is_preferred_where_that_is_asked_for():
    plan = plan_of("Llama-3.1-8B", "8xH100-80", prefer="latency")
    assert plan.choice is not None
    chosen = plan.choice.candidate
    assert chosen.layout.tensor_size == 8
    assert chosen.prediction.decode_alone == min(each.prediction.decode_alone for each in plan.candidates)
    assert plan.choice.reason.startswith("Latency is preferred")


def test_fp8_cache_takes_half():
    auto = make_plan(Wish(model=path_of("Llama-3.1-8B")), parse_machine("1xL20"))
    half = make_plan(Wish(model=path_of("Llama-3.1-8B"), kv_cache_dtype="fp8"), parse_machine("1xL20"))
    tokens = [plan.candidates[0].cache_tokens for plan in (auto, half)]
    assert tokens[1] == pytest.approx(2 * tokens[0], rel=0.01)
    assert "--kv-cache-dtype fp8" in half.commands()[0]


def test_a_cache_may_be_what_serve_takes():
    offered = {
        name: section.__dataclass_fields__["kv_cache_dtype"].metadata["choices"]
        for name, section in (("plan", PlanOptions), ("serve", CacheOptions))
    }
    assert offered["plan"] == offered["serve"]
    for name in offered["serve"]:
        wish = Wish(model=path_of("Llama-3.1-8B"), kv_cache_dtype=name)
        if name == "float16":
            with pytest.raises(ConfigError, match="float16 does not go with activations of bfloat16"):
                make_plan(wish, parse_machine("1xL20"))
            continue
        plan = make_plan(wish, parse_machine("1xL20"))
        assert plan.load.kv_itemsize == (1 if "fp8" in name else 2)
        assert (f"--kv-cache-dtype {name}" in plan.commands()[0]) == ("fp8" in name)


def test_a_quantization_can_be_tried_on_a_plain_checkpoint():
    plain = plan_of("Llama-3.1-70B", "1x24GB")
    assert plain.refusal is not None and "--quantization gptq or fp8" in refusal_text(plain)
    tried = make_plan(Wish(model=path_of("Llama-3.1-70B"), quantization="awq"), parse_machine("1xH100-80"))
    assert tried.choice is not None
    assert any("planned as if it were (awq, 4-bit int, groups of 128)" in note for note in tried.notes)


def test_cards_without_bfloat16_are_planned_in_float16():
    plan = make_plan(Wish(model=path_of("Llama-3.1-8B")), parse_machine("4xV100-32"))
    assert plan.load.dtype == "float16" and "--dtype float16" in plan.commands()[0]
    with pytest.raises(ConfigError, match="V100 has no bfloat16; float16 and float32 work there"):
        make_plan(Wish(model=path_of("Llama-3.1-8B"), dtype="bfloat16"), parse_machine("4xV100-32"))


def test_groups_of_a_quantized_matrix_are_not_cut():
    """27648 inputs have 216 groups of 128: 8 ranks share them, 16 do not."""
    plan = plan_of("Qwen2.5-32B-Instruct-GPTQ-Int4", "2x8xH100-80")
    reasons = {each.tensor_size: each.reason for each in plan.rejected if each.pipeline_size == 1}
    assert 8 not in reasons and 16 in reasons


def test_the_embedded_model_is_planned_as_it_is_served():
    plan = make_plan(Wish(model="shoal-tiny"), parse_machine("cpu-2c-8GB"))
    assert plan.load.dtype == "float32" and not plan.obstacles
    with pytest.raises(ConfigError, match="longer than the model's own limit; up to 8192 works"):
        make_plan(Wish(model="shoal-tiny", max_model_len=9000), parse_machine("cpu-2c-8GB"))


def test_a_config_json_is_as_good_as_its_directory(tmp_path):
    by_file = make_plan(Wish(model=path_of("Llama-3.1-8B") + "/config.json"), parse_machine("1xH200"))
    assert by_file.commands() == plan_of("Llama-3.1-8B", "1xH200").commands()
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        (tmp_path / "config.json").write_text("{")
        make_plan(Wish(model=str(tmp_path)), parse_machine("1xH200"))


def test_what_cannot_be_served_yet_is_said(tmp_path):
    assert plan_of("Llama-3.1-8B", "8xH100-80").obstacles == ()
    values = {"architectures": ["PhiForCausalLM"], "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "intermediate_size": 96, "torch_dtype": "bfloat16"}
    plan = make_plan(Wish(model=write_config(tmp_path, **values)), parse_machine("1xH200"))
    assert "PhiForCausalLM has no code of its own here: it is served through Transformers" in plan.obstacles[0]


@pytest.mark.parametrize(
    ("model", "machine"), [pair for pair in CHOICES if "Qwen3" not in pair[0] and "DeepSeek" not in pair[0]]
)
def test_commands_are_such_as_shoal_takes(model, machine):
    sections = {"serve": (SERVE_SECTIONS, "model"), "router": ((RouterOptions,), None)}
    sections["node"] = ((NodeStartOptions,), None)
    for line in plan_of(model, machine).commands():
        words = [word for word in shlex.split(line, comments=True) if "=" not in word or not word.startswith("SHOAL_")]
        assert words.pop(0) == "shoal"
        options, positional = sections[words.pop(0)]
        if words[0] == "start":
            words.pop(0)
        options_from_arguments(words, options, positional, takes_config=False)


def test_where_shoal_does_not_run_there_is_nothing_to_type():
    plan = make_plan(Wish(model=path_of("Llama-3.1-8B")), parse_machine("MI300X"))
    assert plan.choice is not None and plan.commands() == []
    assert any("does not run on MI300X" in note for note in plan.notes)


def test_more_requests_than_a_step_takes_are_no_reason_to_refuse():
    plan = make_plan(Wish(model=path_of("Llama-3.1-8B"), concurrency=100_000), parse_machine("1xH100"))
    assert plan.choice is not None and not plan.choice.holds_load and plan.load.num_seqs == 1024
    # A card that has no room for steps as large: steps are as the engine has them, and requests wait.
    plan = make_plan(Wish(model=path_of("Llama-3.1-8B"), concurrency=100_000), parse_machine("1xL4-24"))
    assert plan.choice is not None and not plan.choice.holds_load and plan.load.num_seqs == 256


# --- where ranks come to stand -----------------------------------------------------------------------------------


def placed(machine: str, tensor_size: int, pipeline_size: int, data_size: int = 1, **more: bool) -> Layout | None:
    layout = Layout(
        tensor_size=tensor_size,
        pipeline_size=pipeline_size,
        data_size=data_size,
        crossings=(False,) * (pipeline_size - 1),
        **more,
    )
    return place(parse_machine(machine), layout)


def test_ranks_fill_nodes_as_the_engine_places_them():
    inside = placed("2x4xL20", 4, 1)
    assert inside is not None and (inside.way, inside.num_nodes) == ("one", 1)
    servers = placed("2x4xL20", 2, 1, 4)
    assert servers is not None and (servers.way, servers.num_nodes) == ("servers", 2)
    assert placed("2x4xL20", 1, 1, 5) is None  # no two nodes have as many of five
    six = placed("2x4xL20", 1, 1, 6)
    assert six is not None and six.num_nodes == 2
    row = placed("2x4xL20", 4, 2)
    assert row is not None and (row.way, row.tensor_nodes, row.crossings) == ("ray", 1, (True,))
    wide = placed("2x4xL20", 8, 1)
    assert wide is not None and wide.tensor_nodes == 2
    pair = placed("2x1xL20", 2, 1)
    assert pair is not None and pair.tensor_nodes == 2
    assert placed("2x4xL20", 3, 1, 3) is None  # one group of three a node


def test_experts_lie_whole_on_their_ranks():
    plan = plan_of("Qwen3-30B-A3B", "2x4xL20-46GiB")
    sharing = [each for each in plan.candidates if each.layout.shares_experts]
    assert {each.layout.expert_size for each in sharing} >= {2, 4, 8}
    assert plan.choice is not None and plan.choice.candidate.layout.shares_experts
    assert "experts lie whole on 4 ranks" in plan.choice.reason
    for each in layouts(plan.shape, plan.machine):
        if isinstance(each, Layout) and each.shares_experts:
            assert plan.shape.num_experts % each.expert_size == 0
    assert any(isinstance(each, Rejection) for each in plan.rejected)
