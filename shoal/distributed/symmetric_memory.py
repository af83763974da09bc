"""Memory of every GPU of a group that all its ranks write: exchange of the handles, and a check that it works.
`rendezvous` makes it; `kernels/all_reduce.py` and `kernels/copied_sum.py` say what lies in it.

Through CUDA IPC and the driver's own interface: torch's symmetric memory would set up NVLink multicast, and its
allocator may hold memory that cannot be shared so.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from shoal import log
from shoal.distributed.meeting import Meeting

_logger = log.get_logger(__name__)

NUM_SLOTS = 2
# In two-shot a slot holds twice the summand, in one-shot as many as there are ranks.
SLOT_BYTES = 16 << 20
# What the memory holds at the start: two halves of -0.0 in every word.
EMPTY_WORD = 0x80008000
MAX_RANKS = 8
_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1
_MARK_BYTES = 256


@dataclasses.dataclass(frozen=True)
class PeerMemory:
    """addresses: where each rank's memory, NUM_SLOTS · slot_bytes, is mapped in this process; rank: which is its own.

    It is given back with the process and not before: unmapping waits for the device, on which a kernel may wait for a
    peer that is gone, and CUDA graphs hold the addresses.
    """

    addresses: tuple[int, ...]
    rank: int
    device: torch.device
    slot_bytes: int = SLOT_BYTES


class _Handle(ctypes.Structure):
    _fields_ = [("reserved", ctypes.c_char * _HANDLE_BYTES)]


class FlagRound:
    """Flags, words of 32 bits in any rank's memory, that a stream raises, and those that it waits for then."""

    # CUstreamBatchMemOpParams, of cuda.h.
    _TYPE = np.dtype(
        {
            "names": ["operation", "address", "value"],
            "formats": ["<u4", "<u8", "<u4"],
            "offsets": [0, 8, 16],
            "itemsize": 48,
        }
    )
    _WAIT, _WRITE = 1, 2

    def __init__(self, raised: Sequence[int], awaited: Sequence[int]) -> None:
        """raised, awaited: addresses."""
        self.operations = np.zeros(len(raised) + len(awaited), self._TYPE)
        self.operations["operation"] = [self._WRITE] * len(raised) + [self._WAIT] * len(awaited)
        self.operations["address"] = [*raised, *awaited]
        self.address = self.operations.ctypes.data


class CudaDriver:
    """The few calls of the CUDA driver that torch has no way to. OSError where there is none, or a call fails."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")

    def allocate(self, num_bytes: int) -> int:
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(num_bytes))
        return address.value

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def export(self, address: int) -> bytes:
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle)

    def open(self, handle: bytes) -> int:
        address = ctypes.c_uint64()
        structure = _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), structure, ctypes.c_uint(_LAZY_PEER_ACCESS))
        return address.value

    def close(self, address: int) -> None:
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def write(self, address: int, data: bytes) -> None:
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), data, ctypes.c_size_t(len(data)))

    def read(self, address: int, num_bytes: int) -> bytes:
        data = ctypes.create_string_buffer(num_bytes)
        self._call("cuMemcpyDtoH_v2", data, ctypes.c_uint64(address), ctypes.c_size_t(num_bytes))
        return data.raw

    def fill(self, address: int, word: int, num_bytes: int) -> None:
        self._call("cuMemsetD32_v2", ctypes.c_uint64(address), ctypes.c_uint(word), ctypes.c_size_t(num_bytes // 4))
        self._call("cuCtxSynchronize")

    # Queued on a stream, by its number. Called often: with as little Python as there can be.

    def copy(self, destination: int, source: int, num_bytes: int, stream: int) -> None:
        """Between GPUs by a copy engine."""
        if status := self._copy(destination, source, num_bytes, stream):
            self._fail("cuMemcpyDtoDAsync_v2", status)

    def exchange(self, flags: FlagRound, value: int, stream: int) -> None:
        """Once all before it in the stream is done, write value to the flags that are raised; then wait until those
        that are awaited hold no less, in a circle: it may overflow."""
        flags.operations["value"] = value & 0xFFFFFFFF
        if status := self._batch(stream, len(flags.operations), flags.address, 0):
            self._fail("cuStreamBatchMemOp_v2", status)

    @functools.cached_property
    def _copy(self) -> Any:
        return self._bound("cuMemcpyDtoDAsync_v2", ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)

    @functools.cached_property
    def _batch(self) -> Any:
        return self._bound("cuStreamBatchMemOp_v2", ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint)

    def _bound(self, name: str, *types: Any) -> Any:
        function = getattr(self._library, name)
        function.argtypes = types
        return function

    def _call(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            self._fail(name, status)

    def _fail(self, name: str, status: int) -> None:
        text = ctypes.c_char_p()
        self._library.cuGetErrorName(status, ctypes.byref(text))
        raise OSError(f"{name}: {(text.value or str(status).encode()).decode()}")


class _Attempt(msgspec.Struct, frozen=True):
    """What a rank says after a step: what it did not manage, or nothing; and its handle."""

    failure: str = ""
    handle: bytes = b""


def share_memory(
    meeting: Meeting,
    label: str,
    ranks: Sequence[int],
    rank: int,
    device: torch.device,
    driver: CudaDriver | None = None,
    *,
    num_bytes: int = NUM_SLOTS * SLOT_BYTES,
    word: int = EMPTY_WORD,
) -> PeerMemory | None:
    """Map the memory of all `ranks` (global, on one host) in each of them, or None on all of them where one cannot.

    num_bytes of each, a multiple of NUM_SLOTS words, full of `word`. driver: None for the real one. Every rank goes
    through the same phases, whatever fails on it.
    Raises StartupError for a rank that does not come.
    """
    sharing = _Sharing(meeting, label, list(ranks), rank, device, driver, num_bytes, word)
    # The driver's calls mean the context that is current in this thread: torch's, of this device.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return sharing.run()


class _Sharing:
    def __init__(
        self,
        meeting: Meeting,
        label: str,
        ranks: list[int],
        rank: int,
        device: torch.device,
        driver: CudaDriver | None,
        num_bytes: int,
        word: int,
    ) -> None:
        self._num_bytes, self._word = num_bytes, word
        self._meeting, self._label, self._ranks, self._device, self._driver = meeting, label, ranks, device, driver
        self._index = ranks.index(rank)
        self._own = 0
        self._addresses: dict[int, int] = {}

    def run(self) -> PeerMemory | None:
        handles = self._together("export", self._allocate)
        if handles is None:
            self._give_back()
            return None
        steps: list[tuple[str, Callable[[], object]]] = [
            ("map", lambda: self._open(handles)),
            ("mark", self._mark),
            ("check", self._check),
            ("empty", lambda: self._cuda().fill(self._own, self._word, self._num_bytes)),
        ]
        for name, step in steps:
            if self._together(name, step) is None:
                self._give_back()
                return None
        addresses = tuple(self._addresses[index] for index in range(len(self._ranks)))
        return PeerMemory(addresses, self._index, self._device, self._num_bytes // NUM_SLOTS)

    def _together(self, phase: str, step: Callable[[], object]) -> list[bytes] | None:
        """Do a step on all ranks: what each returned, or None on all when one of them failed."""
        try:
            result = step()
            attempt = _Attempt(handle=result if isinstance(result, bytes) else b"")
        except (OSError, RuntimeError, AttributeError) as error:
            attempt = _Attempt(failure=str(error).split("\n")[0] or type(error).__name__)
        value = msgspec.json.encode(attempt).decode()
        replies = self._meeting.exchange(f"{phase} memory of {self._label}", value, self._ranks)
        attempts = {rank: msgspec.json.decode(replies[rank], type=_Attempt) for rank in self._ranks}
        for rank, each in attempts.items():
            if each.failure:
                _logger.info(
                    "the GPUs of %s share no memory, so NCCL sums what would lie there: %s could not %s: %s",
                    self._label, self._meeting.name(rank), phase, each.failure,
                )  # fmt: skip
                return None
        return [each.handle for each in attempts.values()]

    def _cuda(self) -> CudaDriver:
        if self._driver is None:
            self._driver = CudaDriver()
        return self._driver

    def _allocate(self) -> bytes:
        if self._device.type == "cuda":
            torch.zeros(1, device=self._device)  # so that there is a context
        self._own = self._cuda().allocate(self._num_bytes)
        self._addresses[self._index] = self._own
        return self._cuda().export(self._own)

    def _open(self, handles: list[bytes]) -> None:
        for index, handle in enumerate(handles):
            if index != self._index:
                self._addresses[index] = self._cuda().open(handle)

    def _mark(self) -> None:
        """Write to every rank's memory, own included, at this rank's place."""
        for index, address in self._addresses.items():
            self._cuda().write(address + self._index * _MARK_BYTES, _mark(self._index, index))

    def _check(self) -> None:
        """Everyone's marks are in this rank's memory, and this rank's in everyone's."""
        for index, address in self._addresses.items():
            for place, data in ((self._own + index * _MARK_BYTES, _mark(index, self._index)),
                                (address + self._index * _MARK_BYTES, _mark(self._index, index))):  # fmt: skip
                if self._cuda().read(place, _MARK_BYTES) != data:
                    raise OSError(f"what rank {index} of the group and this one write does not arrive")

    def _give_back(self) -> None:
        """Nothing runs on the memory yet. What is mapped elsewhere may not be freed, so all mappings go first."""
        if self._together("unmap", self._close) is not None and self._own:
            with contextlib.suppress(OSError):
                self._cuda().free(self._own)

    def _close(self) -> None:
        for index, address in self._addresses.items():
            if index != self._index:
                self._cuda().close(address)


def _mark(source: int, destination: int) -> bytes:
    return bytes((source * 37 + destination * 101 + offset * 7 + 1) % 251 for offset in range(_MARK_BYTES))
