"""Low-rank adapters (Hu et al. 2021) beside the weights: y = W x + scaling · B (A x), with each token's own A and B.

All adapters that are loaded are stacked, and all of them are multiplied by: what is not a token's own is masked
between the two products. So tokens of any adapters go together in one step, in a CUDA graph too.

T tokens, S slots (adapters), r rank (of the widest; others are padded with zeros), P parts, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch

from shoal.errors import ModelError
from shoal.quantization.base import LinearMethod, LinearSpec, LinearTensor, NormWeights

# By the name of a matrix: A [r, K] and scaling * B [N, r], both whole.
Adapter = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


class StackedPart(Protocol):
    """What a layer tells of each matrix in it (`layers.linear.Part`)."""

    @property
    def name(self) -> str: ...

    @property
    def out_features(self) -> int: ...

    @property
    def rows(self) -> slice: ...


class AdapterSlots:
    """The adapters of one rank's layers, and which token of the step goes with which. Made by the worker, told by the
    runner before each step.

    mask [most tokens, S]: true where a token has the slot's adapter. It stays where it is: graphs read it.
    """

    def __init__(self, num_slots: int, rank: int, most_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.num_slots, self.rank, self.dtype = num_slots, rank, dtype
        self.mask = torch.zeros((most_tokens, num_slots), dtype=torch.bool, device=device)
        self.is_used = False  # by any token of this step
        self._layers: list[AdaptedLinear] = []

    def adapt(
        self, method: LinearMethod, spec: LinearSpec, parts: Sequence[StackedPart], columns: slice
    ) -> AdaptedLinear:
        """A layer's method with its adapters. columns: which inputs of the whole matrices are this rank's."""
        layer = AdaptedLinear(method, spec, parts, columns, self)
        self._layers.append(layer)
        return layer

    def put_tokens(self, slots: torch.Tensor) -> None:
        """slots [T]: int64, each token's; -1: none."""
        rows = self.mask[: slots.shape[0]]
        rows.copy_(slots.unsqueeze(1) == torch.arange(self.num_slots, device=slots.device))

    def fill(self, slot: int, adapter: Adapter) -> set[str]:
        """Put an adapter in place of what was there; {}: nothing. Returns the names that layers of this rank took.

        Raises ModelError for matrices of other sizes."""
        return {name for layer in self._layers for name in layer.fill(slot, adapter)}

    def nbytes(self) -> int:
        return sum(layer.adapter_bytes() for layer in self._layers)


class AdaptedLinear(LinearMethod):
    """A linear method, and beside it the adapters of all slots. Products that a method fuses with what is around them
    have no place for another summand: there are none."""

    def __init__(
        self,
        method: LinearMethod,
        spec: LinearSpec,
        parts: Sequence[StackedPart],
        columns: slice,
        slots: AdapterSlots,
    ) -> None:
        self.method, self.spec = method, spec
        self._parts, self._columns, self._slots = parts, columns, slots
        num_rows = slots.num_slots * slots.rank
        # Inputs to all slots of all parts, and from a part's slots to its outputs.
        self.down = torch.zeros((len(parts) * num_rows, spec.in_features), dtype=spec.dtype, device=spec.device)
        self.up = [torch.zeros((num_rows, size), dtype=spec.dtype, device=spec.device) for size in spec.part_sizes]

    def fill(self, slot: int, adapter: Adapter) -> set[str]:
        """As `AdapterSlots.fill`, for this layer."""
        rank, taken = self._slots.rank, set()
        down = self.down.view(len(self._parts), self._slots.num_slots, rank, -1)
        for number, part in enumerate(self._parts):
            up = self.up[number].view(self._slots.num_slots, rank, -1)
            down[number, slot].zero_()
            up[slot].zero_()
            if part.name in adapter:
                own_down, own_up = adapter[part.name]
                found, wanted = (own_up.shape[0], own_down.shape[1]), (part.out_features, self.spec.all_in_features)
                if found != wanted:
                    raise ModelError(
                        f"the adapter is of another model: {part.name} has {wanted[0]} outputs and {wanted[1]} inputs "
                        f"here, and {found[0]} and {found[1]} there"
                    )
                down[number, slot, : own_down.shape[0]].copy_(own_down[:, self._columns])
                up[slot, : own_up.shape[1]].copy_(own_up[part.rows].t())
                taken.add(part.name)
        return taken

    def adapter_bytes(self) -> int:
        return self.down.nbytes + sum(part.nbytes for part in self.up)

    def tensors(self) -> list[LinearTensor]:
        return self.method.tensors()

    def process_after_load(self) -> None:
        self.method.process_after_load()

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        output = self.method.apply(x)
        slots = self._slots
        if not slots.is_used:
            return output
        inner = (x @ self.down.t()).view(x.shape[0], len(self._parts), slots.num_slots, slots.rank)
        # Not a product with the mask: another's adapter may overflow on this token, and 0 * inf is no number.
        inner = torch.where(slots.mask[: x.shape[0], None, :, None], inner, 0.0)
        start = 0
        for number, up in enumerate(self.up):
            stop = start + up.shape[1]
            output[:, start:stop] += inner[:, number].flatten(1) @ up
            start = stop
        return output

    def apply_gated(self, x: torch.Tensor, *, norm: NormWeights | None = None) -> torch.Tensor | None:
        return None

    def weight_bytes(self) -> int:
        return self.method.weight_bytes() + self.adapter_bytes()
