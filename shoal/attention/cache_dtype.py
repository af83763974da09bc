"""What a KV cache holds: numbers of the model's type, or 8-bit floats, rounded when written and exact when read.

Caches of 8-bit floats are moved about as bytes: PyTorch copies and gathers few types that are not common ones.
"""

from __future__ import annotations

import torch

from shoal.attention.base import AttentionForm
from shoal.config.cache_dtypes import CACHE_DTYPES


def cache_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The type that --kv-cache-dtype names, for activations of `dtype`."""
    found = CACHE_DTYPES[name]
    return dtype if found is None else getattr(torch, found)  # type: ignore[no-any-return]


def is_rounded(cache: torch.Tensor) -> bool:
    """Whether it holds 8-bit floats."""
    return cache.element_size() == 1


def cells(cache: torch.Tensor) -> torch.Tensor:
    """The cache as something that can be indexed."""
    return cache.view(torch.uint8) if is_rounded(cache) else cache


def encode(x: torch.Tensor, cache: torch.Tensor, scale: float) -> torch.Tensor:
    """x / scale as `cells` hold it: rounded to nearest even; what is too large becomes the largest number."""
    if not is_rounded(cache):
        return x
    limit = torch.finfo(cache.dtype).max
    return (x.float() * (1.0 / scale)).clamp_(-limit, limit).to(cache.dtype).view(torch.uint8)


def decode(found: torch.Tensor, cache: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What was taken from `cells`, as numbers of `dtype`, which 8-bit floats become without rounding."""
    return found.view(cache.dtype).to(dtype) if is_rounded(cache) else found


def score_scale(form: AttentionForm, cache: torch.Tensor) -> float:
    """The form's scale, with that of the cache's keys."""
    return form.scale * form.key_scale if is_rounded(cache) else form.scale


def scale_values(output: torch.Tensor, form: AttentionForm, cache: torch.Tensor) -> torch.Tensor:
    """Sums of the cache's values, as they come out of the softmax, with the values' scale."""
    return output * form.value_scale if is_rounded(cache) and form.value_scale != 1 else output


def write_heads(
    kv_cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, form: AttentionForm
) -> None:
    """key, value [T, Hk, D] to their slots [T] of a cache [2, Hk, N, block_size, D]."""
    keys, values = cells(kv_cache).flatten(2, 3).unbind(0)
    keys.index_copy_(1, slots, encode(key, kv_cache, form.key_scale).transpose(0, 1))
    values.index_copy_(1, slots, encode(value, kv_cache, form.value_scale).transpose(0, 1))


def clear_blocks(cache: torch.Tensor, blocks: torch.Tensor) -> None:
    """Zeros into blocks of a cache [2, Hk, N, block_size, D], or [N, block_size, L] of latents."""
    cells(cache).index_fill_(0 if cache.dim() == 3 else 2, blocks, 0)
