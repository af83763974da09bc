"""ExpertLoad: how many tokens each expert got, read from the device without waiting for it. Owned by the worker."""

from __future__ import annotations

import torch

from shoal.layers.moe import RoutedExperts
from shoal.models.base import CausalLM


class ExpertLoad:
    """The counts of all layers of this stage, for the experts that this rank has; first_expert: the first of them."""

    def __init__(self, model: CausalLM, device: torch.device) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, RoutedExperts)]
        self._counts = [layer.method.tokens for layer in layers]
        self.first_expert = layers[0].first_expert if layers else 0
        # Where experts are split all ranks count the same, and the first tells it.
        self.tells = bool(layers) and (layers[0].by_expert or layers[0].group.rank_in_group == 0)
        self._event = torch.cuda.Event() if device.type == "cuda" else None
        self._host: torch.Tensor | None = None
        self._is_queued = False

    def clear(self) -> None:
        """What warming up routed is no load."""
        for counts in self._counts:
            counts.zero_()

    def read(self) -> list[int]:
        """Tokens of each expert by now; waits for the device."""
        self._is_queued = False  # it has less
        return self._total().tolist()  # type: ignore[no-any-return]

    def poll(self) -> list[int] | None:
        """Tokens of each expert when this was called before, on a GPU; None where that is not here yet."""
        if self._event is None:
            return self.read()
        found = None
        if self._host is not None and self._is_queued:
            if not self._event.query():
                return None
            found = self._host.tolist()
        total = self._total()
        if self._host is None:
            self._host = torch.zeros(total.shape, dtype=total.dtype, pin_memory=True)
        self._host.copy_(total, non_blocking=True)
        self._event.record()
        self._is_queued = True
        return found

    def _total(self) -> torch.Tensor:
        return torch.stack(self._counts).sum(0)
