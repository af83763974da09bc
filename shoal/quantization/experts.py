"""Which product the experts of a quantized mixture get, of those whose experts a checkpoint holds one by one."""

from __future__ import annotations

import collections
import dataclasses
import importlib
from collections.abc import Callable, Iterator

import torch

from shoal.kernels.support import has_kernels
from shoal.log import get_logger, warn_once
from shoal.quantization.base import ExpertsMethod, ExpertsSpec, LinearMethod, LinearSpec, QuantizationScheme
from shoal.quantization.byte_linear import ByteMethod
from shoal.quantization.looped_experts import down_spec, gate_up_spec
from shoal.quantization.packed_int import PackedIntLinear
from shoal.quantization.unquantized import Unquantized, UnquantizedLinear

_logger = get_logger(__name__)
# Inputs of a block of bytes are a multiple: a product of the matrix units ends with a block.
_BLOCK_INPUTS = 32
# Those of a group of integers: groups share no word of an output.
_GROUP_INPUTS = 16


def grouped_experts(spec: ExpertsSpec, scheme: QuantizationScheme) -> ExpertsMethod | None:
    """All in one launch, where there are kernels for what the scheme makes of each; None: they are multiplied one by
    one, and where there are kernels for others the log says why."""
    if not has_kernels(spec.device):
        return None
    try:
        return _make_product(spec, scheme)
    except NoProductError as error:
        warn_once(
            _logger,
            f"experts are multiplied one by one, which takes many times longer, and without CUDA graphs: {error}",
        )
        return None


class NoProductError(Exception):
    """No product is for all experts of a layer; says why."""


def _make_product(spec: ExpertsSpec, scheme: QuantizationScheme) -> ExpertsMethod | None:
    # As the scheme would make them, without memory. A layer has hundreds of experts: the first one is asked, the others
    # are compared with it when they are made.
    meta = dataclasses.replace(spec, device=torch.device("meta"))
    first = scheme.linear(gate_up_spec(meta, 0)), scheme.linear(down_spec(meta, 0))
    reason = _why_no_product(spec, first)
    if reason is not None:
        raise NoProductError(reason)
    if isinstance(first[0], UnquantizedLinear):
        for make in (gate_up_spec, down_spec):
            collections.deque(linears_alike(meta, scheme, make), maxlen=0)
        return Unquantized().experts(spec)
    is_byte = isinstance(first[0], ByteMethod)
    name, kind = ("byte_experts", "ByteExperts") if is_byte else ("packed_experts", "PackedExperts")
    made: ExpertsMethod = getattr(importlib.import_module(f"shoal.quantization.{name}"), kind)(spec, scheme)
    return made


def linears_alike(
    spec: ExpertsSpec, scheme: QuantizationScheme, make: Callable[[ExpertsSpec, int], LinearSpec]
) -> Iterator[LinearMethod]:
    """Of each expert in turn the linear layer of a product, as the scheme makes it. Raises NoProductError at one that
    is not held like the first."""
    first: object = None
    for expert in range(spec.num_experts):
        method = scheme.linear(make(spec, expert))
        form = _form(method)
        if expert and form != first:
            raise NoProductError("the experts of a layer are not held alike")
        first = form
        yield method


def _why_no_product(spec: ExpertsSpec, methods: tuple[LinearMethod, LinearMethod]) -> str | None:
    if all(isinstance(method, UnquantizedLinear) for method in methods):
        return None
    if spec.deterministic:
        return "in deterministic mode only plain experts have a product for all; --no-deterministic leaves it off"
    if all(isinstance(method, ByteMethod) for method in methods):
        blocks = [method.held[1] for method in methods if isinstance(method, ByteMethod)]
        odd = next((block for block in blocks if block is not None and block[1] % _BLOCK_INPUTS), None)
        return None if odd is None else f"a scale is of {odd[1]} inputs, which is no multiple of {_BLOCK_INPUTS}"
    if not all(isinstance(method, PackedIntLinear) for method in methods):
        return "gate and up are quantized in another way than down, or only one of them is"
    if spec.dtype is torch.float32:
        return "integers in groups have a product for all experts in float16 and bfloat16 (--dtype), not in float32"
    groups = [method.regular_group for method in methods if isinstance(method, PackedIntLinear)]
    for group in groups:
        if group is None:
            return (
                "inputs are ordered by activation (desc_act, actorder), or tensor parallelism cuts their groups to "
                "fewer than 32, which --enable-expert-parallel does not"
            )
        if group % _GROUP_INPUTS:
            return f"a group has {group} inputs, which is no multiple of {_GROUP_INPUTS}"
    return None


def _form(method: LinearMethod) -> object:
    if isinstance(method, ByteMethod):
        return type(method), method.held
    if isinstance(method, PackedIntLinear):
        return type(method), method.bits, method.regular_group
    return type(method)
