"""Token and position embeddings, and the head that turns hidden states into logits.

T tokens, R rows, H hidden size, V vocabulary, W width of this rank's slice of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from shoal.distributed.vocabulary import VocabularySlice
from shoal.layers.activation import activation
from shoal.layers.checkpoint import CheckpointTensor, whole
from shoal.layers.context import BuildContext
from shoal.layers.linear import Part, checkpoint_tensor
from shoal.quantization.base import LinearSpec


class Embedding(nn.Module):
    """A table of rows, looked up by id; whole on every rank."""

    def __init__(self, context: BuildContext, name: str, num_rows: int, size: int) -> None:
        super().__init__()
        self.name = name
        self.weight = torch.empty((num_rows, size), dtype=context.dtype, device=context.device)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [T] -> [T, size]."""
        return self.weight.index_select(0, ids)

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        yield whole(f"{self.name}.weight", self.weight, "embedding")

    def process_after_load(self) -> None:
        return None

    def weight_bytes(self) -> int:
        return self.weight.nbytes


class VocabularyEmbedding(Embedding):
    """The embedding of tokens: each rank has the rows of its slice of the vocabulary."""

    def __init__(self, context: BuildContext, name: str, vocab_size: int, size: int) -> None:
        vocabulary = VocabularySlice(vocab_size, context.tensor_group)
        super().__init__(context, name, vocabulary.width, size)
        self.weight[vocabulary.num_tokens :].zero_()
        self.vocabulary = vocabulary

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [T] -> [T, size], exact: all ranks but one add zeros."""
        vocabulary = self.vocabulary
        if vocabulary.is_whole:
            return super().forward(ids)
        elsewhere = vocabulary.holds(ids).logical_not_()
        found = self.weight.index_select(0, (ids - vocabulary.start).masked_fill_(elsewhere, 0))
        assert vocabulary.group is not None
        return vocabulary.group.all_reduce(found.masked_fill_(elsewhere.unsqueeze(1), 0))

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        vocabulary, size = self.vocabulary, self.weight.shape[1]
        yield CheckpointTensor(
            name=f"{self.name}.weight",
            shape=(vocabulary.vocab_size, size),
            index=(vocabulary.tokens, slice(0, size)),
            destination=self.weight[: vocabulary.num_tokens],
            kind="embedding",
        )


class LogitsHead(nn.Module):
    """The vocabulary projection. Tied: it multiplies by the embedding's table, which it reads from the embedding where
    that is on this rank, and from the checkpoint under the embedding's name where it is on another stage."""

    def __init__(
        self,
        context: BuildContext,
        name: str,
        vocab_size: int,
        hidden_size: int,
        tied: VocabularyEmbedding | None,
        *,
        softcap: float | None = None,
    ) -> None:
        """softcap: logits become cap * tanh(logits / cap) (Gemma 2)."""
        super().__init__()
        self.name, self.hidden_size, self.softcap = name, hidden_size, softcap
        self._tanh = activation("tanh", context.deterministic and context.device.type == "cpu")
        self.vocabulary = VocabularySlice(vocab_size, context.tensor_group)
        spec = LinearSpec(
            in_features=hidden_size,
            out_features=self.vocabulary.width,
            bias=False,
            dtype=context.dtype,
            device=context.device,
            deterministic=context.deterministic,
            names=(name,),
            part_sizes=(self.vocabulary.width,),
        )
        self.method = context.quantization.linear(spec, None if tied is None else tied.weight)
        # Where the table ends within this rank's slice, what follows it is not loaded.
        for tensor in self.method.tensors():
            if (dim := tensor.out_dim) is not None:
                filled = math.ceil(self.vocabulary.num_tokens / tensor.out_unit)
                tensor.data.narrow(dim, filled, tensor.data.shape[dim] - filled).zero_()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, H] -> this rank's logits [R, W], fp32; -inf for padding."""
        logits = self.project(hidden).float()
        if self.vocabulary.num_tokens < self.vocabulary.width:
            logits[:, self.vocabulary.num_tokens :] = float("-inf")
        return logits

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """As the product gives them, in the model's dtype: what stands in the columns of padding is no logit."""
        logits = self.method.apply(hidden)
        return logits if self.softcap is None else self._tanh(logits / self.softcap) * self.softcap

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        vocabulary, size = self.vocabulary, self.hidden_size
        part = Part(self.name, vocabulary.vocab_size, vocabulary.tokens)
        for tensor in self.method.tensors():
            yield checkpoint_tensor(tensor, part, 0, 0, is_last=True, in_features=size, columns=slice(0, size))

    def process_after_load(self) -> None:
        self.method.process_after_load()

    def weight_bytes(self) -> int:
        return self.method.weight_bytes()
