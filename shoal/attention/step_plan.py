"""What the backends with kernels make of a step: its sequences on the device, those with one new token apart."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from shoal.attention.base import AttentionMetadata
from shoal.attention.sequences import DeviceSequences, plan_tiles
from shoal.kernels.decode_attention import DecodeRows


@dataclasses.dataclass(slots=True)
class StepPlan:
    """decodes: None where there are none. prompts: the other sequences, numpy [4, n] as `plan_tiles` takes them.
    on_device: has their tiles, and prompts is empty."""

    decodes: DecodeRows | None
    prompts: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((4, 0), np.int64))
    on_device: DeviceSequences | None = None
    _tiles: dict[tuple[int, bytes], torch.Tensor] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, metadata: AttentionMetadata) -> StepPlan:
        tables = metadata.block_tables
        if (rows := metadata.device_rows) is not None:
            return cls(DecodeRows(tables, rows.table_rows, rows.seq_lens))
        if (on_device := metadata.device_sequences) is not None:
            return cls(DecodeRows(tables, *on_device.decodes(len(metadata.slot_mapping))), on_device=on_device)
        num_new, lengths = np.array(metadata.query_lens), np.array(metadata.seq_lens)
        sequences = np.stack([np.arange(len(num_new)), np.cumsum(num_new) - num_new, num_new, lengths])
        single = num_new == 1
        decodes = None
        if single.any():
            numbers = _upload(sequences[:, single], tables.device)
            decodes = DecodeRows(tables, numbers[0], numbers[3], numbers[1])
        return cls(decodes, sequences[:, ~single])

    @property
    def has_prompts(self) -> bool:
        return self.prompts.size > 0 or self.on_device is not None

    def tiles(self, tile_tokens: int, query: torch.Tensor, others: np.ndarray | None = None) -> torch.Tensor:
        """Of all prompts but `others`, made once a step. query [T, …]; others: bool, a prompt each."""
        if self.on_device is not None:
            return self.on_device.tiles(tile_tokens, query.shape[0])
        kind = (tile_tokens, b"" if others is None else others.tobytes())
        if kind not in self._tiles:
            own = self.prompts if others is None else self.prompts[:, ~others]
            self._tiles[kind] = _upload(plan_tiles(own, tile_tokens), query.device)
        return self._tiles[kind]

    def new_output(self, query: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Nobody attends for the tokens that pad a graph's size: what they hold has to be numbers all the same."""
        return query.new_empty(shape) if self.on_device is None else query.new_zeros(shape)


def _upload(numbers: np.ndarray, device: torch.device) -> torch.Tensor:
    """int32, without waiting for the device: from pageable memory a copy would wait for all steps that are queued."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers.astype(np.int32)))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
