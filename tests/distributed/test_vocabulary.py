"""Slices of the vocabulary: every token on one rank, and what ranks find out together."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.distributed.group import GroupCoordinator
from shoal.distributed.vocabulary import VocabularySlice
from tests.rank_threads import on_ranks


@settings(max_examples=30)
@given(st.integers(1, 1000), st.sampled_from([1, 2, 3, 4, 8]))
def test_every_token_is_on_one_rank(vocab_size: int, size: int) -> None:
    slices = on_ranks(size, lambda group: VocabularySlice(vocab_size, group))
    assert [i for each in slices for i in range(vocab_size)[each.tokens]] == list(range(vocab_size))
    for rank, each in enumerate(slices):
        assert each.start == rank * each.width and each.tokens.stop - each.tokens.start == each.num_tokens
        assert each.width == slices[0].width and (size == 1 or each.width % 64 == 0)
    assert slices[0].is_whole == (size == 1)


@settings(max_examples=30)
@given(st.sampled_from([1, 2, 4]), st.integers(0, 10_000))
def test_what_ranks_find_out_together(size: int, seed: int) -> None:
    """The best token of the whole row, the lowest id of equal ones, NaN above all: as argmax of everything."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-4, 4, (9, 130), generator=generator).float()
    logits[0] = float("-inf")
    logits[1, 77] = float("nan")

    def work(group: GroupCoordinator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        vocabulary = VocabularySlice(130, group)
        columns = torch.full((9, vocabulary.width), float("-inf"))
        columns[:, : vocabulary.num_tokens] = logits[:, vocabulary.tokens]
        values, ids = columns.max(dim=1)
        best = vocabulary.best(values, ids + vocabulary.start)
        return vocabulary.gather(columns), vocabulary.greatest(values), best

    for whole, greatest, best in on_ranks(size, work):
        assert torch.equal(whole.nan_to_num(), logits.nan_to_num())
        assert torch.equal(greatest.nan_to_num(), logits.amax(dim=1).nan_to_num())
        assert torch.equal(best, logits.argmax(dim=1))
