"""The sequences of a step, as kernels take them: those with one new token, and the others cut into tiles.

`plan_tiles` cuts on the host. `DeviceSequences` keeps both where a CUDA graph reads them anew at each replay.
"""

from __future__ import annotations

import numpy as np
import torch


def plan_tiles(sequences: np.ndarray, tile_tokens: int) -> np.ndarray:
    """Work of one launch, the largest first: [tiles, 4] int32, (row of the block table, first token, number of tokens,
    position of the first). sequences [4, n]: int, (row of the block table, first token, number of new tokens, length
    with them)."""
    table_rows, first_tokens, num_new, seq_lens = sequences
    counts = -(-num_new // tile_tokens)
    owner = np.repeat(np.arange(len(num_new)), counts)
    offset = (np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)) * tile_tokens
    tiles = np.empty((len(owner), 4), np.int32)
    tiles[:, 0] = table_rows[owner]
    tiles[:, 1] = first_tokens[owner] + offset
    tiles[:, 2] = np.minimum(num_new[owner] - offset, tile_tokens)
    tiles[:, 3] = (seq_lens - num_new)[owner] + offset
    return tiles[np.argsort(-tiles[:, 3], kind="stable")]


class DeviceSequences:
    """Any sequences, `fill`ed in before each step. What it has no more of is empty: lengths of 0, tiles of no tokens.

    sequences [4, n]: as of `plan_tiles`, on the host, for backends that look at them.
    """

    def __init__(self, max_num_seqs: int, max_num_tokens: int, device: torch.device) -> None:
        self.sequences = np.zeros((4, 0), np.int64)
        self._max_num_seqs, self._max_num_tokens = max_num_seqs, max_num_tokens
        self._decodes = torch.zeros((3, max_num_seqs), dtype=torch.int32, device=device)
        self._tiles: dict[int, torch.Tensor] = {}

    def decodes(self, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the sequences with one new token, in a step of up to so many tokens: rows of the table, lengths and
        tokens, int32 [S]."""
        table_rows, seq_lens, tokens = self._decodes[:, :num_tokens].unbind(0)
        return table_rows, seq_lens, tokens

    def tiles(self, tile_tokens: int, num_tokens: int) -> torch.Tensor:
        """[tiles, 4]: as of `plan_tiles`, of the other sequences in a step of up to so many tokens."""
        if tile_tokens not in self._tiles:
            most = _most_tiles(tile_tokens, self._max_num_tokens, self._max_num_seqs)
            self._tiles[tile_tokens] = torch.zeros((most, 4), dtype=torch.int32, device=self._decodes.device)
        return self._tiles[tile_tokens][: _most_tiles(tile_tokens, num_tokens, self._max_num_seqs)]

    def fill(self, sequences: np.ndarray) -> None:
        """sequences [4, n]: as of `plan_tiles`."""
        self.sequences = sequences
        single = sequences[2] == 1
        self._upload(self._decodes, sequences[[0, 3, 1]][:, single])
        for tile_tokens, tiles in self._tiles.items():
            self._upload(tiles, plan_tiles(sequences[:, ~single], tile_tokens))

    @staticmethod
    def _upload(target: torch.Tensor, numbers: np.ndarray) -> None:
        whole = np.zeros(target.shape, np.int32)
        whole[: numbers.shape[0], : numbers.shape[1]] = numbers
        host = torch.from_numpy(whole)
        target.copy_(host.pin_memory() if target.is_cuda else host, non_blocking=True)


def _most_tiles(tile_tokens: int, num_tokens: int, max_num_seqs: int) -> int:
    """Each sequence has two new tokens or more, and one tile of its own that is not full."""
    return min(num_tokens // tile_tokens + min(max_num_seqs, num_tokens // 2), num_tokens)
