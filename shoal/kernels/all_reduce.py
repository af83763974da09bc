"""Sums over the ranks of one host by kernels that write into each other's memory. Made by `kernels/small_reducer.py`;
layers reach them through GroupCoordinator.

N ranks, V vectors of 16 bytes in x, P vectors that one rank sums in two-shot, R rows, H elements of a row.

Every rank has two slots in memory that all ranks write (`distributed/symmetric_memory.py`). A slot that is empty holds
EMPTY (two halves of -0.0) in every word of 32 bits. A rank sends by storing its words, none of which is EMPTY, and
receives by reading until nothing is EMPTY; then it empties what it has read. So data is its own flag: no fence, and one
way of a wire's latency (as in TensorRT-LLM's one-shot kernels, which name the idea after Lamport). A rank sends to
itself too: all ranks run the same code on the same words, in the order of the ranks, so all get the same bits.

Calls take the slots in turn. A rank ends call c when it has got something of every rank for c; so each of them has
begun c, has ended c - 1 and emptied that slot: it may be written for c + 1. Whose turn it is stands in device memory,
so a CUDA graph may replay the kernels at any time, other calls in between. All calls of a rank are in one order: in one
stream, or in streams that wait for each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from shoal.distributed.symmetric_memory import EMPTY_WORD, PeerMemory
from shoal.kernels.launch import has_dependent_launch, launch_options

# A kernel that waits for others must be on the device as a whole: at most a program a multiprocessor.
MAX_PROGRAMS = 128
_MAX_PROGRAMS = tl.constexpr(MAX_PROGRAMS)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VECTOR_BYTES = 16
_EMPTY = tl.constexpr(EMPTY_WORD - (1 << 32))
# About as many reads of a slot as fit a second: each waits for L2.
_POLLS_A_SECOND = 1_500_000
# Phases of a kernel. A test without several GPUs runs them one after the other, each on all ranks.
_SEND, _REDUCE, _GATHER = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)
ALL_PHASES = 7
# The interpreter knows no assembler, and there nothing has to be waited for.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def _types(num_words):
    return (tl.int32,) * num_words


@triton.constexpr_function
def _receive_code(num_sources):
    """PTX of a thread: read a vector of each source until no word is EMPTY, empty them. Traps after `limit` reads.

    Reads are relaxed, so that those of all sources are on their way at once.
    """
    num_words = 4 * num_sources
    first, stride, wanted, limit = (f"${num_words + index}" for index in range(4))
    places = [f"{{w{4 * each}, w{4 * each + 1}, w{4 * each + 2}, w{4 * each + 3}}}" for each in range(num_sources)]
    lines = [
        f".reg .b32 w<{num_words}>, polls, empty; .reg .b64 a<{num_sources}>; .reg .pred waiting;",
        *(f"mov.b32 w{word}, 0;" for word in range(num_words)),
        f"setp.eq.b32 waiting, {wanted}, 0;",
        "@waiting bra DONE;",
        f"mov.b32 polls, 0; mov.b32 empty, {EMPTY_WORD:#x}; mov.b64 a0, {first};",
        *(f"add.s64 a{each}, a{each - 1}, {stride};" for each in range(1, num_sources)),
        "LOOK:",
        *(f"ld.relaxed.sys.global.v4.b32 {place}, [a{each}];" for each, place in enumerate(places)),
        "setp.eq.b32 waiting, w0, empty;",
        *(f"setp.eq.or.b32 waiting, w{word}, empty, waiting;" for word in range(1, num_words)),
        "@!waiting bra GOT;",
        f"add.s32 polls, polls, 1; setp.ne.s32 waiting, polls, {limit};",
        "@waiting bra LOOK;",
        "trap;",
        "GOT:",
        *(f"st.global.v4.b32 [a{each}], {{empty, empty, empty, empty}};" for each in range(num_sources)),
        "DONE:",
        *(f"mov.b32 ${word}, w{word};" for word in range(num_words)),
    ]
    return "{\n" + "\n".join(lines) + "\n}"


@triton.constexpr_function
def _receive_registers(num_sources):
    return ",".join(["=r"] * (4 * num_sources) + ["l", "l", "r", "r"])


@triton.jit
def _read(address, mask):
    """16 bytes at each address: four words."""
    if _INTERPRETED:
        pointers = address.to(tl.pointer_type(tl.int32))
        words = ()
        for index in tl.static_range(4):
            words = words + (tl.load(pointers + index, mask=mask, other=0),)  # type: ignore[assignment]
    else:
        words = tl.inline_asm_elementwise(
            """{
            .reg .b32 w<4>; .reg .pred wanted;
            mov.b32 w0, 0; mov.b32 w1, 0; mov.b32 w2, 0; mov.b32 w3, 0;
            setp.ne.b32 wanted, $5, 0;
            @wanted ld.global.v4.b32 {w0, w1, w2, w3}, [$4];
            mov.b32 $0, w0; mov.b32 $1, w1; mov.b32 $2, w2; mov.b32 $3, w3;
            }""",
            "=r,=r,=r,=r,l,r", [address, mask.to(tl.int32)], dtype=_types(4), is_pure=False, pack=1,
        )  # fmt: skip
    return words


@triton.jit
def _write(address, words, mask, SEND: tl.constexpr):
    """Four words to 16 bytes at each address. SEND: into memory that may be another GPU's, which reads it meanwhile."""
    if _INTERPRETED:
        pointers = address.to(tl.pointer_type(tl.int32))
        for index in tl.static_range(4):
            tl.store(pointers + index, words[index], mask=mask)
    else:
        CODE: tl.constexpr = (
            "{ .reg .pred wanted; setp.ne.b32 wanted, $6, 0; @wanted "
            + ("st.relaxed.sys.global" if SEND else "st.global")
            + ".v4.b32 [$1], {$2, $3, $4, $5}; mov.b32 $0, 0; }"
        )
        tl.inline_asm_elementwise(
            CODE, "=r,l,r,r,r,r,r", [address, words[0], words[1], words[2], words[3], mask.to(tl.int32)],
            dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def _receive(address, stride, mask, limit, N: tl.constexpr):
    """16 bytes at address + r·stride of every rank r, once they have come: 4·N words."""
    if _INTERPRETED:
        words = ()
        for source in tl.static_range(N):
            words = words + _read(address + source * stride, mask)
            _write(address + source * stride, (_EMPTY, _EMPTY, _EMPTY, _EMPTY), mask, False)
    else:
        words = tl.inline_asm_elementwise(
            _receive_code(N), _receive_registers(N), [address, stride.to(tl.int64), mask.to(tl.int32), limit],
            dtype=_types(4 * N), is_pure=False, pack=1,
        )  # fmt: skip
    return words


@triton.jit
def _send(words, address, mask):
    """What looks empty becomes 0: two halves of -0.0, or -4.6e-41."""
    sent = ()
    for index in tl.static_range(4):
        sent = sent + (tl.where(words[index] == _EMPTY, 0, words[index]),)  # type: ignore[assignment]
    _write(address, sent, mask, True)


@triton.jit
def _numbers(words, dtype: tl.constexpr):
    """Four words -> their numbers in fp32: 8, or 4 of fp32. Of a word of halves the low one comes first."""
    numbers = ()
    for index in tl.static_range(4):
        word = words[index]
        if dtype == tl.float32:
            numbers = numbers + (word.to(tl.float32, bitcast=True),)  # type: ignore[assignment]
        elif dtype == tl.bfloat16:
            low = (word << 16).to(tl.float32, bitcast=True)
            numbers = numbers + (low, (word & -65536).to(tl.float32, bitcast=True))  # type: ignore[assignment]
        else:
            low = word.to(tl.int16).to(dtype, bitcast=True)
            high = (word >> 16).to(tl.int16).to(dtype, bitcast=True)
            numbers = numbers + (low.to(tl.float32), high.to(tl.float32))  # type: ignore[assignment]
    return numbers


@triton.jit
def _packed(numbers, dtype: tl.constexpr):
    """The inverse of `_numbers`: fp32 rounded to dtype."""
    words = ()
    for index in tl.static_range(4):
        if dtype == tl.float32:
            words = words + (numbers[index].to(tl.int32, bitcast=True),)  # type: ignore[assignment]
        else:
            low = numbers[2 * index].to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
            high = numbers[2 * index + 1].to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
            words = words + ((low & 65535) | (high << 16),)  # type: ignore[assignment]
    return words


@triton.jit
def _sum(words, N: tl.constexpr, dtype: tl.constexpr):
    """4·N words of the ranks -> the numbers of their sum, added in the order of the ranks."""
    total = _numbers((words[0], words[1], words[2], words[3]), dtype)
    for source in tl.static_range(1, N):
        four = (words[4 * source], words[4 * source + 1], words[4 * source + 2], words[4 * source + 3])
        total = _added(total, _numbers(four, dtype))
    return total


@triton.jit
def _added(left, right):
    total = ()
    for index in tl.static_range(len(left)):
        total = total + (left[index] + right[index],)  # type: ignore[assignment]
    return total


@triton.jit
def _begin(turns, program, DEPENDENT: tl.constexpr):
    """Wait for the kernels before this one. Returns which slot's turn it is."""
    if DEPENDENT:
        gdc_wait()
        # Not before: kernel after kernel would come to wait beside this one, and take the room of other streams.
        gdc_launch_dependents()
    return tl.load(turns + program)


@triton.jit
def _next_turn(turns, turn, program, num_programs):
    """The other slot, for this program and for those that this call does not have."""
    # Every thread has read `turn` by itself.
    tl.debug_barrier()
    those = program + tl.arange(0, _MAX_PROGRAMS) * num_programs
    tl.store(turns + those, 1 - turn, mask=those < _MAX_PROGRAMS)


@triton.jit(do_not_specialize=["V", "rank", "limit"])
def _one_shot_kernel(
    x, output, turns, mine, others, slot_bytes, V, rank, limit,
    N: tl.constexpr, BLOCK: tl.constexpr, PHASES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Every rank sends all of x [V] to all, and sums. A slot holds [N, V]."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    dtype: tl.constexpr = x.dtype.element_ty
    turn = _begin(turns, program, DEPENDENT)
    slot = turn.to(tl.int64) * slot_bytes
    if _SEND & PHASES:
        for start in range(program * BLOCK, V, num_programs * BLOCK):
            vector = (start + tl.arange(0, BLOCK)).to(tl.int64)
            words = _read(x.to(tl.int64) + vector * 16, vector < V)
            for other in tl.static_range(N):
                _send(words, others[other] + slot + (rank * V + vector) * 16, vector < V)
    if _REDUCE & PHASES:
        for start in range(program * BLOCK, V, num_programs * BLOCK):
            vector = (start + tl.arange(0, BLOCK)).to(tl.int64)
            words = _receive(mine + slot + vector * 16, V * 16, vector < V, limit, N)
            total = _packed(_sum(words, N, dtype), dtype)
            _write(output.to(tl.int64) + vector * 16, total, vector < V, False)
        _next_turn(turns, turn, program, num_programs)


@triton.jit(do_not_specialize=["P", "rank", "limit"])
def _two_shot_kernel(
    x, output, turns, mine, others, slot_bytes, P, rank, limit,
    N: tl.constexpr, BLOCK: tl.constexpr, PHASES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x [N, P]: rank r sums x[r] of all and sends the sum to all. A slot holds summands [N, P] and sums [N, P]."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    dtype: tl.constexpr = x.dtype.element_ty
    turn = _begin(turns, program, DEPENDENT)
    slot = turn.to(tl.int64) * slot_bytes
    sums = slot + N * P * 16
    if _SEND & PHASES:
        for start in range(program * BLOCK, P, num_programs * BLOCK):
            vector = (start + tl.arange(0, BLOCK)).to(tl.int64)
            for other in tl.static_range(N):
                part = (rank + 1 + other) % N
                words = _read(x.to(tl.int64) + (part * P + vector) * 16, vector < P)
                _send(words, others[other] + slot + (rank * P + vector) * 16, vector < P)
    if _REDUCE & PHASES:
        for start in range(program * BLOCK, P, num_programs * BLOCK):
            vector = (start + tl.arange(0, BLOCK)).to(tl.int64)
            words = _receive(mine + slot + vector * 16, P * 16, vector < P, limit, N)
            total = _packed(_sum(words, N, dtype), dtype)
            for other in tl.static_range(N):
                _send(total, others[other] + sums + (rank * P + vector) * 16, vector < P)
    if _GATHER & PHASES:
        for start in range(program * BLOCK, P, num_programs * BLOCK):
            vector = (start + tl.arange(0, BLOCK)).to(tl.int64)
            words = _receive(mine + sums + vector * 16, P * 16, vector < P, limit, N)
            for part in tl.static_range(N):
                four = (words[4 * part], words[4 * part + 1], words[4 * part + 2], words[4 * part + 3])
                _write(output.to(tl.int64) + (part * P + vector) * 16, four, vector < P, False)
        _next_turn(turns, turn, program, num_programs)


@triton.jit(do_not_specialize=["U", "rank", "limit"])
def _gather_kernel(
    x, output, turns, mine, others, slot_bytes, U, rank, limit,
    N: tl.constexpr, BLOCK: tl.constexpr, PHASES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x of U pairs of words -> output [N, U]. A slot holds [N, U] vectors: words are sent in halves, never EMPTY."""
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    turn = _begin(turns, program, DEPENDENT)
    slot = turn.to(tl.int64) * slot_bytes
    if _SEND & PHASES:
        for start in range(program * BLOCK, U, num_programs * BLOCK):
            pair = (start + tl.arange(0, BLOCK)).to(tl.int64)
            first = tl.load(x + 2 * pair, mask=pair < U, other=0)
            second = tl.load(x + 2 * pair + 1, mask=pair < U, other=0)
            words = (first & 65535, (first >> 16) & 65535, second & 65535, (second >> 16) & 65535)
            for other in tl.static_range(N):
                _send(words, others[other] + slot + (rank * U + pair) * 16, pair < U)
    if _REDUCE & PHASES:
        for start in range(program * BLOCK, U, num_programs * BLOCK):
            pair = (start + tl.arange(0, BLOCK)).to(tl.int64)
            words = _receive(mine + slot + pair * 16, U * 16, pair < U, limit, N)
            for source in tl.static_range(N):
                place = output + 2 * (source * U + pair)
                tl.store(place, words[4 * source] | (words[4 * source + 1] << 16), mask=pair < U)
                tl.store(place + 1, words[4 * source + 2] | (words[4 * source + 3] << 16), mask=pair < U)
        _next_turn(turns, turn, program, num_programs)


@triton.jit
def _finish_row(words, scale, normed, sums, place, inside, eps, H: tl.constexpr, dtype: tl.constexpr):
    """words: a row of the total, rounded. Store it, and what RMSNorm makes of it."""
    _write(sums.to(tl.int64) + place, words, inside, False)
    total = _numbers(words, dtype)
    squares = total[0] * total[0]
    for index in tl.static_range(1, len(total)):
        squares += total[index] * total[index]
    inverse = tl.rsqrt(tl.sum(squares, axis=0) / H + eps)
    result = ()
    for index in tl.static_range(len(total)):
        result = result + (total[index] * inverse * scale[index],)  # type: ignore[assignment]
    _write(normed.to(tl.int64) + place, _packed(result, dtype), inside, False)


@triton.jit(do_not_specialize=["R", "rank", "limit"])
def _add_norm_kernel(
    x, residual, weight, normed, sums, turns, mine, others, slot_bytes, R, eps, rank, limit,
    N: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, HAS_RESIDUAL: tl.constexpr, TWO_SHOT: tl.constexpr,
    PHASES: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x, residual, normed, sums [R, H], a program a row at a time: sum over the ranks, plus the residual, normalised.

    One-shot as above. In two-shot rank r % N sums row r and adds the residual: a slot holds the summands
    [N, rows of a rank, H] and the totals [R, H].
    """
    program, num_programs = tl.program_id(0), tl.num_programs(0)
    dtype: tl.constexpr = x.dtype.element_ty
    ROW_BYTES: tl.constexpr = H * x.dtype.element_ty.primitive_bitwidth // 8
    column = tl.arange(0, BLOCK).to(tl.int64) * 16
    inside = column < ROW_BYTES
    scale = _numbers(_read(weight.to(tl.int64) + column, inside), dtype)
    turn = _begin(turns, program, DEPENDENT)
    slot = turn.to(tl.int64) * slot_bytes
    num_rows = tl.cdiv(R, N) if TWO_SHOT else R
    stride = num_rows * ROW_BYTES
    totals = slot + N * stride
    if _SEND & PHASES:
        for row in range(program, R, num_programs):
            words = _read(x.to(tl.int64) + row * ROW_BYTES + column, inside)
            place = slot + rank * stride + (row // N if TWO_SHOT else row) * ROW_BYTES + column
            for other in tl.static_range(N):
                if not TWO_SHOT or row % N == (rank + 1 + other) % N:
                    _send(words, others[other] + place, inside)
    if _REDUCE & PHASES:
        for row in range(program, R, num_programs):
            if not TWO_SHOT or row % N == rank:
                place = row * ROW_BYTES + column
                if HAS_RESIDUAL:
                    added = _read(residual.to(tl.int64) + place, inside)
                first = (row // N if TWO_SHOT else row) * ROW_BYTES
                words = _receive(mine + slot + first + column, stride, inside, limit, N)
                total = _sum(words, N, dtype)
                if HAS_RESIDUAL:
                    total = _added(total, _numbers(added, dtype))
                if TWO_SHOT:
                    for other in tl.static_range(N):
                        _send(_packed(total, dtype), others[other] + totals + place, inside)
                else:
                    _finish_row(_packed(total, dtype), scale, normed, sums, place, inside, eps, H, dtype)
        if not TWO_SHOT:
            _next_turn(turns, turn, program, num_programs)
    if TWO_SHOT and _GATHER & PHASES:
        for row in range(program, R, num_programs):
            place = row * ROW_BYTES + column
            words = _receive(mine + totals + place, stride, inside, limit, 1)
            _finish_row(words, scale, normed, sums, place, inside, eps, H, dtype)
        _next_turn(turns, turn, program, num_programs)


class PeerKernels:
    """The kernels over one group's memory. All ranks make the same calls in the same order."""

    def __init__(self, memory: PeerMemory, timeout: float, max_programs: int = MAX_PROGRAMS) -> None:
        """timeout: seconds, roughly, after which a kernel that waits for a peer ends the process (a CUDA error)."""
        self.size, self.rank, self.device = len(memory.addresses), memory.rank, memory.device
        self._memory = memory
        self._mine = memory.addresses[self.rank]
        # From the next rank on, so that the ranks do not all send to the same one at a time.
        self._others = tuple(memory.addresses[(self.rank + 1 + index) % self.size] for index in range(self.size))
        self._slot_bytes = memory.slot_bytes
        self._turns = torch.zeros(MAX_PROGRAMS, dtype=torch.int32, device=self.device)
        self._limit = min(int(timeout * _POLLS_A_SECOND), 2**31 - 1)
        self._dependent = has_dependent_launch(self.device)
        self._options = launch_options(self.device)
        self._max_programs = max_programs
        if self.device.type == "cuda":
            num_processors = torch.cuda.get_device_properties(self.device).multi_processor_count
            self._max_programs = min(max_programs, num_processors)

    def fits(self, x: torch.Tensor, two_shot: bool) -> bool:
        """Whether `all_reduce` can sum x: the same answer on all ranks."""
        parts, room = (self.size, 2) if two_shot else (1, self.size)
        return (
            x.dtype in DTYPES
            and x.nbytes % (VECTOR_BYTES * parts) == 0
            and 0 < x.nbytes * room <= self._slot_bytes
            and x.is_contiguous()
            and x.data_ptr() % VECTOR_BYTES == 0
        )

    def fits_rows(self, x: torch.Tensor, two_shot: bool) -> bool:
        """Whether `all_reduce_add_norm` can serve for x [R, H]."""
        if x.dim() != 2 or not self.fits(x, two_shot=False):
            return False
        row_bytes = x.shape[1] * x.element_size()
        num_rows = 2 * (x.shape[0] + self.size) if two_shot else self.size * x.shape[0]
        return row_bytes % VECTOR_BYTES == 0 and num_rows * row_bytes <= self._slot_bytes

    def fits_gather(self, x: torch.Tensor) -> bool:
        """Whether `all_gather` can serve for x, of any type."""
        return x.is_contiguous() and x.nbytes % 8 == 0 and 0 < 2 * x.nbytes * self.size <= self._slot_bytes

    def all_reduce(self, x: torch.Tensor, two_shot: bool, phases: int = ALL_PHASES) -> torch.Tensor:
        """x -> the sum over the ranks, in x."""
        kernel = _two_shot_kernel if two_shot else _one_shot_kernel
        self._launch(kernel, x, x, x.nbytes // VECTOR_BYTES // (self.size if two_shot else 1), phases)
        return x

    def all_gather(self, x: torch.Tensor, phases: int = ALL_PHASES, output: torch.Tensor | None = None) -> torch.Tensor:
        """x [...] of every rank -> [N, ...], bit for bit."""
        if output is None:
            output = x.new_empty((self.size, *x.shape))
        words, places = (each.reshape(-1).view(torch.uint8).view(torch.int32) for each in (x, output))
        self._launch(_gather_kernel, words, places, x.nbytes // 8, phases)
        return output

    def all_reduce_add_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        two_shot: bool,
        phases: int = ALL_PHASES,
        outputs: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [R, H], residual [R, H], weight [H] -> (norm(total), total), total = sum over the ranks + residual.

        The total is rounded once. outputs: where to, else new tensors.
        """
        num_rows, size = x.shape
        normed, sums = outputs or (torch.empty_like(x), torch.empty_like(x))
        # A thread has a vector of its own, or several: two with the same one would empty it before the other's eyes.
        block = max(32, triton.next_power_of_2(size * x.element_size() // VECTOR_BYTES))
        _add_norm_kernel[(max(1, min(num_rows, self._max_programs)),)](
            x, x if residual is None else residual, weight, normed, sums, self._turns, self._mine, self._others,
            self._slot_bytes, num_rows, eps, self.rank, self._limit,
            N=self.size, H=size, BLOCK=block, HAS_RESIDUAL=residual is not None, TWO_SHOT=two_shot, PHASES=phases,
            DEPENDENT=self._dependent, num_warps=min(32, block // 32), **self._options,
        )  # fmt: skip
        return normed, sums

    def _launch(
        self, kernel: triton.JITFunction, x: torch.Tensor, output: torch.Tensor, num_vectors: int, phases: int
    ) -> None:
        """num_vectors: that each rank sends to each, a thread's step one."""
        num_programs, num_warps = self._shape(num_vectors)
        kernel[(num_programs,)](
            x, output, self._turns, self._mine, self._others, self._slot_bytes, num_vectors, self.rank, self._limit,
            N=self.size, BLOCK=32 * num_warps, PHASES=phases, DEPENDENT=self._dependent, num_warps=num_warps,
            **self._options,
        )  # fmt: skip

    def _shape(self, num_vectors: int) -> tuple[int, int]:
        """(programs, warps of each)"""
        num_warps = 8 if num_vectors <= 256 * self._max_programs else 16
        return max(1, min(-(-num_vectors // (32 * num_warps)), self._max_programs)), num_warps
