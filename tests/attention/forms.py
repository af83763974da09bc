"""One step through a backend, with any form, type of cache and device. For tests."""

from __future__ import annotations

import dataclasses

import torch

from shoal.attention.base import AttentionForm, AttentionMetadata, DeviceRows
from shoal.attention.cache_dtype import cells, encode, write_heads
from shoal.attention.registry import create_attention_backend
from tests.attention.test_backends import NUM_BLOCKS, Step

CPU = torch.device("cpu")


def device_of(name: str) -> torch.device:
    """Where a backend runs: those with kernels in the interpreter where there is no GPU."""
    return torch.device("cuda") if name in KERNELS and torch.cuda.is_available() else CPU


KERNELS = ("triton_paged", "deterministic_cuda")


def on(metadata: AttentionMetadata, device: torch.device) -> AttentionMetadata:
    moved = {name: getattr(metadata, name).to(device) for name in ("block_tables", "slot_mapping")}
    return dataclasses.replace(metadata, **moved)


def on_device_rows(metadata: AttentionMetadata) -> AttentionMetadata:
    """As a graph has it: a row for each token, and the table of all slots in another order than the sequences."""
    count = len(metadata.seq_lens)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(7))
    device = metadata.block_tables.device
    tables = torch.zeros_like(metadata.block_tables)
    tables[order.to(device)] = metadata.block_tables
    pairs = zip(metadata.query_lens, metadata.seq_lens, strict=True)
    lengths = torch.cat([torch.arange(length - num_new, length) + 1 for num_new, length in pairs])
    rows = order.repeat_interleave(torch.tensor(metadata.query_lens))
    rows = DeviceRows(
        rows.to(device, torch.int32), lengths.to(device, torch.int32), are_tokens=max(metadata.query_lens) > 1
    )
    return AttentionMetadata([], [], tables, metadata.slot_mapping, metadata.block_size, device_rows=rows)


def write_history(name: str, step: Step, cache: torch.Tensor, form: AttentionForm) -> None:
    """The old context to its slots of a cache of heads, on the CPU."""
    if name == "reference":
        slots = cells(cache).flatten(1, 2)
        slots[0, step.old_slots] = encode(step.old_keys, cache, form.key_scale)
        slots[1, step.old_slots] = encode(step.old_values, cache, form.value_scale)
    else:
        write_heads(cache, step.old_keys, step.old_values, step.old_slots, form)


def run_form(
    name: str, step: Step, form: AttentionForm, cache_dtype: torch.dtype | None = None, follow: bool = False
) -> torch.Tensor:
    """What the step's tokens get [T, Hq * D], on the CPU."""
    backend, device = create_attention_backend(name), device_of(name)
    num_kv_heads, head_dim = step.key.shape[1:]
    shape = backend.kv_cache_shape(NUM_BLOCKS, step.metadata.block_size, num_kv_heads, head_dim)
    cache = torch.zeros(shape, dtype=cache_dtype or step.key.dtype)
    write_history(name, step, cache, form)
    cache = cache.to(device)
    if form.sinks is not None:
        form = dataclasses.replace(form, sinks=form.sinks.to(device))
    metadata = on(step.metadata, device)
    if follow:
        metadata = on_device_rows(metadata)
    backend.prepare(metadata)
    heads = (x.to(device) for x in (step.query, step.key, step.value))
    return backend.forward(*heads, cache, metadata, form).cpu()


def run_latent(
    name: str,
    step: Step,
    value_dim: int,
    cache_dtype: torch.dtype | None = None,
    follow: bool = False,
    cache_scale: float = 1.0,
) -> torch.Tensor:
    """The same for a latent cache: the step's keys, of one KV head, are the rows. [T, Hq, value_dim], on the CPU."""
    backend, device = create_attention_backend(name), device_of(name)
    shape = backend.latent_cache_shape(NUM_BLOCKS, step.metadata.block_size, step.key.shape[2])
    cache = torch.zeros(shape, dtype=cache_dtype or step.key.dtype)
    cells(cache).flatten(0, 1)[step.old_slots] = encode(step.old_keys[:, 0], cache, cache_scale)
    cache = cache.to(device)
    scales = {"scale": 0.2, "value_dim": value_dim, "cache_scale": cache_scale}
    metadata = on(step.metadata, device)
    if follow:
        metadata = on_device_rows(metadata)
    backend.prepare(metadata)
    query, latent = step.query.to(device), step.key[:, 0].to(device)
    return backend.forward_latent(query, latent, cache, metadata, **scales).cpu()
