"""How integers of 4 or 8 bits in groups with a scale each (GPTQ, AWQ) lie on a GPU, and how they become floats again.

N outputs, K inputs. A weight lies in slabs of 16 words an output: the word w of a slab holds, from its lowest bits up,
the inputs w, 16 + w, 32 + w, … of the slab's 128 (4 bits) or 64 (8 bits). So a thread loads 16 bytes of weight and runs
of x, the words give the left operand of one matrix instruction after the other without an exchange between threads, and
groups of 16 inputs or more never share an instruction. Multiplied by in kernels/packed_linear.py.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.kernels.launch import has_dependent_launch, launch_options

WORDS = 16  # of an output in a slab


@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """words: int32 [slabs, N, 16]; scales: floating [groups, N]; zeros: uint8 [groups, N], None: 2^(bits - 1) for all.

    The weight at (n, k) is (integer - zero) * scale. group_size: inputs of a scale; it divides a slab, or a slab it.
    """

    words: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    group_size: int
    num_inputs: int

    @property
    def num_outputs(self) -> int:
        return self.words.shape[1]

    @property
    def nbytes(self) -> int:
        return self.words.nbytes + self.scales.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


def slab_inputs(bits: int) -> int:
    return WORDS * (32 // bits)


def pack_words(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """integers uint8 [N, K], K a multiple of a slab's inputs -> int32 [slabs, N, 16]."""
    num_outputs, num_inputs = integers.shape
    places = integers.view(num_outputs, num_inputs // slab_inputs(bits), 32 // bits, WORDS).permute(1, 0, 2, 3)
    words = torch.zeros(places.shape[0], num_outputs, WORDS, dtype=torch.int32, device=integers.device)
    for place in range(32 // bits):
        words |= places[:, :, place].to(torch.int32) << (bits * place)
    return words


@triton.jit
def prefetch(words, slab, end, step, first, N, count, THREADS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Ask `count` slabs of the outputs from `first` on into L2, each thread one of them."""
    if count > 0:
        own = slab + tl.arange(0, THREADS)
        inside = own < tl.minimum(slab + count, end)
        address = words + tl.where(inside, own, slab) * step + first * 16
        num_bytes = tl.where(inside, tl.minimum(BLOCK_N, N - first) * 64, 16)
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [address, num_bytes],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _dequantize_kernel(
    words, scales, zeros, output, first, count, total_outputs, K,
    BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, HAS_ZEROS: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Program (slab, outputs)."""
    PER_WORD: tl.constexpr = 32 // BITS
    slab = tl.program_id(0)
    own = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    row = tl.minimum(first + own, total_outputs - 1)
    word = tl.arange(0, 16)[None, :]
    if DEPENDENT:
        gdc_launch_dependents()
    block = tl.load(words + (slab.to(tl.int64) * total_outputs + row) * 16 + word)
    if DEPENDENT:
        gdc_wait()
    for j in tl.static_range(PER_WORD):
        k = slab * (16 * PER_WORD) + 16 * j + word
        group = (slab * (16 * PER_WORD) + 16 * j) // GROUP
        scale = tl.load(scales + group.to(tl.int64) * total_outputs + row).to(tl.float32)
        zero = tl.full([1, 1], 1 << (BITS - 1), tl.float32)
        if HAS_ZEROS:
            zero = tl.load(zeros + group.to(tl.int64) * total_outputs + row).to(tl.float32)
        value = (((block >> (BITS * j)) & ((1 << BITS) - 1)).to(tl.float32) - zero) * scale
        place = output + own.to(tl.int64) * K + k
        tl.store(place, value.to(output.dtype.element_ty), mask=(own < count) & (k < K))


def dequantize_packed(weight: PackedWeight, outputs: slice, output: torch.Tensor) -> None:
    """Write these outputs' weights, rounded once, to `output` [outputs, K]. An element depends on nothing else."""
    count = outputs.stop - outputs.start
    assert output.is_contiguous() and output.shape == (count, weight.num_inputs)
    block = 32
    _dequantize_kernel[weight.words.shape[0], triton.cdiv(count, block)](
        weight.words, weight.scales, weight.scales if weight.zeros is None else weight.zeros, output,
        outputs.start, count, weight.num_outputs, weight.num_inputs,
        BITS=weight.bits, GROUP=weight.group_size, BLOCK_N=block, HAS_ZEROS=weight.zeros is not None,
        DEPENDENT=has_dependent_launch(output.device), num_warps=4, **launch_options(output.device),
    )  # fmt: skip
