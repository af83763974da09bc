"""Which product the experts of a quantized mixture get, of those whose experts a checkpoint holds one by one."""

from __future__ import annotations

import collections
import dataclasses
import importlib
from collections.abc import Callable, Iterator

import torch

from shoal.kernels.support import has_kernels
from shoal.quantization.base import ExpertsMethod, ExpertsSpec, LinearMethod, LinearSpec, QuantizationScheme
from shoal.quantization.byte_linear import ByteMethod
from shoal.quantization.looped_experts import down_spec, gate_up_spec
from shoal.quantization.packed_int import PackedIntLinear
from shoal.quantization.unquantized import Unquantized, UnquantizedLinear

# Inputs of a block of bytes are a multiple: a product of the matrix units ends with a block.
_BLOCK_INPUTS = 32
# Those of a group of integers: groups share no word of an output.
_GROUP_INPUTS = 16


def grouped_experts(spec: ExpertsSpec, scheme: QuantizationScheme) -> ExpertsMethod | None:
    """All in one launch, where there are kernels for what the scheme makes of each; None: they are multiplied one by
    one, as in deterministic mode, where only plain ones have a product for all."""
    if not has_kernels(spec.device):
        return None
    # As the scheme would make them, without memory. A layer has hundreds of experts: the first one is asked, the others
    # are compared with it when they are made.
    meta = dataclasses.replace(spec, device=torch.device("meta"))
    first = scheme.linear(gate_up_spec(meta, 0)), scheme.linear(down_spec(meta, 0))
    if not _has_product(spec, first):
        return None
    try:
        if isinstance(first[0], UnquantizedLinear):
            for make in (gate_up_spec, down_spec):
                collections.deque(linears_alike(meta, scheme, make), maxlen=0)
            return Unquantized().experts(spec)
        is_byte = isinstance(first[0], ByteMethod)
        name, kind = ("byte_experts", "ByteExperts") if is_byte else ("packed_experts", "PackedExperts")
        made: ExpertsMethod = getattr(importlib.import_module(f"shoal.quantization.{name}"), kind)(spec, scheme)
    except ExpertsDifferError:
        return None
    return made


class ExpertsDifferError(Exception):
    """The experts of a layer are not held alike: no product is for all of them."""


def linears_alike(
    spec: ExpertsSpec, scheme: QuantizationScheme, make: Callable[[ExpertsSpec, int], LinearSpec]
) -> Iterator[LinearMethod]:
    """Of each expert in turn the linear layer of a product, as the scheme makes it. Raises ExpertsDifferError at one
    that is not held like the first."""
    first: object = None
    for expert in range(spec.num_experts):
        method = scheme.linear(make(spec, expert))
        form = _form(method)
        if expert and form != first:
            raise ExpertsDifferError
        first = form
        yield method


def _has_product(spec: ExpertsSpec, methods: tuple[LinearMethod, LinearMethod]) -> bool:
    if all(isinstance(method, UnquantizedLinear) for method in methods):
        return True
    if spec.deterministic:
        return False
    if all(isinstance(method, ByteMethod) for method in methods):
        blocks = [method.held[1] for method in methods if isinstance(method, ByteMethod)]
        return all(block is None or block[1] % _BLOCK_INPUTS == 0 for block in blocks)
    if spec.dtype is torch.float32:
        return False
    groups = [method.regular_group if isinstance(method, PackedIntLinear) else None for method in methods]
    return all(group is not None and group % _GROUP_INPUTS == 0 for group in groups)


def _form(method: LinearMethod) -> object:
    if isinstance(method, ByteMethod):
        return type(method), method.held
    if isinstance(method, PackedIntLinear):
        return type(method), method.bits, method.regular_group
    return type(method)
