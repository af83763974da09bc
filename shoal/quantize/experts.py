"""Experts that Transformers holds stacked in two tensors, as the linear modules that checkpoints have.

E experts, T tokens, k experts a token, H hidden size, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Where checkpoints have an expert's gate, up and down matrix, and the name of the module around the experts, where that
# is another than in Transformers: Qwen, DeepSeek, GLM and others; Mixtral.
_NAMES = ((None, ("gate_proj", "up_proj", "down_proj")), ("block_sparse_moe", ("w1", "w3", "w2")))


class Expert(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, names: tuple[str, str, str], hidden_size: int, width: int, act_fn: Any) -> None:
        super().__init__()
        self.names, self.act_fn = names, act_fn
        for name, (inputs, outputs) in zip(names, [(hidden_size, width)] * 2 + [(width, hidden_size)], strict=True):
            self.add_module(name, nn.Linear(inputs, outputs, bias=False, device="meta"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (self.get_submodule(name) for name in self.names)
        output: torch.Tensor = down(self.act_fn(gate(x)) * up(x))
        return output


class Experts(nn.ModuleList):
    """Called as what it stands for."""

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states [T, H]; top_k_index, top_k_weights [T, k] -> [T, H]."""
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            tokens, places = torch.where(top_k_index == number)
            if len(tokens):
                weights = top_k_weights[tokens, places, None]
                total.index_add_(0, tokens, (expert(hidden_states[tokens]) * weights).to(total.dtype))
        return total


def unstack_experts(model: nn.Module, is_stored: Callable[[str], bool]) -> None:
    """Put Experts in the place of stacked ones whose matrices the checkpoint has one by one (`is_stored`)."""
    for name, module in list(model.named_modules()):
        shapes = {key: tuple(parameter.shape) for key, parameter in module.named_parameters(recurse=False)}
        act_fn = getattr(module, "act_fn", None)
        if shapes.keys() != {"gate_up_proj", "down_proj"} or len(shapes["down_proj"]) != 3 or act_fn is None:
            continue
        count, hidden_size, width = shapes["down_proj"]
        if shapes["gate_up_proj"] != (count, 2 * width, hidden_size):
            continue
        block_name, _, own = name.rpartition(".")
        layer_name, _, block_own = block_name.rpartition(".")
        for around, names in _NAMES:
            stored = f"{layer_name}.{around}.{own}" if around else name
            if is_stored(f"{stored}.0.{names[0]}.weight"):
                block = model.get_submodule(block_name)
                setattr(block, own, Experts(Expert(names, hidden_size, width, act_fn) for _ in range(count)))
                if around:
                    _rename(model.get_submodule(layer_name), block_own, around)
                break


def _rename(layer: nn.Module, old: str, new: str) -> None:
    """A module is listed as `new`, and its layer's code still finds it as `old`."""
    module = layer.get_submodule(old)
    delattr(layer, old)
    layer.add_module(new, module)
    object.__setattr__(layer, old, module)
