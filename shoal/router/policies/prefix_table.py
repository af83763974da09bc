"""Which prompt blocks one backend has seen, and what its reports say about that. Used by prefix-aware.

The backend evicts what was not used for the longest time, as this table does; how much it holds is not known. So when
it turns out not to have a block, everything that was used no later than that block is forgotten with it.
"""

from __future__ import annotations

import bisect
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

# How fast trust follows the reports.
_TRUST_STEP = 0.1
# Predictions of fewer blocks say nothing: servers cache in blocks of tokens, and add a template's.
_FEWEST_BLOCKS = 3


class _Open(NamedTuple):
    """A request that runs there.

    used_by, brought_by: for each block that it was expected to find, the number of the request that had used it last,
    and of the one that had brought it. open_before: of the requests that were running there when it came.
    """

    number: int
    used_by: list[int]
    brought_by: list[int]
    open_before: frozenset[int]


class PrefixTable:
    """The blocks of one backend, at most `max_blocks`, and the requests that run there.

    A block is never forgotten before the blocks that come after it: of a chain the beginning is held.
    trust: from 0 to 1, the part of what was predicted that turned out to be there, of late.
    """

    def __init__(self, max_blocks: int) -> None:
        self.trust = 1.0
        self._max_blocks = max_blocks
        # By block, the numbers of the requests that used it last, the earliest first, and that brought it.
        self._used_by: OrderedDict[int, int] = OrderedDict()
        self._brought_by: dict[int, int] = {}
        self._open: dict[str, _Open] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._used_by)

    def match(self, blocks: Sequence[int]) -> int:
        """How many blocks from the beginning it should have."""
        return bisect.bisect_left(blocks, True, key=lambda block: block not in self._used_by)

    def start(self, request_id: str, blocks: Sequence[int]) -> None:
        """A request with these blocks goes there."""
        self._number += 1
        number, used_by, brought_by = self._number, self._used_by, self._brought_by
        matched = blocks[: self.match(blocks)]
        self._open[request_id] = _Open(
            number,
            # 0: hashes that collide may make a gap.
            [used_by.get(block, 0) for block in matched],
            [brought_by.get(block, 0) for block in matched],
            frozenset(one.number for one in self._open.values()),
        )
        # The last block first, so that it is the first of the chain to be forgotten.
        for block in reversed(blocks):
            used_by[block] = number
            used_by.move_to_end(block)
            brought_by.setdefault(block, number)
        while len(used_by) > self._max_blocks:
            self._forget_first()

    def finish(self, request_id: str, num_cached_blocks: float | None) -> None:
        """It has ended. num_cached_blocks: what the server says it had of the prompt; None when it did not say."""
        request = self._open.pop(request_id, None)
        if request is None or num_cached_blocks is None or len(request.used_by) < _FEWEST_BLOCKS:
            return
        num_matched = len(request.used_by)
        missing = num_cached_blocks < num_matched / 2 - 1
        # The first block that was certainly not there.
        place = min(math.ceil(num_cached_blocks), num_matched - 1)
        if missing and request.brought_by[place] in request.open_before:
            return  # not evicted, but not computed yet: the request that brings it was only just before this one
        self.trust += _TRUST_STEP * (min(num_cached_blocks / num_matched, 1.0) - self.trust)
        if missing and request.used_by[place] not in request.open_before:
            # Forget what was used last by that request or one before it.
            while self._used_by and next(iter(self._used_by.values())) <= request.used_by[place]:
                self._forget_first()

    def _forget_first(self) -> None:
        block, _ = self._used_by.popitem(last=False)
        del self._brought_by[block]
