"""Products with fixed bits: right against fp64 in the interpreter, on a GPU the same bits in every way of cutting."""

from __future__ import annotations

import pytest
import torch

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

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
@pytest.mark.parametrize("num_rows", [1, 9, 40, 300])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(48, 256), (70, 160)])
def test_equals_the_product(num_rows: int, num_outputs: int, num_inputs: int, dtype: torch.dtype) -> None:
    x, weight, bias = inputs(num_rows, num_outputs, num_inputs, dtype)
    expected = x.double() @ weight.double().T
    for added in (None, bias):
        found = fixed_matmul(x, weight, added)
        total = expected if added is None else expected + bias.double()
        assert found.dtype is dtype
        torch.testing.assert_close(found.double(), total, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_rows_apart_and_none() -> None:
    x, weight, _ = inputs(6, 32, 64, torch.float32)
    apart = torch.cat([x, x.flip(0)], dim=1)[:, :64]
    assert torch.equal(fixed_matmul(apart, weight), fixed_matmul(x, weight))
    assert fixed_matmul(x[:0], weight).shape == (0, 32)


def test_few_rows_lie_in_one_tile() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for num_rows in (1, 8, 9, 16):
            tiles = choose_tiles(num_rows, dtype)
            assert tiles.few and tiles.block_m >= num_rows


GPU_TYPES = [torch.bfloat16, torch.float16, torch.float32]
WAYS = [
    Tiles(8, 32, 128, 4, 3, few=True),
    Tiles(16, 16, 64, 2, 4, few=True, prefetch=8),
    Tiles(32, 64, 128, 4, 3, few=True),
    Tiles(64, 64, 64, 4, 3),
    Tiles(128, 64, 32, 4, 3),
    Tiles(128, 128, 64, 8, 3),
    Tiles(256, 64, 64, 4, 3),
]
FP32_WAYS = [Tiles(8, 32, 32, 4, 2, few=True), Tiles(16, 16, 64, 2, 2, few=True), Tiles(64, 64, 16, 8, 2)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_TYPES)
@pytest.mark.parametrize("num_inputs", [1024, 8 * 112])
def test_same_bits_in_every_way(dtype: torch.dtype, num_inputs: int) -> None:
    x, weight, bias = inputs(300, 320, num_inputs, dtype)
    x = x * torch.randn_like(x).exp()  # many magnitudes: another order of sums would show
    whole = fixed_matmul(x, weight, bias)
    for tiles in FP32_WAYS if dtype is torch.float32 else WAYS:
        assert torch.equal(fixed_matmul(x, weight, bias, tiles=tiles), whole), tiles


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_TYPES)
def test_rows_have_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    x, weight, bias = inputs(300, 320, 1024, dtype)
    whole = fixed_matmul(x, weight, bias)
    for first, count in [(0, 1), (299, 1), (17, 2), (5, 8), (100, 16), (3, 31), (40, 33), (1, 64), (9, 100), (0, 257)]:
        part = fixed_matmul(x[first : first + count], weight, bias)
        assert torch.equal(part, whole[first : first + count]), (first, count)
    assert torch.equal(fixed_matmul(x[:5], weight[64:160], bias[64:160]), whole[:5, 64:160])
