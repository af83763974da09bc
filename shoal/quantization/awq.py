"""Checkpoints of AutoAWQ, version gemm (AWQ: Lin et al. 2023, arXiv:2306.00978).

qweight int32 [K, N / 8] and qzeros int32 [groups, N / 8], packed along the outputs: the bits 4 i to 4 i + 3 of a word
are of its output 0, 2, 4, 6, 1, 3, 5, 7 [i]; scales [groups, N]; bias.
"""

from __future__ import annotations

from typing import Any

import torch

from shoal.config.quantization import QuantizationConfig
from shoal.quantization.base import (
    ExpertsMethod,
    ExpertsSpec,
    LinearMethod,
    LinearSpec,
    LinearTensor,
    QuantizationScheme,
)
from shoal.quantization.experts import grouped_experts
from shoal.quantization.fp8 import is_kept
from shoal.quantization.packed_int import (
    IntegerMatrix,
    PackedIntLinear,
    cuts_a_group,
    regular_group,
    repeated,
    scale_of_random,
    unpack,
)
from shoal.quantization.unquantized import Unquantized

_BITS, _PER_WORD = 4, 8
# Where a word has each of its outputs.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq(QuantizationScheme):
    name = "awq"

    def __init__(self, config: QuantizationConfig) -> None:
        self.config = config

    def linear(self, spec: LinearSpec, weight: torch.Tensor | None = None) -> LinearMethod:
        if weight is not None or is_kept(self.config, spec):
            return Unquantized().linear(spec, weight)
        return AwqLinear(spec, self.config)

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod | None:
        return grouped_experts(spec, self)


class AwqLinear(PackedIntLinear):
    bits = _BITS

    def __init__(self, spec: LinearSpec, config: QuantizationConfig) -> None:
        super().__init__(spec)
        outputs, inputs, device = spec.out_features, spec.in_features, spec.device
        all_inputs = spec.all_in_features or inputs
        self.group_size = config.group_size if config.group_size > 0 else all_inputs
        # A rank has all groups where one is cut.
        self.has_all_groups = config.group_size < 0 or cuts_a_group(spec, self.group_size)
        num_groups = -(-(all_inputs if self.has_all_groups else inputs) // self.group_size)
        self.qweight = torch.empty(inputs, -(-outputs // _PER_WORD), dtype=torch.int32, device=device)
        self.qzeros = torch.empty(num_groups, -(-outputs // _PER_WORD), dtype=torch.int32, device=device)
        self.scales = torch.empty(num_groups, outputs, device=device)

    def tensors(self) -> list[LinearTensor]:
        by_group: dict[str, Any] = (
            {"in_dim": None} if self.has_all_groups else {"in_dim": 0, "in_unit": self.group_size}
        )
        scale = scale_of_random(_BITS, self.spec.all_in_features or self.spec.in_features)
        (zeros,) = repeated(1 << (_BITS - 1), _BITS, self.qzeros.device).tolist()
        return [
            LinearTensor(
                suffix="qweight", data=self.qweight, out_dim=1, in_dim=0, out_unit=_PER_WORD,
                fill=lambda whole, generator: whole.random_(-(1 << 31), 1 << 31, generator=generator),
            ),
            LinearTensor(
                suffix="qzeros", data=self.qzeros, out_dim=1, out_unit=_PER_WORD, **by_group,
                fill=lambda whole, _: whole.fill_(zeros),
            ),
            LinearTensor(
                suffix="scales", data=self.scales, out_dim=1, **by_group,
                fill=lambda whole, _: whole.fill_(scale),
            ),
            *self.bias_tensors(),
        ]  # fmt: skip

    @property
    def regular_group(self) -> int | None:
        return regular_group(self.spec, self.group_size, self.has_all_groups)

    def matrices(self) -> list[IntegerMatrix]:
        spec, qweight = self.spec, self.qweight
        zeros = _unpack(self.qzeros)[:, : spec.out_features]

        def read(outputs: slice) -> torch.Tensor:
            words = qweight[:, outputs.start // _PER_WORD : -(-outputs.stop // _PER_WORD)]
            return _unpack(words)[:, : outputs.stop - outputs.start].t()

        matrix = IntegerMatrix(
            num_outputs=spec.out_features,
            num_inputs=spec.in_features,
            bits=_BITS,
            group_size=self.group_size,
            read=read,
            scales=self.scales,
            zeros=None if bool((zeros == 1 << (_BITS - 1)).all()) else zeros,
        )
        del self.qweight, self.qzeros, self.scales
        return [matrix.from_input(spec.in_start) if self.has_all_groups else matrix]


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, W] -> uint8 [R, 8 W], in the order of the outputs."""
    places = torch.tensor(_PLACES, device=words.device)
    return unpack(words, _BITS).unflatten(1, (-1, _PER_WORD))[..., places].flatten(1)
