"""What every model is to the worker and the loader.

T tokens of a step, R rows that need logits, H hidden size, W width of this rank's slice of the vocabulary.
"""

from __future__ import annotations

import abc
import functools
import re
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from shoal.attention.base import AttentionMetadata
from shoal.config.model_config import ModelConfig
from shoal.distributed.vocabulary import VocabularySlice
from shoal.layers.checkpoint import HoldsWeights
from shoal.layers.context import BuildContext
from shoal.layers.moe import RoutedExperts

_LAYER_NUMBER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class LayerObserver(Protocol):
    """Called around every layer: where KV cache enters or leaves the device while the model runs."""

    def before_layer(self, layer_index: int, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> None: ...

    def after_layer(self, layer_index: int, kv_cache: torch.Tensor, metadata: AttentionMetadata) -> None: ...


class CausalLM(nn.Module, abc.ABC):
    """A decoder, or one pipeline stage of it: the layers of `layer_range`, the embedding on the first stage, the final
    norm and the head on the last."""

    def __init__(self, config: ModelConfig, context: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.layer_range = context.layer_range or range(config.num_layers)
        self.is_first_stage = self.layer_range.start == 0
        self.is_last_stage = self.layer_range.stop == config.num_layers
        self.vocabulary = VocabularySlice(config.vocab_size, context.tensor_group)

    @abc.abstractmethod
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
        """One step. token_ids, positions [T] int64; kv_caches: one per layer of this stage, in the backend's shape.

        hidden [T, H]: what the stage before returned (not on the first stage). rows [R] int64, R at least 1, in any
        order: the tokens whose states are wanted of the last stage; None: all. Returns [T, H], or [R, H] of these:
        after the final norm on the last stage, else what the next stage takes.
        """

    @abc.abstractmethod
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, H] of the last stage -> this rank's logits [R, W], fp32: of `vocabulary`, -inf for its padding."""

    @abc.abstractmethod
    def project_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `compute_logits`, in the model's dtype and with anything in the columns of padding."""

    def compute_full_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, H] of the last stage -> logits of all ranks [R, vocabulary], fp32. All ranks must call it."""
        return self.vocabulary.gather(self.compute_logits(hidden))

    # --- for the loader ---

    # Families whose checkpoints call the same things by other names: a part of a name, and what it is called here.
    other_names: tuple[tuple[str, str], ...] = ()

    def tensor_name(self, stored: str) -> str:
        """The name under which the layers know a tensor of the checkpoint."""
        for theirs, ours in self.other_names:
            stored = stored.replace(theirs, ours)
        return stored

    def weight_holders(self) -> Iterator[HoldsWeights]:
        """The layers of this stage that have weights: what they yield is all that it reads from the checkpoint."""
        for module in self.modules():
            if module is not self and isinstance(module, HoldsWeights):
                yield module

    def expects_elsewhere(self, name: str) -> bool:
        """Whether a tensor that no layer of this stage reads still belongs there: another stage's, or derived."""
        if name.endswith("rotary_emb.inv_freq"):  # old checkpoints store what the config says
            return True
        if name == "lm_head.weight":  # a tied head may be stored once more
            return self.config.tie_word_embeddings or not self.is_last_stage or self.config.pooling is not None
        if self._of_other_ranks and any(part in self._of_other_ranks for part in _modules_around(name)):
            return True
        number = _LAYER_NUMBER.search(name)
        if number is not None:
            return int(number[1]) not in self.layer_range and int(number[1]) < self.config.num_layers
        return not (self.is_first_stage and self.is_last_stage)

    @functools.cached_property
    def takes_halves(self) -> bool:
        """Whether ranks may compute one half of a step's tokens while they sum the other."""
        return False

    @functools.cached_property
    def _of_other_ranks(self) -> frozenset[str]:
        """Modules and tensors of this stage's layers that other tensor ranks have: experts that are shared whole."""
        return frozenset().union(*(layer.elsewhere for layer in self.modules() if isinstance(layer, RoutedExperts)))

    @property
    def follows_device(self) -> bool:
        """Whether a CUDA graph can hold its steps: nothing in it waits for the host."""
        return all(layer.method.follows_device for layer in self.modules() if isinstance(layer, RoutedExperts))

    def weight_bytes(self) -> int:
        """Memory that the weights take on this rank."""
        return sum(holder.weight_bytes() for holder in self.weight_holders())


def _modules_around(name: str) -> Iterator[str]:
    """A tensor's name, and the modules that it is in, from the innermost."""
    while name:
        yield name
        name = name.rpartition(".")[0]
