"""What a captured step needs to choose its tokens, three integers a row, where that is all that rows ask for. Built by
SamplingState, uploaded by the model runner.

R rows of a step. Simple rows are greedy or drawn from the whole vocabulary by temperature and min_p, and nothing else
changes or reads their logits: no penalties, biases, allowed, banned or suppressed tokens, no log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from shoal.sampling.random import row_keys
from shoal.sampling.slots import GREEDY, SlotTable

WIDTH = 3


class SimpleRows:
    """A list of slots whose rows are simple, from a position on where min_tokens says so."""

    def __init__(self, table: SlotTable, slots: npt.NDArray[np.int64]) -> None:
        greedy = table.kind[slots] == GREEDY
        self._draws = not bool(greedy.all())
        self._mixed_seeds = table.mixed_seed[slots]
        minimum = np.flatnonzero(table.has_minimum[slots])
        self._minimum_rows = minimum if minimum.size else None
        self._first_free_positions = table.first_free_position[slots[minimum]]
        # The keys of greedy rows are computed with the others, and read by nobody.
        self._rows: npt.NDArray[np.int32] = np.zeros((len(slots), WIDTH), dtype=np.int32)
        self._rows[:, 0] = np.where(greedy, np.float32(0), table.temperature[slots]).view(np.int32)
        self._rows[:, 1] = np.where(greedy, np.float32(0), table.min_p[slots]).view(np.int32)

    @classmethod
    def of(cls, table: SlotTable, slots: npt.NDArray[np.int64]) -> SimpleRows | None:
        """None where some row is not simple, whatever its position."""
        return cls(table, slots) if bool(table.is_simple[slots].all()) else None

    def at(self, positions: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int32] | None:
        """int32 [R, 3] for tokens at these positions of their sequences: temperature (0: greedy) and min_p as bits of
        fp32, row key. None while min_tokens still forbids tokens to some row."""
        wide = np.asarray(positions, dtype=np.int64)
        if self._minimum_rows is not None and bool((wide[self._minimum_rows] < self._first_free_positions).any()):
            return None
        rows = self._rows.copy()
        if self._draws:
            rows[:, 2] = row_keys(self._mixed_seeds, wide.view(np.uint64))
        return rows
