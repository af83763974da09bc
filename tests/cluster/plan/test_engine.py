"""The plan's arithmetic against the engine's own: a rank's weights, its graphs, its slices of the vocabulary."""

from __future__ import annotations

import pytest
import torch

from shoal.attention.registry import create_attention_backend
from shoal.cluster.plan.families import read_shape
from shoal.cluster.plan.memory import Cut, stage_weight_bytes
from shoal.cluster.plan.placement import partition
from shoal.cluster.plan.shape import VOCABULARY_MULTIPLE, Matrix, Split
from shoal.config.model_config import load_model_config
from shoal.config.parallel import balance_layers
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.parallel_dims import ParallelDims
from shoal.distributed.vocabulary import VocabularySlice
from shoal.layers.context import BuildContext
from shoal.models.registry import build_model
from tests.cluster.plan.models import path_of, write_config
from tests.rank_threads import on_ranks

META = torch.device("meta")
SMALL_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 96, "head_dim": 16,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16",
}  # fmt: skip
SMALL_OPT = {
    "architectures": ["OPTForCausalLM"], "vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 6,
    "num_attention_heads": 8, "ffn_dim": 96, "word_embed_proj_dim": 32, "torch_dtype": "bfloat16",
}  # fmt: skip


def group_of(num_ranks: int) -> GroupCoordinator:
    """The first of so many ranks, which never meet: nothing is computed."""
    return on_ranks(num_ranks, lambda group: group)[0]


def engine_bytes(path: str, tensor_size: int, pipeline_size: int, stage: int) -> int:
    """Weights of one rank of a stage, by the engine's own layers on the meta device."""
    config = load_model_config(path)
    dims = ParallelDims(tensor_size=tensor_size, pipeline_size=pipeline_size, rank=stage * tensor_size)
    group = group_of(tensor_size)
    context = BuildContext(
        dtype=torch.bfloat16,
        device=META,
        attention_backend=create_attention_backend("torch_paged"),
        parallel=dims,
        tensor_group=group,
        layer_range=dims.layer_range(config.num_layers, balance_layers(config, pipeline_size)),
        max_model_len=64,
    )
    return build_model(config, context).weight_bytes()


def plan_bytes(path: str, tensor_size: int, pipeline_size: int, stage: int) -> int:
    shape, _ = read_shape(path)
    cut = Cut(tensor_size=tensor_size, partition=partition(shape, pipeline_size))
    return stage_weight_bytes(shape, cut, stage, 2)


@pytest.mark.parametrize(("tensor_size", "pipeline_size"), [(1, 1), (2, 1), (4, 2), (1, 3), (8, 1)])
@pytest.mark.parametrize("values", [SMALL_QWEN3, SMALL_OPT], ids=["qwen3", "opt"])
def test_a_rank_holds_what_the_engine_builds(values, tensor_size, pipeline_size, tmp_path):
    path = write_config(tmp_path, **values)
    for stage in range(pipeline_size):
        expected = engine_bytes(path, tensor_size, pipeline_size, stage)
        assert plan_bytes(path, tensor_size, pipeline_size, stage) == expected, stage


@pytest.mark.parametrize(
    ("name", "tensor_size", "pipeline_size"), [("Llama-3.1-70B", 4, 2), ("Qwen2.5-32B-Instruct", 8, 1)]
)
def test_a_rank_of_a_large_model_holds_what_the_engine_builds(name, tensor_size, pipeline_size):
    for stage in range(pipeline_size):
        expected = engine_bytes(path_of(name), tensor_size, pipeline_size, stage)
        assert plan_bytes(path_of(name), tensor_size, pipeline_size, stage) == expected


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
@pytest.mark.parametrize("vocab_size", [320, 1000, 128256])
def test_slices_of_the_vocabulary_are_those_of_the_engine(vocab_size, num_ranks):
    table = Matrix(component="head", name="lm_head", out_features=vocab_size, in_features=64, split=Split.VOCABULARY)
    group = group_of(num_ranks)
    assert table.local(num_ranks)[1] == VocabularySlice(vocab_size, group).width
    assert VOCABULARY_MULTIPLE == 64
