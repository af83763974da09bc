"""Plan: which of our linear layers stand for which modules of a Transformers model, by its own tensor-parallel plan."""

from __future__ import annotations

import re
from typing import Any, Literal

from torch import nn

from shoal.config.model_config import ModelConfig
from shoal.config.transformers_experts import expert_modules, experts_shape
from shoal.layers.context import BuildContext
from shoal.layers.linear import Linear, Part, RowLinear
from shoal.models.transformers_layers import Merged, MergedPart, Projection

# How a rank holds a matrix: all of it; some outputs; some outputs, of which all ranks' are put together; some outputs
# of each of two matrices in one; some inputs.
_Kind = Literal["whole", "column", "gathered", "packed", "row"]
# Styles of a plan (`base_model_tp_plan`). What has another one, or none, is whole on every rank.
_KINDS: dict[str | None, _Kind] = {
    "colwise": "column",
    "colwise_gather_output": "gathered",
    "colwise_rep": "gathered",
    "packed_colwise": "packed",
    "rowwise": "row",
    "rowwise_split_input": "row",
    "rowwise_rep": "row",
}
_WHOLE = ("replicate", "replicated_with_grad_allreduce")
# For families whose config has no plan.
_PLANS = {
    "stablelm": {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
}
_NUMBER = re.compile(r"\.\d+(?=\.|$)")
_QUERIES = ("q_proj", "query", "qkv", "c_attn")
_KEYS_AND_VALUES = ("k_proj", "v_proj")
# Children of one module that all take the module's input.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
# What modules call the numbers of heads that they have, and ModelConfig.
_HEAD_COUNTS = {"num_heads": "num_heads", "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads"}


class Plan:
    def __init__(self, model: nn.Module, base: nn.Module, prefix: str, config: ModelConfig, context: BuildContext):
        """base: the decoder in the model, whose names begin with `prefix`."""
        self._config, self._context, self._prefix = config, context, prefix
        hf_config: Any = base.config
        self._styles: dict[str, str] = dict(
            getattr(hf_config, "base_model_tp_plan", None) or _PLANS.get(config.model_type, {})
        )
        self._routers = self._find_routers(model)
        self._whole_parents = {name for name, module in model.named_modules() if self._must_be_whole(name, module)}

    def projections(self, parent: str, module: nn.Module) -> dict[str, nn.Module]:
        """What stands for the linear layers among the children of `module`, which is called `parent`."""
        linears = {key: child for key, child in module.named_children() if type(child) is nn.Linear}
        linears = {key: child for key, child in linears.items() if f"{parent}.{key}" not in self._routers}
        found: dict[str, nn.Module] = {}
        for keys in _SAME_INPUT:
            group = {f"{parent}.{key}": linears[key] for key in keys if key in linears}
            if len(group) == len(keys) and self._can_merge(group):
                found |= self._merge(group)
        for key, linear in linears.items():
            if key not in found:
                found[key] = self._projection(f"{parent}.{key}" if parent else key, linear)
        return found

    def _find_routers(self, model: nn.Module) -> set[str]:
        """Linear layers beside experts that score them: they stay the model's own, whose code looks at their weight."""
        found = set()
        for name, module in expert_modules(model).items():
            parent, _, _ = name.rpartition(".")
            for key, child in model.get_submodule(parent).named_modules(prefix=parent):
                if type(child) is nn.Linear and self._style(key) is None:
                    found |= {key} if child.out_features == experts_shape(module)[0] else set()
        return found

    # --- heads ---

    def shares_heads(self, layer_name: str, layer: nn.Module) -> bool:
        """Whether the layer's attention has this rank's heads alone."""
        return self._context.parallel.tensor_size > 1 and any(
            self._splits_heads(f"{layer_name}.{name}") for name, _ in layer.named_modules()
        )

    def _splits_heads(self, name: str) -> bool:
        """Whether a module projects to this rank's query heads: it is no part of an MLP."""
        parent, _, key = name.rpartition(".")
        is_split = _KINDS.get(self._style(name)) in ("column", "packed") and parent not in self._whole_parents
        return is_split and any(word in key for word in _QUERIES)

    def count_own_heads(self, layer_name: str, layer: nn.Module) -> None:
        """Modules that split their heads count this rank's."""
        parallel, config = self._context.parallel, self._config
        kv_heads = parallel.kv_head_slice(config.num_kv_heads)
        own = {"num_heads": config.num_heads // parallel.tensor_size, "num_kv_heads": kv_heads.stop - kv_heads.start}
        for name, module in layer.named_modules():
            if any(self._splits_heads(f"{layer_name}.{name}.{key}") for key, _ in module.named_children()):
                for attribute, what in _HEAD_COUNTS.items():
                    if getattr(module, attribute, None) == getattr(config, what):
                        setattr(module, attribute, own[what])

    # --- how a matrix is held ---

    def _style(self, name: str) -> str | None:
        """name: of a module or parameter, in the whole model."""
        return self._styles.get(_NUMBER.sub(".*", name.removeprefix(f"{self._prefix}.")))

    def _must_be_whole(self, name: str, module: nn.Module) -> bool:
        """Whether a module with split projections has further weights, of which the plan does not say that they fit
        the part of the heads that a rank then has."""
        children = dict(module.named_children())
        if not any(_KINDS.get(self._style(f"{name}.{key}")) in ("column", "packed") for key in children):
            return False
        for key, parameter in module.named_parameters():
            owner = key.rpartition(".")[0]
            styles = [self._style(f"{name}.{each}") for each in (owner, key)]
            is_planned = styles[0] is not None and isinstance(children.get(owner), nn.Linear)
            if not is_planned and parameter.numel() > 1 and not any(style in _WHOLE for style in styles):
                return True
        return False

    def _kind(self, name: str, module: nn.Linear) -> _Kind:
        style, size = self._style(name), self._context.parallel.tensor_size
        kind: _Kind = "whole" if name.rpartition(".")[0] in self._whole_parents else _KINDS.get(style, "whole")
        if kind == "gathered":
            # What is put together again need not be split; KV heads of which ranks hold copies cannot be.
            is_copied = self._is_key_or_value(name, module) and self._config.num_kv_heads < size
            return "whole" if is_copied or module.out_features % size else kind
        if kind == "row" and style != "rowwise" and module.in_features % size:
            return "whole"  # its inputs are given whole
        return kind

    def _is_key_or_value(self, name: str, module: nn.Linear) -> bool:
        outputs = self._config.num_kv_heads * self._config.head_dim
        return name.rpartition(".")[2] in _KEYS_AND_VALUES and module.out_features == outputs

    def _parts(self, name: str, module: nn.Linear, kind: _Kind) -> list[Part]:
        """Of the matrix those outputs that are this rank's."""
        outputs, parallel = module.out_features, self._context.parallel
        if kind in ("whole", "row"):
            return [Part(name, outputs, slice(0, outputs))]
        if kind == "packed":
            half = outputs // 2
            own = parallel.tensor_slice(half, f"outputs of {name}")
            return [Part(name, outputs, slice(start + own.start, start + own.stop)) for start in (0, half)]
        if self._is_key_or_value(name, module):
            heads, size = parallel.kv_head_slice(self._config.num_kv_heads), self._config.head_dim
            return [Part(name, outputs, slice(heads.start * size, heads.stop * size))]
        return [Part(name, outputs, parallel.tensor_slice(outputs, f"outputs of {name}"))]

    def _linear(self, parts: list[Part], module: nn.Linear, kind: _Kind) -> Linear:
        is_replicated = kind == "whole" and self._context.parallel.tensor_size > 1
        bias = module.bias is not None
        return Linear(
            self._context, in_features=module.in_features, parts=parts, bias=bias, is_replicated=is_replicated
        )

    def _projection(self, name: str, module: nn.Linear) -> Projection:
        kind, context, inputs = self._kind(name, module), self._context, module.in_features
        if kind == "row":
            own = context.parallel.tensor_slice(inputs, f"inputs of {name}")
            row = RowLinear(context, name, inputs, module.out_features, bias=module.bias is not None)
            return Projection(row, context, own=own)
        linear = self._linear(self._parts(name, module, kind), module, kind)
        return Projection(linear, context, gathers=kind == "gathered")

    def _can_merge(self, group: dict[str, nn.Linear]) -> bool:
        shapes = {(module.in_features, module.bias is None) for module in group.values()}
        kinds = {self._kind(name, module) for name, module in group.items()}
        return len(shapes) == len(kinds) == 1 and kinds <= {"whole", "column", "gathered"}

    def _merge(self, group: dict[str, nn.Linear]) -> dict[str, nn.Module]:
        """By their own names."""
        first_name, first = next(iter(group.items()))
        kind = self._kind(first_name, first)
        parts = [part for name, module in group.items() for part in self._parts(name, module, kind)]
        merged = Merged(self._linear(parts, first, kind))
        return {
            name.rpartition(".")[2]: MergedPart(merged, index, self._context, gathers=kind == "gathered")
            for index, name in enumerate(group)
        }
