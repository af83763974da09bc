"""The Triton backend against the one that is written out plainly: in the interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tests.kernels.conftest  # noqa: F401  the interpreter, before Triton's own functions are made

pytest.importorskip("triton")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

from shoal.attention.base import AttentionForm, AttentionMetadata, HeadTransform  # noqa: E402
from shoal.attention.reference import ReferenceAttention  # noqa: E402
from shoal.attention.registry import create_attention_backend  # noqa: E402
from shoal.attention.triton_paged import TritonPagedAttention  # noqa: E402
from shoal.config.rope import RopeConfig  # noqa: E402
from shoal.layers.attention import RotaryAttention  # noqa: E402
from shoal.layers.context import BuildContext  # noqa: E402
from shoal.layers.norm import RMSNorm  # noqa: E402
from shoal.layers.rotary import RotaryEmbedding  # noqa: E402
from tests.attention.forms import on_device_rows, padded, unpadded  # noqa: E402
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
    form = AttentionForm(0.3, window)
    expected = reference.forward(step.query, step.key, step.value, plain, step.metadata, form)
    metadata = on_device(step.metadata)
    backend.prepare(metadata)
    heads = (tensor.to(DEVICE) for tensor in (step.query, step.key, step.value))
    compare(backend.forward(*heads, cache, metadata, form), expected, cache, plain)


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


def stored_order(head_dim: int, rotary_dim: int, interleaved: bool) -> torch.Tensor:
    """Where the numbers of a stored key stood in its head: the first of each pair, then the second."""
    places = torch.arange(head_dim)
    if interleaved:
        return torch.cat([places[0::2], places[1::2]])
    turning, rest = places[:rotary_dim].chunk(2), places[rotary_dim:].chunk(2)
    return torch.cat([turning[0], rest[0], turning[1], rest[1]]) if len(rest[0]) else places


@pytest.mark.parametrize("case", ["decodes", "mixed"])
@pytest.mark.parametrize("backend_name", ["triton_paged", "deterministic_cuda"])
@pytest.mark.parametrize(("rotary_dim", "interleaved"), [(16, False), (16, True), (32, True)])
def test_heads_that_turn_in_part_or_side_by_side(
    case: str, backend_name: str, rotary_dim: int, interleaved: bool
) -> None:
    """Through the layer: the backend's own transform against the plain operations."""
    query_lens, seq_lens = {"decodes": ([1] * 2, [3, 40]), "mixed": ([1, 12, 1], [9, 20, 40])}[case]
    step = make_step(query_lens, seq_lens, (6, 2, 32), 16, torch.float32)
    config = RopeConfig(theta=100.0, scaling=None, parameters={})
    pairs = zip(query_lens, seq_lens, strict=True)
    positions = torch.cat([torch.arange(length - num_new, length) for num_new, length in pairs])
    projected = torch.cat([step.query, step.key, step.value], dim=1).flatten(1)
    order = stored_order(32, rotary_dim, interleaved)
    outputs, caches = [], []
    for name, device in (("reference", torch.device("cpu")), (backend_name, DEVICE)):
        context = BuildContext(
            dtype=torch.float32, device=device, attention_backend=create_attention_backend(name), deterministic=False
        )
        rotary = RotaryEmbedding(config, 32, 64, device, rotary_dim=rotary_dim, interleaved=interleaved)
        norms = [RMSNorm(context, side, 32, 1e-5) for side in ("q_norm", "k_norm")]
        for norm in norms:
            norm.weight.copy_(torch.linspace(0.5, 1.5, 32))
        layer = RotaryAttention(
            context, 32, None, num_heads=6, num_kv_heads=2, rotary=rotary, query_norm=norms[0], key_norm=norms[1],
            softcap=20.0,
        )  # fmt: skip
        plain, cache = fill_caches(step)
        cache[0] = cache[0][..., order.to(DEVICE)]
        metadata = step.metadata if name == "reference" else on_device(step.metadata)
        own = plain if name == "reference" else cache
        context.attention_backend.prepare(metadata)
        angles = rotary.lookup(positions.to(device))
        outputs.append(layer.forward_projected(projected.to(device), angles, own, metadata))
        caches.append(own)
    caches[0][0] = caches[0][0][..., order]
    compare(outputs[1], outputs[0], caches[1], caches[0])


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
    expected = ReferenceAttention().forward(*heads, plain, step.metadata, AttentionForm(0.1))

    metadata = on_device(step.metadata)
    positions = positions.to(DEVICE)
    if follow:
        metadata = on_device_rows(metadata)
        projected, positions = padded(projected.to(DEVICE), metadata), padded(positions, metadata)
    backend = TritonPagedAttention()
    moved = HeadTransform(
        transform.table.to(DEVICE), *(None if w is None else w.to(DEVICE) for w in weights), eps=transform.eps
    )
    for _ in range(2):  # counters of the splits are as they were
        backend.prepare(metadata)
        found = backend.forward_projected(
            projected.to(DEVICE), positions, moved, cache, metadata, AttentionForm(0.1), num_heads=num_heads
        )
        found = unpadded(found, step)
        cache[:, :, 0] = float("nan")  # what pads the step went there
        compare(found, expected, cache, plain)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("case", CASES[1:])
def test_a_step_in_two_halves(case: str, window: int | None) -> None:
    """Layers in halves attend to the first tokens, then to the rest, whose prompt may have begun in the first."""
    step = make_step(*STEPS[case], (4, 2, 16), 16, torch.float32)
    num_tokens = step.query.shape[0]
    form = AttentionForm(0.3, window)
    for cut in {num_tokens // 2, num_tokens - 1}:
        plain, cache = fill_caches(step)
        expected = ReferenceAttention().forward(step.query, step.key, step.value, plain, step.metadata, form)
        backend = TritonPagedAttention()
        halves = on_device(step.metadata).split(cut)
        for metadata in halves:
            backend.prepare(metadata)
        parts = [
            backend.forward(*(each[rows].to(DEVICE) for each in (step.query, step.key, step.value)), cache, half, form)
            for half, rows in zip(halves, (slice(cut), slice(cut, None)), strict=True)
        ]
        compare(torch.cat(parts), expected, cache, plain)
