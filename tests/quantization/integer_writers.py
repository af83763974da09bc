"""GPTQ and AWQ checkpoints as AutoGPTQ, GPTQModel and AutoAWQ lay them out, number by number from the description.

With nothing of shoal/quantization. As in writers.py a writer takes a matrix [N, K] and returns (what is stored for it,
by suffix; what it stands for, fp32).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.quantization.writers import Stored, Writer

_AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
# Like those who quantize, tests may give each matrix another order of its inputs: by its values.
GroupOrder = Callable[[torch.Tensor], torch.Generator]


def by_width(weight: torch.Tensor) -> torch.Generator:
    """Matrices with the same inputs have one order, as they have when these alone decide."""
    return torch.Generator().manual_seed(weight.shape[1])


def by_values(weight: torch.Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(int(weight.abs().sum() * 1000))


def pack_bits(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, C] -> int32 [R, C * bits / 32]: the bits of a row's numbers one after the other, the lowest first."""
    num_rows, count = numbers.shape
    assert count * bits % 32 == 0
    rows = []
    for row in numbers.tolist():
        stream = 0
        for index, number in enumerate(row):
            assert 0 <= number < 1 << bits
            stream |= number << (bits * index)
        words = [(stream >> (32 * index)) & 0xFFFFFFFF for index in range(count * bits // 32)]
        rows.append([word - (1 << 32) if word >= 1 << 31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int64).to(torch.int32).view(num_rows, -1)


def quantize(
    weight: torch.Tensor, bits: int, group_of: torch.Tensor, *, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(numbers [N, K], scales [groups, N] in fp16, zeros [groups, N])."""
    highest, num_groups = (1 << bits) - 1, int(group_of.max()) + 1
    scales = torch.zeros(num_groups, weight.shape[0])
    zeros = torch.full((num_groups, weight.shape[0]), 1 << (bits - 1))
    for group in range(num_groups):
        own = weight[:, group_of == group]
        if symmetric:
            scales[group] = 2 * own.abs().amax(1) / highest
        else:
            low, high = own.amin(1).clamp(max=0), own.amax(1).clamp(min=0)
            scales[group] = (high - low) / highest
            zeros[group] = (-low / scales[group]).round().clamp(0, highest).to(torch.int64)
    scales = scales.half()
    by_input = scales.float()[group_of].t()
    numbers = (weight / by_input + zeros[group_of].t()).round().clamp(0, highest).to(torch.int64)
    return numbers, scales, zeros


def gptq(
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = True,
    order: GroupOrder | None = None,
    version: int = 1,
    g_idx: bool = True,
    zero_bias: bool = False,
) -> Writer:
    """order: of the inputs (desc_act). zero_bias: as some writers store where the model has none."""

    def write(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        num_outputs, num_inputs = weight.shape
        size = num_inputs if group < 0 else group
        group_of = torch.arange(num_inputs) // size
        if order is not None:
            # The input that is quantized first is of group 0, and so on.
            group_of = group_of[torch.randperm(num_inputs, generator=order(weight)).argsort()]
        numbers, scales, zeros = quantize(weight, bits, group_of, symmetric=symmetric)
        stored_zeros = zeros if version == 2 else (zeros - 1) % (1 << bits)
        stored = {
            "qweight": pack_bits(numbers, bits).t().contiguous(),
            "qzeros": pack_bits(stored_zeros, bits),
            "scales": scales,
        }
        if g_idx:
            stored["g_idx"] = group_of.to(torch.int32)
        if zero_bias:
            stored["bias"] = torch.zeros(num_outputs, dtype=torch.float16)
        by_input = scales.float()[group_of].t()
        return stored, (numbers - zeros[group_of].t()) * by_input

    return write


def awq(group: int = 32, *, symmetric: bool = False) -> Writer:
    def write(weight: torch.Tensor) -> tuple[Stored, torch.Tensor]:
        size = weight.shape[1] if group < 0 else group
        group_of = torch.arange(weight.shape[1]) // size
        numbers, scales, zeros = quantize(weight, 4, group_of, symmetric=symmetric)

        def pack(rows: torch.Tensor) -> torch.Tensor:
            """[R, N] -> int32 [R, N / 8]."""
            words = rows.view(rows.shape[0], -1, 8)[..., _AWQ_ORDER].flatten(1)
            return pack_bits(words, 4)

        stored = {"qweight": pack(numbers.t().contiguous()), "qzeros": pack(zeros), "scales": scales}
        by_input = scales.float()[group_of].t()
        return stored, (numbers - zeros[group_of].t()) * by_input

    return write
