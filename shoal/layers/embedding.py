"""Token and position embeddings, and the head that turns hidden states into logits. T tokens, R rows, H hidden size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from shoal.layers.checkpoint import CheckpointTensor, whole
from shoal.layers.context import BuildContext
from shoal.quantization.base import LinearSpec


class Embedding(nn.Module):
    """A table of rows, looked up by id."""

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


class LogitsHead(nn.Module):
    """The vocabulary projection. Tied: it multiplies by the embedding's table, which it reads from the embedding where
    that is on this rank, and from the checkpoint under the embedding's name where it is on another stage."""

    def __init__(
        self, context: BuildContext, name: str, vocab_size: int, hidden_size: int, tied: Embedding | None
    ) -> None:
        super().__init__()
        self.name = name
        spec = LinearSpec(
            in_features=hidden_size,
            out_features=vocab_size,
            bias=False,
            dtype=context.dtype,
            device=context.device,
            deterministic=context.deterministic,
        )
        self.method = context.quantization.linear(spec, None if tied is None else tied.weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [R, H] -> logits [R, vocabulary], fp32."""
        return self.method.apply(hidden).float()

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        for tensor in self.method.tensors():
            yield whole(f"{self.name}.{tensor.suffix}", tensor.data, "embedding")

    def process_after_load(self) -> None:
        self.method.process_after_load()

    def weight_bytes(self) -> int:
        return self.method.weight_bytes()
