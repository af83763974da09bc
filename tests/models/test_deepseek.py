"""DeepSeek's latent cache, its routing, and what its checkpoints hold besides; several ranks and stages."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from shoal.config.families.deepseek import RoutingConfig
from shoal.config.model_config import load_model_config
from shoal.distributed.group import GroupCoordinator
from shoal.errors import ModelError
from shoal.layers.grouped_routing import GroupedTopK
from shoal.worker.worker import Worker
from tests.checkpoints import make_checkpoint, make_variant
from tests.engine.test_parallel import make_config
from tests.models.experts_on_ranks import check_stages, check_whole_experts, logits_at
from tests.models.paged import PagedModel, Sequence, random_tokens
from tests.quantization import writers
from tests.quantization.writers import write_quantized
from tests.rank_threads import on_ranks

FAMILIES = ("deepseek_v2", "deepseek_v3")
EIGHT_HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 8, "hidden_size": 128}
TOKENS = random_tokens(60, seed=1)


def make(path: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    groups = {"n_group": 1, "topk_group": 1, "n_routed_experts": 7}
    return make_checkpoint(path, family, dtype=dtype, **{**EIGHT_HEADS, **groups, **changes})


def test_a_token_has_one_row_for_all_heads_on_every_rank(tmp_path: Path) -> None:
    """A latent of 32 numbers and a key of 8, where 4 heads have 4 × (24 + 24) of keys and values."""
    path = make_variant(tmp_path, "deepseek-v3")
    assert load_model_config(path).latent_cache_dim == 40

    def rows(group: GroupCoordinator) -> torch.Tensor:
        model = PagedModel(path, group=group)
        cache = model.kv_caches[0]
        assert cache.shape == (512, 16, 40) and cache.nbytes == 512 * 16 * 40 * 4
        cache.fill_(float("nan"))
        sequence = Sequence(TOKENS)
        model.hidden([(sequence, len(TOKENS))])
        written = cache[torch.tensor(sequence.blocks)].flatten(0, 1)[: len(TOKENS)]
        assert int((~cache.isnan()).all(dim=-1).sum()) == len(TOKENS)
        return written

    (alone,) = on_ranks(1, rows)
    for rank in on_ranks(2, rows):
        torch.testing.assert_close(rank, alone, atol=1e-5, rtol=1e-5)


def test_a_worker_keeps_so_many_bytes_a_token(tmp_path: Path) -> None:
    config = make_config(str(make_variant(tmp_path, "deepseek-v3")))
    worker = Worker(config)
    num_blocks, _ = worker.load(lambda _: None)
    facts = worker.allocate(num_blocks, lambda _: None)
    worker.shutdown()
    assert facts["kv_cache_bytes"] == num_blocks * config.block_size * 2 * 40 * 4


@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_share_experts_whole(tmp_path: Path, family: str) -> None:
    check_whole_experts(make(tmp_path, family))


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_stages_of_two_ranks(tmp_path: Path, family: str, expert_parallel: bool) -> None:
    check_stages(make(tmp_path, family, num_hidden_layers=3), TOKENS, expert_parallel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_deterministic_bits_do_not_depend_on_ranks_or_batch(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    path = make(tmp_path, family, dtype)
    (expected,) = logits_at(path, 1, "deterministic", False, dtype)
    assert expected.isfinite().all()
    for size in (2, 4):
        for by_expert in (False, True):
            for rank in logits_at(path, size, "deterministic", by_expert, dtype):
                assert torch.equal(rank, expected), (size, by_expert)
    model = PagedModel(path, "deterministic", dtype=dtype)
    alone = model.logits(TOKENS, 60)
    assert torch.equal(model.logits(TOKENS, 7), alone)
    others = [Sequence(random_tokens(length, seed=length)) for length in (1, 33)]
    work = [(others[0], 1), (Sequence(TOKENS), 60), (others[1], 33)]
    assert torch.equal(model.step(work)[1], alone)


def test_layers_that_predict_further_tokens_are_left_aside(tmp_path: Path) -> None:
    path = make(tmp_path, "deepseek_v3")
    expected = PagedModel(path).logits(TOKENS, 60)
    tensors = load_file(path / "model.safetensors")
    further = {
        name.replace("layers.1.", "layers.2."): tensor for name, tensor in tensors.items() if "layers.1." in name
    }
    further |= {"model.layers.2.eh_proj.weight": torch.zeros(128, 256), "model.layers.2.enorm.weight": torch.ones(128)}
    further["model.layers.2.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    copies = {name: tensor.clone() for name, tensor in further.items()}
    save_file(tensors | copies, path / "model.safetensors")
    set_config(path, num_nextn_predict_layers=1)
    assert torch.equal(PagedModel(path).logits(TOKENS, 60), expected)
    for layers in (range(0, 1), range(1, 2)):
        PagedModel(path, layer_range=layers)
    set_config(path, num_nextn_predict_layers=0)
    with pytest.raises(ModelError, match=r"unexpected tensor model\.layers\.2\."):
        PagedModel(path)


def test_kimi_k2_says_another_model_type(tmp_path: Path) -> None:
    path = make(tmp_path, "deepseek_v3")
    expected = PagedModel(path).logits(TOKENS, 60)
    set_config(path, model_type="kimi_k2", auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"})
    assert torch.equal(PagedModel(path).logits(TOKENS, 60), expected)


BLOCKS = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


@pytest.mark.parametrize(
    ("config", "writer"),
    [
        (BLOCKS, writers.fp8_by_block(16, 16)),
        ({"quant_method": "fp8"}, writers.fp8_by_tensor()),
        ({"quant_method": "int8", "quantizes_activations": False}, writers.int8_by_channel()),
        (
            writers.compressed("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16}),
            writers.packed(4, 16),
        ),
    ],
)
def test_quantized_projections_are_taken_apart(tmp_path: Path, config: dict[str, Any], writer: writers.Writer) -> None:
    """kv_b_proj is dequantized, and folded into queries and values."""
    sizes = {"q_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 32}
    tied = {"moe_intermediate_size": 32, "intermediate_size": 64, "tie_word_embeddings": True}
    plain = make(tmp_path / "plain", "deepseek_v3", **tied, **sizes)
    quantized = write_quantized(plain, tmp_path, config, writer, keep="mlp.gate.")
    tensors, reference = load_file(quantized / "model.safetensors"), tmp_path / "reference"
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    assert name not in tensors or tensors[name].dtype not in (torch.float32, torch.bfloat16)
    assert "model.layers.1.mlp.gate.weight" in tensors
    expected = PagedModel(reference).logits(TOKENS, 60)
    for size in (1, 2):
        for rank in on_ranks(size, lambda group: PagedModel(quantized, group=group).logits(TOKENS, 60)):
            torch.testing.assert_close(rank, expected, atol=2e-3, rtol=1e-3)


def routed(config: RoutingConfig, logits: torch.Tensor, k: int, correction: torch.Tensor | None = None) -> Any:
    context = PagedContext(torch.device("cpu"))
    routing = GroupedTopK(context, "correction", config, logits.shape[1], k)  # type: ignore[arg-type]
    if correction is not None:
        assert routing.correction is not None
        routing.correction.copy_(correction)
    return routing(logits)


@dataclasses.dataclass
class PagedContext:
    device: torch.device


def test_the_correction_chooses_and_does_not_weigh() -> None:
    config = RoutingConfig(
        scores="sigmoid",
        num_groups=2,
        num_chosen_groups=1,
        group_width=2,
        has_correction=True,
        normalize=True,
        scale=2.0,
    )
    logits = torch.tensor([[3.0, -9.0, -9.0, 1.0, 1.0, 0.5]])
    # The first group has the best expert; the second the two best sum.
    weights, ids = routed(config, logits, 2, torch.zeros(6))
    assert ids.tolist() == [[3, 4]] and weights.tolist() == [[1.0, 1.0]]
    weights, ids = routed(config, logits, 2, torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0]))
    assert ids.tolist() == [[5, 3]]
    shares = torch.tensor([0.5, 1.0]).sigmoid()
    torch.testing.assert_close(weights[0], 2 * shares / shares.sum())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "softmax"}, "scoring_func 'softmax' with topk_method 'noaux_tc' is not supported"),
        ({"n_group": 3}, "n_routed_experts 7 is not a multiple of n_group 3"),
        ({"n_group": 7, "topk_group": 2}, "topk_group 2 of n_group 7 groups of 1 experts do not hold the 3"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim 7 is odd"),
        ({"kv_lora_rank": None, "v_head_dim": 0}, "v_head_dim must be a positive integer"),
        ({"architectures": ["DeepseekV2ForCausalLM"], "norm_topk_prob": True}, "versions disagree"),
    ],
)
def test_what_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = make(tmp_path, "deepseek_v3")
    set_config(path, **changes)
    with pytest.raises(ModelError, match=message):
        load_model_config(path)


def set_config(path: Path, **changes: Any) -> None:
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | changes))
