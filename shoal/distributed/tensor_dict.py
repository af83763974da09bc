"""What describes a dict of tensors and plain values to the rank that receives it: msgspec, never pickle."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import msgspec
import torch

# The first message is always this long, so that a receiver needs no other to know how long the rest is.
FIRST_BYTES = 1024
_LENGTH = struct.Struct("<I")


class TensorSpec(msgspec.Struct, array_like=True, frozen=True):
    """`on_device`: on the device of the group, rather than in host memory."""

    dtype: str
    shape: tuple[int, ...]
    on_device: bool

    def empty(self, device: torch.device) -> torch.Tensor:
        dtype = getattr(torch, self.dtype)
        return torch.empty(self.shape, dtype=dtype, device=device if self.on_device else "cpu")


class DictSpec(msgspec.Struct, array_like=True, frozen=True):
    """Every entry of a dict in its order: the description of a tensor, or the value itself."""

    names: tuple[str, ...]
    tensors: dict[str, TensorSpec]
    values: dict[str, Any]


def describe(entries: Mapping[str, Any]) -> DictSpec:
    """TypeError for a value that is neither a tensor nor made of None, bool, int, float, str, bytes, list and dict."""
    tensors = {
        name: TensorSpec(str(value.dtype).removeprefix("torch."), tuple(value.shape), value.device.type != "cpu")
        for name, value in entries.items()
        if isinstance(value, torch.Tensor)
    }
    values = {name: value for name, value in entries.items() if name not in tensors}
    return DictSpec(tuple(entries), tensors, values)


def pack(spec: DictSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [FIRST_BYTES] and what did not fit in it, uint8 [rest]; `unpack_length` of the first says how long."""
    payload = _LENGTH.pack(0) + msgspec.msgpack.encode(spec)
    data = bytearray(payload.ljust(FIRST_BYTES, b"\0"))
    _LENGTH.pack_into(data, 0, len(payload))
    message = torch.frombuffer(data, dtype=torch.uint8)
    return message[:FIRST_BYTES], message[FIRST_BYTES:]


def rest_bytes(first: torch.Tensor) -> int:
    """How many bytes follow the first message."""
    return max(0, _LENGTH.unpack_from(first.numpy())[0] - FIRST_BYTES)


def unpack(first: torch.Tensor, rest: torch.Tensor) -> DictSpec:
    data = first.numpy().tobytes() + rest.numpy().tobytes()
    return msgspec.msgpack.decode(data[_LENGTH.size : _LENGTH.unpack_from(data)[0]], type=DictSpec)
