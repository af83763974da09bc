"""Which way a linear layer multiplies by a `PackedWeight`: measured once for a GPU, versions, shape and number of rows.

A `PackedChooser` for each device; quantization/packed_cuda.py makes a `PackedPlan` of a weight after loading. More than
BUCKETS[-1] rows are multiplied by the dequantized weight, piece by piece. N outputs, K inputs, M rows.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from triton.runtime.errors import OutOfResources

from shoal import env
from shoal.kernels.activation import silu_and_mul
from shoal.kernels.compile_ahead import is_compiling_ahead
from shoal.kernels.disk_cache import ChoiceCache, environment_of
from shoal.kernels.linear import MOST_SPLITS, Workspace
from shoal.kernels.norm import rms_norm
from shoal.kernels.packed_linear import (
    PackedConfig,
    PackedWeight,
    dequantize_packed,
    dot_rows,
    packed_linear,
)
from shoal.kernels.tuning import Norm, Timer, time_graph
from shoal.log import get_logger

_logger = get_logger(__name__)

# A choice serves the numbers of rows up to its bucket.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Up to so many rows the activation, the residual and the norm before cost nothing, or little.
FUSED_ROWS = 16
# Outputs, warps, stages of a program; the first is taken where nothing may be measured.
_SUMS = ((16, 4, 1), (8, 4, 1), (32, 4, 1), (32, 2, 1))
_FEW_DOTS = ((64, 4, 4), (16, 1, 4), (32, 1, 4))
_MANY_DOTS = ((128, 8, 3), (64, 4, 4), (128, 4, 3))
# Dequantized at a time.
_SCRATCH_BYTES = 64 << 20
_MEASURED_BYTES = 128 << 20
_MOST_LAUNCHES = 16
# The choice kept for "the dequantized weight is fastest".
_LIBRARY = "library"


class PackedPlan:
    """The ways to multiply by one weight. The best is measured when a number of rows first comes."""

    def __init__(
        self,
        chooser: PackedChooser,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        measures: bool = True,
    ) -> None:
        self.weight, self.bias, self.dtype = weight, bias, dtype
        self._chooser = chooser
        # Of layers that several ranks hold whole all must choose alike.
        self._measures = measures
        self._configs: dict[tuple[bool, int], PackedConfig | None] = {}

    def apply(self, x: torch.Tensor, *, residual: torch.Tensor | None = None, norm: Norm | None = None) -> torch.Tensor:
        """x [T, K] -> norm(x) W^T + bias + residual, [T, N]. norm: (weight [K], eps) of an RMSNorm of x."""
        return self._apply(x, False, residual, norm)

    def apply_gated(self, x: torch.Tensor, *, norm: Norm | None = None) -> torch.Tensor:
        """x [T, K], weight of N = 2 F outputs, the gate's first -> silu(gate) * up, [T, F]."""
        return self._apply(x, True, None, norm)

    def _apply(self, x: torch.Tensor, gated: bool, residual: torch.Tensor | None, norm: Norm | None) -> torch.Tensor:
        num_rows = x.shape[0]
        if num_rows == 0 or num_rows > BUCKETS[-1]:
            return self._by_library(x, gated, residual, norm)
        bucket = next(each for each in BUCKETS if num_rows <= each)
        if is_compiling_ahead():
            for candidate in self._chooser.possible(self, gated, bucket, self._measures):
                if candidate is not None:
                    self._run(x, candidate, gated, residual, norm)
                    self._run(x, candidate, gated, None, None)  # as it is measured
            return self._by_library(x, gated, residual, norm)
        config = self._config(bucket, gated)
        if config is None:
            return self._by_library(x, gated, residual, norm)
        return self._run(x, config, gated, residual, norm)

    def _run(
        self, x: torch.Tensor, config: PackedConfig, gated: bool, residual: torch.Tensor | None, norm: Norm | None
    ) -> torch.Tensor:
        if norm is not None and (config.kind != "sum" or config.num_splits > 1):
            x, norm = rms_norm(x, *norm), None
        activates_apart = gated and x.shape[0] > FUSED_ROWS
        output = packed_linear(
            x,
            self.weight,
            self.bias,
            config,
            self._chooser.workspace,
            gated=gated and not activates_apart,
            residual=residual,
            norm=norm,
        )
        return silu_and_mul(output) if activates_apart else output

    def _by_library(
        self, x: torch.Tensor, gated: bool, residual: torch.Tensor | None, norm: Norm | None
    ) -> torch.Tensor:
        if norm is not None:
            x = rms_norm(x, *norm)
        output = multiply_dequantized(x, self.weight, self.bias)
        if gated:
            output = silu_and_mul(output)
        return output if residual is None else output + residual

    def _config(self, bucket: int, gated: bool) -> PackedConfig | None:
        if (gated, bucket) not in self._configs:
            found, is_final = self._chooser.choose(self, gated, bucket, self._measures)
            if not is_final:
                return found
            self._configs[gated, bucket] = found
        return self._configs[gated, bucket]


def multiply_dequantized(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] -> x W^T + bias, [T, N]: a piece of the outputs after the other is dequantized, and cuBLAS multiplies."""
    num_outputs = weight.num_outputs
    step = outputs_at_a_time(weight, x.dtype)
    scratch = torch.empty(min(step, num_outputs), weight.num_inputs, dtype=x.dtype, device=x.device)
    if num_outputs <= step:
        dequantize_packed(weight, slice(0, num_outputs), scratch)
        return F.linear(x, scratch, bias)
    output = torch.empty(x.shape[0], num_outputs, dtype=x.dtype, device=x.device)
    for start in range(0, num_outputs, step):
        own = slice(start, min(start + step, num_outputs))
        piece = scratch[: own.stop - own.start]
        dequantize_packed(weight, own, piece)
        if bias is None:
            torch.mm(x, piece.t(), out=output[:, own])
        else:
            torch.addmm(bias[own], x, piece.t(), out=output[:, own])
    return output


def outputs_at_a_time(weight: PackedWeight, dtype: torch.dtype) -> int:
    """How many outputs are dequantized at a time: about equal pieces of a multiple of 256."""
    num_pieces = -(-weight.num_outputs * weight.num_inputs * dtype.itemsize // _SCRATCH_BYTES)
    return -(-weight.num_outputs // num_pieces // 256) * 256


class PackedChooser:
    """Chooses for all layers on one device; layers of one shape share a choice. Not for several threads."""

    def __init__(self, device: torch.device, cache: ChoiceCache | None, timer: Timer | None = None) -> None:
        self.device = device
        self.workspace = Workspace(device)
        self._cache = cache
        self._timer = timer or time_graph
        self._plans: dict[str, weakref.WeakSet[PackedPlan]] = {}
        self._choices: dict[str, PackedConfig | None] = {}

    def plan(
        self, weight: PackedWeight, bias: torch.Tensor | None, dtype: torch.dtype, *, measures: bool = True
    ) -> PackedPlan:
        """dtype: of what is multiplied, fp16 or bf16."""
        plan = PackedPlan(self, weight, bias, dtype, measures)
        self._plans.setdefault(_shape_key(plan), weakref.WeakSet()).add(plan)
        return plan

    def choose(
        self, plan: PackedPlan, gated: bool, bucket: int, measures: bool = True
    ) -> tuple[PackedConfig | None, bool]:
        """(the config, or None for the dequantized weight; whether that is final)."""
        candidates = self._candidates(plan, gated, bucket)
        if not measures:
            return candidates[0], True
        key = _key(plan, gated, bucket)
        if not self._knows(key, candidates):
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return candidates[0], False  # a measurement is a capture of its own
            self._choices[key] = self._fastest(plan, gated, bucket, candidates)
            if self._cache is not None:
                self._cache.put(key, [_label(self._choices[key]), *map(_label, candidates)])
        return self._choices[key], True

    def possible(self, plan: PackedPlan, gated: bool, bucket: int, measures: bool = True) -> list[PackedConfig | None]:
        """The chosen config where that is known, else all that may be chosen."""
        candidates = self._candidates(plan, gated, bucket)
        if not measures:
            return candidates[:1]
        key = _key(plan, gated, bucket)
        return [self._choices[key]] if self._knows(key, candidates) else candidates

    def _knows(self, key: str, candidates: list[PackedConfig | None]) -> bool:
        """Whether it was chosen before, in this process or in another, among the same candidates."""
        if key not in self._choices and self._cache is not None:
            kept = self._cache.get(key)
            for config in candidates:
                if kept == [_label(config), *map(_label, candidates)]:
                    self._choices[key] = config
        return key in self._choices

    def _candidates(self, plan: PackedPlan, gated: bool, bucket: int) -> list[PackedConfig | None]:
        num_multiprocessors = _num_multiprocessors(self.device)
        return candidates_for(bucket, plan.weight, gated, num_multiprocessors)

    def _fastest(
        self, plan: PackedPlan, gated: bool, bucket: int, candidates: list[PackedConfig | None]
    ) -> PackedConfig | None:
        """Times the candidates in graphs over the weights of this shape."""
        same_shape = list(self._plans[_shape_key(plan)])
        count = min(len(same_shape), _MOST_LAUNCHES, max(1, _MEASURED_BYTES // plan.weight.nbytes))
        x = torch.randn(bucket, plan.weight.num_inputs, dtype=plan.dtype, device=self.device)

        def chain(config: PackedConfig | None) -> Callable[[], None]:
            def run() -> None:
                for each in same_shape[:count]:
                    if config is None:
                        each._by_library(x, gated, None, None)
                    else:
                        each._run(x, config, gated, None, None)

            return run

        times = []
        for config in candidates:
            try:
                times.append((self._timer(chain(config)), config))
            except OutOfResources:
                continue  # more shared memory than this GPU has
        _logger.debug(
            "packed linear %s gated=%s rows=%d: %s",
            _shape_key(plan),
            gated,
            bucket,
            ", ".join(f"{_label(config)} {seconds / count * 1e6:.1f} us" for seconds, config in times),
        )
        return min(times, key=lambda pair: pair[0])[1]


@functools.cache
def packed_chooser(device: torch.device) -> PackedChooser:
    """The chooser of a CUDA device, with its choices in the cache directory."""
    return PackedChooser(device, ChoiceCache(env.cache_directory() / "packed-linear", environment_of(device)))


def candidates_for(
    bucket: int, weight: PackedWeight, gated: bool, num_multiprocessors: int
) -> list[PackedConfig | None]:
    """The few ways worth measuring for a number of rows and a shape; None: the dequantized weight."""
    num_outputs = weight.num_outputs // 2 if gated and bucket <= FUSED_ROWS else weight.num_outputs
    num_slabs = weight.words.shape[0]
    found: list[PackedConfig | None] = []
    kinds = [("sum", each) for each in (_SUMS if bucket == 1 else ())]
    kinds += [("dot", each) for each in (_FEW_DOTS if bucket <= FUSED_ROWS else _MANY_DOTS)]
    for kind, (block_n, warps, stages) in kinds:
        tiles = -(-num_outputs // block_n)
        row_tiles = triton.cdiv(bucket, dot_rows(bucket))
        # Warps of a "sum" share the slabs of a program; each should have a few.
        fewest_slabs = 4 * warps if kind == "sum" else 8
        splits = [1]
        while (
            2 * splits[-1] <= MOST_SPLITS
            and tiles * row_tiles * splits[-1] * warps < 16 * num_multiprocessors
            and num_slabs // (2 * splits[-1]) >= fewest_slabs
            and Workspace.holds(2 * splits[-1], bucket, weight.num_outputs, tiles * row_tiles)
        ):
            splits.append(2 * splits[-1])
        found += [PackedConfig(kind, block_n, warps, stages, each) for each in splits[-2:]]
    if bucket > FUSED_ROWS:
        found.append(None)
    return found


def _label(config: PackedConfig | None) -> str:
    return _LIBRARY if config is None else config.label


def _key(plan: PackedPlan, gated: bool, bucket: int) -> str:
    return f"{_shape_key(plan)} {'gated ' if gated else ''}rows={bucket}"


def _shape_key(plan: PackedPlan) -> str:
    weight = plan.weight
    scales, dtype = (str(each).removeprefix("torch.") for each in (weight.scales.dtype, plan.dtype))
    parts = [f"{weight.num_outputs}x{weight.num_inputs} {weight.bits} bits by {weight.group_size} {scales} {dtype}"]
    parts += ["zeros"] * (weight.zeros is not None) + ["bias"] * (plan.bias is not None)
    return " ".join(parts)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
