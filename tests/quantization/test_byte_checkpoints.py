"""FP8, INT8 and compressed-tensors checkpoints as others write them give the logits of their dequantized weights:
on one rank, on two and through two stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.distributed.group import GroupCoordinator
from tests.checkpoints import make_checkpoint
from tests.models.paged import PagedModel, Sequence, random_tokens
from tests.quantization import writers
from tests.quantization.writers import Writer, compressed, write_quantized
from tests.rank_threads import on_ranks

TOKEN = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
INT_TOKEN = TOKEN | {"type": "int"}
FLOAT = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
INT = FLOAT | {"type": "int"}
INT4 = INT | {"num_bits": 4, "strategy": "group", "group_size": 16}
GROUP = {"num_bits": 8, "type": "float", "strategy": "group", "dynamic": True, "group_size": 16}

# Name: (quantization_config, writer). The widths of the model are 128, 64 (keys and values) and 256.
FORMATS: dict[str, tuple[dict[str, Any], Writer]] = {
    "fp8-tensor": ({"quant_method": "fp8"}, writers.fp8_by_tensor()),
    "fp8-tensor-static": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        writers.fp8_by_tensor((1,), inputs="input_scale"),
    ),
    "fp8-tensor-static-other-names": (
        {"quant_method": "fp8", "activation_scheme": "static"},
        writers.fp8_by_tensor(name="weight_scale_inv", inputs="activation_scale"),
    ),
    "fp8-block": (
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [32, 16], "activation_scheme": "dynamic"},
        writers.fp8_by_block(32, 16),
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, writers.fp8_by_channel()),
    "int8": ({"quant_method": "int8"}, writers.int8_by_channel(1)),
    "int8-weight-only": ({"quant_method": "int8", "quantizes_activations": False}, writers.int8_by_channel()),
    "float-quantized-tensor": (
        compressed("float-quantized", FLOAT | {"strategy": "tensor"}, STATIC),
        writers.fp8_by_tensor((1,), inputs="input_scale"),
    ),
    "float-quantized-channel": (
        compressed("float-quantized", FLOAT | {"strategy": "channel"}, TOKEN),
        writers.fp8_by_channel(2, torch.bfloat16),
    ),
    "float-quantized-block": (
        compressed("float-quantized", FLOAT | {"strategy": "block", "block_structure": [16, 16]}, GROUP),
        writers.fp8_by_block(16, 16, "weight_scale"),
    ),
    "naive-quantized": (
        compressed("naive-quantized", FLOAT | {"strategy": "channel"}, None),
        writers.fp8_by_channel(),
    ),
    "int-quantized": (
        compressed("int-quantized", INT | {"strategy": "channel"}, INT_TOKEN),
        writers.int8_by_channel(),
    ),
    "int-quantized-static": (
        compressed("int-quantized", INT | {"strategy": "channel"}, STATIC | {"type": "int"}),
        writers.int8_by_channel(inputs=True),
    ),
    "packed-int4-group": (compressed("pack-quantized", INT4), writers.packed(4, 16)),
    "packed-int4-zero-points": (
        compressed("pack-quantized", INT4 | {"symmetric": False}),
        writers.packed(4, 16, symmetric=False),
    ),
    "packed-int4-channel": (
        compressed("pack-quantized", INT | {"num_bits": 4, "strategy": "channel"}),
        writers.packed(4, -1),
    ),
    "packed-int8-group": (
        compressed("pack-quantized", INT | {"strategy": "group", "group_size": 16}),
        writers.packed(8, 16),
    ),
    "packed-int8-zero-points": (
        compressed("pack-quantized", INT | {"strategy": "group", "group_size": 16, "symmetric": False}),
        writers.packed(8, 16, symmetric=False),
    ),
    "packed-int4-ordered": (
        compressed("pack-quantized", INT4 | {"actorder": "group"}),
        writers.packed(4, 16, ordered=True),
    ),
}
# Two ranks cut rows of 64, 32 and 128, and inputs of 64 and 128.
MODEL = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2, "num_hidden_layers": 3}


def write(directory: Path, form: tuple[dict[str, Any], Writer], family: str = "qwen2", **changes: Any) -> Path:
    plain = make_checkpoint(directory / "plain", family, **{"tie_word_embeddings": False, **MODEL, **changes})
    return write_quantized(plain, directory, *form)


def run(model: PagedModel) -> torch.Tensor:
    """Logits of sequences that enter, prefill in pieces and decode beside each other: 1 to 43 rows."""
    sequences = [Sequence(random_tokens(80, seed)) for seed in range(3)]
    steps = [[(0, 40), (1, 3)], [(1, 1)], [(1, 1), (2, 11)], [(0, 1), (1, 2), (2, 1)]]
    return torch.cat([rows for step in steps for rows in model.step([(sequences[i], count) for i, count in step])])


def through_stages(path: Path, group: GroupCoordinator, tokens: list[int]) -> torch.Tensor:
    hidden = None
    for layers in (range(0, 2), range(2, 3)):
        stage = PagedModel(path, group=group, layer_range=layers)
        hidden = stage.hidden([(Sequence(tokens), len(tokens))], hidden)
    with torch.inference_mode():
        return stage.model.compute_full_logits(hidden)


@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_those_of_the_dequantized_checkpoint(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, FORMATS[name])
    expected = run(PagedModel(tmp_path / "reference"))
    plain = run(PagedModel(tmp_path / "plain"))
    assert (expected - plain).abs().max() > 0.01, "quantizing changes something"
    model = PagedModel(path)
    torch.testing.assert_close(run(model), expected, atol=2e-4, rtol=1e-5)
    for size in (2,):
        for rank in on_ranks(size, lambda group: run(PagedModel(path, group=group))):
            torch.testing.assert_close(rank, expected, atol=2e-4, rtol=1e-5)
    tokens = random_tokens(50, seed=1)
    expected = PagedModel(tmp_path / "reference").logits(tokens, 50)
    for size in (1, 2):
        for rank in on_ranks(size, lambda group: through_stages(path, group, tokens)):
            torch.testing.assert_close(rank, expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-block", "int-quantized", "packed-int4-group"])
def test_bf16_is_near(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, FORMATS[name])
    expected = run(PagedModel(tmp_path / "reference"))
    in_bf16 = run(PagedModel(tmp_path / "reference", dtype=torch.bfloat16)).float()
    found = run(PagedModel(path, dtype=torch.bfloat16)).float()
    allowed = (in_bf16 - expected).norm()
    assert 0 < (found - expected).norm() < 1.2 * allowed, "no worse than bf16 weights"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["fp8-tensor", "fp8-block", "int-quantized", "packed-int4-group"])
def test_deterministic_bits_depend_neither_on_mates_nor_on_ranks(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    path = write(tmp_path, FORMATS[name])
    (expected,) = on_ranks(1, lambda group: run(PagedModel(path, "deterministic", dtype=dtype, group=group)))
    if dtype is torch.float32:
        reference = run(PagedModel(tmp_path / "reference"))
        torch.testing.assert_close(expected, reference, atol=2e-4, rtol=1e-5)
    for rank in on_ranks(2, lambda group: run(PagedModel(path, "deterministic", dtype=dtype, group=group))):
        assert torch.equal(rank, expected)
    model = PagedModel(path, "deterministic", dtype=dtype)
    together = expected[:40]
    assert torch.equal(model.logits(random_tokens(80, 0)[:40], 7), together)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_biases_and_other_families(tmp_path: Path, family: str) -> None:
    changes: dict[str, Any] = {"attention_bias": True, "mlp_bias": True} if family == "llama" else {}
    plain = make_checkpoint(tmp_path / "plain", family, tie_word_embeddings=False, **changes)
    path = write_quantized(plain, tmp_path, *FORMATS["fp8-tensor"])
    expected = run(PagedModel(tmp_path / "reference"))
    for size in (1, 2):
        for rank in on_ranks(size, lambda group: run(PagedModel(path, group=group))):
            torch.testing.assert_close(rank, expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_random_weights_keep_activations_their_size(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, FORMATS[name])
    model = PagedModel(path, load_format="dummy")
    logits = run(model)
    assert logits.isfinite().all() and 0.1 < logits.std() < 10
    again = (
        on_ranks(2, lambda group: run(PagedModel(path, load_format="dummy", group=group))) if name in FORMATS else []
    )
    for rank in again:
        torch.testing.assert_close(rank, logits, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("name", ["float-quantized-tensor", "float-quantized-channel", "float-quantized-block"])
def test_a_quantized_head(tmp_path: Path, name: str) -> None:
    """517 tokens are no multiple of a slice, nor of a block."""
    config, writer = FORMATS[name]
    (group,) = config["config_groups"].values()
    own = config | {"config_groups": {"group_0": group | {"targets": ["Linear", "lm_head"]}}, "ignore": []}
    changes: dict[str, Any] = {"tie_word_embeddings": False, **MODEL, "vocab_size": 517}
    plain = make_checkpoint(tmp_path / "plain", "qwen2", **changes)
    path = write_quantized(plain, tmp_path, own, writer, keep="nothing")
    expected = run(PagedModel(tmp_path / "reference"))
    for size in (1, 2):
        for rank in on_ranks(size, lambda group: run(PagedModel(path, group=group))):
            torch.testing.assert_close(rank, expected, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_quantizing_while_loading(tmp_path: Path, quantization: str, tied: bool) -> None:
    """As a checkpoint that was quantized before; in deterministic mode ranks that hold different inputs quantize them
    as one that holds all."""
    plain = make_checkpoint(tmp_path / "plain", "qwen2", **{**MODEL, "tie_word_embeddings": tied})
    writer = writers.fp8_by_channel() if quantization == "fp8" else writers.int8_by_channel()
    write_quantized(plain, tmp_path, {}, writer)

    def logits_on(size: int, backend: str) -> list[torch.Tensor]:
        return on_ranks(size, lambda group: run(PagedModel(plain, backend, group=group, quantization=quantization)))

    expected = run(PagedModel(tmp_path / "reference"))
    torch.testing.assert_close(logits_on(1, "torch_paged")[0], expected, atol=2e-4, rtol=1e-5)
    distance = (run(PagedModel(plain)) - expected).norm()
    assert 0 < (logits_on(2, "torch_paged")[0] - expected).norm() < 1.5 * distance
    (alone,) = logits_on(1, "deterministic")
    assert 0 < (alone - expected).norm() < 1.5 * distance
    assert all(torch.equal(rank, alone) for rank in logits_on(2, "deterministic"))
    tokens = random_tokens(50, seed=1)
    hidden = None
    for layers in (range(0, 2), range(2, 3)):
        stage = PagedModel(plain, layer_range=layers, quantization=quantization)
        hidden = stage.hidden([(Sequence(tokens), len(tokens))], hidden)
    with torch.inference_mode():
        found = stage.model.compute_full_logits(hidden)
    torch.testing.assert_close(found, PagedModel(tmp_path / "reference").logits(tokens, 50), atol=2e-4, rtol=1e-5)


def test_a_tied_head_on_another_stage_than_the_embedding(tmp_path: Path) -> None:
    path = write(tmp_path, FORMATS["fp8-tensor"], tie_word_embeddings=True)
    tokens = random_tokens(50, seed=1)
    found = through_stages(path, GroupCoordinator([0], 0, name="tensor"), tokens)
    expected = PagedModel(tmp_path / "reference").logits(tokens, 50)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-5)
