"""Experts in the code of Transformers: which of its modules hold those of a layer, and whether in a form that we serve.
Used by transformers_shape and by the model; Transformers is loaded by whoever calls.
"""

from __future__ import annotations

import importlib
from typing import Any

# What modules that use `use_experts_implementation` say of themselves, and what it must be.
_FORM = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}
_WEIGHTS = ("gate_up_proj", "down_proj")


def expert_modules(model: Any) -> dict[str, Any]:
    """By name, the modules that hold all experts of a layer, each matrix of theirs in one tensor."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "has_gate")}


def experts_refusal(module: Any) -> str | None:
    """Why a module of experts cannot be served; None where it computes down(act(gate(x)) * up(x)) and no more."""
    for attribute, wanted in _FORM.items():
        if bool(getattr(module, attribute, wanted)) is not wanted:
            return f"{attribute} is {not wanted}"
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if set(shapes) != set(_WEIGHTS) or any(len(shape) != 3 for shape in shapes.values()):
        return f"it holds {', '.join(sorted(shapes)) or 'nothing'}, where {' and '.join(_WEIGHTS)} are known"
    default = importlib.import_module("transformers.integrations.moe")._default_apply_gate
    if type(module)._apply_gate is not default or not hasattr(module, "act_fn"):
        return "what lies between its products is not an activation of the gate times the other half"
    num_experts, both, hidden_size = shapes["gate_up_proj"]
    if both % 2 or shapes["down_proj"] != (num_experts, hidden_size, both // 2):
        return f"its matrices do not fit each other: {shapes}"
    return None


def experts_shape(module: Any) -> tuple[int, int, int]:
    """Number of experts, hidden size, width of an expert: of a module that is not refused."""
    num_experts, both, hidden_size = module.gate_up_proj.shape
    return num_experts, hidden_size, both // 2
