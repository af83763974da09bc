"""MXFP4 experts against the dequantized checkpoint, over ranks and stages, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from shoal.distributed.group import GroupCoordinator
from shoal.errors import ConfigError, ModelError
from shoal.layers.moe import RoutedExperts
from shoal.quantization.mxfp4 import dequantize
from tests.checkpoints import make_checkpoint
from tests.models.paged import PagedModel, Sequence, random_tokens
from tests.quantization.mxfp4_writer import e2m1, encode, write_mxfp4
from tests.rank_threads import on_ranks

SIZES = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 64, "num_local_experts": 5}
TOKENS = random_tokens(90, seed=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mxfp4")
    return write_mxfp4(make_checkpoint(directory / "plain", "gpt_oss", **SIZES), directory)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    """Transformers' own, of the dequantized checkpoint."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.parent / "reference", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        return model(torch.tensor([TOKENS])).logits[0]


def test_every_number() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(4, 4, 16)
    scales = torch.tensor([127, 126, 120, 131], dtype=torch.uint8).expand(4, 4)
    for dtype in (torch.float32, torch.bfloat16):
        found = dequantize(codes, scales, dtype).view(4, 4, 32)
        for row in range(4):
            for group, exponent in enumerate((0, -1, -7, 4)):
                numbers = [e2m1(part) for byte in codes[row, group].tolist() for part in (byte % 16, byte // 16)]
                assert found[row, group].tolist() == [number * 2.0**exponent for number in numbers]


def test_the_writer_and_the_reader_agree() -> None:
    blocks, scales, values = encode(torch.randn(2, 3, 96, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(dequantize(blocks[1], scales[1], torch.float32), values[1])


@pytest.mark.parametrize("backend", ["torch_paged", "deterministic"])
def test_logits(checkpoint: Path, expected: torch.Tensor, backend: str) -> None:
    model = PagedModel(checkpoint, backend)
    for chunk in (90, 31):
        torch.testing.assert_close(model.logits(TOKENS, chunk), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(("size", "expert_parallel"), [(2, False), (2, True), (4, True)])
def test_ranks(checkpoint: Path, expected: torch.Tensor, size: int, expert_parallel: bool) -> None:
    ranks = on_ranks(
        size, lambda group: PagedModel(checkpoint, group=group, expert_parallel=expert_parallel).logits(TOKENS, 50)
    )
    for rank in ranks:
        torch.testing.assert_close(rank, expected, atol=2e-4, rtol=1e-4)


def test_stages_of_two_ranks(checkpoint: Path, expected: torch.Tensor) -> None:
    def through_stages(group: GroupCoordinator) -> torch.Tensor:
        hidden = None
        for layers in (range(0, 2), range(2, 3)):
            stage = PagedModel(checkpoint, group=group, layer_range=layers)
            hidden = stage.hidden([(Sequence(TOKENS), len(TOKENS))], hidden)
        with torch.inference_mode():
            return stage.model.compute_full_logits(hidden)

    for rank in on_ranks(2, through_stages):
        torch.testing.assert_close(rank, expected, atol=2e-4, rtol=1e-4)


def test_numbers_stay_in_four_bits(checkpoint: Path) -> None:
    layer = next(layer for layer in PagedModel(checkpoint).model.modules() if isinstance(layer, RoutedExperts))
    numbers = 5 * (2 * 64 * 64 + 64 * 64)
    assert layer.weight_bytes() == numbers // 2 + numbers // 32 + 5 * (2 * 64 + 64) * 4


def test_random_weights(checkpoint: Path) -> None:
    (alone,) = on_ranks(1, lambda group: PagedModel(checkpoint, group=group, load_format="dummy").logits(TOKENS, 90))
    assert alone.isfinite().all() and alone.std() > 0.01
    for rank in on_ranks(2, lambda group: PagedModel(checkpoint, group=group, load_format="dummy").logits(TOKENS, 90)):
        torch.testing.assert_close(rank, alone, atol=2e-4, rtol=1e-4)


def test_groups_are_not_cut(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match="scale for each 32 inputs.*--enable-expert-parallel"):
        on_ranks(4, lambda group: PagedModel(checkpoint, group=group))


def test_damaged_scales_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.experts.down_proj_scales"][2, 3, 1] = 255
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts\.down_proj.*exponent of 255"):
        PagedModel(tmp_path)


def test_plain_weights_that_are_said_to_be_quantized_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    for file in (checkpoint.parent / "reference").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    with pytest.raises(ModelError, match="unexpected tensor model.layers.0.mlp.experts"):
        PagedModel(tmp_path)
