"""Between the products of queries and keys and their softmax, for all attention kernels. Scores are powers of two's."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = 1.4426950408889634
LOG2_E = tl.constexpr(_LOG2_E)  # for kernels


def score_factors(scale: float, softcap: float | None) -> tuple[float, float | None]:
    """What `capped` takes for logits softcap * tanh(scale * product / softcap), or scale * product."""
    if softcap is None:
        return scale * _LOG2_E, None
    return 2 * scale / softcap * _LOG2_E, softcap * _LOG2_E


@triton.jit
def capped(products, factor, cap):
    """Products -> logits times log2(e), with `score_factors`; tanh from the one exponential that the units have."""
    logits = products * factor
    if cap is not None:
        logits = cap - 2.0 * cap / (tl.exp2(logits) + 1.0)
    return logits
