"""The kernel that unpacks a captured step's rows against PyTorch's own operations."""

from __future__ import annotations

import torch

from shoal.worker.graphs import unpack_rows as unpack_plainly
from tests.worker.test_graphs import make_outputs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")


def random_rows(num_rows: int, num_slots: int, num_blocks: int, block_size: int) -> torch.Tensor:
    """Packed rows of different slots; a third bring a new block, a fifth a token; the last two are padding."""
    generator = torch.Generator().manual_seed(num_rows)
    packed = torch.randint(-(2**31), 2**31 - 1, (num_rows, 8), generator=generator, dtype=torch.int64).to(torch.int32)
    packed[:, 0] = torch.randperm(num_slots, generator=generator)[:num_rows].to(torch.int32)
    packed[:, 1] = torch.randint(num_blocks * block_size, (num_rows,), generator=generator).to(torch.int32)
    packed[:, 2] = torch.where(torch.arange(num_rows) % 5 == 0, torch.arange(num_rows), -1).to(torch.int32)
    packed[:, 3:5] = torch.rand(num_rows, 2, generator=generator).view(torch.int32)
    packed[:, 6] = packed[:, 0] * num_blocks + packed[:, 1] // block_size
    packed[:, 7] = torch.arange(100, 100 + num_rows)
    idle = torch.arange(num_rows) % 3 != 0
    packed[idle, 6], packed[idle, 7] = num_slots * num_blocks, 0
    packed[-2:] = torch.tensor([num_slots, 0, -1, 0, 0, 0, num_slots * num_blocks, 0], dtype=torch.int32)
    return packed


def test_unpacking() -> None:
    from shoal.kernels.step import unpack_rows

    for num_rows, block_size in ((3, 8), (130, 16), (300, 32)):
        num_slots, num_blocks = 300, 20
        packed = random_rows(num_rows, num_slots, num_blocks, block_size)
        table = torch.arange((num_slots + 1) * num_blocks, dtype=torch.int32).view(num_slots + 1, num_blocks)
        table[-1] = 0
        last_token = torch.arange(1000, 1000 + num_slots + 1)
        results = []
        for function, device in ((unpack_rows, DEVICE), (unpack_plainly, CPU)):
            outputs = make_outputs(num_rows, device)
            own_table = table.clone().to(device)
            function(packed.to(device), last_token.to(device), own_table, outputs, block_size)
            results.append([own_table.cpu(), *(tensor.cpu() for tensor in outputs.values())])
        for found, expected in zip(*results, strict=True):
            assert torch.equal(found, expected)
