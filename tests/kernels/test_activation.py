from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from shoal.kernels.activation import silu_and_mul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _expected(gate_up):
    gate, up = gate_up.float().chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
)
@pytest.mark.parametrize("shape", [(1, 96), (5, 2 * 1037), (3, 4096)])
def test_rounds_once(dtype, tolerance, shape):
    gate_up = (torch.randn(shape, device=DEVICE) * 4).to(dtype)
    output = silu_and_mul(gate_up)
    assert output.dtype == dtype and output.shape == (shape[0], shape[1] // 2)
    torch.testing.assert_close(output.float(), _expected(gate_up), rtol=tolerance, atol=1e-6)


def test_rows_may_lie_apart():
    wide = torch.randn(4, 300, device=DEVICE)
    torch.testing.assert_close(silu_and_mul(wide[:, 50:250]), _expected(wide[:, 50:250]))


def test_large_gates_do_not_overflow():
    gate_up = torch.tensor([[-200.0, 200.0, 3.0, 3.0]], device=DEVICE)
    torch.testing.assert_close(silu_and_mul(gate_up), torch.tensor([[0.0, 600.0]], device=DEVICE))


def test_no_rows():
    assert silu_and_mul(torch.empty(0, 64, device=DEVICE)).shape == (0, 32)
