from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from shoal.kernels.norm import add_rms_norm, rms_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter cuts what does not fit into bf16 off, a GPU rounds.
BF16_STEP = 2**-8 if torch.cuda.is_available() else 2**-7
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _expected(x, weight, eps):
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps)


def _assert_one_rounding(actual, expected):
    """Equal to the fp32 result but for one rounding to the dtype and the order of a sum."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: BF16_STEP, torch.float16: 2**-11}[actual.dtype]
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance * 1.01, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (7, 100), (3, 5, 128), (2, 1536)])
def test_equals_the_norm_of_pytorch(dtype, shape):
    x = torch.randn(shape, device=DEVICE).to(dtype) * 3
    weight = (torch.rand(shape[-1], device=DEVICE) + 0.5).to(dtype)
    output = rms_norm(x, weight, 1e-6)
    assert output.shape == x.shape and output.dtype == dtype
    _assert_one_rounding(output, _expected(x, weight, 1e-6))


def test_takes_heads_out_of_wider_rows():
    projected = torch.randn(5, 6 * 32, device=DEVICE)
    heads = projected.view(5, 6, 32)[:, 2:5]
    weight = torch.rand(32, device=DEVICE)
    torch.testing.assert_close(rms_norm(heads, weight, 1e-6), _expected(heads, weight, 1e-6))
    columns = projected[:, 32:96]
    weight = torch.rand(64, device=DEVICE)
    torch.testing.assert_close(rms_norm(columns, weight, 1e-6), _expected(columns, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rounds_the_sum_and_norms_what_was_rounded(dtype):
    x, residual = (torch.randn(6, 320, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.rand(320, device=DEVICE).to(dtype)
    output, total = add_rms_norm(x, residual, weight, 1e-5)
    step = BF16_STEP if dtype is torch.bfloat16 and DEVICE == "cpu" else 0.0
    torch.testing.assert_close(total, x + residual, rtol=step, atol=0.0)
    _assert_one_rounding(output, _expected(total, weight, 1e-5))


def test_add_without_a_residual_is_the_norm_alone():
    x, weight = torch.randn(2, 96, device=DEVICE), torch.rand(96, device=DEVICE)
    output, total = add_rms_norm(x, None, weight, 1e-5)
    assert total is x
    assert torch.equal(output, rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("size", [32, 1100])
def test_a_row_does_not_depend_on_the_rows_around_it(size):
    x, residual = torch.randn(9, size, device=DEVICE), torch.randn(9, size, device=DEVICE)
    weight = torch.rand(size, device=DEVICE)
    output, _ = add_rms_norm(x, residual, weight, 1e-5)
    for row in range(9):
        alone, _ = add_rms_norm(x[row : row + 1], residual[row : row + 1], weight, 1e-5)
        assert torch.equal(alone[0], output[row])


def test_no_rows():
    assert rms_norm(torch.empty(0, 64, device=DEVICE), torch.ones(64, device=DEVICE), 1e-5).shape == (0, 64)
