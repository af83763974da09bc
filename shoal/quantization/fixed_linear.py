"""Linear layers of deterministic mode on CUDA: a row's bits depend on nothing but the row. Made by `Unquantized`.

The definition of a product stands in kernels/fixed_matmul.py. Without shards cuBLAS computes the very same where it does
not split the inputs: it is asked for that, each number of rows is compared once with our kernel, bit by bit, and cuBLAS
serves those that agree. So a row's result does not depend on which of the two it was.

T rows, K inputs, N outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from shoal.kernels.fixed_matmul import FEW_ROWS, fixed_matmul
from shoal.quantization.base import LinearSpec
from shoal.quantization.unquantized import UnquantizedLinear

# Whether cuBLAS has the fixed bits, by device, dtype, outputs, inputs, bias and rows: the same for all layers of a shape.
_agreements: dict[tuple[torch.device, torch.dtype, int, int, bool, int], bool] = {}


class FixedLinear(UnquantizedLinear):
    """x W^T + b by fixed chains; row-parallel shards in a fixed tree, a summand of other ranks' in fp32."""

    def __init__(self, spec: LinearSpec, weight: torch.Tensor | None = None) -> None:
        super().__init__(spec, weight)
        self._may_ask_library = (
            spec.num_input_shards == 1 and not spec.is_summand and spec.dtype in (torch.bfloat16, torch.float16)
        )

    def process_after_load(self) -> None:
        """The weight stays as it is."""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        spec, num_rows = self.spec, x.shape[0]
        if self._may_ask_library and num_rows > FEW_ROWS:
            padded_rows = _padded_rows(num_rows)
            if self._library_agrees(padded_rows, x.device):
                padded = x if padded_rows == num_rows else F.pad(x, (0, 0, 0, padded_rows - num_rows))
                return _by_library(padded, self.weight, self.bias)[:num_rows]
        return fixed_matmul(
            x,
            self.weight,
            self.bias,
            num_shards=spec.num_input_shards,
            output_dtype=torch.float32 if spec.is_summand else None,
        )

    def _library_agrees(self, num_rows: int, device: torch.device) -> bool:
        """Not asked while a graph is captured: rows that were not seen before go to our kernel then."""
        spec = self.spec
        key = (device, spec.dtype, spec.out_features, spec.in_features, self.bias is not None, num_rows)
        if key not in _agreements:
            if torch.cuda.is_current_stream_capturing():
                return False
            x = torch.randn(num_rows, spec.in_features, dtype=spec.dtype, device=device)
            # A weight of its own: one that is all zeros, say, would agree with anything.
            weight = torch.randn(spec.out_features, spec.in_features, dtype=spec.dtype, device=device)
            ours = fixed_matmul(x, weight, self.bias)
            _agreements[key] = torch.equal(ours, _by_library(x, weight, self.bias))
        return _agreements[key]


def _padded_rows(num_rows: int) -> int:
    """At most an eighth more rows, so that few numbers of them need the comparison: 8 for each power of two."""
    step = max(8, 1 << max(0, (num_rows - 1).bit_length() - 4))
    return -(-num_rows // step) * step


def _by_library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    with _one_chain():
        return F.linear(x, weight, bias)


@contextlib.contextmanager
def _one_chain() -> Iterator[None]:
    """cuBLAS may not split the inputs, as far as it can be told: only its newer interface (cublasLt) takes that."""
    products = torch.backends.cuda.matmul
    library = torch.backends.cuda.preferred_blas_library()
    bf16, fp16 = torch._C._get_cublas_allow_bf16_reduced_precision_reduction(), torch._C._get_cublas_allow_fp16_reduced_precision_reduction()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    products.allow_bf16_reduced_precision_reduction = products.allow_fp16_reduced_precision_reduction = (False, False)
    try:
        yield
    finally:
        products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction = bf16, fp16
        torch.backends.cuda.preferred_blas_library(library)
