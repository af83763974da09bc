"""Linear layers of deterministic mode on CUDA: a row's bits depend on nothing but the row. Made by `Unquantized`.

The definition of a product stands in kernels/fixed_matmul.py. cuBLAS computes the very same where it does not split the
inputs. It is told not to; each number of rows is compared once with our kernel, bit by bit, and it serves those that
agree (on an H100 with CUDA 13.0 all that were tried do, 17 to 8192 rows, at cuBLAS's usual speed, 2026-11). So nobody
can see in a row's result which of the two it was.

T rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from shoal.kernels.compile_ahead import is_compiling_ahead
from shoal.kernels.fixed_matmul import FEW_ROWS, fixed_matmul
from shoal.quantization.base import LinearSpec
from shoal.quantization.unquantized import UnquantizedLinear

# Whether cuBLAS has the fixed bits, by device, dtype, outputs, inputs, bias and rows: for all layers of a shape.
_agreements: dict[tuple[torch.device, torch.dtype, int, int, bool, int], bool] = {}
# Outputs at either end that are compared.
_COMPARED = 1024


class FixedLinear(UnquantizedLinear):
    """x W^T + b, each output from all inputs: row-parallel layers gather them (`RowLinear.gathers`)."""

    def __init__(self, spec: LinearSpec, weight: torch.Tensor | None = None) -> None:
        assert spec.num_input_shards == 1 and not spec.is_summand, spec
        super().__init__(spec, weight)
        self._may_ask_library = spec.device.type == "cuda" and spec.dtype in (torch.bfloat16, torch.float16)
        # A single output goes another way in cuBLAS, which does not take our wish.
        self._may_ask_library &= spec.out_features > 1

    def process_after_load(self) -> None:
        """The weight stays as it is. With a bias cuBLAS is reached through the interface that takes our wish."""
        size, dtype, device = self.spec.out_features, self.spec.dtype, self.spec.device
        self._added = torch.zeros(size, dtype=dtype, device=device) if self.bias is None else self.bias

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        num_rows = x.shape[0]
        if self._may_ask_library and num_rows > FEW_ROWS:
            padded = _padded_rows(num_rows)
            if self._library_agrees(padded, x.device):
                wide = x if padded == num_rows else F.pad(x, (0, 0, 0, padded - num_rows))
                return self._by_library(wide)[:num_rows]
        return fixed_matmul(x, self.weight, self.bias)

    def _by_library(self, x: torch.Tensor) -> torch.Tensor:
        products = torch.backends.cuda.matmul
        name = "allow_bf16_reduced_precision_reduction"
        if self.spec.dtype is torch.float16:
            name = "allow_fp16_reduced_precision_reduction"
        before = getattr(products, name), getattr(products, f"{name}_split_k")
        setattr(products, name, (False, False))
        try:
            return torch.addmm(self._added, x.contiguous(), self.weight.t())
        finally:
            setattr(products, name, before)

    def _library_agrees(self, num_rows: int, device: torch.device) -> bool:
        """A number of rows that is first seen while a graph is captured goes to our kernel: comparing waits."""
        spec = self.spec
        key = (device, spec.dtype, spec.out_features, spec.in_features, self.bias is not None, num_rows)
        if key not in _agreements:
            if is_compiling_ahead():
                fixed_matmul(self._added.new_empty(num_rows, spec.in_features), self.weight, self.bias)
                return True
            if torch.cuda.is_current_stream_capturing():
                return False
            generator = torch.Generator(device).manual_seed(num_rows)
            x = torch.randn(num_rows, spec.in_features, dtype=spec.dtype, device=device, generator=generator)
            library = self._by_library(x)
            # A weight of zeros would agree with anything.
            agrees = bool((library[:, :_COMPARED] != 0).any())
            for own in (slice(0, _COMPARED), slice(max(0, spec.out_features - _COMPARED), spec.out_features)):
                ours = fixed_matmul(x, self.weight[own], None if self.bias is None else self.bias[own])
                agrees = agrees and torch.equal(ours, library[:, own])
            _agreements[key] = agrees
        return _agreements[key]


def _padded_rows(num_rows: int) -> int:
    """At most an eighth more rows, so that few numbers of them need the comparison: 8 for each power of two."""
    step = max(8, 1 << max(0, (num_rows - 1).bit_length() - 4))
    return -(-num_rows // step) * step
