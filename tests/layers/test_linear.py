"""Linear layers: what the ranks of a tensor-parallel group read, and that their results join to the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shoal.attention.registry import create_attention_backend
from shoal.distributed.parallel_dims import ParallelDims
from shoal.layers.context import BuildContext
from shoal.layers.linear import ColumnLinear, GateUpLinear, Linear, QKVLinear, RowLinear

Weights = dict[str, torch.Tensor]


def make_context(dtype: torch.dtype, tensor_size: int = 1, rank: int = 0, deterministic: bool = True) -> BuildContext:
    return BuildContext(
        dtype=dtype,
        device=torch.device("cpu"),
        attention_backend=create_attention_backend("torch_paged"),
        deterministic=deterministic,
        parallel=ParallelDims(tensor_size=tensor_size, rank=rank),
    )


def fill(layer: Linear, weights: Weights) -> Linear:
    """Load as the loader does; tensors that are not there yet are made up."""
    for tensor in layer.checkpoint_tensors():
        if tensor.name not in weights:
            generator = torch.Generator().manual_seed(len(weights))
            weights[tensor.name] = torch.randn(tensor.shape, generator=generator) * 0.1
        assert weights[tensor.name].shape == tensor.shape
        tensor.destination.copy_(weights[tensor.name][tensor.index])
    layer.process_after_load()
    return layer


def on_ranks(
    make: Callable[[BuildContext], Linear], size: int, weights: Weights, dtype: torch.dtype, deterministic: bool = True
) -> list[Linear]:
    return [fill(make(make_context(dtype, size, rank, deterministic)), weights) for rank in range(size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [64, 896])
def test_column_parallel_outputs_have_the_same_bits(dtype: torch.dtype, inputs: int) -> None:
    weights: Weights = {}
    x = torch.randn(37, inputs).to(dtype)

    def make(context: BuildContext) -> Linear:
        return ColumnLinear(context, "fc", inputs, 512, bias=True)

    (whole,) = on_ranks(make, 1, weights, dtype)
    assert torch.equal(whole(x)[5:6], whole(x[5:6]))
    for size in (2, 4, 8):
        parts = on_ranks(make, size, weights, dtype)
        assert torch.equal(torch.cat([part(x) for part in parts], dim=1), whole(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [512, 4864])
def test_row_parallel_sums_have_the_same_bits(dtype: torch.dtype, inputs: int) -> None:
    """Every rank sums its own branch of the tree; the ranks' sums are joined in the same tree. In fp32, to see the sums
    themselves; in bf16 a rank's sum would be rounded once more here."""
    weights: Weights = {}
    x = torch.randn(21, inputs).to(dtype)

    def make(context: BuildContext) -> Linear:
        return RowLinear(context, "down", inputs, 256, bias=False)

    (whole,) = on_ranks(make, 1, weights, dtype)
    torch.testing.assert_close(
        whole(x).float(), x.float() @ weights["down.weight"].to(dtype).float().T, atol=8e-2, rtol=2e-2
    )
    assert torch.equal(whole(x)[20:], whole(x[20:]))
    if dtype is torch.float32:
        for size in (2, 4, 8):
            pieces = x.chunk(size, dim=1)
            sums = [part(piece) for part, piece in zip(on_ranks(make, size, weights, dtype), pieces, strict=True)]
            while len(sums) > 1:
                sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
            assert torch.equal(sums[0], whole(x))


@pytest.mark.parametrize("deterministic", [True, False])
def test_merged_layers_read_their_parts(deterministic: bool) -> None:
    """6 query heads over 3 ranks, each with its KV head; gate and up beside each other."""
    weights: Weights = {}
    x = torch.randn(4, 32)
    ranks = on_ranks(
        lambda context: QKVLinear(context, "attn", 32, 6, 3, 8, bias=True), 3, weights, torch.float32, deterministic
    )
    projected = {n: x @ weights[f"attn.{n}_proj.weight"].T + weights[f"attn.{n}_proj.bias"] for n in "qkv"}
    for rank, layer in enumerate(ranks):
        query, key, value = layer(x).split([16, 8, 8], dim=1)
        torch.testing.assert_close(query, projected["q"][:, rank * 16 : rank * 16 + 16])
        torch.testing.assert_close(key, projected["k"][:, rank * 8 : rank * 8 + 8])
        torch.testing.assert_close(value, projected["v"][:, rank * 8 : rank * 8 + 8])
    ranks = on_ranks(lambda c: GateUpLinear(c, "mlp", 32, 48, bias=False), 2, weights, torch.float32, deterministic)
    for rank, layer in enumerate(ranks):
        gate, up = layer(x).chunk(2, dim=1)
        torch.testing.assert_close(gate, (x @ weights["mlp.gate_proj.weight"].T)[:, rank * 24 : rank * 24 + 24])
        torch.testing.assert_close(up, (x @ weights["mlp.up_proj.weight"].T)[:, rank * 24 : rank * 24 + 24])


def test_kv_heads_are_copied_when_there_are_more_ranks() -> None:
    weights: Weights = {}
    x = torch.randn(4, 32)
    ranks = on_ranks(lambda c: QKVLinear(c, "attn", 32, 8, 2, 8, bias=False), 4, weights, torch.float32)
    key = x @ weights["attn.k_proj.weight"].T
    for rank, layer in enumerate(ranks):
        torch.testing.assert_close(layer(x)[:, 16:24], key[:, rank // 2 * 8 : rank // 2 * 8 + 8])
