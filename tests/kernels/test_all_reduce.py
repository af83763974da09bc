"""Sums through shared memory against fp64, between ranks that are streams of one GPU, or in the interpreter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from shoal.distributed.symmetric_memory import EMPTY_WORD, NUM_SLOTS, PeerMemory
from shoal.kernels.all_reduce import ALL_PHASES, MAX_PROGRAMS, PeerKernels

ROOT = Path(__file__).parents[2]
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The interpreter cuts fp32 off where a GPU rounds it to bf16.
ROUNDING = 0.5 if DEVICE.type == "cuda" else 1.0
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-23}


class Ranks:
    """Ranks of one process. On a GPU each has a stream; in the interpreter the phases of all ranks run in turn."""

    def __init__(self, size: int, slot_bytes: int = 4 << 20, max_programs: int = MAX_PROGRAMS) -> None:
        self.memory = [
            torch.full((NUM_SLOTS * slot_bytes // 4,), EMPTY_WORD - (1 << 32), dtype=torch.int32, device=DEVICE)
            for _ in range(size)
        ]
        addresses = tuple(each.data_ptr() for each in self.memory)
        # All of them must find room on the one GPU.
        max_programs //= size
        self.kernels = [
            PeerKernels(PeerMemory(addresses, rank, DEVICE, slot_bytes), 20.0, max_programs) for rank in range(size)
        ]
        self.streams = [torch.cuda.Stream(DEVICE) for _ in range(size)] if DEVICE.type == "cuda" else []

    def run(self, call) -> list:
        """call(kernels, rank, phases) of every rank: the results by rank."""
        if not self.streams:
            for phase in (1, 2, 4):
                results = [call(kernels, rank, phase) for rank, kernels in enumerate(self.kernels)]
            return results
        torch.cuda.synchronize()
        results = []
        for rank, (kernels, stream) in enumerate(zip(self.kernels, self.streams, strict=True)):
            with torch.cuda.stream(stream):
                results.append(call(kernels, rank, ALL_PHASES))
        torch.cuda.synchronize()
        return results

    def all_reduce(self, parts: list[torch.Tensor], two_shot: bool) -> list[torch.Tensor]:
        copies = [part.clone() for part in parts]
        return self.run(lambda kernels, rank, phases: kernels.all_reduce(copies[rank], two_shot, phases))

    def add_norm(self, parts, residual, weight, two_shot):
        outputs = [(torch.empty_like(part), torch.empty_like(part)) for part in parts]
        return self.run(
            lambda kernels, rank, phases: kernels.all_reduce_add_norm(
                parts[rank], residual, weight, 1e-5, two_shot, phases, outputs[rank]
            )
        )

    def check_empty(self) -> None:
        """Whatever was sent has been taken away."""
        for each in self.memory:
            assert bool((each == EMPTY_WORD - (1 << 32)).all())


def parts_of(size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for _ in range(size)]
    for part in parts:
        part.view(-1)[::5] = -0.0  # looks like memory that nobody has written
        part.view(-1)[1::97] = 0.0
    return parts


def check_sum(results: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
    expected = sum(part.double() for part in parts)
    scale = sum(part.double().abs() for part in parts)
    for result in results:
        assert torch.equal(result.view(torch.uint8), results[0].view(torch.uint8))
        error = (result.double() - expected).abs()
        # One rounding to the dtype, and those of the sums in fp32 before it.
        assert bool((error <= expected.abs() * ULP[result.dtype] * ROUNDING * 1.001 + scale * 2**-22 + 1e-38).all())


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request) -> Ranks:
    """No more: of eight streams two might share a queue of the GPU, where one waits behind the other."""
    return Ranks(request.param)


@pytest.fixture(scope="module")
def few() -> Ranks:
    """With so few programs that each takes several steps."""
    return Ranks(3, 1 << 20, max_programs=6)


in_interpreter = pytest.mark.skipif(DEVICE.type == "cuda", reason="is for the interpreter")


@pytest.mark.gpu
@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_all_sizes(ranks: Ranks, dtype: torch.dtype, two_shot: bool) -> None:
    check_sizes(ranks, dtype, two_shot, [48, 384, 4096, 5120, 16 * 1023, 40_000, 65_520, 131_072])


@in_interpreter
@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_in_the_interpreter(few: Ranks, dtype: torch.dtype, two_shot: bool) -> None:
    check_sizes(few, dtype, two_shot, [48, 4200])


@in_interpreter
def test_many_ranks_in_the_interpreter() -> None:
    for two_shot in (False, True):
        check_sizes(Ranks(8, 1 << 18), torch.bfloat16, two_shot, [384])
        check_rows(Ranks(8, 1 << 18), torch.bfloat16, two_shot, [(11, 64)])


def check_sizes(ranks: Ranks, dtype: torch.dtype, two_shot: bool, sizes: list[int]) -> None:
    size = len(ranks.kernels)
    for index, num_elements in enumerate(sizes):
        num_elements -= num_elements % (8 * size)
        parts = parts_of(size, (num_elements,), dtype, index)
        for kernels, part in zip(ranks.kernels, parts, strict=True):
            assert kernels.fits(part, two_shot)
        check_sum(ranks.all_reduce(parts, two_shot), parts)
        ranks.check_empty()


@pytest.mark.gpu
@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows(ranks: Ranks, dtype: torch.dtype, two_shot: bool) -> None:
    if dtype is not torch.bfloat16 and len(ranks.kernels) != 4:
        pytest.skip("compiles for long, and is like the others")
    check_rows(ranks, dtype, two_shot, [(1, 8192), (16, 5120), (200, 264)])


@in_interpreter
@pytest.mark.parametrize("two_shot", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_in_the_interpreter(few: Ranks, dtype: torch.dtype, two_shot: bool) -> None:
    check_rows(few, dtype, two_shot, [(1, 264), (5, 64)])


def check_rows(ranks: Ranks, dtype: torch.dtype, two_shot: bool, shapes: list[tuple[int, int]]) -> None:
    """The total is rounded once; the norm is that of the rounded total."""
    for index, shape in enumerate(shapes):
        parts = parts_of(len(ranks.kernels), shape, dtype, index)
        weight = torch.rand(shape[1], generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
        residual = parts_of(1, shape, dtype, 100 + index)[0] * 3
        assert ranks.kernels[0].fits_rows(parts[0], two_shot)
        for each in (residual, None) if shape == shapes[-1] else (residual,):
            results = ranks.add_norm(parts, each, weight, two_shot)
            check_sum([total for _, total in results], parts if each is None else [*parts, each])
            ranks.check_empty()
            total = results[0][1].double()
            expected = total * torch.rsqrt((total * total).mean(-1, keepdim=True) + 1e-5) * weight.double()
            for normed, _ in results:
                assert torch.equal(normed, results[0][0])
                error = (normed.double() - expected).abs()
                assert bool((error <= expected.abs() * (ULP[dtype] * ROUNDING * 1.01 + 1e-5) + 1e-7).all())


@pytest.mark.gpu
@pytest.mark.parametrize("num_bytes", [8, 4096, 40_000, 1 << 17])
def test_gathered_bits(ranks: Ranks, num_bytes: int) -> None:
    check_gather(ranks, num_bytes)


@in_interpreter
@pytest.mark.parametrize("num_bytes", [8, 6000])
def test_gathered_bits_in_the_interpreter(few: Ranks, num_bytes: int) -> None:
    check_gather(few, num_bytes)


def check_gather(ranks: Ranks, num_bytes: int) -> None:
    """Any bits come, those of an empty slot among them."""
    size = len(ranks.kernels)
    generator = torch.Generator().manual_seed(0)
    parts = torch.randint(-(2**31), 2**31, (size, num_bytes // 4), generator=generator).to(torch.int32).to(DEVICE)
    parts[:, ::3] = EMPTY_WORD - (1 << 32)
    outputs = [torch.empty_like(parts) for _ in range(size)]
    # Tensors of their own: how they are aligned decides on the kernel, and none can be loaded while another waits.
    inputs = [part.clone() for part in parts]
    assert ranks.kernels[0].fits_gather(inputs[0])
    ranks.run(lambda kernels, rank, phases: kernels.all_gather(inputs[rank], phases, outputs[rank]))
    for output in outputs:
        assert torch.equal(output, parts)
    ranks.check_empty()


@pytest.mark.gpu
def test_a_graph_between_other_calls(ranks: Ranks) -> None:
    """Graphs of several kernels, replayed any number of times, with calls of other sizes and kinds in between."""
    size = len(ranks.kernels)
    weight = torch.ones(1024, device=DEVICE, dtype=torch.bfloat16)
    buffers = [torch.empty(24, 1024, device=DEVICE, dtype=torch.bfloat16) for _ in range(size)]
    graphs, totals, gathered = [], [], []
    for kernels, buffer, stream in zip(ranks.kernels, buffers, ranks.streams, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            first = kernels.all_reduce(buffer.clone(), False)
            second = kernels.all_reduce(buffer * 2, True)
            third = kernels.all_reduce_add_norm(buffer, None, weight, 1e-5, False)[1]
            fourth = kernels.all_reduce_add_norm(buffer, first, weight, 1e-5, True)[1]
            totals.append((first, second, third, fourth))
            gathered.append(kernels.all_gather(buffer[:2]))
        graphs.append(graph)
    for turn in range(20):
        parts = parts_of(size, (24, 1024), torch.bfloat16, turn)
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part)
        ranks.run(lambda kernels, rank, phases: graphs[rank].replay())
        if turn % 3 == 0:
            more = parts_of(size, (48 * (turn + 1),), torch.float32, turn)
            check_sum(ranks.all_reduce(more, turn % 2 == 0), more)
        expected = [parts, [part * 2 for part in parts], parts, [*parts, totals[0][0]]]
        for index, summands in enumerate(expected):
            check_sum([each[index] for each in totals], summands)
        for each in gathered:
            assert torch.equal(each, torch.stack([part[:2] for part in parts]))
    ranks.check_empty()


@pytest.mark.gpu
def test_ranks_that_run_apart() -> None:
    """Many calls in a row while one rank is late again and again: nobody overwrites what it has not read."""
    ranks = Ranks(4)
    calls = 200
    parts = [parts_of(4, (8192,), torch.bfloat16, index) for index in range(8)]
    results: list[list[torch.Tensor]] = [[], [], [], []]
    torch.cuda.synchronize()
    for rank, stream in enumerate(ranks.streams):
        with torch.cuda.stream(stream):
            for call in range(calls):
                if call % 17 == rank * 3:
                    torch.cuda._sleep(300_000)
                x = parts[call % 8][rank].clone()
                results[rank].append(ranks.kernels[rank].all_reduce(x, call % 3 == 0))
    torch.cuda.synchronize()
    for call in range(calls):
        check_sum([results[rank][call] for rank in range(4)], parts[call % 8])


def test_what_fits() -> None:
    kernels = Ranks(3, slot_bytes=3 * 4096).kernels[0]
    x = torch.zeros(4096, dtype=torch.bfloat16, device=DEVICE)
    assert kernels.fits(x[:2048], False) and not kernels.fits(x[:2056], False)
    assert kernels.fits(x[:3072], True) and not kernels.fits(x[:3096], True) and not kernels.fits(x[:2048], True)
    assert not kernels.fits(x[1:2049], False) and not kernels.fits(x[:2044], False)
    assert not kernels.fits(x[:2048].view(2, 1024).t(), False) and not kernels.fits(x[:0], False)
    assert not kernels.fits(x[:64].to(torch.int64), False)
    assert kernels.fits_rows(x[:2048].view(8, 256), False) and not kernels.fits_rows(x[:2048], False)
    assert not kernels.fits_rows(x[:96].view(8, 12), False)
    assert kernels.fits_gather(x[:1024]) and not kernels.fits_gather(x[:1028]) and not kernels.fits_gather(x[:2])


def run_ranks(scenario: str, size: int, path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.reduce_rank", scenario, str(rank), str(size), str(path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(size)
    ]
    try:
        for rank, process in enumerate(ranks):
            output = process.communicate(timeout=100)[0]
            assert process.returncode == 0 and output.rstrip().endswith("ok"), f"rank {rank}: {output}"
            if rank == 0:
                print(output)
    finally:
        for process in ranks:
            process.kill()
            process.wait()


@pytest.mark.gpu
def test_processes_of_one_gpu(tmp_path: Path) -> None:
    """Memory really goes from one process to another."""
    run_ranks("one_gpu", 2, tmp_path)


@pytest.mark.multigpu
@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("scenario", ["many_gpus", "large"])
def test_ranks_on_gpus(scenario: str, size: int, tmp_path: Path) -> None:
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} CUDA GPUs")
    run_ranks(scenario, size, tmp_path)


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_processes_end_where_a_rank_never_comes(tmp_path: Path) -> None:
    run_ranks("lost", min(4, torch.cuda.device_count()), tmp_path)
