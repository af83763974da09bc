"""The Triton backend against the one that is written out plainly: in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

from shoal.attention.base import AttentionMetadata, DeviceRows, HeadTransform  # noqa: E402
from shoal.attention.reference import ReferenceAttention  # noqa: E402
from shoal.attention.triton_paged import TritonPagedAttention  # noqa: E402
from tests.attention.test_backends import NUM_BLOCKS, STEPS, Step, make_step  # noqa: E402

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def fill_caches(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Caches of the reference and of the kernels with the step's old context. All other cells are not a number."""
    num_kv_heads, head_dim = step.key.shape[1:]
    block_size = step.metadata.block_size
    plain = torch.full((2, NUM_BLOCKS, block_size, num_kv_heads, head_dim), float("nan"), dtype=step.key.dtype)
    slots = plain.flatten(1, 2)
    slots[0, step.old_slots], slots[1, step.old_slots] = step.old_keys, step.old_values
    return plain, plain.permute(0, 3, 1, 2, 4).contiguous().to(DEVICE)


def on_device(metadata: AttentionMetadata) -> AttentionMetadata:
    moved = {name: getattr(metadata, name).to(DEVICE) for name in ("block_tables", "slot_mapping")}
    return dataclasses.replace(metadata, **moved)


def compare(found: torch.Tensor, expected: torch.Tensor, found_cache: torch.Tensor, cache: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(found.cpu(), expected, atol=tolerance, rtol=tolerance)
    seen = found_cache.cpu().permute(0, 2, 3, 1, 4)
    torch.testing.assert_close(seen, cache, atol=tolerance, rtol=tolerance, equal_nan=True)


def check_forward(step: Step, window: int | None) -> None:
    plain, cache = fill_caches(step)
    reference, backend = ReferenceAttention(), TritonPagedAttention()
    arguments = {"scale": 0.3, "sliding_window": window}
    expected = reference.forward(step.query, step.key, step.value, plain, step.metadata, **arguments)
    metadata = on_device(step.metadata)
    backend.prepare(metadata)
    heads = (tensor.to(DEVICE) for tensor in (step.query, step.key, step.value))
    compare(backend.forward(*heads, cache, metadata, **arguments), expected, cache, plain)


# The interpreter is slow, and gets products of bfloat16 wrong.
ON_GPU = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs compiled kernels")
GPU_ONLY = [pytest.mark.gpu, ON_GPU]
CASES = [pytest.param(case, marks=GPU_ONLY if case == "past a split" else []) for case in STEPS]
HALF_TYPES = [torch.float16, pytest.param(torch.bfloat16, marks=GPU_ONLY)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("heads", [(4, 4, 32), (14, 2, 64), (5, 1, 80)])
@pytest.mark.parametrize("window", [None, 1, 20, 513])
def test_equals_the_reference(case: str, heads: tuple[int, int, int], window: int | None) -> None:
    check_forward(make_step(*STEPS[case], heads, 16, torch.float32), window)


def test_many_query_heads_for_one_kv_head() -> None:
    """More than the matrix units take at once."""
    check_forward(make_step([1, 4, 1], [30, 20, 200], (40, 2, 32), 16, torch.float32), None)


def test_prompts_of_more_query_heads_than_a_tile_has_rows() -> None:
    """48 for one KV head, where a tile of fp32 has 32."""
    for window in (None, 20):
        check_forward(make_step([3, 1, 40], [30, 20, 40], (48, 1, 32), 16, torch.float32), window)


@pytest.mark.parametrize("dtype", HALF_TYPES)
@pytest.mark.parametrize(("head_dim", "block_size"), [(96, 8), (128, 64), (256, 256), (128, 16)])
def test_types_and_sizes(dtype: torch.dtype, head_dim: int, block_size: int) -> None:
    check_forward(make_step([1, 20, 1, 3], [30, 20, 41, 160], (8, 2, head_dim), block_size, dtype), 25)


def plain_transform(projected: torch.Tensor, positions: torch.Tensor, transform: HeadTransform, num_heads: int,
                    num_kv_heads: int) -> list[torch.Tensor]:  # fmt: skip
    """Norm, then rotation, each rounded, as the layers do it."""
    head_dim = transform.table.shape[1]
    heads = projected.view(len(projected), -1, head_dim).split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    cos, sin = transform.table[positions][:, None].chunk(2, dim=-1)
    out = []
    for x, weight in ((heads[0], transform.query_norm), (heads[1], transform.key_norm)):
        wide = x.float()
        if weight is not None:
            wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + transform.eps) * weight.float()
            wide = wide.to(x.dtype).float()
        a, b = wide.chunk(2, dim=-1)
        out.append(torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype))
    return [*out, heads[2]]


@pytest.mark.parametrize("case", ["one decode", "decodes", "whole prefills", "mixed"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES])
@pytest.mark.parametrize("follow", [False, True])
def test_projected_heads(case: str, norm: bool, dtype: torch.dtype, follow: bool) -> None:
    query_lens, seq_lens = STEPS[case]
    num_heads, num_kv_heads, head_dim = 6, 2, 64
    step = make_step(query_lens, seq_lens, (num_heads, num_kv_heads, head_dim), 16, dtype)
    pairs = zip(query_lens, seq_lens, strict=True)
    positions = torch.cat([torch.arange(length - num_new, length) for num_new, length in pairs])
    generator = torch.Generator().manual_seed(3)
    angles = torch.rand((max(seq_lens), head_dim // 2), generator=generator) * 6
    weights = 1 + torch.rand((2, head_dim), generator=generator).to(dtype) if norm else [None, None]
    transform = HeadTransform(torch.cat([angles.cos(), angles.sin()], dim=1), weights[0], weights[1], 1e-5)
    projected = torch.cat([step.query, step.key, step.value], dim=1).flatten(1)
    plain, cache = fill_caches(step)
    heads = plain_transform(projected, positions, transform, num_heads, num_kv_heads)
    expected = ReferenceAttention().forward(*heads, plain, step.metadata, scale=0.1)

    metadata = on_device(step.metadata)
    if follow:  # tables of all slots, in another order than the sequences, and a row for each token
        order = torch.randperm(len(seq_lens), generator=generator)
        tables = torch.zeros_like(metadata.block_tables)
        tables[order] = metadata.block_tables
        per_token = order.repeat_interleave(torch.tensor(query_lens))
        rows = DeviceRows(
            per_token.to(DEVICE, torch.int32), (positions + 1).to(DEVICE, torch.int32), are_tokens=max(query_lens) > 1
        )
        metadata = AttentionMetadata([], [], tables, metadata.slot_mapping, 16, device_rows=rows)
    backend = TritonPagedAttention()
    moved = HeadTransform(
        transform.table.to(DEVICE), *(None if w is None else w.to(DEVICE) for w in weights), eps=transform.eps
    )
    for _ in range(2):  # counters of the splits are as they were
        backend.prepare(metadata)
        found = backend.forward_projected(
            projected.to(DEVICE), positions.to(DEVICE), moved, cache, metadata, num_heads=num_heads, scale=0.1
        )
        compare(found, expected, cache, plain)
