"""Print the shared memory, in bytes, of the attention kernels that need the most, compiled for a GPU that need not be
there: `python -m tests.kernels.shared_memory CAPABILITY`, such as 89."""

from __future__ import annotations

import sys
from typing import Any

import torch

import shoal.kernels.latent_attention as latent
import shoal.kernels.prefill_attention as prefill
from shoal.kernels.decode_attention import DecodeRows, DecodeWorkspace, decode_attention
from shoal.kernels.fixed_attention import fixed_decode, fixed_prefill
from tests.kernels.offline import compile_only

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASES = [(dtype, head_dim) for dtype in (torch.bfloat16, torch.float32) for head_dim in (128, 256)]


def pretend_tile_shapes(capability: int) -> None:
    """Tensors are on the CPU, shapes those of the GPU."""
    find, asked = prefill.tile_shape, torch.cuda.get_device_capability
    torch.cuda.get_device_capability = lambda *_: divmod(capability, 10)  # type: ignore[assignment]
    shapes = {(dtype, head_dim): find(head_dim, dtype, CUDA) for dtype, head_dim in CASES}
    kinds = [(dtype, fixed) for dtype in (torch.bfloat16, torch.float32) for fixed in (False, True)]
    rows = {(dtype, fixed): latent.latent_shape(dtype, CUDA, fixed=fixed) for dtype, fixed in kinds}
    torch.cuda.get_device_capability = asked
    prefill.tile_shape = lambda head_dim, dtype, device: shapes[dtype, head_dim]  # type: ignore[assignment]
    latent.latent_shape = lambda dtype, device, *, fixed: rows[dtype, fixed]  # type: ignore[assignment]


def main(capability: int) -> None:
    label = ""

    def show(name: str, kernel: Any) -> None:
        if name != "_merge_kernel":  # it has none
            print(f"{label}: {kernel.metadata.shared}", flush=True)

    compile_only(capability, show)
    pretend_tile_shapes(capability)
    for dtype, head_dim in CASES:
        query, key = torch.zeros(3, 32, head_dim, dtype=dtype), torch.zeros(3, 8, head_dim, dtype=dtype)
        kv_cache, output = torch.zeros(2, 8, 64, 16, head_dim, dtype=dtype), torch.zeros(3, 32 * head_dim, dtype=dtype)
        tables, row = torch.zeros(4, 64, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
        tiles = torch.zeros(2, 4, dtype=torch.int32)
        rows, workspace = DecodeRows(tables, row, row, row), DecodeWorkspace(CPU)
        case = f"{str(dtype).removeprefix('torch.')}, heads of {head_dim}"
        for workspace.num_processors, of in ((132, "few"), (4, "many")):
            label = f"decode of {of}, {case}"
            decode_attention(
                query, key, key, kv_cache, output, rows, workspace,
                scale=1.0, positions=row.long(), table=torch.zeros(64, head_dim),
            )  # fmt: skip
        label = f"prefill, {case}"
        prefill.prefill_attention(query, kv_cache, output, tables, tiles, scale=1.0)
        label = f"deterministic decode, {case}"
        fixed_decode(query, kv_cache, output, tables, row, row, row, scale=1.0)
        label = f"deterministic prefill, {case}"
        fixed_prefill(query, kv_cache, output, tables, tiles, scale=1.0)
    for dtype in (torch.bfloat16, torch.float32):
        query, output = torch.zeros(3, 128, 576, dtype=dtype), torch.zeros(3, 128, 512, dtype=dtype)
        cache = torch.zeros(64, 16, 576, dtype=dtype)
        for fixed in (False, True):
            case = f"{str(dtype).removeprefix('torch.')}, {'deterministic ' if fixed else ''}latents of 576"
            splits = None if fixed else latent.LatentWorkspace(CPU)
            label = f"decode, {case}"
            latent.latent_decode(query, cache, output, tables, row, row, row, splits, scale=1.0)
            label = f"prefill, {case}"
            latent.latent_prefill(query, cache, output, tables, tiles, fixed=fixed, scale=1.0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
