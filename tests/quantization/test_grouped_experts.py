"""Experts of quantized checkpoints in one launch, in a model whose ranks share them: logits are those of experts that
are multiplied one by one. The kernels are interpreted."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made

pytest.importorskip("triton")

from shoal.config.quantization import read_quantization  # noqa: E402
from shoal.kernels.activation import silu_and_mul  # noqa: E402
from shoal.layers.moe import RoutedExperts  # noqa: E402
from shoal.log import warn_once  # noqa: E402
from shoal.quantization import experts as choice  # noqa: E402
from shoal.quantization.base import ExpertActivation, ExpertsSpec  # noqa: E402
from shoal.quantization.byte_experts import ByteExperts  # noqa: E402
from shoal.quantization.grouped_experts import GroupedExperts  # noqa: E402
from shoal.quantization.looped_experts import LoopedExperts  # noqa: E402
from shoal.quantization.packed_experts import PackedExperts  # noqa: E402
from shoal.quantization.registry import create_quantization  # noqa: E402
from tests.checkpoints import make_checkpoint  # noqa: E402
from tests.models.paged import PagedModel, random_tokens  # noqa: E402
from tests.quantization.integer_writers import awq, gptq  # noqa: E402
from tests.quantization.writers import Writer, compressed, fp8_by_block, int8_by_channel, packed, write_quantized  # noqa: E402
from tests.rank_threads import on_ranks  # noqa: E402

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="where kernels are compiled, a CPU has none")
MODEL: dict[str, Any] = {
    "hidden_size": 64,
    "num_experts": 4,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 1,
    "tie_word_embeddings": False,
}
INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True, "desc_act": False}
AWQ = {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True}
IGNORED = {"ignore": ["lm_head", "re:.*mlp.gate$"]}


@pytest.mark.parametrize(
    ("config", "writer", "kind"),
    [
        (BLOCKS, fp8_by_block(32, 32), ByteExperts),
        ({"quant_method": "int8"}, int8_by_channel(), ByteExperts),
        (GPTQ, gptq(group=64), PackedExperts),  # of a group each of two ranks has a half
        (AWQ, awq(32), PackedExperts),
        (compressed("pack-quantized", INT4) | IGNORED, packed(4, 32), PackedExperts),
    ],
    ids=["fp8-block", "int8", "gptq", "awq", "packed"],
)
def test_ranks_share_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], writer: Writer, kind: type[GroupedExperts]
) -> None:
    plain = make_checkpoint(tmp_path / "plain", "qwen3_moe", **MODEL)
    path = write_quantized(plain, tmp_path, config, writer, ("lm_head", "mlp.gate."))
    tokens = random_tokens(7, seed=1)
    looped = PagedModel(path, dtype=torch.float16)
    assert all(isinstance(method, LoopedExperts) for method in _methods(looped))
    expected = looped.logits(tokens, 5)

    monkeypatch.setattr(choice, "has_kernels", lambda _: True)
    lock, apply = threading.Lock(), GroupedExperts.apply

    def apply_alone(*arguments: Any) -> torch.Tensor:
        with lock:  # the interpreter serves one thread
            return apply(*arguments)

    monkeypatch.setattr(GroupedExperts, "apply", apply_alone)

    def run(expert_parallel: bool, group: Any) -> torch.Tensor:
        model = PagedModel(path, dtype=torch.float16, group=group, expert_parallel=expert_parallel)
        assert all(type(method) is kind for method in _methods(model)) and model.model.follows_device
        return model.logits(tokens, 5)

    for size, expert_parallel in ((1, False), (2, False), (2, True)):
        for found in on_ranks(size, lambda group, way=expert_parallel: run(way, group)):  # type: ignore[misc]
            torch.testing.assert_close(found, expected, atol=2e-2, rtol=1e-2)


@pytest.mark.parametrize(
    ("config", "changes", "reason"),
    [
        (GPTQ, {"deterministic": True}, "deterministic mode"),
        (GPTQ, {"dtype": torch.float32}, "not in float32"),
        (GPTQ | {"desc_act": True}, {}, "ordered by activation"),
        # The second of eight ranks: its inputs 176 to 352 and groups of 128 end together at each 16.
        (
            GPTQ | {"group_size": 128},
            {"intermediate_size": 176, "all_intermediate_size": 1408, "intermediate_start": 176},
            "cuts their groups to fewer than 32",
        ),
        (GPTQ | {"group_size": -1}, {"intermediate_size": 88}, "a group has 88 inputs"),
        (GPTQ | {"dynamic": {"-:.*down_proj.*": {}}}, {}, "only one of them"),
        (GPTQ | {"dynamic": {"+:.*1.gate_proj.*": {"bits": 8}, "+:.*1.up_proj.*": {"bits": 8}}}, {}, "not held alike"),
        (BLOCKS | {"weight_block_size": [32, 16]}, {}, "a scale is of 16 inputs"),
        (GPTQ, {}, None),
        (BLOCKS, {}, None),
    ],
)
def test_why_they_are_multiplied_one_by_one_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, config: Any, changes: Any, reason: str | None
) -> None:
    monkeypatch.setattr(choice, "has_kernels", lambda _: True)
    options: dict[str, Any] = {
        "num_experts": 2,
        "hidden_size": 256,
        "intermediate_size": 128,
        "activation": ExpertActivation(apply=silu_and_mul, kind="silu"),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "gate_up_names": tuple((f"experts.{n}.gate_proj", f"experts.{n}.up_proj") for n in range(2)),
        "down_names": ("experts.0.down_proj", "experts.1.down_proj"),
    }
    spec, scheme = ExpertsSpec(**(options | changes)), create_quantization(read_quantization(config))
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "shoal"):
        layers = [choice.grouped_experts(spec, scheme) for _ in range(3)]
    said = [record.getMessage() for record in caplog.records]
    if reason is None:
        assert all(isinstance(layer, GroupedExperts) for layer in layers) and not said
    else:
        assert layers == [None] * 3
        (message,) = said
        assert reason in message and "without CUDA graphs" in message


def _methods(model: PagedModel) -> list[Any]:
    return [layer.method for layer in model.model.modules() if isinstance(layer, RoutedExperts)]
