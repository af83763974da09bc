"""Any decoder that Transformers has, by its own code: our linear layers and head in it, attention over pages.

The registry imports this for models without a native file (or with --model-impl transformers), and nothing else does:
Transformers takes seconds to load. T tokens, R rows, H hidden size, W width of this rank's slice of the vocabulary.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.activations import ACT2CLS
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from shoal.attention.base import AttentionMetadata
from shoal.config.model_config import ModelConfig
from shoal.config.transformers_experts import expert_modules
from shoal.config.transformers_shape import read_config
from shoal.errors import ModelError
from shoal.layers.checkpoint import HoldsWeights
from shoal.layers.context import BuildContext
from shoal.layers.embedding import LogitsHead, VocabularyEmbedding
from shoal.models.base import CausalLM, LayerObserver
from shoal.models.transformers_attention import CHECKED, PAGED, PagedHeads, Step, give_heads
from shoal.models.transformers_experts import make_experts
from shoal.models.transformers_layers import (
    Head,
    ModuleWeights,
    PositionTable,
    RowWise,
    TokenEmbedding,
    plain_norm,
)
from shoal.models.transformers_plan import Plan

_ONE_EXPERT = re.compile(r"^(.*)\.(\d+)\.")
_ACTIVATIONS: tuple[type[nn.Module], ...] = tuple(
    {found[0] if isinstance(found, tuple) else found for found in ACT2CLS.values()}
)


class _NoMemory(TorchFunctionMode):
    """`torch.empty` makes tensors without memory: a model's weights. What it computes while it is built (frequencies of
    rotary embeddings, for one) is real."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class _Elsewhere(nn.Module):
    """A layer of another stage: its result is never read. attributes: what the model's code looks at in a layer."""

    def __init__(self, layer: nn.Module, hidden: Callable[[], torch.Tensor]) -> None:
        super().__init__()
        plain = {key: value for key, value in vars(layer).items() if not key.startswith("_") and key != "training"}
        self.__dict__.update(plain)
        self._hidden = hidden

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        return self._hidden()


class _Output:
    """What a decoder returns: hidden states [1, R, H], and None for all else that it may be asked for."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]


class _Given(nn.Module):
    """Stands for the decoder where the code around it turns hidden states into logits."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """OPT's code calls the decoder in its decoder."""
        return self if name == "decoder" else super().__getattr__(name)

    def forward(self, *_: Any, **__: Any) -> _Output:
        assert self.hidden is not None, "logits of hidden states"
        return _Output(self.hidden)


class TransformersForCausalLM(CausalLM):
    """A model of Transformers, or one pipeline stage of it.

    Its code runs whole on every stage, over the layers of that stage: what comes before them is overwritten by what the
    stage before sent, what comes after is not read. So embedding scales and the like may stand anywhere in it.
    """

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__(config, context)
        self._step = Step()
        self._hidden: torch.Tensor | None = None  # [1, T, H]: what enters or leaves the stage
        self._hooks: LayerObserver | None = None
        self._held: list[ModuleWeights] = []
        self._heads: dict[int, PagedHeads] = {}
        model = _build(config, context)
        self._names = dict.fromkeys(model.state_dict(), True)
        transforms = get_model_conversion_mapping(model)
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
        # By name, of all stages: how many experts a module has.
        self._experts = {name: module.gate_up_proj.shape[0] for name, module in expert_modules(model).items()}
        self._ignored = [re.compile(each) for each in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        prefix = model.base_model_prefix
        base = getattr(model, prefix, None)
        if not isinstance(base, nn.Module):
            raise ModelError(f"architecture {config.architecture} has no decoder {prefix!r} beside its head")
        layers_name, layers = _find_layers(base, config)
        self._place_embedding_and_head(model, context)
        plan = Plan(model, base, prefix, config, context)
        for index, layer in enumerate(layers):
            if index in self.layer_range:
                self._take_layer(plan, f"{prefix}.{layers_name}.{index}", layer, index, context)
            else:
                layers[index] = _Elsewhere(layer, self._leaving)
        self._drop_what_follows(base, layers_name)
        self._replace(model, plan, context)
        self._hold(model, context)
        if context.deterministic and context.device.type == "cpu":
            for name, module in list(model.named_modules()):
                if isinstance(module, _ACTIVATIONS):
                    _put(model, name, RowWise(module))
        self.decoder, self._given = base, _Given()
        setattr(model, prefix, self._given)
        self.model = model
        for module in (self.decoder, self.model):
            module.eval().requires_grad_(False)
        self._set_attention(CHECKED)

    # --- building ---

    def _place_embedding_and_head(self, model: Any, context: BuildContext) -> None:
        names = {module: name for name, module in model.named_modules()}
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        name = names.get(embedding)
        if name is None or type(head) is not nn.Linear or head.out_features != self.config.vocab_size:
            raise ModelError(
                f"architecture {self.config.architecture}: its embedding or its head ({type(head).__name__}) is not "
                f"one of {self.config.vocab_size} tokens"
            )
        is_tied = head.weight is embedding.weight
        ours: VocabularyEmbedding | None = None
        if not self.is_first_stage:
            _put(model, name, nn.Identity())
        elif type(embedding) is nn.Embedding and embedding.num_embeddings == self.config.vocab_size:
            ours = VocabularyEmbedding(context, name, embedding.num_embeddings, embedding.embedding_dim)
            _put(model, name, TokenEmbedding(ours))
        if self.is_last_stage:
            found = LogitsHead(
                context,
                name if is_tied else names[head],
                self.config.vocab_size,
                head.in_features,
                ours if is_tied else None,
            )
            bias = None if head.bias is None else f"{names[head]}.bias"
            _put(model, names[head], Head(context, found, bias))
        else:
            _put(model, names[head], nn.Identity())

    def _take_layer(self, plan: Plan, name: str, layer: nn.Module, index: int, context: BuildContext) -> None:
        shares = plan.shares_heads(name, layer)
        cache = index - self.layer_range.start
        self._heads[index] = PagedHeads(self.config, context, self._step, index, cache, shares_heads=shares)
        give_heads(layer, self._heads[index])
        if shares:
            plan.count_own_heads(name, layer)
        layer.register_forward_pre_hook(functools.partial(self._enter_layer, index), with_kwargs=True)
        layer.register_forward_hook(functools.partial(self._leave_layer, index))

    def _drop_what_follows(self, base: nn.Module, layers_name: str) -> None:
        """What the pipeline plan has after the layers is the last stage's. Without a plan all stages have it."""
        hf_config: Any = base.config
        names = list(getattr(hf_config, "base_model_pp_plan", None) or {})
        if self.is_last_stage or layers_name not in names:
            return
        for name in names[names.index(layers_name) + 1 :]:
            if isinstance(getattr(base, name, None), nn.Module):
                setattr(base, name, nn.Identity())

    def _replace(self, model: nn.Module, plan: Plan, context: BuildContext) -> None:
        num_positions = context.max_model_len or self.config.max_position_embeddings
        has_table = False
        for name, module in list(model.named_modules()):
            if name in self._experts:
                _put(model, name, make_experts(name, module, self._converters, self.config, context))
                continue
            for key, projection in plan.projections(name, module).items():
                setattr(module, key, projection)
            if (norm := plain_norm(name, module, context)) is not None:
                _put(model, name, norm)
            elif "RotaryEmbedding" in type(module).__name__ and not list(module.parameters()):
                module.to(context.device)
                _put(model, name, PositionTable(module, num_positions, context.dtype, context.device))
                has_table = True
        if not has_table and (kind := _changing_rope(model)) is not None:
            raise ModelError(
                f"architecture {self.config.architecture} has rope_type {kind!r} in code that Shoal does not know: its "
                "frequencies would follow the longest sequence of a step, and a request's tokens the requests beside it"
            )

    def _hold(self, model: Any, context: BuildContext) -> None:
        """What stays as it is: its parameters are filled from the checkpoint, its buffers are what it computed."""
        strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()

        def keeps_fp32(name: str) -> bool:
            return any(part in name.split(".") for part in strict)

        routers = tuple(f"{name.rpartition('.')[0]}." for name in self._experts)
        for name, module in model.named_modules():
            for key, buffer in module.named_buffers(recurse=False):
                if buffer.is_meta:
                    raise ModelError(
                        f"architecture {self.config.architecture} does not say what {name}.{key} is before weights are "
                        "loaded; it cannot be served through Transformers"
                    )
            if list(module.parameters(recurse=False)) or list(module.buffers(recurse=False)):
                # A router's correction is learned, and none is another model.
                needs_buffers = f"{name}.".startswith(routers)
                self._held.append(
                    ModuleWeights(name, module, context, keeps_fp32, self._names, needs_buffers=needs_buffers)
                )

    def _set_attention(self, name: str) -> None:
        for module in (*self.decoder.modules(), self.model):
            if hasattr(module, "config"):
                module.config._attn_implementation = name

    # --- running ---

    def forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        metadata: AttentionMetadata,
        hooks: LayerObserver | None = None,
        hidden: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        step = self._step
        step.kv_caches, step.metadata, self._hooks = kv_caches, metadata, hooks
        inputs: dict[str, Any] = {"position_ids": positions.unsqueeze(0), "use_cache": False}
        if hidden is None:
            inputs["input_ids"] = token_ids.unsqueeze(0)
        else:
            self._hidden = hidden.unsqueeze(0)
            inputs["inputs_embeds"] = self._hidden.clone()  # some code scales them in place
        output = self.decoder(**inputs) if step.is_checked else self._first_step(inputs)
        result = output[0] if self.is_last_stage else self._leaving()
        self._hidden = self._hooks = None
        return result[0] if rows is None else result[0].index_select(0, rows)

    def _first_step(self, inputs: dict[str, Any]) -> Any:
        """As any other, and what the model asks of attention is noted or refused."""
        mask = torch.ones_like(inputs["position_ids"], dtype=torch.bool)
        output = self.decoder(**inputs, attention_mask=mask)
        if others := [index for index, heads in self._heads.items() if not heads.was_called]:
            raise ModelError(
                f"architecture {self.config.architecture} cannot be served through Transformers: its layer {others[0]} "
                "does without the attention function"
            )
        self._step.is_checked = True
        self._set_attention(PAGED)
        return output

    def _leaving(self) -> torch.Tensor:
        assert self._hidden is not None, "a layer of this stage has run, or a stage before it"
        return self._hidden

    def _enter_layer(
        self, index: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        step, hooks = self._step, self._hooks
        if hooks is not None:
            assert step.metadata is not None, "a step has begun"
            hooks.before_layer(index, step.kv_caches[index - self.layer_range.start], step.metadata)
        if self.is_first_stage or index != self.layer_range.start:
            return None
        if args:
            return (self._leaving(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._leaving()}

    def _leave_layer(self, index: int, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        step, hooks = self._step, self._hooks
        if hooks is not None:
            assert step.metadata is not None, "a step has begun"
            hooks.after_layer(index, step.kv_caches[index - self.layer_range.start], step.metadata)
        if index == self.layer_range.stop - 1 and not self.is_last_stage:
            self._hidden = output[0] if isinstance(output, tuple) else output

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.project_logits(hidden).float()
        if self.vocabulary.num_tokens < self.vocabulary.width:
            logits[:, self.vocabulary.num_tokens :] = float("-inf")
        return logits

    def project_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """By the model's own code around its head, which may scale or cap them."""
        self._given.hidden = hidden.unsqueeze(0)
        output = self.model(inputs_embeds=self._given.hidden, use_cache=False)
        self._given.hidden = None
        logits: torch.Tensor = output.logits[0]
        return logits

    # --- for the loader ---

    def tensor_name(self, stored: str) -> str:
        """As Transformers renames what checkpoints store. Raises ModelError where it also converts it."""
        names, prefix = self._names, self.model.base_model_prefix
        name, converted = rename_source_key(stored, self._renamings, self._converters, prefix, names)
        if converted is None:
            return name
        if name.rpartition(".")[0] not in self._experts:
            raise ModelError(
                f"architecture {self.config.architecture}: {stored} is stored in another form than the model holds it, "
                "which only native families load"
            )
        # Our experts take theirs one by one.
        single, _ = rename_source_key(stored, self._renamings, [], prefix, names)
        return single if single.startswith(f"{prefix}.") else f"{prefix}.{single}"

    def weight_holders(self) -> Iterator[HoldsWeights]:
        yield from super().weight_holders()
        yield from self._held

    def expects_elsewhere(self, name: str) -> bool:
        """Another stage's, a tied head that is stored once more, or what old checkpoints store and nobody reads."""
        is_derived = name.endswith("rotary_emb.inv_freq") or any(each.search(name) for each in self._ignored)
        expert = _ONE_EXPERT.match(name)
        is_expert = expert is not None and int(expert[2]) < self._experts.get(expert[1], 0)
        return is_derived or is_expert or name in self._names


def _build(config: ModelConfig, context: BuildContext) -> Any:
    """The model of Transformers, its weights without memory."""
    trust = config.trust_remote_code
    try:
        hf_config = read_config(config.path, config.raw, trust)
        with _NoMemory():
            model = transformers.AutoModelForCausalLM.from_config(
                hf_config, trust_remote_code=trust, dtype=torch.float32, attn_implementation=PAGED
            )
    except (ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{config.path}: Transformers {transformers.__version__} cannot build {config.architecture}: {error}"
        ) from error
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.dtype = context.dtype
    return model


def _changing_rope(model: Any) -> str | None:
    """The type of rotary embedding whose frequencies follow the length of a sequence, if the config says one."""
    rope = getattr(model.config, "rope_parameters", None) or {}
    sets = (rope, *(each for each in rope.values() if isinstance(each, dict)))
    return next((each["rope_type"] for each in sets if each.get("rope_type") in ("dynamic", "longrope")), None)


def _find_layers(base: nn.Module, config: ModelConfig) -> tuple[str, nn.ModuleList]:
    """Where in the decoder its layers are, and they."""
    found = [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_layers and "." not in name
    ] or [
        (name, module)
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_layers and name.count(".") == 1
    ]
    if len(found) != 1:
        raise ModelError(
            f"architecture {config.architecture}: {len(found)} lists of {config.num_layers} layers in its decoder; "
            "through Transformers models with one are served"
        )
    return found[0]


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)
