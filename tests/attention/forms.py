"""One step through a backend, with any form, type of cache and device. For tests."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from shoal.attention.base import AttentionForm, AttentionMetadata, DeviceRows
from shoal.attention.cache_dtype import cells, encode, write_heads
from shoal.attention.registry import create_attention_backend
from shoal.attention.sequences import DeviceSequences
from tests.attention.test_backends import NUM_BLOCKS, Step

CPU = torch.device("cpu")
PADDING = 3


def device_of(name: str) -> torch.device:
    """Where a backend runs: those with kernels in the interpreter where there is no GPU."""
    return torch.device("cuda") if name in KERNELS and torch.cuda.is_available() else CPU


KERNELS = ("triton_paged", "deterministic_cuda")


def on(metadata: AttentionMetadata, device: torch.device) -> AttentionMetadata:
    moved = {name: getattr(metadata, name).to(device) for name in ("block_tables", "slot_mapping")}
    return dataclasses.replace(metadata, **moved)


def on_device_rows(metadata: AttentionMetadata) -> AttentionMetadata:
    """As a graph has it: with the table of all slots in another order than the sequences, and PADDING tokens too many
    where there are prompts."""
    count = len(metadata.seq_lens)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(7))
    device = metadata.block_tables.device
    tables = torch.zeros_like(metadata.block_tables)
    tables[order.to(device)] = metadata.block_tables
    if max(metadata.query_lens) == 1:
        rows = DeviceRows(order.to(device, torch.int32), torch.tensor(metadata.seq_lens, device=device).int())
        return AttentionMetadata([], [], tables, metadata.slot_mapping, metadata.block_size, device_rows=rows)
    num_new = np.array(metadata.query_lens)
    sequences = np.stack([order.numpy(), np.cumsum(num_new) - num_new, num_new, metadata.seq_lens])
    num_tokens = int(num_new.sum()) + PADDING
    slots = torch.cat([metadata.slot_mapping, metadata.slot_mapping.new_zeros(PADDING)])
    on_device = DeviceSequences(count + 2, num_tokens + 40, device)
    on_device.fill(sequences)
    for tile_tokens in range(1, 129):  # a graph's backend has asked for them when it was captured
        on_device.tiles(tile_tokens, num_tokens)
    on_device.fill(sequences)
    return AttentionMetadata([], [], tables, slots, metadata.block_size, device_sequences=on_device)


def padded(x: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
    """With as many rows as the step has tokens."""
    return torch.cat([x, x[: len(metadata.slot_mapping) - len(x)]])


def unpadded(output: torch.Tensor, step: Step) -> torch.Tensor:
    num_tokens = len(step.query)
    assert not output[num_tokens:].any()
    return output[:num_tokens].cpu()


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
    heads = (padded(x.to(device), metadata) for x in (step.query, step.key, step.value))
    return unpadded(backend.forward(*heads, cache, metadata, form), step)


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
    query, latent = (padded(x.to(device), metadata) for x in (step.query, step.key[:, 0]))
    return unpadded(backend.forward_latent(query, latent, cache, metadata, **scales), step)
