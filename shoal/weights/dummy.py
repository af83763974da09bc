"""Random weights without a file, for benchmarks and tests: the same for a seed whatever part a rank holds."""

from __future__ import annotations

import zlib

import torch

from shoal.layers.checkpoint import CheckpointTensor


def fill_random(tensor: CheckpointTensor, seed: int) -> None:
    """Norms are 1, biases 0; matrices are uniform with variance 1 / inputs, so that activations keep their size."""
    if tensor.kind == "norm":
        tensor.destination.fill_(1)
    elif tensor.kind == "bias":
        tensor.destination.zero_()
    else:
        device = tensor.destination.device
        generator = torch.Generator(device=device)
        # The CPU generator looks at 32 bits of its seed only.
        generator.manual_seed(zlib.crc32(f"{seed} {tensor.name}".encode()))
        bound = (3.0 / tensor.shape[-1]) ** 0.5
        if tensor.is_whole:
            tensor.destination.uniform_(-bound, bound, generator=generator)
        else:
            whole = torch.empty(tensor.shape, dtype=tensor.destination.dtype, device=device)
            tensor.destination.copy_(whole.uniform_(-bound, bound, generator=generator)[tensor.index])
