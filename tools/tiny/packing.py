"""Packs documents into rows of tokens, in worker processes that keep ahead of the training loop."""

import multiprocessing
import os
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from .conversations import Piece, sample

LEARNT_BIT = 1 << 15
# Most rows are short, so that most documents begin near position 0, as they do when served; the long ones teach the
# far positions.
_ROW_LENGTHS = ((512, 0.50), (1024, 0.35), (2048, 0.13), (8192, 0.02))
_REPLAY_LAG = 16


@dataclass(frozen=True)
class Recipe:
    """What a shard is made of: `num_batches` batches of `batch_tokens` tokens each."""

    tokenizer_file: str
    batch_tokens: int
    num_batches: int = 8
    longest_row: int = 8192


_tokenizers: dict[str, Tokenizer] = {}


def make_shard(recipe: Recipe, seed: int) -> np.ndarray:
    """Return tokens [batches, rows, length] as uint16, the high bit set on those to be learnt. One seed, one shard."""
    if recipe.tokenizer_file not in _tokenizers:
        _tokenizers[recipe.tokenizer_file] = Tokenizer.from_file(recipe.tokenizer_file)
    tokenizer = _tokenizers[recipe.tokenizer_file]
    rng = random.Random(seed)
    lengths, weights = zip(*(pair for pair in _ROW_LENGTHS if pair[0] <= recipe.longest_row), strict=True)
    length = rng.choices(lengths, weights)[0]
    num_rows = max(1, recipe.batch_tokens // length)
    rows = np.zeros((recipe.num_batches * num_rows, length), np.uint16)
    row, filled = 0, 0
    while row < len(rows):
        documents = [sample(rng, rng.choice((4, 6, 8, length // 100))) for _ in range(64)]
        for document in _encode(tokenizer, documents):
            part = document[: length - filled]
            rows[row, filled : filled + len(part)] = part
            filled += len(part)
            if filled == length:  # the rest of a document is cut: its beginning is still a good example
                row, filled = row + 1, 0
                if row == len(rows):
                    break
    return rows.reshape(recipe.num_batches, num_rows, length)


def _encode(tokenizer: Tokenizer, documents: list[list[Piece]]) -> list[np.ndarray]:
    encoded = iter(
        tokenizer.encode_batch_fast([text for pieces in documents for text, _ in pieces], add_special_tokens=False)
    )
    result = []
    for pieces in documents:
        parts = []
        for _, is_learnt in pieces:
            part = np.array(next(encoded).ids, np.uint16)
            parts.append(part | LEARNT_BIT if is_learnt else part)
        result.append(np.concatenate(parts))
    return result


def batches(recipe: Recipe, seed: int, num_workers: int) -> Iterator[np.ndarray]:
    """Yield batches [rows, length] without end; every shard is used twice, the second time a while later."""
    recent: deque[np.ndarray] = deque()
    for shard in _shards(recipe, seed, num_workers):
        yield from shard
        recent.append(shard)
        if len(recent) > _REPLAY_LAG:
            yield from recent.popleft()


def _shards(recipe: Recipe, seed: int, num_workers: int) -> Iterator[np.ndarray]:
    first = seed * 1_000_000
    if num_workers == 0:
        index = first
        while True:
            yield make_shard(recipe, index)
            index += 1
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
        # In order of their seeds, so that a run sees the same batches however the workers race.
        waiting = deque(pool.apply_async(make_shard, (recipe, first + index)) for index in range(4 * num_workers))
        index = len(waiting)
        while True:
            yield waiting.popleft().get()
            waiting.append(pool.apply_async(make_shard, (recipe, first + index)))
            index += 1
