"""Random weights without a file, for benchmarks and tests: the same for a seed whatever part a rank holds."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch

from shoal.layers.checkpoint import CheckpointTensor


def fill_random(tensor: CheckpointTensor, seed: int) -> None:
    """Norms are 1, biases 0; matrices are uniform with variance 1 / inputs, so that activations keep their size. What a
    quantized matrix consists of fills itself."""
    if tensor.fill is not None:
        _fill_by(tensor.fill, tensor, seed)
    elif tensor.kind == "norm":
        tensor.destination.fill_(1)
    elif tensor.kind == "bias":
        tensor.destination.zero_()
    else:
        bound = (3.0 / tensor.shape[-1]) ** 0.5
        _fill_by(lambda whole, generator: whole.uniform_(-bound, bound, generator=generator), tensor, seed)


def _fill_by(fill: Callable[[torch.Tensor, torch.Generator], object], tensor: CheckpointTensor, seed: int) -> None:
    device = tensor.destination.device
    generator = torch.Generator(device=device)
    # The CPU generator looks at 32 bits of its seed only.
    generator.manual_seed(zlib.crc32(f"{seed} {tensor.name}".encode()))
    if tensor.is_whole:
        fill(tensor.destination, generator)
    else:
        whole = torch.empty(tensor.shape, dtype=tensor.destination.dtype, device=device)
        fill(whole, generator)
        tensor.destination.copy_(whole[tensor.index])
