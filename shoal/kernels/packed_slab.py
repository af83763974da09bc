"""What a slab of packed integers (kernels/packed_weight.py) becomes in registers, on its way to a product: what
packed_linear.py and packed_experts.py share."""

from __future__ import annotations

import triton
import triton.language as tl

# A float whose bits are an integer v shifted left by s is v 2^(s - 149), not normal. Times x 2^(64 - s) it is a normal
# number for all x that matter (2^-64 is lost, 2^63 too large), and v x comes for one bit operation and one addition.
X_SCALE = tl.constexpr(2.0**64)
PART_SCALE = tl.constexpr(2.0**85)


# Two words of neighbours -> for each place in a word a pair of 16-bit floats, each the integer less half its range. An
# integer under the exponent of 128 (bf16) or 1024 (fp16) is that much more than itself.
def _pairs_assembly(bits: int, is_bf16: bool) -> str:
    count, mask = 32 // bits, (1 << bits) - 1
    magic, one = (0x4300, 0x3F80) if is_bf16 else (0x6400, 0x3C00)
    minus = (0x8000 | magic) + (1 << bits - 1)
    kind = "bf16x2" if is_bf16 else "f16x2"
    lines = [
        ".reg .b32 low, high, one, minus, ored;",
        f"mov.b32 one, {one << 16 | one:#010x};",
        f"mov.b32 minus, {minus << 16 | minus:#010x};",
        f"prmt.b32 low, ${count}, ${count + 1}, 0x5410;",
        f"prmt.b32 high, ${count}, ${count + 1}, 0x7632;",
    ]
    for place in range(count):
        source = "low" if place * bits < 16 else "high"
        if place * bits % 16:
            lines.append(f"shr.u32 {source}, {source}, {bits};")
        lines.append(f"lop3.b32 ored, {source}, {mask << 16 | mask:#010x}, {magic << 16 | magic:#010x}, 0xea;")
        lines.append(f"fma.rn.{kind} ${place}, ored, one, minus;")
    return "{ " + " ".join(lines) + " }"


_PAIRS_4_BF16 = tl.constexpr(_pairs_assembly(4, True))
_PAIRS_4_FP16 = tl.constexpr(_pairs_assembly(4, False))
_PAIRS_8_FP16 = tl.constexpr(_pairs_assembly(8, False))


_EIGHT_BF16, _EIGHT_FP16 = tl.constexpr((tl.bfloat16,) * 8), tl.constexpr((tl.float16,) * 8)
_FOUR_FP16 = tl.constexpr((tl.float16,) * 4)


@triton.jit
def _assembled(words, ASSEMBLY: tl.constexpr, CONSTRAINTS: tl.constexpr, DTYPES: tl.constexpr):
    return tl.inline_asm_elementwise(ASSEMBLY, CONSTRAINTS, [words], dtype=DTYPES, is_pure=True, pack=2)


@triton.jit
def unpack_slab(words, BITS: tl.constexpr, DTYPE: tl.constexpr, ASSEMBLY: tl.constexpr):
    """For each place in a word: the integers there less half their range. The interpreter has no assembly."""
    if not ASSEMBLY:
        values = ()
        for place in tl.static_range(32 // BITS):
            integer = ((words >> (BITS * place)) & ((1 << BITS) - 1)) - (1 << (BITS - 1))
            values = values + (integer.to(DTYPE),)  # type: ignore[assignment]
        return values
    elif BITS == 8:  # too many bits for bf16's 7 behind the point
        a, b, c, d = _assembled(words, _PAIRS_8_FP16, "=r,=r,=r,=r,r,r", _FOUR_FP16)
        return (a.to(DTYPE), b.to(DTYPE), c.to(DTYPE), d.to(DTYPE))
    elif DTYPE == tl.bfloat16:
        return _assembled(words, _PAIRS_4_BF16, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", _EIGHT_BF16)
    else:
        return _assembled(words, _PAIRS_4_FP16, "=r,=r,=r,=r,=r,=r,=r,=r,r,r", _EIGHT_FP16)


@triton.jit
def add_slab(
    acc, words, values, scales_now, zeros_now,
    BITS: tl.constexpr, SUBGROUP: tl.constexpr, HAS_ZEROS: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """acc [BLOCK_N, ROWS] plus the product of a slab. values: for each place in a word x [16, ROWS]; scales_now and
    zeros_now: for each group in the slab [BLOCK_N]."""
    PER_WORD: tl.constexpr = 32 // BITS
    integers = unpack_slab(words, BITS, values[0].dtype, ASSEMBLY)
    for subgroup in tl.static_range(PER_WORD // SUBGROUP):
        part = tl.zeros_like(acc)
        for within in tl.static_range(SUBGROUP):
            weight = integers[subgroup * SUBGROUP + within]
            if HAS_ZEROS:
                weight -= (zeros_now[subgroup].to(tl.float32) - (1 << (BITS - 1))).to(weight.dtype)[:, None]
            part = tl.dot(weight, values[subgroup * SUBGROUP + within], part, input_precision="ieee")
        acc += part * scales_now[subgroup].to(tl.float32)[:, None]
    return acc


@triton.jit
def load_groups(pointer, slab, end, n, stride, BITS: tl.constexpr, GROUP: tl.constexpr, SUBGROUP: tl.constexpr):
    """For each group in the slab, of scales or zeros: those of the outputs n."""
    SLAB: tl.constexpr = 16 * (32 // BITS)
    found = ()
    for subgroup in tl.static_range(32 // BITS // SUBGROUP):
        group = (slab * SLAB + 16 * SUBGROUP * subgroup) // GROUP
        place = pointer + group.to(tl.int64) * stride + n
        found = found + (tl.load(place, mask=(slab < end) & (n >= 0), other=0),)  # type: ignore[assignment]
    return found
