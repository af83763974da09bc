"""Pipeline stages, hooks and accounting of the models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from shoal.attention.base import AttentionMetadata
from shoal.attention.registry import create_attention_backend
from shoal.config.model_config import load_model_config
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.parallel_dims import ParallelDims
from shoal.errors import ConfigError, ModelError
from shoal.kv_transfer.hooks import LayerHooks
from shoal.layers.context import BuildContext
from shoal.models.base import CausalLM
from shoal.models.registry import build_model
from shoal.weights.loader import load_weights
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.models.paged import CPU, PagedModel, Sequence, random_tokens
from tests.rank_threads import on_ranks


def build_stage(path: Path, layers: range | None) -> CausalLM:
    config = load_model_config(path)
    context = BuildContext(
        dtype=torch.float32, device=CPU, attention_backend=create_attention_backend("torch_paged"), layer_range=layers
    )
    model = build_model(config, context)
    load_weights(model, config)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_stages_compute_what_the_whole_model_does(tmp_path: Path, family: str, tied: bool) -> None:
    path = make_checkpoint(tmp_path, family, num_hidden_layers=4, tie_word_embeddings=tied)
    whole = PagedModel(path)
    tokens = random_tokens(50, seed=1)
    expected = whole.step([(Sequence(tokens), 50)])[0]

    metadata = AttentionMetadata([50], [50], torch.arange(4, dtype=torch.int32)[None], torch.arange(50), 16)
    token_ids, positions, hidden = torch.tensor(tokens), torch.arange(50), None
    with torch.inference_mode():
        for layers in (range(0, 1), range(1, 3), range(3, 4)):
            stage = build_stage(path, layers)
            backend = create_attention_backend("torch_paged")
            caches = [torch.zeros(backend.kv_cache_shape(4, 16, whole.config.num_kv_heads, whole.config.head_dim))]
            backend.prepare(metadata)
            hidden = stage(token_ids, positions, caches * len(layers), metadata, None, hidden)
        assert hidden is not None
        assert torch.equal(stage.compute_logits(hidden), expected)
    assert build_stage(path, range(1, 3)).weight_bytes() < whole.model.weight_bytes() / 2


def test_hooks_surround_every_layer(tmp_path: Path) -> None:
    seen: list[tuple[str, int, float]] = []

    class Recorder(LayerHooks):
        def before_layer(self, layer_index: int, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> None:
            seen.append(("before", layer_index, float(kv_cache.sum())))

        def after_layer(self, layer_index: int, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> None:
            seen.append(("after", layer_index, float(kv_cache.sum())))

    for family in ("qwen2", "opt"):
        path = make_checkpoint(tmp_path / family, family)
        expected = PagedModel(path).logits([5, 6, 7], 3)
        assert torch.equal(PagedModel(path, hooks=LayerHooks()).logits([5, 6, 7], 3), expected)
        assert torch.equal(PagedModel(path, hooks=Recorder()).logits([5, 6, 7], 3), expected)
        assert [(when, layer) for when, layer, _ in seen] == [("before", 0), ("after", 0), ("before", 1), ("after", 1)]
        assert seen[0][2] != seen[1][2], "the layer wrote its keys and values between the two calls"
        seen.clear()


def test_bfloat16_is_close_to_float32(tmp_path: Path) -> None:
    for family in FAMILIES:
        path = make_checkpoint(tmp_path / family, family)
        tokens = random_tokens(40, seed=8)
        wide = torch.softmax(PagedModel(path).logits(tokens, 40), dim=-1)
        narrow = PagedModel(path, dtype=torch.bfloat16).logits(tokens, 11)
        assert narrow.dtype is torch.float32
        distance = (torch.softmax(narrow, dim=-1) - wide).abs().sum(dim=-1).mean()
        assert distance < 0.2, family


def test_what_cannot_be_built(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, "llama")
    config = load_model_config(path)
    context = BuildContext(dtype=torch.float32, device=CPU, attention_backend=create_attention_backend("torch_paged"))
    with pytest.raises(ModelError, match="activation 'mish' is not supported; supported: silu"):
        build_model(dataclasses.replace(config, hidden_act="mish"), context)
    with pytest.raises(ModelError, match="'GPT2LMHeadModel' is not supported; supported: LlamaForCausalLM"):
        build_model(dataclasses.replace(config, architecture="GPT2LMHeadModel"), context)

    def build_for_three(group: GroupCoordinator) -> None:
        dims = ParallelDims(tensor_size=3, rank=group.rank_in_group)
        build_model(config, dataclasses.replace(context, parallel=dims, tensor_group=group))

    with pytest.raises(
        ConfigError, match=r"attention heads \(4\) cannot be split over 3 ranks; these work: \[1, 2, 4\]"
    ):
        on_ranks(3, build_for_three)
