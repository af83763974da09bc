"""What the kernels that multiply by packed integers share: how a product begins and how it ends."""

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


@triton.jit
def prefetch(words, slab, end, step, first, N, count, THREADS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ask `count` slabs of the outputs from `first` on into L2, each thread one of them."""
    if count > 0:
        own = slab + tl.arange(0, THREADS)
        inside = own < tl.minimum(slab + count, end)
        address = words + tl.where(inside, own, slab) * step + first * 16
        num_bytes = tl.where(inside, tl.minimum(BLOCK_N, N - first) * 64, 16)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [address, num_bytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
