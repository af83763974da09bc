"""Mixtures of experts: each token goes to a few of many MLPs, and their outputs are summed with weights.

What a family puts together:

    experts = RoutedExperts(context, f"{prefix}.experts", num_experts=…, hidden_size=…, intermediate_size=…,
                            activation=expert_activation(context, "silu"))
    moe = MixtureOfExperts(Router(context, f"{prefix}.gate", hidden_size, num_experts), SoftmaxTopK(8, normalize=True),
                           experts, SharedExpert(context, f"{prefix}.shared_expert", …) or None)

- **Routing** is any function logits [T, E] -> (weights fp32 [T, k], ids [T, k]): see `layers.routing.Routing`.
- **Activation** is an `ExpertActivation`: `expert_activation` by a config's name, `clamped_swiglu`, or one's own.
- **Where the checkpoint has the experts**: `ExpertNames`, one tensor for each or one for all of a layer. `interleaved`:
  gate and up by turns. `bias`: of both products. How they are held is the scheme's business (`ExpertsMethod`).
- **Ranks** split every expert's width (tensor parallel), or hold whole experts (`parallel.expert_parallel`), and sum.
  Without deterministic mode a rank's own summand is handed on (`leaves_sum`), as by a row-parallel layer.

T rows, E experts, k of them a row, H hidden size, F width of an expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

from shoal.config.parallel import virtual_shards
from shoal.errors import ConfigError
from shoal.layers.activation import GatedActivation, activation
from shoal.layers.checkpoint import CheckpointTensor
from shoal.layers.context import BuildContext
from shoal.layers.linear import GateUpLinear, Part, ReplicatedLinear, RowLinear, checkpoint_tensor
from shoal.layers.norm import RMSNorm, sum_over_ranks
from shoal.layers.routing import Routing
from shoal.quantization.base import ExpertActivation, ExpertsSpec, ExpertTensor, LinearTensor, weighted_sum
from shoal.quantization.looped_experts import LoopedExperts
from shoal.quantization.unquantized import Unquantized

# Deterministic mode on several ranks sums what each expert gave over the ranks: so many rows at a time.
_ROWS_AT_ONCE = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """What the matrices are called behind the experts' prefix: `3.gate_proj.weight`, or, where one tensor holds all
    experts (`is_stacked`), `gate_up_proj`, `gate_up_proj_bias`, `gate_up_proj_scales`.

    gate_up: one name where gate and up are one matrix. is_transposed: stacked weights are [E, inputs, outputs].
    """

    gate_up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    is_stacked: bool = False
    is_transposed: bool = False

    def module(self, prefix: str, expert: int, matrix: str) -> str:
        return f"{prefix}.{matrix}" if self.is_stacked else f"{prefix}.{expert}.{matrix}"


def expert_activation(context: BuildContext, name: str) -> ExpertActivation:
    """activation(gate) * up, by the name in config.json. Raises ModelError for an unknown one."""
    gated = GatedActivation(context, name)
    return ExpertActivation(apply=gated, kind="silu" if gated.is_silu else None)


def clamped_swiglu(context: BuildContext, *, alpha: float, limit: float, interleaved: bool) -> ExpertActivation:
    """(up' + 1) * gate' * sigmoid(alpha * gate'), with gate' = min(gate, limit), up' = clamp(up, -limit, limit)."""
    sigmoid = activation("sigmoid", context.deterministic and context.device.type == "cpu")

    def apply(gate_up: torch.Tensor) -> torch.Tensor:
        if interleaved:
            gate, up = gate_up[:, ::2], gate_up[:, 1::2]
        else:
            gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * (gate * sigmoid(gate * alpha))

    return ExpertActivation(apply=apply, kind="clamped", alpha=alpha, limit=limit)


class Router(ReplicatedLinear):
    """Scores a token for each expert; whole on every rank and never quantized. dtype: what it computes in; None: that
    of the model."""

    def __init__(
        self,
        context: BuildContext,
        name: str,
        hidden_size: int,
        num_experts: int,
        *,
        bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype or context.dtype
        plain = dataclasses.replace(context, quantization=Unquantized(), dtype=self.dtype)
        super().__init__(plain, name, hidden_size, num_experts, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] -> logits [T, E]."""
        return super().forward(x.to(self.dtype))


class RoutedExperts(nn.Module):
    """The experts of a layer that are chosen from, as far as they are this rank's.

    leaves_sum: each rank gets its own summand, and whoever takes it sums (`sum_ranks`). method.tokens: int64, how many
    tokens each expert here has got so far, from `first_expert` on.
    """

    def __init__(
        self,
        context: BuildContext,
        prefix: str,
        *,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: ExpertActivation,
        names: ExpertNames | None = None,
        interleaved: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        parallel = context.parallel
        self.prefix, self.names, self.interleaved = prefix, names or ExpertNames(), interleaved
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.group, self.dtype, self.deterministic = context.tensor_group, context.dtype, context.deterministic
        self.is_split = parallel.tensor_size > 1
        self.by_expert = self.is_split and parallel.expert_parallel
        if self.by_expert:
            self.own, self.width = parallel.expert_slice(num_experts), slice(0, intermediate_size)
        else:
            self.own = slice(0, num_experts)
            self.width = parallel.tensor_slice(intermediate_size, "intermediate size of the experts")
        self.first_expert = self.own.start
        self.leaves_sum = self.is_split and not self.deterministic
        spec = self._spec(context, activation, bias)
        self.method = context.quantization.experts(spec) or LoopedExperts.of(spec, context.quantization)
        # What the checkpoint has and another rank reads: modules and tensors.
        self.elsewhere = frozenset(self._elsewhere(bias and not spec.down_bias))

    def _spec(self, context: BuildContext, activation: ExpertActivation, bias: bool) -> ExpertsSpec:
        cuts_width = self.is_split and not self.by_expert
        on_cpu = context.device.type == "cpu"
        if self.deterministic and cuts_width and (bias or not on_cpu):
            what = "experts with biases" if on_cpu else "experts on a GPU"
            raise ConfigError(
                f"deterministic mode does not split {what} over {context.parallel.tensor_size} ranks; "
                "--enable-expert-parallel shares them whole, or use tensor_parallel_size 1, or --no-deterministic"
            )
        num_shards = 1
        if self.deterministic and on_cpu:
            num_shards = virtual_shards(self.intermediate_size)
            if cuts_width and num_shards % context.parallel.tensor_size:
                raise ConfigError(
                    f"deterministic mode sums the {self.intermediate_size} inputs of an expert in {num_shards} shards, "
                    f"which {context.parallel.tensor_size} ranks cannot share evenly; use fewer ranks, "
                    "--enable-expert-parallel, or --no-deterministic"
                )
            num_shards //= context.parallel.tensor_size if cuts_width else 1
        experts = range(self.own.start, self.own.stop)
        return ExpertsSpec(
            num_experts=len(experts),
            all_experts=self.num_experts,
            hidden_size=self.hidden_size,
            intermediate_size=self.width.stop - self.width.start,
            all_intermediate_size=self.intermediate_size,
            intermediate_start=self.width.start,
            activation=activation,
            dtype=context.dtype,
            device=context.device,
            interleaved=self.interleaved,
            gate_up_bias=bias,
            down_bias=bias and (not cuts_width or context.parallel.tensor_rank == 0),
            deterministic=self.deterministic,
            num_input_shards=num_shards,
            # Of the deterministic sum nothing is rounded before its end, however many ranks there are.
            is_summand=cuts_width or (self.deterministic and on_cpu and not bias),
            gate_up_names=tuple(
                tuple(self.names.module(self.prefix, expert, name) for name in self.names.gate_up) for expert in experts
            ),
            down_names=tuple(self.names.module(self.prefix, expert, self.names.down) for expert in experts),
        )

    def forward(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x [T, H], weights fp32 [T, k], ids [T, k] of all experts -> [T, H], summed over the ranks unless
        `leaves_sum`."""
        if self.by_expert:
            local = ids - self.own.start
            ids = local.masked_fill((local < 0) | (local >= self.own.stop - self.own.start), -1)
        if not self.is_split or not self.deterministic:
            return self.method.apply(x, weights, ids)
        pieces = zip(*(part.split(_ROWS_AT_ONCE) for part in (x, weights, ids)), strict=True)
        return torch.cat([self._apply_exactly(*piece) for piece in pieces])

    def _apply_exactly(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The bits that one rank computes: what an expert gives is summed over the ranks first, then weighted."""
        pairs = self.method.apply_pairs(x, ids)
        # Where experts are whole all ranks but one add zeros.
        pairs = self.group.all_reduce(pairs) if self.by_expert else self.group.all_reduce_tree(pairs.unsqueeze(0))
        return weighted_sum(pairs, weights).to(self.dtype)

    def sum_ranks(self, summand: torch.Tensor) -> torch.Tensor:
        """What is left to do with what `forward` gave [T, H]."""
        if not self.leaves_sum:
            return summand
        return sum_over_ranks(self.group, summand, self.dtype, deterministic=False)

    # --- for the loader ---

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        for found in self.method.tensors():
            is_gate_up = found.part == "gate_up"
            if found.expert is None and self.names.is_stacked:
                yield from self._pieces(found, self.own, is_gate_up)
                continue
            each = range(self.own.stop - self.own.start) if found.expert is None else (found.expert,)
            for expert in each:
                data = found.tensor.data[expert] if found.expert is None else found.tensor.data
                one = ExpertTensor(part=found.part, tensor=dataclasses.replace(found.tensor, data=data), expert=expert)
                number = self.own.start + expert
                yield from self._pieces(one, slice(number, number + 1), is_gate_up)

    def _pieces(self, found: ExpertTensor, experts: slice, is_gate_up: bool) -> Iterator[CheckpointTensor]:
        """experts: whose the tensor is. Of several, where the checkpoint has all in one, it has a leading dimension."""
        parts = self._parts(experts.start, is_gate_up)
        own_inputs = slice(0, self.hidden_size) if is_gate_up else self.width
        start = 0
        for number, part in enumerate(parts):
            tensor = found.tensor
            if found.expert is None:
                tensor = _behind_experts(tensor, number)
            piece = checkpoint_tensor(
                tensor,
                part,
                number,
                start,
                is_last=number == len(parts) - 1,
                in_features=self.hidden_size if is_gate_up else self.intermediate_size,
                columns=own_inputs,
            )
            start += part.rows.stop - part.rows.start
            yield self._as_stored(piece, part.name, tensor, found.expert is None, experts)

    def _parts(self, expert: int, is_gate_up: bool) -> list[Part]:
        """As `layers.linear` has them."""
        width, own = self.intermediate_size, self.width
        if not is_gate_up:
            name = self.names.module(self.prefix, expert, self.names.down)
            return [Part(name, self.hidden_size, slice(0, self.hidden_size))]
        names = [self.names.module(self.prefix, expert, name) for name in self.names.gate_up]
        if len(names) == 2:
            return [Part(name, width, own) for name in names]
        if self.interleaved:
            return [Part(names[0], 2 * width, slice(2 * own.start, 2 * own.stop))]
        return [Part(names[0], 2 * width, slice(base + own.start, base + own.stop)) for base in (0, width)]

    def _as_stored(
        self, piece: CheckpointTensor, module: str, tensor: LinearTensor, has_experts: bool, experts: slice
    ) -> CheckpointTensor:
        if not self.names.is_stacked:
            return piece
        shape, index, destination = list(piece.shape), list(piece.index), piece.destination
        if not has_experts:
            shape, index, destination = [1, *shape], [slice(0, 1), *index], destination.unsqueeze(0)
        shape[0], index[0] = self.num_experts, experts
        is_weight = tensor.suffix == "weight"
        if is_weight and self.names.is_transposed:
            shape[1:], index[1:], destination = shape[:0:-1], index[:0:-1], destination.transpose(1, 2)
        name = module if is_weight else f"{module}_{tensor.suffix}"
        return dataclasses.replace(piece, name=name, shape=tuple(shape), index=tuple(index), destination=destination)

    def _elsewhere(self, others_add_bias: bool) -> Iterator[str]:
        for expert in range(self.num_experts):
            if not self.own.start <= expert < self.own.stop and not self.names.is_stacked:
                yield f"{self.prefix}.{expert}"
            elif others_add_bias:
                joint = "_" if self.names.is_stacked else "."
                yield f"{self.names.module(self.prefix, expert, self.names.down)}{joint}bias"

    def process_after_load(self) -> None:
        self.method = self.method.as_loaded()
        self.method.process_after_load()

    def weight_bytes(self) -> int:
        return self.method.weight_bytes()


def _behind_experts(tensor: LinearTensor, number: int) -> LinearTensor:
    """A tensor of all experts, as `checkpoint_tensor` takes one: with all its dimensions counted."""
    data, after = tensor.data, 1
    if tensor.by_part:
        data = data[:, number]
    return dataclasses.replace(
        tensor,
        data=data,
        by_part=False,
        out_dim=None if tensor.out_dim is None else tensor.out_dim + after,
        in_dim=None if tensor.in_dim is None else tensor.in_dim + after,
    )


class SharedExpert(nn.Module):
    """An MLP that every token goes through beside those it is routed to, split over the ranks by its width.

    gate: name of a linear layer of one output, whose sigmoid scales what the MLP gives (Qwen2-MoE); None: none does.
    """

    def __init__(
        self,
        context: BuildContext,
        prefix: str,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        *,
        gate: str | None = None,
        leaves_sum: bool,
    ) -> None:
        super().__init__()
        self.activation = GatedActivation(context, hidden_act)
        self.gate_up_proj = GateUpLinear(context, prefix, hidden_size, intermediate_size, bias=False)
        self.down_proj = RowLinear(
            context, f"{prefix}.down_proj", intermediate_size, hidden_size, bias=False, leaves_sum=leaves_sum
        )
        self.gate = None if gate is None else Router(context, gate, hidden_size, 1)
        self._sigmoid = activation("sigmoid", context.deterministic and context.device.type == "cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, H] -> [T, H], this rank's summand where `leaves_sum`."""
        output = self.down_proj(self.gate_up_proj.gated(x, self.activation))
        return output if self.gate is None else output * self._sigmoid(self.gate(x))


class MixtureOfExperts(nn.Module):
    """Takes the place of a layer's MLP (`models.llama.LlamaMLP`): the router, its routing, the experts, and beside them
    perhaps one that all tokens share."""

    few_rows = 16

    def __init__(
        self, router: Router, routing: Routing, experts: RoutedExperts, shared: SharedExpert | None = None
    ) -> None:
        super().__init__()
        assert shared is None or not experts.is_split or shared.down_proj.leaves_sum == experts.leaves_sum
        self.router, self.routing, self.experts, self.shared = router, routing, experts, shared
        self.leaves_sum = experts.leaves_sum

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, H] -> [T, H], this rank's summand where `leaves_sum`."""
        weights, ids = self.routing(self.router(hidden))
        output = self.experts(hidden, weights, ids)
        return output if self.shared is None else output + self.shared(hidden)

    def forward_few(self, stream: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """stream [T, H], on a rank alone -> the stream after norm and experts."""
        return stream + self(norm(stream))

    @property
    def can_start_sum(self) -> bool:
        """As of a RowLinear."""
        return self.leaves_sum

    def sum_ranks(self, summand: torch.Tensor) -> torch.Tensor:
        """What is left to do with what `forward` gave [T, H]."""
        return self.experts.sum_ranks(summand)
