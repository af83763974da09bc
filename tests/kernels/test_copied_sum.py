"""Large sums by copies and flags, between ranks that are threads of this process: copies are memcpy, streams are
queues, and the kernels run in the interpreter. Real copy engines: tests/kernels/reduce_rank.py."""

from __future__ import annotations

import ctypes
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from shoal.distributed.communicator import PendingSum
from shoal.distributed.group import GroupCoordinator
from shoal.distributed.symmetric_memory import NUM_SLOTS, FlagRound, PeerMemory
from shoal.kernels.copied_sum import CopyReducer, memory_bytes
from shoal.kernels.large_reducer import StartCheck, attach_large_reducer
from tests.rank_threads import ThreadCommunicator, _Exchange, on_ranks

SECONDS = 30.0
CPU = torch.device("cpu")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# The interpreter cuts fp32 off where a GPU rounds it.
ULP = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-23}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU kernels are not interpreted")


class QueueLane:
    """A stream as a thread that works off a queue. delay: seconds before each operation."""

    kernel_lock = threading.Lock()

    def __init__(self, delay: float = 0.0) -> None:
        self._queue = ThreadPoolExecutor(1)
        self._delay = delay
        self._last: Future[None] = Future()

    def begin(self) -> None:
        pass

    def copy(self, destination: int, source: int, num_bytes: int) -> None:
        self._put(lambda: ctypes.memmove(destination, source, num_bytes))

    def exchange(self, flags: FlagRound, value: int) -> None:
        def run() -> None:
            deadline = time.monotonic() + SECONDS
            for operation, address in flags.operations[["operation", "address"]].tolist():
                if operation == FlagRound._WRITE:
                    _word(address, value)
                while _word(address) < value:
                    assert time.monotonic() < deadline, "a flag is not raised"
                    time.sleep(1e-4)

        self._put(run)

    def launch(self, kernel, dtype, num_programs, arguments, constants, num_warps) -> None:
        def run() -> None:
            with self.kernel_lock:
                kernel[(num_programs,)](*arguments, *constants)

        self._put(run)

    def end(self) -> None:
        pass

    def join(self) -> None:
        self._last.result(SECONDS)

    def tensor(self, address: int, num_bytes: int) -> torch.Tensor:
        return torch.frombuffer((ctypes.c_uint8 * num_bytes).from_address(address), dtype=torch.uint8)

    def _put(self, work) -> None:
        def run() -> None:
            time.sleep(self._delay)
            work()

        before, self._last = self._last, self._queue.submit(run)
        if before.done():
            before.result()


def _word(address: int, value: int | None = None) -> int:
    word = ctypes.c_uint32.from_address(address)
    if value is not None:
        word.value = value
    return word.value


class Ranks:
    def __init__(self, size: int, max_bytes: int, delays: list[float] | None = None) -> None:
        self.size = size
        self.memory = [torch.zeros(memory_bytes(size, max_bytes), dtype=torch.uint8) for _ in range(size)]
        addresses = tuple(each.data_ptr() for each in self.memory)
        slot_bytes = self.memory[0].numel() // NUM_SLOTS
        self.reducers = [
            CopyReducer(
                PeerMemory(addresses, rank, CPU, slot_bytes), 0, max_bytes,
                [QueueLane(delays[rank] if delays else 0.0) for _ in range(NUM_SLOTS)],
            )
            for rank in range(size)
        ]  # fmt: skip

    def run(self, work) -> list:
        """work(reducer, rank), on a thread each."""
        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(lambda rank: work(self.reducers[rank], rank), range(self.size)))


def parts_of(size: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(size)]


def check(results: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
    expected = sum(part.double() for part in parts)
    scale = sum(part.double().abs() for part in parts)
    for result in results:
        error = (result.double() - expected).abs()
        assert bool((error <= expected.abs() * ULP[parts[0].dtype] * 1.01 + scale * 2**-22).all())
        assert torch.equal(result, results[0]), "all ranks have the same bits"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_sums(size: int, dtype: torch.dtype) -> None:
    shape = (5, 16 * size)
    ranks = Ranks(size, 5 * 16 * size * dtype.itemsize + 100)
    for seed in range(5):
        parts = parts_of(size, shape, dtype, seed)
        originals = [part.clone() for part in parts]
        check(ranks.run(lambda reducer, rank, parts=parts: reducer.start(parts[rank]).wait().clone()), parts)
        assert all(map(torch.equal, parts, originals)), "summands stay"


@settings(deadline=None, max_examples=8)
@given(
    size=st.integers(2, 4),
    rows=st.lists(st.integers(1, 6), min_size=1, max_size=9),
    delays=st.lists(st.sampled_from([0.0, 0.0005, 0.003]), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_two_at_a_time_of_ranks_that_are_late(size: int, rows: list[int], delays: list[float], seed: int) -> None:
    """As a layer in halves does it: the next sum is begun before the last one is waited for."""
    ranks = Ranks(size, 6 * 16 * size * 2, delays)
    inputs = [parts_of(size, (num_rows, 8 * size), torch.bfloat16, seed + turn) for turn, num_rows in enumerate(rows)]

    def work(reducer: CopyReducer, rank: int) -> list[torch.Tensor]:
        pending: list[PendingSum] = []
        results = []
        for parts in inputs:
            pending.append(reducer.start(parts[rank]))
            if len(pending) == NUM_SLOTS:
                results.append(pending.pop(0).wait().clone())
        return [*results, *(each.wait().clone() for each in pending)]

    for parts, results in zip(inputs, zip(*ranks.run(work), strict=True), strict=True):
        check(list(results), parts)


def test_a_third_sum_is_not_begun_before_the_first_is_waited_for() -> None:
    ranks = Ranks(2, 1024)
    x = torch.ones(2, 16)

    def work(reducer: CopyReducer, _: int) -> None:
        first, second = reducer.start(x), reducer.start(x)
        with pytest.raises(AssertionError, match="waited for"):
            reducer.start(x)
        assert torch.equal(first.wait(), 2 * x) and torch.equal(second.wait(), 2 * x)
        assert torch.equal(reducer.start(x * 3).wait(), 6 * x)

    ranks.run(work)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "num_rows"), [(2, 6), (3, 7), (4, 3), (8, 21)])
def test_rows_joined_with_residual_and_norm(size: int, num_rows: int, dtype: torch.dtype) -> None:
    """Layers in a row: each rank keeps the stream of its own rows. At last the total itself."""
    width = 40
    ranks = Ranks(size, -(-num_rows // size) * size * width * dtype.itemsize)
    weight = torch.rand(width, generator=torch.Generator().manual_seed(9)).to(dtype)
    stream = parts_of(1, (num_rows, width), dtype, 100)[0]
    layers = [parts_of(size, (num_rows, width), dtype, seed) for seed in range(4)]

    def work(reducer: CopyReducer, rank: int) -> list[torch.Tensor]:
        own = stream[reducer.own_rows(num_rows)].clone()
        results = []
        for index, parts in enumerate(layers):
            last = index == len(layers) - 1
            assert reducer.takes_rows(parts[rank])
            results.append(reducer.start_add_norm(parts[rank], own, None if last else weight, 1e-5).wait().clone())
        return results

    results = ranks.run(work)
    # bf16 is cut off in the interpreter: an ulp of a number up to 16 in each layer.
    atol = (40 if dtype is torch.bfloat16 else 8) * ULP[dtype]
    total = stream.float()
    for index, parts in enumerate(layers):
        total = (total + sum(part.float() for part in parts)).to(dtype).float()
        expected = total if index == 3 else F.rms_norm(total, (width,), weight.float(), 1e-5)
        for rank in range(size):
            torch.testing.assert_close(results[rank][index].float(), expected, atol=atol, rtol=4 * ULP[dtype])
            assert torch.equal(results[rank][index], results[0][index])


def test_what_it_takes() -> None:
    reducer = Ranks(4, 4096).reducers[0]
    assert reducer.takes(torch.zeros(2048, dtype=torch.bfloat16)) and reducer.takes(torch.zeros(64, 16))
    assert not reducer.takes(torch.zeros(1025)), "too large"
    assert not reducer.takes(torch.zeros(20)), "parts are no whole vectors"
    assert not reducer.takes(torch.zeros(64, 16, dtype=torch.int32))
    assert not reducer.takes(torch.zeros(16, 64).T)


def test_trying_alone_leaves_the_memory_as_it_was() -> None:
    ranks = Ranks(3, 1024)
    ranks.run(lambda reducer, _: reducer.try_alone(16, torch.float32))
    assert not any(bool(each.any()) for each in ranks.memory)
    x = torch.ones(3, 16)
    for result in ranks.run(lambda reducer, _: reducer.start(x).wait()):
        assert torch.equal(result, 3 * x)


def test_a_group_starts_large_sums_through_what_is_attached() -> None:
    ranks = Ranks(2, 4096)

    def work(group: GroupCoordinator) -> list[torch.Tensor]:
        small, large = torch.ones(3), torch.ones(64, 16) + group.rank_in_group
        assert not group.overlaps(large)
        group.attach_large(ranks.reducers[group.rank_in_group])
        assert group.overlaps(large) and not group.overlaps(small)
        return [group.start_all_reduce(small).wait(), group.start_all_reduce(large).wait()]

    for small, large in on_ranks(2, work):
        assert bool((small == 2).all()) and bool((large == 3).all())


def test_groups_that_have_no_use_for_it_stay_as_they_are() -> None:
    def refuse(num_bytes: int) -> None:
        raise AssertionError("no memory is asked for")

    def work(group: GroupCoordinator) -> str | None:
        return attach_large_reducer(group, (1 << 11, 1 << 12), 1 << 12, torch.bfloat16, refuse)

    assert on_ranks(2, work) == [None, None], "the ranks share no GPU's memory"
    assert attach_large_reducer(GroupCoordinator([0], 0, name="tensor"), (1, 2), 8, torch.bfloat16, refuse) is None


@pytest.mark.parametrize("lost", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_check_at_the_start_finds_what_is_lost(lost: int | None, dtype: torch.dtype) -> None:
    """lost: the slot in which copies of rank 1 do not arrive."""
    ranks = Ranks(3, 24 * 96 * 4)
    if lost is not None:
        ranks.reducers[1]._lanes[lost].copy = lambda *_: None

    def work(reducer: CopyReducer, rank: int) -> bool:
        group = GroupCoordinator([0, 1, 2], rank, on_no_wire(rank), name="tensor")
        return StartCheck(reducer, group, 96, dtype, CPU).is_right(9, 24)

    found = ranks.run(work)
    assert found == [True] * 3 if lost is None else not all(found)


def on_no_wire(rank: int) -> ThreadCommunicator:
    """A communicator that nothing goes through."""
    return ThreadCommunicator(_Exchange(3), rank)
