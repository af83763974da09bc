"""How the kernels of few rows end: what comes after a product, in fp32, with one rounding."""

from __future__ import annotations

import triton
import triton.language as tl

from shoal.kernels.activation import silu_product


@triton.jit
def finish(
    y, bias, residual, m, n, acc, up, inside, N, y_stride, residual_stride,
    GATED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Bias, activation, residual; one rounding. m and n: rows and outputs, broadcast to acc's shape."""
    if HAS_BIAS:
        acc += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
    if GATED:
        if HAS_BIAS:
            up += tl.load(bias + N + n, mask=n < N, other=0.0).to(tl.float32)
        acc = silu_product(acc, up)
    if HAS_RESIDUAL:
        acc += tl.load(residual + m * residual_stride + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + m * y_stride + n, acc.to(y.dtype.element_ty), mask=inside)
