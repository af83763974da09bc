"""Pooler: what becomes of a text's pooled hidden state, on the last stage of a model that makes vectors or scores.

`attach_pooler` takes the head for tokens away from a model and gives it this; the registry calls it.
R rows (texts), H hidden size, L labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from shoal.config.model_config import ModelConfig
from shoal.config.pooling import DenseLayer, PoolingConfig
from shoal.errors import ModelError
from shoal.layers.checkpoint import CheckpointTensor, whole
from shoal.layers.context import BuildContext
from shoal.layers.embedding import LogitsHead
from shoal.models.base import CausalLM

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "tanh": torch.tanh,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}


class Pooler(nn.Module):
    """Pooled hidden states in, embeddings or scores out, before normalisation and activation."""

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        """pooled [R, H], after the final norm -> [R, H or L], fp32. All ranks of the last stage must call it."""
        return pooled.float()


class ScoreHead(Pooler):
    """What *ForSequenceClassification has: a matrix of labels, of encoders a layer with biases and a tanh before it.
    Whole on every rank, and computed in fp32."""

    def __init__(self, context: BuildContext, names: tuple[str, ...], num_labels: int, hidden_size: int) -> None:
        super().__init__()
        *inner, outer = names
        sizes = [(name, hidden_size) for name in inner] + [(outer, num_labels)]
        options = {"dtype": context.dtype, "device": context.device}
        self._names = names
        self._weights = [torch.empty((size, hidden_size), **options) for _, size in sizes]
        self._biases = [torch.empty(size, **options) for _, size in sizes] if inner else []

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        pooled = pooled.float()
        for index, weight in enumerate(self._weights):
            if index:
                pooled = pooled.tanh()
            bias = self._biases[index].float() if self._biases else None
            pooled = torch.nn.functional.linear(pooled, weight.float(), bias)
        return pooled

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        for name, weight in zip(self._names, self._weights, strict=True):
            yield whole(f"{name}.weight", weight, "matrix")
        for name, bias in zip(self._names, self._biases, strict=False):
            yield whole(f"{name}.bias", bias, "bias")

    def process_after_load(self) -> None:
        return None

    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._weights, *self._biases))


class DenseLayers(Pooler):
    """Matrices behind the pooling, which sentence-transformers keeps beside the model, each in a directory of its own.
    Whole on every rank, and computed in fp32."""

    def __init__(self, context: BuildContext, path: str, layers: tuple[DenseLayer, ...]) -> None:
        super().__init__()
        self._layers = layers
        self._tensors = [_read_dense(Path(path), layer, context.device) for layer in layers]

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        pooled = pooled.float()
        for layer, (weight, bias) in zip(self._layers, self._tensors, strict=True):
            pooled = torch.nn.functional.linear(pooled, weight, bias)
            if layer.activation != "identity":
                pooled = _ACTIVATIONS[layer.activation](pooled)
        return pooled

    def checkpoint_tensors(self) -> Iterator[CheckpointTensor]:
        """None: they were read when this was made, from files of their own."""
        return iter(())

    def process_after_load(self) -> None:
        pass

    def weight_bytes(self) -> int:
        return sum(tensor.nbytes for pair in self._tensors for tensor in pair if tensor is not None)


def _read_dense(path: Path, layer: DenseLayer, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Raises ModelError for a file that is missing, or has other tensors."""
    file = path / layer.directory / "model.safetensors"
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read: {error}; weights of Dense are read as safetensors only") from None
    wanted = {"linear.weight": [layer.out_features, layer.in_features]}
    if layer.bias:
        wanted["linear.bias"] = [layer.out_features]
    found = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if found != wanted:
        raise ModelError(f"{file} has the tensors {found}; config.json beside it says {wanted}")
    on_device = {name: tensor.to(device, torch.float32) for name, tensor in tensors.items()}
    return on_device["linear.weight"], on_device.get("linear.bias")


class TokenScore(Pooler):
    """What the model's own head says between two tokens ("no" and "yes"): rerankers made of generating models."""

    def __init__(self, model: CausalLM, label_token_ids: tuple[int, int]) -> None:
        super().__init__()
        self._logits = model.compute_full_logits  # not the model itself: it would be a part of its own part
        self._no, self._yes = label_token_ids

    def forward(self, pooled: torch.Tensor) -> torch.Tensor:
        # The softmax over both is the sigmoid of their difference.
        logits = self._logits(pooled)
        return (logits[:, self._yes] - logits[:, self._no]).unsqueeze(1)


def attach_pooler(model: CausalLM, config: ModelConfig, pooling: PoolingConfig, context: BuildContext) -> None:
    """Make the model one for vectors or scores: `pooler` on its last stage, and no head that nobody asks."""
    if pooling.label_token_ids is not None:
        if model.is_last_stage:
            model.pooler = TokenScore(model, pooling.label_token_ids)
        return
    for name, module in list(model.named_children()):
        if isinstance(module, LogitsHead):
            setattr(model, name, None)
    if model.is_last_stage:
        if pooling.task == "score":
            model.pooler = ScoreHead(context, pooling.score_layers, pooling.num_labels, config.hidden_size)
        else:
            model.pooler = DenseLayers(context, config.path, pooling.dense) if pooling.dense else Pooler()
