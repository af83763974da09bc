"""Linear layers by role: which of the checkpoint's matrices they merge, and which part of them is this rank's.

How the weights are held and multiplied is the quantization method's business. T rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from torch import nn

from shoal.config.parallel import virtual_shards
from shoal.errors import ConfigError
from shoal.layers.activation import GatedActivation
from shoal.layers.checkpoint import CheckpointTensor, whole
from shoal.layers.context import BuildContext
from shoal.layers.norm import RMSNorm, sum_over_ranks
from shoal.quantization.base import LinearSpec, LinearTensor


@dataclasses.dataclass(frozen=True)
class Part:
    """A matrix of the checkpoint, or some outputs of it: its name, its outputs in all, and those that are taken."""

    name: str
    out_features: int
    rows: slice


class Linear(nn.Module):
    """Several matrices of the checkpoint stacked along their outputs, so that one product serves them all."""

    def __init__(
        self,
        context: BuildContext,
        *,
        in_features: int,
        parts: list[Part],
        bias: bool,
        columns: slice | None = None,
        num_input_shards: int = 1,
        is_summand: bool = False,
        is_replicated: bool = False,
        has_bias_elsewhere: bool = False,
    ) -> None:
        super().__init__()
        self.deterministic = context.deterministic
        self.in_features = in_features
        self.parts = parts
        self.columns = columns or slice(0, in_features)
        spec = LinearSpec(
            in_features=self.columns.stop - self.columns.start,
            out_features=sum(part.rows.stop - part.rows.start for part in parts),
            bias=bias,
            dtype=context.dtype,
            device=context.device,
            deterministic=context.deterministic,
            num_input_shards=num_input_shards,
            is_summand=is_summand,
            is_replicated=is_replicated,
            has_bias_elsewhere=has_bias_elsewhere,
            all_in_features=in_features,
            in_start=self.columns.start,
            names=tuple(part.name for part in parts),
            part_sizes=tuple(part.rows.stop - part.rows.start for part in parts),
        )
        self.method = context.quantization.linear(spec)
        self.is_adapted = context.adapters is not None
        if context.adapters is not None:
            self.method = context.adapters.adapt(self.method, spec, parts, self.columns)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, inputs of this rank] -> [T, outputs of this rank]."""
        return self.method.apply(x)

    def fused(
        self, x: torch.Tensor, *, norm: RMSNorm | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, inputs], normalised on the way -> product plus residual [T, outputs]; T up to `method.fused_rows`."""
        return self.method.apply_fused(x, norm=None if norm is None else norm.weights, residual=residual)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        for tensor in self.method.tensors():
            start = 0
            for number, part in enumerate(self.parts):
                yield checkpoint_tensor(
                    tensor,
                    part,
                    number,
                    start,
                    is_last=number == len(self.parts) - 1,
                    in_features=self.in_features,
                    columns=self.columns,
                )
                start += part.rows.stop - part.rows.start

    def process_after_load(self) -> None:
        self.method.process_after_load()

    def weight_bytes(self) -> int:
        return self.method.weight_bytes()


def checkpoint_tensor(
    tensor: LinearTensor,
    part: Part,
    number: int,
    start: int,
    *,
    is_last: bool,
    in_features: int,
    columns: slice,
) -> CheckpointTensor:
    """Where a method's tensor takes its piece of `part`, the part of that number, whose outputs begin at `start` here.

    is_last: of the parts. columns: this rank's of the matrix's `in_features`. Raises ConfigError for a cut through a
    unit.
    """
    destination = tensor.data[number] if tensor.by_part else tensor.data
    shape = list(destination.shape)
    index = [slice(0, size) for size in shape]
    name = f"{part.name}.{tensor.suffix}"
    if (dim := tensor.out_dim) is not None:
        unit = tensor.out_unit
        shape[dim], index[dim] = _in_units(part.rows, part.out_features, unit, name, "outputs")
        own = slice(start, start + part.rows.stop - part.rows.start)
        _, place = _in_units(own, own.stop if is_last else -1, unit, name, "outputs")
        destination = destination.narrow(dim, place.start, place.stop - place.start)
    if (dim := tensor.in_dim) is not None:
        shape[dim], index[dim] = _in_units(columns, in_features, tensor.in_unit, name, "inputs")
    return CheckpointTensor(
        name=name,
        shape=tuple(shape),
        index=tuple(index),
        destination=destination,
        kind="bias" if tensor.suffix == "bias" else "matrix",
        optional=tensor.optional,
        fill=tensor.fill,
    )


def _in_units(own: slice, size: int, unit: int | Fraction, name: str, what: str) -> tuple[int, slice]:
    """`size` and `own` counted in elements that stand for `unit` each; the last one may stand for fewer.

    Raises ConfigError where a cut would go through an element.
    """
    if unit == 1:
        return size, own
    for cut in (own.start, own.stop):
        if (cut / Fraction(unit)).denominator != 1 and cut != size:
            raise ConfigError(
                f"{name}: the {what} of this rank are {own.start} to {own.stop}, and the checkpoint is quantized in "
                f"units of {unit} {what}; use fewer tensor parallel ranks"
            )
    return math.ceil(size / Fraction(unit)), slice(
        int(own.start / Fraction(unit)), math.ceil(own.stop / Fraction(unit))
    )


class ReplicatedLinear(Linear):
    """The whole matrix on every rank."""

    def __init__(self, context: BuildContext, name: str, in_features: int, out_features: int, *, bias: bool) -> None:
        part = Part(name, out_features, slice(0, out_features))
        several = context.parallel.tensor_size > 1
        super().__init__(context, in_features=in_features, parts=[part], bias=bias, is_replicated=several)


class ColumnLinear(Linear):
    """Outputs split over the ranks: each rank computes its own, nothing is summed."""

    def __init__(self, context: BuildContext, name: str, in_features: int, out_features: int, *, bias: bool) -> None:
        part = Part(name, out_features, context.parallel.tensor_slice(out_features, f"outputs of {name}"))
        super().__init__(context, in_features=in_features, parts=[part], bias=bias)


def _parts(prefix: str, names: str | Sequence[str], matrices: Sequence[tuple[int, slice]]) -> list[Part]:
    """matrices: outputs of each, and this rank's. names: of each in the checkpoint; or the name of one in which they
    stand one above the other."""
    if not isinstance(names, str):
        return [Part(f"{prefix}.{name}", size, own) for name, (size, own) in zip(names, matrices, strict=True)]
    total, parts, start = sum(size for size, _ in matrices), [], 0
    for size, own in matrices:
        parts.append(Part(f"{prefix}.{names}", total, slice(start + own.start, start + own.stop)))
        start += size
    return parts


class GateUpLinear(Linear):
    """The gate and up projections of a gated MLP, one above the other; in the checkpoint too, where `names` is one."""

    def __init__(
        self,
        context: BuildContext,
        prefix: str,
        hidden_size: int,
        intermediate_size: int,
        *,
        bias: bool,
        names: str | Sequence[str] = ("gate_proj", "up_proj"),
    ) -> None:
        rows = context.parallel.tensor_slice(intermediate_size, "intermediate_size")
        parts = _parts(prefix, names, [(intermediate_size, rows)] * 2)
        super().__init__(context, in_features=hidden_size, parts=parts, bias=bias)

    def gated(self, x: torch.Tensor, activation: GatedActivation, *, norm: RMSNorm | None = None) -> torch.Tensor:
        """x [T, H], normalised on the way where `fused` is there -> activation(gate) * up, [T, width of this rank]."""
        weights = None if norm is None else norm.weights
        fused = self.method.apply_gated(x, norm=weights) if activation.is_silu else None
        assert norm is None or fused is not None, "a product that takes no norm"
        return activation(self.method.apply(x)) if fused is None else fused


class QKVLinear(Linear):
    """Query, key and value projections, one above the other, split by heads; in the checkpoint they are one matrix
    where `names` is one name."""

    def __init__(
        self,
        context: BuildContext,
        prefix: str,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        bias: bool,
        names: str | Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    ) -> None:
        heads = context.parallel.tensor_slice(num_heads, "attention heads")
        kv_heads = context.parallel.kv_head_slice(num_kv_heads)
        matrices = [
            (count * head_dim, slice(own.start * head_dim, own.stop * head_dim))
            for count, own in ((num_heads, heads), (num_kv_heads, kv_heads), (num_kv_heads, kv_heads))
        ]
        parts = _parts(prefix, names, matrices)
        super().__init__(context, in_features=hidden_size, parts=parts, bias=bias)


class RowLinear(Linear):
    """Inputs split over the ranks: each rank's product is a summand, and all ranks get the sum.

    In deterministic mode on a CPU the summands are branches of one tree over virtual shards of the inputs, in fp32: its
    bits do not depend on how many ranks hold them. The bias is added to the sum, and only then it is rounded. On a GPU,
    where such a tree makes products of many rows three times as slow, the ranks gather the inputs, each computes a part
    of the outputs from all of them, and they gather those: `gathers`.

    leaves_sum: each rank gets its own summand, and the norm that takes it sums (`RMSNorm.add_and_norm`, `sums_ranks`).
    """

    def __init__(
        self,
        context: BuildContext,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        leaves_sum: bool = False,
    ) -> None:
        assert not (bias and leaves_sum), "a bias is added to the sum"
        num_ranks = context.parallel.tensor_size
        self.group = context.tensor_group
        self.is_split = num_ranks > 1
        self.gathers = self.is_split and context.deterministic and context.device.type == "cuda"
        self.leaves_sum = leaves_sum and not self.gathers
        self.dtype = context.dtype
        self.bias: torch.Tensor | None = None
        if context.deterministic and context.device.type == "cuda":
            rows = context.parallel.tensor_slice(out_features, f"outputs of {name}")
            super().__init__(context, in_features=in_features, parts=[Part(name, out_features, rows)], bias=bias)
            return
        columns = context.parallel.tensor_slice(in_features, f"inputs of {name}")
        num_shards = virtual_shards(in_features) if context.deterministic else num_ranks
        if num_shards % num_ranks:
            raise ConfigError(
                f"deterministic mode sums the {in_features} inputs of {name} in {num_shards} shards, which {num_ranks} "
                "ranks cannot share evenly; use fewer ranks, or --no-deterministic"
            )
        super().__init__(
            context,
            in_features=in_features,
            parts=[Part(name, out_features, slice(0, out_features))],
            bias=bias and not self.is_split,
            columns=columns,
            num_input_shards=num_shards // num_ranks,
            is_summand=self.is_split,
            has_bias_elsewhere=bias and self.is_split,
        )
        if bias and self.is_split:
            self.bias = torch.empty(out_features, dtype=context.dtype, device=context.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, inputs of this rank] -> [T, all outputs], summed unless `leaves_sum`."""
        if self.gathers:
            return self.group.all_gather(self.method.apply(self.group.all_gather(x)))
        summand = self.method.apply(x)
        if not self.is_split or self.leaves_sum:
            return summand
        if self.bias is None:
            return sum_over_ranks(self.group, summand, self.dtype, deterministic=self.deterministic)
        if not self.deterministic:
            return self.group.all_reduce(summand).add_(self.bias)
        return self.group.all_reduce_tree(summand.unsqueeze(0)).add_(self.bias).to(self.dtype)

    @property
    def can_start_sum(self) -> bool:
        """Whether what `forward` gives may be summed while other tokens are computed."""
        # Adapters know the step's tokens as they lie, not a half of them.
        alone = self.deterministic or self.is_adapted
        return self.leaves_sum and self.is_split and not alone

    def sum_ranks(self, summand: torch.Tensor) -> torch.Tensor:
        """What is left to do with what `forward` gave [T, all outputs]: the sum, of a layer that `leaves_sum`."""
        if not self.is_split or not self.leaves_sum:
            return summand
        return sum_over_ranks(self.group, summand, self.dtype, deterministic=self.deterministic)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        yield from super().checkpoint_tensors()
        if self.bias is not None:
            yield whole(f"{self.parts[0].name}.bias", self.bias, "bias")

    def weight_bytes(self) -> int:
        return super().weight_bytes() + (0 if self.bias is None else self.bias.nbytes)
