"""Our layers in the place of a Transformers model's own: by its tensor-parallel plan, and what of its modules stays.

T tokens, P positions; activations are [1, T, …] there.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from shoal.config.model_config import ModelConfig
from shoal.layers.activation import by_rows
from shoal.layers.checkpoint import CheckpointTensor, TensorKind, whole
from shoal.layers.context import BuildContext
from shoal.layers.embedding import LogitsHead, VocabularyEmbedding
from shoal.layers.linear import ColumnLinear, Linear, Part, ReplicatedLinear, RowLinear
from shoal.layers.norm import RMSNorm

_NUMBER = re.compile(r"\.\d+(?=\.|$)")
# Styles of a tensor-parallel plan (`base_model_tp_plan`). What has another one, or none, is whole on every rank.
_COLUMN, _GATHERED = ("colwise",), ("colwise_gather_output", "colwise_rep")
_ROW = ("rowwise", "rowwise_split_input", "rowwise_rep")
_PACKED = ("packed_colwise",)
_WHOLE = ("replicate", "replicated_with_grad_allreduce")
_SPLIT_OUTPUTS = (*_COLUMN, *_PACKED)
# For families whose config has none. Their code counts heads by these attributes.
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
_HEAD_COUNTS = {"num_heads": "num_heads", "num_attention_heads": "num_heads", "num_key_value_heads": "num_kv_heads"}
_KEYS_AND_VALUES = ("k_proj", "v_proj")
_NORM_TOLERANCE = 1e-5


class Projection(nn.Module):
    """One of our linear layers, for activations [1, T, …]. own: the part of the inputs that is this rank's, taken where
    all are given. gathers: all ranks' outputs are put together."""

    def __init__(self, linear: Linear, context: BuildContext, *, own: slice | None = None, gathers: bool = False):
        super().__init__()
        self.linear = linear
        self.in_features = linear.in_features
        self._own = own if own is not None and own.stop - own.start < linear.in_features else None
        self._group = context.tensor_group if gathers and context.tensor_group.world_size > 1 else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if self._own is not None and rows.shape[1] == self.in_features:
            rows = rows[:, self._own].contiguous()
        rows = self.linear(rows)
        if self._group is not None:
            rows = self._group.all_gather(rows)
        return rows.view(*x.shape[:-1], rows.shape[1])


class TokenEmbedding(nn.Module):
    """Our embedding, for ids [1, T] -> [1, T, H]."""

    def __init__(self, embedding: VocabularyEmbedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids.flatten()).unsqueeze(0)


class Head(nn.Module):
    """Our vocabulary projection, for [1, R, H] -> this rank's [1, R, W] in the model's dtype; some add a bias."""

    def __init__(self, context: BuildContext, head: LogitsHead, bias: str | None) -> None:
        """bias: its name in the checkpoint."""
        super().__init__()
        self.head, self._bias_name = head, bias
        self.bias: torch.Tensor | None = None
        if bias is not None:
            self.bias = torch.zeros(head.vocabulary.width, dtype=context.dtype, device=context.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.head.project(x[0])
        return (logits if self.bias is None else logits + self.bias).unsqueeze(0)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        if self.bias is not None and self._bias_name is not None:
            vocabulary = self.head.vocabulary
            yield CheckpointTensor(
                name=self._bias_name,
                shape=(vocabulary.vocab_size,),
                index=(vocabulary.tokens,),
                destination=self.bias[: vocabulary.num_tokens],
                kind="bias",
            )

    def process_after_load(self) -> None:
        return None

    def weight_bytes(self) -> int:
        return 0 if self.bias is None else self.bias.nbytes


class ModuleWeights:
    """The tensors of a module that stays as it is, whole on every rank: parameters in the model's dtype, buffers in
    their own. A buffer that the checkpoint lacks keeps what the model's code gave it."""

    def __init__(
        self,
        name: str,
        module: nn.Module,
        context: BuildContext,
        keeps_fp32: Callable[[str], bool],
        stored: Collection[str],
    ) -> None:
        """stored: names of all that a checkpoint may have, in which buffers need not be."""
        self._tensors: list[CheckpointTensor] = []
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            dtype = torch.float32 if keeps_fp32(full) else context.dtype
            data = torch.empty(parameter.shape, dtype=dtype, device=context.device)
            setattr(module, key, nn.Parameter(data, requires_grad=False))
            self._tensors.append(whole(full, data, _kind(module, key)))
        for key, buffer in module.named_buffers(recurse=False):
            full = f"{name}.{key}" if name else key
            data = buffer.to(context.device)
            module._buffers[key] = data
            if full in stored:
                self._tensors.append(
                    dataclasses.replace(whole(full, data, "bias"), optional=True, fill=lambda tensor, generator: None)
                )

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        yield from self._tensors

    def process_after_load(self) -> None:
        return None

    def weight_bytes(self) -> int:
        return sum(tensor.destination.nbytes for tensor in self._tensors)


def _kind(module: nn.Module, key: str) -> TensorKind:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if key.endswith("bias"):
        return "bias"
    return "norm" if "norm" in type(module).__name__.lower() else "matrix"


class PositionTable(nn.Module):
    """A rotary embedding that looks up what the model's own gives for each position: the same numbers, whatever the
    step, and without computing them again."""

    def __init__(self, module: nn.Module, num_positions: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._module, self._num_positions, self._dtype, self._device = [module], num_positions, dtype, device
        self._tables: dict[tuple[Any, ...], tuple[torch.Tensor, ...]] = {}

    def forward(
        self, x: torch.Tensor, position_ids: torch.Tensor, *more: Any, **named: Any
    ) -> tuple[torch.Tensor, ...]:
        key = (*more, *named.items())
        if key not in self._tables:
            self._tables[key] = self._make(more, named)
        positions = position_ids[0]
        return tuple(table.index_select(0, positions).unsqueeze(0) for table in self._tables[key])

    def _make(self, more: tuple[Any, ...], named: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        example = torch.empty((1, 1), dtype=self._dtype, device=self._device)
        positions = torch.arange(self._num_positions, device=self._device).unsqueeze(0)
        return tuple(table[0].contiguous() for table in self._module[0](example, positions, *more, **named))


class RowWise(nn.Module):
    """An activation function that treats each row alike whatever rows are beside it (deterministic mode on a CPU)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return by_rows(self.module, x.reshape(-1, x.shape[-1])).view(x.shape)


class Plan:
    """Which layers of ours stand for which modules of a model on this rank."""

    def __init__(self, model: nn.Module, base: nn.Module, prefix: str, config: ModelConfig, context: BuildContext):
        """base: the decoder in the model, whose names begin with `prefix`."""
        self._config, self._context, self._prefix = config, context, prefix
        hf_config: Any = base.config
        self._styles: dict[str, str] = dict(
            getattr(hf_config, "base_model_tp_plan", None) or _PLANS.get(config.model_type, {})
        )
        self._whole_parents = {name for name, module in model.named_modules() if self._must_be_whole(name, module)}

    def style(self, name: str) -> str | None:
        """name: of a module or parameter, in the whole model."""
        inner = name.removeprefix(f"{self._prefix}.") if self._prefix else name
        return self._styles.get(_NUMBER.sub(".*", inner))

    def _must_be_whole(self, name: str, module: nn.Module) -> bool:
        """Whether a module with split projections has further weights, of which the plan does not say that they fit
        the part of the heads that a rank then has."""
        children = dict(module.named_children())
        split = {key for key in children if self.style(f"{name}.{key}") in _SPLIT_OUTPUTS}
        if not split:
            return False
        for key, parameter in module.named_parameters():
            owner = key.rpartition(".")[0]
            styles = [self.style(f"{name}.{each}") for each in (owner, key)]
            is_planned = styles[0] is not None and isinstance(children.get(owner), nn.Linear)
            if not is_planned and parameter.numel() > 1 and not any(style in _WHOLE for style in styles):
                return True
        return False

    def shares_heads(self, layer_name: str, layer: nn.Module) -> bool:
        """Whether the layer's attention has this rank's heads alone."""
        return self._context.parallel.tensor_size > 1 and any(
            self._splits_heads(f"{layer_name}.{name}", module) for name, module in layer.named_modules()
        )

    def _splits_heads(self, name: str, module: nn.Module) -> bool:
        """Whether `module` projects to this rank's query heads: it is no part of an MLP."""
        parent, _, key = name.rpartition(".")
        return (
            isinstance(module, (nn.Linear, Projection))
            and self.style(name) in _SPLIT_OUTPUTS
            and parent not in self._whole_parents
            and any(word in key for word in ("q_proj", "query", "qkv", "c_attn"))
        )

    def count_own_heads(self, layer_name: str, layer: nn.Module) -> None:
        """Modules that split their heads count this rank's."""
        parallel, config = self._context.parallel, self._config
        kv_heads = parallel.kv_head_slice(config.num_kv_heads)
        own = {"num_heads": config.num_heads // parallel.tensor_size, "num_kv_heads": kv_heads.stop - kv_heads.start}
        for name, module in layer.named_modules():
            if any(self._splits_heads(f"{layer_name}.{name}.{key}", child) for key, child in module.named_children()):
                for attribute, what in _HEAD_COUNTS.items():
                    if getattr(module, attribute, None) == getattr(config, what):
                        setattr(module, attribute, own[what])

    def linear(self, name: str, module: nn.Linear) -> Projection:
        context, inputs, outputs = self._context, module.in_features, module.out_features
        bias, parent, style = module.bias is not None, name.rpartition(".")[0], self.style(name)
        if parent in self._whole_parents or self._is_uneven(style, inputs, outputs, name):
            style = None
        if style in _ROW:
            own = context.parallel.tensor_slice(inputs, f"inputs of {name}")
            return Projection(RowLinear(context, name, inputs, outputs, bias=bias), context, own=own)
        if style in _PACKED:
            return Projection(self._packed(name, inputs, outputs, bias), context)
        if style in (*_COLUMN, *_GATHERED):
            column = (
                self._by_kv_heads(name, inputs, outputs, bias)
                if self._is_key_or_value(name, outputs)
                else ColumnLinear(context, name, inputs, outputs, bias=bias)
            )
            return Projection(column, context, gathers=style in _GATHERED)
        return Projection(ReplicatedLinear(context, name, inputs, outputs, bias=bias), context)

    def _is_uneven(self, style: str | None, inputs: int, outputs: int, name: str) -> bool:
        """What is put together again need not be split; KV heads of which ranks hold copies cannot be."""
        size = self._context.parallel.tensor_size
        if style in _GATHERED:
            return outputs % size != 0 or (self._is_key_or_value(name, outputs) and self._config.num_kv_heads < size)
        return style in ("rowwise_split_input", "rowwise_rep") and inputs % size != 0

    def _is_key_or_value(self, name: str, outputs: int) -> bool:
        config = self._config
        return name.rpartition(".")[2] in _KEYS_AND_VALUES and outputs == config.num_kv_heads * config.head_dim

    def _by_kv_heads(self, name: str, inputs: int, outputs: int, bias: bool) -> Linear:
        heads, size = self._context.parallel.kv_head_slice(self._config.num_kv_heads), self._config.head_dim
        part = Part(name, outputs, slice(heads.start * size, heads.stop * size))
        return Linear(self._context, in_features=inputs, parts=[part], bias=bias)

    def _packed(self, name: str, inputs: int, outputs: int, bias: bool) -> Linear:
        """Two matrices in one, such as gate and up."""
        half = outputs // 2
        own = self._context.parallel.tensor_slice(half, f"outputs of {name}")
        parts = [Part(name, outputs, slice(start + own.start, start + own.stop)) for start in (0, half)]
        return Linear(self._context, in_features=inputs, parts=parts, bias=bias)


def plain_norm(name: str, module: nn.Module, context: BuildContext) -> RMSNorm | None:
    """Our RMSNorm for a module that computes the same, which is tried on random numbers; None for any other."""
    weights = dict(module.named_parameters())
    eps = next((value for key in ("variance_epsilon", "eps") if (value := getattr(module, key, None))), None)
    if "RMSNorm" not in type(module).__name__ or list(weights) != ["weight"] or not isinstance(eps, float):
        return None
    if weights["weight"].dim() != 1 or list(module.children()) or list(module.buffers()):
        return None
    size = weights["weight"].shape[0]
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 4, size, generator=generator), torch.randn(size, generator=generator)
    try:
        found = torch.func.functional_call(module, {"weight": weight}, (x,))
    except (RuntimeError, TypeError):
        return None
    expected = F.rms_norm(x, (size,), weight, eps)
    same = found.shape == expected.shape and torch.allclose(found, expected, atol=_NORM_TOLERANCE, rtol=0)
    return RMSNorm(context, name, size, eps) if same else None
