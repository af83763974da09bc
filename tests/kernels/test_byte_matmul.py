"""Products with weights of one byte: the kernels for few rows and for many, quantizing rows, dequantizing weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from shoal.kernels.byte_matmul import byte_matmul, dequantize, quantize_rows
from shoal.kernels.linear import FP8_AS_FP16, ByteScales, LinearConfig, Workspace, skinny_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies no matrices of bf16.
DOT_DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
FP8 = torch.float8_e4m3fn
SUM = LinearConfig("sum", block_n=4, block_k=64, num_warps=1)
DOT = LinearConfig("dot", block_n=16, block_k=32, num_warps=1, num_stages=2)
SPLIT = LinearConfig("dot", block_n=16, block_k=32, num_warps=1, num_stages=2, num_splits=3)
BLOCK = (16, 32)


def make(
    num_outputs: int, num_inputs: int, dtype: torch.dtype, block: tuple[int, int] | None
) -> tuple[torch.Tensor, ByteScales, torch.Tensor]:
    """(numbers, scales, what they stand for in fp64)."""
    numbers = (torch.randn(num_outputs, num_inputs, device=DEVICE) * 30).clamp(-127, 127).to(dtype)
    size = (num_outputs,) if block is None else (-(-num_outputs // block[0]), -(-num_inputs // block[1]))
    scales = torch.rand(size, device=DEVICE) / 30 / num_inputs**0.5 + 1e-4
    by_element = scales[:, None]
    if block is not None:
        by_element = scales.repeat_interleave(block[0], 0)[:num_outputs]
        by_element = by_element.repeat_interleave(block[1], 1)[:, :num_inputs]
    return numbers, ByteScales(scales, block), numbers.double() * by_element.double()


def as_bits(numbers: torch.Tensor, scales: ByteScales) -> tuple[torch.Tensor, ByteScales]:
    """As a GPU without FP8 takes them."""
    if numbers.dtype is not FP8:
        return numbers, scales
    return numbers.view(torch.uint8), ByteScales(scales.values / FP8_AS_FP16, scales.block)


@pytest.mark.parametrize(("config", "num_rows"), [(SUM, 1), (SUM, 3), (DOT, 8), (SPLIT, 13)])
@pytest.mark.parametrize("dtype", [FP8, torch.int8])
@pytest.mark.parametrize("block", [None, BLOCK])
@pytest.mark.parametrize(("gated", "num_inputs"), [(False, 208), (True, 256)])
def test_few_rows(config, num_rows, dtype, block, gated, num_inputs):
    numbers, scales, weight = make(64 if gated else 40, num_inputs, dtype, block)
    x = torch.randn(num_rows, num_inputs, device=DEVICE).to(DOT_DTYPE)
    bias = torch.randn(weight.shape[0], device=DEVICE).to(DOT_DTYPE)
    expected = x.double() @ weight.T + bias.double()
    if gated:
        gate, up = expected.chunk(2, dim=1)
        expected = F.silu(gate) * up
    numbers, scales = as_bits(numbers, scales)
    found = skinny_linear(
        x, numbers, bias, config, Workspace(torch.device(DEVICE)), gated=gated, scales=scales,
        output_dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_norm_and_residual_on_the_way():
    numbers, scales, weight = make(48, 208, torch.int8, BLOCK)
    x = torch.randn(2, 208, device=DEVICE).to(DOT_DTYPE) * 5
    norm = (torch.rand(208, device=DEVICE).to(DOT_DTYPE) + 0.5, 1e-3)
    residual = torch.randn(2, 48, device=DEVICE).to(DOT_DTYPE)
    expected = F.rms_norm(x.double(), (208,), norm[0].double(), norm[1]) @ weight.T + residual.double()
    found = skinny_linear(
        x, numbers, None, SUM, Workspace(torch.device(DEVICE)), residual=residual, norm=norm, scales=scales,
        output_dtype=torch.float32,
    )  # fmt: skip
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)


def test_every_fp8_number_by_its_bits():
    bits = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    bits = bits[bits & 0x7F != 0x7F][:, None].contiguous()
    scales = ByteScales(torch.full((254,), 1 / FP8_AS_FP16, device=DEVICE))
    assert torch.equal(dequantize(bits, scales, torch.float32), bits.view(FP8).float())


@pytest.mark.parametrize("dtype", [FP8, torch.int8])
@pytest.mark.parametrize("block", [None, BLOCK, (1, 48)])
def test_dequantize(dtype, block):
    numbers, scales, weight = make(41, 200, dtype, block)
    found = dequantize(*as_bits(numbers, scales), torch.float32)
    torch.testing.assert_close(found.double(), weight, atol=0, rtol=1e-6)


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("num_inputs", [200, 5000])
def test_rows_are_rounded_to_the_nearest_and_each_by_itself(group, num_inputs):
    x = torch.randn(3, num_inputs, device=DEVICE).to(torch.bfloat16)
    x[1] *= 100
    x[2] = 0
    q, scales = quantize_rows(x, torch.int8, group=group)
    by_element = scales.repeat_interleave(group, 1)[:, :num_inputs] if group else scales
    assert ((q.float() * by_element - x.float()).abs() <= by_element * 0.5001).all()
    assert torch.equal(q, (x.float() / by_element).round().clamp(-127, 127).to(torch.int8))
    assert not q[2].any() and scales.isfinite().all() and (scales > 0).all()
    assert q[:2].abs().amax(1).tolist() == [127, 127]
    alone, own = quantize_rows(x[1:2], torch.int8, group=group)
    assert torch.equal(alone, q[1:2]) and torch.equal(own, scales[1:2])


def test_rows_by_a_given_scale_are_cut():
    x = torch.tensor([[0.1, -0.26, 30.0, -40.0]], device=DEVICE)
    q, _ = quantize_rows(x, torch.int8, scale=torch.tensor([0.1], device=DEVICE))
    assert q.tolist() == [[1, -3, 127, -127]]


@pytest.mark.parametrize("num_rows", [1, 20, 70])
@pytest.mark.parametrize(("block", "group"), [(None, 0), (BLOCK, 32), (BLOCK, 0)])
@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_many_rows(num_rows, block, group, dtype):
    numbers, scales, weight = make(72, 208, dtype, block)
    q = (torch.randn(num_rows, 208, device=DEVICE) * 40).clamp(-127, 127).to(dtype)
    x_scales = torch.rand(num_rows, 7 if group else 1, device=DEVICE) / 100
    x = q.double() * (x_scales.repeat_interleave(32, 1)[:, :208] if group else x_scales).double()
    bias = torch.randn(72, device=DEVICE).to(torch.bfloat16)
    found = byte_matmul(q, x_scales, numbers, scales, bias, torch.float32)
    expected = x @ weight.T + bias.double()
    # The matrix units add FP8 products up with fewer bits than fp32 has.
    tolerance = 1e-3 if dtype is FP8 and DEVICE == "cuda" else 1e-5
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    given = byte_matmul(q, x_scales[:1, :1].reshape(1), numbers, scales, None, torch.float32) if not group else None
    if given is not None:
        torch.testing.assert_close(
            given.double(), (q.double() * x_scales[0].double()) @ weight.T, atol=tolerance, rtol=tolerance
        )


def test_whole_numbers_are_added_up_exactly():
    q = torch.randint(-127, 128, (33, 4096), dtype=torch.int8, device=DEVICE)
    weight = torch.randint(-127, 128, (16, 4096), dtype=torch.int8, device=DEVICE)
    ones = torch.ones(16, device=DEVICE)
    found = byte_matmul(q, torch.ones(33, 1, device=DEVICE), weight, ByteScales(ones), None, torch.float32)
    assert torch.equal(found.double(), (q.double() @ weight.double().T).float().double())
