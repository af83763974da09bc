"""silu(gate) * up in one pass. Called by layers/activation.py on CUDA. T tokens, F width of the MLP.

Everything between is fp32; PyTorch's two kernels round silu(gate) to the dtype before the product.
H100, 2026-11: 8192 rows of 2 x 2048 in 35 µs, 96 % of copy speed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.kernels.launch import has_dependent_launch, launch_options

_BLOCK = 1024


@triton.jit
def silu_product(gate, up):
    """silu(gate) * up, in fp32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _silu_and_mul_kernel(gate_up, output, width, row_stride, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    if DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    start = gate_up + row * row_stride + column
    gate = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(output + row * width + column, silu_product(gate, up).to(output.dtype.element_ty), mask=inside)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gate_up [T, 2 F], gate first (rows may lie apart) -> silu(gate) * up, [T, F]."""
    if gate_up.stride(-1) != 1:
        gate_up = gate_up.contiguous()
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty(num_rows, width, dtype=gate_up.dtype, device=gate_up.device)
    if output.numel():
        _silu_and_mul_kernel[(num_rows, triton.cdiv(width, _BLOCK))](
            gate_up, output, width, gate_up.stride(0), BLOCK=_BLOCK,
            DEPENDENT=has_dependent_launch(gate_up.device), num_warps=4, **launch_options(gate_up.device),
        )  # fmt: skip
    return output
