"""Linear layers whose weight is integers of 2 to 8 bits in groups with a scale each: what GPTQ, AWQ and others share.

A method unpacks nothing itself: it says by an `IntegerMatrix` what its tensors hold, `PackedIntLinear` brings that into
the form of the device (packed_cpu, packed_cuda) a few outputs at a time, and multiplies. T rows, N outputs, K inputs.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any

import torch

from shoal.errors import ModelError
from shoal.quantization.base import LinearMethod, LinearSpec, LinearTensor, NormWeights

# Integers that are unpacked at a time.
_UNPACKED = 1 << 26
# Inputs of a group of which only a part is here, or which is no multiple of it, are filled up to a multiple of it.
_PADDED_GROUP = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntegerMatrix:
    """The weight at (n, k) is (integer - zero) * scale, of the group that k belongs to.

    read: (outputs) -> their integers, uint8 [outputs, K]; called for all outputs in turn. scales: floating [groups, N].
    zeros: uint8 [groups, N]; None: 2^(bits - 1) everywhere. groups_of: int64 [K], the group of each input; None: each
    has group_size (the last one may have fewer). bits: the integers are below 2^bits.
    order: which input of the layer each of these is, int64 [K]; None: as they are.
    """

    num_outputs: int
    num_inputs: int
    bits: int
    group_size: int
    read: Callable[[slice], torch.Tensor]
    scales: torch.Tensor
    zeros: torch.Tensor | None = None
    groups_of: torch.Tensor | None = None
    order: torch.Tensor | None = None

    def pieces(self) -> list[slice]:
        """Outputs to read at a time."""
        step = max(64, _UNPACKED // max(1, self.num_inputs) // 64 * 64)
        return [slice(start, min(start + step, self.num_outputs)) for start in range(0, self.num_outputs, step)]

    def outputs(self, own: slice) -> IntegerMatrix:
        """Of these outputs alone."""
        read, start = self.read, own.start
        return dataclasses.replace(
            self,
            num_outputs=own.stop - own.start,
            read=lambda outputs: read(slice(start + outputs.start, start + outputs.stop)),
            scales=self.scales[:, own],
            zeros=None if self.zeros is None else self.zeros[:, own],
        )

    def inputs(self, own: slice) -> IntegerMatrix:
        """Of these inputs alone. Only before `arranged`."""
        assert self.order is None
        groups_of = self.groups_of
        if groups_of is None:
            groups_of = torch.arange(self.num_inputs, device=self.scales.device) // self.group_size
        read = self.read
        return dataclasses.replace(
            self,
            num_inputs=own.stop - own.start,
            groups_of=groups_of[own],
            read=lambda outputs: read(outputs)[:, own],
        ).arranged()

    def from_input(self, start: int) -> IntegerMatrix:
        """Of a matrix with the scales and zeros of the whole layer, of whose inputs, in order, those from `start` on
        are here: with those of its own groups, smaller ones where the first or last is cut."""
        size = math.gcd(self.group_size, start, self.num_inputs)
        device = self.scales.device
        if size < _PADDED_GROUP:
            inputs = torch.arange(start, start + self.num_inputs, device=device)
            return dataclasses.replace(self, groups_of=inputs // self.group_size)
        groups = torch.arange(start, start + self.num_inputs, size, device=device) // self.group_size
        zeros = None if self.zeros is None else self.zeros[groups]
        return dataclasses.replace(self, group_size=size, scales=self.scales[groups], zeros=zeros)

    def arranged(self) -> IntegerMatrix:
        """With inputs in such an order that each group has the same number of them, one group after the other."""
        if self.groups_of is None:
            return self
        places = torch.arange(self.num_inputs, device=self.scales.device)
        order = torch.argsort(self.groups_of, stable=True)
        in_order = self.groups_of[order]
        first = int(in_order[0])
        if not torch.equal(in_order, first + places // self.group_size):
            return self.filled_up()
        # Whole groups, one after the other, the last one perhaps cut.
        groups = torch.arange(first, int(in_order[-1]) + 1, device=places.device)
        return self._taking(None if torch.equal(order, places) else order, None, groups)

    def filled_up(self) -> IntegerMatrix:
        """The same with groups of _PADDED_GROUP inputs, in which those of too few are followed by some that count
        nothing: their integer is the zero."""
        device = self.scales.device
        places = torch.arange(self.num_inputs, device=device)
        groups_of = places // self.group_size if self.groups_of is None else self.groups_of
        order = torch.argsort(groups_of, stable=True)
        found, counts = torch.unique_consecutive(groups_of[order], return_counts=True)
        blocks = -(-counts // _PADDED_GROUP)
        starts = (torch.cumsum(blocks, 0) - blocks) * _PADDED_GROUP
        rank = places - torch.repeat_interleave(torch.cumsum(counts, 0) - counts, counts)
        padded = torch.full((int(blocks.sum()) * _PADDED_GROUP,), -1, dtype=torch.int64, device=device)
        padded[torch.repeat_interleave(starts, counts) + rank] = order
        matrix = self._taking(padded.clamp(min=0), padded < 0, torch.repeat_interleave(found, blocks))
        return dataclasses.replace(matrix, group_size=_PADDED_GROUP, num_inputs=len(padded))

    def _taking(self, order: torch.Tensor | None, unused: torch.Tensor | None, groups: torch.Tensor) -> IntegerMatrix:
        """Inputs in this order, those that are `unused` with integers that count nothing, and these groups."""
        zeros = None if self.zeros is None else self.zeros[groups]
        read, middle = self.read, 1 << (self.bits - 1)

        def take(outputs: slice) -> torch.Tensor:
            integers = read(outputs)
            if order is not None:
                integers = integers[:, order]
            if unused is not None:
                nothing = integers.new_full((), middle)
                if zeros is not None:
                    nothing = zeros[:, outputs].t().repeat_interleave(_PADDED_GROUP, 1)
                integers = torch.where(unused, nothing, integers)
            return integers

        own = order if self.order is None or order is None else self.order[order]
        return dataclasses.replace(self, read=take, scales=self.scales[groups], zeros=zeros, groups_of=None, order=own)


class PackedIntLinear(LinearMethod):
    """x W^T + b. A method of this kind lists what it reads, and gives matrices when that is there. bits: of an integer
    as it is stored."""

    bits: int

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec
        self.bias = torch.empty(spec.out_features, dtype=spec.dtype, device=spec.device) if spec.bias else None
        # What some writers store of a layer that has none; a layer whose ranks share a bias reads it elsewhere.
        self.no_bias: torch.Tensor | None = None
        if not spec.bias and not spec.has_bias_elsewhere:
            self.no_bias = torch.zeros(spec.out_features, device=spec.device)
        self._products: list[Any] = []

    @property
    def name(self) -> str:
        return ", ".join(self.spec.names) or "a linear layer"

    def bias_tensors(self) -> list[LinearTensor]:
        if self.bias is not None:
            return [LinearTensor(suffix="bias", data=self.bias, out_dim=0, in_dim=None)]
        if self.no_bias is not None:
            return [LinearTensor(suffix="bias", data=self.no_bias, out_dim=0, in_dim=None, optional=True)]
        return []

    @property
    @abc.abstractmethod
    def regular_group(self) -> int | None:
        """Inputs of each group that the one matrix will have, all of its inputs, in order; None: what is loaded tells,
        or a part of a group is here."""

    def is_in_order(self) -> bool:
        """When all is loaded, where there is a `regular_group`: whether inputs are in order indeed."""
        return True

    @abc.abstractmethod
    def matrices(self) -> list[IntegerMatrix]:
        """One for the whole layer; or one for each part, in their order, where their inputs are ordered differently.
        Called once; what was loaded may go with them. Raises ModelError for what is inconsistent."""

    def checked_matrices(self) -> list[IntegerMatrix]:
        """`matrices`, when all is loaded. Raises ModelError."""
        if self.no_bias is not None and bool(self.no_bias.any()):
            raise ModelError(
                f"{self.name}: the checkpoint has a bias, and the config describes a layer without; "
                "only one of zeros can be left out"
            )
        self.no_bias = None
        matrices = self.matrices()
        for matrix in matrices:
            check_scales(matrix.scales, self.name)
        return matrices

    def process_after_load(self) -> None:
        matrices = self.checked_matrices()
        module = importlib.import_module(
            "shoal.quantization.packed_cuda" if self.spec.device.type == "cuda" else "shoal.quantization.packed_cpu"
        )
        start = 0
        for matrix in matrices:
            stop = start + matrix.num_outputs
            bias = None if self.bias is None else self.bias[start:stop]
            self._products.append(module.create_product(self.spec, matrix, bias))
            start = stop
        assert start == self.spec.out_features
        if len(self._products) == 1 and not self.spec.is_summand:
            self.fused_rows = self._products[0].fused_rows

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        outputs = [product.apply(x) for product in self._products]
        output: torch.Tensor = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return output

    def apply_gated(self, x: torch.Tensor, *, norm: NormWeights | None = None) -> torch.Tensor | None:
        if len(self._products) > 1:
            return None
        output: torch.Tensor | None = self._products[0].apply_gated(x, norm=norm)
        return output

    def apply_fused(
        self, x: torch.Tensor, *, norm: NormWeights | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        output: torch.Tensor = self._products[0].apply_fused(x, norm=norm, residual=residual)
        return output

    def weight_bytes(self) -> int:
        bias = 0 if self.bias is None else self.bias.nbytes
        return bias + sum(product.weight_bytes for product in self._products)


def cuts_a_group(spec: LinearSpec, group_size: int) -> bool:
    """Whether another rank has inputs of the first or last group here."""
    whole, ends = spec.all_in_features or spec.in_features, (spec.in_start, spec.in_start + spec.in_features)
    return any(end % group_size and end != whole for end in ends)


def regular_group(spec: LinearSpec, group_size: int, is_cut: bool) -> int | None:
    """As `PackedIntLinear.regular_group`, of inputs in order; is_cut: `cuts_a_group`, see `from_input`."""
    size = math.gcd(group_size, spec.in_start, spec.in_features) if is_cut else group_size
    return None if is_cut and size < _PADDED_GROUP else size


def check_scales(scales: torch.Tensor, name: str) -> None:
    if not bool(torch.isfinite(scales).all()):
        raise ModelError(f"{name}: scales are not finite; the checkpoint is broken")


def exact_scales(scales: torch.Tensor) -> torch.Tensor:
    """In 16 bits where that loses nothing: as they were stored."""
    for dtype in (torch.float16, torch.bfloat16):
        short = scales.to(dtype)
        if torch.equal(short.to(scales.dtype), scales):
            return short
    return scales


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [R, W] -> uint8 [R, W * 32 / bits], the lowest bits first. 3 bits: 32 numbers in three words, W a multiple
    of 3."""
    if bits != 3:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
        return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8).flatten(1)
    # The bits of three words in a row are 96, of which number i has 3 i to 3 i + 2.
    triples = words.to(torch.int64).unflatten(1, (-1, 3)) & 0xFFFFFFFF
    low = triples[..., 0] | (triples[..., 1] << 32)
    high = (triples[..., 1] >> 16) | (triples[..., 2] << 16)  # from bit 48 on
    shifts = torch.arange(0, 48, 3, device=words.device)
    parts = [(part.unsqueeze(-1) >> shifts) & 7 for part in (low, high)]
    return torch.cat(parts, dim=-1).to(torch.uint8).flatten(1)


def repeated(number: int, bits: int, device: torch.device) -> torch.Tensor:
    """The words that hold nothing but this number: int32 [1], or [3] of 3 bits."""
    count = 3 if bits == 3 else 1
    whole = sum(number << place for place in range(0, 32 * count, bits))
    words = [(whole >> (32 * index)) & 0xFFFFFFFF for index in range(count)]
    return torch.tensor(words, device=device).to(torch.int32)


def scale_of_random(bits: int, num_inputs: int) -> float:
    """With it, integers that are uniform about their zero make weights of variance 1 / inputs: activations keep their
    size."""
    return float(((4**bits - 1) / 12 + 0.25) * num_inputs) ** -0.5
