"""How a linear layer holds its weights and multiplies by them: the base of all quantization methods.

Used by layers/linear.py, which knows where the weights stand in a checkpoint and which part is this rank's.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

import torch


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """One linear layer on this rank. Sizes in elements.

    num_input_shards: above 1 for layers that are split along their inputs (row-parallel), in deterministic mode: the
    inputs are cut into that many pieces on this rank, whose products are summed in a fixed tree.
    is_summand: other ranks have the rest of the inputs, and whoever calls `apply` sums what they return: it is fp32 in
    deterministic mode, so that nothing is rounded before the sum. Such a layer has no bias of its own.
    is_replicated: other ranks hold the same weight and must get the same bits, so none chooses a kernel by itself.
    has_bias_elsewhere: the checkpoint has a bias for it, which whoever sums adds.
    all_in_features: inputs of the whole layer, of which `in_features` from `in_start` on are this rank's; 0: the same.
    names, part_sizes: the matrices of the checkpoint that are stacked here, and how many outputs each has on this rank.
    """

    in_features: int
    out_features: int
    bias: bool
    dtype: torch.dtype
    device: torch.device
    deterministic: bool = False
    num_input_shards: int = 1
    is_summand: bool = False
    is_replicated: bool = False
    has_bias_elsewhere: bool = False
    all_in_features: int = 0
    in_start: int = 0
    names: tuple[str, ...] = ()
    part_sizes: tuple[int, ...] = ()


# fill(whole tensor, generator on its device)
Fill = Callable[[torch.Tensor, torch.Generator], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearTensor:
    """A tensor that a method reads from the checkpoint: `<layer>.<suffix>`.

    out_dim, in_dim: dimensions of `data` that run along the layer's outputs and inputs; None where there is none.
    out_unit, in_unit: how many outputs or inputs one element stands for there: 8 of 4 bits in an int32, a scale's group
    or block (the last one may be smaller). 3-bit numbers lie 32 in three int32: Fraction(32, 3).
    by_part: `data` has a leading dimension of the layer's parts, each with a tensor of its own: a scale a matrix.
    optional: the checkpoint may lack it; `data` then keeps what it holds.
    fill: random values for the whole tensor as it is stored, where uniform floats are none; see weights/dummy.py.
    """

    suffix: str
    data: torch.Tensor
    out_dim: int | None
    in_dim: int | None
    out_unit: int | Fraction = 1
    in_unit: int | Fraction = 1
    by_part: bool = False
    optional: bool = False
    fill: Fill | None = None


# Weight and epsilon of an RMSNorm.
NormWeights = tuple[torch.Tensor, float]


class LinearMethod(abc.ABC):
    """The weights of one linear layer. Life: made, its `tensors` filled by the loader, processed once, then applied."""

    @abc.abstractmethod
    def tensors(self) -> list[LinearTensor]:
        """What the loader fills."""

    @abc.abstractmethod
    def process_after_load(self) -> None:
        """Bring the weights into the form that `apply` wants, and free the form that was loaded."""

    @abc.abstractmethod
    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, in_features] -> [T, out_features], in the layer's dtype (see `LinearSpec.is_summand`)."""

    def dense_weight(self) -> torch.Tensor:
        """The weight [out_features, in_features] in the layer's dtype, of a layer without bias. Called once, in place
        of `process_after_load`, by a layer that makes something else of it: the method is done with then."""
        self.process_after_load()
        spec: LinearSpec = self.spec  # type: ignore[attr-defined]
        return self.apply(torch.eye(spec.in_features, dtype=spec.dtype, device=spec.device)).T.contiguous()

    # Up to so many rows `apply_fused` exists, and `apply_gated` takes a norm.
    fused_rows: int = 0

    def apply_gated(self, x: torch.Tensor, *, norm: NormWeights | None = None) -> torch.Tensor | None:
        """Of a layer whose outputs are gates and then as many ups: silu(gate) * up, [T, out_features / 2], where this
        method has a product for it at this number of rows; else None."""
        return None

    def apply_fused(
        self, x: torch.Tensor, *, norm: NormWeights | None = None, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x [T, in_features], T up to `fused_rows`: the product of its RMSNorm, plus residual [T, out_features]."""
        raise NotImplementedError(f"{type(self).__name__} multiplies without norm and residual")

    @abc.abstractmethod
    def weight_bytes(self) -> int:
        """Memory that the weights take."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertActivation:
    """What stands between the two products of an expert. apply: gate_up [T, 2 F] -> [T, F], in PyTorch's operations.

    kind: what kernels have built in: "silu" is silu(gate) * up; "clamped" is (up' + 1) * gate' * sigmoid(alpha * gate')
    with gate' = min(gate, limit) and up' = clamp(up, -limit, limit); None: only `apply` knows it.
    """

    apply: Callable[[torch.Tensor], torch.Tensor]
    kind: str | None = None
    alpha: float = 1.0
    limit: float = float("inf")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """The experts of one layer on this rank, each down(activation(gate_up(x))). Sizes in elements, of this rank.

    num_experts: that are here, of all_experts of the layer; 0: the same. intermediate_size: of one expert here, from
    `intermediate_start` on of all_intermediate_size in the checkpoint; 0: the same. interleaved: gate_up gives gate and
    up by turns, else all gates first. gate_up_bias, down_bias: whether there are such here (of split experts one rank
    adds down's). num_input_shards, is_summand: of the down products, as in LinearSpec. gate_up_names: by expert, the
    matrices that are stacked; down_names: by expert. Experts that the checkpoint holds in one tensor all have its name.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    activation: ExpertActivation
    dtype: torch.dtype
    device: torch.device
    all_experts: int = 0
    all_intermediate_size: int = 0
    intermediate_start: int = 0
    interleaved: bool = False
    gate_up_bias: bool = False
    down_bias: bool = False
    deterministic: bool = False
    num_input_shards: int = 1
    is_summand: bool = False
    gate_up_names: tuple[tuple[str, ...], ...] = ()
    down_names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertTensor:
    """A tensor that an experts' method reads. part: of which product. expert: whose, counted from this rank's first;
    None: `tensor.data` has a leading dimension of all experts here, and all else is said of one of them."""

    part: Literal["gate_up", "down"]
    tensor: LinearTensor
    expert: int | None = None


class ExpertsMethod(abc.ABC):
    """The weights of a layer's experts on this rank. Life: as that of a LinearMethod.

    ids [T, k] below: experts counted from this rank's first; -1: not here. tokens int64 [num_experts]: how many each
    has got so far, which whoever applies adds to, on the device. follows_device: nothing waits for the host, so that a
    CUDA graph can hold it.
    """

    follows_device = False

    def __init__(self, spec: ExpertsSpec) -> None:
        self.spec = spec
        self.tokens = torch.zeros(spec.num_experts, dtype=torch.int64, device=spec.device)

    @abc.abstractmethod
    def tensors(self) -> list[ExpertTensor]:
        """What the loader fills."""

    def as_loaded(self) -> ExpertsMethod:
        """When all is loaded, before `process_after_load`: what takes its place from here on, mostly itself. Another
        one where the checkpoint holds what its config did not tell."""
        return self

    @abc.abstractmethod
    def process_after_load(self) -> None:
        """As of a LinearMethod."""

    @abc.abstractmethod
    def apply_pairs(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x [T, H] -> what each chosen expert gives, without weights, fp32 [T, k, H]; zeros where the id is -1. In
        deterministic mode a row's bits depend on nothing but the row."""

    def apply(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x [T, H], weights fp32 [T, k] -> the weighted sum of what the experts here give, [T, H], in x's dtype."""
        return weighted_sum(self.apply_pairs(x, ids), weights).to(x.dtype)

    @abc.abstractmethod
    def weight_bytes(self) -> int:
        """Memory that the weights take."""


def weighted_sum(pairs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """pairs fp32 [T, k, H], weights fp32 [T, k] -> fp32 [T, H], added in the order of k, product and sum apart: the
    same bits however many rows there are."""
    total = pairs[:, 0] * weights[:, 0, None]
    for index in range(1, weights.shape[1]):
        total += pairs[:, index] * weights[:, index, None]
    return total


class QuantizationScheme(abc.ABC):
    """Makes the methods of a model's linear layers, and of its experts where it has one product for several."""

    name: str

    @abc.abstractmethod
    def linear(self, spec: LinearSpec, weight: torch.Tensor | None = None) -> LinearMethod:
        """A method for one layer, plain where the checkpoint keeps it so (`LinearSpec.names`). With `weight`
        [out_features, in_features] (a tied embedding) nothing is loaded. Raises ConfigError or ModelError."""

    def experts(self, spec: ExpertsSpec) -> ExpertsMethod | None:
        """A method for the experts of a layer at once; None: each is two linear layers of this scheme
        (`quantization.looped_experts`). Raises ConfigError or ModelError."""
        return None
