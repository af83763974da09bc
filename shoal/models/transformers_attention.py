"""Paged attention as an attention function of Transformers, and the look at what a model asks of attention beside.

What ours does not do is refused by name at the model's first step: masks of a model's own, biases, unknown arguments.
T tokens of a step, Hq and Hk query and KV heads as the model's code brings them, D head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from shoal.attention.base import AttentionMetadata
from shoal.config.model_config import ModelConfig
from shoal.errors import ModelError
from shoal.layers.attention import Attention
from shoal.layers.context import BuildContext

# Names in Transformers' registries. The second also makes masks, out of which the window is read.
PAGED, CHECKED = "shoal_paged", "shoal_checked"
# Where a module of a layer finds its PagedHeads.
_ATTRIBUTE = "shoal_paged_heads"
# Arguments that change nothing here: positions are in the metadata, the rest asks for outputs that nobody reads.
_HARMLESS = frozenset(
    ("position_ids", "position_embeddings", "cache_position", "use_cache", "past_key_values", "layer_idx")
)


@dataclasses.dataclass(slots=True)
class Step:
    """What the layers of one model share while it runs."""

    kv_caches: list[torch.Tensor] = dataclasses.field(default_factory=list)
    metadata: AttentionMetadata | None = None
    # The first step tells what attention is asked for.
    is_checked: bool = False


class PagedHeads:
    """The attention of one layer on this rank.

    With `shares_heads` the model's code has this rank's heads alone; else all of them: this rank attends with its own,
    and the ranks put them together.
    """

    def __init__(
        self, config: ModelConfig, context: BuildContext, step: Step, index: int, cache: int, *, shares_heads: bool
    ) -> None:
        """index: of the layer; cache: of its KV cache on this stage."""
        self._config, self._step, self._index, self._cache = config, step, index, cache
        self._context, self._group = context, context.tensor_group
        parallel = context.parallel
        self._is_split = parallel.tensor_size > 1
        self._gathers = self._is_split and not shares_heads
        self._heads = parallel.tensor_slice(config.num_heads, "attention heads")
        self._kv_heads = parallel.kv_head_slice(config.num_kv_heads)
        # Made now, so that a backend that cannot do even this is refused while there is a choice.
        self._attention = Attention(context, config.head_dim, None)
        self.was_called = False

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        arguments: dict[str, Any],
    ) -> torch.Tensor:
        """query [1, Hq, T, D]; key, value [1, Hk, T, D] of the step's new tokens -> [1, T, Hq, D]."""
        query, key, value = (heads[0].transpose(0, 1).contiguous() for heads in (query, key, value))
        if not self._step.is_checked:
            self._check(query, key, value, mask, arguments)
        elif mask is not None:
            raise self._refusal("adds a mask of its own to the scores in some steps")
        if self._gathers:
            query, key, value = query[:, self._heads], key[:, self._kv_heads], value[:, self._kv_heads]
        assert self._step.metadata is not None, "a step has begun"
        output = self._attention(query, key, value, self._step.kv_caches[self._cache], self._step.metadata)
        if self._gathers:
            output = self._group.all_gather(output)
        return output.view(1, output.shape[0], -1, query.shape[2])

    def _check(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        arguments: dict[str, Any],
    ) -> None:
        """Make the layer's attention of what its first call asks for. Raises ModelError, AttentionRefusal."""
        if self.was_called:
            raise self._refusal("calls attention more than once in a layer")
        self.was_called = True
        config = self._config
        own, own_kv = self._heads.stop - self._heads.start, self._kv_heads.stop - self._kv_heads.start
        shares = self._is_split and not self._gathers
        num_heads, num_kv_heads = (own, own_kv) if shares else (config.num_heads, config.num_kv_heads)
        for what, heads, count in (
            ("query", query, num_heads),
            ("key", key, num_kv_heads),
            ("value", value, num_kv_heads),
        ):
            if heads.shape[1:] != (count, config.head_dim):
                raise self._refusal(
                    f"has {heads.shape[1]} {what} heads of {heads.shape[2]} where its config says {count} of "
                    f"{config.head_dim}"
                )
        arguments = dict(arguments)
        scale, softcap, sinks = (arguments.pop(name, None) for name in ("scaling", "softcap", "s_aux"))
        window = arguments.pop("sliding_window", None)
        if not arguments.pop("is_causal", True):
            raise self._refusal("attends to later tokens")
        if arguments.pop("dropout", 0.0):
            raise self._refusal("drops attention weights at random")
        for name, given in arguments.items():
            if name not in _HARMLESS and given is not None and given is not False:
                raise self._refusal(f"gives attention an argument {name!r}, which paged attention does not know")
        if sinks is not None:
            sinks = sinks.detach().float()
            sinks = sinks[self._heads] if sinks.shape[0] == config.num_heads else sinks
        self._attention = Attention(
            self._context,
            config.head_dim,
            self._window(mask, window),
            scale=None if scale is None else float(scale),
            softcap=softcap,
            sinks=sinks,
        )

    def _window(self, mask: torch.Tensor | None, given: int | None) -> int | None:
        """The mask says what is seen; what the layer says beside is for attention functions without masks."""
        if mask is None:
            return given
        if not hasattr(mask, "shoal_window"):
            raise self._refusal("adds a mask or bias of its own to the scores (ALiBi, for one)")
        window: int | None = mask.shoal_window
        return window

    def _refusal(self, what: str) -> ModelError:
        return ModelError(
            f"architecture {self._config.architecture} cannot be served through Transformers: its layer {self._index} "
            f"{what}"
        )


def give_heads(layer: nn.Module, heads: PagedHeads) -> None:
    """Whichever module of the layer calls the attention function finds them."""
    for module in layer.modules():
        module.__dict__[_ATTRIBUTE] = heads


def _paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    heads: PagedHeads = module.__dict__[_ATTRIBUTE]
    return heads.attend(query, key, value, attention_mask, arguments), None


def _mask_with_window(
    *, mask_function: Callable[..., Any], device: torch.device, config: Any, **_: Any
) -> torch.Tensor:
    """Instead of a mask: a tensor that says which window the mask would have, and stands for it."""
    longest = 2 * max(int(getattr(config, "max_position_embeddings", 0) or 0), 4096)
    window = _window_of(mask_function, longest)
    marker = torch.zeros((1, 1, 1, 1), device=device)
    marker.shoal_window = window  # type: ignore[attr-defined]
    return marker


def _window_of(mask_function: Callable[..., Any], longest: int) -> int | None:
    """None: all that is before. Raises ModelError for a mask that is no window of earlier tokens."""
    zero, keys = torch.tensor(0), torch.arange(longest + 1)
    counts = set()
    for query in (longest - 1, longest - 2):
        seen = torch.as_tensor(mask_function(zero, zero, torch.tensor(query), keys)).expand(keys.shape)
        count = int(seen.sum())
        if count > query + 1 or not bool(seen[query + 1 - count : query + 1].all()):
            raise ModelError(
                "this model masks more than a window of earlier tokens (chunks, blocks or later tokens that are "
                "seen), which paged attention does not do"
            )
        counts.add(None if count == query + 1 else count)
    if len(counts) != 1:
        raise ModelError("this model masks by chunks, which paged attention does not do")
    return counts.pop()


for _name in (PAGED, CHECKED):
    AttentionInterface.register(_name, _paged_attention)
AttentionMaskInterface.register(CHECKED, _mask_with_window)
