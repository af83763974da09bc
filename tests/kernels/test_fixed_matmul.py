"""Products with fixed bits: right against fp64 in the interpreter, and on a GPU the same bits in every way of cutting."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

from shoal.distributed.communicator import tree_sum  # noqa: E402
from shoal.kernels.fixed_matmul import Tiles, choose_tiles, fixed_matmul  # noqa: E402

# The interpreter multiplies no matrices of bf16.
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE.type == "cpu", reason="needs compiled kernels")]
TYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=ON_GPU)]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def inputs(num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(num_rows + num_inputs)
    x = torch.randn(num_rows, num_inputs, generator=generator)
    weight = torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5
    bias = torch.randn(num_outputs, generator=generator)
    return x.to(DEVICE, dtype), weight.to(DEVICE, dtype), bias.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("num_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("num_rows", [1, 9, 40])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(48, 256), (70, 8 * 20)])
def test_equals_the_product(
    num_rows: int, num_outputs: int, num_inputs: int, num_shards: int, dtype: torch.dtype
) -> None:
    x, weight, bias = inputs(num_rows, num_outputs, num_inputs, dtype)
    expected = x.double() @ weight.double().T + bias.double()
    found = fixed_matmul(x, weight, bias, num_shards=num_shards)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    summand = fixed_matmul(x, weight, num_shards=num_shards, output_dtype=torch.float32)
    torch.testing.assert_close(summand.double() + bias.double(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_groups_of_shards(groups: int) -> None:
    x, weight, bias = inputs(35, 40, 256, torch.float32)
    tiles = Tiles(32, 32, 16, 4, 2, groups=groups)
    found = fixed_matmul(x, weight, bias, num_shards=8, tiles=tiles)
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T + bias.double(), atol=1e-5, rtol=1e-5)


def test_rows_apart_and_none() -> None:
    x, weight, _ = inputs(6, 32, 64, torch.float32)
    apart = torch.cat([x, x.flip(0)], dim=1)[:, :64]
    assert torch.equal(fixed_matmul(apart, weight), fixed_matmul(x, weight))
    assert fixed_matmul(x[:0], weight).shape == (0, 32)


GPU_TYPES = [torch.bfloat16, torch.float16, torch.float32]
WAYS = [
    Tiles(8, 32, 128, 4, 3, side_by_side=True),
    Tiles(16, 16, 64, 2, 4, side_by_side=True),
    Tiles(64, 64, 64, 4, 3),
    Tiles(128, 64, 32, 4, 3),
    Tiles(128, 128, 64, 8, 3),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_TYPES)
@pytest.mark.parametrize("num_shards", [1, 8])
@pytest.mark.parametrize("num_inputs", [1024, 8 * 112])
def test_same_bits_in_every_way(dtype: torch.dtype, num_shards: int, num_inputs: int) -> None:
    x, weight, bias = inputs(300, 320, num_inputs, dtype)
    x = x * torch.randn_like(x).exp()  # many magnitudes: another order of sums would show
    whole = fixed_matmul(x, weight, bias, num_shards=num_shards)
    ways = [dataclasses.replace(way, block_k=32, num_stages=2) for way in WAYS] if dtype is torch.float32 else WAYS
    for way in ways:
        for groups in {1, num_shards} if not way.side_by_side else {1}:
            tiles = dataclasses.replace(way, groups=groups)
            assert torch.equal(fixed_matmul(x, weight, bias, num_shards=num_shards, tiles=tiles), whole), tiles


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_TYPES)
@pytest.mark.parametrize("num_shards", [1, 8])
def test_rows_have_the_same_bits_in_any_batch(dtype: torch.dtype, num_shards: int) -> None:
    x, weight, bias = inputs(300, 320, 1024, dtype)
    whole = fixed_matmul(x, weight, bias, num_shards=num_shards)
    for first, count in [(0, 1), (299, 1), (17, 2), (5, 8), (100, 16), (3, 31), (40, 33), (1, 64), (9, 100), (0, 257)]:
        part = fixed_matmul(x[first : first + count], weight, bias, num_shards=num_shards)
        assert torch.equal(part, whole[first : first + count]), (first, count)
    assert torch.equal(fixed_matmul(x[:5], weight[64:160], bias[64:160], num_shards=num_shards), whole[:5, 64:160])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_TYPES)
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("num_rows", [3, 50])
def test_same_bits_at_every_degree(dtype: torch.dtype, num_ranks: int, num_rows: int) -> None:
    x, weight, bias = inputs(num_rows, 320, 1024, dtype)
    alone = fixed_matmul(x, weight, bias, num_shards=8)
    summands = [
        fixed_matmul(piece, columns, num_shards=8 // num_ranks, output_dtype=torch.float32)
        for piece, columns in zip(x.chunk(num_ranks, dim=1), weight.chunk(num_ranks, dim=1), strict=True)
    ]
    assert torch.equal((tree_sum(summands) + bias).to(dtype), alone)


def test_choice_depends_on_shapes() -> None:
    for num_rows in (1, 16, 32, 33, 64, 65, 8192):
        for num_shards in (1, 8):
            tiles = choose_tiles(num_rows, 4096, 4096, num_shards, torch.bfloat16)
            assert num_shards % tiles.groups == 0
            assert tiles.block_m >= min(num_rows, 32)
