"""Deterministic attention on CUDA: right against the plain backend, in the interpreter too; on a GPU the same bits
however a context and its neighbours are laid out."""

from __future__ import annotations

import pytest
import torch

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

from shoal.attention.base import AttentionForm, AttentionMetadata, DeviceRows, HeadTransform  # noqa: E402
from shoal.attention.cache_dtype import cells  # noqa: E402
from shoal.attention.deterministic_cuda import DeterministicCudaAttention  # noqa: E402
from shoal.attention.reference import ReferenceAttention  # noqa: E402
from shoal.kernels.fixed_attention import SPLIT  # noqa: E402
from tests.attention.test_backends import STEPS, make_step  # noqa: E402
from tests.attention.test_triton_paged import compare, fill_caches, on_device  # noqa: E402

NUM_BLOCKS, LENGTH = 400, 1100


@pytest.mark.parametrize("case", STEPS)
@pytest.mark.parametrize(("window", "dtype"), [(None, torch.float32), (20, torch.float32), (300, torch.float16)])
def test_equals_the_reference(case: str, window: int | None, dtype: torch.dtype) -> None:
    for heads in [(4, 2, 32), (5, 1, 80)][: 1 if DEVICE.type == "cpu" and case == "past a split" else 2]:
        step = make_step(*STEPS[case], heads, 16, dtype)
        plain, cache = fill_caches(step)
        reference, backend = ReferenceAttention(), DeterministicCudaAttention()
        expected = reference.forward(step.query, step.key, step.value, plain, step.metadata, AttentionForm(0.3, window))
        metadata = on_device(step.metadata)
        backend.prepare(metadata)
        moved = (tensor.to(DEVICE) for tensor in (step.query, step.key, step.value))
        compare(backend.forward(*moved, cache, metadata, AttentionForm(0.3, window)), expected, cache, plain)


def test_follows_rows_of_the_device() -> None:
    step = make_step([1, 1, 1], [5, 300, 600], (4, 2, 32), 16, torch.float32)
    plain, cache = fill_caches(step)
    backend = DeterministicCudaAttention()
    expected = ReferenceAttention().forward(step.query, step.key, step.value, plain, step.metadata, AttentionForm(0.3))
    metadata = on_device(step.metadata)
    order = torch.tensor([2, 0, 1])
    rows = DeviceRows(order.to(DEVICE, torch.int32), torch.tensor([5, 300, 600], dtype=torch.int32, device=DEVICE))
    table = torch.empty_like(metadata.block_tables)
    table[order] = metadata.block_tables
    captured = AttentionMetadata([], [], table, metadata.slot_mapping, 16, device_rows=rows)
    backend.prepare(captured)
    moved = (tensor.to(DEVICE) for tensor in (step.query, step.key, step.value))
    compare(backend.forward(*moved, cache, captured, AttentionForm(0.3)), expected, cache, plain)


def attend(
    projected: torch.Tensor, num_heads: int, num_kv_heads: int, pieces: list[int], window: int | None, mates: int = 0,
    block_size: int = 16, cache_dtype: torch.dtype | None = None, softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """One sequence, computed in `pieces`; before it, in every step, `mates` sequences of one token each."""
    backend = DeterministicCudaAttention()
    length, head_dim = len(projected), projected.shape[1] // (num_heads + 2 * num_kv_heads)
    angles = torch.randn(length, head_dim // 2, generator=torch.Generator().manual_seed(3))
    transform = HeadTransform(torch.cat([angles.cos(), angles.sin()], dim=1).to(DEVICE))
    shape = backend.kv_cache_shape(NUM_BLOCKS, block_size, num_kv_heads, head_dim)
    cache = torch.full(shape, float("nan"), dtype=projected.dtype, device=DEVICE)
    if cache_dtype is not None:
        cache = cache.to(cache_dtype)
    num_blocks = -(-length // block_size)
    own, others = (torch.randperm(NUM_BLOCKS - 1)[: 2 * num_blocks].int() + 1).chunk(2)
    cells(cache)[:, :, others.long().to(DEVICE)] = 48 if cache_dtype else 0.5  # 48: the bits of 0.5
    lengths = [1 + 37 * mate % length for mate in range(mates)]
    outputs, start = [], 0
    for count in pieces:
        end = start + count
        tables = torch.cat([others[None].expand(mates, -1), own[None]])
        positions = torch.cat([torch.tensor(lengths, dtype=torch.int64) - 1, torch.arange(start, end)])
        rows = torch.tensor([*range(mates), *[mates] * count])
        slots = tables[rows, positions // block_size].long() * block_size + positions % block_size
        metadata = AttentionMetadata([1] * mates + [count], [*lengths, end], tables.to(DEVICE), slots.to(DEVICE), 16)
        metadata.block_size = block_size
        backend.prepare(metadata)
        step = torch.cat([torch.randn_like(projected[:1]).expand(mates, -1), projected[start:end]]).contiguous()
        form = AttentionForm(head_dim**-0.5, window, softcap, sinks)
        output = backend.forward_projected(
            step, positions.to(DEVICE), transform, cache, metadata, form, num_heads=num_heads
        )  # fmt: skip
        outputs.append(output[mates:])
        start = end
    assert start == length
    return torch.cat(outputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [(8, 2, 128), (14, 2, 64), (5, 1, 80)])
@pytest.mark.parametrize("window", [None, 400])
def test_same_bits_in_any_pieces_and_company(
    heads: tuple[int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(1)
    size = (num_heads + 2 * num_kv_heads) * head_dim
    projected = torch.randn((LENGTH, size), generator=generator).to(DEVICE, dtype)
    whole = attend(projected, num_heads, num_kv_heads, [LENGTH], window)
    assert torch.isfinite(whole).all()
    pieces = [500, 1, 1, 30, 1, 257, 1, 277, *[1] * 32]
    for arguments in ({}, {"mates": 1}, {"mates": 70}, {"mates": 200}, {"block_size": 64}):
        assert torch.equal(attend(projected, num_heads, num_kv_heads, pieces, window, **arguments), whole), arguments
    # A rank of as many as there are KV heads.
    split = projected.view(LENGTH, -1, head_dim)
    group = num_heads // num_kv_heads
    last = num_kv_heads - 1
    own = torch.cat(
        [split[:, last * group : num_heads], split[:, [num_heads + last, num_heads + num_kv_heads + last]]], 1
    )
    part = attend(own.flatten(1).contiguous(), group, 1, pieces, window)
    assert torch.equal(part, whole.view(LENGTH, num_heads, head_dim)[:, last * group :].flatten(1))


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn])
def test_same_bits_of_other_forms(cache_dtype: torch.dtype | None) -> None:
    """Sinks and a softcap, in a cache of 8-bit floats too."""
    generator = torch.Generator().manual_seed(1)
    projected = torch.randn((LENGTH, 12 * 128), generator=generator).to(DEVICE, torch.bfloat16)
    kind = {"softcap": 8.0, "sinks": torch.linspace(-1, 5, 8, device=DEVICE), "cache_dtype": cache_dtype}
    whole = attend(projected, 8, 2, [LENGTH], 400, **kind)
    assert torch.isfinite(whole).all()
    pieces = [500, 1, 1, 30, 1, 257, 1, 277, *[1] * 32]
    for mates in (0, 70, 200):
        assert torch.equal(attend(projected, 8, 2, pieces, 400, mates=mates, **kind), whole), mates


def test_scratch_memory_is_enough_for_every_number_of_sequences() -> None:
    """What `fixed_decode` asks for, by what its launch does: nothing once each sequence is walked by one program."""
    for num_heads, num_kv_heads, head_dim, context in ((32, 8, 128, 131072), (8, 1, 80, 5000), (4, 4, 64, 300)):
        most = DeterministicCudaAttention().scratch_bytes(num_heads, num_kv_heads, head_dim, context)
        max_splits, padded = -(-context // SPLIT), 128 if head_dim > 64 else 64
        for num_sequences in range(1, 300):
            num_pairs = num_sequences * num_kv_heads
            if min(max_splits, 264 // num_pairs) > 1:
                num_rows = num_pairs * max_splits * num_heads // num_kv_heads
                assert 4 * num_rows * (padded + 2) <= most
