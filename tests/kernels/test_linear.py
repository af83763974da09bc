from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from shoal.kernels.linear import LinearConfig, Workspace, skinny_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies no matrices of bf16.
DOT_DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float16
SUM = LinearConfig("sum", block_n=4, block_k=64, num_warps=1)
DOT = LinearConfig("dot", block_n=16, block_k=64, num_warps=1, num_stages=2)
SPLIT = LinearConfig("dot", block_n=16, block_k=64, num_warps=1, num_stages=2, num_splits=3)


@pytest.fixture(scope="module")
def workspace():
    return Workspace(torch.device(DEVICE))


def _expected(x, weight, bias=None, *, gated=False, residual=None, norm=None):
    x = x.double()
    if norm is not None:
        x = F.rms_norm(x, (x.shape[1],), norm[0].double(), norm[1])
    y = x @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    if gated:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return (y if residual is None else y + residual.double()).float()


def _random(*shape, dtype):
    return torch.randn(shape, device=DEVICE).to(dtype)


CASES = [
    (SUM, 1, torch.bfloat16), (SUM, 1, torch.float16), (DOT, 1, DOT_DTYPE), (DOT, 8, DOT_DTYPE), (DOT, 13, DOT_DTYPE),
    (SUM, 2, torch.bfloat16), (SUM, 3, torch.bfloat16), (SUM, 8, torch.float16), 
    (SPLIT, 3, DOT_DTYPE), (SPLIT, 16, DOT_DTYPE),
]  # fmt: skip


@pytest.mark.parametrize(("config", "num_rows", "dtype"), CASES)
@pytest.mark.parametrize(
    ("gated", "extras", "num_inputs"),  # whole blocks, and a block that is cut
    [(False, False, 256), (True, False, 200), (False, True, 200), (True, True, 256)],
)
def test_equals_the_product_in_full_precision(workspace, config, num_rows, dtype, gated, extras, num_inputs):
    num_outputs = 36  # no multiple of a block
    x = _random(num_rows, num_inputs, dtype=dtype)
    weight = _random(num_outputs * (2 if gated else 1), num_inputs, dtype=dtype) / num_inputs**0.5
    bias = _random(weight.shape[0], dtype=dtype) if extras else None
    residual = _random(num_rows, num_outputs, dtype=dtype) if extras else None
    y = skinny_linear(x, weight, bias, config, workspace, gated=gated, residual=residual, output_dtype=torch.float32)
    torch.testing.assert_close(y, _expected(x, weight, bias, gated=gated, residual=residual), rtol=1e-4, atol=1e-4)
    assert int(workspace.counters.sum()) == 0  # ready for the next product


@pytest.mark.parametrize("num_rows", [1, 3, 8])
@pytest.mark.parametrize("gated", [False, True])
def test_norm_on_the_way(workspace, num_rows, gated):
    x = _random(num_rows, 200, dtype=DOT_DTYPE) * 5
    weight = _random(48, 200, dtype=DOT_DTYPE) / 200**0.5
    norm = (torch.rand(200, device=DEVICE).to(DOT_DTYPE) + 0.5, 1e-3)
    y = skinny_linear(x, weight, None, SUM, workspace, gated=gated, norm=norm, output_dtype=torch.float32)
    torch.testing.assert_close(y, _expected(x, weight, gated=gated, norm=norm), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("config", "num_rows"), [(SUM, 1), (SPLIT, 4)])
def test_strides_of_x_weight_and_residual(workspace, config, num_rows):
    x = _random(num_rows, 300, dtype=DOT_DTYPE)[:, 64:264]
    weight = (_random(32, 256, dtype=DOT_DTYPE) / 16)[:, :200]
    residual = _random(num_rows, 100, dtype=DOT_DTYPE)[:, 10:42]
    y = skinny_linear(x, weight, None, config, workspace, residual=residual)
    assert y.dtype == DOT_DTYPE
    torch.testing.assert_close(y.float(), _expected(x, weight, residual=residual), rtol=8e-3, atol=8e-3)
    columns_apart = _random(200, num_rows, dtype=DOT_DTYPE).T
    y = skinny_linear(columns_apart, weight, None, config, workspace)
    torch.testing.assert_close(y.float(), _expected(columns_apart, weight), rtol=8e-3, atol=8e-3)


def test_rows_of_a_masked_tile_do_not_touch_each_other(workspace):
    """Splits are summed in their order, whoever comes last: the same bits every time, for each row alone too."""
    x = _random(6, 256, dtype=DOT_DTYPE)
    weight = _random(32, 256, dtype=DOT_DTYPE)
    y = skinny_linear(x, weight, None, SPLIT, workspace)
    assert torch.equal(y, skinny_linear(x, weight, None, SPLIT, workspace))
    assert torch.equal(y[2:3], skinny_linear(x[2:3], weight, None, SPLIT, workspace))


def test_gate_up_is_the_gated_product(workspace):
    x = _random(1, 128, dtype=torch.bfloat16)
    weight = _random(40, 128, dtype=torch.bfloat16) / 8
    y = skinny_linear(x, weight, None, SUM, workspace, gated=True)
    assert y.shape == (1, 20)
    torch.testing.assert_close(y.float(), _expected(x, weight, gated=True), rtol=8e-3, atol=1e-3)
