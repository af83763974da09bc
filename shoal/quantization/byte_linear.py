"""Linear layers whose weights take a byte each, FP8 (e4m3) or INT8: what fp8, int8 and compressed_tensors share.

A weight is its numbers times scales: one for each output, or one for each block of outputs and inputs. What multiplies
by it is `byte_cpu` or `byte_cuda`. T rows, N outputs, K inputs, P matrices that are stacked.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
from collections.abc import Sequence
from typing import Any, Literal

import torch

from shoal.config.quantization import Activations
from shoal.errors import ModelError
from shoal.quantization.base import LinearMethod, LinearSpec, LinearTensor, NormWeights

# The largest number of a type.
MOST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
# Scale of random weights: numbers of all magnitudes are hit from 16 to 65536 inputs.
_RANDOM_SCALE = {torch.float8_e4m3fn: 2.0**-9, torch.int8: 2.0**-8}
# So many elements are converted at a time, so that what is converted takes little memory.
_CONVERTED = 1 << 24


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteFormat:
    """How a matrix lies in a checkpoint.

    scales: one for each matrix ("tensor"), output, or `block` of outputs and inputs. activations: in what a GPU
    quantizes the rows where they are many. scale_names, input_scale_names: the suffixes that their tensors may have.
    """

    dtype: torch.dtype
    scales: Literal["tensor", "channel", "block"]
    block: tuple[int, int] = (0, 0)
    activations: Activations = "none"
    scale_names: tuple[str, ...] = ("weight_scale",)
    input_scale_names: tuple[str, ...] = ("input_scale",)


@dataclasses.dataclass(frozen=True)
class ByteWeight:
    """numbers [N, K] of float8_e4m3fn or int8. scales fp32: [N], or [N / block, K / block], rounded up.

    input_scale: what the rows are divided by where that is fixed, fp32 [1].
    """

    numbers: torch.Tensor
    scales: torch.Tensor
    block: tuple[int, int] | None = None
    activations: Activations = "none"
    input_scale: torch.Tensor | None = None


class ByteMethod(LinearMethod):
    """What is the same however the weight is loaded: `weight` gives it."""

    def __init__(self, spec: LinearSpec) -> None:
        self.spec = spec
        self._product: Any = None
        # Where the numbers are or come to be, [N, K]; None: not yet.
        self.numbers: torch.Tensor | None = None
        self.bias = torch.empty(spec.out_features, dtype=spec.dtype, device=spec.device) if spec.bias else None

    def _bias_tensors(self) -> list[LinearTensor]:
        return [] if self.bias is None else [LinearTensor(suffix="bias", data=self.bias, out_dim=0, in_dim=None)]

    @property
    @abc.abstractmethod
    def held(self) -> tuple[torch.dtype, tuple[int, int] | None]:
        """Type of the numbers, block of the scales: what `weight` will say of them."""

    @abc.abstractmethod
    def weight(self) -> ByteWeight:
        """Called once, when all is loaded. Raises ModelError for what no weight is."""

    def process_after_load(self) -> None:
        weight = self.weight()
        self._weight_bytes = weight.numbers.nbytes + weight.scales.nbytes
        name = "byte_cuda" if self.spec.device.type == "cuda" else "byte_cpu"
        module = importlib.import_module(f"shoal.quantization.{name}")
        self._product = module.create_product(self.spec, weight, self.bias)
        self.fused_rows = 0 if self.spec.is_summand else self._product.fused_rows

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self._product.apply(x)
        return output

    def dense_weight(self) -> torch.Tensor:
        weight = self.weight()
        scales = weight.scales.unsqueeze(1)
        if weight.block is not None:
            outputs, inputs = weight.numbers.shape
            scales = weight.scales.repeat_interleave(weight.block[0], 0)[:outputs]
            scales = scales.repeat_interleave(weight.block[1], 1)[:, :inputs]
        return weight.numbers.float().mul_(scales).to(self.spec.dtype)

    def apply_gated(self, x: torch.Tensor, *, norm: NormWeights | None = None) -> torch.Tensor | None:
        output: torch.Tensor | None = self._product.apply_gated(x, norm=norm)
        return output

    def apply_fused(
        self, x: torch.Tensor, *, norm: NormWeights | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        output: torch.Tensor = self._product.apply_fused(x, norm=norm, residual=residual)
        return output

    def weight_bytes(self) -> int:
        return self._weight_bytes + (0 if self.bias is None else self.bias.nbytes)


class ByteLinear(ByteMethod):
    """A weight that is stored so."""

    def __init__(self, spec: LinearSpec, form: ByteFormat) -> None:
        super().__init__(spec)
        self.form = form
        outputs, inputs = spec.out_features, spec.in_features
        self.numbers = torch.empty(outputs, inputs, dtype=form.dtype, device=spec.device)
        shape: tuple[int, ...] = (outputs, 1)
        if form.scales == "tensor":
            shape = (max(1, len(spec.part_sizes)),)
        elif form.scales == "block":
            shape = (-(-outputs // form.block[0]), -(-inputs // form.block[1]))
        self.scales = _unread(shape, form.scale_names, spec)
        self.input_scales: dict[str, torch.Tensor] = {}
        if form.activations == "static_tensor":
            self.input_scales = _unread((max(1, len(spec.part_sizes)),), form.input_scale_names, spec)

    @property
    def held(self) -> tuple[torch.dtype, tuple[int, int] | None]:
        return self.form.dtype, self.form.block if self.form.scales == "block" else None

    def tensors(self) -> list[LinearTensor]:
        form = self.form
        assert self.numbers is not None
        weight = LinearTensor(suffix="weight", data=self.numbers, out_dim=0, in_dim=1, fill=fill_numbers)
        found = [weight, *self._bias_tensors()]
        units: dict[str, Any] = {"out_dim": 0, "in_dim": None}
        if form.scales == "tensor":
            units = {"out_dim": None, "in_dim": None, "by_part": True}
        elif form.scales == "block":
            units = {"out_dim": 0, "in_dim": 1, "out_unit": form.block[0], "in_unit": form.block[1]}
        random = _RANDOM_SCALE[form.dtype]
        several = len(self.scales) > 1
        for suffix, data in self.scales.items():
            found.append(
                LinearTensor(
                    suffix=suffix, data=data, optional=several, fill=lambda whole, _: whole.fill_(random), **units
                )
            )
        several = len(self.input_scales) > 1
        most = 16 / MOST[form.dtype]  # of normalised rows few elements are larger
        for suffix, data in self.input_scales.items():
            found.append(
                LinearTensor(
                    suffix=suffix, data=data, out_dim=None, in_dim=None, by_part=True, optional=several,
                    fill=lambda whole, _: whole.fill_(most),
                )
            )  # fmt: skip
        return found

    def weight(self) -> ByteWeight:
        numbers, form = self.numbers, self.form
        assert numbers is not None
        self.numbers = None
        scales = _read(self.scales, self.spec)
        self.scales = {}
        check_scales(scales, self.spec, "weight_scale", numbers, form.block if form.scales == "block" else None)
        if form.scales == "tensor":
            sizes = torch.tensor(self.spec.part_sizes or (self.spec.out_features,), device=scales.device)
            scales = scales.repeat_interleave(sizes)
        input_scale = None
        if self.input_scales:
            input_scale = _read(self.input_scales, self.spec)
            check_scales(input_scale, self.spec, "input_scale")
            input_scale = input_scale.max().reshape(1)  # one for all matrices that read the same rows
            self.input_scales = {}
        if form.scales == "block":
            return ByteWeight(numbers, scales, form.block, form.activations)
        return ByteWeight(numbers, scales.reshape(-1).contiguous(), None, form.activations, input_scale)


class QuantizedWhileLoading(ByteMethod):
    """A plain weight that is quantized as soon as it is loaded: a scale for each output, rows by themselves.

    It is loaded into the host's memory, which is taken when it is written: so a layer's plain weight is there only from
    its reading to its quantizing. In deterministic mode on a CPU each shard of the inputs has scales of its own, the
    same whichever rank holds it.
    """

    def __init__(self, spec: LinearSpec, dtype: torch.dtype) -> None:
        super().__init__(spec)
        self.dtype = dtype
        self.plain = torch.empty(spec.out_features, spec.in_features, dtype=spec.dtype, device="cpu")

    @property
    def held(self) -> tuple[torch.dtype, tuple[int, int] | None]:
        shards = self.spec.num_input_shards
        return self.dtype, (1, self.spec.in_features // shards) if shards > 1 else None

    def tensors(self) -> list[LinearTensor]:
        weight = LinearTensor(suffix="weight", data=self.plain, out_dim=0, in_dim=1, fill=self._fill)
        return [weight, *self._bias_tensors()]

    def _fill(self, whole: torch.Tensor, generator: torch.Generator) -> None:
        """Made on the device, since a host takes minutes for a large model."""
        bound = (3.0 / whole.shape[-1]) ** 0.5
        seed = int(torch.randint(1 << 31, (), generator=generator))
        own = torch.Generator(self.spec.device).manual_seed(seed)
        for rows in _pieces(whole):
            made = torch.empty(rows.shape, dtype=rows.dtype, device=self.spec.device)
            rows.copy_(made.uniform_(-bound, bound, generator=own))

    def weight(self) -> ByteWeight:
        spec, plain, numbers = self.spec, self.plain, self.numbers
        del self.plain
        num_shards = spec.num_input_shards
        if numbers is None:
            numbers = torch.empty(plain.shape, dtype=self.dtype, device=spec.device)
        self.numbers = None
        scales = torch.empty(spec.out_features, num_shards, device=spec.device)
        start = 0
        for piece in _pieces(plain):
            own = slice(start, start + piece.shape[0])
            start = own.stop
            scales[own] = quantize(piece.to(spec.device), numbers[own], num_shards)
        if not bool(scales.isfinite().all()):
            raise ModelError(f"{_names(spec)}: the weight that is to be quantized holds numbers that are not finite")
        if num_shards > 1:
            return ByteWeight(numbers, scales, self.held[1], "none")
        return ByteWeight(numbers, scales.view(-1), None, "dynamic_token")


def quantize(plain: torch.Tensor, numbers: torch.Tensor, num_shards: int = 1) -> torch.Tensor:
    """plain [N, K] -> numbers [N, K], and returns scales fp32 [N, num_shards]: the largest of a shard becomes MOST."""
    most = MOST[numbers.dtype]
    values = plain.float().view(plain.shape[0], num_shards, -1)
    # A row of zeros has a scale too. Divided by a tensor, a GPU gives a CPU's bits; by a number it multiplies.
    scales = values.abs().amax(dim=2).clamp_(min=torch.finfo(torch.float32).tiny * most)
    scales /= torch.tensor(float(most), device=plain.device)
    quantized = (values / scales.unsqueeze(2)).view(plain.shape)
    if numbers.dtype is torch.int8:
        quantized = quantized.round_()
    numbers.copy_(quantized.clamp_(-most, most))
    return scales


def fill_numbers(whole: torch.Tensor, generator: torch.Generator) -> None:
    """Numbers that times their random scale have the variance of 1 / inputs."""
    most = MOST[whole.dtype]
    bound = min(most, (3.0 / whole.shape[-1]) ** 0.5 / _RANDOM_SCALE[whole.dtype])
    for rows in _pieces(whole):
        made = torch.empty(rows.shape, device=whole.device).uniform_(-bound, bound, generator=generator)
        rows.copy_(made.round_() if whole.dtype is torch.int8 else made)


def check_scales(
    scales: torch.Tensor,
    spec: LinearSpec,
    what: str,
    numbers: torch.Tensor | None = None,
    block: tuple[int, int] | None = None,
) -> None:
    """Raise ModelError unless all are finite and positive; 0 where all that it is for is 0, as makers write rows of
    zeros, and as the padding of a head is."""
    if not bool(scales.isfinite().all()):
        raise ModelError(f"{_names(spec)}: {what} holds numbers that are not finite; the checkpoint is broken")
    lowest = float(scales.min())
    if lowest < 0 or (lowest == 0 and (numbers is None or _is_used(scales, numbers, block))):
        raise ModelError(f"{_names(spec)}: {what} holds {lowest:g}; scales are positive: the checkpoint is broken")


def _is_used(scales: torch.Tensor, numbers: torch.Tensor, block: tuple[int, int] | None) -> bool:
    """Whether a scale that is 0 is one for numbers that are not. FP8 knows no more of itself than its bits."""
    used = numbers.view(torch.uint8) & 0x7F != 0 if numbers.dtype is torch.float8_e4m3fn else numbers != 0
    if block is None:
        if scales.numel() != numbers.shape[0]:  # a scale for the whole matrix
            return True
        return bool((used.any(dim=1) & (scales.reshape(-1) == 0)).any())
    zero = (scales == 0).repeat_interleave(block[0], 0)[: numbers.shape[0]]
    return bool((used & zero.repeat_interleave(block[1], 1)[:, : numbers.shape[1]]).any())


def _unread(shape: Sequence[int], names: Sequence[str], spec: LinearSpec) -> dict[str, torch.Tensor]:
    return {name: torch.full(tuple(shape), torch.nan, dtype=torch.float32, device=spec.device) for name in names}


def _read(tensors: dict[str, torch.Tensor], spec: LinearSpec) -> torch.Tensor:
    """What the checkpoint has, under any of the names."""
    first, *others = tensors.values()
    for other in others:
        first = torch.where(first.isnan(), other, first)
    if bool(first.isnan().any()):
        raise ModelError(f"{_names(spec)}: the checkpoint lacks {' or '.join(tensors)}, or holds NaN there")
    return first


def _names(spec: LinearSpec) -> str:
    return ", ".join(spec.names) or "a linear layer"


def _pieces(matrix: torch.Tensor) -> Sequence[torch.Tensor]:
    return matrix.split(max(1, _CONVERTED // max(1, matrix.shape[1])))
