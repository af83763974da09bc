"""Which way a linear layer multiplies by a `PackedWeight`: measured once for a GPU, versions, shape and number of rows.

A `PackedChooser` for each device; quantization/packed_cuda.py makes a `PackedPlan` of a weight after loading. More than
BUCKETS[-1] rows are multiplied by the dequantized weight, piece by piece. N outputs, K inputs, M rows.
"""

from __future__ import annotations

import dataclasses
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
from shoal.kernels.packed_linear import PackedConfig, dot_rows, packed_linear, takes_rows
from shoal.kernels.packed_rows import MOST_ROWS
from shoal.kernels.packed_weight import PackedWeight, dequantize_packed
from shoal.kernels.tuning import Norm, Timer, time_graph
from shoal.log import get_logger

_logger = get_logger(__name__)

# A choice serves the numbers of rows up to its bucket.
BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# Up to so many rows the activation, the residual and the norm before cost nothing, or little.
FUSED_ROWS = 16
# Outputs, warps, stages of a program, whether it prefetches.
_ROWS = (
    (16, 2, 2, False), (16, 2, 2, True), (16, 2, 1, False), (32, 4, 1, False), (32, 2, 1, True), (16, 1, 2, True),
    (16, 1, 1, True),
)  # fmt: skip
_SUMS = ((16, 4, 1), (32, 4, 1), (32, 2, 1), (16, 8, 1), (64, 2, 1))
_FEW_DOTS = ((128, 4, 4), (64, 4, 5))
_MORE_DOTS = ((128, 4, 3), (256, 8, 3), (128, 8, 3))  # up to 64 rows
_MANY_DOTS = ((128, 4, 3), (256, 8, 3))
# Dequantized at a time.
_SCRATCH_BYTES = 64 << 20
_MEASURED_BYTES = 128 << 20
_MOST_LAUNCHES = 16
# The choice kept for "the dequantized weight is fastest".
_LIBRARY = "library"


@dataclasses.dataclass(frozen=True)
class Case:
    """What a choice is for: rows up to `bucket`, an activation after the product, a norm before it."""

    bucket: int
    gated: bool
    has_norm: bool


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
        self.measures = measures
        self._configs: dict[Case, PackedConfig | None] = {}

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
        case = Case(next(each for each in BUCKETS if num_rows <= each), gated, norm is not None)
        if is_compiling_ahead():
            for candidate in self._chooser.possible(self, case):
                if candidate is not None:
                    self._run(x, candidate, gated, residual, norm)
                    self._run(x, candidate, gated, None, norm)  # as it is measured
            return self._by_library(x, gated, residual, norm)
        config = self._config(case)
        if config is None:
            return self._by_library(x, gated, residual, norm)
        return self._run(x, config, gated, residual, norm)

    def _run(
        self, x: torch.Tensor, config: PackedConfig, gated: bool, residual: torch.Tensor | None, norm: Norm | None
    ) -> torch.Tensor:
        if norm is not None and not config.takes_norm:
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

    def _config(self, case: Case) -> PackedConfig | None:
        if case not in self._configs:
            found, is_final = self._chooser.choose(self, case)
            if not is_final:
                return found
            self._configs[case] = found
        return self._configs[case]


def multiply_dequantized(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """x [T, K] -> x W^T + bias, [T, N]: one piece of the outputs after the other is dequantized, and cuBLAS
    multiplies."""
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

    def choose(self, plan: PackedPlan, case: Case) -> tuple[PackedConfig | None, bool]:
        """(the config, or None for the dequantized weight; whether that is final)."""
        candidates = self._candidates(plan, case)
        if not plan.measures:
            return _unmeasured(candidates), True
        key = _key(plan, case)
        if not self._knows(key, candidates):
            if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
                return _unmeasured(candidates), False  # a measurement is a capture of its own
            self._choices[key] = self._fastest(plan, case, candidates)
            if self._cache is not None:
                self._cache.put(key, [_label(self._choices[key]), *map(_label, candidates)])
        return self._choices[key], True

    def possible(self, plan: PackedPlan, case: Case) -> list[PackedConfig | None]:
        """The chosen config where that is known, else all that may be chosen."""
        candidates = self._candidates(plan, case)
        if not plan.measures:
            return [_unmeasured(candidates)]
        key = _key(plan, case)
        return [self._choices[key]] if self._knows(key, candidates) else candidates

    def _knows(self, key: str, candidates: list[PackedConfig | None]) -> bool:
        """Whether it was chosen before, in this process or in another, among the same candidates."""
        if key not in self._choices and self._cache is not None:
            kept = self._cache.get(key)
            for config in candidates:
                if kept == [_label(config), *map(_label, candidates)]:
                    self._choices[key] = config
        return key in self._choices

    def _candidates(self, plan: PackedPlan, case: Case) -> list[PackedConfig | None]:
        return candidates_for(case, plan.weight, _num_multiprocessors(self.device))

    def _fastest(self, plan: PackedPlan, case: Case, candidates: list[PackedConfig | None]) -> PackedConfig | None:
        """Times the candidates in graphs over the weights of this shape."""
        same_shape = list(self._plans[_shape_key(plan)])
        count = min(len(same_shape), _MOST_LAUNCHES, max(1, _MEASURED_BYTES // plan.weight.nbytes))
        x = torch.randn(case.bucket, plan.weight.num_inputs, dtype=plan.dtype, device=self.device)
        norm = (torch.ones_like(x[0]), 1e-6) if case.has_norm else None

        def chain(config: PackedConfig | None) -> Callable[[], None]:
            def run() -> None:
                for each in same_shape[:count]:
                    if config is None:
                        each._by_library(x, case.gated, None, norm)
                    else:
                        each._run(x, config, case.gated, None, norm)

            return run

        times = []
        expected = plan._by_library(x, case.gated, None, norm).float()
        for config in candidates:
            try:
                if not _is_right(plan, config, x, case.gated, norm, expected):
                    _logger.warning("packed linear %s: %s gives wrong results here", _key(plan, case), _label(config))
                    continue
                times.append((self._timer(chain(config)), config))
            except OutOfResources:
                continue  # more shared memory than this GPU has
        _logger.debug(
            "packed linear %s: %s",
            _key(plan, case),
            ", ".join(f"{_label(config)} {seconds / count * 1e6:.1f} us" for seconds, config in times),
        )
        return min(times, key=lambda pair: pair[0])[1]


def _is_right(
    plan: PackedPlan,
    config: PackedConfig | None,
    x: torch.Tensor,
    gated: bool,
    norm: Norm | None,
    expected: torch.Tensor,
) -> bool:
    """Whether the compiler laid tensors out as the kernel needs, where that matters: the very kernel that is asked
    about. expected: by the dequantized weight."""
    if config is None or config.kind != "rows":
        return True
    found = plan._run(x, config, gated, None, norm).float()
    return bool((found - expected).norm() <= 0.05 * expected.norm())


@functools.cache
def packed_chooser(device: torch.device) -> PackedChooser:
    """The chooser of a CUDA device, with its choices in the cache directory."""
    return PackedChooser(device, ChoiceCache(env.cache_directory() / "packed-linear", environment_of(device)))


def candidates_for(case: Case, weight: PackedWeight, num_multiprocessors: int) -> list[PackedConfig | None]:
    """The few ways worth measuring for a number of rows and a shape; None: the dequantized weight."""
    bucket = case.bucket
    num_outputs = weight.num_outputs // 2 if case.gated and bucket <= FUSED_ROWS else weight.num_outputs
    num_slabs = weight.words.shape[0]
    found: list[PackedConfig | None] = []
    if bucket <= MOST_ROWS and takes_rows(weight):
        kinds = [("rows", each) for each in _ROWS]
        kinds += [("sum", (*each, False)) for each in (_SUMS[:1] if bucket == 1 else ())]
        kinds.append(("dot", (*_FEW_DOTS[0], False)))
    else:
        dots = _FEW_DOTS if bucket <= FUSED_ROWS else _MORE_DOTS if bucket <= 64 else _MANY_DOTS
        kinds = [("sum", (*each, False)) for each in (_SUMS if bucket == 1 else ())]
        kinds += [("dot", (*each, False)) for each in dots]
    for kind, (block_n, warps, stages, prefetches) in kinds:
        tiles = -(-num_outputs // block_n)
        row_tiles = triton.cdiv(bucket, dot_rows(bucket))
        # Warps of all but a "dot" share the slabs of a program; each should have a few.
        fewest_slabs = 8 if kind == "dot" else 2 * warps
        splits = [1]
        while (
            2 * splits[-1] <= MOST_SPLITS
            and tiles * row_tiles * splits[-1] * warps < 16 * num_multiprocessors
            and num_slabs // (2 * splits[-1]) >= fewest_slabs
            and Workspace.holds(2 * splits[-1], bucket, weight.num_outputs, tiles * row_tiles)
        ):
            splits.append(2 * splits[-1])
        takes_norm = kind == "rows" and case.has_norm
        found += [PackedConfig(kind, block_n, warps, stages, each, takes_norm, prefetches) for each in splits[-2:]]
        if kind == "sum" and case.has_norm:
            found.append(PackedConfig(kind, block_n, warps, stages, takes_norm=True))
    if bucket > 64:
        found.append(None)
    return found


def _unmeasured(candidates: list[PackedConfig | None]) -> PackedConfig | None:
    """What is taken without a measurement, and so without a look at whether it is right."""
    return next(config for config in candidates if config is None or config.kind != "rows")


def _label(config: PackedConfig | None) -> str:
    return _LIBRARY if config is None else config.label


def _key(plan: PackedPlan, case: Case) -> str:
    extras = f"{' gated' * case.gated}{' norm' * case.has_norm}"
    return f"{_shape_key(plan)}{extras} rows={case.bucket}"


def _shape_key(plan: PackedPlan) -> str:
    weight = plan.weight
    scales, dtype = (str(each).removeprefix("torch.") for each in (weight.scales.dtype, plan.dtype))
    parts = [f"{weight.num_outputs}x{weight.num_inputs} {weight.bits} bits by {weight.group_size} {scales} {dtype}"]
    parts += ["zeros"] * (weight.zeros is not None) + ["bias"] * (plan.bias is not None)
    return " ".join(parts)


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
