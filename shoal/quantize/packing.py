"""How quantized matrices lie in a checkpoint: tensors by suffix, and the matrix that they stand for.

gptq: qweight int32 [K bits / 32, N], qzeros int32 [G, N bits / 32] (zeros less one), scales fp16 [G, N], g_idx int32
[K]; the lowest bits are first. awq (gemm): qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales fp16 [G, N]; the
bits 4 i to 4 i + 3 of a word are of its output 0, 2, 4, 6, 1, 3, 5, 7 [i]. Bytes: weight [N, K], weight_scale [N, 1] or
[1].
"""

from __future__ import annotations

import torch

from shoal.quantize.grid import IntegerWeight

Stored = dict[str, torch.Tensor]
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [R, C] -> int32 [R, C bits / 32]."""
    per_word = 32 // bits
    split = numbers.long().unflatten(1, (-1, per_word))
    words = (split << torch.arange(0, 32, bits, device=numbers.device)).sum(2)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The other way; int64."""
    shifts = torch.arange(0, 32, bits, device=words.device)
    return ((words.long().unsqueeze(2) >> shifts) & ((1 << bits) - 1)).flatten(1)


def _interleaved(numbers: torch.Tensor) -> torch.Tensor:
    return numbers.unflatten(1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(1)


def _in_order(numbers: torch.Tensor) -> torch.Tensor:
    back = sorted(range(8), key=_AWQ_ORDER.__getitem__)
    return numbers.unflatten(1, (-1, 8))[..., back].flatten(1)


def pack_gptq(weight: IntegerWeight) -> Stored:
    return {
        "qweight": pack_words(weight.integers, weight.bits).t().contiguous(),
        "qzeros": pack_words(weight.zeros - 1, weight.bits),
        "scales": weight.scales.to(torch.float16),
        "g_idx": weight.groups.to(torch.int32),
    }


def pack_awq(weight: IntegerWeight) -> Stored:
    return {
        "qweight": pack_words(_interleaved(weight.integers.t()), weight.bits),
        "qzeros": pack_words(_interleaved(weight.zeros), weight.bits),
        "scales": weight.scales.to(torch.float16),
    }


def dense_of(stored: Stored, bits: int) -> torch.Tensor:
    """fp32 [N, K]: what the tensors of one matrix stand for, whichever layout they have."""
    if "qweight" not in stored:
        return stored["weight"].float() * stored["weight_scale"].float()
    if "g_idx" in stored:
        integers = unpack_words(stored["qweight"].t().contiguous(), bits)
        zeros, groups = unpack_words(stored["qzeros"], bits) + 1, stored["g_idx"].long()
    else:
        integers = _in_order(unpack_words(stored["qweight"], bits)).t()
        zeros = _in_order(unpack_words(stored["qzeros"], bits))
        groups = torch.arange(integers.shape[1], device=integers.device) // (integers.shape[1] // len(zeros))
    return (integers - zeros[groups].t()).float() * stored["scales"].float()[groups].t()
