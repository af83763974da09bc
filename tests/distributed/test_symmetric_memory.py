"""Ranks that map each other's memory: all of them get it, or none, whatever fails on one. The driver is a fake."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from shoal.distributed import symmetric_memory
from shoal.distributed.meeting import Meeting, file_store
from shoal.distributed.symmetric_memory import EMPTY_WORD, NUM_SLOTS, SLOT_BYTES, CudaDriver, PeerMemory, share_memory

SIZE = 3
SLOT = 4096


class Machine:
    """The memory of all GPUs of a host. An address is a number that only its rank can use; a mapping has its own."""

    def __init__(self) -> None:
        self.memory: dict[int, bytearray] = {}

    def driver(self, rank: int, **faults: int) -> FakeDriver:
        return FakeDriver(self, rank, faults)


class FakeDriver(CudaDriver):
    """faults: the name of a method -> the rank on which it fails."""

    def __init__(self, machine: Machine, rank: int, faults: dict[str, int]) -> None:
        self.machine, self.rank, self.faults = machine, rank, faults
        self.mapped: dict[int, bytearray] = {}
        self.freed: list[int] = []

    def _may_fail(self, name: str) -> None:
        if self.faults.get(name) == self.rank:
            raise OSError(f"{name} is out of order")

    def allocate(self, num_bytes: int) -> int:
        self._may_fail("allocate")
        assert num_bytes == NUM_SLOTS * SLOT_BYTES
        address = (self.rank + 1) << 40
        self.mapped[address] = self.machine.memory[address] = bytearray(NUM_SLOTS * SLOT)
        return address

    def free(self, address: int) -> None:
        self.freed.append(address)
        del self.mapped[address]

    def export(self, address: int) -> bytes:
        self._may_fail("export")
        return address.to_bytes(8, "little") + b"\xff" * 56

    def open(self, handle: bytes) -> int:
        self._may_fail("open")
        address = int.from_bytes(handle[:8], "little")
        here = address + ((self.rank + 1) << 32)
        self.mapped[here] = bytearray(NUM_SLOTS * SLOT) if "lost" in self.faults else self.machine.memory[address]
        return here

    def close(self, address: int) -> None:
        del self.mapped[address]

    def write(self, address: int, data: bytes) -> None:
        memory, at = self._find(address)
        memory[at : at + len(data)] = data

    def read(self, address: int, num_bytes: int) -> bytes:
        memory, at = self._find(address)
        return bytes(memory[at : at + num_bytes])

    def fill(self, address: int, word: int, num_bytes: int) -> None:
        self._may_fail("fill")
        memory, at = self._find(address)
        assert at == 0 and num_bytes == NUM_SLOTS * SLOT_BYTES
        memory[:] = word.to_bytes(4, "little") * (len(memory) // 4)

    def _find(self, address: int) -> tuple[bytearray, int]:
        start = max(each for each in self.mapped if each <= address)
        return self.mapped[start], address - start


def share(path: Path, **faults: int) -> tuple[list[PeerMemory | None], list[FakeDriver]]:
    machine = Machine()
    drivers = [machine.driver(rank, **faults) for rank in range(SIZE)]

    def rank_shares(rank: int) -> PeerMemory | None:
        store = file_store(str(path / "store"), SIZE)
        meeting = Meeting(store, rank, SIZE, timeout=30.0, generation=0, names={})
        return share_memory(meeting, "test", range(SIZE), rank, torch.device("cpu"), drivers[rank])

    with ThreadPoolExecutor(SIZE) as pool:
        return list(pool.map(rank_shares, range(SIZE))), drivers


def test_all_ranks_map_all_memory(tmp_path: Path) -> None:
    memories, drivers = share(tmp_path)
    for rank, (memory, driver) in enumerate(zip(memories, drivers, strict=True)):
        assert memory is not None and memory.rank == rank and len(memory.addresses) == SIZE
        assert memory.addresses[rank] in driver.machine.memory
        # What one writes there, its owner sees.
        for owner, address in enumerate(memory.addresses):
            driver.write(address + 64 * rank, bytes([rank, owner]))
    for rank, driver in enumerate(drivers):
        own = driver.mapped[(rank + 1) << 40]
        for writer in range(SIZE):
            assert own[64 * writer : 64 * writer + 2] == bytes([writer, rank])
        # The marks of the check are gone: all else is empty.
        assert own[256:] == EMPTY_WORD.to_bytes(4, "little") * ((len(own) - 256) // 4)


@pytest.mark.parametrize("fault", ["allocate", "export", "open", "fill"])
@pytest.mark.parametrize("rank", [0, 2])
def test_what_fails_on_one_rank_ends_it_on_all(
    fault: str, rank: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="shoal")
    memories, drivers = share(tmp_path, **{fault: rank})
    assert memories == [None] * SIZE
    reasons = [record.getMessage() for record in caplog.records]
    assert len(reasons) == SIZE and len(set(reasons)) == 1
    assert f"rank {rank} could not" in reasons[0] and f"{fault} is out of order" in reasons[0]
    for driver in drivers:
        assert driver.mapped == {}, "everything is given back"


def test_memory_that_others_write_but_nobody_sees_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="shoal")
    memories, _ = share(tmp_path, lost=0)
    assert memories == [None] * SIZE
    assert "does not arrive" in caplog.records[0].getMessage()


def test_without_a_driver_there_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_library(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(symmetric_memory.ctypes, "CDLL", no_library)
    caplog.set_level(logging.INFO, logger="shoal")
    meeting = Meeting(file_store(str(tmp_path / "store"), 1), 0, 1, timeout=30.0, generation=0, names={})
    assert share_memory(meeting, "test", [0], 0, torch.device("cpu")) is None
    assert "libcuda.so.1: cannot open" in caplog.records[0].getMessage()
