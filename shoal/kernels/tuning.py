"""Which way a linear layer multiplies 1 to 16 rows: measured on the model's own weights, once for a GPU and versions.

A `LinearChooser` for each device; a linear layer of quantization/ makes a `LinearPlan` of its weight after loading and
applies it. A weight of one byte an element (FP8, INT8) has no library to compare with: what multiplies many rows by it
quantizes them. N outputs, K inputs, M rows.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from triton.runtime.errors import OutOfResources

from shoal import env
from shoal.kernels.activation import silu_and_mul
from shoal.kernels.compile_ahead import is_compiling_ahead
from shoal.kernels.disk_cache import ChoiceCache, environment_of
from shoal.kernels.linear import MAX_ROWS, MOST_SPLITS, ByteScales, LinearConfig, Workspace, skinny_linear
from shoal.kernels.norm import rms_norm
from shoal.log import get_logger

_logger = get_logger(__name__)

# A choice serves the numbers of rows up to its bucket.
BUCKETS = (1, 2, 4, 8, 16)
_DTYPES = (torch.bfloat16, torch.float16)
# A measurement passes over this many bytes of weights where the model has as many of the shape: more than an L2 holds.
_MEASURED_BYTES = 256 << 20
_MOST_LAUNCHES = 48
_NUM_REPLAYS = 4
# Outputs and inputs of a program's block, warps, stages; for sums by bucket. Each is compiled once or twice for a model
# (about 0.3 s), while splits and prefetched bytes are arguments and cost 3 ms of measuring.
_SUMS = {
    1: ((1, 1024, 4), (2, 1024, 4), (4, 1024, 4), (4, 512, 2)),
    2: ((2, 1024, 4), (4, 512, 2)),
    4: ((2, 1024, 4), (4, 512, 2)),
}
_DOTS = ((16, 256, 1, 4), (64, 128, 4, 4))
# Of weights of one byte (those that won on an H200, 2026-11); several rows of x in registers lose to matrix units.
_BYTE_SUMS = {1: ((1, 1024, 1), (1, 2048, 2), (4, 1024, 2))}
_BYTE_DOTS = ((64, 128, 4, 4), (64, 256, 4, 3), (64, 128, 2, 4), (32, 128, 2, 5), (32, 256, 2, 4))
# What a product asks into L2 (50 MB on an H100) while the one before it still runs: enough for the microseconds between
# them. With 32 KB a program, some 40 MB, products of 4096 x 4096 and 2560 x 8192 took 12 and 20 % longer (2026-11).
_PREFETCHED_BYTES = 12 << 20
# The choice kept for "cuBLAS is fastest".
_LIBRARY = "library"

Norm = tuple[torch.Tensor, float]
# Runs something and says how many seconds it takes on the device.
Timer = Callable[[Callable[[], None]], float]
Product = Callable[[torch.Tensor], torch.Tensor]


class LinearPlan:
    """The ways to multiply by one weight. The best is measured when a number of rows first comes, or by `prepare`."""

    # Up to so many rows norm and residual cost nothing, or little.
    fused_rows = MAX_ROWS

    def __init__(
        self,
        chooser: LinearChooser,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scales: ByteScales | None = None,
        dtype: torch.dtype | None = None,
        many: Product | None = None,
        measures: bool = True,
    ) -> None:
        """scales: of a weight of one byte; dtype: then that of x. many: multiplies any number of rows. measures: else
        the first way is taken, as all ranks with that weight must take the same."""
        self.weight, self.bias, self.scales = weight, bias, scales
        self.dtype = dtype or weight.dtype
        self.many: Product = many or functools.partial(F.linear, weight=weight, bias=bias)
        self._chooser = chooser
        self._measures = measures
        self._configs: dict[tuple[bool, int], LinearConfig | None] = {}

    def apply(
        self,
        x: torch.Tensor,
        *,
        residual: torch.Tensor | None = None,
        norm: Norm | None = None,
    ) -> torch.Tensor:
        """x [T, K] -> norm(x) W^T + bias + residual, [T, N]. norm: (weight [K], eps) of an RMSNorm of x."""
        return self._apply(x, False, residual, norm)

    def apply_gated(self, x: torch.Tensor, *, norm: Norm | None = None) -> torch.Tensor:
        """x [T, K], weight of N = 2 F rows, the gate's first -> silu(gate) * up, [T, F]."""
        return self._apply(x, True, None, norm)

    def _apply(
        self,
        x: torch.Tensor,
        gated: bool,
        residual: torch.Tensor | None,
        norm: Norm | None,
    ) -> torch.Tensor:
        num_rows = x.shape[0]
        if is_compiling_ahead() and 0 < num_rows <= MAX_ROWS:
            for candidate in self._chooser.possible(self, gated, num_rows):
                self._run(x, candidate, gated, residual, norm)
                self._run(x, candidate, gated, None, None)  # as it is measured
            return _library(x, self.many, gated, residual, norm)
        config = self._config(num_rows, gated) if 0 < num_rows <= MAX_ROWS else None
        if config is None:
            return _library(x, self.many, gated, residual, norm)
        return self._run(x, config, gated, residual, norm)

    def _run(
        self,
        x: torch.Tensor,
        config: LinearConfig,
        gated: bool,
        residual: torch.Tensor | None,
        norm: Norm | None,
    ) -> torch.Tensor:
        if norm is not None and config.kind != "sum":
            x, norm = rms_norm(x, *norm), None
        return skinny_linear(
            x,
            self.weight,
            self.bias,
            config,
            self._chooser.workspace,
            gated=gated,
            residual=residual,
            norm=norm,
            scales=self.scales,
        )

    def _config(self, num_rows: int, gated: bool) -> LinearConfig | None:
        bucket = _bucket(num_rows)
        if (gated, bucket) not in self._configs:
            if not self._measures:
                return self._chooser.candidates(self, gated, bucket)[0]
            found, is_measured = self._chooser.choose(self, gated, bucket)
            if not is_measured:
                return found
            self._configs[gated, bucket] = found
        return self._configs[gated, bucket]


class LinearChooser:
    """Chooses for all layers on one device; layers of one shape share a choice. Not for several threads."""

    def __init__(self, device: torch.device, cache: ChoiceCache | None, timer: Timer | None = None) -> None:
        self.device = device
        self.workspace = Workspace(device)
        self._cache = cache
        self._timer = timer or time_graph
        self._plans: dict[str, weakref.WeakSet[LinearPlan]] = {}
        self._choices: dict[str, LinearConfig | None] = {}

    def plan(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        scales: ByteScales | None = None,
        dtype: torch.dtype | None = None,
        many: Product | None = None,
        measures: bool = True,
    ) -> LinearPlan | None:
        """The plan for weight [N, K]; None where only the library multiplies (fp32, odd layouts). The rest as
        LinearPlan takes it."""
        aligned = weight.stride(-1) == 1 and weight.stride(0) * weight.itemsize % 16 == 0
        if (dtype or weight.dtype) not in _DTYPES or not aligned or weight.data_ptr() % 16:
            return None
        if scales is not None and scales.block is not None and scales.block[1] % 16:
            return None
        plan = LinearPlan(self, weight, bias, scales, dtype, many, measures)
        self._plans.setdefault(_shape_key(plan), weakref.WeakSet()).add(plan)
        return plan

    def choose(self, plan: LinearPlan, gated: bool, bucket: int) -> tuple[LinearConfig | None, bool]:
        """(the config, or None for the library; whether that is measured and final)."""
        key, candidates = _key(plan, gated, bucket), self.candidates(plan, gated, bucket)
        if not self._knows(key, candidates):
            if _is_capturing():
                return None, False  # a measurement is a capture of its own
            same_shape = list(self._plans[_shape_key(plan)])
            self._choices[key] = fastest(same_shape, bucket, gated, candidates, self.workspace, self._timer)
            if self._cache is not None:
                self._cache.put(key, [_label(self._choices[key]), *map(_label, candidates)])
        return self._choices[key], True

    def possible(self, plan: LinearPlan, gated: bool, num_rows: int) -> list[LinearConfig]:
        """The chosen config where that is known, else all that may be chosen."""
        bucket = _bucket(num_rows)
        key, candidates = _key(plan, gated, bucket), self.candidates(plan, gated, bucket)
        if not self._knows(key, candidates):
            return candidates
        chosen = self._choices[key]
        return [] if chosen is None else [chosen]

    def _knows(self, key: str, candidates: list[LinearConfig]) -> bool:
        """Whether it was chosen before, in this process or in another."""
        if key not in self._choices and self._cache is not None:
            kept = self._cache.get(key)
            for config in (None, *candidates):
                # The choice, and what it was chosen among: other candidates measure anew.
                if kept == [_label(config), *map(_label, candidates)]:
                    self._choices[key] = config
        return key in self._choices

    def candidates(self, plan: LinearPlan, gated: bool, bucket: int) -> list[LinearConfig]:
        rows, inputs = plan.weight.shape
        num_multiprocessors = _num_multiprocessors(self.device)
        if plan.scales is None:
            return candidates_for(bucket, rows, inputs, gated, num_multiprocessors)
        dots: Sequence[tuple[int, int, int, int]] = _BYTE_DOTS
        if plan.scales.block is not None:
            # A part of the sum ends with a block.
            most = plan.scales.block[1] & -plan.scales.block[1]
            dots = sorted({(block_n, min(block_k, most), warps, stages) for block_n, block_k, warps, stages in dots})
        sums = _BYTE_SUMS.get(bucket, ())
        return candidates_for(bucket, rows, inputs, gated, num_multiprocessors, sums, dots)


@functools.cache
def linear_chooser(device: torch.device) -> LinearChooser:
    """The chooser of a CUDA device, with its choices in the cache directory."""
    cache = ChoiceCache(env.cache_directory() / "linear", environment_of(device))
    return LinearChooser(device, cache)


def candidates_for(
    bucket: int,
    num_weight_rows: int,
    num_inputs: int,
    gated: bool,
    num_multiprocessors: int,
    sums: Sequence[tuple[int, int, int]] | None = None,
    dots: Sequence[tuple[int, int, int, int]] = _DOTS,
) -> list[LinearConfig]:
    """The few ways worth measuring for a number of rows and a shape: those that won somewhere (H100, 2026-11)."""
    num_outputs = num_weight_rows // 2 if gated else num_weight_rows
    found = []
    for block_n, block_k, warps in _SUMS.get(bucket, ()) if sums is None else sums:
        prefetch = _prefetch_for(-(-num_outputs // block_n), num_multiprocessors, gated)
        # Programs of one output start so fast that asking ahead does not pay.
        for num_bytes in (0, prefetch) if block_n > 1 else (0,):
            found.append(LinearConfig("sum", block_n, block_k, warps, prefetch_bytes=num_bytes))
    for block_n, block_k, warps, stages in dots if bucket > 1 or sums is not None else ():
        num_tiles = -(-num_outputs // block_n)
        most = 1
        while (
            most < MOST_SPLITS
            and num_tiles * most < 4 * num_multiprocessors
            and 2 * most * block_k <= num_inputs
            and Workspace.holds(2 * most, MAX_ROWS, num_weight_rows, num_tiles)
        ):
            most *= 2
        for num_splits in sorted({1, max(1, most // 2), most}):
            prefetch = _prefetch_for(num_tiles * num_splits, num_multiprocessors, gated)
            found.append(LinearConfig("dot", block_n, block_k, warps, stages, num_splits, prefetch))
    return found


def _prefetch_for(num_programs: int, num_multiprocessors: int, gated: bool) -> int:
    """Bytes for each of the programs that run at once: a power of two."""
    share = _PREFETCHED_BYTES // min(num_programs, 8 * num_multiprocessors) // (2 if gated else 1)
    return min(1 << 15, 1 << (share.bit_length() - 1))


def fastest(
    plans: list[LinearPlan],
    num_rows: int,
    gated: bool,
    candidates: list[LinearConfig],
    workspace: Workspace,
    timer: Timer,
) -> LinearConfig | None:
    """Times the candidates and the library in graphs over the weights of `plans`; None when the library is fastest."""
    weight = plans[0].weight
    x = torch.randn(num_rows, weight.shape[1], dtype=plans[0].dtype, device=weight.device)
    count = min(len(plans), _MOST_LAUNCHES, max(1, _MEASURED_BYTES // weight.nbytes))
    passes = max(1, 4 // count)

    def chain(config: LinearConfig | None) -> Callable[[], None]:
        def run() -> None:
            for plan in plans[:count] * passes:
                if config is None:
                    _library(x, plan.many, gated, None, None)
                else:
                    skinny_linear(x, plan.weight, plan.bias, config, workspace, gated=gated, scales=plan.scales)

        return run

    times = []
    for config in candidates if plans[0].scales is not None else (None, *candidates):
        try:
            times.append((timer(chain(config)), config))
        except OutOfResources:
            continue  # more shared memory than this GPU has
    best = min(times, key=lambda pair: pair[0])
    _logger.debug(
        "linear %s gated=%s rows=%d: %s",
        list(weight.shape),
        gated,
        num_rows,
        ", ".join(f"{_label(config)} {seconds / count / passes * 1e6:.1f} us" for seconds, config in times),
    )
    return best[1]


def time_graph(run: Callable[[], None]) -> float:
    """Seconds of one pass of `run` as a CUDA graph: the shortest of a few."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
        graph.replay()
        times = []
        for _ in range(_NUM_REPLAYS):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
    torch.cuda.current_stream().wait_stream(stream)
    return min(times)


def _library(
    x: torch.Tensor,
    multiply: Product,
    gated: bool,
    residual: torch.Tensor | None,
    norm: Norm | None,
) -> torch.Tensor:
    """The same by cuBLAS, or what else `multiply` is, and the kernels around it."""
    if norm is not None:
        x = rms_norm(x, *norm)
    product = multiply(x)
    if gated:
        product = silu_and_mul(product)
    if residual is not None:
        product = product + residual
    return product


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _label(config: LinearConfig | None) -> str:
    return _LIBRARY if config is None else config.label


def _key(plan: LinearPlan, gated: bool, bucket: int) -> str:
    return f"{_shape_key(plan)} {'gated ' if gated else ''}rows={bucket}"


def _bucket(num_rows: int) -> int:
    return next(each for each in BUCKETS if num_rows <= each)


def _shape_key(plan: LinearPlan) -> str:
    num_outputs, num_inputs = plan.weight.shape
    dtype = str(plan.weight.dtype).removeprefix("torch.")
    if plan.scales is not None:
        dtype = f"{dtype} {plan.scales.block or 'outputs'} {str(plan.dtype).removeprefix('torch.')}"
    return f"{num_outputs}x{num_inputs} {dtype}{'' if plan.bias is None else ' bias'}"


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
