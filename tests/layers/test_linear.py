"""Linear layers: what the ranks of a tensor-parallel group read, and that their results join to the same bits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch

from shoal.attention.registry import create_attention_backend
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.parallel_dims import ParallelDims
from shoal.errors import ConfigError
from shoal.layers.context import BuildContext
from shoal.layers.linear import ColumnLinear, GateUpLinear, Linear, QKVLinear, RowLinear
from shoal.quantization.base import LinearMethod, LinearSpec, LinearTensor, QuantizationScheme
from shoal.quantization.unquantized import UnquantizedLinear
from tests import rank_threads

Weights = dict[str, torch.Tensor]


def make_context(
    dtype: torch.dtype,
    tensor_size: int = 1,
    rank: int = 0,
    deterministic: bool = True,
    group: GroupCoordinator | None = None,
) -> BuildContext:
    return BuildContext(
        dtype=dtype,
        device=torch.device("cpu"),
        attention_backend=create_attention_backend("torch_paged"),
        deterministic=deterministic,
        parallel=ParallelDims(tensor_size=tensor_size, rank=rank),
        tensor_group=group or GroupCoordinator([0], 0, name="tensor"),
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inputs", [512, 4864])
def test_row_parallel_sums_have_the_same_bits(dtype: torch.dtype, inputs: int, bias: bool) -> None:
    """Every rank sums its own branch of the tree, in fp32; the bias comes in once, and it is rounded once."""
    weights: Weights = {}
    x = torch.randn(21, inputs).to(dtype)

    def work(group: GroupCoordinator) -> tuple[torch.Tensor, int]:
        size, rank = group.world_size, group.rank_in_group
        context = make_context(dtype, size, rank, group=group)
        layer = fill(RowLinear(context, "down", inputs, 256, bias=bias), weights)
        return layer(x.chunk(size, dim=1)[rank]), layer.weight_bytes()

    ((whole, num_bytes),) = rank_threads.on_ranks(1, work)
    assert whole.dtype is dtype
    expected = x.float() @ weights["down.weight"].to(dtype).float().T
    if bias:
        expected += weights["down.bias"].to(dtype).float()
    torch.testing.assert_close(whole.float(), expected, atol=8e-2, rtol=2e-2)
    for size in (2, 4, 8):
        for total, share in rank_threads.on_ranks(size, work):
            assert torch.equal(total, whole)
            bias_bytes = 256 * dtype.itemsize if bias else 0
            assert share - bias_bytes == (num_bytes - bias_bytes) // size


def test_row_parallel_sums_without_the_mode() -> None:
    weights: Weights = {}
    x = torch.randn(5, 96)

    def work(group: GroupCoordinator) -> torch.Tensor:
        size, rank = group.world_size, group.rank_in_group
        context = make_context(torch.float32, size, rank, deterministic=False, group=group)
        return fill(RowLinear(context, "down", 96, 24, bias=True), weights)(x.chunk(size, dim=1)[rank])

    (whole,) = rank_threads.on_ranks(1, work)
    for size in (2, 3):
        for total in rank_threads.on_ranks(size, work):
            torch.testing.assert_close(total, whole, atol=1e-5, rtol=1e-5)


def test_shards_that_ranks_cannot_share_are_refused() -> None:
    context = make_context(torch.float32, 2, 0)
    with pytest.raises(ConfigError, match="sums the 6 inputs of down in 2 shards, which 6 ranks cannot share evenly"):
        RowLinear(make_context(torch.float32, 6, 0), "down", 6, 4, bias=False)
    RowLinear(context, "down", 6, 4, bias=False)


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


class Blocks(QuantizationScheme):
    """Weights that the checkpoint holds in blocks: an element along the outputs and inputs stands for several."""

    name = "blocks"

    def __init__(self, out_unit: int, in_unit: int | Fraction) -> None:
        self.out_unit, self.in_unit = out_unit, in_unit

    def linear(self, spec: LinearSpec, weight: torch.Tensor | None = None) -> LinearMethod:
        scheme = self

        class Method(UnquantizedLinear):
            def tensors(self) -> list[LinearTensor]:
                shape = (
                    -(-spec.out_features // scheme.out_unit),
                    math.ceil(spec.in_features / Fraction(scheme.in_unit)),
                )
                self.blocks = torch.zeros(shape, dtype=torch.int32)
                self.scale = torch.zeros(len(spec.names))
                units = {"out_unit": scheme.out_unit, "in_unit": scheme.in_unit}
                return [
                    LinearTensor(suffix="blocks", data=self.blocks, out_dim=0, in_dim=1, **units),
                    LinearTensor(suffix="scale", data=self.scale, out_dim=None, in_dim=None, by_part=True),
                ]

        return Method(spec, weight)


def blocks_of(make: Callable[[BuildContext], Linear], size: int, rank: int, scheme: Blocks) -> dict[str, torch.Tensor]:
    """What a rank takes of tensors whose elements count themselves, as its method gets it."""
    layer = make(dataclasses.replace(make_context(torch.float32, size, rank, False), quantization=scheme))
    for tensor in layer.checkpoint_tensors():
        whole = torch.arange(math.prod(tensor.shape)).view(tensor.shape) + 1
        tensor.destination.copy_(whole[tensor.index])
    method = layer.method
    return {"blocks": method.blocks, "scale": method.scale}


def test_quantized_units_are_cut_whole() -> None:
    def up(context: BuildContext) -> Linear:
        return GateUpLinear(context, "mlp", 60, 32, bias=False)

    scheme = Blocks(out_unit=8, in_unit=16)  # [4, 4] for each part; the last block of inputs is smaller
    whole = blocks_of(up, 1, 0, scheme)["blocks"]
    assert whole.tolist() == torch.arange(1, 17).view(4, 4).repeat(2, 1).tolist()
    for rank in range(2):
        rows = [2 * rank, 2 * rank + 1, 4 + 2 * rank, 5 + 2 * rank]
        assert torch.equal(blocks_of(up, 2, rank, scheme)["blocks"], whole[rows])

    def down(context: BuildContext) -> Linear:
        return RowLinear(context, "down", 64, 8, bias=False)

    three_bits = Blocks(out_unit=1, in_unit=Fraction(32, 3))
    whole = blocks_of(down, 1, 0, three_bits)["blocks"]
    assert whole.shape == (8, 6)
    for rank in range(2):
        assert torch.equal(blocks_of(down, 2, rank, three_bits)["blocks"], whole[:, 3 * rank : 3 * rank + 3])
    with pytest.raises(ConfigError, match=r"down.blocks: the inputs of this rank are 0 to 32, .*units of 64 inputs"):
        blocks_of(down, 2, 0, Blocks(1, 64))
    with pytest.raises(ConfigError, match=r"mlp.gate_proj.blocks: the outputs of this rank are 0 to 8, .*units of 16"):
        blocks_of(up, 4, 0, Blocks(16, 1))


def test_parts_stored_as_one_matrix() -> None:
    """Query, key and value of each rank out of one tensor, the same as out of three."""
    one: Weights = {}
    three: Weights = {}
    x = torch.randn(5, 64)
    for size in (1, 2, 4):
        for rank in range(size):
            context = make_context(torch.float32, size, rank, False)
            joined = fill(QKVLinear(context, "attn", 64, 8, 2, 16, bias=True, names="qkv_proj"), one)
            for suffix in ("weight", "bias"):
                parts = one[f"attn.qkv_proj.{suffix}"].split([128, 32, 32])
                three |= {f"attn.{name}_proj.{suffix}": part for name, part in zip("qkv", parts, strict=True)}
            apart = fill(QKVLinear(context, "attn", 64, 8, 2, 16, bias=True), three)
            assert torch.equal(joined(x), apart(x))
    assert one["attn.qkv_proj.weight"].shape == (192, 64)
